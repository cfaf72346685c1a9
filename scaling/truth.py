"""Fits held against the truth, where the source knows its own entropy: how far off, and inside the interval or not."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from scaling.axes import LABELS, MARKERS, colour_bar, colours, engineering, log_axis, markers
from scaling.records import RunRecord


def of(runs: Sequence[RunRecord]) -> dict | None:
    """The truth about the source that all ``runs`` share, nats per token; None if they differ or it is not known.

    ``entropy_rate``; ``best_loss``, the least mean loss over windows that any predictor can expect;
    ``best_validation_loss``, what that predictor, the source itself, has on this validation split. The last is what
    losses on that split tend to, and what fits are held against: it differs from the expectation by the split's own
    chance, which all runs share and no interval of a fit knows of.
    """
    known = {run.data.get("fingerprint"): run.data for run in runs}
    data = next(iter(known.values())) if len(known) == 1 else {}
    if "best_validation_loss" not in data:
        return None
    return {name: data[name] for name in ("entropy_rate", "best_loss", "best_validation_loss")}


def least_loss(table) -> float | None:
    """``least_loss`` of a table of runs, if all have the same; else None."""
    values = set(table["least_loss"].dropna()) if "least_loss" in table else set()
    return values.pop() if len(values) == 1 else None


def irreducible(fit: Mapping, least: float) -> list[dict]:
    """Every interval of every fitted law's irreducible loss E against ``least``, the truth.

    A row each: law, value, error (value - least), method, level, interval (an end is null where the data set none) and
    inside, whether it holds the truth.
    """
    rows = []
    for name, law in (fit.get("laws") or {}).items():
        value = law["params"].get("E")
        given = {law.get("interval_method"): law.get("intervals"), "profile": law.get("profile_intervals")}
        for method, intervals in given.items() if value is not None else ():
            interval = (intervals or {}).get("E")
            if interval:
                low, high = interval
                inside = (low is None or low <= least) and (high is None or least <= high)
                row = {"law": name, "value": value, "error": value - least, "method": method}
                rows.append({**row, "level": law.get("level", 0.95), "interval": interval, "inside": inside})
    return rows


def line(ax: Axes, least: float) -> Axes:
    """Draws the least possible loss on axes of losses, named, and makes them reach it."""
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, least - 0.06 * (high - least)), high)
    ax.axhline(least, color="black", linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
    ax.annotate(f"least possible: {least:.4g}", (0.01, least), xycoords=("axes fraction", "data"), xytext=(0, 2.5),
                textcoords="offset points", va="bottom", fontsize=9, color="0.3")  # fmt: skip
    return ax


def excess(ax: Axes, table, least: float, frontier: Sequence[Mapping] = ()) -> Axes:
    """What runs lose beyond the least possible, against compute; a power law is a straight line.

    ``table``: runs above ``least``. ``frontier``: fit.json's; it is drawn where its loss is above ``least``.
    """
    shade, marker = colours(table["num_params"]), markers(table["num_params"])
    many = len(shade) > len(MARKERS)
    for size, rows in table.groupby("num_params"):
        held = rows["holdout"].astype(bool) if "holdout" in rows else rows["loss"].isna()
        ax.scatter(
            rows["flops"], rows["loss"] - least, s=26, marker="o" if many else marker[size], edgecolors=[shade[size]],
            facecolors=np.where(held, "white", matplotlib.colors.to_hex(shade[size])), linewidths=0.9, zorder=3,
            label=None if many else engineering(size),
        )  # fmt: skip
    above = sorted((p["flops"], p["loss"] - least) for p in frontier if p["loss"] > least)
    if above:
        ax.plot(*zip(*above), color="black", linewidth=1.6, label="optimum of the law")
    log_axis(ax.xaxis, "flops")
    log_axis(ax.yaxis, "loss")
    ax.set_ylabel("loss beyond the least possible (nats per token)")
    if many:
        colour_bar(ax, list(shade), "num_params")
    if above or not many:
        ax.legend(title=None if many else LABELS["num_params"])
    return ax
