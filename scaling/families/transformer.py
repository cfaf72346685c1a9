"""The decoder-only Transformer in numbers: its config, its sizes from one dial, its counts. No JAX.

By default it is today's: pre-norm by RMS, rotary positions, no biases, no dropout. The textbook's (Vaswani et al. 2017)
and those between, GPT-2's among them, are settings of it.

The rule of sizes, for a width d that is a multiple of 8 (of 4, where the heads are written): num_layers = max(2,
round(.43 √d)); head_dim the largest power of two that divides d and is at most √(8 d) and 128; num_heads = d /
head_dim; d_ff = 4 d (with a gate, SwiGLU's or GEGLU's: 8 d / 3, to the nearest multiple of 8, which keeps the
parameters). Width × layers: 16×2, 24×2, 32×2, 40×3, 48×3, 64×3, 80×4, 96×4, 128×5, …, 768×12, 4096×28. Depth grows as
√d: GPT-2's aspect at 768, and shallow shapes that two cores train fast below.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.families.base import ModelConfig
from scaling.families.counting import Counts, Mixing, Over, Product, Sees
from scaling.families.experts import ExpertsConfig
from scaling.fields import require, require_fraction, require_positive, since

network = "scaling.training.models.transformer"
sees: tuple[Sees, ...] = ("causal", "full", "prefix")
_ROPE_THETA = 10_000.0
# Activations that multiply by another product of the same input (Shazeer 2020, arXiv 2002.05202).
GATED = ("swiglu", "geglu")
# Rows of the table of biases by distance, and the distance from which all are alike (Raffel et al. 2020, arXiv
# 1910.10683, section 2.1).
NUM_BUCKETS = 32
MAX_DISTANCE = 128


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
    activation: Literal["gelu", "swiglu", "relu2", "relu", "geglu"] = "gelu"
    qk_norm: bool = False  # queries and keys of each head by ``norm``
    rope_theta: float = _ROPE_THETA
    base_head_dim: int | None = None
    norm: Literal["rms", "layer"] = since(3, "rms")  # with a scale each; layer, where there are biases, with one too
    # pre: x + f(norm(x)), and a last norm before the head; post: norm(x + f(x)), after which there is none to add. μP
    # scales width under either (Yang et al. 2022 transfer rates over the width of post-norm Transformers too).
    norm_position: Literal["pre", "post"] = since(3, "pre")
    # rotary: of queries and keys; learned, sinusoidal: added to the embedding; relative: a bias of each head's logits,
    # by bucket of distance, the same in all layers (Raffel et al. 2020). All counted within documents if masked.
    positions: Literal["rotary", "learned", "sinusoidal", "none", "relative"] = since(3, "rotary")
    num_positions: int | None = since(3, None)  # rows of the learned table: the most tokens that a window may have
    biases: bool = since(3, False)  # on every linear layer but the head
    # The table's rows times d_model^1/2 (Vaswani et al. 2017, section 3.4), and drawn as much smaller; under μP, where
    # no multiplier of an embedding may grow with width, base_d_model^1/2.
    scaled_embeddings: bool = since(3, False)
    # In training, of the embedding with its positions and of what a layer adds to x (Vaswani et al. 2017, section 5.4).
    # Not of the weights of attention, as GPT-2 has it besides: fused kernels have none.
    dropout: float = since(3, 0.0)
    mlp: ExpertsConfig | None = since(3, None)  # noqa: RUF009 (null: a single feed-forward, of all tokens)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_heads", "head_dim", "num_kv_heads", "d_ff", "rope_theta")
        require_fraction(self, "dropout")
        self._require_positions()
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads ({self.num_heads})",
        )
        self.require_base_size("base_head_dim")
        if self.mlp is not None:
            self._require_experts(self.mlp)

    def _require_positions(self) -> None:
        """Raises ValueError for what positions of this kind cannot be, or have nothing to do with."""
        if self.positions == "rotary":
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (RoPE rotates pairs)")
        else:
            want = f"{_ROPE_THETA}, which it is without a word, or positions: rotary"
            require(self.rope_theta == _ROPE_THETA, "rope_theta", self.rope_theta, want)
        if self.positions == "sinusoidal":
            require(self.d_model % 2 == 0, "d_model", self.d_model, "an even number (a sine and a cosine by turns)")
        if self.positions == "learned":
            want = "the most tokens that a window may have, data.seq_len or more"
            require(
                self.num_positions is not None and self.num_positions > 0, "num_positions", self.num_positions, want
            )
        else:
            require(self.num_positions is None, "num_positions", self.num_positions, "null, or positions: learned")
        if self.positions == "relative":
            require(
                self.parameterization == "standard", "parameterization", self.parameterization,
                "standard: how rates of biases by distance transfer over width has not been checked here",
            )  # fmt: skip

    def _require_experts(self, mlp: ExpertsConfig) -> None:
        """Raises ValueError for what experts of this model cannot be."""
        want = f"a divisor of d_ff, which is {self.d_ff}: an expert is d_ff / granularity wide"
        require(self.d_ff % mlp.granularity == 0, "mlp.granularity", mlp.granularity, want)
        require(
            self.parameterization == "standard", "parameterization", self.parameterization,
            "standard: that rates transfer over the width of a model with experts was not shown here",
        )  # fmt: skip

    @property
    def expert_width(self) -> int:
        """Of one feed-forward: d_ff, or of one expert."""
        return self.d_ff if self.mlp is None else self.d_ff // self.mlp.granularity

    @property
    def is_random(self) -> bool:
        return self.dropout > 0

    @property
    def mixes_documents(self) -> str | None:
        # A document's tokens would take the room of the next one's.
        return "model.mlp.routing" if self.mlp is not None and self.mlp.routing == "capacity" else None

    @property
    def longest_window(self) -> tuple[str, int] | None:
        return None if self.num_positions is None else ("num_positions", self.num_positions)


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
        "d_ff": max(8, 8 * round(width / 3)) if given.get("activation") in GATED else 4 * width,
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
    """Matrices of shape (d_model, d_ff) in one block: SwiGLU and GEGLU have a gate besides up and down."""
    return 3 if config.activation in GATED else 2


def position_parameters(config: TransformerConfig) -> int:
    """Of one stack's table of positions: rows of the width, or of a number a head for each bucket of distances."""
    by_distance = NUM_BUCKETS * config.num_heads if config.positions == "relative" else 0
    return (config.num_positions or 0) * config.d_model + by_distance


