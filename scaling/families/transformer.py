"""The decoder-only Transformer in numbers: its config, its sizes from one dial, its counts. No JAX.

The rule of sizes, for a width d that is a multiple of 8: num_layers = max(2, round(.43 √d)); head_dim the largest power
of two that divides d and is at most √(8 d) and 128; num_heads = d / head_dim; d_ff = 4 d (SwiGLU: 8 d / 3, to the
nearest multiple of 8, which keeps the parameters). Width × layers: 16×2, 24×2, 32×2, 40×3, 48×3, 64×3, 80×4, 96×4,
128×5, …, 768×12, 4096×28. Depth grows as √d: GPT-2's aspect at 768, and shallow shapes that two cores train fast below.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.families.base import ModelConfig
from scaling.families.counting import Counts, Mixing, Product
from scaling.fields import require, require_positive

network = "scaling.training.models.transformer"
is_causal_only = False


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """A decoder-only Transformer; every size is explicit (the grid's one-dial sizes are expanded there).

    Letters used in shapes: D ``d_model``, F ``d_ff``, H ``num_heads``, G ``num_kv_heads``, K ``head_dim``,
    V ``vocab_size``, L ``num_layers``.
    """

    family: Literal["transformer"] = "transformer"
    num_heads: int
    head_dim: int
    num_kv_heads: int
    d_ff: int
    activation: Literal["gelu", "swiglu", "relu2"] = "gelu"
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    base_head_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "num_kv_heads", "d_ff", "rope_theta")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (RoPE rotates pairs)")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads ({self.num_heads})",
        )
        self.require_base_size("base_head_dim")


Config: type[ModelConfig] = TransformerConfig


def shape(width: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that follow from a width, beside what else is given; raises ValueError where they contradict it."""
    head_dim = 8
    while head_dim < 128 and width % (2 * head_dim) == 0 and (2 * head_dim) ** 2 <= 8 * width:
        head_dim *= 2
    found = {
        "d_model": width,
        "num_layers": max(2, round(0.43 * math.sqrt(width))),
        "num_heads": width // head_dim,
        "head_dim": head_dim,
        "d_ff": max(8, 8 * round(width / 3)) if given.get("activation") == "swiglu" else 4 * width,
    }
    if ("num_heads" in given) != ("head_dim" in given):
        one, other = ("num_heads", "head_dim") if "num_heads" in given else ("head_dim", "num_heads")
        if given[one] < 1 or width % given[one]:
            raise ValueError(f"{width} is not a multiple of {one}, {given[one]}; write one that is, or {other} too")
        found[other] = width // given[one]
    return found


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the fields that follow from others of them."""
    return {"num_kv_heads": given["num_heads"], **given} if "num_heads" in given else dict(given)


def mlp_matrices(config: TransformerConfig) -> int:
    """Matrices of shape (d_model, d_ff) in one block: SwiGLU has a gate besides up and down."""
    return 3 if config.activation == "swiglu" else 2


def counts(config: TransformerConfig, *, causal: bool = True) -> Counts:
    """Parameters, products and mixings. A tied head costs no parameters."""
    c, D, L = config, config.d_model, config.num_layers
    attn_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    products = (
        Product("attention", D, attn_width, 2 * L),  # queries, and the output
        Product("attention", D, kv_width, 2 * L),
        Product("mlp", D, c.d_ff, L * mlp_matrices(c)),
        Product("unembedding", D, c.vocab_size),
    )
    groups = {
        "embedding": c.vocab_size * D,
        "attention": L * (2 * D * attn_width + 2 * D * kv_width),
        "mlp": L * mlp_matrices(c) * D * c.d_ff,
        "norm": L * (2 * D + (2 * c.head_dim if c.qk_norm else 0)) + D,
        "unembedding": 0 if c.tied_embeddings else c.vocab_size * D,
    }
    return Counts(groups, products, (Mixing(attn_width, c.num_heads, L, "causal" if causal else "full"),))


def kept_values(config: TransformerConfig) -> int:
    attn_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return 2 * attn_width + 2 * kv_width + mlp_matrices(config) * config.d_ff


def pair_values(config: TransformerConfig, seq_len: int) -> int:
    return config.num_heads * seq_len


def divided(config: TransformerConfig) -> list[tuple[str, int, str]]:
    return [
        ("d_model", config.d_model, "fsdp"),
        ("num_heads", config.num_heads, "tensor"),
        ("num_kv_heads", config.num_kv_heads, "tensor"),
        ("d_ff", config.d_ff, "tensor"),
        ("vocab_size", config.vocab_size, "tensor"),
    ]
