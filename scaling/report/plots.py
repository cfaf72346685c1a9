"""Figures of a sweep: Axes in, Axes out; fits nothing, reads nothing.

Every function draws plain data on the Axes it is given and returns it. Tables are pandas, with the columns
``num_params`` (N), ``num_tokens`` (D), ``flops`` (C, training FLOPs), ``loss`` (nats per token); the rest comes from
fit.json as it is written. Draw inside ``style()``. Colour runs dark to light with the logarithm of compute or size, and
a marker goes with it, so that every figure survives a grey printer.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from scaling.numbers import compact
from scaling.report.axes import (
    DASHES,
    FAINT,
    LABELS,
    MARKERS,
    MUTED,
    STAR,
    LogTicks,
    colour_bar,
    colours,
    log_axis,
    markers,
    scientific,
    tone,
)
from scaling.report.axes import STYLE as STYLE
from scaling.report.axes import style as style

# More budgets or sizes than this are told apart by a colour bar: a legend would cover the data.
MAX_KEYS = 6


def loss_curves(ax: Axes, curves, envelope: Sequence[Mapping] = ()) -> Axes:
    """Validation loss against compute spent so far, a line per run, and the lower envelope of all of them.

    ``curves``: ``records.curves`` through ``observations``. A dot ends every completed run: with a rate that is
    cooled down at the end, only those losses are annealed. Held-out runs are dotted. ``envelope``: points with
    ``flops`` and ``loss``.
    """
    shade = colours(curves["num_params"])
    marker = markers(curves["num_params"])
    for _, run in curves.sort_values("num_tokens").groupby("run_id", sort=False):
        size, status = run["num_params"].iloc[0], run["status"].iloc[0]
        line = ":" if run["holdout"].iloc[0] else "-"
        ax.plot(run["flops"], run["loss"], line, color=shade[size], linewidth=0.9, alpha=0.85)
        end = {"completed": marker[size], "diverged": "x"}.get(status)
        if end:
            ax.plot(run["flops"].iloc[-1], run["loss"].iloc[-1], end, color=shade[size], markersize=4.5)
    if len(envelope):
        points = sorted((p["flops"], p["loss"]) for p in envelope)
        ax.plot(*zip(*points), color="black", linewidth=1.8, zorder=4)
    log_axis(ax.xaxis, "flops")
    log_axis(ax.yaxis, "loss")
    sound = curves["loss"][curves["status"] == "completed"]
    if len(sound):  # a run that blew up leaves through the top instead of flattening the others
        ax.set_ylim(sound.min() / 1.05, sound.max() * 1.15)
    many = len(shade) > len(MARKERS)
    if many:
        colour_bar(ax, list(shade), "num_params")
    sizes = [] if many else sorted(shade)
    handles = [Line2D([], [], color=shade[n], marker=marker[n], label=compact(n)) for n in sizes]
    handles += _handles_if(
        (len(envelope), Line2D([], [], color="black", linewidth=1.8, label="envelope")),
        (curves["holdout"].any(), Line2D([], [], color=MUTED, linestyle=":", label="held out")),
        ((curves["status"] == "diverged").any(), Line2D([], [], color=MUTED, marker="x", label="diverged")),
    )
    ax.legend(handles=handles, title=None if many else LABELS["num_params"])
    return ax


FAMILY_LINES = ("-", "--", ":", "-.")


def loss_by_position(ax: Axes, positions) -> Axes:
    """Validation loss against the place in the window, a line per run, coloured by size, dashed by family.

    ``positions``: ``records.positions``. A model that uses what it read falls on; one that forgets it flattens out.
    """
    shade = colours(positions["num_params"])
    families = dict(zip(sorted(positions["family"].unique()), itertools.cycle(FAMILY_LINES)))
    for (_, size, family), run in positions.groupby(["run_id", "num_params", "family"], sort=False):
        ax.plot(run["until"], run["loss"].astype(float), families[family], color=shade[size], linewidth=1.0, alpha=0.9)
    log_axis(ax.xaxis, "position")
    log_axis(ax.yaxis, "loss")
    many = len(shade) > MAX_KEYS
    if many:
        colour_bar(ax, list(shade), "num_params")
    handles = [] if many else [Line2D([], [], color=shade[n], label=compact(n)) for n in sorted(shade)]
    if len(families) > 1:
        handles += [Line2D([], [], color=MUTED, linestyle=style, label=name) for name, style in families.items()]
    if handles:
        ax.legend(handles=handles, title=None if many else LABELS["num_params"])
    return ax


def positions_of_groups(ax: Axes, positions) -> Axes:
    """Validation loss against the place in the window, a line for each ``group`` of ``positions``."""
    names = sorted(positions["group"].unique())
    for i, name in enumerate(names):
        run = positions[positions["group"] == name]
        label = f"{name}, $N$ = {compact(run['num_params'].iloc[0])}"
        ax.plot(run["until"], run["loss"].astype(float), color=tone(0.84 * i / max(1, len(names) - 1)), label=label)
    log_axis(ax.xaxis, "position")
    log_axis(ax.yaxis, "loss")
    ax.legend()
    return ax


def _handles_if(*pairs) -> list[Line2D]:
    return [handle for wanted, handle in pairs if wanted]


def isoflop(ax: Axes, budgets: Sequence[Mapping]) -> Axes:
    """Loss against parameters at equal compute: runs, the parabola in log N over the sizes it takes, its minimum.

    ``budgets``: fit.json's isoflop.budgets. A minimum that the runs do not bracket is null there and not drawn.
    """
    shade = colours([b["flops"] for b in budgets])
    marker = markers([b["flops"] for b in budgets])
    for budget in sorted(budgets, key=lambda b: b["flops"]):
        colour = shade[budget["flops"]]
        num_params = np.asarray(budget["num_params"], dtype=np.float64)
        ax.plot(num_params, budget["loss"], marker[budget["flops"]], color=colour, label=scientific(budget["flops"]))
        if budget.get("quadratic"):
            inside = num_params[budget["in_window"]] if budget.get("in_window") else num_params
            x = np.linspace(np.log(inside.min() / 1.15), np.log(inside.max() * 1.15), 200)
            ax.plot(np.exp(x), np.polynomial.polynomial.polyval(x, budget["quadratic"]), color=colour, linewidth=1.1)
        minimum = budget.get("minimum") or {}
        if minimum.get("num_params"):
            ax.plot(minimum["num_params"], minimum["loss"], **STAR, color="none", markerfacecolor="black", zorder=5)
    log_axis(ax.xaxis, "num_params")
    ax.set_ylabel(LABELS["loss"])
    many = len(budgets) > MAX_KEYS
    if many:
        colour_bar(ax, list(shade), "flops")
    handles = [] if many else ax.get_legend_handles_labels()[0]
    star = Line2D([], [], **STAR, color="none", markerfacecolor="black", label="minimum")
    handles += _handles_if((any((b.get("minimum") or {}).get("num_params") for b in budgets), star))
    ax.legend(handles=handles, title=None if many else "compute $C$ (FLOPs)")
    return ax


def allocation(
    ax: Axes,
    quantity: str,
    frontier: Sequence[Mapping] = (),
    minima: Sequence[Mapping] = (),
    envelope: Sequence[Mapping] = (),
    fitted_flops: tuple[float, float] | None = None,
) -> Axes:
    """What to spend a budget on: N*, D* or D*/N* against compute, by each approach.

    ``quantity``: num_params, num_tokens or tokens_per_param. ``frontier``: fit.json's, the parametric law's optimum
    with its band (``<quantity>_interval``); ``minima`` of IsoFLOP and points of the ``envelope``, as markers.
    ``fitted_flops``: the range of compute that was fitted; beyond it the frontier is dashed.
    """
    if len(frontier):
        flops = np.array([p["flops"] for p in frontier])
        value = np.array([_quantity(p, quantity) for p in frontier])
        band = [p.get(f"{quantity}_interval") for p in frontier]
        if all(band):
            # An end that is null is one the data do not set: the band then leaves the axes.
            lower, upper = np.array(band, dtype=float).T
            lower, upper = np.where(np.isnan(lower), value / 1e3, lower), np.where(np.isnan(upper), value * 1e3, upper)
            ax.fill_between(flops, lower, upper, color="0.87", linewidth=0, label="95 % interval of the law")
        inside = np.ones_like(flops, dtype=bool)
        if fitted_flops:
            # One part in a thousand: the grid of C ends on the range's ends, up to rounding.
            inside = (flops >= fitted_flops[0] * 0.999) & (flops <= fitted_flops[1] * 1.001)
        ax.plot(
            flops, value, color="black", linestyle="--", linewidth=1, label=None if inside.all() else "extrapolated"
        )
        ax.plot(flops[inside], value[inside], color="black", linewidth=1.8, label="parametric law")
    if len(envelope):
        x, y = [p["flops"] for p in envelope], [_quantity(p, quantity) for p in envelope]
        ax.plot(x, y, ".", color=tone(0.55), markersize=4, label="envelope of curves")
    known = [m for m in minima if m.get("num_params")]  # null where the runs do not bracket it
    if known:
        _points_with_intervals(ax, known, quantity, "IsoFLOP minimum")
    log_axis(ax.xaxis, "flops")
    log_axis(ax.yaxis, quantity)
    ax.legend()
    return ax


def _quantity(point: Mapping, quantity: str) -> float:
    if quantity == "tokens_per_param" and quantity not in point:
        return point["num_tokens"] / point["num_params"]
    return point[quantity]


def _points_with_intervals(ax: Axes, points, quantity, label) -> None:
    value = np.array([_quantity(p, quantity) for p in points])
    intervals = [p.get(f"{quantity}_interval") for p in points]
    yerr = None
    if all(intervals):
        lo, hi = np.array(intervals).T
        yerr = np.maximum([value - lo, hi - value], 0)
    ax.errorbar(
        [p["flops"] for p in points], value, yerr=yerr, fmt="D", markersize=5.5, color=tone(0.2),
        elinewidth=1, capsize=2.5, zorder=5, label=label,
    )  # fmt: skip


def surface(ax: Axes, table, predict: Callable, frontier: Sequence[Mapping] = ()) -> Axes:
    """The law L(N, D) as contours of equal loss, the runs on it, and the compute-efficient frontier.

    ``predict(num_params, num_tokens)``: loss, on arrays of any shape.
    """
    known = table[np.isfinite(table["loss"].astype(float))]
    n = np.geomspace(known["num_params"].min() / 2, known["num_params"].max() * 2, 160)
    d = np.geomspace(known["num_tokens"].min() / 2, known["num_tokens"].max() * 2, 160)
    loss = predict(*np.meshgrid(n, d))
    levels = _round_levels(loss.min(), np.quantile(loss, 0.97))
    lines = ax.contour(n, d, loss, levels=levels, colors=[MUTED], linewidths=0.7)
    budget = known["flops"].map(_two_digits)
    shade, marker = colours(budget), markers(budget)
    many = len(shade) > MAX_KEYS
    for flops, rows in known.groupby(budget):
        held = rows["holdout"].astype(bool) if "holdout" in rows else rows["loss"].isna()
        ax.scatter(
            rows["num_params"], rows["num_tokens"], s=26, marker="o" if many else marker[flops],
            facecolors=np.where(held, "white", matplotlib.colors.to_hex(shade[flops])), edgecolors=[shade[flops]],
            linewidths=0.9, zorder=4, label=None if many else scientific(flops),
        )  # fmt: skip
    if len(frontier):
        ax.plot([p["num_params"] for p in frontier], [p["num_tokens"] for p in frontier], color="black",
                linewidth=1.8, zorder=3, label="efficient frontier")  # fmt: skip
    log_axis(ax.xaxis, "num_params")
    log_axis(ax.yaxis, "num_tokens")
    ax.set_xlim(n[0], n[-1])
    ax.set_ylim(d[0], d[-1])
    _label_contours(ax, lines, n[int(0.9 * n.size)], d, predict)
    ax.grid(False)
    if many:
        colour_bar(ax, list(shade), "flops")
    title = None if many else "compute $C$ (FLOPs)"
    if ax.get_legend_handles_labels()[0]:  # many budgets and no frontier: nothing has a name
        # Above the axes: inside, it would lie on contours wherever it lay.
        ax.legend(title=title, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, columnspacing=1.2)
    return ax


def _two_digits(value: float) -> float:
    """Runs of one budget differ in the third digit, by rounding to whole steps."""
    return float(f"{value:.1e}")


def _round_levels(lo: float, hi: float, num: int = 12) -> list[float]:
    """Contour levels at round losses, about evenly spaced in the logarithm."""
    levels, value = [], lo
    while value < hi:
        gap = value * ((hi / lo) ** (1 / num) - 1)
        decade = 10.0 ** math.floor(math.log10(gap))
        step = decade * max(f for f in (1, 2, 5) if f * decade <= gap)
        value = round((math.floor(value / step + 1e-9) + 1) * step, 12)
        levels.append(value)
    return levels[:-1]


def _label_contours(ax: Axes, lines, num_params: float, num_tokens: np.ndarray, predict: Callable) -> None:
    """Writes each level where it crosses one size, away from the border that would clip it."""
    loss = predict(np.full_like(num_tokens, num_params), num_tokens)
    inside = [v for v in lines.levels if loss.min() < v < loss.max()]
    places = [(num_params, np.interp(-v, -loss, num_tokens)) for v in inside]
    places = [p for p in places if num_tokens[8] < p[1] < num_tokens[-8]]
    for text in ax.clabel(lines, manual=places, fmt=lambda v: f"{v:.4g}", fontsize=8.5, inline=False):
        text.set(zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})


def power_law(ax: Axes, table, quantity: str, predict: Callable | None = None, *, label: str = "fit") -> Axes:
    """Loss against one of N, D, C, and a law of it alone.

    A boolean column ``fitted`` of the table marks the runs behind the law; without it, all are. ``predict(x)``: loss,
    drawn dashed where no run was fitted.
    """
    known = table[table["loss"].notna()]
    fitted = known["fitted"].astype(bool) if "fitted" in known else known["loss"].notna()
    shade = colours(known["flops"].map(_two_digits))
    if not fitted.all():
        ax.plot(known[quantity][~fitted], known["loss"][~fitted], "o", color=FAINT, markersize=3.5, label="other runs")
    colour = [shade[_two_digits(c)] for c in known["flops"][fitted]]
    ax.scatter(known[quantity][fitted], known["loss"][fitted], c=colour, s=24, zorder=3, label="fitted runs")
    if predict is not None:
        for table, line, name in ((known, "--", None), (known[fitted], "-", label)):
            x = np.geomspace(table[quantity].min(), table[quantity].max(), 200)
            ax.plot(x, predict(x), line, color="black", linewidth=1.6 if name else 0.9, label=name)
    log_axis(ax.xaxis, quantity)
    log_axis(ax.yaxis, "loss")
    ax.set_ylim(known["loss"].min() / 1.06, known["loss"].max() * 1.06)
    ax.legend()
    return ax


def repetition(ax: Axes, table, predict: Callable | None = None, *, key: bool = True) -> Axes:
    """Loss of one size against how often its tokens were read: a colour for each number of unique tokens U.

    ``predict(num_params=, num_tokens=, unique_tokens=)``: loss, drawn as lines. ``key``: whether to draw the legend.
    """
    shade, marker = (f(table["unique_tokens"]) for f in (colours, markers))
    (size,) = table["num_params"].unique()
    for amount, rows in table.groupby("unique_tokens"):
        ax.plot(rows["epochs"], rows["loss"], marker[amount], color=shade[amount], label=f"$U$ = {compact(amount)}")
        if predict is not None:
            epochs = np.geomspace(rows["epochs"].min(), rows["epochs"].max(), 100)
            unique = np.full(100, float(amount))
            law = predict(num_params=np.full(100, float(size)), num_tokens=unique * epochs, unique_tokens=unique)
            ax.plot(epochs, law, color=shade[amount], linewidth=1.2)
    log_axis(ax.xaxis, "epochs")
    log_axis(ax.yaxis, "loss")
    ax.set_title(f"$N$ = {compact(size)}")
    if key:
        ax.legend(title="unique tokens")
    return ax


def residuals(ax: Axes, table, predicted, quantity: str = "num_tokens", *, key: bool = True) -> Axes:
    """Relative residual (loss / predicted - 1, in per cent) against N, D or C; markers are sizes, shades are compute.

    ``predicted``: loss of every row. The band is the RMS of the fitted rows; held-out rows are open. ``key``: whether
    to draw the legend, beside the axes.
    """
    table = table.assign(residual=100 * (table["loss"] / predicted - 1))
    table = table[table["residual"].notna()]
    held = table["holdout"].astype(bool) if "holdout" in table else table["residual"].isna()
    spread = float(np.sqrt(np.mean(table["residual"][~held] ** 2)))
    ax.axhspan(-spread, spread, color="0.92", linewidth=0, label=f"RMS of the fitted, {spread:.2g} %")
    ax.axhline(0, color="black", linewidth=0.8)
    budget = table["flops"].map(_two_digits)
    shade, marker = colours(budget), markers(table["num_params"])
    many = len(marker) > len(MARKERS)
    edges = budget.map({c: matplotlib.colors.to_hex(colour) for c, colour in shade.items()})
    # One call a marker, not a size: each call looks at all that is drawn already, minutes for thousands of sizes.
    for shape, rows in table.groupby(table["num_params"].map(lambda n: "o" if many else marker[n])):
        edge = edges[rows.index]
        ax.scatter(
            rows[quantity], rows["residual"], s=28, marker=shape,
            facecolors=np.where(held[rows.index], "white", edge), edgecolors=edge, linewidths=0.9, zorder=3,
        )  # fmt: skip
    log_axis(ax.xaxis, quantity)
    ax.set_ylabel("residual (% of the predicted loss)")
    if many and key:
        colour_bar(ax, list(shade), "flops")
    handles, _ = ax.get_legend_handles_labels()
    if not many:
        handles += [_marker_only(marker[n], "black", f"$N$ = {compact(n)}") for n in sorted(marker)]
    handles += _handles_if((held.any(), _marker_only("o", "white", "held out")))
    if key:  # where it cannot cover a point
        place = (
            {"loc": "lower left", "bbox_to_anchor": (0, 1)} if many else {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        )
        ax.legend(handles=handles, borderaxespad=0.2, **place)
    return ax


def _marker_only(marker: str, face: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="none", marker=marker, markeredgecolor="black", markerfacecolor=face, label=label)


def forecast(ax: Axes, rows: Sequence[Mapping], *, relative: bool = False) -> Axes:
    """Losses forecast before training, with their interval, and what training gave.

    ``rows``: fit.json's forecast; ``num_params`` where known puts a cell at its size, else cells stand side by side.
    ``relative``: forecast and interval as per cent of what training gave, where that is known.
    """
    if relative:
        rows = [r for r in rows if r.get("actual") is not None]
    rows = sorted(rows, key=lambda r: (r["flops"], r.get("num_params", 0)))
    # Equal sizes at two budgets would hide each other: side by side then.
    sizes = [r.get("num_params") for r in rows]
    by_size = all(sizes) and len(set(sizes)) == len(sizes)
    x = sizes if by_size else list(range(len(rows)))
    predicted = np.array([r["predicted"] for r in rows])
    actual = np.array([np.nan if r.get("actual") is None else r["actual"] for r in rows])
    lo, hi = np.array([r["interval"] for r in rows]).reshape(-1, 2).T
    if relative:
        lo, hi, predicted, actual = (100 * (v / actual - 1) for v in (lo, hi, predicted, actual))
    level = rows[0].get("level", 0.9) if rows else 0.9
    ax.vlines(x, lo, hi, color=tone(0.4), linewidth=6, alpha=0.45, label=f"forecast, {100 * level:g} % interval")
    ax.plot(x, predicted, "_", color=tone(0.15), markersize=11, markeredgewidth=1.6)
    ax.plot(x, actual, "x", color="black", markersize=6, markeredgewidth=1.5, zorder=4, label="actual")
    if by_size:
        log_axis(ax.xaxis, "num_params")
    else:
        names = [compact(n) if n else "" for n in sizes]
        ax.set_xticks(x, [f"{name}\n{scientific(r['flops'])}" for name, r in zip(names, rows)])
        ax.set_xlabel("held-out cell: parameters $N$, compute $C$ (FLOPs)")
    ax.set_ylabel("forecast against actual (%)" if relative else LABELS["loss"])
    ax.yaxis.set_major_locator(MaxNLocator(7))
    ax.margins(0.08, 0.12)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return ax


def forecast_rows(ax: Axes, rows: Sequence[Mapping], *, relative: bool = False) -> Axes:
    """The same of a few cells, each a row, top to bottom: as much is seen in a third of the height."""
    rows = sorted(rows, key=lambda r: (r["flops"], r.get("num_params") or 0))
    named: set[str] = set()

    def once(label: str) -> str | None:
        new = label not in named
        named.add(label)
        return label if new else None

    for place, row in enumerate(rows):
        if relative and row.get("actual") is None:
            continue  # its place stays empty: two such axes stand side by side
        whole = (lambda v, a=row["actual"]: 100 * (v / a - 1)) if relative else float
        level = f"forecast, {100 * row.get('level', 0.9):g} % interval"
        ax.hlines(place, *map(whole, row["interval"]), color=tone(0.4), linewidth=6, alpha=0.45, label=once(level))
        ax.plot(whole(row["predicted"]), place, "|", color=tone(0.15), markersize=11, markeredgewidth=1.6)
        if row.get("actual") is not None:
            ax.plot(whole(row["actual"]), place, "x", color="black", markersize=6, markeredgewidth=1.5, zorder=4,
                    label=once("actual"))  # fmt: skip
    sizes = [compact(r["num_params"]) if r.get("num_params") else "" for r in rows]
    names = [", ".join(filter(None, (size, scientific(r["flops"])))) for size, r in zip(sizes, rows)]
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.08)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("forecast against actual (%)" if relative else LABELS["loss"])
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return ax


def exponents(
    ax: Axes, rows: Sequence[tuple[str, float, Sequence[float] | None]], references: Mapping | None = None
) -> Axes:
    """Estimates of one exponent side by side: (name, value, interval), top to bottom, and published values as lines."""
    _rows_with_intervals(ax, rows, (0.0, 1.0))  # an exponent of a split lies in 0 to 1
    known = sorted((references or {}).items(), key=lambda pair: pair[1])
    for i, (name, value) in enumerate(known):
        ax.axvline(value, color=MUTED, linewidth=0.9, linestyle="--", zorder=0)
        # Outward from the outermost lines: two names may not meet, however close the lines are.
        side = "right" if i == 0 else "left" if i == len(known) - 1 else "center"
        ax.annotate(f"{name}: {value:.2f}", (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                    textcoords="offset points", ha=side, fontsize=9, color="0.3")  # fmt: skip
    ax.set_xlabel(r"exponent $a$ in $N^{*} \propto C^{\,a}$")
    return ax


def times_as_much(ax: Axes, rows: Sequence[tuple[str, float, Sequence[float] | None]], what: str) -> Axes:
    """Multipliers of groups side by side: (name, value, interval), top to bottom; 1 is the group they are held to."""
    known = [v for _, value, ends in rows for v in (value, *(ends or ())) if v]
    _rows_with_intervals(ax, rows, (min(known) / 2, max(known) * 2))
    ax.axvline(1.0, color=MUTED, linewidth=0.9, linestyle="--", zorder=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogTicks())
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(what)
    return ax


def _rows_with_intervals(ax: Axes, rows: Sequence[tuple], limits: tuple[float, float]) -> None:
    """A dot and its interval a row; an end that is null is one the data do not set, and reaches the limit."""
    for position, (_, value, interval) in enumerate(rows):
        if interval:
            ends = [limit if end is None else end for end, limit in zip(interval, limits)]
            ax.plot(ends, [position] * 2, color="black", linewidth=1.4, solid_capstyle="butt")
        if value is not None:
            ax.plot(value, position, "o", color="black", markersize=6)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def learning_rate(ax: Axes, cells: Sequence[Mapping]) -> Axes:
    """Loss against peak learning rate, a line per cell; a star on the best rate, open if it lies at the edge.

    ``cells``: ``name``, ``num_tokens``, ``batch_tokens`` (optional: the kind of line), ``rates``, ``losses`` (null:
    diverged, drawn as a cross at the top), ``best`` (a rate or null) and ``interior``.
    """
    shade, marker = (f([_two_digits(c["num_tokens"]) for c in cells]) for f in (colours, markers))
    for cell in sorted(cells, key=lambda c: (_two_digits(c["num_tokens"]), c.get("batch_tokens", 0))):
        tokens = _two_digits(cell["num_tokens"])
        # By the batch's own size, so that a line means the same in every panel; 2,048 tokens, the usual, are solid.
        dash = DASHES[round(math.log2(cell.get("batch_tokens", 2048) / 2048)) % len(DASHES)]
        known = [(r, l) for r, l in zip(cell["rates"], cell["losses"]) if l is not None]
        colour = shade[tokens]
        if known:
            ax.plot(*zip(*known), dash, marker=marker[tokens], color=colour, label=cell["name"], markersize=4)
        if cell["best"] is not None:
            face = "black" if cell["interior"] else "white"
            ax.plot(cell["best"], dict(known)[cell["best"]], **STAR, color="none", markerfacecolor=face, zorder=5)
        for rate in [r for r, l in zip(cell["rates"], cell["losses"]) if l is None]:
            ax.plot(rate, 0.97, "x", color=colour, transform=ax.get_xaxis_transform(), clip_on=False)
    log_axis(ax.xaxis, "peak_lr")
    ax.set_ylabel(LABELS["loss"])
    # Room for the legend above the curves, which open upward on both sides, so that no corner is free.
    legend = min(0.6, 0.08 * (len(cells) + 1))
    low, high = ax.get_ylim()
    ax.set_ylim(low, low + (high - low) / (1 - legend))
    ax.legend(title=LABELS["num_tokens"], loc="upper right")
    return ax


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
            label=None if many else compact(size),
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
