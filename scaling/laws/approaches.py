"""Chinchilla's first two approaches: the envelope of loss curves, and the minima of IsoFLOP profiles."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from scaling.laws.form import Form
from scaling.laws.observations import Observations
from scaling.laws.uncertainty import interval

if TYPE_CHECKING:
    import pandas as pd

MIN_SIZES = 4  # of an IsoFLOP profile: three make any parabola exact
SAME_BUDGET = 0.05  # rows without a budget label share one when no gap in log C between them is wider
INTERPOLATION_POINTS = 512


@dataclass(frozen=True)
class Profile:
    """The runs of one compute budget, by rising size."""

    flops: float  # geometric mean of what the runs achieved
    num_params: np.ndarray
    num_tokens: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(intercept) C^slope from a straight line in logs."""

    slope: float
    intercept: float

    @classmethod
    def through(cls, flops: np.ndarray, y: np.ndarray) -> "PowerLaw":
        slope, intercept = np.polyfit(np.log(flops), np.log(y), 1)
        return cls(float(slope), float(intercept))


def profiles(observations: Observations) -> list[Profile]:
    """Groups rows into IsoFLOP profiles: by budget label where there is one, else by nearly equal FLOPs."""
    flops = observations.columns["flops"]
    if np.isfinite(observations.budget).all():
        groups = [np.flatnonzero(observations.budget == b) for b in np.unique(observations.budget)]
    else:
        order = np.argsort(flops, kind="stable")
        edges = np.flatnonzero(np.diff(np.log(flops[order])) > SAME_BUDGET) + 1
        groups = np.split(order, edges)
    out = []
    for rows in groups:
        n = observations.columns["num_params"][rows]
        same = np.ptp(np.log(flops[rows])) <= 3 * SAME_BUDGET or np.isfinite(observations.budget).all()
        if len(np.unique(np.round(np.log(n), 3))) < MIN_SIZES or not same:
            continue
        rows = rows[np.argsort(n, kind="stable")]
        out.append(
            Profile(
                float(np.exp(np.log(flops[rows]).mean())),
                observations.columns["num_params"][rows],
                observations.columns["num_tokens"][rows],
                observations.loss[rows],
            )
        )
    return sorted(out, key=lambda p: p.flops)


def parabola_minimum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares parabola through (x, y): coefficients [c0, c1, c2] (3, …), abscissa and height of the vertex.

    ``y`` is (n,) or (n, B). The vertex is NaN where the parabola opens downward.
    """
    centre = x.mean()
    z = x - centre
    c0, c1, c2 = np.linalg.lstsq(np.stack([np.ones_like(z), z, z * z], axis=1), y, rcond=None)[0]
    with np.errstate(all="ignore"):
        vertex = np.where(c2 > 0, -c1 / (2 * c2), np.nan)
    height = c0 + c1 * vertex + c2 * vertex**2
    shifted = np.stack([c0 - c1 * centre + c2 * centre**2, c1 - 2 * c2 * centre, c2])
    return shifted, vertex + centre, height


def interpolated_minimum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Abscissa and height of the minimum of Akima's interpolant (as Porian et al. 2024); ``y`` is (n,) or (n, B)."""
    x, first = np.unique(x, return_index=True)
    y = y[first]
    curve = Akima1DInterpolator(x, y)
    grid = np.linspace(x[0], x[-1], INTERPOLATION_POINTS)
    values = curve(grid)
    best = np.clip(values.argmin(axis=0), 1, len(grid) - 2)
    left, mid, right = (np.take_along_axis(values, (best + k)[None], axis=0)[0] for k in (-1, 0, 1))
    with np.errstate(all="ignore"):
        shift = np.nan_to_num(np.clip(0.5 * (left - right) / (left - 2 * mid + right), -1.0, 1.0))
    return grid[best] + shift * (grid[1] - grid[0]), mid - 0.25 * (left - right) * shift


