"""Objectives, and a batched solver that ends on evidence.

Every problem is solved as a batch of lanes: the starts of a multi-start and the replicates of a bootstrap are the same
thing, a vector θ and a row of weights each. A lane is done when its gradient is orthogonal to the residuals to
rounding, not when an iteration count or a tolerance on the objective says so (SciPy's ftol is absolute below 1, and a
robust objective of a good fit is about 1e-3).
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

# |cosine| between the weighted residuals and a column of the Jacobian (MINPACK's orthogonality measure).
TARGET_COSINE = 1e-10
CONVERGED_COSINE = 1e-6
EXACT_RESIDUAL = 1e-12
# Of losses without noise but for their last digit the residuals themselves are rounding, and so is their angle. A
# gradient that would move the law by less than this (RMS over the rows, in log loss) is zero: no loss has such digits.
ROUNDING_MOVE = 1e-11


# δ where none is asked for, × the residuals' scale: 95 % efficient under Gaussian noise, Huber's (Huber 1964) and the
# bisquare's (Holland and Welsch 1977).
DEFAULT_DELTA = {"huber": 1.345, "tukey": 4.685}


@dataclass(frozen=True)
class Objective:
    """Σ w ρ(r), r = log predicted - log observed (or the difference of levels).

    - ``huber``: ρ = r²/2 within δ, δ(|r| - δ/2) beyond (Hoffmann et al. 2022 with δ = 1e-3)
    - ``squared``: r²/2
    - ``lad``: |r|, reached through Huber objectives with δ falling to ``SMOOTHING`` times the residuals' scale
    - ``tukey``: c²/6 (1 - (1 - (r/c)²)³) within c = δ, c²/6 beyond: runs far off have no pull (Beaton and Tukey 1974)
    - ``asymmetric``: Huber times 2τ where the law lies below the observation and 2(1 - τ) where above
    """

    name: str = "huber"
    delta: float = 1e-3
    tau: float = 0.5

    NAMES = ("huber", "lad", "squared", "tukey", "asymmetric")

    def __post_init__(self) -> None:
        if self.name not in self.NAMES:
            raise ValueError(f"loss is {self.name!r}: write one of {', '.join(self.NAMES)}")
        if self.name != "squared" and not (np.isfinite(self.delta) and self.delta > 0):
            raise ValueError(f"delta is {self.delta!r}: write a positive number, in units of log loss")
        if not 0 < self.tau < 1:
            raise ValueError(f"tau is {self.tau!r}: write a number between 0 and 1")

    def side(self, r: np.ndarray) -> np.ndarray | float:
        return np.where(r < 0, 2 * self.tau, 2 * (1 - self.tau)) if self.name == "asymmetric" else 1.0

    def rho(self, r: np.ndarray) -> np.ndarray:
        """The loss of each residual, as reported."""
        if self.name == "squared":
            return 0.5 * r * r
        if self.name == "lad":
            return np.abs(r)
        return self.smooth(r)[0]

    def smooth(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """ρ, ψ = ρ', ρ'' and the weight ψ/r, of what the solver minimises (LAD: a Huber with ``delta``)."""
        if self.name == "squared":
            one = np.ones_like(r)
            return 0.5 * r * r, r, one, one
        if self.name == "tukey":
            inside = np.maximum(1 - (r / self.delta) ** 2, 0.0)
            curvature = inside * np.where(inside > 0, 5 * inside - 4, 0.0)
            return self.delta**2 / 6 * (1 - inside**3), r * inside**2, curvature, inside**2
        magnitude, side = np.abs(r), self.side(r)
        clipped = np.minimum(magnitude, self.delta)
        inside = (magnitude <= self.delta) * side
        rho = side * clipped * (magnitude - 0.5 * clipped)
        psi = side * np.copysign(clipped, r)
        weight = side * clipped / np.maximum(magnitude, 1e-300)
        weight = np.where(magnitude <= self.delta, side, weight)
        return rho, psi, inside, weight


@dataclass(frozen=True)
class Solution:
    """Lanes of a solved batch; leading axis B.

    ``cosine`` is the largest |cosine| between the residuals and a free Jacobian column; ``at_bound`` (B, P) marks
    parameters held by a bound that the objective pushes against; ``hessian`` (B, P, P) is that of the objective and
    ``gauss`` its positive part Σ w ω J Jᵀ.
    """

    theta: np.ndarray
    objective: np.ndarray
    cosine: np.ndarray
    converged: np.ndarray
    at_bound: np.ndarray
    hessian: np.ndarray
    gauss: np.ndarray
    iterations: int


