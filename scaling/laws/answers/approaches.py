"""Finds Chinchilla's envelope of loss curves, and calls ``isoflop`` for the minima of IsoFLOP profiles."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.answers.budgets import Profile, profiles
from scaling.laws.answers.isoflop import interpolated_minimum, isoflop, parabola_minimum
from scaling.laws.fitting import identify
from scaling.laws.forms.law import Form
from scaling.laws.tables.observations import Observations

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Profile", "envelope", "frontier", "interpolated_minimum", "isoflop", "parabola_minimum", "profiles", "select",
]  # fmt: skip


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(intercept) C^slope from a straight line in logs."""

    slope: float
    intercept: float

    @classmethod
    def through(cls, flops: np.ndarray, y: np.ndarray) -> "PowerLaw":
        slope, intercept = np.polyfit(np.log(flops), np.log(y), 1)
        return cls(float(slope), float(intercept))


def envelope(
    observations: Observations, curves: "pd.DataFrame | None" = None, *, flops: str = "exact", num_points: int = 200
) -> dict[str, Any] | None:
    """Approach 1: at each compute, the run with the lowest loss so far; N ∝ C^a through those points.

    Curves are interpolated linearly in (log C, log loss) between their own points; each run's final loss is one of
    them. Without curves only final points count, and the envelope is the runs no cheaper run beats.

    Mid-run points of a schedule that decays at the end (WSD, cosine) lie above what a run of that length would reach,
    so the envelope is biased towards the ends of runs; ``note`` says so.

    Returns:
      {"points": [{flops, num_params, num_tokens, loss, run}], "num_runs", "a", "b", "source", "note"}, or None when
      there are fewer than two points. ``a`` and ``b`` are None where final points are the design's own line, which
      ``note`` then says.
    """
    lines = _lines(observations, curves, flops)
    told = None
    if curves is None or all(len(x) == 1 for *_, x, _ in lines):
        points, source = _lower_corner(observations), "final points"
        told = identify.unidentified_points(observations)
        note = "final points only: no loss curves were given" if told is None else str(told)
    else:
        points, source = _lowest(lines, num_points), "curves"
        note = "mid-run points are not annealed: they lie above the final loss of a run that long"
    if len(points) < 2:
        return None
    C, N, D = (np.array([p[k] for p in points]) for k in ("flops", "num_params", "num_tokens"))
    distinct = len({p["run"] for p in points})
    varied = told is None and len(np.unique(C)) > 1
    return {
        "points": points,
        "num_runs": distinct,
        "a": PowerLaw.through(C, N).slope if varied else None,
        "b": PowerLaw.through(C, D).slope if varied else None,
        "source": source,
        "note": note,
    }


def _lines(observations: Observations, curves: "pd.DataFrame | None", flops: str) -> list[tuple[Any, ...]]:
    """(run, num_params, tokens per FLOP, log C, log loss) of each run, final point included."""
    column = f"flops_{flops}" if curves is not None and f"flops_{flops}" in curves else "flops"
    by_run = dict(tuple(curves.groupby("run_id"))) if curves is not None and len(curves) else {}
    lines = []
    for i, run in enumerate(observations.run):
        C, D, N = (observations.columns[c][i] for c in ("flops", "num_tokens", "num_params"))
        x, y = [np.log(C)], [np.log(observations.loss[i])]
        if run in by_run and column in by_run[run]:
            frame = by_run[run]
            c, loss = frame[column].to_numpy(float), frame["loss"].to_numpy(float)
            ok = (c > 0) & (c < C * (1 - 1e-9)) & np.isfinite(loss) & (loss > 0)
            x, y = [*np.log(c[ok]), *x], [*np.log(loss[ok]), *y]
        order = np.argsort(x, kind="stable")
        lines.append((str(run), float(N), D / C, np.array(x)[order], np.array(y)[order]))
    return lines


def _lowest(lines: list[tuple[Any, ...]], num_points: int) -> list[dict[str, Any]]:
    """The lowest curve at log-spaced C, from where the second run has a point to the end of the last."""
    starts, ends = np.array([x[0] for *_, x, _ in lines]), np.array([x[-1] for *_, x, _ in lines])
    grid = np.linspace(np.sort(starts)[min(1, len(starts) - 1)], ends.max(), num_points)
    loss = np.stack([np.interp(grid, x, y, left=np.inf, right=np.inf) for *_, x, y in lines])
    best = loss.argmin(axis=0)
    points = []
    for g, k in zip(grid, best):
        run, N, tokens_per_flop, x, y = lines[k]
        if np.isfinite(loss[k, grid == g]).all():
            C = float(np.exp(g))
            points.append(
                {"flops": C, "num_params": N, "num_tokens": C * tokens_per_flop, "run": run,
                 "loss": float(np.exp(np.interp(g, x, y)))}
            )  # fmt: skip
    return points


def _lower_corner(observations: Observations) -> list[dict[str, Any]]:
    """Runs that no run with as little compute beats."""
    rows = frontier(observations, "flops", tolerance=0.05)
    columns = observations.columns
    return [
        {
            **{c: float(columns[c][i]) for c in ("flops", "num_params", "num_tokens")},
            "loss": float(observations.loss[i]),
            "run": str(observations.run[i]),
        }
        for i in rows
    ]


def frontier(observations: Observations, column: str, tolerance: float = 0.02) -> np.ndarray:
    """Rows that no row with as little of ``column`` (within ``tolerance``) beats, by rising ``column``."""
    x = np.log(observations.columns[column])
    order = np.lexsort((observations.loss, x))
    rows: list[int] = []
    for i in order:
        while rows and x[i] - x[rows[-1]] <= tolerance and observations.loss[i] < observations.loss[rows[-1]]:
            rows.pop()
        if not rows or observations.loss[i] < observations.loss[rows[-1]]:
            rows.append(int(i))
    return np.array(rows, dtype=np.int64)


def select(observations: Observations, form: Form) -> tuple[np.ndarray, str]:
    """Rows a form is fitted to, and why.

    A law of one quantity alone holds where nothing else limits the loss: on the frontier, the runs that no run with as
    little of that quantity beats. Forms of several columns take every row.

    Raises identify.NotIdentified, a ValueError, for a law of one quantity where all runs are of one budget.
    """
    if len(form.columns) == 1 and form.columns[0] in ("num_params", "num_tokens", "flops"):
        identify.check_compute(observations, form)
        tolerance = 0.05 if form.columns[0] == "flops" else 0.02
        rows = frontier(observations, form.columns[0], tolerance)
        return rows, f"frontier: runs that no run with as little {form.columns[0]} beats"
    return np.arange(len(observations)), "all rows"
