"""The error that all losses on one validation text share, in the intervals of what a law knows of the loss itself."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

# Parameters that are losses: a law's floor and its ceiling. An error that is added to every loss moves these alone.
LOSSES = ("E", "L_0")


def reach(error: float | None, level: float) -> float:
    """How far a shared ``error`` alone reaches to either side at a ``level``: z error, 0 where there is none."""
    return (error or 0.0) * NormalDist().inv_cdf(0.5 + 0.5 * level)


def widened(value: float, ends: Sequence[float | None], error: float | None, level: float) -> list[float | None]:
    """Returns an interval of a loss about its ``value`` with the standard ``error`` that all losses share: each end
    lies √(half² + (z error)²) from the value, no lower than 0. An end that is none, or infinite, stays so."""
    low, high = (end is not None and math.isfinite(end) for end in ends)
    half = [math.hypot(end - value, reach(error, level)) if known else 0.0 for end, known in zip(ends, (low, high))]  # type: ignore[operator]  # it is known
    return [max(value - half[0], 0.0) if low else ends[0], value + half[1] if high else ends[1]]


def in_law(entry: Mapping[str, Any], error: float | None) -> dict[str, Any]:
    """Returns a law's entry of fit.json with the shared ``error`` in its floor's and its ceiling's intervals, and
    ``evaluation``: that error, and E's interval without it, of the loss on this very validation text."""
    value, ends = entry["params"].get("E"), (entry.get("intervals") or {}).get("E")
    if not error or value is None or not ends:
        return dict(entry)
    params, intervals = entry["params"], entry["intervals"]
    losses = [name for name in LOSSES if name in params and intervals.get(name)]
    wide = {name: widened(params[name], intervals[name], error, entry["level"]) for name in losses}
    told = {"standard_error": error, "E_on_this_split": list(ends)}
    return {**entry, "intervals": {**intervals, **wide}, "evaluation": told}
