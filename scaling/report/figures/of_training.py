"""Figures of runs, with no law between: their curves, loss by place in the window, loss by rate."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from scaling import records
from scaling.laws.answers import truth
from scaling.laws.tables.observations import as_counted
from scaling.numbers import compact
from scaling.report import plots
from scaling.report.figures.drawing import FULL, HALF, Drawing, Seen, convention, count, part


def curves(seen: Seen) -> Drawing | None:
    curves, fit, least = records.curves(seen.runs), seen.fit, truth.least_loss(seen.done)
    if not len(curves):
        return None
    curves = as_counted(curves, convention(fit))
    figure = Figure(figsize=(FULL, 4.6))
    envelope = part(fit, "envelope")
    ax = plots.loss_curves(figure.subplots(), curves, envelope.get("points") or ())
    if least is not None:
        plots.line(ax, least)
    caption = "Validation loss as runs go. A marker is a run's final loss."
    if envelope.get("points"):
        caption += f" The envelope is over {count(envelope.get('num_runs', 0), 'fitted run')}"
        caption += f"; {envelope['note']}." if envelope.get("note") else "."
    return Drawing(
        "curves", f"Training curves{' and their envelope' if envelope.get('points') else ''}", caption, figure
    )


def positions(seen: Seen) -> Drawing | None:
    """Of every family and size the run that read most tokens."""
    positions = records.positions(seen.runs)
    if not len(positions):
        return None
    longest = positions.groupby(["family", "num_params"])["num_tokens"].transform("max")
    shown = positions[positions["num_tokens"] == longest]
    figure = Figure(figsize=(HALF, 4.2))
    plots.loss_by_position(figure.subplots(), shown)
    caption = (
        "Validation loss by place in the window, of every size the run with most tokens. What a model makes of what it "
        "has read shows in how far the line falls; where it flattens out, more of it no longer helps."
    )
    return Drawing("positions", "Loss by place in the window", caption, figure)


def rates(fit: Mapping) -> Sequence[Mapping]:
    return fit.get("learning_rates") or ()


def is_about_rates(learning_rates: Sequence[Mapping], table) -> bool:
    """Whether most runs are there to find a rate: then a law through all of them is beside the point."""
    return sum(len(cell["rates"]) for cell in learning_rates) > len(table) / 2


def learning_rate(seen: Seen) -> Drawing | None:
    cells = rates(seen.fit)
    if not cells:
        return None
    sizes = sorted({c["num_params"] for c in cells})
    columns = min(3, len(sizes))
    rows = -(-len(sizes) // columns)
    figure = Figure(figsize=(FULL if columns > 1 else HALF, 3.6 * rows))
    figure.get_layout_engine().set(h_pad=0.12)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, size in zip(axes, sizes):
        plots.learning_rate(ax, [c for c in cells if c["num_params"] == size])
        ax.set_title(f"$N$ = {compact(size)}")
    for ax in axes[len(sizes) :]:
        ax.remove()
    edge = sum(not c["interior"] for c in cells)
    where = (
        f"in {count(edge, 'cell')} it lies at the edge of the range"
        if edge
        else "in every cell it lies inside the range"
    )
    caption = (
        f"Final loss against the peak rate, a panel per size, a line per horizon. A star is the best rate: {where}."
    )
    return Drawing("learning_rate", "Learning rate", caption, figure)
