"""Measures noise from run to run where cells are repeated with seeds: σ as a function of size, data and group."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling.laws.fitting.estimate import Fit, fit
from scaling.laws.forms.joint import INDICATOR
from scaling.laws.forms.law import Form
from scaling.laws.tables.observations import Observations

NOISES = ("constant", "measured")
# Scale of the half-Cauchy prior of τ, log σ² a standard deviation of log N or log D (its mode is no slope: Gelman 2006,
# §4.3). σ that grows fivefold over a grid has slopes of about .7. Linearised laws on 34 runs, 200 draws: .3, 1 → RMSE
# of a 1.008, 1.016 of the unweighted fit's with constant noise, .887, .876 with fivefold (known σ: .820).
PRIOR_SCALE = 0.5
NUM_SCALES = 9  # quantiles of that prior over which the posterior is averaged
MAX_ITERATIONS = 50
TOLERANCE = 1e-8
LEAST_FREE = 0.05  # of a residual's variance, that of a cell which the law goes through


@dataclass(frozen=True)
class RunNoise:
    """Noise of log loss from run to run: log σ² = level + Σ_k slope_k (log x_k - centre_k), for a row of mean weight.

    Attributes:
      slopes: of log σ² in the logarithm of each column; ``slope_sd`` their posterior standard deviations.
      log_range: least and largest log x_k seen; beyond them σ is that of the edge.
      pooled: σ as one number, from the repeats alone.
      num_cells: cells that are repeated, in ``num_runs`` runs, of Σ (n - 1) = ``dof`` degrees of freedom.
    """

    level: float
    slopes: dict[str, float]
    slope_sd: dict[str, float]
    centre: dict[str, float]
    log_range: dict[str, tuple[float, float]]
    pooled: float
    num_cells: int
    num_runs: int
    dof: int

    def variance(self, columns: Mapping[str, Any]) -> np.ndarray:
        """σ² of rows. A column that they lack, such as their group's, takes its centre."""
        log = np.float64(self.level)
        for name, slope in self.slopes.items():
            if name in columns:
                log = log + slope * (np.clip(np.log(columns[name]), *self.log_range[name]) - self.centre[name])
        return np.exp(log)

    def to_json(self, observations: Observations) -> dict[str, Any]:
        """The estimate, with the least and the largest σ of the rows."""
        sigma = np.sqrt(self.variance(observations.columns))
        return {**vars(self), "sigma": [float(sigma.min()), float(sigma.max())]}


def sentence(told: Mapping[str, Any]) -> str:
    """What ``RunNoise.to_json`` says, in words."""
    low, high = told["sigma"]
    return (
        f"run-to-run noise measured from {told['num_cells']} repeated cells, {told['num_runs']} runs "
        f"({told['dof']} degrees of freedom): σ of log loss {told['pooled']:.2g} pooled, {low:.2g} to {high:.2g} over "
        "the rows, with what the residuals tell of its slopes; fits weigh them by 1/σ²"
    )


def asked(
    noise: str, observations: Observations, forms: Iterable[Form], objective: Mapping[str, Any]
) -> tuple[RunNoise | None, list[str]]:
    """(the noise that these rows are to be weighed by, None where it is constant; what to tell the reader).

    The slopes are told by the first of ``forms`` that takes every row, too, fitted with constant noise under
    ``objective`` (options of ``fit``).

    Raises ValueError where ``noise`` is none of ``NOISES``, or is to be of log loss where a law's may be negative.
    """
    if noise not in NOISES:
        raise ValueError(f"noise is {noise!r}: write one of {', '.join(NOISES)}")
    if noise == "constant":
        return None, []
    forms, law = list(forms), None
    for form in forms:
        if form.signed:
            raise ValueError(f'noise is "measured", of log loss, and {form.name} may be negative: write "constant"')
    for form in forms:
        if len(form.columns) > 1 and law is None:
            with suppress(ValueError):  # the law's own fit will say why
                law = fit(observations, form, **objective)
    measured = measure(observations, law)
    if measured is None:
        return None, ["noise is to be measured, but no cell is repeated with another seed: it counts as constant"]
    return measured, [sentence(measured.to_json(observations))]


