"""How far the data let a fitted law move: bootstrap draws, the delta method, prediction intervals."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import optimize, stats

from scaling.laws.fitting.estimate import Draws, Fit
from scaling.laws.fitting.solver import Solution, solve, solve_each

LEAST_FREE = 0.05  # of a residual's variance, that of a row which the law goes through


def interval(values: np.ndarray, level: float = 0.95) -> list[float]:
    """Equal-tailed percentile interval of draws."""
    tail = 0.5 * (1.0 - level)
    lo, hi = np.quantile(np.asarray(values, dtype=np.float64), [tail, 1.0 - tail])
    return [float(lo), float(hi)]


def percentiles(draws: np.ndarray, level: float) -> np.ndarray:
    """Equal-tailed percentiles (m, 2) of draws (B, m), some of which may be 0 or infinite: beyond every end."""
    tail = [0.5 * (1 - level), 1 - 0.5 * (1 - level)]
    with np.errstate(invalid="ignore"):
        ends = np.quantile(draws, tail, axis=0)
    odd = ~np.isfinite(draws).all(axis=0) | (draws == 0).any(axis=0)
    for i in np.flatnonzero(odd):  # no interpolating between a number and what is beyond all numbers
        known = draws[~np.isnan(draws[:, i]), i]
        ends[:, i] = np.quantile(known, tail, method="nearest") if len(known) else np.nan
    lower, upper = ends
    return np.stack([np.where(lower == 0, -np.inf, lower), upper], axis=-1)


def bootstrap(
    fit: Fit,
    num: int = 1000,
    *,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> Draws:
    """Refits the law to ``num`` resamples of its observations, with replacement.

    Args:
      clusters: labels (n,): whole clusters are drawn (rows of one run share its noise).
      counts: how often each row is in each resample, (B, n), instead of random ones (``resamples``).

    A replicate starts at the fit's optimum; one that ends without evidence or at a bound is tried again from the fit's
    own grid of starts and the better of its optima kept.
    """
    if counts is None:
        counts = resamples(fit.num_observations, num, seed=seed, clusters=clusters)
    weights = counts * fit.observations.weight
    solution = solve(fit.problem, np.repeat(fit.theta[None], len(weights), axis=0), weights)
    solution = _retry(fit, solution, weights)
    names = fit.coordinates.names
    return Draws(
        params=fit.coordinates.decode(solution.theta),
        theta=solution.theta,
        converged=float(solution.converged.mean()),
        at_bound=dict(zip(names, solution.at_bound.mean(axis=0).tolist())),
    )


def wild(fit: Fit, groups: np.ndarray, num: int = 1000, *, seed: int = 0) -> Draws:
    """Draws laws by a wild bootstrap of whole groups' scores: errors of one group may have any covariance.

    θ* = θ + √((m-1)/m) Σ_g η_g u_g / √(χ²_k/k): η standard normal, u_g the step in θ of leaving group g of m out (one
    Newton step), k = m - 1. That is a multivariate t with the jackknife's covariance (CV3), which is wide enough where
    groups are few (Kline & Santos 2012, scores; MacKinnon, Nielsen & Webb 2023, CV3 and t(m - 1)). Groups of one row
    each are HC3, with k = n - P.

    Args:
      groups: number of each row's group (n,).
    """
    J, share = _jacobian(fit), _share_of_slope(fit)
    w = fit.observations.weight
    free = np.array([name not in fit.at_bound for name in fit.coordinates.names])
    _, psi, _, _ = fit.loss.smooth(fit.residuals)
    if fit.loss.name == "lad":  # as ``_share_of_slope`` has it: of |r|, not of the Huber that stands in for it
        psi = psi / fit.loss.delta
    m = int(groups.max()) + 1
    score, information = np.zeros((m, free.sum())), np.zeros((m, free.sum(), free.sum()))
    np.add.at(score, groups, (w * psi * J[free]).T)
    np.add.at(information, groups, share * np.einsum("pn,qn,n->npq", J[free], J[free], w))
    step = _without(information, score)
    dof = max(fit.degrees_of_freedom if m == fit.num_observations else m - 1, 1)
    return _students_t(fit, free, (m - 1) / m * step.T @ step, dof, num, seed, "wild")


# A group without which a direction has less than this share of its information moves it by no more than that many times
# its own step: an interval then is very wide there, as it should be, and not narrow for want of a step.
LEAST_LEFT = 1e-4


def _without(information: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The step (m, P) of leaving each of m groups out: the inverse of the others' information (P, P) times its score,
    in coordinates in which all information is the unit matrix."""
    values, vectors = np.linalg.eigh(information.sum(axis=0))
    known = values > 1e-12 * values[-1]
    root = vectors[:, known] / np.sqrt(values[known])  # (P, p)
    left, turned = np.linalg.eigh(np.eye(known.sum()) - root.T @ information @ root)
    to = root @ turned  # (m, P, p)
    return ((to / np.maximum(left, LEAST_LEFT)[:, None, :]) @ (to.transpose(0, 2, 1) @ score[:, :, None]))[:, :, 0]


