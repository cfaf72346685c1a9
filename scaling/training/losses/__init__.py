"""Losses of objectives on the device: each a module with ``losses`` of a batch, and the ``param_specs`` of what it
trains beside the model. ``Objective.losses`` names it.

Shapes: B rows, T places of a row that have a loss (its tokens, most often).
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

from scaling import objectives
from scaling.config import RunConfig
from scaling.execution import ExecutionConfig
from scaling.training import models
from scaling.training.models.parameters import ParamSpec


class Losses(NamedTuple):
    """What the loss of a batch is made of.

    Training minimises scale · mean(loss · weight) + z_loss · mean(log_normalizer² · weight) + penalty, the weights
    having a mean of 1 over the batch.

    Args:
      loss_BT: in the objective's unit, what laws are of.
      weights_BT: of each place; None where all weigh alike.
      log_normalizer_BT: of what the z-loss is; None where there is none.
      scale: of the loss in what is minimised.
      penalty: what is minimised besides, a mean over the rows, so that the mean of the parts' is the batch's: of
        experts used unevenly, say, or a generator's loss. None: nothing.
      measures: what a record keeps of the validation split besides, by name: (sums_B…, weights_B), whose ratio over all
        rows it is.
    """

    loss_BT: Any
    weights_BT: Any = None
    log_normalizer_BT: Any = None
    scale: float = 1.0
    penalty: Any = None
    measures: dict[str, tuple[Any, Any]] = {}


def of_batch(run: RunConfig, execution: ExecutionConfig, params, batch) -> Losses:
    """Returns the losses of a batch of the run's objective, its leading axis B."""
    return _module(run).losses(run, execution, params, batch)


def param_specs(run: RunConfig) -> dict[str, ParamSpec]:
    """Returns every parameter that a run trains, by name: the model's, and what its objective has beside it."""
    return models.param_specs(run.model) | _module(run).param_specs(run)


def _module(run: RunConfig) -> ModuleType:
    return importlib.import_module(objectives.of(run.objective).losses)