def isoflop(
    observations: Observations, *, num_bootstrap: int = 1000, seed: int = 0, level: float = 0.95
) -> dict | None:
    """Approach 2: each budget's loss-minimising size, and N* ∝ C^a, D* ∝ C^b through the bracketed minima.

    A minimum is bracketed when the parabola opens upward, its vertex lies between the smallest and the largest size,
    and so does the lowest loss seen. Others are reported and left out of the exponents. Intervals resample the pooled
    residuals of the parabolas, inflated by sqrt(n / (n - 3)) a profile.

    Returns:
      Plain numbers for fit.json, or None without a profile of ``MIN_SIZES`` sizes.
    """
    found = profiles(observations)
    if not found:
        return None
    rng = np.random.default_rng(seed)
    fits = [parabola_minimum(np.log(p.num_params), p.loss) for p in found]
    pooled = np.concatenate(
        [
            (p.loss - np.polyval(c[::-1], np.log(p.num_params))) * np.sqrt(len(p.loss) / max(len(p.loss) - 3, 1))
            for p, (c, _, _) in zip(found, fits)
        ]
    )
    budgets, quadratic, interpolated = [], [], []
    for p, (coefficients, vertex, height) in zip(found, fits):
        x = np.log(p.num_params)
        fitted = np.polyval(coefficients[::-1], x)
        noisy = fitted[:, None] + rng.choice(pooled, size=(len(x), num_bootstrap))
        _, vertices, _ = parabola_minimum(x, noisy)
        raw = p.loss[:, None] + rng.choice(pooled, size=(len(x), num_bootstrap))
        akima, akima_height = interpolated_minimum(x, p.loss)
        akima_draws, _ = interpolated_minimum(x, raw) if num_bootstrap else (np.empty(0), None)
        interior = 0 < p.loss.argmin() < len(x) - 1
        bracketed = bool(interior and x[0] < vertex < x[-1])
        quadratic.append((bracketed, vertex, np.clip(np.where(np.isfinite(vertices), vertices, x[0]), x[0], x[-1])))
        interpolated.append((bool(interior), float(akima), akima_draws))
        budgets.append(
            {
                "flops": p.flops,
                "num_params": p.num_params.tolist(),
                "num_tokens": p.num_tokens.tolist(),
                "loss": p.loss.tolist(),
                "quadratic": [float(c) for c in coefficients],
                "minimum": _minimum(p, float(vertex), float(height), bracketed, quadratic[-1][2], level),
                "interpolated": _minimum(p, float(akima), float(akima_height), bool(interior), akima_draws, level),
            }
        )
    out = {"method": "quadratic", "budgets": budgets}
    out["minima"] = [{"flops": b["flops"], **b["minimum"]} for b in budgets]
    out |= _exponents(found, quadratic, level)
    out["interpolated"] = _exponents(found, interpolated, level)
    out["num_bracketed"] = sum(m["bracketed"] for m in out["minima"])
    return out


def _tokens_at(profile: Profile, log_n: np.ndarray) -> np.ndarray:
    """D at size exp(log_n) in this budget: a parabola of log D in log N (a straight line where C = 6 N D)."""
    x, y = np.log(profile.num_params), np.log(profile.num_tokens)
    return np.exp(np.polyval(np.polyfit(x - x.mean(), y, 2), log_n - x.mean()))


def _minimum(profile: Profile, log_n: float, loss: float, bracketed: bool, draws: np.ndarray, level: float) -> dict:
    known = bool(np.isfinite(log_n)) and bracketed
    out = {"num_params": None, "num_tokens": None, "loss": None, "bracketed": bracketed, "num_params_interval": None}
    if known:
        out |= {"num_params": float(np.exp(log_n)), "num_tokens": float(_tokens_at(profile, log_n)), "loss": loss}
        if len(draws):
            n, d = np.exp(draws), _tokens_at(profile, draws)
            out["num_params_interval"], out["num_tokens_interval"] = interval(n, level), interval(d, level)
            out["tokens_per_param_interval"] = interval(d / n, level)
    return out


