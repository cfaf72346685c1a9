"""What no choice of candidates can do: a bound on the budget by which a width is reached."""

import math
from dataclasses import dataclass

import numpy as np

from scaling.laws.answers.design.beliefs import Beliefs
from scaling.laws.answers.design.candidates import FREE, Candidates

PRICES = 24  # halvings of the price λ at which variance is bought
SWEEPS = 60
GAP = 1e-4  # of the target's variance: the directional derivatives left
ADDITIVE = 1e-9


@dataclass(frozen=True)
class Certificate:
    """What reaching a width takes.

    Attributes:
      width: that was asked for.
      budget: at which the proposal's own order reaches it; None where it does not.
      least: below which no choice of these candidates reaches it, each bought once at most; None where none does.
      gap: how far the bound's design is from the continuous optimum at the most, as a share of the variance: the sum
        of its positive directional derivatives.
      reason: in words.
    """

    width: float
    budget: float | None
    least: float | None
    gap: float
    reason: str


def least_budget(
    known: Beliefs, candidates: Candidates, width: float, asked: float, budget: float | None
) -> Certificate:
    """Bounds the budget of any choice from below.

    Let a candidate be bought n_i ∈ [0, 1] times over: its loss then has noise s_i²/n_i, and the target's variance V(n)
    is convex. At any n and any price λ, with φ_i = -∂V/∂n_i, every other design m has

        V(m) + λ C(m) ≥ V(n) + λ C(n) - Σ_i max over u ∈ [0, 1] of (φ_i - λ c_i)(u - n_i),

    so that one with V(m) ≤ V₀ costs (right-hand side - V₀)/λ at least. Where n is optimal the sum, of directional
    derivatives, is zero (Kiefer and Wolfowitz 1960, with costs and bounds). The bound is the highest over prices.

    Args:
      width: now; ``asked``: to be reached; ``budget``: at which the proposal's order reaches it.
    """
    cost = np.array([candidates.cost([i]) for i in range(len(candidates))])
    whole = float(candidates.cost(range(len(candidates))))
    shared = whole < cost.sum() * (1 - ADDITIVE)
    if not math.isfinite(width):
        return Certificate(asked, None, None, 0.0, "none: the interval has no end yet, and no ratio of widths has")
    if asked >= width:
        return Certificate(asked, 0.0, 0.0, 0.0, f"reached: the interval is {width:.3g} wide")
    start = known.variance(known.start)
    wanted = (start + known.rest) * (asked / width) ** 2 - known.rest
    S = known.start
    for i in range(len(cost)):
        S = known.bought(S, i)
    if wanted < known.variance(S):
        left = width * math.sqrt((known.variance(S) + known.rest) / (start + known.rest))
        why = f"none: all {len(cost)} candidates, {whole:.3g} {candidates.unit}, leave a width of {left:.3g}"
        return Certificate(asked, None, None, 0.0, why)
    if not whole:
        return Certificate(asked, budget, 0.0, 0.0, "every candidate is free")
    cost = np.maximum(cost, FREE * cost.max())
    least, gap = _bound(known, cost / cost.sum(), wanted)
    reason = "a bound for any choice of these candidates, each bought once at most"
    if shared:
        reason += "; for additive costs only: here runs share steps, and may cost less together"
    return Certificate(asked, budget, least * float(cost.sum()), gap / start, reason)


def _bound(known: Beliefs, cost: np.ndarray, wanted: float) -> tuple[float, float]:
    """(the highest bound over prices, the gap there)."""
    falls = known.falls(known.start)
    high = math.log(max((falls / cost).max(), 1e-300))
    low = high - 60.0
    n, best = np.zeros(len(cost)), (0.0, 0.0)
    for _ in range(PRICES):
        price = math.exp(0.5 * (low + high))
        n, V, gap = _design(known, cost, price, n)
        best = max(best, ((V + price * float(cost @ n) - gap - wanted) / price, gap))
        low, high = (low, 0.5 * (low + high)) if wanted < V else (0.5 * (low + high), high)
    return best


def _design(known: Beliefs, cost: np.ndarray, price: float, n: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(n, V, gap) that minimise V(n) + price C(n) over [0, 1]: coordinate by coordinate, each in closed form."""
    n = n.copy()
    information = np.eye(len(known.target)) + (known.rows.T * (n / known.noise)) @ known.rows
    S = np.linalg.inv(information)
    start = known.variance(known.start)
    for _ in range(SWEEPS):
        moved = known.rows @ S
        phi = (moved @ known.target) ** 2 / known.noise
        slack = phi - price * cost
        gap = float((np.maximum(slack, 0) * (1 - n) + np.maximum(-slack, 0) * n).sum())
        if gap <= GAP * start:
            break
        for i in np.flatnonzero(((slack > 0) & (n < 1)) | ((slack < 0) & (n > 0))).tolist():
            row = known.rows[i]
            h, u = row @ S @ row, row @ S @ known.target
            if h <= 0:
                continue
            # V(n_i + δ) = V - δ u²/(s² + δ h) falls at the price c_i λ where s² + δ h = |u| s/√(λ c_i).
            step = (abs(u) * math.sqrt(known.noise[i] / (price * cost[i])) - known.noise[i]) / h
            step = float(np.clip(step, -n[i], 1 - n[i]))
            if step:
                S = known.bought(S, i, step)
                n[i] += step
    return n, known.variance(S), gap