def norm_has_bias(config: TransformerConfig) -> bool:
    return config.norm == "layer" and config.biases


def counts(config: TransformerConfig, sees: Sees = "causal") -> Counts:
    """Parameters, products and mixings. A tied head costs no parameters.

    Experts are in group ``mlp``, routed or shared, and what chooses them in ``router``. A linear layer's bias is in its
    matrix's group; a table of positions in ``embedding``, so that it is no part of
    ``non_embedding`` (Kaplan et al. 2020, section 2.1).
    """
    c, D, L = config, config.d_model, config.num_layers
    attn_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    over: Over = "both" if sees == "prefix" else "written"  # the head is for what is written alone
    products = (
        Product("attention", D, attn_width, 2 * L, over=over),  # queries, and the output
        Product("attention", D, kv_width, 2 * L, over=over),
        *_mlp_products(c, over),
        Product("unembedding", D, c.vocab_size),
    )
    F, routed = c.expert_width, 1 if c.mlp is None else c.mlp.experts
    one_mlp = mlp_matrices(c) * D * F + ((mlp_matrices(c) - 1) * F + D if c.biases else 0)
    attention_biases = attn_width + 2 * kv_width + D if c.biases else 0
    normed = L * (2 * D + (2 * c.head_dim if c.qk_norm else 0)) + (D if c.norm_position == "pre" else 0)
    groups = {
        "embedding": c.vocab_size * D + position_parameters(c),
        "attention": L * (2 * D * attn_width + 2 * D * kv_width + attention_biases),
        "mlp": L * (routed + (c.mlp.shared if c.mlp else 0)) * one_mlp,
        **({} if c.mlp is None else {"router": L * D * c.mlp.experts}),
        "norm": normed * (2 if norm_has_bias(c) else 1),
        "unembedding": 0 if c.tied_embeddings else c.vocab_size * D,
    }
    mixing = Mixing(attn_width, c.num_heads, L, sees, over)
    return Counts(groups, products, (mixing,), inactive=0 if c.mlp is None else L * (routed - c.mlp.active) * one_mlp)


def _mlp_products(config: TransformerConfig, over: Over) -> list[Product]:
    c, F, copies, mlp = config, config.expert_width, config.num_layers * mlp_matrices(config), config.mlp
    if mlp is None:
        return [Product("mlp", c.d_model, F, copies, over=over)]
    shared = [Product("mlp", c.d_model, F, copies * mlp.shared, over=over)] if mlp.shared else []
    return [
        Product("mlp", c.d_model, F, copies * mlp.experts, share=mlp.active / mlp.experts, over=over),
        *shared,
        Product("router", c.d_model, mlp.experts, c.num_layers, over=over, is_hidden=False),
    ]


def kept_values(config: TransformerConfig) -> int:
    attn_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    masks = 2 * config.d_model // (4 if config.dtype == "float32" else 2) if config.is_random else 0  # of a byte each
    mlp, inside = config.mlp, mlp_matrices(config) * config.expert_width
    if mlp is not None:  # of each expert its input and output too, and the router's logits, gates and choices
        inside = mlp.active * (inside + 2 * config.d_model) + mlp.shared * inside + 2 * mlp.experts
    return 2 * attn_width + 2 * kv_width + inside + masks


def pair_values(config: TransformerConfig, seq_len: int) -> int:
    return config.num_heads * seq_len


def divided(config: TransformerConfig) -> list[tuple[str, int, str]]:
    return [
        ("d_model", config.d_model, "fsdp"),
        ("num_heads", config.num_heads, "tensor"),
        ("num_kv_heads", config.num_kv_heads, "tensor"),
        *_divided_mlp(config),
        ("vocab_size", config.vocab_size, "tensor"),
    ]


def _divided_mlp(config: TransformerConfig) -> list[tuple[str, int, str]]:
    """Routed experts lie whole on a device, each on one; a shared one is divided as a feed-forward is."""
    if config.mlp is None:
        return [("d_ff", config.d_ff, "tensor")]
    shared = [("d_ff / mlp.granularity", config.expert_width, "tensor")] if config.mlp.shared else []
    return [("mlp.experts", config.mlp.experts, "tensor"), *shared]
