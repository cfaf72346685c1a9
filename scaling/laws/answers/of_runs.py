"""Completes fit.json by what records say without a law: a source's truth, the losses' precision, best rates."""

from collections.abc import Mapping, Sequence
from typing import Any

from scaling.laws.answers import learning_rates, precision, truth
from scaling.records import RunRecord, loss_unit


def complete(fit: Mapping[str, Any], runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Returns fit.json's content with what the ``runs`` themselves answer, so that whoever prints it computes nothing.

    - ``truth``, where all runs read one source that knows its own entropy: ``truth.of`` them, ``least_loss``, what that
      source itself has on the validation split, nats per token, and ``irreducible``, every interval of a law's E
      against it;
    - ``loss_unit``, their objective's;
    - ``precision``: of each source, as ``precision.of`` has it;
    - ``learning_rates``: cells that tried several, as ``learning_rates.cells`` has them.
    """
    found = dict(fit) | {"loss_unit": loss_unit(runs)}
    if (known := truth.of(runs)) is not None:
        least = known["best_validation_loss"]
        found["truth"] = {**known, "least_loss": least, "irreducible": truth.irreducible(fit, least)}
    return found | {"precision": precision.of(runs), "learning_rates": learning_rates.cells(runs)}
