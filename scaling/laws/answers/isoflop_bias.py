"""What a parabola through an IsoFLOP profile gets wrong without any noise.

The law along a profile is not a parabola in log N: its two sides bend differently when α ≠ β. The parabola's vertex is
then off by an amount that the grid alone decides. A constant offset moves the intercept of N*(C); a grid whose centre
or width drifts with compute moves the exponent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from scaling.laws.answers.allocation import Cost, found, optimal_num_params
from scaling.laws.answers.budgets import Profile
from scaling.laws.answers.isoflop import windowed_minimum
from scaling.laws.forms.law import Form


def parabola_shift(alpha: float, beta: float, x: np.ndarray) -> float:
    r"""log(N̂/N*) of the least-squares parabola at sizes N* e^x, x symmetric about 0, where C = 6 N D.

    Along the profile L - E ∝ β e^(-αx) + α e^(βx). On a symmetric grid the parabola's linear and quadratic
    coefficients see the odd and the even part alone:

        c1 = Σ x (α sinh βx - β sinh αx) / Σ x²
        c2 = Σ (x² - m) (β cosh αx + α cosh βx) / Σ (x² - m)²,  m = mean x²

    and the vertex is at -c1 / 2c2. The tokens' optimum is off by minus as much.

    >>> np.expm1(-parabola_shift(0.34, 0.28, np.linspace(-1, 1, 15) * np.log(4)))  # -1.30 % in D*
    """
    x = np.asarray(x, dtype=np.float64)
    if not np.allclose(np.sort(x), np.sort(-x), atol=1e-9):
        raise ValueError("x is not symmetric about 0: use profile_bias, which takes any grid")
    odd = alpha * np.sinh(beta * x) - beta * np.sinh(alpha * x)
    even = beta * np.cosh(alpha * x) + alpha * np.cosh(beta * x)
    centred = x**2 - np.mean(x**2)
    c1 = (x @ odd) / (x @ x)
    c2 = (centred @ even) / (centred @ centred)
    return float(-c1 / (2 * c2))


def profile_bias(
    form: Form, params: Mapping[str, float], profiles: Sequence[Profile], cost: Cost,
    minimum: Callable[..., Any] = windowed_minimum,
) -> dict[str, Any]:  # fmt: skip
    """The bias of approach 2 on these profiles, were the law exactly ``form`` with ``params``.

    The law is evaluated without noise at the very runs of each profile; the parabola's vertex is set against the
    law's own optimum. ``minimum`` is the rule that finds the vertex: the fit's own, within its window, or
    ``isoflop.parabola_minimum``, which takes every size (the figures that are published are of that).

    Returns:
      {"num_params": relative error of N* per profile, "a": error of the exponent through the vertices (None below two)}
    """
    flops = np.array([p.flops for p in profiles])
    best = optimal_num_params(form, params, flops, cost)
    best = np.log(np.where(found(best), best, np.nan))
    vertices = []
    for p in profiles:
        loss = form.predict(params, num_params=p.num_params, num_tokens=p.num_tokens)
        vertices.append(float(minimum(np.log(p.num_params), loss, p.row_weight)[1]))
    shift = np.array(vertices) - best
    known = np.isfinite(shift)
    slope = float(np.polyfit(np.log(flops[known]), shift[known], 1)[0]) if known.sum() >= 2 else None
    return {"num_params": [float(np.expm1(s)) if np.isfinite(s) else None for s in shift], "a": slope}
