"""Fitting a form to observations, and the evidence that the optimum was found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scaling.laws.fitting import identify
from scaling.laws.fitting.coordinates import Coordinates, Model, Scaled
from scaling.laws.fitting.redescending import trimmed_starts
from scaling.laws.fitting.solver import DEFAULT_DELTA, Objective, Problem, Solution
from scaling.laws.fitting.starts import (
    MANY_ROWS,
    multi_start,
    residual_scale,
    sampled_starts,
    smooth_start,
    spread_out,
    start_grid,
    towards_lad,
)
from scaling.laws.forms.catalogue import Form, get
from scaling.laws.tables.observations import Observations

# Columns → relative variance of each row's residual.
Variance = Callable[[Mapping[str, np.ndarray]], np.ndarray]
# Starts within this relative distance of the best objective are at the optimum.
SAME_OBJECTIVE = 1e-6


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

    def first(self, num: int) -> "Draws":
        """The first ``num`` of them."""
        return replace(self, params={k: v[:num] for k, v in self.params.items()}, theta=self.theta[:num])


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

    def noise_at(self, **columns: Any) -> np.ndarray | float:
        """Standard deviation of a residual at new rows relative to the fitted rows' (1 without a variance function)."""
        return 1.0 if self.spread is None else self.spread(columns)

    @property
    def undetermined(self) -> tuple[str, ...]:
        """Amplitudes and exponents of its powers that are held at a bound: nothing that follows from them is known.
        Of a form that does not say what its powers are, all that is at a bound and does not end its domain."""
        if self.form.powers is None:
            return tuple(sorted(name for name in self.at_bound if not self._ends(name)))
        terms = self.form.powers.terms
        powers = {name for amplitude, exponents in terms for name in (amplitude, *exponents.values())}
        return tuple(sorted(map(str, powers & set(self.at_bound))))

    @property
    def ends_its_domain(self) -> bool:
        """Whether all that is at a bound ends the form's domain there, and its law is another that is known: no floor
        at E = 0, no ceiling where these runs are so far below it that L_0 is as high as it can be."""
        return all(map(self._ends, self.at_bound))

    def _ends(self, name: str) -> bool:
        ceiling, p = self.form.powers.ceiling if self.form.powers is not None else None, self.form.parameters[name]
        return (p.kind == "plain" and p.lower == 0.0) or (name == ceiling and self.params[name] > 0.99 * p.upper)

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

    def predict(self, **columns: Any) -> np.ndarray:
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
    variance: Variance | None = None,
    starts: Sequence[Mapping[str, float]] | None = None,
) -> Fit:
    """Fits a law by minimising Σ w ρ(log predicted - log observed) from many starts.

    A row's weight is its relative precision, w ∝ 1/σ² of its log loss, not a count of runs: weights are divided by
    their mean here, and nowhere else, so 100 w is the same fit with the same intervals as w.

    Args:
      form: a form, its name or its import path.
      loss: ``huber``, ``lad``, ``squared``, ``tukey``, ``asymmetric``. ``tukey`` redescends: runs
        further off than δ do not count; it starts from Huber's optimum and from fits to half of the rows.
      delta: Huber's δ in log loss; None takes ``solver.DEFAULT_DELTA`` × the residuals' scale (MAD).
      tau: of ``asymmetric`` only: the quantile, .5 is symmetric.
      log: residuals of log loss (levels otherwise, and of a form that is ``signed``).
      variance: columns → relative variance of each row's residual, where noise is not the same everywhere; residuals
        are divided by its root (of geometric mean 1 over the rows) before ρ is taken.
      starts: parameters to begin from instead of the form's own grid.

    Raises:
      ValueError: too few or too uniform observations for this form; says what would mend it.
    """
    form = get(form)
    log = log and not form.signed
    identify.check(observations, form)
    observations = replace(observations, weight=observations.weight / observations.weight.mean())
    coordinates = Coordinates(form, {c: observations.columns[c] for c in form.columns}, observations.loss)
    model: Any = Model(coordinates, observations.columns, log)  # or ``Scaled``
    target = np.log(observations.loss) if log else observations.loss
    spread = _spread(variance, observations)
    if spread is not None:
        model, target = Scaled(model, 1.0 / spread(observations.columns)), target / spread(observations.columns)
    problem = Problem(model, target, Objective("huber"), coordinates.lower, coordinates.upper)
    member = None
    if starts is not None:
        begin = np.stack([coordinates.encode(s) for s in starts])
    elif len(observations) <= MANY_ROWS:
        begin = start_grid(model, observations)
    else:
        begin, member = sampled_starts(problem, observations)
    if member is None:
        begin = smooth_start(problem, begin, observations.weight)
    if delta is None or loss == "lad":
        near, scale = residual_scale(problem, begin, observations.weight)
        begin = near if member is None else begin
    chosen = DEFAULT_DELTA["huber"] * scale if delta is None else delta
    if loss == "lad":
        begin, chosen = towards_lad(problem, begin, observations.weight, scale)
    if loss == "tukey":
        huber = replace(problem, objective=Objective("huber", chosen))
        solved = multi_start(huber, begin, observations.weight)
        optimum = solved.theta[np.argmin(solved.objective)]
        begin, scale = trimmed_starts(huber, optimum, observations.weight)
        member = None
        chosen = DEFAULT_DELTA["tukey"] * scale if delta is None else delta
    problem = replace(problem, objective=Objective(loss, chosen, tau))
    solution = multi_start(problem, begin, observations.weight)
    found = _result(problem, solution if member is None else spread_out(solution, member), observations, spread)
    identify.check(observations, form, found.params)
    return found


def _spread(
    variance: Variance | None, observations: Observations
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray] | None:
    """Columns → standard deviation of a residual, relative to the rows' geometric mean."""
    if variance is None:
        return None
    known = np.broadcast_to(np.asarray(variance(observations.columns), dtype=np.float64), len(observations))
    if not (np.isfinite(known) & (known > 0)).all():
        raise ValueError(f"{observations.source}: variance is not a positive number on every row: write one that is")
    mean = np.exp(np.mean(np.log(known)))
    return lambda columns: np.sqrt(np.asarray(variance(columns), dtype=np.float64) / mean)


def _result(
    problem: Problem,
    solution: Solution,
    observations: Observations,
    spread: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None,
) -> Fit:
    best = int(np.argmin(solution.objective))
    theta = solution.theta[best]
    names = problem.model.coordinates.names
    residuals = problem.model.value(theta[None])[0] - problem.target
    floor = 1e-24 * len(residuals)
    same = solution.objective <= solution.objective[best] * (1 + SAME_OBJECTIVE) + floor
    at_bound = tuple(name for name, held in zip(names, solution.at_bound[best]) if held)
    condition, positive = conditioning(solution, best)
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


def conditioning(solution: Solution, best: int) -> tuple[float, bool]:
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
