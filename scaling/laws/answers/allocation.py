"""The compute-optimal allocation: N*(C), D*(C) under the FLOP rule that the records themselves follow."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scaling.laws.forms.catalogue import FORMS, Form
from scaling.laws.forms.law import Params

# Within this share of 6 N D the closed form holds.
SIX_ND_TOLERANCE = 1e-3
# C/(6ND) outside these is no FLOP count of N parameters and D tokens: a unit is another one.
PLAUSIBLE_RATIO = (0.03, 30.0)
# A cost that misses a row by more than the first is said; one that misses half the rows by the second is not used.
SAID_ERROR, ABSURD_ERROR = 0.10, 0.50
ITERATIONS = 80
# A search goes this many decades to either side of where the data lie, in steps of a tenth.
DECADES, STEP = 12.0, 0.1
# An optimum whose tokens per parameter are this many times outside the rows' is said to be extrapolated.
FAR = 10.0
# A dip in the loss that is shallower than this, relative to it, is rounding.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Cost:
    """FLOPs per token as a function of size: c(N) = f 6 N (1 + (N0/N)^γ)^±1.

    Small models pay for a head and for attention that 6 N leaves out; their share falls with size. ``sign`` 0 is
    c(N) = f 6 N exactly. Of the rows that the cost was taken from, ``max_error`` is the largest relative error and
    ``typical_error`` the median one, ``ratio`` the geometric mean of C/(6ND), and ``tokens_per_param`` the range of
    D/N, where a search for an optimum looks first.
    """

    sign: int = 0
    scale: float = 1.0  # N0, parameters
    gamma: float = 1.0
    factor: float = 1.0  # f
    max_error: float = 0.0
    typical_error: float = 0.0
    ratio: float = 1.0
    tokens_per_param: tuple[float, float] | None = None

    @property
    def is_6nd(self) -> bool:
        return self.sign == 0 and abs(self.factor - 1) <= SIX_ND_TOLERANCE

    @property
    def problem(self) -> str | None:
        """Why no allocation can be made under this cost, in words; None where one can."""
        low, high = PLAUSIBLE_RATIO
        if not low <= self.ratio <= high:
            return (
                f"C/(6ND) is {self.ratio:.2g} ({low:g} to {high:g} is plausible): write C in FLOPs, N in parameters "
                "and D in tokens"
            )
        if self.typical_error > ABSURD_ERROR:
            return (
                f"C is no function of N times D: {self.describe()} misses half of the rows by more than "
                f"{self.typical_error:.0%}; check the column flops"
            )
        return None

    def log_flops_per_token(self, log_n: np.ndarray) -> np.ndarray:
        """log c at log N, without overflow at any size."""
        out = np.log(6.0 * self.factor) + log_n
        if self.sign == 0:
            return out
        with np.errstate(invalid="ignore"):
            out = out + self.sign * np.logaddexp(0.0, self.gamma * (np.log(self.scale) - log_n))
        return np.where(np.isneginf(log_n), -np.inf, out)

    def flops_per_token(self, num_params: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.exp(self.log_flops_per_token(np.log(np.asarray(num_params, dtype=np.float64))))

    def elasticity(self, num_params: np.ndarray) -> np.ndarray:
        """d log c / d log N."""
        return 1.0 - self.sign * self.gamma * self.head_share(num_params)

    def head_share(self, num_params: np.ndarray) -> np.ndarray:
        """(s/N)^γ / (1 + (s/N)^γ): at N = s half."""
        N = np.asarray(num_params, dtype=np.float64)
        if self.sign == 0:
            return np.zeros_like(N)
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + (N / self.scale) ** self.gamma)

    def describe(self) -> str:
        lead = 6 * self.factor
        if self.sign == 0:
            return "C = 6 N D" if self.is_6nd else f"C = {lead:.4g} N D"
        power = "" if self.sign > 0 else "^-1"
        return f"C = {lead:.4g} N D (1 + ({self.scale:.4g}/N)^{self.gamma:.4g}){power}"


def cost_of(num_params: np.ndarray, num_tokens: np.ndarray, flops: np.ndarray) -> Cost:
    """The cost function of rows that give all three: 6 N D, or of f 6 N D and a head's share the nearer."""
    with np.errstate(over="ignore"):
        ratio = np.exp(np.log(flops) - np.log(6.0) - np.log(num_params) - np.log(num_tokens))
    mean = float(np.exp(np.mean(np.log(ratio))))
    spread = num_tokens / num_params
    known: dict[str, Any] = {"ratio": mean, "tokens_per_param": (float(spread.min()), float(spread.max()))}
    extra = ratio - 1.0
    if np.abs(extra).max() <= SIX_ND_TOLERANCE:
        return _with_error(Cost(**known), num_params, ratio)
    found = [_with_error(Cost(factor=mean, **known), num_params, ratio)]
    z = np.log(num_params)
    sign = 1 if (extra > 0).all() else -1 if (extra < 0).all() else 0
    if sign and np.ptp(z) > 0:
        share = np.log(extra if sign > 0 else 1.0 / ratio - 1.0)
        slope, intercept = np.polyfit(z - z.mean(), share, 1)
        if slope < -1e-3:
            gamma = -float(slope)
            scale = float(np.exp(intercept / gamma + z.mean()))
            found.append(_with_error(Cost(sign, scale, gamma, **known), num_params, ratio))
    return min(found, key=lambda cost: cost.max_error)


