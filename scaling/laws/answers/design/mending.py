"""The run without which nothing is known: it gives an interval its end, or a law its identification."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from scaling.laws.answers.design.target import Target
from scaling.laws.fitting.coordinates import Coordinates, Model
from scaling.laws.fitting.estimate import Fit, fit
from scaling.laws.fitting.identify import check_identifiable
from scaling.laws.fitting.starts import start_grid
from scaling.laws.forms.law import Form
from scaling.laws.intervals.profile import profile
from scaling.laws.tables.observations import Observations

if TYPE_CHECKING:
    from scaling.laws.analysis import Analysis

MAX_REFITS = 24
MAX_CONDITION = 1e6  # of the Jacobian: beyond, the information's eigenvalues are ``beliefs.SINGULAR``


def bounding(
    found: "Analysis", columns: Mapping[str, np.ndarray], target: Target, level: float, order: Sequence[int]
) -> tuple[tuple[int, float] | None, list[str]]:
    """((the first candidate, in this order, after which the interval should have both ends, its width then), words).

    Each is added with the loss that the surface law expects of it, the law refitted and profiled.
    """
    fitted = found.fits[str(found.surface)]
    quantity = target.quantity(fitted.form, found.cost)
    for i in order[:MAX_REFITS]:
        try:
            ends = profile(_with(fitted, columns, [i]), quantity, level).interval  # type: ignore[arg-type]  # it has one: ``Target.interval``
        except ValueError:
            continue
        lower, upper = target.ends(ends)
        if math.isfinite(target.width((lower, upper))):
            said = f"the interval of {target} has no end: the first run should give it one, {lower:.3g} to {upper:.3g}"
            return (i, target.width((lower, upper))), [f"{said}, if its loss is what the law expects"]
    tried = min(len(order), MAX_REFITS)
    said = f"the interval of {target} has no end, and none of {tried} candidates alone should give it one"
    return None, [f"{said}: they are in the order in which they narrow it"]


def _with(fitted: Fit, columns: Mapping[str, np.ndarray], rows: Sequence[int]) -> Fit:
    """The law refitted with candidates at the losses that it expects of them, its own δ kept."""
    seen = fitted.observations
    new = {c: np.asarray(columns[c])[list(rows)] for c in fitted.form.columns}
    more = added(seen, new, fitted.predict(**new))
    spread = fitted.spread
    near = [{k: v * f for k, v in fitted.params.items()} for f in (1.0, 0.9, 1.1)]
    return fit(
        more, fitted.form, loss=fitted.loss.name, delta=fitted.loss.delta, tau=fitted.loss.tau,
        log=fitted.problem.model.log, variance=None if spread is None else lambda c: spread(c) ** 2, starts=near,
    )  # fmt: skip


def added(seen: Observations, new: Mapping[str, np.ndarray], loss: np.ndarray) -> Observations:
    """Observations with rows of mean weight added; of columns, those that the new rows have."""
    count = len(loss)
    return replace(
        seen,
        columns={c: np.concatenate([seen.columns[c], v]) for c, v in new.items()},
        loss=np.concatenate([seen.loss, loss]),
        weight=np.concatenate([seen.weight, np.full(count, seen.weight.mean())]),
        run=np.concatenate([seen.run.astype(object), [f"candidate {i}" for i in range(count)]]),
        budget=np.concatenate([np.asarray(seen.budget, dtype=np.float64), np.full(count, np.nan)]),
    )


def identifying(
    seen: Observations, columns: Mapping[str, np.ndarray], form: Form, fitted: Fit | None = None
) -> tuple[int, float] | None:
    """(the candidate after which these rows determine a form best, the Jacobian's condition number then); None where no
    single one is enough.

    The Jacobian, columns scaled to one length, is taken at the fit, where there is one, else at the form's own starts
    for these rows, of which the median condition number counts.
    """
    best = None
    for i in range(len(next(iter(columns.values())))):
        new = {c: np.asarray(columns[c], dtype=np.float64)[[i]] for c in form.columns}
        more = added(seen, new, np.array([np.median(seen.loss)]))
        try:
            check_identifiable(more, form)
        except ValueError:
            continue
        number = _condition(more, form, fitted)
        if number < MAX_CONDITION and (best is None or number < best[1]):
            best = (i, number)
    return best


def _condition(rows: Observations, form: Form, fitted: Fit | None) -> float:
    if fitted is None:
        model = Model(Coordinates(form, {c: rows.columns[c] for c in form.columns}, rows.loss), rows.columns)
        theta = start_grid(model, rows)
    else:
        model, theta = Model(fitted.coordinates, rows.columns, fitted.problem.model.log), fitted.theta[None]
    _, jacobian, _ = model.derivatives(theta)
    with np.errstate(all="ignore"):
        J = jacobian / np.sqrt((jacobian**2).sum(axis=2, keepdims=True))
    usable = np.isfinite(J).all(axis=(1, 2))
    return float(np.median(np.linalg.cond(J[usable]))) if usable.any() else math.inf
