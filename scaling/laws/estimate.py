"""Fitting a form to observations, and the evidence that the optimum was found."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import nnls

from scaling.laws.forms import Form, get
from scaling.laws.identify import check_apart, check_identifiable
from scaling.laws.model import Coordinates, Model, Scaled
from scaling.laws.observations import Observations
from scaling.laws.redescending import trimmed_starts
from scaling.laws.solver import Objective, Problem, Solution, solve

# Starts within this relative distance of the best objective are at the optimum.
SAME_OBJECTIVE = 1e-6
# Huber's δ in units of the residuals' scale: 95 % efficient under Gaussian noise (Huber 1964).
EFFICIENT_DELTA = 1.345
# The bisquare's, at the same efficiency (Holland and Welsch 1977).
TUKEY_DELTA = 4.685
MAX_STARTS = 64
ROUGH_ITERATIONS = 60
SMOOTH_DELTA = 0.1
FINALISTS = 8


@dataclass(frozen=True)
class Draws:
    """Parameters refitted to resampled observations.

    Attributes:
      params: by name, each (B,): every replicate, those at a bound too.
      theta: (B, P), in the fit's coordinates.
      converged: share of replicates whose gradient is zero.
      at_bound: share of replicates with the parameter at a bound, by name.
    """

    params: dict[str, np.ndarray]
    theta: np.ndarray = field(repr=False)
    converged: float
    at_bound: dict[str, float]
    kind: str = "bootstrap"

    def __len__(self) -> int:
        return len(self.theta)


@dataclass(frozen=True)
class Fit:
    """A fitted law and its evidence.

    Attributes:
      params: in natural units, by name.
      objective: Σ w ρ(residual) at the optimum (a sum, as Hoffmann et al. 2022 and Besiroglu et al. 2024 report it).
      converged: whether every piece of evidence is there; ``reasons`` names what is missing.
      gradient_cosine: largest |cosine| of the residuals with a free column of the Jacobian (0 at a stationary point).
      condition_number: of the objective's Hessian in centred coordinates, scaled to a unit diagonal.
      starts_at_optimum: of ``num_starts``, how many reached the best objective.
      at_bound: parameters that the data push against a bound of their domain.
      draws: resamples of the fit, ``Draws``, where they were asked for with it (``scaling.fit_law``).
      residuals: log predicted - log observed (levels with ``log=False``), over ``noise_at`` of the row, (n,).
    """

    form: Form
    params: dict[str, float]
    observations: Observations
    loss: Objective
    objective: float
    converged: bool
    reasons: tuple[str, ...]
    gradient_cosine: float
    condition_number: float
    num_starts: int
    starts_at_optimum: int
    at_bound: tuple[str, ...]
    residuals: np.ndarray
    theta: np.ndarray = field(repr=False)
    problem: Problem = field(repr=False)
    solution: Solution = field(repr=False)
    spread: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = field(default=None, repr=False)
    draws: "Draws | None" = field(default=None, repr=False)

    def noise_at(self, **columns) -> np.ndarray | float:
        """Standard deviation of a residual at new rows relative to the fitted rows' (1 without a variance function)."""
        return 1.0 if self.spread is None else self.spread(columns)

    @property
    def num_observations(self) -> int:
        return len(self.residuals)

    @property
    def degrees_of_freedom(self) -> int:
        return self.num_observations - len(self.params) + len(self.at_bound)

    @property
    def residual_rmse(self) -> float:
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def coordinates(self) -> Coordinates:
        return self.problem.model.coordinates

    def predict(self, **columns) -> np.ndarray:
        """The law's value at new rows."""
        return self.form.predict(self.params, **columns)


