"""Objectives, without JAX: what a batch is made of, and what the loss is of. One module each, in ``OBJECTIVES``."""

from scaling.objectives import masked, next_token, replaced_token, span_corruption
from scaling.objectives.base import Objective, ObjectiveConfig

OBJECTIVES: dict[str, Objective] = {
    "next_token": next_token, "masked": masked, "replaced_token": replaced_token, "span_corruption": span_corruption,
}  # fmt: skip
NEXT_TOKEN = next_token.NextToken()


def of(config: ObjectiveConfig) -> Objective:
    """The objective that a config is of."""
    return OBJECTIVES[config.name]


def extra_ids(config: ObjectiveConfig, seq_len: int) -> int:
    """Ids of an objective's own, at the end of the vocabulary, that its windows of ``seq_len`` tokens need."""
    return of(config).extra_ids(config, seq_len)
