"""The figures of a sweep, composed: which plots, side by side how, with which caption; saved as SVG and PNG."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scaling import records, storage
from scaling.laws.answers import truth
from scaling.laws.answers.approaches import select
from scaling.laws.forms import catalogue
from scaling.laws.tables.observations import HELD_OUT, LEFT_OUT, as_counted, from_table
from scaling.numbers import compact
from scaling.report import plots, plots_of_fits
from scaling.report.axes import LABELS, mathtext
from scaling.report.plots import excess, line

FULL, HALF = 11.0, 5.6  # widths of a figure in inches: the page, and half of it
USUAL_UNIT = "nats per token"  # of a loss, where nothing says otherwise
FEW_CELLS = 4  # held out: so many are rows of a low figure
# Exponents of N* ∝ C^a to hold one's own against.
PUBLISHED_EXPONENTS = {"Hoffmann et al. 2022": 0.50, "Kaplan et al. 2020": 0.73}


@dataclass(frozen=True)
class Drawing:
    """A figure, its file name's stem, and the words that go with it."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Saved:
    name: str
    title: str
    caption: str
    svg: Path
    png: Path
    wide: bool  # takes the width of a page, not half of it


@dataclass(frozen=True)
class Seen:
    """What figures are drawn from.

    Args:
      done: the table of runs that have a loss, counted as the fit counts, with a ``label`` each.
      fit: fit.json; may be empty.
      runs: the records that the table is of; none of a CSV's.
      groups: rows of groups with laws of their own (``group_rows``).
    """

    done: Any
    fit: Mapping
    runs: Sequence[records.RunRecord] = ()
    groups: Sequence[Mapping] = ()


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


def loss_unit(fit: Mapping) -> str:
    return fit.get("loss_unit", USUAL_UNIT)


def convention(fit: Mapping) -> Mapping[str, str]:
    return fit.get("convention") or {"num_params": "non_embedding", "flops": "exact"}


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
    if is_about_rates(_rates(fit), done):
        drawn.sort(key=lambda d: d.name != "learning_rate")
    return drawn


def _rates(fit: Mapping) -> Sequence[Mapping]:
    return fit.get("learning_rates") or ()


def is_about_rates(learning_rates: Sequence[Mapping], table) -> bool:
    """Whether most runs are there to find a rate: then a law through all of them is beside the point."""
    return sum(len(cell["rates"]) for cell in learning_rates) > len(table) / 2


def labels(table) -> list[str]:
    """Rows as fit.json names them."""
    for column in ("run_id", "run", "name", "run_name"):
        if column in table:
            return table[column].astype(str).tolist()
    return [f"row {i}" for i in range(len(table))]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _part(fit: Mapping, key: str) -> Mapping:
    return fit.get(key) or {}


def predictor(fit: Mapping, law: str | None = None):
    """A fitted law as a function of its columns (num_params=…, num_tokens=…); by default the one allocation is from.

    None if it was not fitted, or is a form of the user's that is not known here.
    """
    law = law or _part(fit, "allocation").get("law")
    fitted = _part(fit, "laws").get(law)
    if not fitted or law not in catalogue.FORMS:
        return None
    form = catalogue.FORMS[law]
    return lambda **columns: form.predict(fitted["params"], **columns)


def exponent_rows(fit: Mapping) -> list[dict]:
    """Exponents of N* ∝ C^a, D* ∝ C^b by every approach that gave one: name, a, a_interval, b, b_interval."""
    isoflop, law = _part(fit, "isoflop"), _part(fit, "allocation")
    local = {"a": law.get("a_local"), "a_interval": law.get("a_local_interval")}
    found = {
        "1  envelope of curves": _part(fit, "envelope"),
        "2  IsoFLOP minima, parabola": isoflop,
        "2  IsoFLOP minima, interpolated": _part(isoflop, "interpolated"),
        "3  parametric law, fitted range": local,
        "3  parametric law, asymptotic": law,
    }
    for name, other in (law.get("by_law") or {}).items():
        found[f"3  {name}, fitted range"] = {"a": other.get("a_local"), "a_interval": other.get("a_local_interval")}
    keys = ("a", "a_interval", "b", "b_interval")
    return [{"name": n} | {k: part.get(k) for k in keys} for n, part in found.items() if part.get("a") is not None]


