"""What the fitted forms know of a target and of candidates, as one normal distribution of all of them.

Of each form that votes, at each of its optima, the target t and the log losses f(x) of candidates x are linear in θ
about that optimum, with the Laplace covariance Σ of the rows observed. Over optima of weights w_k the covariance of t
and f is

    Σ_k w_k (∂_k Σ_k ∂_kᵀ + d_k d_kᵀ),    ∂ the slopes of t and f in θ, d what they differ from the weighted mean,

so that the forms' disagreement is variance like the rest, and a run on whose loss they disagree takes it away. This is
kept as a product of ``features``; a run with noise s² then is one more row of least squares,
S ← S - S φ φᵀ S / (s² + φᵀ S φ), exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from scaling.laws.answers.design.target import Target
from scaling.laws.fitting.coordinates import Model
from scaling.laws.fitting.estimate import Fit
from scaling.laws.fitting.starts import distinct
from scaling.laws.intervals import resampling
from scaling.laws.intervals.profile import Quantity, deviance_scale

if TYPE_CHECKING:
    from scaling.laws.analysis import Analysis

# An optimum this much less likely than the best is left out (Li et al. 2026, arXiv 2604.22753, in their code).
LEAST_WEIGHT = 1e-3
# Eigenvalues of the information, scaled to a unit diagonal, below this are a direction that the rows do not tell.
SINGULAR = 1e-12
FIXED = 1e-9  # slopes of a target below this are rounding: the form fixes it
LEAST_NOISE = 1e-9  # of log loss: rows without noise leave nothing to narrow, and no ratio of nothings


@dataclass(frozen=True)
class Beliefs:
    """Target and candidates as linear functions of R independent standard normal variables.

    Attributes:
      target: features of the target (R,), ``rows`` those of the candidates' log losses (n, R).
      noise: variance of each candidate's own loss about its law (n,).
      rest: variance of the target that no run takes away: a run's own noise, what forms miss at that distance.
      voters: weight of each form, by name; ``reasons`` say who does not vote.
    """

    target: np.ndarray
    rows: np.ndarray
    noise: np.ndarray
    rest: float
    voters: dict[str, float]
    reasons: tuple[str, ...] = ()

    @property
    def start(self) -> np.ndarray:
        """S before any run is bought."""
        return np.eye(len(self.target))

    def variance(self, S: np.ndarray) -> float:
        """Of the target, without ``rest``."""
        return float(self.target @ S @ self.target)

    def falls(self, S: np.ndarray) -> np.ndarray:
        """How much of that each candidate would take away (n,)."""
        moved = self.rows @ S
        return (moved @ self.target) ** 2 / (self.noise + (moved * self.rows).sum(axis=1))

    def bought(self, S: np.ndarray, i: int, times: float = 1.0) -> np.ndarray:
        """S once candidate ``i`` has run, ``times`` over (negative: taken back)."""
        moved = S @ self.rows[i]
        return S - np.outer(moved, moved) * (times / (self.noise[i] + times * (self.rows[i] @ moved)))


def believe(found: "Analysis", columns: Mapping[str, np.ndarray], target: Target, *, alone: bool = False) -> Beliefs:
    """Asks the forms that forecasts combine, by their weights there, or the surface law ``alone``.

    A form that fixes the target (``chinchilla_tied``: a = .5), has none, or whose rows leave a direction open does not
    vote. Losses of candidates are not looked at: noise is that of the rows observed.
    """
    fits = {str(found.surface): found.fits[str(found.surface)]}
    place = target.place(found)
    weights, misses = {str(found.surface): 1.0}, 0.0
    combined = found.combination
    if combined is not None and not alone and set(combined.columns) <= set(place):
        fits = combined.fits
        weights = {name: float(w[0]) for name, w in combined.weights(**place).items()}
        misses = sum(w * combined.misses(name, place)[0] ** 2 for name, w in weights.items())
    told, reasons = [], []
    for name, fitted in fits.items():
        votes, why = _votes(fitted, columns, target.quantity(fitted.form, found.cost), target.name, place)
        told += [(name, weights[name] * share, vote) for share, vote in votes]
        reasons += [f"{name} {why}"] if why else []
    return _mixed(told, len(next(iter(columns.values()))), misses if target.kind.is_loss else None, reasons)


def sharing(known: Beliefs, width: float, shared: float) -> Beliefs:
    """Returns what is known of a target whose interval, ``width`` wide, has a ``shared`` part that no run takes away:
    it is the same part, (shared / width)², of the variance, whatever scale Laplace's has."""
    if not (shared > 0 and 0 < width < np.inf):
        return known
    part = min(shared / width, 1 - 1e-9) ** 2
    return replace(known, rest=known.rest + known.variance(known.start) * part / (1 - part))


def of_fit(fitted: Fit, columns: Mapping[str, np.ndarray], quantity: Quantity, name: str) -> Beliefs:
    """What one fit knows of a quantity of its parameters called ``name``, (B,) each, that is no run's loss."""
    votes, why = _votes(fitted, columns, quantity, name, {c: np.ones(1) for c in fitted.form.columns})
    told = [(fitted.form.name, share, vote) for share, vote in votes]
    return _mixed(told, len(next(iter(columns.values()))), None, [f"{fitted.form.name} {why}"] if why else [])


