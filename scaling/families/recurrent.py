"""Recurrent language models in numbers: layers of a recurrent cell, their config, sizes and counts. No JAX.

The rule of sizes, for a width d: two layers, whatever the width; recurrent language models are shallow (three or four
layers in Merity et al. 2018; one, two and four in Kaplan et al. 2020, figure 7).

Every FLOP rule counts them. Kaplan et al. give LSTMs no formula of their own: figure 7 sets them beside Transformers at
equal N, non-embedding parameters, so that C = 6 N is theirs too; rule ``kaplan`` is 6 N_w, as no token meets another by
a product. Rule ``chinchilla`` is the sum of Hoffmann et al. 2022, appendix F, with no attention in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.families.base import ModelConfig
from scaling.families.counting import Counts, Mixing, Product, Sees
from scaling.fields import require

network = "scaling.training.models.recurrent"
sees: tuple[Sees, ...] = ("causal",)


@dataclass(frozen=True)
class Cell:
    """What a cell is made of, in numbers.

    Args:
      gates: products of it with its input, and as many with its state.
      states: vectors that it hands to the next time step.
      apart: gates, the last ones, that see the two products apart; the others see their sum.
    """

    gates: int
    states: int
    apart: int = 0

    @property
    def seen(self) -> int:
        """Vectors that a cell's nonlinearities see beside its states; each has a bias."""
        return self.gates + self.apart


CELLS = {"rnn": Cell(gates=1, states=1), "lstm": Cell(gates=4, states=2), "gru": Cell(gates=3, states=1, apart=1)}


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(ModelConfig):
    """Layers of ``cell``, each on the normalised output of the one below; with ``residual`` added to it.

    ``rnn`` is Elman's with tanh. The state is zero where a window begins, and where a document does if documents are
    masked.
    """

    family: Literal["recurrent"] = "recurrent"
    cell: Literal["rnn", "lstm", "gru"] = "gru"
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
    """Parameters and products: of each gate one with the input and one with the state, a bias for whatever is seen."""
    c, D, L, cell = config, config.d_model, config.num_layers, CELLS[config.cell]
    products = (
        Product("recurrent", D, D, cell.gates * L),  # with the input, all times at once
        Product("recurrent", D, D, cell.gates * L),  # with the state, one time after another
        Product("unembedding", D, c.vocab_size),
    )
    groups = {
        "embedding": c.vocab_size * D,
        "recurrent": L * (2 * cell.gates * D * D + cell.seen * D),
        "norm": L * D + D,
        "unembedding": 0 if c.tied_embeddings else c.vocab_size * D,
    }
    return Counts(groups, products, (Mixing(D, 1, L, "scan"),))


def kept_values(config: RecurrentConfig) -> int:
    """What the cell's nonlinearities saw, and its states."""
    cell = CELLS[config.cell]
    return (cell.seen + cell.states) * config.d_model


def pair_values(config: RecurrentConfig, seq_len: int) -> int:
    return 0


def divided(config: RecurrentConfig) -> list[tuple[str, int, str]]:
    return [
        ("d_model", config.d_model, "fsdp"),
        ("d_model", config.d_model, "tensor"),
        ("vocab_size", config.vocab_size, "tensor"),
    ]