def _with_error(cost: Cost, num_params: np.ndarray, ratio: np.ndarray) -> Cost:
    error = np.abs(cost.flops_per_token(num_params) / (6.0 * num_params * ratio) - 1.0)
    return replace(cost, max_error=float(error.max()), typical_error=float(np.median(error)))


def optimal_num_params(form: Form, params: Params, flops: np.ndarray, cost: Cost) -> np.ndarray:
    """Finds N*(C) = argmin_N L(N, C / c(N)).

    For L = E + A N^-α + B D^-β with C = k N D: N* = (αA/βB)^(1/(α+β)) (C/k)^(β/(α+β)) (Hoffmann et al. 2022, eq. 4),
    wherever that lies. Under another cost the root of dL/dlog N. For other forms a local minimum of the loss at equal
    compute: the lowest among the rows' own tokens per parameter (``Cost.tokens_per_param``), else the nearest to them.

    Args:
      params: numbers, or arrays (B,) of draws.
      flops: (m,); for draws of a law of two powers also (B, m).

    Returns:
      (m,) for numbers, (B, m) for draws. Where there is no minimum, what the loss falls towards: inf (ever more
      parameters), 0 (ever more tokens), or NaN where the law has no value; ``no_optimum`` says it in words.
    """
    C = np.asarray(flops, dtype=np.float64)
    batch = np.ndim(next(iter(params.values()))) > 0
    p = {name: np.atleast_1d(np.asarray(v, dtype=np.float64))[:, None] for name, v in params.items()}
    terms, exponents_of_one = _two_powers(form, p), _one_power(form, p)
    if terms is not None:
        log_n = _balance(*terms, np.log(C), cost)
    elif exponents_of_one is not None:
        a, b = exponents_of_one
        log_n = np.select([a > b, a < b], [np.inf, -np.inf], np.nan) + 0.0 * C
    else:
        log_n = _minimum(form, p, C, cost)
    with np.errstate(over="ignore"):
        out = np.exp(log_n)
    return out if batch else out[0]


def found(num_params: np.ndarray) -> np.ndarray:
    """Where ``optimal_num_params`` found an optimum."""
    return np.isfinite(num_params) & (np.asarray(num_params) > 0)


def no_optimum(form: Form, num_params: np.ndarray, flops: np.ndarray) -> str | None:
    """Why there is no optimum at some of these C, in words; None where there is one at each."""
    missing = ~found(num_params)
    if not missing.any():
        return None
    n = np.asarray(num_params)[missing]
    if np.isinf(n).all():
        why = "the loss falls all the way towards more parameters on fewer tokens"
    elif (n == 0).all():
        why = "the loss falls all the way towards fewer parameters on more tokens"
    else:
        why = "the loss has no lowest point"
    C = np.asarray(flops)[missing]
    where = "" if missing.all() else f" from {C.min():.3g} to {C.max():.3g} FLOPs"
    return f"{form.name} has no interior optimum{where}: at equal compute {why}"


def far_from_rows(form: Form, num_params: np.ndarray, flops: np.ndarray, cost: Cost) -> str | None:
    """Where an optimum's tokens per parameter are more than ten times outside the rows' own, in words; else None."""
    if cost.tokens_per_param is None:
        return None
    low, high = cost.tokens_per_param
    for n, C in zip(num_params, flops):
        with np.errstate(over="ignore", divide="ignore"):  # an optimum of next to no parameters: infinitely far
            ratio = C / cost.flops_per_token(n) / n
        if not low / FAR <= ratio <= high * FAR:
            return (
                f"{form.name}: the optimum at {C:.3g} FLOPs has {ratio:.3g} tokens per parameter, the rows {low:.3g} "
                f"to {high:.3g}: it is extrapolated"
            )
    return None


