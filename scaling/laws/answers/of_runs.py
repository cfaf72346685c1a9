"""Completes fit.json by what records say without a law: a source's truth, the losses' precision, best rates."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
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
    - in every law's E: the standard error that all losses share (``precision.shared_error``), in its interval, and
      ``evaluation``, that error and the interval without it, of the loss on this validation split;
    - ``learning_rates``: cells that tried several, as ``learning_rates.cells`` has them.
    """
    found = dict(fit) | {"loss_unit": loss_unit(runs)}
    if (known := truth.of(runs)) is not None:
        least = known["best_validation_loss"]
        found["truth"] = {**known, "least_loss": least, "irreducible": truth.irreducible(fit, least)}
    if "laws" in found:
        found["laws"] = with_shared_error(found["laws"] or {}, precision.shared_error(runs))
    return found | {"precision": precision.of(runs), "learning_rates": learning_rates.cells(runs)}


def with_shared_error(laws: Mapping[str, Any], error: float | None) -> dict[str, Any]:
    """Returns fit.json's laws with the validation set's own ``error``, which all losses share, in E's intervals.

    An additive error of every loss moves E alone, and with it a ceiling L_0: each end lies √(half² + (z error)²) from
    the value, no lower than 0. A law that has ``evaluation`` was completed before, and is left as it is.
    """
    if not error:
        return dict(laws)
    out: dict[str, Any] = {}
    for name, law in laws.items():
        value, ends = law["params"].get("E"), (law.get("intervals") or {}).get("E")
        if value is None or not ends or "evaluation" in law:
            out[name] = law
            continue
        reach = error * NormalDist().inv_cdf(0.5 + 0.5 * law.get("level", 0.95))
        told = {"standard_error": error, "E_on_this_split": list(ends)}
        wide = {k: _widened(law["params"][k], law["intervals"][k], reach) for k in _levels(law)}
        out[name] = {**law, "intervals": {**law["intervals"], **wide}, "evaluation": told}
    return out


def _levels(law: Mapping[str, Any]) -> list[str]:
    """Parameters of a law that are losses: its floor, and its ceiling."""
    return [name for name in ("E", "L_0") if name in law["params"] and law["intervals"].get(name)]


def _widened(value: float, ends: Sequence[float | None], reach: float) -> list[float | None]:
    low, high = (None if end is None else math.hypot(end - value, reach) for end in ends)
    return [None if low is None else max(value - low, 0.0), None if high is None else value + high]
