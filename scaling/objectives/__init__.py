"""Objectives, without JAX: what a batch is made of, and what the loss is of. One module each, in ``OBJECTIVES``."""

from scaling.objectives import masked, next_token, replaced_token
from scaling.objectives.base import Objective, ObjectiveConfig

OBJECTIVES: dict[str, Objective] = {"next_token": next_token, "masked": masked, "replaced_token": replaced_token}
NEXT_TOKEN = next_token.NextToken()


def of(config: ObjectiveConfig) -> Objective:
    """The objective that a config is of."""
    return OBJECTIVES[config.name]
