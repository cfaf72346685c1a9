"""Figures of what was forecast and what came, and of the runs that a design bought to know more."""

from matplotlib.figure import Figure

from scaling.report import plots, plots_of_fits
from scaling.report.figures.drawing import FULL, HALF, Drawing, Seen, engineering_flops, part

FEW_CELLS = 4  # held out: so many are rows of a low figure


def forecast(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    rows = fit.get("forecast") or []
    if not rows:
        return None
    sizes = dict(zip(done["label"], done["num_params"]))
    rows = [{"num_params": sizes.get(r["run_id"]), **r} for r in rows]
    few = len(rows) <= FEW_CELLS
    figure = Figure(figsize=(FULL, 1.2 + 0.3 * len(rows) if few else 3.7))
    left, right = figure.subplots(1, 2)
    draw = plots.forecast_rows if few else plots.forecast
    draw(left, rows)
    draw(right, rows, relative=True)
    right.get_legend().remove()
    if few:
        right.set_yticks([])
    caption = "Held-out cells: the loss forecast from the fitted runs and the loss that training gave."
    return Drawing("forecast", "Forecast and outcome", caption, figure)


def forecast_growth(seen: Seen) -> Drawing | None:
    fit = seen.fit
    members = part(fit, "combination").get("members") or []
    if not members:
        return None
    figure = Figure(figsize=(FULL, 3.7))
    left, right = figure.subplots(1, 2)
    plots_of_fits.forecast_growth(left, members)
    plots_of_fits.forecast_distance(right, members)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    caption = (
        "Each form, fitted to the runs up to some compute, forecasts every run beyond it: by the range that was "
        "fitted, and by how far beyond it the run lies. The forecast of new runs weighs the forms by these errors and "
        "by how far off it lies; the weights here are those at ten times the largest compute."
    )
    return Drawing("forecast_growth", "Forecast error against compute held out", caption, figure)


def rounds(seen: Seen) -> Drawing | None:
    """Of a design that bought its cells in rounds."""
    design = part(seen.fit, "design")
    rounds = design.get("rounds") or []
    if not any(r["width_after"] is not None for r in rounds):
        return None
    orders = design.get("orders")
    figure = Figure(figsize=(FULL if orders else HALF, 4.2))
    ax = plots_of_fits.interval_by_cost(figure.subplots(), rounds, design.get("interval"), orders)
    ax.set_ylabel(f"width of the {100 * design['level']:.0f} % interval of {design['target']}")
    caption = (
        "After each round, from the cells bought by then, and what its choice had expected. Compute counts steps that "
        "runs share once, and no held-out cell."
    )
    if orders:
        took = {order: engineering_flops(c) for order, c in orders["reached_flops"].items()}
        caption += (
            " Lines: what cells in that order are expected to leave, all under the last law, priced as if none had "
            f"been trained. For the width at the end the order as bought takes {took['designed']} FLOPs, budget by "
            f"budget takes {took['by_budget']}, at random {took['random']} ({took['random_low']} to "
            f"{took['random_high']} in eight of ten of {orders['random']['orders']} orders)."
        )
    return Drawing("rounds", "Interval against compute bought", caption, figure)
