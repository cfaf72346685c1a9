"""Profile likelihood: how far a parameter, or anything derived from the law, moves before the fit says no.

Unlike a standard error it follows the curve of a weakly identified direction: an interval may be lopsided, or have no
end, and then says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from scaling.laws.fitting.coordinates import Derivatives
from scaling.laws.fitting.estimate import Fit
from scaling.laws.fitting.solver import Problem, solve
from scaling.laws.forms.law import Params
from scaling.laws.intervals.resampling import covariance, gradient, noise_scale

Quantity = Callable[[Params], np.ndarray]

GRID = 13  # points on each side of the optimum
REACH = 2.0  # how far the first grid goes, in units of the delta method's half-width
EXTENSIONS = 5  # times the grid is pushed out, doubling, before a side counts as unbounded
GRADIENT_STEP = 1e-5
HESSIAN_STEP = 1e-3


@dataclass(frozen=True)
class Profile:
    """The profile of one quantity.

    Attributes:
      value: at the optimum.
      lower, upper: ends of the interval; ∓inf where the data set no limit.
      level: nominal coverage.
      grid: values of the quantity the law was refitted at, rising.
      deviance: 2 (objective - minimum) / scale at each, compared with F(1, n - P).
      theta: the refitted laws' θ, (m, P).
    """

    value: float
    lower: float
    upper: float
    level: float
    grid: np.ndarray
    deviance: np.ndarray
    theta: np.ndarray

    @property
    def interval(self) -> list[float]:
        return [self.lower, self.upper]

    def describe(self, name: str) -> str:
        """The interval in words: "R_D*: the data allow 6.6 to unbounded"."""
        ends = [f"{end:.4g}" if np.isfinite(end) else "unbounded" for end in self.interval]
        return f"{name}: the data allow {ends[0]} to {ends[1]}"

    def of(self, function: Callable[[np.ndarray], np.ndarray]) -> "Profile":
        """The profile of a monotone function of the quantity: the same laws, the same deviances, other values."""
        with np.errstate(over="ignore", divide="ignore"):
            lower, value, upper, *grid = function(np.array([self.lower, self.value, self.upper, *self.grid])).tolist()
        order = slice(None, None, -1 if lower > upper else 1)
        ends = (lower, upper)[order]
        return replace(
            self,
            value=value,
            lower=ends[0],
            upper=ends[1],
            grid=np.array(grid)[order],
            deviance=self.deviance[order],
            theta=self.theta[order],
        )


class _Constrained:
    """A model with one more row, ε (g(θ) - c), and one more coordinate, c, that no row moves.

    Weighted with κ/ε², the row adds κ (g - c)²/2 to the objective: its minimiser is a point of g's profile, exactly,
    at whatever value g takes there. ε keeps the row in the quadratic part of a robust objective.
    """

    def __init__(self, model: Any, quantity: Quantity, epsilon: float) -> None:
        self.model, self.quantity, self.epsilon = model, quantity, epsilon

    def _g(self, theta: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.asarray(self.quantity(self.model.coordinates.decode(theta)), dtype=np.float64).reshape(len(theta))

    def derivatives(self, extended: np.ndarray) -> Derivatives:
        theta, c = extended[:, :-1], extended[:, -1]
        B, P = theta.shape
        value, jacobian, second = self.model.derivatives(theta)
        value = np.concatenate([value, self.epsilon * (self._g(theta) - c)[:, None]], axis=1)
        slope = self._slope(theta, GRADIENT_STEP)
        wide = np.zeros((B, P + 1, value.shape[1]))
        wide[:, :P, :-1] = jacobian
        wide[:, :P, -1] = self.epsilon * slope

        def hessian(c_weights: np.ndarray, v: np.ndarray) -> np.ndarray:
            out = np.zeros((B, P + 1, P + 1))
            out[:, :P, :P] = second(c_weights[:, :-1], v[:, :-1])
            row = wide[:, :P, -1]
            out[:, :P, :P] += c_weights[:, -1, None, None] * row[:, :, None] * row[:, None, :]
            out[:, :P, :P] += (self.epsilon * v[:, -1])[:, None, None] * self._curvature(theta)
            return out

        return value, wide, hessian

    def _slope(self, theta: np.ndarray, step: float) -> np.ndarray:
        B, P = theta.shape
        shifts = step * np.concatenate([np.eye(P), -np.eye(P)])
        g = self._g((theta[:, None, :] + shifts).reshape(-1, P)).reshape(B, 2, P)
        with np.errstate(invalid="ignore"):  # inf - inf, where the quantity has run off: no slope there
            slope = (g[:, 0] - g[:, 1]) / (2 * step)
            return np.where(np.isfinite(slope), slope, 0.0)

    def _curvature(self, theta: np.ndarray) -> np.ndarray:
        B, P = theta.shape
        shifts = HESSIAN_STEP * np.eye(P)
        moved = (theta[:, None, :] + np.concatenate([shifts, -shifts])).reshape(-1, P)
        slopes = self._slope(moved, HESSIAN_STEP).reshape(B, 2, P, P)
        hessian = (slopes[:, 0] - slopes[:, 1]) / (2 * HESSIAN_STEP)
        return 0.5 * (hessian + hessian.swapaxes(1, 2))


def profile(fit: Fit, quantity: "str | Quantity", level: float = 0.95, noise: float = 0.0) -> Profile:
    """Profile likelihood of a parameter, or of a derived quantity, and its interval.

    Args:
      quantity: a parameter's name, or a function of parameters (arrays (B,)) to (B,).
      level: of the interval, where the deviance reaches the quantile of F(1, n - P): likelihood ratio with the noise's
        scale estimated (Ronchetti 1982 for robust objectives).
      noise: standard deviation of one new observation of the quantity: makes this a prediction interval, in which
        deviance and noise share the misfit.

    The law is refitted at some thirty values of the quantity, all in one batch.
    """
    if isinstance(quantity, str):
        return _of_parameter(fit, quantity, level)
    dof = max(fit.degrees_of_freedom, 1)
    scale = deviance_scale(fit)
    quantile = float(stats.t.ppf(0.5 + 0.5 * level, dof))
    value = float(np.asarray(quantity(fit.coordinates.decode(fit.theta[None])))[0])
    slope = gradient(fit, quantity)
    moved = covariance(fit) @ slope
    error = float(np.sqrt(max(slope @ moved, 0.0)))
    if not np.isfinite(error) or error == 0.0:
        return Profile(value, value, value, level, np.array([value]), np.zeros(1), fit.theta[None])
    reach = REACH * quantile * error
    steps = np.linspace(0, 1, GRID + 1)[1:]

    def ahead(targets: np.ndarray, g: float, theta: np.ndarray, span: float) -> tuple[np.ndarray, ...]:
        start = theta + np.outer(targets - g, moved / error**2)
        return _refit(fit, quantity, targets, start, span, scale)

    # Batches this small cost by the call, not by the lane: the first grid of either side in one.
    both = ahead(value + reach * np.concatenate([-steps, steps]), value, fit.theta, reach)
    found = {}
    for side, first in ((-1.0, slice(GRID)), (1.0, slice(GRID, None))):
        span = reach
        g, dev, theta = np.array([value]), np.zeros(1), fit.theta[None]
        for extension in range(EXTENSIONS):
            targets = g[-1] + side * span * steps
            g_new, dev_new, theta_new = (
                ahead(targets, g[-1], theta[-1], span) if extension else tuple(a[first] for a in both)
            )
            # A spike is a point that stopped at a worse local optimum: begin again from where its neighbours are.
            spikes = np.flatnonzero(dev_new[:-1] > dev_new[1:] + 1e-6)
            for neighbour in (1, -1):
                if len(spikes):
                    origin = np.clip(spikes + neighbour, 0, len(targets) - 1)
                    again = _refit(fit, quantity, targets[spikes], theta_new[origin], span, scale)
                    better = again[1] < dev_new[spikes]
                    for old, new in zip((g_new, dev_new, theta_new), again):
                        old[spikes[better]] = new[better]
            g, dev = np.append(g, g_new), np.append(dev, dev_new)
            theta = np.concatenate([theta, theta_new])
            stuck = abs(g_new[-1] - g_new[0]) < 0.1 * span  # at a bound: it can go no further
            if dev.max() > 1.5 * quantile**2 or stuck or not np.isfinite(g).all():
                break
            span *= 2
        found[side] = (g, dev, theta)
    lower, upper = (_end(*found[side][:2], side, quantile, noise, value, error) for side in (-1.0, 1.0))
    g = np.concatenate([found[-1.0][0][:0:-1], found[1.0][0]])
    dev = np.concatenate([found[-1.0][1][:0:-1], found[1.0][1]])
    theta = np.concatenate([found[-1.0][2][:0:-1], found[1.0][2]])
    return Profile(value, lower, upper, level, g, dev, theta)


def _of_parameter(fit: Fit, name: str, level: float) -> Profile:
    """The profile of a parameter, walked in its logarithm where that is how it is fitted."""
    if name not in fit.form.parameters:
        raise ValueError(f"{fit.form.name} has no {name}: it has {', '.join(fit.form.parameters)}")
    if fit.form.parameters[name].kind not in ("log", "amplitude", "critical", "location"):
        return profile(fit, lambda p: p[name], level)
    return positive_profile(fit, lambda p: p[name], level)


def positive_profile(fit: Fit, quantity: Quantity, level: float = 0.95) -> Profile:
    """The profile of a quantity that is positive, walked in its logarithm."""
    found = profile(fit, lambda p: np.log(quantity(p)), level)
    with np.errstate(over="ignore"):
        ends: dict[str, Any] = {k: float(np.exp(getattr(found, k))) for k in ("value", "lower", "upper")}
        return replace(found, **ends, grid=np.exp(found.grid))


def without_end(fit: Fit, name: str, interval: list[float], profiles: Mapping[str, Profile]) -> list[float]:
    """An interval of a parameter by another method, without the ends that its profile does not have.

    Resamples of a flat direction stop where the refit happens to stop, and percentiles of that look like a limit. A
    parameter held by a bound that is no part of its domain has no end on that side either.
    """
    lower, upper = interval
    if name in profiles:
        found = profiles[name]
        return [lower if np.isfinite(found.lower) else found.lower, upper if np.isfinite(found.upper) else found.upper]
    if name not in fit.at_bound:
        return [lower, upper]
    j = fit.coordinates.names.index(name)
    declared = fit.form.parameters[name]
    open_below = not (declared.kind == "plain" and declared.lower == 0.0)  # E >= 0 is a limit of its own
    held_below = fit.theta[j] <= fit.problem.lower[j]
    if lower == upper:  # held throughout: nothing was seen of the other side
        return [-np.inf if open_below or not held_below else lower, np.inf]
    return [-np.inf if held_below and open_below else lower, upper if held_below else np.inf]


def cut(fit: Fit, level: float = 0.95) -> float:
    """The deviance at which an interval of this level ends: the quantile of F(1, n - P)."""
    return float(stats.t.ppf(0.5 + 0.5 * level, max(fit.degrees_of_freedom, 1)) ** 2)


def deviance_scale(fit: Fit) -> float:
    """E ψ² / E ψ': what twice the rise of the objective is measured in."""
    if fit.loss.name == "squared":
        return noise_scale(fit) ** 2
    _, psi, inside, _ = fit.loss.smooth(fit.residuals)
    w = fit.observations.weight
    if fit.loss.name == "lad" or np.average(inside, weights=w) < 0.2:
        return float(noise_scale(fit) * np.sqrt(np.average(psi**2, weights=w)))
    return float(noise_scale(fit) ** 2 * np.average(inside, weights=w))


