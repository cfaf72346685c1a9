"""The figures of a sweep, composed: which plots, side by side how, with which caption; saved as SVG and PNG."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scaling import records, storage
from scaling.laws.tables.observations import HELD_OUT, LEFT_OUT, as_counted
from scaling.report import plots
from scaling.report.axes import LABELS
from scaling.report.figures import of_forecasts, of_groups, of_laws, of_training
from scaling.report.figures.drawing import HALF, USUAL_UNIT, Drawing, Seen, convention, labels, loss_unit


@dataclass(frozen=True)
class Saved:
    name: str
    title: str
    caption: str
    svg: Path
    png: Path
    wide: bool  # takes the width of a page, not half of it


def write(
    folder: Path, table, fit: Mapping, runs: Sequence[records.RunRecord] = (), groups: Sequence[Mapping] = ()
) -> list[Saved]:
    """Draws every figure that the data allow and writes each to ``folder`` as SVG and PNG.

    The same data give the same bytes: no date is written.

    Args:
      table: of ``records``, or a CSV's.
      fit: fit.json; may be empty.
      runs: the records that the table is of; none of a CSV's.
      groups: rows of groups with laws of their own (``group_rows``), of which the figures are then.
    """
    folder = storage.folder(folder)
    saved = []
    with plots.style():
        for d in draw(table, fit, runs, groups):
            _name_convention(d.figure, fit)
            svg, png = folder / f"{d.name}.svg", folder / f"{d.name}.png"
            # Laid out once and drawn once for each: savefig would draw twice, and lay out each time.
            png_canvas = FigureCanvasAgg(d.figure)
            d.figure.set_dpi(matplotlib.rcParams["savefig.dpi"])
            d.figure.get_layout_engine().execute(d.figure)
            d.figure.set_layout_engine("none")
            _save(png_canvas.print_png, png, {"Software": None})
            _save(FigureCanvasSVG(d.figure).print_svg, svg, {"Date": None, "Creator": None})
            saved.append(Saved(d.name, d.title, d.caption, svg, png, d.figure.get_figwidth() > HALF))
    return saved


def _save(print_to: Callable, path: Path, metadata: Mapping) -> None:
    drawn = io.BytesIO()
    print_to(drawn, metadata=metadata)
    storage.write(path, drawn.getvalue(), synced=False)


def _name_convention(figure: Figure, fit: Mapping) -> None:
    """Says on the axes how N and C are counted and what the loss is in: a figure leaves the report sooner or later."""
    counted, unit = convention(fit), loss_unit(fit)
    named = {
        LABELS["num_params"]: f"{counted['num_params'].replace('_', '-')} parameters $N$",
        LABELS["flops"]: f"training compute $C$ (FLOPs, rule {counted['flops']})",
    }
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        # "as given", in a CSV, says no more than the plain label.
        text = named.get(axis.get_label_text(), "given")
        if "given" not in text:
            axis.set_label_text(text)
        elif USUAL_UNIT in axis.get_label_text():
            axis.set_label_text(axis.get_label_text().replace(USUAL_UNIT, unit))


def draw(table, fit: Mapping, runs: Sequence[records.RunRecord] = (), groups: Sequence[Mapping] = ()) -> list[Drawing]:
    """The figures of ``write``, in the order in which a reader asks (``FIGURES``). Call inside ``plots.style()``."""
    table = as_counted(table, convention(fit))
    done = table.assign(label=labels(table))[table["loss"].notna()]
    if "status" in done:
        done = done[done["status"] == "completed"]
    # A CSV does not say which rows --holdout-flops left out; the fit does.
    held = {row.get("run") for row in fit.get("excluded") or [] if row.get("reason") in (HELD_OUT, LEFT_OUT)}
    if held:
        done = done.assign(holdout=done["label"].isin(held))
    seen = Seen(done, fit, runs, groups)
    wanted = COMPARED if fit.get("multiplier") or groups else FIGURES
    drawn = [drawing for figure in wanted if (drawing := figure(seen))]
    if of_training.is_about_rates(of_training.rates(fit), done):
        drawn.sort(key=lambda d: d.name != "learning_rate")
    return drawn


# In the order in which a reader asks: what is the law, how sure, does it forecast, what follows, what is doubtful. Of
# figures half as wide as the page two in a row stand side by side.
FIGURES = (
    of_laws.isoflop, of_laws.surface, of_laws.power_laws, of_laws.repetition,
    of_laws.exponents, of_laws.profiles, of_laws.clouds,
    of_forecasts.forecast, of_forecasts.forecast_growth, of_forecasts.rounds,
    of_laws.allocation,
    of_laws.residuals, of_training.curves, of_laws.excess, of_training.positions, of_training.learning_rate,
)  # fmt: skip
# Those of groups that are compared; each has the others on a page of its own.
COMPARED = (of_groups.groups, of_groups.multiplier, of_forecasts.rounds, of_groups.positions_compared)
