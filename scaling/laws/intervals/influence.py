"""Which runs, budgets and sizes a fit hangs on, and whether its residuals are noise: outliers, moves, trends.

A robust loss limits how far a run pulls and says nothing of it; a law that bends where the data do not leaves residuals
that follow N, D, C or D/N. Both are said here, in words and as fit.json's ``residual_tests``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from scaling.laws.answers import allocation, budgets
from scaling.laws.fitting import identify
from scaling.laws.fitting.estimate import Fit, conditioning
from scaling.laws.fitting.redescending import MAD_TO_SIGMA, trimmed_starts
from scaling.laws.fitting.solver import DEFAULT_DELTA, Objective, Solution, solve, solve_each
from scaling.laws.fitting.starts import distinct
from scaling.laws.intervals import resampling
from scaling.laws.intervals.profile import Quantity

FAR = 6.0  # robust σ
MAX_REFITS = 64  # exact leave-one-out fits of one law; above, of the runs whose one-step move is largest
SMALLEST_P = 0.01  # of a trend, over the four asked about (Bonferroni)
NAMED = 5
# Above this many rows, and for forms whose derivatives are found by search, a law is asked only as it was fitted.
MAX_REFITTED_ROWS = 2000
TRENDS = {"num_params": "N", "num_tokens": "D", "flops": "C", "tokens_per_param": "D/N"}
# A fit exact to rounding has no residuals to speak of.
EXACT = 1e-9
MAX_RUNNERS_UP = 3  # other optima of the fit's own multi-start, from which a refit begins too
# Another start's optimum is the refit's where its objective is lower by more than this share: else it is the same one.
LOWER = 1e-8


@dataclass(frozen=True)
class Residuals:
    """What a fit's residuals say.

    Attributes:
      scale: robust σ of the residuals (1.4826 MAD, inflated for the parameters fitted).
      far: runs beyond ``FAR`` σ: {"run", "sigmas"}, the farthest first.
      influential: runs whose leaving moves a quantity by more than its standard error: {"run", "quantity", "moves",
        "standard_errors"}.
      without_far: what the quantities are where runs that are far off have no weight, by a bisquare fit, if any are.
      trends: by column, {"p", "correlation"}: of the residuals' linear and quadratic trend in its log.
    """

    scale: float
    far: list[dict[str, Any]]
    influential: list[dict[str, Any]]
    trends: dict[str, dict[str, Any]]
    without_far: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for fit.json."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def bends(self) -> dict[str, dict[str, float]]:
        """Of ``trends`` those that are there: the form misses a bend."""
        return {c: t for c, t in self.trends.items() if t["p"] < SMALLEST_P / len(self.trends)}

    def describe(self, law: str) -> list[str]:
        """Warnings, a line each kind; none where there is nothing to say."""
        out = []
        if self.far:
            named = ", ".join(f"{row['run']} ({row['sigmas']:+.3g} σ)" for row in self.far[:NAMED])
            instead = ", ".join(f"{k} would be {v:.4g}" for k, v in self.without_far.items())
            out.append(f"{law}: {_count(self.far)} more than {FAR:g} σ off the law: {named}{_more(self.far)}: look at "
                       f"them, or give them no weight (--loss tukey{f': {instead}' if instead else ''})")  # fmt: skip
        if self.influential:
            named = ", ".join(
                f"{row['run']} ({row['quantity']} {row['moves']:+.2g}, {abs(row['standard_errors']):.2g} of its errors)"
                for row in self.influential[:NAMED]
            )
            out.append(
                f"{law}: {_count(self.influential)} alone decisive: without it, {named}{_more(self.influential)}"
            )
        if bad := self.bends:
            named = ", ".join(f"{TRENDS[c]} (p {t['p']:.1g})" for c, t in sorted(bad.items(), key=lambda i: i[1]["p"]))
            out.append(f"{law}: its residuals follow {named}: the form misses a bend in these data, which no interval "
                       "here knows of")  # fmt: skip
        return out


def _count(rows: list[Any]) -> str:
    return f"{len(rows)} {'run is' if len(rows) == 1 else 'runs are'}"


def _more(rows: list[Any]) -> str:
    return f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""


def residuals(fit: Fit) -> Residuals:
    """Names the runs that are far off and those a fit hangs on, and tests its residuals for trends."""
    scale = robust_scale(fit)
    if scale <= EXACT:
        return Residuals(scale, [], [], {})
    sigmas, without = -fit.residuals / scale, {}  # observed over predicted: a run that came out high is positive
    cheap = fit.form.powers is not None and fit.num_observations <= MAX_REFITTED_ROWS
    if cheap and ((np.abs(sigmas) > FAR).any() or not fit.converged):
        # Several runs far off pull the law towards them, and others seem far: ask a law that they do not pull.
        theta, sigmas = _redescended(fit)
        if (np.abs(sigmas) > FAR).any():
            params = fit.coordinates.decode(theta[None])
            without = {name: float(np.asarray(q(params))[0]) for name, q in _asked(fit).items()}
    far = np.flatnonzero(np.abs(sigmas) > FAR)
    far = far[np.argsort(-np.abs(sigmas[far]))]
    named = [{"run": str(fit.observations.run[i]), "sigmas": float(sigmas[i])} for i in far]
    return Residuals(scale, named, _influential(fit), _trends(fit, scale), without)


def _redescended(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """(θ of the bisquare's best optimum, observed - predicted there in units of its residuals' scale)."""
    weight = fit.observations.weight
    starts, scale = trimmed_starts(fit.problem, fit.theta, weight)
    problem = replace(fit.problem, objective=Objective("tukey", DEFAULT_DELTA["tukey"] * scale))
    solution = solve(problem, starts, weight)
    theta = solution.theta[np.argmin(solution.objective)]
    residual = problem.target - problem.model.value(theta[None])[0]
    inflate = np.sqrt(fit.num_observations / max(fit.degrees_of_freedom, 1))
    return theta, residual / max(np.median(np.abs(residual)) * MAD_TO_SIGMA * inflate, EXACT)


def robust_scale(fit: Fit) -> float:
    """σ of the residuals from their median absolute value, inflated by sqrt(n / (n - P)).

    With a fifth of the runs far off it is within a third of what it would be without them.
    """
    inflate = np.sqrt(fit.num_observations / max(fit.degrees_of_freedom, 1))
    return float(np.median(np.abs(fit.residuals)) * MAD_TO_SIGMA * inflate)


def _asked(fit: Fit) -> dict[str, Any]:
    """The quantities whose moves are looked at: a, or a form's exponents where it has none."""
    if allocation.exponents(fit.form, fit.params) is not None:
        return {"a": lambda p: allocation.exponents(fit.form, p)[0]}  # type: ignore[index]  # it has them
    names = [name for name, p in fit.form.parameters.items() if not p.linear and name not in fit.at_bound]
    return {name: lambda p, k=name: p[k] for name in names}