def fit(
    observations: Observations,
    form: "str | Form" = "chinchilla",
    *,
    loss: str = "huber",
    delta: float | None = None,
    tau: float = 0.5,
    log: bool = True,
    variance: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None,
    starts: Sequence[Mapping[str, float]] | None = None,
) -> Fit:
    """Fits a law by minimising Σ w ρ(log predicted - log observed) from many starts.

    A row's weight is its relative precision, w ∝ 1/σ² of its log loss, not a count of runs: weights are divided by
    their mean here, and nowhere else, so 100 w is the same fit with the same intervals as w.

    Args:
      form: a form, its name or its import path.
      loss: ``huber``, ``lad``, ``squared``, ``tukey``, ``asymmetric``. ``tukey`` redescends: runs
        further off than δ do not count; it starts from Huber's optimum and from fits to half of the rows.
      delta: Huber's δ in log loss; None takes 1.345 × the residuals' scale (MAD), 4.685 × for ``tukey``.
      tau: of ``asymmetric`` only: the quantile, .5 is symmetric.
      log: residuals of log loss (levels otherwise).
      variance: columns → relative variance of each row's residual, where noise is not the same everywhere; residuals
        are divided by its root (of geometric mean 1 over the rows) before ρ is taken.
      starts: parameters to begin from instead of the form's own grid.

    Raises:
      ValueError: too few or too uniform observations for this form; says what would mend it.
    """
    form = get(form)
    check_identifiable(observations, form)
    observations = replace(observations, weight=observations.weight / observations.weight.mean())
    coordinates = Coordinates(form, {c: observations.columns[c] for c in form.columns}, observations.loss)
    model = Model(coordinates, observations.columns, log)
    target = np.log(observations.loss) if log else observations.loss
    spread = _spread(variance, observations)
    if spread is not None:
        model, target = Scaled(model, 1.0 / spread(observations.columns)), target / spread(observations.columns)
    if starts is None:
        starts = start_grid(model, observations)
    else:
        starts = np.stack([coordinates.encode(s) for s in starts])
    problem = Problem(model, target, Objective("huber"), coordinates.lower, coordinates.upper)
    # Far from the optimum a small δ is all kinks: come near it on a smooth objective first.
    if form.powers is not None:
        starts = solve(
            replace(problem, objective=Objective("huber", SMOOTH_DELTA)), starts, observations.weight, 25
        ).theta
    if delta is None or loss == "lad":
        starts, scale = _residual_scale(problem, starts, observations.weight)
    chosen = EFFICIENT_DELTA * scale if delta is None else delta
    if loss == "lad":
        starts, chosen = _towards_lad(problem, starts, observations.weight, scale)
    if loss == "tukey":
        huber = replace(problem, objective=Objective("huber", chosen))
        near = multi_start(huber, starts, observations.weight)
        optimum = near.theta[np.argmin(near.objective)]
        starts, scale = trimmed_starts(huber, optimum, observations.weight)
        chosen = TUKEY_DELTA * scale if delta is None else delta
    problem = replace(problem, objective=Objective(loss, chosen, tau))
    found = _result(problem, multi_start(problem, starts, observations.weight), observations, spread)
    check_apart(observations, form, found.params)
    return found


def _spread(variance, observations: Observations):
    """Columns → standard deviation of a residual, relative to the rows' geometric mean."""
    if variance is None:
        return None
    known = np.broadcast_to(np.asarray(variance(observations.columns), dtype=np.float64), len(observations))
    if not (np.isfinite(known) & (known > 0)).all():
        raise ValueError(f"{observations.source}: variance is not a positive number on every row: write one that is")
    mean = np.exp(np.mean(np.log(known)))
    return lambda columns: np.sqrt(np.asarray(variance(columns), dtype=np.float64) / mean)


def multi_start(problem: Problem, starts: np.ndarray, weights: np.ndarray) -> Solution:
    """Solves from every start. Where second derivatives are costly, all starts come near an optimum without them, and
    the best are finished with them."""
    if problem.model.form.powers is not None or len(starts) <= FINALISTS:
        return solve(problem, starts, weights)
    rough = copy.copy(problem.model)
    rough.exact = False
    near = solve(replace(problem, model=rough), starts, weights, ROUGH_ITERATIONS)
    best = np.argsort(near.objective)[:FINALISTS]
    final = solve(problem, near.theta[best], weights)
    fields = {name: getattr(near, name).copy() for name in Solution.__dataclass_fields__ if name != "iterations"}
    for name, values in fields.items():
        values[best] = getattr(final, name)
    return Solution(**fields, iterations=near.iterations + final.iterations)


def _residual_scale(problem: Problem, starts, weights) -> tuple[np.ndarray, float]:
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


def _towards_lad(problem: Problem, starts, weights, scale) -> tuple[np.ndarray, float]:
    """Huber problems with falling δ, each begun at the last one's optimum: (θ, the last δ)."""
    delta = scale
    while delta > LAD_SMOOTHING * scale:
        starts = solve(replace(problem, objective=Objective("huber", delta)), starts, weights, 100).theta
        delta /= 4
    return starts, delta