def _refit(
    fit: Fit, quantity: Quantity, targets: np.ndarray, start: np.ndarray, span: float, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the profile near ``targets``: values of the quantity, deviances, θ."""
    robust = fit.loss.name != "squared"
    epsilon = (0.01 * fit.loss.delta if robust else 0.01) / span
    # Stiff enough that g ends near its target, soft enough to keep the problem well scaled.
    kappa = 400.0 * scale * 16.0 / span**2
    problem = Problem(
        model=_Constrained(fit.problem.model, quantity, epsilon),
        target=np.append(fit.problem.target, 0.0),
        objective=fit.loss if fit.loss.name != "lad" else replace(fit.loss, name="huber"),
        lower=np.append(fit.problem.lower, -np.inf),
        upper=np.append(fit.problem.upper, np.inf),
    )
    weights = np.append(fit.observations.weight, kappa / epsilon**2)
    extended = np.concatenate([np.clip(start, fit.problem.lower, fit.problem.upper), targets[:, None]], axis=1)
    solution = solve(problem, extended, weights, 80)
    theta = solution.theta[:, :-1]
    g = problem.model._g(theta)
    residuals = fit.problem.model.value(theta) - fit.problem.target
    objective = (fit.observations.weight * problem.objective.rho(residuals)).sum(axis=1)
    base = (fit.observations.weight * problem.objective.rho(fit.residuals)).sum()
    return g, np.maximum(2 * (objective - base) / scale, 0.0), theta


def _end(
    g: np.ndarray, dev: np.ndarray, side: float, quantile: float, noise: float, value: float, error: float
) -> float:
    """Where the signed root of the deviance crosses the quantile, by monotone interpolation.

    With ``noise`` the law may miss by sqrt(dev) and the run by its noise at once: at distance y from the optimum the
    least of dev(g) + ((y - g)/noise)² over g must stay below the quantile squared.
    """
    known = np.isfinite(g)  # beyond, the parameter overflows: the data allow all there is
    g, dev = g[known], dev[known]
    order = np.argsort(side * g)
    g, root = g[order], np.sqrt(np.maximum.accumulate(dev[order]))
    if noise > 0.0:
        fine = np.linspace(0, 1, 2001)
        inner = np.interp(fine, np.linspace(0, 1, len(g)), side * (g - value))
        square = np.interp(inner, side * (g - value), root) ** 2
        inside = square <= quantile**2
        reachable = inner[inside] + noise * np.sqrt(quantile**2 - square[inside])
        return value + side * float(reachable.max())
    beyond = np.flatnonzero(root >= quantile)
    if not len(beyond):
        return float(side * np.inf)
    k = beyond[0]
    t = (quantile - root[k - 1]) / max(root[k] - root[k - 1], 1e-300)
    return float(g[k - 1] + t * (g[k] - g[k - 1]))