class _Lanes:
    """The state of a batch: θ and everything the next step needs."""

    FIELDS = ("theta", "objective", "gradient", "hessian", "gauss", "spread", "largest", "cosine")

    def __init__(self, problem: "Problem", theta: np.ndarray, weights: np.ndarray) -> None:
        value, jacobian, second = problem.model.derivatives(theta)
        r = value - problem.target
        rho, psi, curvature, omega = problem.objective.smooth(r)
        bad = ~np.isfinite(r).all(axis=1)
        if bad.any():
            r, rho, psi, curvature, omega = (np.where(bad[:, None], 0.0, a) for a in (r, rho, psi, curvature, omega))
            jacobian[bad] = 0.0
        w_psi, w_omega = weights * psi, weights * omega
        self.theta = theta
        self.objective = np.where(bad, np.inf, (weights * rho).sum(axis=1))
        self.gradient = (jacobian @ w_psi[:, :, None])[:, :, 0]
        self.hessian = second(weights * curvature, w_psi)
        if bad.any():
            self.hessian[bad] = 0.0
        self.gauss = (jacobian * w_omega[:, None, :]) @ jacobian.swapaxes(1, 2)
        self.spread = (w_psi * r).sum(axis=1)
        self.largest = np.where(bad, np.inf, np.abs(r).max(axis=1))
        self.cosine = problem.cosine(self)

    def take(self, keep: np.ndarray) -> "_Lanes":
        out = object.__new__(_Lanes)
        for name in self.FIELDS:
            setattr(out, name, getattr(self, name)[keep])
        return out

    def put(self, where: np.ndarray, other: "_Lanes", chosen: np.ndarray) -> None:
        for name in self.FIELDS:
            getattr(self, name)[where] = getattr(other, name)[chosen]


@dataclass(frozen=True)
class Problem:
    """What is minimised: Σ_i w_i ρ(f_i(θ) - target_i) within bounds."""

    model: Any  # ``coordinates.Model`` or what wraps one: .derivatives(theta)
    target: np.ndarray
    objective: Objective
    lower: np.ndarray
    upper: np.ndarray

    def held(self, lanes: _Lanes) -> np.ndarray:
        """Parameters at a bound that the objective pushes against, (B, P)."""
        return ((lanes.theta <= self.lower) & (lanes.gradient > 0)) | (
            (lanes.theta >= self.upper) & (lanes.gradient < 0)
        )

    def cosine(self, lanes: _Lanes) -> np.ndarray:
        """Largest |cosine| of a free column with the residuals; 0 where the fit is exact to rounding."""
        diagonal = np.diagonal(lanes.gauss, axis1=1, axis2=2)
        scale = np.sqrt(diagonal * lanes.spread[:, None])
        with np.errstate(all="ignore"):
            cosine = np.abs(lanes.gradient) / scale
        cosine = np.where(self.held(lanes) | (lanes.gradient == 0), 0.0, cosine).max(axis=1)
        cosine = np.where(lanes.largest <= EXACT_RESIDUAL, 0.0, cosine)
        return np.where(np.isfinite(lanes.objective), cosine, np.inf)