def uneven(fit: Fit, num: int = 1000, *, seed: int = 0) -> Draws:
    """Draws laws as independent errors whose scale follows the loss, σ ∝ L^g, let the same fit move.

    g by maximum likelihood of Gaussian e, the residuals over √(1 - leverage), those far off drawn in; then θ* is
    multivariate t, n - P degrees of freedom, with the sandwich A⁻¹ B A⁻¹, A = Σ w E ψ' J Jᵀ and B = Σ w² E ψ² J Jᵀ of
    Gaussian errors with those σ. The rows' own squares (HC3) say too little of the scale where a few noisy rows decide:
    on a ladder of ten sizes their 90 % intervals held a in 70 % of draws.
    """
    free = np.array([name not in fit.at_bound for name in fit.coordinates.names])
    J, w = _jacobian(fit)[free], fit.observations.weight
    columns = {c: fit.observations.columns[c] for c in fit.form.columns}
    level = np.log(fit.predict(**columns))
    level = level - level.mean()
    leverage = w * np.einsum("pn,pq,qn->n", J, np.linalg.pinv((J * w) @ J.T, hermitian=True), J)
    e = np.sqrt(w) * fit.residuals / np.sqrt(np.maximum(1.0 - leverage, LEAST_FREE))
    growth, scale = _scale_of(e, level)
    sigma = scale * np.exp(growth * level) / np.sqrt(w)
    share, square = _of_gaussian(fit, sigma)
    information = np.linalg.pinv((J * w * share) @ J.T, rcond=1e-12, hermitian=True)
    cov = information @ ((J * w**2 * square) @ J.T) @ information
    return _students_t(fit, free, cov, max(fit.degrees_of_freedom, 1), num, seed, "uneven")


def _scale_of(e: np.ndarray, level: np.ndarray) -> tuple[float, float]:
    """(g, s) of errors e ~ N(0, s² exp(2 g level)), level of mean 0: with s² = mean(e² exp(-2 g level)) the likelihood
    is highest where that mean is lowest."""
    floor = 0.1 * np.median(np.abs(e)) + 1e-300  # the logarithm of a residual near 0 says nothing
    growth = float(np.polyfit(level, np.log(np.abs(e) + floor), 1)[0])
    for _ in range(2):  # what is far off is so at the scale of its own loss
        standard = np.exp(-growth * level) * e
        far = 4.0 * np.median(np.abs(standard)) + 1e-300
        near = np.exp(growth * level) * np.clip(standard, -far, far)
        reach = 30.0 / max(np.ptp(level), 1e-9)
        found = optimize.minimize_scalar(
            lambda g, near=near: np.log(np.mean((near * np.exp(-g * level)) ** 2) + 1e-300),
            bounds=(-reach, reach), method="bounded",
        )  # fmt: skip
        growth = float(found.x)
    return growth, float(np.sqrt(np.mean((near * np.exp(-growth * level)) ** 2)))