def _result(problem: Problem, solution: Solution, observations: Observations, spread=None) -> Fit:
    best = int(np.argmin(solution.objective))
    theta = solution.theta[best]
    names = problem.model.coordinates.names
    residuals = problem.model.value(theta[None])[0] - problem.target
    floor = 1e-24 * len(residuals)
    same = solution.objective <= solution.objective[best] * (1 + SAME_OBJECTIVE) + floor
    at_bound = tuple(name for name, held in zip(names, solution.at_bound[best]) if held)
    condition, positive = _conditioning(solution, best)
    reasons = []
    if not np.isfinite(solution.objective[best]):
        raise ValueError(f"{problem.model.form.name}: no start gave a finite loss: check the data's units")
    if not solution.converged[best]:
        reasons.append(f"the gradient is not zero (cosine {solution.cosine[best]:.1e})")
    if same.sum() < min(2, len(same)):
        reasons.append(f"only {same.sum()} of {len(same)} starts reached the best objective")
    if at_bound:
        reasons.append(f"{', '.join(at_bound)} at a bound: these data do not identify it")
    diagonal = np.diagonal(solution.gauss[best])
    idle = [name for name, d in zip(names, diagonal) if d <= 1e-20 * diagonal.max() and name not in at_bound]
    if idle:
        reasons.append(f"{', '.join(idle)} changes nothing in these data: they cannot tell it")
    elif not positive:
        reasons.append("the Hessian is not positive: a direction is flat or the optimum is a kink")
    objective = float((observations.weight * problem.objective.rho(residuals)).sum())
    params = {k: float(v) for k, v in problem.model.coordinates.decode(theta).items()}
    return Fit(
        form=problem.model.form,
        params=params,
        observations=observations,
        loss=problem.objective,
        objective=objective,
        converged=not reasons,
        reasons=tuple(reasons),
        gradient_cosine=float(solution.cosine[best]),
        condition_number=condition,
        num_starts=len(same),
        starts_at_optimum=int(same.sum()),
        at_bound=at_bound,
        residuals=residuals,
        theta=theta,
        problem=problem,
        solution=solution,
        spread=spread,
    )


def _conditioning(solution: Solution, best: int) -> tuple[float, bool]:
    """Condition number of the scaled Hessian over free parameters, and whether it is positive definite.

    A robust objective's Hessian counts only residuals within δ; where those are fewer than the parameters (LAD) the
    majoriser's stands in for it.
    """
    free = ~solution.at_bound[best]
    if not free.any():
        return 1.0, True
    for name in ("hessian", "gauss"):
        matrix = getattr(solution, name)[best][np.ix_(free, free)]
        diagonal = np.diagonal(matrix)
        if (diagonal > 0).all():
            eigenvalues = np.linalg.eigvalsh(matrix / np.sqrt(np.outer(diagonal, diagonal)))
            if eigenvalues[0] > 1e-14:
                return float(eigenvalues[-1] / eigenvalues[0]), True
    return float("inf"), False


def start_grid(model: Model, observations: Observations) -> np.ndarray:
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


def _project(form, columns, params, linear, observations, coordinates) -> dict[str, float]:
    zero = {name: np.float64(0.0) for name in linear}
    # Basis functions at the data's scale: A = A0 is one median loss at the centre.
    unit = {name: _unit(form, name, params, coordinates) for name in linear}
    with np.errstate(all="ignore"):
        base = form.function(*columns, **params, **zero)
        basis = [form.function(*columns, **params, **(zero | {name: unit[name]})) - base for name in linear]
    weight = np.sqrt(observations.weight) / observations.loss
    matrix = np.stack([np.broadcast_to(b, weight.shape) for b in basis], axis=1) * weight[:, None]
    target = (observations.loss - base) * weight
    if not (np.isfinite(matrix).all() and np.isfinite(target).all()):
        return {name: value / len(linear) for name, value in unit.items()}
    coefficients, _ = nnls(matrix, target)
    # A term least squares removed starts small instead: at zero its exponent has no gradient.
    return {name: max(c, 1e-2) * unit[name] for name, c in zip(linear, coefficients)}


def _unit(form, name, params, coordinates) -> float:
    p = form.parameters[name]
    if p.kind != "amplitude":
        return float(np.exp(coordinates.log_scale))
    exponents = sum(_exponent(e, params) * coordinates.centre[c] for e, c in p.of)
    return float(np.exp(coordinates.log_scale + exponents))


def _exponent(reference: str | float, params: Mapping[str, float]) -> float:
    if not isinstance(reference, str):
        return reference
    return -params[reference[1:]] if reference.startswith("-") else params[reference]
