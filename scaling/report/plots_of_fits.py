"""Figures of how sure a fit is: Axes in, Axes out; fits nothing, reads nothing. The rest are in ``plots``."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

from scaling.laws.answers import multiplier
from scaling.numbers import compact
from scaling.report.axes import DASHES, LABELS, MARKERS, MUTED, STAR, LogTicks, log_axis, scientific, tone

SYMBOLS = {
    "alpha": r"$\alpha$", "beta": r"$\beta$", "gamma": r"$\gamma$", "E": "$E$ (nats per token)", "A": "$A$", "B": "$B$",
    "a": r"exponent $a$ of $N^{*}$", "b": r"exponent $b$ of $D^{*}$", "a_local": "$a$ over the fitted range",
    "num_params": "$N^{*}$ (parameters)", "num_tokens": "$D^{*}$ (tokens)",
    "tokens_per_param": r"$D^{*}/N^{*}$", "loss": r"$L^{*}$ (nats per token)",
}  # fmt: skip
# Counts are written 30K, 1.25M.
COUNTS = ("num_params", "num_tokens")
# A profile is drawn up to this many times its cut.
HEADROOM = 2.2


def symbol(name: str) -> str:
    """A quantity's name as it is written on an axis."""
    if name in SYMBOLS:
        return SYMBOLS[name]
    head, _, index = name.partition("_")
    return f"${head}_{{{index}}}$" if index else f"${head}$"


def profile(
    ax: Axes, name: str, entry: Mapping, cut: float, value: float, bootstrap: Sequence[float] | None = None
) -> Axes:
    """The profile of one quantity: deviance against its value, the level that ends its interval, and the interval.

    Args:
      entry: ``grid``, ``deviance`` and ``interval`` (an end that is null is one the data do not set).
      cut: the deviance at which the interval ends.
      value: at the optimum.
      bootstrap: the bootstrap's interval, drawn as a bar below, to compare.
    """
    known = [(g, d) for g, d in zip(entry["grid"], entry["deviance"]) if g is not None and d is not None]
    grid, deviance = np.array(known).T
    top = HEADROOM * cut
    # The refits reach further than the interval: a little beyond its ends is enough.
    shown = _around_interval(grid, deviance, top)
    grid, deviance = grid[shown], deviance[shown]
    spread = grid.max() / grid.min() if grid.min() > 0 else 1.0
    logarithmic = name not in ("a", "b", "a_local", "E") and spread > 3.0
    ax.plot(grid, deviance, "-", color="black", linewidth=1.2)
    ax.plot(grid, deviance, ".", color="black", markersize=3.5)
    if logarithmic:
        ax.set_xscale("log")
    ax.set_ylim(-0.16 * top, top)
    lo, hi = ax.get_xlim()
    if bootstrap and None not in bootstrap:  # to be seen whole, but not to squeeze the curve
        lo = min(lo, max(bootstrap[0], lo / 3 if logarithmic else lo - 0.5 * (hi - lo)))
        hi = max(hi, min(bootstrap[1], hi * 3 if logarithmic else hi + 0.5 * (hi - lo)))
    ends = [edge if end is None else end for end, edge in zip(entry["interval"], (lo, hi))]
    ax.axvspan(*ends, color="0.90", linewidth=0, zorder=0)
    ax.axhline(cut, color=MUTED, linestyle="--", linewidth=0.9)
    ax.plot([value, value], [0, top], color=tone(0.5), linestyle=":", linewidth=1.1)
    if bootstrap and None not in bootstrap:
        ax.plot(bootstrap, [-0.08 * top] * 2, color=tone(0.45), linewidth=3.5, solid_capstyle="butt", clip_on=True)
    ax.set_xlim(lo, hi)
    ax.set_xlabel(symbol(name))
    open_ended = [side for side, end in zip(("below", "above"), entry["interval"]) if end is None]
    if open_ended:
        ax.set_title(f"no end {' or '.join(open_ended)}", fontsize=9.5, color="0.3")
    _few_ticks(ax, name, logarithmic)
    ax.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    ax.set_yticks([t for t in ax.get_yticks() if 0 <= t <= top])
    return ax


def _around_interval(grid: np.ndarray, deviance: np.ndarray, top: float) -> slice:
    """From the last refit above ``top`` on the left to the first on the right."""
    best = int(deviance.argmin())
    left = [i for i in range(best) if deviance[i] > top]
    right = [i for i in range(best, len(grid)) if deviance[i] > top]
    return slice(max(left, default=0), min(right, default=len(grid) - 1) + 1)