def _exponents(found: list[Profile], minima: list[tuple], level: float) -> dict:
    """Straight lines in logs through the bracketed minima, and the same through each draw of them."""
    used = [(p, vertex, draws) for p, (ok, vertex, draws) in zip(found, minima) if ok]
    out = {"a": None, "b": None, "a_interval": None, "b_interval": None, "intercept_num_params": None}
    if len(used) < 2:
        return out
    log_c = np.log([p.flops for p, _, _ in used])
    log_n = np.array([vertex for _, vertex, _ in used], dtype=np.float64)
    log_d = np.log([_tokens_at(p, vertex) for p, vertex, _ in used])
    a, intercept = np.polyfit(log_c, log_n, 1)
    b, intercept_d = np.polyfit(log_c, log_d, 1)
    out |= {"a": float(a), "b": float(b), "intercept_num_params": float(intercept)}
    out["intercept_num_tokens"] = float(intercept_d)
    if len(used[0][2]):
        n_draws = np.stack([draws for _, _, draws in used])
        d_draws = np.stack([np.log(_tokens_at(p, draws)) for p, _, draws in used])
        out["a_interval"] = interval(np.polyfit(log_c, n_draws, 1)[0], level)
        out["b_interval"] = interval(np.polyfit(log_c, d_draws, 1)[0], level)
    return out


def envelope(
    observations: Observations, curves: "pd.DataFrame | None" = None, *, flops: str = "exact", num_points: int = 200
) -> dict | None:
    """Approach 1: at each compute, the run with the lowest loss so far; N ∝ C^a through those points.

    Curves are interpolated linearly in (log C, log loss) between their own points; each run's final loss is one of
    them. Without curves only final points count, and the envelope is the runs no cheaper run beats.

    Mid-run points of a schedule that decays at the end (WSD, cosine) lie above what a run of that length would reach,
    so the envelope is biased towards the ends of runs; ``note`` says so.

    Returns:
      {"points": [{flops, num_params, num_tokens, loss, run}], "num_runs", "a", "b", "source", "note"}, or None when
      there are fewer than two points.
    """
    lines = _lines(observations, curves, flops)
    if curves is None or all(len(x) == 1 for *_, x, _ in lines):
        points, source = _lower_corner(observations), "final points"
        note = "final points only: no loss curves were given"
    else:
        points, source = _lowest(lines, num_points), "curves"
        note = "mid-run points are not annealed: they lie above the final loss of a run that long"
    if len(points) < 2:
        return None
    C, N, D = (np.array([p[k] for p in points]) for k in ("flops", "num_params", "num_tokens"))
    distinct = len({p["run"] for p in points})
    varied = len(np.unique(C)) > 1
    return {
        "points": points,
        "num_runs": distinct,
        "a": PowerLaw.through(C, N).slope if varied else None,
        "b": PowerLaw.through(C, D).slope if varied else None,
        "source": source,
        "note": note,
    }


def _lines(observations: Observations, curves, flops: str) -> list[tuple]:
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


def _lowest(lines: list[tuple], num_points: int) -> list[dict]:
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


def _lower_corner(observations: Observations) -> list[dict]:
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
    return np.array(rows)


def select(observations: Observations, form: Form) -> tuple[np.ndarray, str]:
    """Rows a form is fitted to, and why.

    A law of one quantity alone holds where nothing else limits the loss: on the frontier, the runs that no run with as
    little of that quantity beats. Forms of several columns take every row.
    """
    if len(form.columns) == 1 and form.columns[0] in ("num_params", "num_tokens", "flops"):
        tolerance = 0.05 if form.columns[0] == "flops" else 0.02
        rows = frontier(observations, form.columns[0], tolerance)
        return rows, f"frontier: runs that no run with as little {form.columns[0]} beats"
    return np.arange(len(observations)), "all rows"
