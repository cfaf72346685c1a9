"""Objectives, without JAX: what a batch is made of, and what the loss is of. One module each, in ``OBJECTIVES``."""

from typing import Any

from scaling.objectives import contrastive, masked, next_token, replaced_token, span_corruption
from scaling.objectives.base import Objective, ObjectiveConfig

OBJECTIVES: dict[str, Objective] = {
    "next_token": next_token, "masked": masked, "replaced_token": replaced_token, "span_corruption": span_corruption,
    "contrastive": contrastive,
}  # fmt: skip
NEXT_TOKEN = next_token.NextToken()


def of(config: ObjectiveConfig) -> Objective:
    """The objective that a config is of."""
    return OBJECTIVES[config.name]


def extra_ids(config: ObjectiveConfig, seq_len: int) -> int:
    """Ids of an objective's own, at the end of the vocabulary, that its windows of ``seq_len`` tokens need."""
    return of(config).extra_ids(config, seq_len)


def require_whole(config: ObjectiveConfig, num_parts: int) -> None:
    """Raises ValueError where a batch is asked for in parts whose rows' losses depend on rows of other parts."""
    if num_parts > 1 and of(config).rows_together(config) > 1:
        raise ValueError(
            f"execution.accumulation_steps is {num_parts}: write 1, or leave it out: under {config.name} a row's loss "
            "depends on other rows of its batch, which cannot be divided"
        )


def require_windows(config: ObjectiveConfig, corpus: Any, num_tokens: int | None) -> None:
    """Raises ValueError where validation on a corpus's first ``num_tokens`` has fewer windows than the loss of one
    depends on."""
    if (together := of(config).rows_together(config)) == 1:
        return  # before any is counted, which takes its time on a large split
    if (num_windows := len(corpus.validation_counts(num_tokens))) < together:
        raise ValueError(
            f"data.validation_fraction: validation has {num_windows} windows, and a loss of {config.name} is of "
            f"{together}: write a larger one, or fewer objective.negatives"
        )
