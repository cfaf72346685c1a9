"""What every objective says of itself: what a batch is made of windows, and what its loss is of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from scaling.families.counting import Counts, Lengths, Sees
from scaling.fields import Variants

if TYPE_CHECKING:
    import numpy as np

    from scaling.families import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Variants, told_by="name", usual="next_token"):
    """What a model is trained to do; its other fields are the objective's own."""

    name: str


class Objective(Protocol):
    """What a module of ``scaling.objectives`` holds. None of it needs JAX. ``config`` is of its own ``Config``.

    A batch is a dict of arrays whose rows are those of the windows it was made of; it is made on the host, a pure
    function of the windows and of their keys, so that any mesh, part or restart has the same.
    """

    Config: type[ObjectiveConfig]
    losses: str  # the module that computes them (``scaling.training.losses``)
    unit: str  # of the loss
    sees: Sees  # what a token sees
    is_likelihood: bool  # of the text: then bits per byte mean something

    def extra_ids(self, config: Any, seq_len: int) -> int:
        """Ids that the vocabulary has beyond the tokenizer's, at its end."""

    def lengths(self, config: Any, seq_len: int) -> Lengths:
        """Tokens of a window, by what becomes of them; raises ValueError for a window that is too short."""

    def counts(self, config: Any, model: "ModelConfig", of_model: Counts) -> Counts:
        """What is trained, from the counts of the model alone: with what the objective has beside it."""

    def networks(self, config: Any, model: "ModelConfig") -> "tuple[ModelConfig, ...]":
        """Every network that a step goes through, the model among them: what its activations are of."""

    def guess(self, config: Any, vocab_size: int) -> float:
        """The loss of a uniform guess."""

    def require_fit(self, config: Any, run: Any) -> None:
        """Raises ValueError for a run that the objective cannot be of, in one line that says what to write."""

    def rows_together(self, config: Any) -> int:
        """Of how many rows the loss of each depends on all, whose batches are never divided: validation is in groups of
        so many; 1 where a row's loss is of that row alone."""

    def predicted(self, config: Any, tokens_R: "np.ndarray") -> "np.ndarray":
        """How many tokens carry loss in windows that have so many targets."""

    def batch_spec(self, config: Any, seq_len: int) -> dict[str, tuple[int, str]]:
        """Columns and dtype of each array of a batch."""

    def batch(
        self,
        config: Any,
        vocab_size: int,
        windows_RS: "np.ndarray",
        keys_R: "np.ndarray",
        present_RT: "np.ndarray | None" = None,
    ) -> "dict[str, np.ndarray]":
        """The batch of windows of S = T + 1 tokens, R of them, each with a key of its own (uint64).

        ``present_RT``: 0 where a window's target, its tokens but the first, is padding; None where none is. Where the
        model reads tokens whole before it writes, they are ``read``.
        """  # fmt: skip

    def read(self, batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """(inputs_BT, targets_BT, weights_BT or None where all weigh alike) of a batch, traced or not."""


def model_alone(config: ObjectiveConfig, model: "ModelConfig", of_model: Counts) -> Counts:
    """``Objective.counts`` of those that train nothing beside the model."""
    return of_model


def one_network(config: ObjectiveConfig, model: "ModelConfig") -> "tuple[ModelConfig, ...]":
    """``Objective.networks`` of these."""
    return (model,)


def over_vocabulary(config: ObjectiveConfig, vocab_size: int) -> float:
    """``Objective.guess`` of those that predict tokens."""
    return math.log(vocab_size)


def each_alone(config: ObjectiveConfig) -> int:
    """``Objective.rows_together`` of those whose loss of a row is of that row alone."""
    return 1


def any_fits(config: ObjectiveConfig, run: Any) -> None:
    """``Objective.require_fit`` of those that ask nothing of a run but what ``sees`` says."""