def _mixed(
    told: "Sequence[tuple[str, float, _Vote]]", n: int, misses: float | None, reasons: Sequence[str]
) -> "Beliefs":
    """The votes (name, weight, vote) on ``n`` candidates as one distribution. ``misses``: the variance of what forms
    miss where a loss is asked; None where it is no loss."""
    total = sum(w for _, w, _ in told)
    if not told or total <= 0:
        return Beliefs(np.zeros(0), np.zeros((n, 0)), np.ones(n), 0.0, {}, tuple(reasons))
    shares = np.array([w / total for _, w, _ in told])
    value = np.array([vote.value for *_, vote in told])
    features = [np.sqrt(w) * vote.spread for w, (*_, vote) in zip(shares, told)]
    features.append(((value - shares @ value) * np.sqrt(shares)[:, None]).T)
    joint = np.concatenate(features, axis=1)
    noise = shares @ np.array([vote.noise for *_, vote in told])
    rest = 0.0 if misses is None else misses + float(shares @ [vote.noise_there for *_, vote in told])
    voters: dict[str, float] = {}
    for (name, *_), w in zip(told, shares):
        voters[name] = voters.get(name, 0.0) + float(w)
    return Beliefs(joint[0], joint[1:], noise, rest, voters, tuple(reasons))


@dataclass(frozen=True)
class _Vote:
    """What one optimum says of (target, candidates): values (1 + n,), their spread (1 + n, P), the noise of a loss."""

    value: np.ndarray
    spread: np.ndarray
    noise: np.ndarray
    noise_there: float


def _votes(
    fitted: Fit,
    columns: Mapping[str, np.ndarray],
    quantity: Quantity | None,
    name: str,
    place: Mapping[str, np.ndarray],
) -> tuple[list[tuple[float, _Vote]], str]:
    """(share, vote) of each optimum of a form, the shares summing to 1; and why it has none, in words. ``quantity``:
    called ``name``, of the run at ``place``."""
    if quantity is None:
        return [], f"has no {name}: it does not vote"
    own = {c: np.asarray(columns[c], dtype=np.float64) for c in fitted.form.columns}
    model = Model(fitted.coordinates, own, fitted.problem.model.log)
    there = {c: v for c, v in place.items() if c in own}
    votes, why = [], ""
    for share, at in optima(fitted):
        slope = resampling.gradient(at, quantity)
        value = quantity(at.params)
        if not (np.isfinite(slope).all() and np.isfinite(value).all()):
            why = f"has no finite {name}: it does not vote"
            continue
        if not (np.abs(slope) > FIXED).any():
            why = f"fixes {name}: it does not vote"
            continue
        root = root_covariance(at)
        if root is None:
            why = "leaves a direction of its parameters open: it does not vote"
            continue
        predicted, jacobian, _ = model.derivatives(at.theta[None])
        sigma = max(resampling.noise_scale(at), LEAST_NOISE)
        votes.append((share, _Vote(
            np.concatenate([np.ravel(value), predicted[0]]),
            np.concatenate([slope[None], jacobian[0].T]) @ root,
            np.broadcast_to((sigma * at.noise_at(**own)) ** 2, predicted[0].shape),
            float(np.ravel((sigma * at.noise_at(**there)) ** 2)[0]),
        )))  # fmt: skip
    total = sum(share for share, _ in votes)
    return [(share / total, vote) for share, vote in votes], "" if votes else why


def optima(fitted: Fit) -> Iterator[tuple[float, Fit]]:
    """(likelihood relative to the best, the fit) at each distinct optimum that the solver found."""
    yield 1.0, fitted
    solution, scale = fitted.solution, max(deviance_scale(fitted), 1e-300)
    lanes, _ = distinct(solution)
    for lane in lanes[1:]:
        theta = solution.theta[lane]
        share = float(np.exp(-(solution.objective[lane] - solution.objective[lanes[0]]) / scale))
        # The solver stops a flat direction where it stops it: such lanes are the best optimum again.
        same = np.abs(theta - fitted.theta).max() <= 1e-3
        if share < LEAST_WEIGHT or same or not solution.converged[lane]:
            continue
        params = {k: float(v) for k, v in fitted.coordinates.decode(theta).items()}
        residuals = fitted.problem.model.value(theta[None])[0] - fitted.problem.target
        held = tuple(n for n, at in zip(fitted.coordinates.names, solution.at_bound[lane]) if at)
        yield share, replace(fitted, theta=theta, params=params, residuals=residuals, at_bound=held)


def root_covariance(fitted: Fit) -> np.ndarray | None:
    """A root (P, P) of ``resampling.covariance``, by eigenvalues of the scaled information; None where one of them is
    zero to rounding, which a pseudo-inverse would pass over. Parameters at a bound are free: a run may move them off
    it."""
    _, jacobian, _ = fitted.problem.model.derivatives(fitted.theta[None])
    J = jacobian[0]
    information = (J * fitted.observations.weight) @ J.T
    scale = np.sqrt(np.diagonal(information))
    if not (scale > 0).all():
        return None
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    if values[0] < SINGULAR:
        return None
    return max(resampling.noise_scale(fitted), LEAST_NOISE) * (vectors / np.sqrt(values)) / scale[:, None]
