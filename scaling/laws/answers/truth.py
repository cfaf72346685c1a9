"""Fits held against the truth, where the source knows its own entropy: how far off, and inside the interval or not."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scaling.records import RunRecord
from scaling.records import least_loss as least_loss_of

if TYPE_CHECKING:
    import pandas as pd


def of(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """The truth about the source that all ``runs`` share, nats per token; None if they differ, it is not known,
    or their losses are no likelihood of its text.

    ``entropy_rate``; ``best_loss``, the least mean loss over windows that any predictor can expect;
    ``best_validation_loss``, what that predictor, the source itself, has on this validation split. The last is what
    losses on that split tend to, and what fits are held against: it differs from the expectation by the split's own
    chance, which all runs share; E's interval is taken without what it adds (``evaluation``).
    """
    known = {run.data.get("fingerprint"): run.data for run in runs}
    data = next(iter(known.values())) if len(known) == 1 else {}
    if not data or any(least_loss_of(run) is None for run in runs):
        return None
    return {name: data[name] for name in ("entropy_rate", "best_loss", "best_validation_loss")}


def least_loss(table: "pd.DataFrame") -> float | None:
    """``least_loss`` of a table of runs, if all have the same; else None."""
    values = set(table["least_loss"].dropna()) if "least_loss" in table else set()
    return values.pop() if len(values) == 1 else None


def irreducible(fit: Mapping[str, Any], least: float) -> list[dict[str, Any]]:
    """Every interval of every fitted law's irreducible loss E against ``least``, the truth.

    A row each: law, value, error (value - least), method, level, interval (an end is null where the data set none) and
    inside, whether it holds the truth.
    """
    rows = []
    for name, law in (fit.get("laws") or {}).items():
        value = law["params"].get("E")
        given = {law.get("interval_method"): law.get("intervals"), "profile": law.get("profile_intervals")}
        ends = {method: (intervals or {}).get("E") for method, intervals in given.items()}
        if law.get("evaluation"):  # the truth is of this very split
            ends[law.get("interval_method")] = law["evaluation"]["E_on_this_split"]
        for method, interval in ends.items() if value is not None else ():
            if interval:
                low, high = interval
                inside = (low is None or low <= least) and (high is None or least <= high)
                row = {"law": name, "value": value, "error": value - least, "method": method}
                rows.append({**row, "level": law.get("level", 0.95), "interval": interval, "inside": inside})
    return rows