def weighed(observations: Observations, measured: RunNoise | None) -> Observations:
    """The rows with weights over σ², for what knows weights alone."""
    if measured is None:
        return observations
    return replace(observations, weight=observations.weight / measured.variance(observations.columns))


def cells_of(observations: Observations) -> np.ndarray:
    """Numbers rows by cell (n,): rows of one size, horizon, compute, unique tokens and group are repeats of a cell."""
    told = {"num_params", "num_tokens", "flops", "unique_tokens"}
    names = [c for c in observations.columns if c in told or c.startswith(INDICATOR)]
    if not names:
        return np.arange(len(observations))
    rows = np.stack([observations.columns[c] for c in names])
    return np.unique(rows, axis=1, return_inverse=True)[1].ravel()


def measure(observations: Observations, law: Fit | None = None) -> RunNoise | None:
    """Estimates σ(log N, log D, group) of log loss from cells with several runs; None where none has any that differ.

    The variance s_j² within cell j, d_j = n_j - 1 degrees of freedom, is σ_j² χ²_d / d: a gamma variable of shape d/2,
    with log σ_j² a level and slopes in the log columns (Smyth 1989, "Generalized linear models with varying
    dispersion"). Slopes, per standard deviation of their column, are N(0, τ²) with τ half-Cauchy; the estimate is the
    posterior's mean over τ, by Laplace's approximation at each. With few repeats it is one σ, the pooled one. Rows of
    weight w have σ²/w.

    Args:
      law: a fit to these rows with constant noise. The squares of its residuals, by cell and over 1 - leverage, tell of
        the slopes too; their level is their own, as what a law misses is no noise from run to run.
    """
    cell = cells_of(observations)
    count = np.bincount(cell)
    repeated = np.flatnonzero(count > 1)
    w = observations.weight / observations.weight.mean()
    heavy = np.bincount(cell, w)
    y = np.log(observations.loss)
    square = np.bincount(cell, w * (y - (np.bincount(cell, w * y) / heavy)[cell]) ** 2)[repeated]
    dof = count[repeated] - 1
    # Copies of a row differ by nothing, or by the last digit.
    if not len(repeated) or square.sum() <= 1e-24 * dof.sum():
        return None
    first = np.unique(cell, return_index=True)[1]
    logs = {c: np.log(observations.columns[c]) for c in observations.columns if _explains(c)}
    logs = {c: x for c, x in logs.items() if np.ptp(x if law is not None else x[first[repeated]]) > 1e-9}
    spread = {c: float(x.std()) for c, x in logs.items()}
    centre = {c: float(np.average(x[first[repeated]], weights=dof)) for c, x in logs.items()}
    slopes = np.array([(x[first] - centre[c]) / spread[c] for c, x in logs.items()]).reshape(len(logs), len(first)).T
    variance, freedom, levels = square / dof, dof.astype(float), np.ones((len(repeated), 1))
    rows = slopes[repeated]
    if law is not None:
        residual, free = _residuals(law, cell)
        variance, freedom = np.concatenate([variance, residual]), np.concatenate([freedom, free])
        levels = np.eye(2).repeat([len(repeated), len(residual)], axis=0)
        rows = np.concatenate([rows, slopes])
    mean, covariance = _posterior(levels, rows, variance, freedom)
    sd = np.sqrt(np.diagonal(covariance))[levels.shape[1] :]
    seen = {c: x if law is not None else x[first[repeated]] for c, x in logs.items()}
    return RunNoise(
        level=float(mean[0]),
        slopes={c: float(b / spread[c]) for c, b in zip(logs, mean[levels.shape[1] :])},
        slope_sd={c: float(s / spread[c]) for c, s in zip(logs, sd)},
        centre=centre,
        log_range={c: (float(x.min()), float(x.max())) for c, x in seen.items()},
        pooled=float(np.sqrt(square.sum() / dof.sum())),
        num_cells=len(repeated),
        num_runs=int(count[repeated].sum()),
        dof=int(dof.sum()),
    )