def _original(form: Form) -> tuple[Form, dict[str, float]]:
    """A form of the catalogue behind this one, and what ``Form.fix`` holds of it."""
    known = FORMS.get(form.name)
    function = form.function
    if known is not None and isinstance(function, functools.partial) and function.func is known.function:
        return known, function.keywords
    return form, {}


def powers(form: Form, params: Params) -> list[tuple[np.ndarray, dict[str, np.ndarray]]] | None:
    """(log amplitude, {column: exponent}) of each term of a sum of powers, (B, 1) like ``params``; None for other
    forms."""
    form, held = _original(form)
    if form.powers is None:
        return None
    p = {**{k: np.atleast_1d(np.float64(v))[:, None] for k, v in held.items()}, **params}

    def value(reference: str | float) -> np.ndarray:
        if not isinstance(reference, str):
            return np.full((1, 1), float(reference))
        return -p[reference[1:]] if reference.startswith("-") else p[reference]

    out = []
    for name, columns in form.powers.terms:
        declared = form.parameters[name]
        with np.errstate(divide="ignore"):
            log = np.log(p[name])
        if declared.kind == "critical":  # (x_c/x)^α
            log = log * value(declared.of[0][0])
        out.append((log, {c: value(e) for c, e in columns.items()}))
    return out


def join_of(form: Form, params: Params) -> np.ndarray:
    """γ of a law that joins its powers (``PowerSum``), (B, 1) like ``params``; 1 of one that adds them."""
    original, held = _original(form)
    name = None if original.powers is None else original.powers.join
    if name is None:
        return np.ones((1, 1))
    return np.full((1, 1), held[name]) if name in held else params[name]


def floor_of(form: Form, params: Params) -> np.ndarray:
    """E of a sum of powers, shaped like ``params``; 0 of one without a floor."""
    return _of_powers(form, params, "offset", 0.0)


def ceiling_of(form: Form, params: Params) -> np.ndarray:
    """L_0 of a sum of powers that stays below one (``PowerSum``), shaped like ``params``; inf of one without."""
    return _of_powers(form, params, "ceiling", np.inf)


def _of_powers(form: Form, params: Params, role: str, absent: float) -> np.ndarray:
    """The parameter that has a ``role`` in a sum of powers, or is held there; ``absent`` where none has."""
    original, held = _original(form)
    name, some = getattr(original.powers, role), next(iter(params.values()))
    if name is None:
        return np.full(np.shape(some), absent)
    return params[name] if name in params else np.full(np.shape(some), held[name])


def _powers_of_both(form: Form, params: Params) -> list[tuple[np.ndarray, dict[str, np.ndarray]]] | None:
    """``powers`` of a law of N and D; None for others."""
    return powers(form, params) if set(form.columns) == {"num_params", "num_tokens"} else None


