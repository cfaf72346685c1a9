"""The compute-optimal allocation: N*(C), D*(C) under the FLOP rule that the records themselves follow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from scaling.laws.forms import Form

# Within this share of 6 N D the closed form holds.
SIX_ND_TOLERANCE = 1e-3
BISECTIONS = 80


@dataclass(frozen=True)
class Cost:
    """FLOPs per token as a function of size: c(N) = 6 N (1 + (N0/N)^γ)^±1.

    Small models pay for a head and for attention that 6 N leaves out; their share falls with size. ``sign`` 0 is
    c(N) = factor · 6 N exactly. ``max_error`` is the largest relative error over the rows the cost was taken from.
    """

    sign: int = 0
    scale: float = 1.0  # N0, parameters
    gamma: float = 1.0
    factor: float = 1.0
    max_error: float = 0.0

    @property
    def is_6nd(self) -> bool:
        return self.sign == 0 and abs(self.factor - 1) <= SIX_ND_TOLERANCE

    def flops_per_token(self, num_params: np.ndarray) -> np.ndarray:
        N = np.asarray(num_params, dtype=np.float64)
        base = 6.0 * self.factor * N
        return base if self.sign == 0 else base * (1.0 + (self.scale / N) ** self.gamma) ** self.sign

    def elasticity(self, num_params: np.ndarray) -> np.ndarray:
        """d log c / d log N."""
        if self.sign == 0:
            return np.ones_like(np.asarray(num_params, dtype=np.float64))
        ratio = (self.scale / num_params) ** self.gamma
        return 1.0 - self.sign * self.gamma * ratio / (1.0 + ratio)

    def describe(self) -> str:
        if self.sign == 0:
            return "C = 6 N D" if self.is_6nd else f"C = {6 * self.factor:.4g} N D"
        power = "" if self.sign > 0 else "^-1"
        return f"C = 6 N D (1 + ({self.scale:.4g}/N)^{self.gamma:.4g}){power}"


def cost_of(num_params: np.ndarray, num_tokens: np.ndarray, flops: np.ndarray) -> Cost:
    """The cost function of rows that give all three."""
    ratio = flops / (6.0 * num_params * num_tokens)
    extra = ratio - 1.0
    if np.abs(extra).max() <= SIX_ND_TOLERANCE:
        return Cost(max_error=float(np.abs(extra).max()))
    z = np.log(num_params)
    sign = 1 if (extra > 0).all() else -1 if (extra < 0).all() else 0
    if sign and np.ptp(z) > 0:
        share = np.log(extra if sign > 0 else 1.0 / ratio - 1.0)
        slope, intercept = np.polyfit(z - z.mean(), share, 1)
        if slope < -1e-3:
            gamma = -float(slope)
            scale = float(np.exp(intercept / gamma + z.mean()))
            fitted = Cost(sign, scale, gamma)
            return _with_error(fitted, num_params, num_tokens, flops)
    return _with_error(Cost(factor=float(np.exp(np.mean(np.log(ratio))))), num_params, num_tokens, flops)


def _with_error(cost: Cost, num_params, num_tokens, flops) -> Cost:
    error = np.abs(cost.flops_per_token(num_params) * num_tokens / flops - 1.0).max()
    return Cost(cost.sign, cost.scale, cost.gamma, cost.factor, float(error))


def optimal_num_params(form: Form, params: Mapping[str, np.ndarray], flops: np.ndarray, cost: Cost) -> np.ndarray:
    """N*(C) = argmin_N L(N, C / c(N)).

    For L = E + A N^-α + B D^-β with C = k N D: N* = (αA/βB)^(1/(α+β)) (C/k)^(β/(α+β)) (Hoffmann et al. 2022, eq. 4).
    Else the root of dL/dlog N, or for other forms the minimum, over sixteen decades around C's own scale.

    Args:
      params: numbers, or arrays (B,) of draws.
      flops: (m,).

    Returns:
      (m,) for numbers, (B, m) for draws; an optimum outside the sixteen decades is returned as their end.
    """
    C = np.asarray(flops, dtype=np.float64)
    batch = np.ndim(next(iter(params.values()))) > 0
    p = {name: np.atleast_1d(np.asarray(v, dtype=np.float64))[:, None] for name, v in params.items()}
    lower, upper = np.sqrt(C) * 1e-8, np.sqrt(C) * 1e8
    if form.name in ("chinchilla", "chinchilla_tied"):
        alpha, beta = p["alpha"], p.get("beta", p["alpha"])
        log_ratio = np.log(alpha * p["A"]) - np.log(beta * p["B"])
        if cost.sign == 0:
            log_n = (log_ratio + beta * np.log(C / (6.0 * cost.factor))) / (alpha + beta)
        else:
            log_n = _root(log_ratio, alpha, beta, np.log(C), cost, np.log(lower), np.log(upper))
    else:
        log_n = _minimum(form, p, C, cost, np.log(lower), np.log(upper))
    out = np.exp(np.clip(log_n, np.log(lower), np.log(upper)))
    return out if batch else out[0]


def _root(log_ratio, alpha, beta, log_c, cost, lower, upper):
    """The root of β B D^-β dlog c/dlog N - α A N^-α, which rises with N: Newton's steps in log N, kept in a bracket."""
    shape = np.broadcast_shapes(log_ratio.shape, log_c.shape)
    lo, hi = np.broadcast_to(lower, shape).copy(), np.broadcast_to(upper, shape).copy()
    x = np.clip((log_ratio + beta * (log_c - np.log(6.0 * cost.factor))) / (alpha + beta), lo, hi)
    for _ in range(BISECTIONS):
        n = np.exp(x)
        log_d = log_c - np.log(cost.flops_per_token(n))
        elasticity = np.maximum(cost.elasticity(n), 1e-300)
        value = -beta * log_d + np.log(elasticity) - log_ratio + alpha * x
        lo, hi = np.where(value > 0, lo, x), np.where(value > 0, x, hi)
        step = x - value / (alpha + beta * elasticity)
        new = np.where((step > lo) & (step < hi), step, 0.5 * (lo + hi))
        done = np.abs(new - x).max() < 1e-13 * np.abs(x).max()
        x = new
        if done:
            break
    return x