def _explains(column: str) -> bool:
    return column in ("num_params", "num_tokens") or column.startswith(INDICATOR)


def _residuals(law: Fit, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(r² / (1 - h), 1 - h) of each cell: r √Σw times its mean residual, h its leverage."""
    w = law.observations.weight
    heavy = np.bincount(cell, w)
    r = np.bincount(cell, w * law.residuals) / np.sqrt(heavy)
    J = law.problem.model.derivatives(law.theta[None])[1][0] * np.sqrt(w)
    left, values, _ = np.linalg.svd(J.T, full_matrices=False)
    basis = left[:, values > 1e-12 * values[0]]
    # A cell's rows have one slope: its leverage is the sum of theirs.
    free = np.maximum(1.0 - np.bincount(cell, (basis**2).sum(axis=1)), LEAST_FREE)
    return r**2 / free, free


def _posterior(
    levels: np.ndarray, slopes: np.ndarray, variance: np.ndarray, dof: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (levels, slopes), τ averaged over its prior; ``levels`` (J, M), ``slopes`` (J, K)."""
    X, M = np.concatenate([levels, slopes], axis=1), levels.shape[1]
    u = (np.arange(NUM_SCALES) + 0.5) / NUM_SCALES
    scales = PRIOR_SCALE * np.tan(0.5 * np.pi * u) if slopes.shape[1] else np.ones(1)
    start = np.zeros(X.shape[1])
    for k in range(M):
        here = levels[:, k] > 0
        start[k] = np.log(np.average(variance[here], weights=dof[here]) + 1e-30)
    found = []
    for tau in scales:
        found.append(_mode(X, M, variance, dof, tau, start))
        start = found[-1][0]
    evidence = np.array([log for *_, log in found])
    weight = np.exp(evidence - evidence.max())
    weight /= weight.sum()
    modes = np.stack([beta for beta, *_ in found])
    mean = weight @ modes
    within = np.einsum("g,gpq->pq", weight, np.stack([covariance for _, covariance, _ in found]))
    return mean, within + (modes - mean).T @ ((modes - mean) * weight[:, None])


def _mode(
    X: np.ndarray, num_levels: int, variance: np.ndarray, dof: np.ndarray, tau: float, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """(β, its covariance, log evidence) at one τ: Newton's method on Σ d/2 (η + s² e^-η) + |slopes|²/(2τ²), convex."""
    penalty = np.full(X.shape[1], tau**-2.0)
    penalty[:num_levels] = 0.0

    def objective(beta: np.ndarray) -> float:
        eta = X @ beta
        with np.errstate(over="ignore"):
            return float((0.5 * dof * (eta + variance * np.exp(-eta))).sum() + 0.5 * (penalty * beta**2).sum())

    beta, now = start, objective(start)
    for _ in range(MAX_ITERATIONS):
        ratio = variance * np.exp(-(X @ beta))
        gradient = X.T @ (0.5 * dof * (1 - ratio)) + penalty * beta
        curvature = (X.T * (0.5 * dof * ratio)) @ X + np.diag(penalty)
        step = np.linalg.lstsq(curvature, gradient, rcond=1e-14)[0]
        size = 1.0
        while (next_ := objective(beta - size * step)) > now and size > 1e-6:
            size *= 0.5
        beta, now = beta - size * step, next_
        if np.abs(step).max() < TOLERANCE:
            break
    information = (X.T * (0.5 * dof)) @ X + np.diag(penalty)
    evidence = -now - (X.shape[1] - num_levels) * np.log(tau) - 0.5 * np.linalg.slogdet(information)[1]
    return beta, np.linalg.inv(information), float(evidence)