def solve(
    problem: Problem, start: np.ndarray, weights: np.ndarray, max_iterations: int = 300, chunk: int = 0
) -> Solution:
    """Minimises every lane of a batch.

    Newton steps on the exact Hessian, damped by λ times the Hessian of the iteratively reweighted least-squares
    majoriser: λ → 0 is Newton, λ ~ 1 a step that cannot overshoot a robust objective. Bounds by projection.

    Args:
      problem: objective, model, bounds.
      start: θ, (B, P).
      weights: observation weights, (n,) or (B, n).
      max_iterations: of a lane.
      chunk: lanes solved together (0: as many as keep the Jacobian in cache).

    Returns:
      Solution, lane by lane.
    """
    B, P = start.shape
    n = len(problem.target)
    weights = np.broadcast_to(np.asarray(weights, dtype=np.float64), (B, n))
    chunk = chunk or max(8, 400_000 // (n * P))
    parts = [
        _solve_chunk(problem, start[i : i + chunk], weights[i : i + chunk], max_iterations) for i in range(0, B, chunk)
    ]
    lanes = {name: np.concatenate([getattr(p[0], name) for p in parts]) for name in _Lanes.FIELDS}
    final = object.__new__(_Lanes)
    final.__dict__.update(lanes)
    return Solution(
        theta=final.theta,
        objective=final.objective,
        cosine=final.cosine,
        converged=(final.cosine <= CONVERGED_COSINE) | (_move(final, weights) <= ROUNDING_MOVE),
        at_bound=problem.held(final),
        hessian=final.hessian,
        gauss=final.gauss,
        iterations=max(p[1] for p in parts),
    )


def _move(lanes: _Lanes, weights: np.ndarray) -> np.ndarray:
    """How far, RMS over the rows, the gradient would still move the law along one parameter, (B,)."""
    with np.errstate(invalid="ignore"):
        return lanes.cosine * np.sqrt(lanes.spread / weights.sum(axis=1))


def _solve_chunk(problem: Problem, start: np.ndarray, weights: np.ndarray, max_iterations: int) -> tuple[_Lanes, int]:
    everyone = _Lanes(problem, np.clip(start, problem.lower, problem.upper), weights)
    active = np.flatnonzero(np.isfinite(everyone.objective))
    damping = np.full(len(start), 1e-2)
    iterations = 0
    while iterations < max_iterations:
        active = active[(everyone.cosine[active] > TARGET_COSINE) & (damping[active] < 1e12)]
        if not len(active):
            break
        lanes = everyone.take(active)
        iterations += 1
        trial = _Lanes(problem, _step(problem, lanes, damping[active]), weights[active])
        predicted = _predicted_decrease(lanes, trial.theta - lanes.theta)
        decrease = lanes.objective - trial.objective
        with np.errstate(all="ignore"):
            ratio = decrease / predicted
        # Near the optimum the objective is flat to rounding and only the gradient can tell progress.
        flat = np.abs(decrease) <= 1e-13 * np.abs(lanes.objective)
        accepted = np.where(flat, trial.cosine < lanes.cosine, decrease > 0)
        everyone.put(active[accepted], trial, accepted)
        good = accepted & ((ratio > 0.5) | flat)
        poor = accepted & (ratio < 0.1) & ~flat
        # Down slowly, up fast: along a flat valley the damping that was right stays right, and a rejected step costs as
        # much as an accepted one (a fifth fewer lane steps than with .1 and 10).
        factor = np.where(good, 0.3, np.where(accepted & ~poor, 1.0, np.where(poor, 3.0, 30.0)))
        damping[active] = np.maximum(damping[active] * factor, 1e-10)
    return everyone, iterations


def solve_each(matrices: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solves systems (B, P, P) for right sides (B, P): (B, P), NaN where a matrix is singular to the last digit, which
    NumPy refuses all of them for."""
    with suppress(np.linalg.LinAlgError):
        return np.linalg.solve(matrices, right[:, :, None])[:, :, 0]
    out = np.full(right.shape, np.nan)
    for one, matrix, side in zip(out, matrices, right):
        with suppress(np.linalg.LinAlgError):
            one[:] = np.linalg.solve(matrix, side)
    return out


def _step(problem: Problem, lanes: _Lanes, damping: np.ndarray) -> np.ndarray:
    """θ after a damped, projected Newton step."""
    held = problem.held(lanes)
    diagonal = np.maximum(np.diagonal(lanes.gauss, axis1=1, axis2=2), 1e-300)
    scale = np.where(held, 0.0, 1.0 / np.sqrt(diagonal))
    identity = np.eye(held.shape[1])
    matrix = (lanes.hessian + damping[:, None, None] * lanes.gauss) * scale[:, :, None] * scale[:, None, :]
    matrix += ((1e-4 * damping + 1e-14)[:, None] + held)[:, :, None] * identity
    direction = solve_each(matrix, lanes.gradient * scale)
    # Where the Hessian is indefinite Newton's step may climb, and where it is singular there is none: take the
    # magnitudes of its eigenvalues instead.
    climbs = ~((direction * lanes.gradient * scale).sum(axis=1) > 0) & np.isfinite(matrix).all(axis=(1, 2))
    if climbs.any():
        eigenvalues, vectors = np.linalg.eigh(matrix[climbs])
        projected = (vectors * (lanes.gradient * scale)[climbs][:, :, None]).sum(axis=1)
        floor = 1e-6 + damping[climbs][:, None]
        direction[climbs] = (vectors @ (projected / np.maximum(np.abs(eigenvalues), floor))[:, :, None])[:, :, 0]
    step = direction * scale
    if not np.isfinite(step).all():
        step = np.nan_to_num(step)
    return np.clip(lanes.theta - step, problem.lower, problem.upper)


def _predicted_decrease(lanes: _Lanes, step: np.ndarray) -> np.ndarray:
    linear = (lanes.gradient * step).sum(axis=1)
    quadratic = 0.5 * (step[:, None, :] @ lanes.hessian @ step[:, :, None])[:, 0, 0]
    return -(linear + quadratic)
