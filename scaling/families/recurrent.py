"""Recurrent language models in numbers: layers of gated recurrent units, their config, sizes and counts. No JAX.

The rule of sizes, for a width d: two layers, whatever the width; the depth at which recurrent language models are
commonly trained (Merity et al. 2018 use three or four, Kaplan et al. 2020 two to ten at one size).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.families.base import ModelConfig
from scaling.families.counting import Counts, Mixing, Product, Sees
from scaling.fields import require

network = "scaling.training.models.recurrent"
sees: tuple[Sees, ...] = ("causal",)
GATES = {"gru": 3}  # products of a cell with its input, and as many with its state


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(ModelConfig):
    """Layers of ``cell``, each on the normalised output of the one below; with ``residual`` added to it.

    The state is zero where a window begins, and where a document does if documents are masked.
    """

    family: Literal["recurrent"] = "recurrent"
    cell: Literal["gru"] = "gru"
    residual: bool = True

    def __post_init__(self) -> None:
        require(
            self.parameterization == "standard", "parameterization", self.parameterization,
            "standard: how rates transfer over the width of a recurrent cell is not known to hold",
        )  # fmt: skip
        super().__post_init__()


Config: type[ModelConfig] = RecurrentConfig


def shape(width: int, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"d_model": width, "num_layers": 2}


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    return dict(given)


def counts(config: RecurrentConfig, sees: Sees = "causal") -> Counts:
    """Parameters and products; a GRU has three of each kind, biases beside them, and one more bias in its candidate."""
    c, D, L, G = config, config.d_model, config.num_layers, GATES[config.cell]
    products = (
        Product("recurrent", D, D, G * L),  # with the input, all times at once
        Product("recurrent", D, D, G * L),  # with the state, one time after another
        Product("unembedding", D, c.vocab_size),
    )
    groups = {
        "embedding": c.vocab_size * D,
        "recurrent": L * (2 * G * D * D + (G + 1) * D),
        "norm": L * D + D,
        "unembedding": 0 if c.tied_embeddings else c.vocab_size * D,
    }
    return Counts(groups, products, (Mixing(D, 1, L, "scan"),))


def kept_values(config: RecurrentConfig) -> int:
    """What of the input goes to the gates, the gates, the state's part of the candidate, and the state."""
    return (2 * GATES[config.cell] + 2) * config.d_model


def pair_values(config: RecurrentConfig, seq_len: int) -> int:
    return 0


def divided(config: RecurrentConfig) -> list[tuple[str, int, str]]:
    return [
        ("d_model", config.d_model, "fsdp"),
        ("d_model", config.d_model, "tensor"),
        ("vocab_size", config.vocab_size, "tensor"),
    ]
