"""Where a fit begins: a grid of starts, how they come near the optima, and which of them end at the same one."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from scaling.laws.fitting.coordinates import Coordinates, Model, Scaled
from scaling.laws.fitting.solver import DEFAULT_DELTA, Objective, Problem, Solution, solve
from scaling.laws.forms.law import Form, Params, resolve
from scaling.laws.tables.observations import Observations

MAX_STARTS = 64
ROUGH_ITERATIONS = 60
FINISH_ITERATIONS = 100  # with costly second derivatives: what has not come to rest by then lies in a flat valley
SMOOTH_DELTA = 0.1
FINALISTS = 8
# Lanes whose objectives differ by less (relatively), and their θ by less than its root, are at one optimum.
SAME_OPTIMUM = 1e-8
# Above this many rows, starts come near their optima on a sample of ``SAMPLED_ROWS`` of them: where the valleys of the
# objective lie is told by hundreds of rows as well as by all. Every optimum is then finished on all rows.
MANY_ROWS = 1200
SAMPLED_ROWS = 600
# An optimum whose objective on the sample is further above the best one's is not the best on all rows: the difference
# of two sums over 600 rows is off by 4 % of one of them at most (1/√600, were the two laws' errors unrelated).
NEAR_BEST = 1.1


def smooth_start(problem: Problem, starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Moves θ (B, P) towards the optima of a smooth objective: far from the optimum a small δ is all kinks."""
    if problem.model.form.powers is None:
        return starts
    return solve(replace(problem, objective=Objective("huber", SMOOTH_DELTA)), starts, weights, 25).theta


def multi_start(problem: Problem, starts: np.ndarray, weights: np.ndarray) -> Solution:
    """Solves from every start. Where second derivatives are costly, all starts come near an optimum without them, and
    the best optima are finished with them, each once however many starts came there."""
    if problem.model.form.powers is not None:
        return solve(problem, starts, weights)
    near = solve(_rough(problem), starts, weights, ROUGH_ITERATIONS)
    first, member = distinct(near)
    if not len(first):
        return near
    final = solve(problem, near.theta[first], weights, FINISH_ITERATIONS)
    fields = {name: getattr(near, name).copy() for name in Solution.__dataclass_fields__ if name != "iterations"}
    finished = member >= 0
    for name, values in fields.items():
        values[finished] = getattr(final, name)[member[finished]]
    return Solution(**fields, iterations=near.iterations + final.iterations)


def _rough(problem: Problem) -> Problem:
    """Without second derivatives, where these are costly."""
    if problem.model.form.powers is not None:
        return problem
    model = copy.copy(problem.model)
    model.exact = False
    return replace(problem, model=model)


def distinct(solution: Solution) -> tuple[np.ndarray, np.ndarray]:
    """The best optima of a solution: (a lane of each, at most ``FINALISTS``, the best first; per lane, which it is at,
    -1 for none of these). Lanes are at one optimum where objective and law are the same to ``SAME_OPTIMUM``."""
    first: list[int] = []
    member = np.full(len(solution.objective), -1)
    for i in np.argsort(solution.objective, kind="stable"):
        if not np.isfinite(solution.objective[i]):
            break
        near = np.abs(solution.objective[first] / max(solution.objective[i], 1e-300) - 1) <= SAME_OPTIMUM
        near &= np.abs(solution.theta[first] - solution.theta[i]).max(axis=1, initial=0.0) <= SAME_OPTIMUM**0.5
        if near.any():
            member[i] = int(np.argmax(near))
        elif len(first) < FINALISTS:
            member[i] = len(first)
            first.append(int(i))
    return np.array(first, dtype=int), member


def sampled_starts(problem: Problem, observations: Observations) -> tuple[np.ndarray, np.ndarray | None]:
    """Solves from the grid of starts on a sample of the rows, then on all: (θ of the optima (K, P), the best first,
    and per start, whose it is; None for the latter where no start gave a finite loss, and θ are the grid's own).

    The sample is the same every time and holds the rows with the least and the most of every column, so that it spans
    what all rows span.
    """
    form, columns = problem.model.form, observations.columns
    ends = [f(columns[c]) for c in form.columns for f in (np.argmin, np.argmax)]
    drawn = np.random.default_rng(0).choice(len(observations), SAMPLED_ROWS, replace=False)
    rows = np.unique(np.concatenate([ends, drawn]))
    sample = observations.take(rows)
    few = replace(problem, model=problem.model.take(rows), target=problem.target[rows])
    starts = smooth_start(few, start_grid(few.model, sample), sample.weight)
    starts, scale = residual_scale(few, starts, sample.weight)
    objective = Objective("huber", DEFAULT_DELTA["huber"] * scale)
    found = multi_start(replace(few, objective=objective), starts, sample.weight)
    first, member = distinct(found)
    if not len(first):
        return start_grid(problem.model, observations), None
    best = found.objective[first] <= found.objective[first[0]] * NEAR_BEST
    first, member = first[best], np.where(member < best.sum(), member, -1)
    whole = _rough(replace(problem, objective=objective))
    all_rows = solve(whole, found.theta[first], observations.weight, ROUGH_ITERATIONS)
    order = np.argsort(all_rows.objective)
    rank = np.append(np.argsort(order), -1)  # member -1 stays -1
    return all_rows.theta[order], rank[member]