def one_step(fit: Fit) -> np.ndarray:
    """θ without each observation in turn, to first order: θ + H⁻¹ w ψ J, H without that observation, (n, P)."""
    _, jacobian, _ = fit.problem.model.derivatives(fit.theta[None])
    J, w = jacobian[0], fit.observations.weight
    objective = fit.loss if fit.loss.name != "lad" else Objective("huber", max(robust_scale(fit), EXACT))
    _, psi, _, omega = objective.smooth(fit.residuals)
    free = np.array([name not in fit.at_bound for name in fit.coordinates.names])
    J = J[free]
    gauss = (J * (w * omega)) @ J.T
    without = gauss[None] - np.einsum("pi,qi,i->ipq", J, J, w * omega)
    scale = np.sqrt(np.maximum(np.diagonal(gauss), 1e-300))
    without = without / scale[:, None] / scale + 1e-12 * np.eye(len(scale))
    step = np.nan_to_num(solve_each(without, ((J / scale[:, None]) * (w * psi)).T)) / scale
    theta = np.repeat(fit.theta[None], fit.num_observations, axis=0)
    theta[:, free] += step
    return np.clip(theta, fit.problem.lower, fit.problem.upper)


def leave_out(fit: Fit, left_out: np.ndarray) -> tuple[Solution, list[str]]:
    """Refits a law without each of k sets of rows in turn, δ held: (the best optimum of each, why it is none or "").

    A refit begins at the fit's optimum and at the runners-up of its multi-start. It is none where its gradient is not
    zero, its Hessian not positive, or a parameter went to a bound that the fit does not touch.

    Args:
      left_out: the rows of each set, a mask (k, n).
    """
    k, n = left_out.shape
    begin = [fit.theta, *fit.solution.theta[distinct(fit.solution)[0][1 : 1 + MAX_RUNNERS_UP]]]
    weights = np.where(left_out, 0.0, fit.observations.weight)
    found = solve(fit.problem, np.repeat(np.array(begin), k, axis=0), np.tile(weights, (len(begin), 1)))
    objective = found.objective.reshape(len(begin), k)
    objective = np.where(found.converged.reshape(objective.shape), objective, np.inf)
    lowest = objective.argmin(axis=0)
    # The fit's own valley, unless another is lower: two roads to one optimum end in other last digits.
    lane = np.where(objective[0] <= objective.min(axis=0) * (1 + LOWER) + 1e-24 * n, 0, lowest) * k + np.arange(k)
    fields = {name: getattr(found, name)[lane] for name in Solution.__dataclass_fields__ if name != "iterations"}
    best = Solution(**fields, iterations=found.iterations)
    return best, [_no_optimum(fit, best, i) for i in range(k)]


