"""Starts and scale for a redescending loss, from which a fifth of the runs or more may lie anywhere.

A bisquare has an optimum on every cluster of residuals, and Huber's own optimum breaks down where several runs pull
one way at the end of a range. So beside Huber's optimum stand those of least trimmed squares (Rousseeuw and van
Driessen 2006): fits to random few rows, refitted to the half of the rows nearest them until they settle.
"""

from dataclasses import replace

import numpy as np

from scaling.laws.fitting.solver import Objective, Problem, solve

SUBSETS = 48
CONCENTRATIONS = 6
KEPT = 8
ITERATIONS = 40
MAD_TO_SIGMA = 1 / 0.6744897501960817


def trimmed_starts(problem: Problem, optimum: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Refits to the better half of the rows from many beginnings: (θ (B, P), scale of the residuals of the best).

    Args:
      optimum: θ of the Huber optimum, (P,): the first of the starts returned.
      weights: of the rows, (n,).

    The scale is the median |residual| as a Gaussian's σ, of the fit where the nearest half of the rows lies nearest.
    """
    n, P = len(problem.target), len(optimum)
    squared = replace(problem, objective=Objective("squared"))
    rng = np.random.default_rng(0)
    chosen = np.zeros((SUBSETS, n))
    few = min(n, P + 2)
    for row in chosen:
        row[rng.choice(n, few, replace=False)] = 1.0
    half = min(n, (n + P + 1) // 2)
    begun = solve(squared, np.tile(optimum, (SUBSETS, 1)), chosen * weights, ITERATIONS)
    theta = np.concatenate([optimum[None], begun.theta])
    for _ in range(CONCENTRATIONS):
        nearest = _nearest(problem, theta, half)
        theta = solve(squared, theta, nearest * weights, ITERATIONS).theta
    residual = np.sort(np.abs(_residuals(problem, theta)), axis=1)
    trimmed = (residual[:, :half] ** 2).sum(axis=1)
    order = np.argsort(trimmed)
    # P residuals of a close fit to few rows are small by construction: as for the scale of an L1 fit, leave them out.
    best = residual[order[0]][min(P, n - 2) :]
    scale = max(float(np.median(best)) * MAD_TO_SIGMA, 1e-9)
    return np.concatenate([optimum[None], theta[order[:KEPT]]]), scale


def _residuals(problem: Problem, theta: np.ndarray) -> np.ndarray:
    residual = problem.model.value(theta) - problem.target
    return np.where(np.isfinite(residual), residual, 1e3)


def _nearest(problem: Problem, theta: np.ndarray, half: int) -> np.ndarray:
    rank = np.abs(_residuals(problem, theta)).argsort(axis=1).argsort(axis=1)
    return (rank < half).astype(np.float64)
