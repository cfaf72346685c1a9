"""The mixture of experts that a Transformer's feed-forward may be, in numbers: its config. No JAX."""

import math
from dataclasses import dataclass
from typing import Literal

from scaling.fields import Strict, require, require_positive


@dataclass(frozen=True)
class ExpertsConfig(Strict):
    """``experts`` feed-forwards of width d_ff / ``granularity`` instead of one of d_ff, of which a token meets few.

    A token meets the ``active`` to which the router gives it the largest gates, and all ``shared`` ones, of that width
    too and not among ``experts``: a feed-forward of width (active + shared) d_ff / granularity (Dai et al. 2024,
    DeepSeekMoE, equations 6 to 11; Krajewski et al. 2024 call d_ff / width the granularity). All three count the
    narrow experts that there are: at granularity m, m active ones are as wide as the dense feed-forward.

    With x what the feed-forward reads, p = softmax(x W_r) over ``experts``, in float32, the output is
    Σ p_e f_e(x) over the active e + Σ f_s(x) over the shared s. The gates p are not normalised over the active ones
    (Fedus et al. 2022, equation 2; DeepSeekMoE): the gate of a single one would be 1, and teach the router nothing.
    """

    experts: int
    active: int
    shared: int = 0
    granularity: int = 1
    # α of a layer's α E Σ_e f_e P_e, f_e the share of a window's choices that fell on e, P_e its mean gate: 1 at least
    # where all are used alike (Fedus et al. 2022, equations 4 to 6, and their α). Of each window and not of the batch
    # (DeepSeek-AI 2024, DeepSeek-V3, equations 17 to 20): a product of two means over rows is not the mean of its
    # parts', and would be another number on another mesh or in other parts.
    balance_loss: float = 0.01
    # Coefficient of a layer's mean (log Σ exp of the router's logits)², and its value (Zoph et al. 2022, ST-MoE,
    # equation 5).
    router_z_loss: float = 0.001
    # dropless: every token reaches its experts, however uneven (Gale et al. 2022). capacity: of each window an expert
    # takes its first ⌈capacity_factor · active · T / experts⌉ tokens, the others go without it. Of a window, and in
    # the order of its tokens, so that neither other rows nor later tokens change what becomes of one.
    routing: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "experts", "active", "granularity")
        require(self.active <= self.experts, "active", self.active, f"at most experts, which is {self.experts}")
        for name in ("shared", "balance_loss", "router_z_loss"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, value, "a number ≥ 0")
        if self.routing == "capacity":
            given = self.capacity_factor is not None and 0 < self.capacity_factor < math.inf
            want = "a positive number, as 1.25: room for a quarter more tokens than an even share"
            require(given, "capacity_factor", self.capacity_factor, want)
        else:
            require(self.capacity_factor is None, "capacity_factor", self.capacity_factor,
                    "null, or routing: capacity")  # fmt: skip

    def capacity(self, num_tokens: int) -> int:
        """Tokens of a window that an expert takes at most; all of them where none is dropped."""
        if self.capacity_factor is None:
            return num_tokens
        return min(num_tokens, math.ceil(self.capacity_factor * self.active * num_tokens / self.experts))
