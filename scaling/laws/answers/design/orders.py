"""What an interval would have been after runs in another order: budget by budget as a grid goes, and at random.

One law, that of all runs which were bought, says what each order's cells tell of the target: Laplace's variance
gᵀ (Σ j jᵀ / σ²)⁻¹ g, j the slope of a cell's log loss in the parameters, σ its noise, g that of the target; of a loss
also what no run takes away (``Beliefs.rest``). Only its ratio to the variance after all that was bought is used, times
the width that the interval has then, of E without what all losses share, which is added again.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.answers.design.beliefs import LEAST_NOISE, SINGULAR, believe
from scaling.laws.answers.design.target import Target
from scaling.laws.fitting.coordinates import Model
from scaling.laws.fitting.estimate import Fit
from scaling.laws.intervals import resampling
from scaling.laws.intervals.profile import Quantity

if TYPE_CHECKING:
    from scaling.laws.analysis import Analysis

Columns = Mapping[str, np.ndarray]
Spread = Callable[[Sequence[int]], float]

SIZES = 5  # of a budget of the IsoFLOP order, as in the grids here
STEP = 2.0  # from one budget to the next
ORDERS = 40  # random ones
SHARES = (0.1, 0.5, 0.9)  # of random orders, that are at least so narrow
POINTS = 60  # amounts spent at which these are told


def by_budget(columns: Columns, bought: Collection[int] = (), member: Sequence[Any] | None = None) -> Iterator[int]:
    """Rows that are not yet ``bought``, from the cheapest budget up: of those within a factor ``STEP`` of C, ``SIZES``
    spread evenly over their sizes; then what is left, in order of compute. ``member``: the group of each row, of which
    each has its ``SIZES`` of a budget, one after the other in turn."""
    C, N = columns["flops"], columns["num_params"]
    order: list[int] = []
    number = np.floor(np.log(C / C.min()) / np.log(STEP) + 1e-9).astype(int)
    of = np.unique(np.zeros(len(C)) if member is None else np.asarray(member), return_inverse=True)[1]
    for budget in range(number.max() + 1):
        spread = [_spread_evenly(np.flatnonzero((number == budget) & (of == g)), N) for g in range(of.max() + 1)]
        order += [i for side_by_side in itertools.zip_longest(*spread) for i in side_by_side if i is not None]
    order += [i for i in np.argsort(C, kind="stable").tolist() if i not in order]
    yield from (i for i in order if i not in bought)


def _spread_evenly(rows: np.ndarray, sizes: np.ndarray) -> list[int]:
    """``SIZES`` of the rows, or all, evenly over their order by size."""
    rows = rows[np.argsort(sizes[rows], kind="stable")]
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(SIZES, len(rows))).round().astype(int))].tolist()


def at_random(num_rows: int, bought: Collection[int], seed: int) -> list[int]:
    """Rows that are not yet ``bought``, in a random order."""
    rest = np.setdiff1d(np.arange(num_rows), list(bought))
    return np.random.default_rng(seed).permutation(rest).tolist()


def spread_of_target(found: "Analysis", target: Target, columns: Columns, blind: Collection[int] = ()) -> Spread:
    """``spread_of`` a target under the surface law. Raises ValueError where that has no such target."""
    fitted = found.fits[str(found.surface)]
    quantity = target.quantity(fitted.form, found.cost)
    if quantity is None:
        raise ValueError(f"{found.observations.source}: {fitted.form.name} has no {target.name}: write another --law")
    rest = believe(found, {c: x[:1] for c, x in columns.items()}, target).rest if target.kind.is_loss else 0.0
    return spread_of(fitted, quantity, columns, rest, blind)


def spread_of(
    fitted: Fit, quantity: Quantity, columns: Columns, rest: float = 0.0, blind: Collection[int] = ()
) -> Spread:
    """The standard deviation of a quantity of a law after some rows of ``columns``, by number; infinite where they
    leave a direction of it open. ``rest``: variance that no row takes away; rows that are ``blind`` tell nothing."""
    own = {c: np.asarray(columns[c], dtype=np.float64) for c in fitted.form.columns}
    model = Model(fitted.coordinates, own, fitted.problem.model.log)
    slope = resampling.gradient(fitted, quantity)
    sigma = max(resampling.noise_scale(fitted), LEAST_NOISE)
    told = model.derivatives(fitted.theta[None])[1][0] / (sigma * fitted.noise_at(**own))  # (P, n)
    told[:, list(blind)] = 0.0

    def spread(chosen: Sequence[int]) -> float:
        information = told[:, chosen] @ told[:, chosen].T
        scale = np.sqrt(np.diagonal(information))
        if not (scale > 0).all():
            return np.inf
        values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
        if values[0] < SINGULAR:
            return np.inf
        return float(np.sqrt((((slope / scale) @ vectors) ** 2 / values).sum() + rest))

    return spread


def compare(
    spread: Spread, columns: Columns, cost: Callable[[Sequence[int]], float], bought: Sequence[int], first: int,
    width: float, shared: float = 0.0, member: Sequence[Any] | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Sets the order in which rows were ``bought`` against two others that begin with the same ``first`` rows.

    Args:
      spread: of the target after some rows, by number (``spread_of``).
      columns: of all rows that could have been bought (n,), those bought among them; ``cost`` of some, by number.
      width: of the target's interval after all that was bought; ``shared`` what of it no row takes away.
      member: the group of each row, where they are of several.

    Returns:
      By order ("designed", "by_budget", "random") what had been spent (``flops``) and how wide the interval is expected
      to be then (``width``), of random orders the middle one and the two that a tenth are below and above
      (``narrow``, ``wide``); ``reached_flops``, what each took to be as narrow as the first. None where what was bought
      leaves the target open, or the law fixes it: there is no ratio.
    """
    left = spread(list(bought))
    if not (0 < left < np.inf and 0 < width < np.inf):
        return None
    n, begin = len(columns["flops"]), list(bought[:first])
    shared = min(shared, width * (1 - 1e-9))
    unit = np.sqrt(width**2 - shared**2) / left

    def course(order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ends = range(first, len(order) + 1)
        spent = [cost(list(order[:k])) for k in ends]
        return np.array(spent), np.array([np.hypot(unit * spread(list(order[:k])), shared) for k in ends])

    def reached(spent: np.ndarray, widths: np.ndarray) -> float:
        there = widths <= width * (1 + 1e-9)
        return float(spent[there.argmax()]) if there.any() else np.inf

    designed = course(list(bought))
    grid = course([*begin, *by_budget(columns, begin, member)])
    random = [course([*begin, *at_random(n, begin, seed)]) for seed in range(ORDERS)]
    at = np.geomspace(designed[0][0], max(spent[-1] for spent, _ in random), POINTS)
    each = np.array([w[np.searchsorted(s, at * (1 + 1e-9), side="right") - 1] for s, w in random])
    narrow, middle, wide = np.quantile(each, SHARES, axis=0, method="inverted_cdf")
    low, half, high = np.quantile([reached(*one) for one in random], SHARES, method="inverted_cdf")
    return {
        "designed": {"flops": designed[0], "width": designed[1]},
        "by_budget": {"flops": grid[0], "width": grid[1]},
        "random": {"flops": at, "width": middle, "narrow": narrow, "wide": wide, "orders": ORDERS},
        "reached_flops": {"designed": reached(*designed), "by_budget": reached(*grid), "random": half,
                          "random_low": low, "random_high": high},
    }  # fmt: skip