def _few_ticks(ax: Axes, name: str, logarithmic: bool) -> None:
    """Three or four labels: the panels are small."""
    if name in COUNTS:
        writer = compact
    else:
        writer = scientific if ax.get_xlim()[1] >= 1e5 else lambda v, _=None: f"{v:.4g}"
    if logarithmic:
        lo, hi = ax.get_xlim()
        decades = math.log10(hi / lo)
        factors = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        ticks = [f * 10.0**d for d in range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1) for f in factors]
        ticks = [t for t in ticks if lo <= t <= hi]
        ax.set_xticks(ticks[:: max(1, math.ceil(len(ticks) / 4))])
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        ax.xaxis.set_major_locator(ticker.MaxNLocator(3))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: writer(v)))


def cloud(ax: Axes, draws: Mapping[str, Sequence[float]], params: Mapping[str, float], pair: tuple[str, str]) -> Axes:
    """Bootstrap draws of two parameters, and the fit itself as a star; its title is how they move together.

    Amplitudes spread over decades and are drawn as logarithms.
    """
    x, y = (np.asarray(draws[name], dtype=float) for name in pair)
    values = [params[name] for name in pair]
    labels = [symbol(name) for name in pair]
    axes_values = []
    for i, v in enumerate((x, y)):
        if (v > 0).all() and np.quantile(v, 0.95) > 4 * np.quantile(v, 0.05) and values[i] > 0:
            v, values[i], labels[i] = np.log(v), math.log(values[i]), rf"$\log$ {labels[i]}"
        axes_values.append(v)
    x, y = axes_values
    ax.plot(x, y, "o", color=tone(0.25), alpha=0.45, markersize=3.2, markeredgewidth=0)
    ax.plot(*values, **STAR, color="none", markerfacecolor="white", zorder=5)
    for limits, v in ((ax.set_xlim, x), (ax.set_ylim, y)):
        # A handful of replicates far out would shrink the rest to a dot.
        lo, hi = np.quantile(v, [0.01, 0.99])
        limits(lo - 0.25 * (hi - lo), hi + 0.25 * (hi - lo)) if hi > lo else None
    if x.std() > 0 and y.std() > 0:
        ax.set_title(f"correlation {np.corrcoef(x, y)[0, 1]:+.2f}", fontsize=9.5, color="0.3")
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(4))
    return ax


def multipliers(ax: Axes, compared: Mapping) -> Axes:
    """What each pair's first group is worth against its second, over what is paid: a line and its band a pair, and
    dotted the other of laws that share exponents and laws fitted apart (``multiplier.prefixes``).

    ``compared``: fit.json's multiplier. Dashed where a group lies outside its fitted rows. An end of a band that is
    null is one the data do not set: the band then leaves the axes.
    """
    pairs, axis, (lead, other) = compared["pairs"], compared["axis"], multiplier.prefixes(compared)

    def numbers(points: Sequence[Mapping], key: str) -> np.ndarray:
        return np.array([p.get(key) for p in points], dtype=float)

    known = [
        v for pair in pairs for p in pair["points"]
        if (v := p.get(f"{lead}value")) is not None and not (lead and p["extrapolated"])
    ]  # fmt: skip
    for i, pair in enumerate(pairs):
        colour, points = tone(0.84 * i / max(1, len(pairs) - 1)), pair["points"]
        x, value = np.array([p[axis] for p in points]), numbers(points, f"{lead}value")
        ends = [p.get(f"{lead}interval") or [None, None] for p in points]
        lower, upper = np.array(ends, dtype=float).T
        none = np.isnan(lower) & np.isnan(upper) if lead else np.zeros(len(x), dtype=bool)  # no draws, no interval
        lower, upper = np.where(np.isnan(lower), value / 1e3, lower), np.where(np.isnan(upper), value * 1e3, upper)
        lower, upper = np.where(none, np.nan, lower), np.where(none, np.nan, upper)
        ax.fill_between(x, lower, upper, color=colour, alpha=0.18, linewidth=0)
        inside = np.array([not p["extrapolated"] for p in points])
        ax.plot(x, value, color=colour, linestyle="--", linewidth=1)
        named = f"{pair['group']} over {pair['over']}"
        ax.plot(x, np.where(inside, value, np.nan), color=colour, linewidth=1.8, label=named)
        # Laws apart, two exponents a group, say little beyond their runs.
        ax.plot(x, np.where(inside, numbers(points, f"{other}value"), np.nan), color=colour, linestyle=":", linewidth=1)
    ax.axhline(1.0, color="0.4", linewidth=0.8)
    log_axis(ax.xaxis, axis)
    ax.set_yscale("log")
    if known:
        ax.set_ylim(min(0.9, 0.8 * min(known)), max(1.1, 1.25 * max(known)))
    ax.yaxis.set_major_locator(LogTicks())
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}×"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_ylabel("times as much for the same loss")
    ax.legend(
        title=f"band: {100 * compared['level']:.0f} %; dotted: {multiplier.HEADS[lead, other][1]}",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
    )  # beside the axes, whose whole width the lines take
    return ax