def _minimum(form, params, C, cost, lower, upper):
    """A coarse grid in log N, then golden section around its best point."""
    batch = len(next(iter(params.values())))
    lo, hi = (np.broadcast_to(x, (batch, len(C))).astype(float) for x in (lower, upper))

    def loss(log_n):
        n = np.exp(log_n)
        with np.errstate(all="ignore"):
            value = form.predict(params, num_params=n, num_tokens=C / cost.flops_per_token(n))
        return np.where(np.isfinite(value), value, np.inf)

    grid = np.linspace(0.0, 1.0, 257)
    values = np.stack([loss(lo + g * (hi - lo)) for g in grid])
    best = values.argmin(axis=0)
    step = (hi - lo) / (len(grid) - 1)
    left, right = lo + np.maximum(best - 1, 0) * step, lo + np.minimum(best + 1, len(grid) - 1) * step
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    for _ in range(BISECTIONS):
        c, d = right - golden * (right - left), left + golden * (right - left)
        smaller = loss(c) < loss(d)
        left, right = np.where(smaller, left, c), np.where(smaller, d, right)
    return 0.5 * (left + right)


def exponents(form: Form, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """(a, b) of N* ∝ C^a, D* ∝ C^b where the cost is proportional to N D: a = β/(α+β), b = α/(α+β).

    None for forms that have no such exponents.
    """
    if form.name not in ("chinchilla", "chinchilla_tied"):
        return None
    alpha = np.asarray(params["alpha"])
    beta = np.asarray(params.get("beta", alpha))
    return beta / (alpha + beta), alpha / (alpha + beta)


def quantities(
    form: Form, flops: tuple[float, float], cost: Cost
) -> dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]]:
    """What a law of N and D implies, each a function of its parameters, arrays (B,), to an array (B,).

    Exponents ``a``, ``b`` where the form has them; ``a_local``, the mean slope of log N*(C) over the range ``flops``
    where that is one; at its upper end the optimum's ``num_params``, ``num_tokens``, ``tokens_per_param``, ``loss``.
    """
    low, high = map(float, flops)

    def optimum(p, *at):
        return optimal_num_params(form, {k: np.atleast_1d(v) for k, v in p.items()}, np.array(at), cost)

    def slope(p):
        n = np.log(optimum(p, low, high))
        return ((n[:, 1] - n[:, 0]) / np.log(high / low)).clip(1e-12)

    def num_params(p):
        return optimum(p, high)[:, 0]

    def num_tokens(p):
        return high / cost.flops_per_token(num_params(p))

    def ratio(p):
        return num_tokens(p) / num_params(p)

    def loss(p):
        n = num_params(p)
        return form.predict(p, num_params=n, num_tokens=high / cost.flops_per_token(n))

    found = {"num_params": num_params, "num_tokens": num_tokens, "tokens_per_param": ratio, "loss": loss}
    if high > 1.1 * low:
        found = {"a_local": slope} | found
    if form.name in ("chinchilla", "chinchilla_tied"):
        found = {"a": lambda p: exponents(form, p)[0], "b": lambda p: exponents(form, p)[1]} | found
    return found