def _no_optimum(fit: Fit, solution: Solution, i: int) -> str:
    if not solution.converged[i]:
        return f"did not converge: the gradient is not zero (cosine {solution.cosine[i]:.1e})"
    held = [name for name, at in zip(fit.coordinates.names, solution.at_bound[i]) if at and name not in fit.at_bound]
    if held:
        return f"did not converge: {', '.join(held)} at a bound"
    if not conditioning(solution, i)[1]:
        return "did not converge: the Hessian is not positive"
    return ""


def _not_identified(fit: Fit, theta: np.ndarray, kept: np.ndarray) -> str:
    """Why the rows ``kept`` cannot determine the law, refitted to them as θ; "" where they do."""
    rest = fit.observations.take(kept)
    params = {k: float(v) for k, v in fit.coordinates.decode(theta).items()}
    told = identify.unidentified(rest, fit.form) or identify.unidentified(rest, fit.form, params)
    return "" if told is None else f"not identified: {replace(told, run=None)}"


@dataclass(frozen=True)
class Leverage:
    """How a law's quantities move without each budget and each size.

    Attributes:
      law: the form's name.
      value: the quantities by the law itself.
      standard_error: theirs, by the delta method.
      parts: without each, {"by": "budget" or "size", "at": its FLOPs or parameters, "num_runs", "moves": by quantity,
        None without evidence, "problem": why there is none}.
    """

    law: str
    value: dict[str, float]
    standard_error: dict[str, float]
    parts: list[dict[str, Any]]

    def to_json(self, intervals: Mapping[str, Any]) -> dict[str, Any]:
        """Plain numbers for fit.json, with the intervals that moves are set against: {"ends", "level"} by quantity."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return out | {"intervals": {k: intervals[k] for k in self.value if k in intervals}}


def leverage(fit: Fit, quantities: Mapping[str, Quantity] | None = None) -> Leverage | None:
    """Refits a law without each budget and each size, and says how far a and other quantities of it move.

    None of a fit that is not converged, that is exact, or whose refits would cost too much (``MAX_REFITTED_ROWS``).

    Args:
      quantities: asked about beside a (or a form's exponents), functions of parameters (B,) to (B,).
    """
    cheap = fit.form.powers is not None and fit.num_observations <= MAX_REFITTED_ROWS
    if not (cheap and fit.converged) or robust_scale(fit) <= EXACT:
        return None
    parts = _parts(fit)
    if not parts:
        return None
    asked = _asked(fit) | dict(quantities or {})
    value = {k: _at(fit, q, fit.theta[None])[0] for k, q in asked.items()}
    covariance = resampling.covariance(fit)
    slopes = {k: resampling.gradient(fit, q) for k, q in asked.items()}
    left_out = np.array([rows for _, _, rows in parts])
    solution, problems = leave_out(fit, left_out)
    problems = [_not_identified(fit, solution.theta[i], ~left_out[i]) or problem for i, problem in enumerate(problems)]
    moved = {k: _at(fit, q, solution.theta) - value[k] for k, q in asked.items()}
    return Leverage(
        fit.form.name,
        {k: float(v) for k, v in value.items()},
        {k: float(np.sqrt(max(g @ covariance @ g, 0.0))) for k, g in slopes.items()},
        [
            {
                "by": by,
                "at": at,
                "num_runs": int(rows.sum()),
                "moves": None if problems[i] else {k: float(moves[i]) for k, moves in moved.items()},
                "problem": problems[i] or None,
            }
            for i, (by, at, rows) in enumerate(parts)
        ],
    )


def _at(fit: Fit, quantity: Quantity, theta: np.ndarray) -> np.ndarray:
    return np.asarray(quantity(fit.coordinates.decode(theta)), dtype=np.float64)


def _parts(fit: Fit) -> list[tuple[str, float, np.ndarray]]:
    """(what, its FLOPs or parameters, its rows as a mask) of each budget and each size, where there are two or more.

    Where no two runs share a size, or a budget, that is the question of single runs, which ``residuals`` answers.
    """
    rows, out = fit.observations, []
    for by, column, groups in (
        ("budget", "flops", budgets.rows_by_budget(rows)),
        ("size", "num_params", budgets.rows_by_size(rows) if "num_params" in rows.columns else []),
    ):
        if len(groups) < 2 or max(map(len, groups)) < 2:
            continue
        for members in groups:
            mask = np.zeros(len(rows), dtype=bool)
            mask[members] = True
            out.append((by, float(np.exp(np.log(rows.columns[column][members]).mean())), mask))
    return out


def told(leverage: Mapping[str, Any]) -> list[str]:
    """Says which budget and size move fit.json's ``leverage`` most, a sentence each, and what did not converge."""
    out = []
    for by, unit in (("budget", "FLOPs"), ("size", "parameters")):
        parts = [p for p in leverage["parts"] if p["by"] == by]
        known = [p for p in parts if p["moves"] is not None]
        if known:
            first = next(iter(leverage["value"]))
            most = max(known, key=lambda p: abs(p["moves"][first]))
            moves = [_moved(leverage, k, most["moves"][k]) for k in leverage["value"]]
            out.append(
                f"of {len(parts)} {by}s, {most['at']:.3g} {unit} ({_runs(most)}) moves {first} most: "
                f"without it {', '.join(moves)}"
            )
        out += [
            f"without the {by} {p['at']:.3g} {unit} ({_runs(p)}) the refit {_is(p['problem'])}"
            for p in parts
            if p["problem"]
        ]
    return out


def _runs(part: Mapping[str, Any]) -> str:
    return f"{part['num_runs']} run{'' if part['num_runs'] == 1 else 's'}"


def _is(problem: str) -> str:
    return problem if problem.startswith("did") else f"is {problem}"


def _moved(leverage: Mapping[str, Any], name: str, move: float) -> str:
    value, known = leverage["value"][name], leverage["intervals"].get(name)
    said = f"{name.replace('_', ' ')} {value:.4g} is {value + move:.4g} ({move:+.2g}"
    if not known or known["ends"] is None or None in known["ends"]:
        return f"{said})"
    low, high = known["ends"]
    return f"{said}, {abs(move) / (high - low):.0%} of the width of its {100 * known['level']:.0f} % interval)"


def _influential(fit: Fit) -> list[dict[str, Any]]:
    asked = _asked(fit)
    rows = np.arange(fit.num_observations)
    if not asked:
        return []
    covariance = resampling.covariance(fit)
    value = {k: float(np.asarray(q(fit.coordinates.decode(fit.theta[None])))[0]) for k, q in asked.items()}
    slopes = {k: resampling.gradient(fit, q) for k, q in asked.items()}
    errors = {k: float(np.sqrt(max(g @ covariance @ g, 0.0))) for k, g in slopes.items()}
    errors = {k: e for k, e in errors.items() if np.isfinite(e) and e > EXACT * (1 + abs(value[k]))}
    if len(rows) > MAX_REFITS:
        near = fit.coordinates.decode(one_step(fit))
        moved: Any = [np.abs(np.asarray(asked[k](near)) - value[k]) / e for k, e in errors.items()]
        moved = np.max(moved or [0.0 * rows], axis=0)
        rows = np.sort(np.argsort(-np.nan_to_num(moved, posinf=np.inf))[:MAX_REFITS])
    solution, problems = leave_out(fit, np.arange(fit.num_observations) == rows[:, None])
    params, evident = fit.coordinates.decode(solution.theta), np.array([not problem for problem in problems])
    found = []
    for k, error in errors.items():
        moves = np.asarray(asked[k](params)) - value[k]
        found += [
            {"run": str(fit.observations.run[rows[i]]), "quantity": k, "moves": float(moves[i]),
             "standard_errors": float(moves[i] / error)}
            for i in np.flatnonzero((np.abs(moves) > error) & evident)
        ]  # fmt: skip
    return sorted(found, key=lambda row: -abs(row["standard_errors"]))


def _trends(fit: Fit, scale: float) -> dict[str, dict[str, Any]]:
    """F tests of a linear and quadratic trend of the residuals in log N, D, C, D/N, beyond what the fit could remove.

    Residuals are cut at 3 σ, so that a run that is far off is not a trend. The trend's part that the law's own columns
    can mimic is taken out first (residuals are orthogonal to them): otherwise the test would reject too seldom.
    """
    w = fit.observations.weight / fit.observations.weight.mean()
    root = np.sqrt(w)
    _, jacobian, _ = fit.problem.model.derivatives(fit.theta[None])
    J = (jacobian[0] / np.maximum(np.abs(jacobian[0]).max(axis=1, keepdims=True), 1e-300)).T * root[:, None]
    y = root * np.clip(-fit.residuals, -3 * scale, 3 * scale)
    y = y - J @ np.linalg.lstsq(J, y, rcond=1e-10)[0]
    out = {}
    for column in TRENDS:
        x = fit.observations.columns.get(column)
        if x is None or np.ptp(np.log(x)) < 1e-3:
            continue
        z = np.log(x) - np.log(x).mean()
        shape = np.stack([z, z**2], axis=1) / np.ptp(z) * root[:, None]
        shape = shape - J @ np.linalg.lstsq(J, shape, rcond=1e-10)[0]
        basis, size, _ = np.linalg.svd(shape, full_matrices=False)
        basis = basis[:, size > 1e-6 * root.sum() / len(root)]
        k, dof = basis.shape[1], len(y) - len(fit.params) - basis.shape[1]
        if k == 0 or dof < 3:
            continue
        explained = float(((basis.T @ y) ** 2).sum())
        rest = max(float((y**2).sum()) - explained, 1e-300)
        out[column] = {
            "p": float(stats.f.sf(explained / k / (rest / dof), k, dof)),
            "correlation": float(np.sqrt(explained / (explained + rest))),
        }
    return out