def _two_powers(form: Form, params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """(log A, α, log B, β), each (B, 1), of a law that rises with A N^-α + B D^-β alone; None for other forms."""
    original, held = _original(form)
    if original is FORMS["kaplan_joint"] or original.function is FORMS["kaplan_joint"].function:
        p = {**held, **params}
        alpha = np.broadcast_to(p["alpha_N"] / p["alpha_D"], next(iter(params.values())).shape)
        return alpha * np.log(p["N_c"]), alpha, np.log(p["D_c"]), np.ones_like(alpha)
    terms = _powers_of_both(form, params)
    if terms is None or len(terms) != 2:
        return None
    by_column = {next(iter(columns)): (log, columns) for log, columns in terms if len(columns) == 1}
    if set(by_column) != {"num_params", "num_tokens"}:
        return None
    (log_a, of_n), (log_b, of_d) = by_column["num_params"], by_column["num_tokens"]
    alpha, beta = of_n["num_params"], of_d["num_tokens"]
    if not ((alpha > 0).all() and (beta > 0).all()):
        return None
    gamma = join_of(form, params)  # under it the terms' own powers 1/γ are what is added up
    return log_a / gamma, alpha / gamma, log_b / gamma, beta / gamma


def has_two_powers(form: Form) -> bool:
    """Whether a law is an offset and one power of N and one of D, so that ``at_best`` can turn it around."""
    terms = _powers_of_both(form, {k: np.ones((1, 1)) for k in form.parameters})
    return terms is not None and sorted(map(list, (of for _, of in terms))) == [["num_params"], ["num_tokens"]]


def _one_power(form: Form, params: Params) -> tuple[np.ndarray, np.ndarray] | None:
    """(a, b), each (B, 1), of a law that is K N^-a D^-b beside an offset: at equal compute it has no minimum."""
    terms = _powers_of_both(form, params)
    if terms is None or len(terms) != 1:
        return None
    zero = np.zeros((1, 1))
    return terms[0][1].get("num_params", zero), terms[0][1].get("num_tokens", zero)


def _balance(
    log_a: np.ndarray, alpha: np.ndarray, log_b: np.ndarray, beta: np.ndarray, log_c: np.ndarray, cost: Cost
) -> np.ndarray:
    """log N where α A N^-α = β B D^-β dlog c/dlog N: in closed form, or by Newton's steps kept in a bracket."""
    log_ratio = np.log(alpha) + log_a - np.log(beta) - log_b
    closed = (log_ratio + beta * (log_c - np.log(6.0 * cost.factor))) / (alpha + beta)
    if cost.sign == 0:
        return closed

    def value(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The balance at log N = x, and its slope."""
        share = cost.head_share(np.exp(x))
        elasticity = 1.0 - cost.sign * cost.gamma * share
        bend = cost.sign * cost.gamma**2 * share * (1.0 - share)
        rise = alpha * x - beta * (log_c - cost.log_flops_per_token(x)) + np.log(elasticity) - log_ratio
        possible = elasticity > 0  # elsewhere fewer parameters cost more: the optimum has more of them
        return np.where(possible, rise, -np.inf), np.where(possible, alpha + beta * elasticity + bend / elasticity, 1.0)

    with np.errstate(all="ignore"):
        x, step = closed, closed
        for _ in range(ITERATIONS):  # Newton's steps from the closed form nearly always arrive by themselves
            rise, slope = value(x)
            step = rise / slope
            x = x - step
            if not (np.abs(step) >= 1e-13 * np.maximum(np.abs(x), 1.0)).any():
                break
        astray = np.isfinite(closed) & ~((np.abs(step) <= 1e-9) & (slope > 0))
        if astray.any():
            lo, hi = _bracket(lambda x: value(x)[0], closed)
            for _ in range(ITERATIONS):
                middle = 0.5 * (lo + hi)
                below = value(middle)[0] <= 0
                lo, hi = np.where(below, middle, lo), np.where(below, hi, middle)
            x = np.where(astray, 0.5 * (lo + hi), x)
    return np.where(np.isfinite(closed), x, closed)


def _bracket(rise: Callable[..., Any], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends around x, pushed out until a rising function is negative at the lower and positive at the upper."""
    lo, hi, width = x - 1.0, x + 1.0, 1.0
    for _ in range(12):
        below, above = rise(lo) > 0, rise(hi) <= 0
        if not (below.any() or above.any()):
            break
        width *= 2.0
        lo, hi = np.where(below, lo - width, lo), np.where(above, hi + width, hi)
    return lo, hi


def _minimum(form: Form, params: Params, C: np.ndarray, cost: Cost) -> np.ndarray:
    """log N of a local minimum on a coarse grid, refined by golden section; ∓inf where the loss falls to an end."""
    low, high = cost.tokens_per_param or (1.0, 1.0)
    # At D/N = r, C = 6 f r N²: the grid's middle moves with the units of N, D and C as the answer does.
    middle = 0.5 * (np.log(C) - np.log(6.0 * cost.factor) - 0.5 * (np.log(low) + np.log(high)))
    reach = np.log(10.0) * (DECADES + np.ceil(0.25 * np.log10(high / low)))
    step = np.log(10.0) * STEP
    offsets = np.arange(-np.ceil(reach / step), np.ceil(reach / step) + 1) * step

    def loss(log_n: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            tokens = np.exp(np.log(C) - cost.log_flops_per_token(log_n))
            value = form.predict(params, num_params=np.exp(log_n), num_tokens=tokens)
        return np.where(np.isfinite(value), value, np.inf)

    shape = (len(next(iter(params.values()))), len(C))
    values = np.stack([np.broadcast_to(loss(middle + o), shape) for o in offsets])
    dip = np.zeros(values.shape, dtype=bool)
    centre, depth = values[2:-2], ROUNDING * np.abs(values[2:-2])
    with np.errstate(invalid="ignore"):  # inf - inf: no dip there
        near = (centre <= values[1:-3]) & (centre <= values[3:-1])
        dip[2:-2] = near & (values[:-4] - centre > depth) & (values[4:] - centre > depth)
    chosen = _nearest(dip, values, offsets, middle, C, cost) if dip.any() else values.argmin(axis=0)
    x = middle + offsets[chosen]
    left, right = x - step, x + step
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    for _ in range(ITERATIONS):
        c, d = right - golden * (right - left), left + golden * (right - left)
        smaller = loss(c) < loss(d)
        left, right = np.where(smaller, left, c), np.where(smaller, d, right)
    ends = np.where(values[-1] < values[0], np.inf, np.where(values[0] < values[-1], -np.inf, np.nan))
    return np.where(dip.any(axis=0), 0.5 * (left + right), ends)


def _nearest(
    dip: np.ndarray, values: np.ndarray, offsets: np.ndarray, middle: np.ndarray, C: np.ndarray, cost: Cost
) -> np.ndarray:
    """Which dip along the grid (axis 0): the lowest within the rows' tokens per parameter, else the nearest to them."""
    log_n = middle + offsets[:, None]
    if cost.tokens_per_param is None:
        away = np.zeros_like(log_n)
    else:
        low, high = np.log(cost.tokens_per_param)
        log_m = np.log(C) - cost.log_flops_per_token(log_n) - log_n
        away = np.maximum(np.maximum(low - log_m, log_m - high), 0.0)
    away = np.where(dip, away[:, None, :], np.inf)
    return np.where(dip & (away <= away.min(axis=0) + 1e-9), values, np.inf).argmin(axis=0)


def exponents(form: Form, params: Params) -> tuple[np.ndarray, np.ndarray] | None:
    """(a, b) of N* ∝ C^a, D* ∝ C^b where the cost is proportional to N D: a = β/(α+β), b = α/(α+β).

    None for forms that have no such exponents.
    """
    shape = np.shape(next(iter(params.values())))
    terms = _two_powers(form, {k: np.atleast_1d(np.asarray(v, dtype=np.float64))[:, None] for k, v in params.items()})
    if terms is None:
        return None
    alpha, beta = (np.broadcast_to(terms[i][:, 0], shape or (1,)).reshape(shape) for i in (1, 3))
    return beta / (alpha + beta), alpha / (alpha + beta)


def quantities(form: Form, flops: tuple[float, float], cost: Cost) -> dict[str, Callable[[Params], np.ndarray]]:
    """What a law of N and D implies, each a function of its parameters, arrays (B,), to an array (B,).

    Exponents ``a``, ``b`` where the form has them; ``a_local``, the mean slope of log N*(C) over the range ``flops``
    where that is one; at its upper end the optimum's ``num_params``, ``num_tokens``, ``tokens_per_param``, ``loss``.
    """
    low, high = map(float, flops)

    def optimum(p: Params, *at: float) -> np.ndarray:
        return optimal_num_params(form, {k: np.atleast_1d(v) for k, v in p.items()}, np.array(at), cost)

    def slope(p: Params) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            n = np.log(optimum(p, low, high))
            return (n[:, 1] - n[:, 0]) / np.log(high / low)

    def num_params(p: Params) -> np.ndarray:
        return optimum(p, high)[:, 0]

    def num_tokens(p: Params) -> np.ndarray:
        return high / cost.flops_per_token(num_params(p))

    def ratio(p: Params) -> np.ndarray:
        return num_tokens(p) / num_params(p)

    def loss(p: Params) -> np.ndarray:
        n = num_params(p)
        return form.predict(p, num_params=n, num_tokens=high / cost.flops_per_token(n))

    found: dict[str, Callable[[Params], np.ndarray]]
    found = {"num_params": num_params, "num_tokens": num_tokens, "tokens_per_param": ratio, "loss": loss}
    if high > 1.1 * low:
        found = {"a_local": slope} | found
    if exponents(form, dict.fromkeys(form.parameters, 1.0)) is not None:
        found = {"a": lambda p: exponents(form, p)[0], "b": lambda p: exponents(form, p)[1]} | found  # type: ignore[index]  # it has them
    return found