def _exponents(seen: Seen) -> Drawing | None:
    fit = seen.fit
    rows = exponent_rows(fit)
    if len(rows) < 2:  # nothing to compare
        return None
    figure = Figure(figsize=(FULL, 1.2 + 0.27 * len(rows)))
    plots.exponents(figure.subplots(), [(r["name"], r["a"], r["a_interval"]) for r in rows], PUBLISHED_EXPONENTS)
    caption = (
        "Exponent of N* against C by each approach, with 95 % intervals. The asymptotic one is β/(α+β), where the head "
        "and attention no longer count; the one over the fitted range is what IsoFLOP minima estimate."
    )
    return Drawing("exponents", "How model size grows with compute", caption, figure)


def _excess(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    least = truth.least_loss(done)
    if least is None or not (done["loss"] > least).any():
        return None
    figure = Figure(figsize=(HALF, 4.4))
    excess(figure.subplots(), done[done["loss"] > least], least, fit.get("frontier") or [])
    caption = (
        f"What runs lose beyond {least:.4f} nats per token, what the source itself has on this validation split. "
        "A law whose irreducible loss is too high plunges here, one that has it too low flattens out."
    )
    return Drawing("excess", "Loss beyond the least possible", caption, figure)


def _isoflop(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    budgets = _part(fit, "isoflop").get("budgets") or []
    if not budgets:
        return None
    figure = Figure(figsize=(HALF, 4.4))
    ax = plots.isoflop(figure.subplots(), budgets)
    if (least := truth.least_loss(done)) is not None:
        line(ax, least)
    bracketed = sum(b["minimum"]["bracketed"] for b in budgets)
    caption = (
        "Final loss against size at equal compute, with the parabola in log N through each budget and its minimum. "
        f"Runs bracket the minimum in {bracketed} of {_count(len(budgets), 'budget')}."
    )
    return Drawing("isoflop", "IsoFLOP profiles", caption, figure)


def _allocation(seen: Seen) -> Drawing | None:
    fit = seen.fit
    frontier = fit.get("frontier") or []
    minima = _part(fit, "isoflop").get("minima") or []
    if not frontier and not any(m.get("num_params") for m in minima):
        return None
    figure = Figure(figsize=(FULL, 3.7))
    axes = figure.subplots(1, 3)
    fitted = _part(fit, "allocation").get("fitted_flops")
    # The envelope reaches down to the first steps of training; a decade of it is enough beside the rest.
    lowest = (fitted[0] if fitted else min(m["flops"] for m in minima)) / 10
    envelope = [p for p in _part(fit, "envelope").get("points") or [] if p["flops"] >= lowest]
    for ax, quantity in zip(axes, ("num_params", "num_tokens", "tokens_per_param")):
        plots.allocation(ax, quantity, frontier, minima, envelope, fitted)
        ax.get_legend().remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=5)
    caption = "Size, tokens and their ratio that spend a budget best, by each approach."
    if frontier:
        caption += (
            " The line is the optimum of the parametric law at what the runs' own tokens cost, dashed outside the "
        )
        caption += "compute that was fitted; the band is its 95 % interval."
    return Drawing("allocation", "Compute-optimal size and data", caption, figure)


def _surface(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    predict = predictor(fit)
    if predict is None:
        return None
    figure = Figure(figsize=(HALF, 4.4))
    frontier = fit.get("frontier") or []
    plots.surface(figure.subplots(), done, lambda n, d: predict(num_params=n, num_tokens=d), frontier)
    held = bool(done["holdout"].any()) if "holdout" in done else False
    caption = f"Contours of the fitted loss, {loss_unit(fit)}; markers are runs{', open if held out' if held else ''}."
    return Drawing("surface", "The parametric surface L(N, D)", caption, figure)


def _forecast(seen: Seen) -> Drawing | None:
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


def group_rows(groups: Mapping[str, Mapping], compared: Mapping) -> list[dict]:
    """A row for each group that has laws of its own: its exponent, E and best ratio, each with its interval, and how
    many times the compute of the first group it saves.

    Args:
      groups: fit.json by the group's name.
      compared: fit.json's multiplier of all of them; may be empty.
    """
    names, apart = list(groups), (compared.get("sharing") or {}).get("rejected", False)
    return [
        {"name": name, **_answers_of(fit), **_times(compared, *(n.rpartition("=")[2] for n in (name, names[0])), apart)}
        for name, fit in groups.items()
    ]


def _answers_of(fit: Mapping) -> dict:
    """Of one group's fit.json what stands beside the others'; null where there is none."""
    law, isoflop = _part(fit, "allocation"), _part(fit, "isoflop")
    surface = _part(_part(fit, "laws"), law.get("law"))
    top = (law.get("fitted_flops") or [0, 0])[1] * 1.02
    ratios = {float(c): entry for c, entry in _part(law, "tokens_per_param").items() if float(c) <= top}
    ratio = ratios[max(ratios)] if ratios else {}
    bracketed = isoflop if isoflop.get("num_bracketed", 0) >= 3 else {}
    a = "a_local" if law.get("a_local") is not None else "a"
    return {
        "num_observations": fit.get("num_observations"),
        "a": law.get(a), "a_interval": law.get(f"{a}_interval"),
        "a_isoflop": bracketed.get("a"), "a_isoflop_interval": bracketed.get("a_interval"),
        "E": _part(surface, "params").get("E"), "E_interval": _part(surface, "intervals").get("E"),
        "ratio": ratio.get("value"), "ratio_interval": ratio.get("interval"),
    }  # fmt: skip


def _times(compared: Mapping, name: str, first: str, apart: bool) -> dict:
    """How many times as much ``first`` takes as this group, at the most compute inside both groups' fits."""
    key = "apart_" if apart else ""
    for pair in compared.get("pairs") or ():
        inside = [p for p in pair["points"] if not p["extrapolated"]]
        if {pair["group"], pair["over"]} != {name, first} or name == first or not inside:
            continue
        value, ends = inside[-1].get(f"{key}value"), inside[-1].get(f"{key}interval")
        if pair["group"] == first and value:  # told the other way
            value, ends = 1 / value, ends and [None if end is None else 1 / end for end in reversed(ends)]
        return {"times": value, "times_interval": ends}
    return {"times": None, "times_interval": None}


def _groups(seen: Seen) -> Drawing | None:
    """Exponents of all groups, and what each saves over the first, one below the other."""
    rows = [row for row in seen.groups if row["a"] is not None]
    if len(rows) < 2:
        return None
    told = [row for row in seen.groups if row["times"] is not None]
    figure = Figure(figsize=(FULL, 1.3 + 0.3 * max(len(rows), len(told))))
    axes = figure.subplots(1, 2 if told else 1, squeeze=False)[0]
    names = [(row["name"].rpartition("=")[2], row["a"], row["a_interval"]) for row in rows]
    plots.exponents(axes[0], names, PUBLISHED_EXPONENTS)
    caption = "Exponent of N* against C of each group's own law, over its fitted range, with its interval."
    if told:
        first = seen.groups[0]["name"].rpartition("=")[2]
        what = "compute" if seen.fit["multiplier"]["axis"] == "flops" else "of it"
        times = [(row["name"].rpartition("=")[2], row["times"], row["times_interval"]) for row in told]
        plots.times_as_much(axes[1], times, f"times the {what} that {first} takes for the same loss")
        caption += f" Right: how many times as much {first} takes, at the most that both were fitted to."
    return Drawing("groups", "Groups side by side", caption, figure)


def _multiplier(seen: Seen) -> Drawing | None:
    compared = _part(seen.fit, "multiplier")
    if not compared.get("pairs"):  # of groups that could not be compared there is the column alone
        return None
    figure = Figure(figsize=(FULL, 4.4))
    plots_of_fits.multipliers(figure.subplots(), compared["pairs"], compared["axis"], compared["level"])
    caption = (
        "How many times as much the second of two groups takes for the loss that the first has for what is on the "
        f"axis, by {compared['equation']} with exponents shared, and its {100 * compared['level']:.0f} % interval. "
        "Dashed: outside what was fitted; dotted: by laws fitted apart."
    )
    return Drawing("multiplier", "How much better", caption, figure)


def _positions_compared(seen: Seen) -> Drawing | None:
    """Of every group that was compared the run with the least loss."""
    positions, column = records.positions(seen.runs), _part(seen.fit, "multiplier").get("column")
    if not len(positions) or column is None:
        return None
    done = records.with_coordinate(records.table(seen.runs), seen.runs, column)
    done = done[done["status"] == "completed"]
    best = done.loc[done.groupby(column)["loss"].idxmin()].set_index("run_id")[column]
    shown = positions[positions["run_id"].isin(best.index)]
    figure = Figure(figsize=(FULL, 4.4))
    plots.positions_of_groups(figure.subplots(), shown.assign(group=shown["run_id"].map(best)))
    caption = (
        "Validation loss by place in the window, of every group the run with the least loss. A model that uses what it "
        "has read goes on falling; one that forgets it flattens out."
    )
    return Drawing("positions", "Loss by place in the window", caption, figure)


def _repetition(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    # Up to four epochs repeated tokens are as good as new (Muennighoff et al. 2023): nothing to see.
    if not {"epochs", "unique_tokens"} <= set(done) or not (done["epochs"] > 4).any():
        return None
    sizes = [rows for _, rows in done.groupby("num_params") if rows["epochs"].nunique() > 1]
    if not sizes:
        return None
    law = next(
        (
            name
            for name in _part(fit, "laws")
            if name in catalogue.FORMS and "unique_tokens" in catalogue.FORMS[name].columns
        ),
        None,
    )
    columns = min(4, len(sizes))
    rows = -(-len(sizes) // columns)
    figure = Figure(figsize=(FULL, 3.4 * rows))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, table in zip(axes, sizes):
        plots.repetition(ax, table, law and predictor(fit, law), key=ax is axes[len(sizes) - 1])
        ax.label_outer()
    for ax in axes[len(sizes) :]:
        ax.remove()
    caption = "Loss against how often the same tokens were read, a panel for each size."
    if law:
        caption += f" Lines: {catalogue.FORMS[law].equation}, fitted to all of them."
    return Drawing("repetition", "Repeated tokens", caption, figure)


def _residuals(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    predict = predictor(fit)
    if predict is None:
        return None
    figure = Figure(figsize=(FULL, 3.7))
    axes = figure.subplots(1, 2, sharey=True)
    predicted = predict(num_params=done["num_params"], num_tokens=done["num_tokens"])
    for ax, quantity in zip(axes, ("num_tokens", "flops")):
        plots.residuals(ax, done, predicted, quantity, key=ax is axes[-1])
    axes[1].set_ylabel("")
    caption = (
        "Loss above (+) or below (−) the parametric law; darker is less compute. A pattern is what the law cannot say."
    )
    return Drawing("residuals", "Residuals of the parametric law", caption, figure)


def _profiles(seen: Seen) -> Drawing | None:
    fit = seen.fit
    law = _part(fit, "laws").get(_part(fit, "allocation").get("law")) or {}
    walked = law.get("profiles") or {}
    if not walked or "profile_cut" not in law:  # a fit.json older than the cut
        return None
    derived = _part(_part(fit, "allocation"), "profiles")
    panels = [(k, p | {"interval": law["profile_intervals"][k]}, law["params"][k]) for k, p in walked.items()]
    panels += [(k, p, p["value"]) for k, p in derived.items() if len(p["grid"]) > 2]
    columns, rows = 4, -(-len(panels) // 4)
    figure = Figure(figsize=(FULL, 2.35 * rows))
    figure.get_layout_engine().set(h_pad=0.07, w_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False)
    resampled = law.get("bootstrap_intervals") or {}
    resampled |= {k: v for k in ("a", "b", "a_local") if (v := fit["allocation"].get(f"{k}_bootstrap_interval"))}
    for ax, (name, entry, value) in zip(axes.ravel(), panels):
        plots_of_fits.profile(ax, name, entry, law["profile_cut"], value, resampled.get(name))
    for ax in axes.ravel()[len(panels) :]:
        ax.remove()
    for ax in axes[:, 0]:
        ax.set_ylabel("deviance")
    top = _part(fit, "allocation").get("fitted_flops")
    caption = (
        "How much worse the law fits when one quantity is held and all else refitted (dots). The shaded interval ends "
        f"where the deviance crosses the dashed level ({100 * law['level']:.0f} %); the bar below is the bootstrap's."
    )
    if derived and top:
        caption += f" N*, D*, their ratio and L* are those at {engineering_flops(top[1])} FLOPs, the largest fitted."
    return Drawing("profiles", "Profile likelihoods", caption, figure)


def engineering_flops(value: float) -> str:
    """2.9e19, without the plus that Python writes."""
    return f"{value:.2g}".replace("e+", "e")


def _clouds(seen: Seen) -> Drawing | None:
    fit = seen.fit
    name = _part(fit, "allocation").get("law")
    law = _part(fit, "laws").get(name) or {}
    draws = law.get("draws") or {}
    pairs = cloud_pairs(catalogue.FORMS[name]) if name in catalogue.FORMS else []
    if len(next(iter(draws.values()), ())) < 20 or not pairs:
        return None
    figure = Figure(figsize=(FULL, 3.2))
    for ax, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs):
        plots_of_fits.cloud(ax, draws, law["params"], pair)
    caption = (
        f"{len(next(iter(draws.values())))} of the {law['num_bootstrap']} bootstrap replicates; the star is the fit. "
        "An amplitude and its exponent move together so closely that neither means much without the other."
    )
    return Drawing("clouds", "How the parameters move together", caption, figure)


def cloud_pairs(form) -> list[tuple[str, str]]:
    """Pairs worth seeing: the exponents, each amplitude with its exponent, the offset with the first exponent."""
    with_exponent = [
        (name, p.of[0][0])
        for name, p in form.parameters.items()
        if p.kind == "amplitude" and p.of[0][0] in form.parameters
    ]
    exponents = list(dict.fromkeys(e for _, e in with_exponent))
    pairs = [tuple(exponents[:2])] if len(exponents) > 1 else []
    pairs += with_exponent[:2]
    if "E" in form.parameters and exponents:
        pairs.append(("E", exponents[0]))
    return pairs


def _forecast_growth(seen: Seen) -> Drawing | None:
    fit = seen.fit
    members = _part(fit, "combination").get("members") or []
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


def _rounds(seen: Seen) -> Drawing | None:
    """Of a design that bought its cells in rounds."""
    design = _part(seen.fit, "design")
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


def _power_laws(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    panels = {"num_params": "kaplan_n", "num_tokens": "kaplan_d", "flops": "kaplan_c"}
    found = {q: law for q, name in panels.items() for law in (name, f"{name}_offset") if predictor(fit, law)}
    if not found:
        return None
    figure = Figure(figsize=(FULL, 3.7))
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    excluded = {row.get("run") for row in fit.get("excluded") or []}
    candidates = done[~done["label"].isin(excluded)]
    columns = candidates[["label", "num_params", "num_tokens", "flops", "loss"]].rename(columns={"label": "run"})
    given = from_table(columns, units_known=True)
    for ax, (quantity, law) in zip(axes, found.items()):
        rows, _ = select(given, catalogue.FORMS[law])
        predict = predictor(fit, law)
        shown = done.assign(fitted=done["label"].isin(given.run[rows]))
        label = mathtext(catalogue.FORMS[law].equation.split(" = ", 1)[-1])
        plots.power_law(ax, shown, quantity, lambda x, q=quantity, p=predict: p(**{q: x}), label=label)
        alpha = fit["laws"][law]["params"]["alpha"]
        ax.set_title(f"$\\alpha$ = {alpha:.3f}")
        if (least := truth.least_loss(done)) is not None:
            line(ax, least)
    for ax in axes[1:]:
        ax.set_ylabel("")
    caption = (
        "Each law of one quantity is fitted where nothing else limits the loss: to the runs that no run with as little "
        "of that quantity beats. The others, held-out runs among them, are grey."
    )
    return Drawing("power_laws", "Loss against size, data or compute alone", caption, figure)


def _curves(seen: Seen) -> Drawing | None:
    curves, fit, least = records.curves(seen.runs), seen.fit, truth.least_loss(seen.done)
    if not len(curves):
        return None
    curves = as_counted(curves, convention(fit))
    figure = Figure(figsize=(FULL, 4.6))
    envelope = _part(fit, "envelope")
    ax = plots.loss_curves(figure.subplots(), curves, envelope.get("points") or ())
    if least is not None:
        line(ax, least)
    caption = "Validation loss as runs go. A marker is a run's final loss."
    if envelope.get("points"):
        caption += f" The envelope is over {_count(envelope.get('num_runs', 0), 'fitted run')}"
        caption += f"; {envelope['note']}." if envelope.get("note") else "."
    return Drawing(
        "curves", f"Training curves{' and their envelope' if envelope.get('points') else ''}", caption, figure
    )


def _positions(seen: Seen) -> Drawing | None:
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


def _learning_rate(seen: Seen) -> Drawing | None:
    cells = _rates(seen.fit)
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
        f"in {_count(edge, 'cell')} it lies at the edge of the range"
        if edge
        else "in every cell it lies inside the range"
    )
    caption = (
        f"Final loss against the peak rate, a panel per size, a line per horizon. A star is the best rate: {where}."
    )
    return Drawing("learning_rate", "Learning rate", caption, figure)


# In the order in which a reader asks: what is the law, how sure, does it forecast, what follows, what is doubtful. Of
# figures half as wide as the page two in a row stand side by side.
FIGURES = (
    _isoflop, _surface, _power_laws, _repetition,
    _exponents, _profiles, _clouds,
    _forecast, _forecast_growth, _rounds,
    _allocation,
    _residuals, _curves, _excess, _positions, _learning_rate,
)  # fmt: skip
# Those of groups that are compared; each has the others on a page of its own.
COMPARED = (_groups, _multiplier, _positions_compared)