def _of_gaussian(fit: Fit, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E ψ', E ψ²) of Gaussian errors of these standard deviations under the fit's objective."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    r = sigma[:, None] * nodes
    psi = fit.loss.smooth(r)[1]
    square = (psi**2 @ weights) / weights.sum()
    # E ψ' = E r ψ / σ² (Stein): smooth where ψ has a kink.
    return ((r * psi) @ weights) / weights.sum() / np.maximum(sigma, 1e-300) ** 2, square


def _students_t(fit: Fit, free: np.ndarray, covariance: np.ndarray, dof: int, num: int, seed: int, kind: str) -> Draws:
    """θ about the fit's, multivariate t in the ``free`` parameters to first order (``_on_the_law``), within bounds."""
    rng = np.random.default_rng(seed)
    values, vectors = np.linalg.eigh(covariance)
    normal = rng.normal(size=(num, len(values))) * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    theta = np.repeat(fit.theta[None], num, axis=0)
    theta[:, free] += normal / np.sqrt(rng.chisquare(dof, size=(num, 1)) / dof)
    theta = _on_the_law(fit, free, theta)
    at_bound = ((theta <= fit.problem.lower) | (theta >= fit.problem.upper)).mean(axis=0)
    return Draws(fit.coordinates.decode(theta), theta, 1.0, dict(zip(fit.coordinates.names, at_bound.tolist())), kind)


MOVES, ENOUGH = 40, 1e-10  # of Levenberg and Marquardt; relative, of a sum of squares, below which nothing is gained


def _on_the_law(fit: Fit, free: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The laws (B, P) that predict of the fitted rows what steps to ``theta`` along the tangent at the fit say of them.

    Parameters of a law lie along curved ridges. A straight step as long as few clusters allow leaves the ridge, and all
    such steps predict higher losses than the rows have, most of all where the data are. So a step δ stands for its
    predictions to first order, f + J δ, and θ minimises Σ w (f(θ) - f - J δ)²: the fit itself where δ is 0, θ + δ where
    the law is linear.
    """
    model, root = fit.problem.model, np.sqrt(fit.observations.weight)
    lower, upper = fit.problem.lower[free], fit.problem.upper[free]
    start = model.derivatives(fit.theta[None])
    target = (start[0] + (theta - fit.theta) @ start[1][0]) * root
    at = np.repeat(fit.theta[None], len(theta), axis=0)
    value, slope = np.repeat(start[0] * root, len(at), axis=0), np.repeat(start[1][:, free] * root, len(at), axis=0)
    cost, damping, going = ((target - value) ** 2).sum(axis=1), np.full(len(at), 1e-3), np.arange(len(at))
    for _ in range(MOVES):
        J = slope[going]
        curvature = J @ J.transpose(0, 2, 1)
        diagonal = np.einsum("bpp->bp", curvature)
        diagonal += damping[going, None] * diagonal + 1e-300
        pull = (J @ (target - value)[going][:, :, None])[:, :, 0]
        moved = at[going].copy()
        moved[:, free] = np.clip(moved[:, free] + solve_each(curvature, pull), lower, upper)
        with np.errstate(all="ignore"):
            found, steep = model.derivatives(moved)[:2]
        left = ((target[going] - found * root) ** 2).sum(axis=1)
        better = left < cost[going]  # not where it is not finite
        gained = np.where(better, cost[going] - left, np.inf) > ENOUGH * np.maximum(cost[going], 1e-30)
        kept, damping[going] = going[better], damping[going] * np.where(better, 0.2, 5.0)
        at[kept], value[kept], slope[kept] = moved[better], (found * root)[better], (steep[:, free] * root)[better]
        cost[kept] = left[better]
        going = going[gained & (damping[going] < 1e8)]
        if not len(going):
            break
    return at


def _jacobian(fit: Fit) -> np.ndarray:
    return fit.problem.model.derivatives(fit.theta[None])[1][0]


def resamples(
    n: int, num: int, *, seed: int = 0, clusters: np.ndarray | None = None, strata: np.ndarray | None = None
) -> np.ndarray:
    """Draws resamples with replacement: how often each of ``n`` rows is in each of them, (num, n).

    Args:
      clusters: labels (n,): whole clusters are drawn; each row is one by default.
      strata: labels (n,), one for all rows of a cluster: as many clusters are drawn of each as it has.
    """
    rng = np.random.default_rng(seed)
    _, member = np.unique(np.arange(n) if clusters is None else np.asarray(clusters), return_inverse=True)
    stratum_of = np.zeros(member.max() + 1, dtype=int)
    if strata is not None:
        stratum_of[member] = np.unique(np.asarray(strata), return_inverse=True)[1]
    out = np.empty((num, len(stratum_of)))
    for stratum in range(stratum_of.max() + 1):
        drawn = stratum_of == stratum
        k = int(drawn.sum())
        out[:, drawn] = rng.multinomial(k, np.full(k, 1.0 / k), size=num)
    return out[:, member]


def _retry(fit: Fit, solution: Solution, weights: np.ndarray) -> Solution:
    doubtful = np.flatnonzero(~solution.converged | solution.at_bound.any(axis=1))
    if not len(doubtful):
        return solution
    optima = fit.solution.theta[np.unique(np.round(fit.solution.objective, 12), return_index=True)[1]][1:3]
    spread = np.concatenate([optima, _spread_starts(fit)])
    fields = {name: getattr(solution, name).copy() for name in Solution.__dataclass_fields__ if name != "iterations"}
    for start in spread:
        again = solve(fit.problem, np.repeat(start[None], len(doubtful), axis=0), weights[doubtful])
        now = fields["objective"][doubtful]
        better = again.objective < now * (1 - 1e-12)
        better |= again.converged & ~fields["converged"][doubtful] & (again.objective <= now * (1 + 1e-12))
        for name, values in fields.items():
            values[doubtful[better]] = getattr(again, name)[better]
    return Solution(**fields, iterations=solution.iterations)


def _spread_starts(fit: Fit) -> np.ndarray:
    """Two starts on either side of the optimum, two standard errors of the delta method away, within bounds."""
    step = np.minimum(2.0 * np.sqrt(np.maximum(np.diagonal(covariance(fit)), 0.0)), 1.0)
    return np.clip(np.stack([fit.theta + step, fit.theta - step]), fit.problem.lower, fit.problem.upper)


def covariance(fit: Fit) -> np.ndarray:
    """Covariance of θ by the delta method (Huber 1981, §7.6): s² (Σ w J Jᵀ)⁻¹ with s² = Σψ²/(n-P) / mean(ψ')².

    Parameters at a bound are held there: their rows and columns are zero.
    """
    w = fit.observations.weight
    names = fit.coordinates.names
    free = np.array([name not in fit.at_bound for name in names])
    J = _jacobian(fit)[free]
    information = (J * w) @ J.T
    out = np.zeros((len(names), len(names)))
    if free.any():
        out[np.ix_(free, free)] = noise_scale(fit) ** 2 * np.linalg.pinv(information, rcond=1e-14, hermitian=True)
    return out


def noise_scale(fit: Fit) -> float:
    """σ such that estimates scatter as under least squares with Gaussian noise σ: sqrt(Σwψ²/(n-P)) / mean(ψ')."""
    _, psi, inside, _ = fit.loss.smooth(fit.residuals)
    w = fit.observations.weight
    dof = max(fit.degrees_of_freedom, 1)
    if fit.loss.name == "lad" or np.average(inside, weights=w) < 0.2:
        return float(np.sqrt(fit.num_observations / dof) / (2 * _density(fit)))
    share = np.average(inside, weights=w)
    # Huber's (1973) correction of his own variance for few observations a parameter.
    correction = 1.0 + len(fit.params) / fit.num_observations * (1.0 - share) / share
    return float(correction * np.sqrt((w * psi**2).sum() / dof / np.average(w)) / share)


def _density(fit: Fit) -> float:
    """Density of the residuals at zero. Nearly LAD, too few lie within δ to estimate it there: over one MAD."""
    scale = np.median(np.abs(fit.residuals)) / 0.6744897501960817 + 1e-300
    return float(np.average(np.abs(fit.residuals) <= scale, weights=fit.observations.weight) / (2 * scale))


def _share_of_slope(fit: Fit) -> float:
    """E ψ': the curvature of the objective in units of Σ w J Jᵀ."""
    inside = fit.loss.smooth(fit.residuals)[2]
    share = float(np.average(inside, weights=fit.observations.weight))
    if fit.loss.name == "lad" or share < 0.2:
        height = 1.0 if fit.loss.name == "lad" else fit.loss.delta
        return 2 * height * _density(fit)
    return share


def gradient(fit: Fit, quantity: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> np.ndarray:
    """∂ quantity / ∂θ at the optimum, by central differences; (P,) or (P, …)."""
    step = 1e-5
    P = len(fit.theta)
    shifted = np.concatenate([fit.theta + step * np.eye(P), fit.theta - step * np.eye(P)])
    values = np.asarray(quantity(fit.coordinates.decode(shifted)))
    with np.errstate(invalid="ignore"):  # inf - inf, where there is no such quantity on either side: NaN, no slope
        return (values[:P] - values[P:]) / (2 * step)


def delta_interval(
    fit: Fit,
    quantity: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    level: float = 0.95,
    noise: float | np.ndarray = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(value, lower, upper) of a derived quantity by the delta method, with Student's t for the noise's own estimate.

    ``quantity`` maps parameters, arrays (B,), to an array (B, …); ``noise`` is a standard deviation added to it.
    """
    value = np.asarray(quantity(fit.coordinates.decode(fit.theta[None])))[0]
    slope = gradient(fit, quantity)
    variance = np.einsum("p...,pq,q...->...", slope, covariance(fit), slope) + noise**2
    half = stats.t.ppf(0.5 + 0.5 * level, max(fit.degrees_of_freedom, 1)) * np.sqrt(np.maximum(variance, 0.0))
    return value, value - half, value + half


def prediction_draws(fit: Fit, draws: Draws, *, seed: int = 0, **columns: Any) -> np.ndarray:
    """Draws (B, m) of the loss of new runs: a bootstrap law each, times a residual of the fit.

    Residuals are inflated by sqrt(n / (n - P)) for the parameters that were fitted to them, and scaled to the noise of
    a run of mean weight.
    """
    law = {name: v[:, None] for name, v in draws.params.items()}
    with np.errstate(over="ignore"):  # far from the rows a law that hardly holds together has no finite loss
        predicted = fit.form.predict(law, **{c: np.atleast_1d(columns[c]) for c in fit.form.columns})
    inflate = np.sqrt(fit.num_observations / max(fit.degrees_of_freedom, 1))
    # √w r has one variance for all rows: that of a run of mean weight.
    standard = np.sqrt(fit.observations.weight) * fit.residuals * inflate
    equal = np.full(len(standard), 1.0 / len(standard))
    noise = np.random.default_rng(seed).choice(standard, size=predicted.shape, p=equal)
    noise = noise * fit.noise_at(**columns)
    return predicted * np.exp(-noise) if fit.problem.model.log else predicted - noise
