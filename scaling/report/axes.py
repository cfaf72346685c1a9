"""How every axis looks: style, ticks, units, colours, markers."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm

from scaling.numbers import compact
from scaling.report.words import POWER

MARKERS = "os^DvPX*"
DASHES = ("-", "--", "-.", ":")
STAR = {"marker": "*", "markersize": 11, "markeredgecolor": "black", "linestyle": "none"}
INK, MUTED, FAINT = "0.10", "0.45", "0.80"
# Lighter than this a line is lost on white paper.
_COLOURS = matplotlib.colormaps["viridis"].resampled(256)
_LIGHTEST = 0.78

# STIX comes with matplotlib, so a figure has the same letters on every machine.
STYLE = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "0.35",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.91",
    "grid.linewidth": 0.6,
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.title_fontsize": 9.5,
    "legend.handlelength": 2.0,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "scaling",
}

LABELS = {
    "num_params": "parameters $N$",
    "num_tokens": "training tokens $D$",
    "flops": "training compute $C$ (FLOPs)",
    "loss": "validation loss $L$ (nats per token)",
    "tokens_per_param": "tokens per parameter $D/N$",
    "peak_lr": "peak learning rate",
    "epochs": "epochs $D/U$",
    "position": "place in the window (tokens read)",
}


def style():
    """Context in which the figures of this project are drawn and saved; whatever the user's matplotlibrc says."""
    return matplotlib.style.context(["default", STYLE])


def scientific(value: float, _position=None) -> str:
    """Mathtext: 3×10¹¹, and 10¹² without a factor of one."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = f"10^{{{int(exponent)}}}"
    factor = f"{float(mantissa):g}"
    return f"${power}$" if factor == "1" else rf"${factor}{{\times}}{power}$"


class LogTicks(ticker.Locator):
    """``fewest`` to eight labelled ticks on a logarithmic axis, however short or long it is."""

    SUBDIVISIONS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))

    def __init__(self, fewest: int = 4):
        self.fewest = fewest

    def __call__(self):
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin, vmax):
        lo, hi = sorted((vmin, vmax))
        if lo <= 0:
            return []
        decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
        for factors in self.SUBDIVISIONS:
            inside = [f * 10.0**d for d in decades for f in factors if lo <= f * 10.0**d <= hi]
            if len(inside) >= self.fewest:
                break
        else:  # too short for round factors: evenly spaced, as on a linear axis
            evenly = ticker.MaxNLocator(6, steps=[1, 2, 5, 10], min_n_ticks=4).tick_values(lo, hi)
            inside = [t for t in evenly if lo <= t <= hi]
        return inside[:: math.ceil(len(inside) / 8)]


_WRITERS: Mapping[str, Callable] = {"flops": scientific, "num_params": compact, "num_tokens": compact}


def mathtext(equation: str) -> str:
    """A form's equation as mathtext, its exponents raised."""
    return "$" + re.sub(POWER, lambda m: f"^{{{m[1]}}}", equation) + "$"


def log_axis(axis, quantity: str) -> None:
    """Makes an axis logarithmic, ticked and labelled for ``quantity`` (a key of ``LABELS``)."""
    ax = axis.axes
    (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
    # 3×10¹¹ is wide: three such labels are enough.
    axis.set_major_locator(LogTicks(fewest=3 if quantity == "flops" else 4))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(_WRITERS.get(quantity, lambda v, _: f"{v:g}")))
    axis.set_label_text(LABELS[quantity])


def tone(fraction: float) -> tuple:
    """A colour of the scale: 0 dark, 1 the lightest that paper bears."""
    return _COLOURS(_LIGHTEST * fraction)


def colours(values: Sequence[float]) -> dict[float, tuple]:
    """A colour for each distinct value: dark to light with its logarithm."""
    distinct = sorted(set(values))
    if not distinct:
        return {}
    lo, hi = math.log(distinct[0]), math.log(distinct[-1])
    return {v: tone((math.log(v) - lo) / (hi - lo) if hi > lo else 0.3) for v in distinct}


def colour_bar(ax: Axes, values: Sequence[float], quantity: str) -> None:
    """The key to ``colours(values)`` where a legend would be too long; ``quantity`` is a key of ``LABELS``."""
    scale = ListedColormap([tone(f) for f in np.linspace(0, 1, 256)])
    lo, hi = min(values), max(values)
    bar = ax.figure.colorbar(ScalarMappable(LogNorm(lo, hi), scale), ax=ax, pad=0.02, aspect=32, label=LABELS[quantity])
    bar.ax.minorticks_off()
    ticks = LogTicks(fewest=3).tick_values(lo, hi)
    bar.set_ticks(ticks, labels=[_WRITERS[quantity](t) for t in ticks])
    bar.outline.set_visible(False)


def markers(values) -> dict[float, str]:
    """A marker for each distinct value."""
    return dict(zip(sorted(set(values)), itertools.cycle(MARKERS)))
