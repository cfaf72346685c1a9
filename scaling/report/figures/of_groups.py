"""Figures of groups that are compared, and the table of their answers side by side."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from scaling import records
from scaling.laws.answers import multiplier as multiplier_of
from scaling.report import plots, plots_of_fits
from scaling.report.figures.drawing import FULL, Drawing, Seen, part
from scaling.report.figures.of_laws import PUBLISHED_EXPONENTS


def group_rows(groups: Mapping[str, Mapping], compared: Mapping) -> list[dict]:
    """A row for each group that has laws of its own: its exponent, E and best ratio, each with its interval, and how
    many times the compute of the first group it saves.

    Args:
      groups: fit.json by the group's name.
      compared: fit.json's multiplier of all of them; may be empty.
    """
    names, (lead, _) = list(groups), multiplier_of.prefixes(compared)
    return [
        {"name": name, **_answers_of(fit), **_times(compared, *(n.rpartition("=")[2] for n in (name, names[0])), lead)}
        for name, fit in groups.items()
    ]


def _answers_of(fit: Mapping) -> dict:
    """Of one group's fit.json what stands beside the others'; null where there is none."""
    law, isoflop = part(fit, "allocation"), part(fit, "isoflop")
    surface = part(part(fit, "laws"), law.get("law"))
    top = (law.get("fitted_flops") or [0, 0])[1] * 1.02
    ratios = {float(c): entry for c, entry in part(law, "tokens_per_param").items() if float(c) <= top}
    ratio = ratios[max(ratios)] if ratios else {}
    bracketed = isoflop if isoflop.get("num_bracketed", 0) >= 3 else {}
    a = "a_local" if law.get("a_local") is not None else "a"
    return {
        "num_observations": fit.get("num_observations"),
        "a": law.get(a), "a_interval": law.get(f"{a}_interval"),
        "a_isoflop": bracketed.get("a"), "a_isoflop_interval": bracketed.get("a_interval"),
        "E": part(surface, "params").get("E"), "E_interval": part(surface, "intervals").get("E"),
        "ratio": ratio.get("value"), "ratio_interval": ratio.get("interval"),
    }  # fmt: skip


def _times(compared: Mapping, name: str, first: str, lead: str) -> dict:
    """How many times as much ``first`` takes as this group, at the most compute inside both groups' fits."""
    for pair in compared.get("pairs") or ():
        inside = [p for p in pair["points"] if not p["extrapolated"]]
        if {pair["group"], pair["over"]} != {name, first} or name == first or not inside:
            continue
        value, ends = inside[-1].get(f"{lead}value"), inside[-1].get(f"{lead}interval")
        if pair["group"] == first and value:  # told the other way
            value, ends = 1 / value, ends and [None if end is None else 1 / end for end in reversed(ends)]
        return {"times": value, "times_interval": ends}
    return {"times": None, "times_interval": None}


def groups(seen: Seen) -> Drawing | None:
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


def multiplier(seen: Seen) -> Drawing | None:
    compared = part(seen.fit, "multiplier")
    if not compared.get("pairs"):  # of groups that could not be compared there is the column alone
        return None
    figure = Figure(figsize=(FULL, 4.4))
    plots_of_fits.multipliers(figure.subplots(), compared)
    by, dotted = "with exponents shared", "by laws fitted apart"
    if multiplier_of.prefixes(compared)[0]:
        by, dotted = "fitted to each group apart", "with exponents shared, which the test rejects"
    caption = (
        "How many times as much the second of two groups takes for the loss that the first has for what is on the "
        f"axis, by {compared['equation']} {by}, and its {100 * compared['level']:.0f} % interval. "
        f"Dashed: outside what was fitted; dotted: {dotted}."
    )
    return Drawing("multiplier", "How much better", caption, figure)


def positions_compared(seen: Seen) -> Drawing | None:
    """Of every group that was compared the run with the least loss."""
    positions, column = records.positions(seen.runs), part(seen.fit, "multiplier").get("column")
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