def forecast_growth(ax: Axes, members: Sequence[Mapping]) -> Axes:
    """Mean error of forecasts of every larger run, as the range of compute that was fitted grows: a line per form.

    ``members``: fit.json's combination.members.
    """
    for i, row in enumerate(members):
        cuts = [(c["fitted_up_to"], 100 * c["mean_error"]) for c in row["cuts"]]
        ax.plot(*zip(*cuts), **_kind(i), label=_with_weight(row))
    log_axis(ax.xaxis, "flops")
    ax.set_xlabel("largest compute fitted (FLOPs)")
    ax.set_ylabel("mean error on every larger run (%)")
    ax.set_ylim(bottom=0)
    return ax


def forecast_distance(ax: Axes, members: Sequence[Mapping]) -> Axes:
    """Mean error of the same forecasts against how far beyond the fitted compute a run lies."""
    for i, row in enumerate(members):
        bins = [(b["factor"], 100 * b["mean_error"]) for b in row["by_factor"]]
        ax.plot(*zip(*bins), **_kind(i), label=_with_weight(row))
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogTicks(fewest=3))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}×"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlabel(f"{LABELS['flops'].removesuffix(' (FLOPs)')} of the run over the largest fitted")
    ax.set_ylabel("mean error (%)")
    ax.set_ylim(bottom=0)
    return ax


def _kind(i: int) -> dict:
    """A line that a grey printer keeps apart: shade, dash and marker."""
    return {
        "color": tone(0.28 * (i % 4)),
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def _with_weight(row: Mapping) -> str:
    return f"{row['law'].replace('_', ' ')}, weight {row['weight']:.2f}"


def interval_by_cost(
    ax: Axes, rounds: Sequence[Mapping], asked: float | None = None, orders: Mapping | None = None
) -> Axes:
    """How wide an interval was after each round of a design, against what had been spent by then, and what the choice
    of each round had expected.

    Args:
      rounds: entries with ``spent_flops`` (before it), ``cost_flops``, ``width_after`` and ``width_expected`` (null
        where there was no limit).
      asked: the width at which rounds end.
      orders: what other orders are expected to leave (``laws.answers.design.orders``).
    """
    ends: list[float] = []
    if orders:
        random = orders["random"]
        told = [(c, a, b) for c, a, b in zip(random["flops"], random["narrow"], random["wide"]) if a is not None]
        unlimited = 1e3 * max(a for _, a, _ in told)
        low, high = ([unlimited if v is None else v for v in edge] for edge in list(zip(*told))[1:])
        ax.fill_between(next(zip(*told)), low, high, color=tone(0.75), alpha=0.25, linewidth=0)
        styles = {"random": (tone(0.75), ":", "at random (80 %: shaded)"), "by_budget": (tone(0.45), "--", "by budget"),
                  "designed": (tone(0.1), "-", "as bought")}  # fmt: skip
        for order, (colour, dashes, label) in styles.items():
            points = [(c, w) for c, w in zip(orders[order]["flops"], orders[order]["width"]) if w is not None]
            ax.plot(*zip(*points), color=colour, linestyle=dashes, linewidth=1.5, label=label)
            ends += [w for _, w in points]
    points = [(r["spent_flops"] + r["cost_flops"], r) for r in rounds]
    known = [(spent, r["width_after"]) for spent, r in points if r["width_after"] is not None]
    expected = [(spent, r["width_expected"]) for spent, r in points if r["width_expected"] is not None]
    if expected:
        ax.plot(*zip(*expected), "o", color=MUTED, markerfacecolor="white", label="expected")
    if known:
        ax.plot(*zip(*known), "o" if orders else "o-", color="black", label="found")
    if asked is not None:
        ax.axhline(asked, color=MUTED, linestyle="--", linewidth=1.0, label="asked")
    if orders:  # not by the band, which has no upper end where runs leave none
        ends += [w for _, w in [*known, *expected]] + ([] if asked is None else [asked])
        ax.set_ylim(0.8 * min(ends), 1.6 * max(ends))
    log_axis(ax.xaxis, "flops")
    ax.set_xlabel("training compute bought (FLOPs)")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogTicks(fewest=3))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    ax.legend()
    return ax