def spread_out(solution: Solution, member: np.ndarray) -> Solution:
    """The solution of every start from those of the optima they are at (``member``, -1: at none of the best)."""
    fields = {
        name: getattr(solution, name)[np.maximum(member, 0)]
        for name in Solution.__dataclass_fields__
        if name != "iterations"
    }
    for name, value in (("objective", np.inf), ("cosine", np.inf), ("converged", False)):
        fields[name][member < 0] = value
    return Solution(**fields, iterations=solution.iterations)


def residual_scale(problem: Problem, starts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """(θ near the optima, MAD of the residuals of a nearly-LAD fit as a Gaussian's σ)."""
    scale, n, P = 0.01, len(problem.target), starts.shape[1]
    best = starts
    for _ in range(3):
        staged = replace(problem, objective=Objective("huber", max(0.3 * scale, 1e-9)))
        solution = multi_start(staged, best, weights) if best is starts else solve(staged, best, weights, 60)
        if best is starts:
            starts = solution.theta
        best = solution.theta[np.argmin(solution.objective)][None]
        residual = np.abs(problem.model.value(best)[0] - problem.target)
        # P residuals of an L1 fit are zero by construction: leave them out of the median.
        residual = np.sort(residual)[min(P, n - 2) :]
        scale = max(float(np.median(residual)) / 0.6744897501960817, 1e-9)
    return starts, scale


# LAD: δ falls to this share of the residuals' scale, where the Huber optimum is the LAD vertex to seven digits.
LAD_SMOOTHING = 1e-7


def towards_lad(problem: Problem, starts: np.ndarray, weights: np.ndarray, scale: float) -> tuple[np.ndarray, float]:
    """Huber problems with falling δ, each begun at the last one's optimum: (θ, the last δ)."""
    delta = scale
    while delta > LAD_SMOOTHING * scale:
        starts = solve(replace(problem, objective=Objective("huber", delta)), starts, weights, 100).theta
        delta /= 4
    return starts, delta


def start_grid(model: Model | Scaled, observations: Observations) -> np.ndarray:
    """Starts θ (B, P): a grid over the nonlinear parameters, linear least squares for the others.

    Given the nonlinear parameters the loss is Σ_k c_k basis_k, so the linear ones solve a non-negative least-squares
    problem (variable projection), weighted 1/loss to stand for residuals of the log.
    """
    form, coordinates = model.form, model.coordinates
    nonlinear = [name for name, p in form.parameters.items() if not p.linear]
    linear = [name for name, p in form.parameters.items() if p.linear]
    grid = _grid([coordinates.starts[name] for name in nonlinear])
    columns = [observations.columns[c] for c in form.columns]
    starts = []
    for values in grid:
        params = coordinates.natural_starts(dict(zip(nonlinear, values)))
        if linear:
            params |= _project(form, columns, params, linear, observations, coordinates)
        starts.append(coordinates.encode(params))
    return np.array(starts)


def _grid(starts: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The product of the parameters' starts; above ``MAX_STARTS``, a fixed sample of it."""
    size = math.prod(len(s) or 1 for s in starts)
    if size <= MAX_STARTS:
        return list(itertools.product(*[s or (1.0,) for s in starts]))
    rng = np.random.default_rng(0)
    picks = [rng.permutation(np.arange(MAX_STARTS) % len(s)) for s in starts]
    return [tuple(s[i] for s, i in zip(starts, row)) for row in zip(*picks)]


def _project(
    form: Form,
    columns: list[np.ndarray],
    params: Params,
    linear: list[str],
    observations: Observations,
    coordinates: Coordinates,
) -> dict[str, float]:
    zero = {name: np.float64(0.0) for name in linear}
    # Basis functions at the data's scale: A = A0 is one median loss at the centre.
    unit = {name: _unit(form, name, params, coordinates) for name in linear}
    with np.errstate(all="ignore"):
        base = form.function(*columns, **params, **zero)
        basis = [form.function(*columns, **params, **(zero | {name: unit[name]})) - base for name in linear]
    scale = np.exp(coordinates.log_scale) if form.signed else observations.loss
    weight = np.sqrt(observations.weight) / scale
    free = [i for i, name in enumerate(linear) if form.parameters[name].lower < 0]  # of either sign: two columns
    matrix = np.stack([np.broadcast_to(b, weight.shape) for b in basis], axis=1) * weight[:, None]
    target = (observations.loss - base) * weight
    if not (np.isfinite(matrix).all() and np.isfinite(target).all()):
        return {name: value / len(linear) for name, value in unit.items()}
    coefficients, _ = nnls(np.concatenate([matrix, -matrix[:, free]], axis=1), target)
    coefficients, negative = np.split(coefficients, [len(linear)])
    coefficients[free] -= negative
    # A term least squares removed starts small instead: at zero its exponent has no gradient.
    return {
        name: (c if i in free else max(c, 1e-2)) * unit[name] for i, (name, c) in enumerate(zip(linear, coefficients))
    }


def _unit(form: Form, name: str, params: Params, coordinates: Coordinates) -> float:
    p = form.parameters[name]
    if p.kind != "amplitude":
        return float(np.exp(coordinates.log_scale))
    exponents = sum(resolve(e, params) * coordinates.centre[c] for e, c in p.of)
    return float(np.exp(coordinates.log_scale + exponents))
