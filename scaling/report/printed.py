"""Prints the content of fit.json on a terminal."""

import math

from scaling import terminal
from scaling.laws.answers import multiplier
from scaling.laws.intervals import influence
from scaling.numbers import ended


def show(console, payload: dict) -> None:
    """Prints fit.json as tables: laws, the three approaches side by side, the forecast, warnings."""
    console.print(
        f"{payload['source']}: {payload['num_observations']} runs fitted; N is {payload['convention']['num_params']}, "
        f"C is {payload['convention']['flops']}",
        soft_wrap=True,
    )
    notes = payload.get("notes", ())
    for note in notes:  # what was read under another name or looks like another unit, before any number
        console.print(f"note {note}", soft_wrap=True)
    for name, entry in payload["laws"].items():
        console.print(_law_table(name, entry))
    if payload.get("truth", {}).get("irreducible"):
        console.print(_truth_table(payload["truth"]))
    if (exponents := _exponent_table(payload)).row_count:
        console.print(exponents)
    if payload.get("leverage"):
        console.print(terminal.text("\n", (f"Leverage of {payload['leverage']['law']}", "bold")))
        for sentence in influence.told(payload["leverage"]):
            console.print(sentence, soft_wrap=True)
    if payload["allocation"].get("tokens_per_param"):
        console.print(_ratio_table(payload["allocation"]))
    if payload.get("multiplier"):
        _show_multiplier(console, payload["multiplier"])
    if payload.get("combination"):
        console.print(_combination_table(payload["combination"]["members"]))
    if payload["forecast"]:
        console.print(_forecast_table(payload["forecast"]))
    if payload.get("left_out"):
        title = "Runs left out after they had trained: their losses were known, this is no forecast"
        console.print(_forecast_table(payload["left_out"], title))
    if payload.get("comparison"):
        console.print(_comparison_table(payload["comparison"]))
    if payload.get("conventions"):
        console.print(_convention_table(payload["conventions"]))
    for warning in payload["warnings"]:
        if warning not in notes:
            console.print(terminal.text(("note", "yellow"), f" {warning}"), soft_wrap=True)


def _table(title: str, *columns: str):
    from rich.table import Table

    headline, _, below = title.strip("\n").partition("\n")  # a Text's own styles are those of the title
    heading = terminal.text("\n", (headline, "bold"), f"\n{below}" if below else "")
    table = Table(title=heading, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _number(value) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3e}"


def _range(interval) -> str:
    """An end that is null is one the data do not set."""
    if not interval:
        return "–"
    return " … ".join("unbounded" if ended(end) is None else _number(end) for end in interval)


def _law_table(name: str, entry: dict):
    evidence = (
        f"converged, {entry['starts_at_optimum']} of {entry['num_starts']} starts agree"
        if entry["converged"]
        else f"NOT CONVERGED: {'; '.join(entry['reasons'])}"
    )
    loss = entry["loss"]["name"] + (
        f" δ {entry['loss']['delta']:.3g}" if entry["loss"]["name"] in ("huber", "tukey") else ""
    )
    title = (
        f"\n{name}: {entry['equation']}\n{entry['num_observations']} runs ({entry['selection']}); {loss}; "
        f"objective {entry['objective']:.8g}; residual RMS {100 * entry['residual_rmse']:.2g} %; {evidence}"
    )
    # Resampling and the profile see different things in a weakly identified law: show both where both are known.
    other = "bootstrap" if entry["interval_method"] == "profile" else "profile"
    beside = entry[f"{other}_intervals"]
    both = bool(beside) and entry["interval_method"] != "delta"
    columns = [
        f"{100 * entry['level']:.0f} % by {entry['interval_method'].split()[0]}",
        *(["by " + other] if both else []),
    ]
    table = _table(title, "parameter", "value", "standard error", *columns)
    for parameter, value in entry["params"].items():
        intervals = [entry["intervals"][parameter], *([beside.get(parameter)] if both else [])]
        table.add_row(parameter, _number(value), _number(entry["standard_errors"][parameter]), *map(_range, intervals))
    return table


def _truth_table(known: dict):
    title = (
        f"\nIrreducible loss E: the truth is {known['least_loss']:.4f}, what the source itself has on this validation"
    )
    table = _table(title, "law", "E", "E - truth", "interval", "by", "holds the truth")
    for row in known["irreducible"]:
        table.add_row(
            row["law"], f"{row['value']:.4f}", f"{row['error']:+.4f}", _range(row["interval"]),
            f"{row['method']}, {100 * row['level']:.0f} %", "yes" if row["inside"] else "no",
        )  # fmt: skip
    return table


def _exponent_table(payload: dict):
    table = _table("\nN* ∝ C^a, D* ∝ C^b", "approach", "a", "interval", "b", "interval")
    isoflop, envelope, law = payload["isoflop"], payload["envelope"], payload["allocation"]
    fixed = law.get("by_construction", ())
    rows = [
        (f"1 envelope ({envelope.get('num_runs', 0)} runs on it, {envelope.get('source', '')})", envelope),
        (f"2 IsoFLOP, parabola ({isoflop.get('num_bracketed', 0)} minima bracketed)", isoflop),
        ("2 IsoFLOP, interpolated", isoflop.get("interpolated") or {}),
        (f"3 parametric, asymptotic ({law.get('law', '')})", law),
    ]
    for name, entry in rows:
        if entry.get("a") is not None:
            ends = [
                "by construction" if entry is law and k in fixed else _range(entry.get(f"{k}_interval")) for k in "ab"
            ]
            table.add_row(name, _number(entry["a"]), ends[0], _number(entry.get("b")), ends[1])
    if law.get("a_local") is not None:
        name = f"3 parametric, over the fitted range ({law['cost']})"
        end = "by construction" if "a_local" in fixed else _range(law["a_local_interval"])
        table.add_row(name, _number(law["a_local"]), end, "", "")
    for other, entry in (law.get("by_law") or {}).items():
        if entry.get("a_local") is not None:
            table.add_row(
                f"3 {other}, over the fitted range",
                _number(entry["a_local"]),
                _range(entry["a_local_interval"]),
                "",
                "",
            )
    shift = (isoflop.get("bias") or {}).get("a")
    if shift is not None and isoflop.get("a") is not None:
        table.caption = f"parabolas through these sizes would miss a by {shift:+.4f} without any noise"
        table.caption_justify = "left"
    return table


def _ratio_table(law: dict):
    table = _table("\nTokens per parameter at the optimum", "FLOPs", "D*/N*", "interval")
    for flops, entry in law["tokens_per_param"].items():
        table.add_row(flops, _number(entry["value"]), _range(entry["interval"]))
    return table


def _show_multiplier(console, compared: dict) -> None:
    """What each group is worth against each other, and whether one set of exponents may stand for all of them."""
    axis = multiplier.UNITS[compared["axis"]]
    shared = ", ".join(
        f"{name} {_number(value)}"
        for name, value in compared["groups"][0]["params"].items()
        if all(group["params"][name] == value for group in compared["groups"])
    )
    lead, other = multiplier.prefixes(compared)
    title = (
        f"\nHow many times the {axis} of the first the second takes for the same loss ({compared['unit']})\n"
        f"{compared['equation']}, shared{' (rejected)' if lead else ''}: {shared}; "
        f"{'; '.join(_group_words(g) for g in compared['groups'])}"
    )
    interval = f"{100 * compared['level']:.0f} %"
    sized = not lead and any("same_size_value" in p for pair in compared["pairs"] for p in pair["points"])
    first, second = multiplier.HEADS[lead, other]
    columns = ["first, second", axis, first, interval, second, interval]
    table = _table(title, *columns, *(["at one size", interval] if sized else []), "")
    for pair in compared["pairs"]:
        for p in multiplier.told(pair["points"]):
            kinds = (lead, other, *(["same_size_"] if sized else []))
            cells = [w for k in kinds for w in (_number(p.get(f"{k}value")), _range(p.get(f"{k}interval")))]
            beyond = "extrapolated" if p["extrapolated"] else ""
            table.add_row(f"{pair['group']}, {pair['over']}", f"{p[compared['axis']]:.3g}", *cells, beyond)
    console.print(table)
    for sentence in multiplier.sentences(compared):
        console.print(sentence, soft_wrap=True)


def _group_words(group: dict) -> str:
    return f"{group['name']}: {group['num_observations']} runs" + (f", {group['cost']}" if group["cost"] else "")


def _forecast_table(rows: list[dict], title: str = "Forecast of the runs held out"):
    table = _table(f"\n{title}", "run", "FLOPs", "predicted", "interval", "actual", "error")
    for row in rows:
        actual = row.get("actual")
        error = f"{100 * (row['predicted'] / actual - 1):+.2f} %" if actual else "–"
        table.add_row(
            row["run_id"], f"{row['flops']:.3g}", f"{row['predicted']:.4f}",
            f"{row['interval'][0]:.4f} … {row['interval'][1]:.4f}", f"{actual:.4f}" if actual else "–", error,
        )  # fmt: skip
    return table


def _combination_table(members: list[dict]):
    title = "\nForms behind a forecast: each fitted to the smaller runs, asked for the larger ones"
    steps = [c["fitted_up_to"] for c in members[0]["cuts"]]
    told = [f"weight at {at['factor']:.3g}×" for at in members[0].get("weights", ())]
    table = _table(title, "form", *told, *[f"fitted to {C:.2g}" for C in steps])
    for row in members:
        found = {c["fitted_up_to"]: f"{100 * c['mean_error']:.2f} %" for c in row["cuts"]}
        weights = [f"{at['weight']:.2f}" for at in row.get("weights", ())]
        table.add_row(row["law"], *weights, *[found.get(C, "–") for C in steps])
    return table


def _comparison_table(rows: list[dict]):
    """Laws of N and D on every row, best first."""
    title = (
        "\nForms on the same rows (ΔAICc: 0 is best, 10 is hopeless; error beyond: fitted below the last decade of C)"
    )
    table = _table(title, "law", "parameters", "residual RMS", "ΔAICc", "error beyond", "evidence")
    for row in rows:
        if "problem" in row:
            table.add_row(row["law"], "–", "–", "–", "–", row["problem"])
            continue
        beyond = f"{100 * row['held_out']['mean_error']:.2f} %" if row["held_out"] else "–"
        table.add_row(
            row["law"], str(row["num_parameters"]), f"{100 * row['residual_rmse']:.2g} %", _number(row["delta_aicc"]),
            beyond, "converged" if row["converged"] else "; ".join(row["reasons"]),
        )  # fmt: skip
    return table


def _convention_table(rows: list[dict]):
    title = "\nThe same runs under every counting rule"
    table = _table(title, "N", "C", "a, fitted range", "interval", "a, asymptotic", "D*/N* at the largest C")
    for row in rows:
        table.add_row(
            row["num_params"], row["flops"], _number(row["a_local"]), _range(row.get("a_local_interval")),
            _number(row["a"]), _number(row["tokens_per_param"]),
        )  # fmt: skip
    return table


def show_answer(console, answer) -> None:
    """Prints an answer of ``laws.answers.advice``: its numbers with intervals and other forms' range, tables, notes."""
    how = ""
    if answer.decades is not None:
        beyond = f"{answer.decades:.2f} decades outside" if answer.decades > 0 else "within"
        how = f"; {beyond} the fitted compute"
    console.print(f"{answer.source}: {answer.asked}, by {answer.law}{how}", soft_wrap=True)
    table = _table("", "", "value", f"{100 * answer.level:.0f} % interval", "by other forms", "")
    for name, number in answer.numbers.items():
        said = [_number(x) for x in sorted(number.by_form.values())]
        forms = " … ".join(dict.fromkeys((said[0], said[-1]))) if said else "–"
        ends = None if number.interval is None else [e if math.isfinite(e) else None for e in number.interval]
        table.add_row(name, _number(number.value), _range(ends), forms, number.unit)
    console.print(table)
    for title, rows in answer.tables.items():
        below = _table(f"\n{title}", *rows[0])
        for row in rows:
            below.add_row(*map(_number, row.values()))
        console.print(below)
    for note in answer.notes:
        console.print(terminal.text(("note", "yellow"), f" {note}"), soft_wrap=True)


def _in_log(target) -> str:
    """What a width is in, where it is one of logarithms."""
    return f"in log {'N' if target.name == 'allocation' else 'of it'} " if target.kind.is_ratio else ""


def show_proposal(console, proposal, candidates, source) -> None:
    """Prints what ``laws.answers.design`` proposes: the interval now, the runs in their order, when to stop, notes."""
    share, width = f"{100 * proposal.level:.0f} %", _in_log(proposal.target)
    ends = [e if math.isfinite(e) else None for e in proposal.interval]
    now = f"{_number(proposal.width)} wide" if math.isfinite(proposal.width) else "without an end"
    forms = ", ".join(f"{n} {w:.2f}" for n, w in proposal.voters.items())
    console.print(f"{source}: {proposal.target}, {share} {_range(ends)}, {width}{now}; asked of {forms or 'no form'}",
                  soft_wrap=True)  # fmt: skip
    table = _table("", "", "run", "N", "D", proposal.unit, "of the variance", "width then")
    for k, step in enumerate(proposal.steps, 1):
        n, d = (candidates.columns[c][step.candidate] for c in ("num_params", "num_tokens"))
        gain = f"{-100 * step.gain:.2g} %" if math.isfinite(step.gain) else "–"
        table.add_row(str(k), candidates.labels[step.candidate], _number(n), _number(d), _number(step.cost), gain,
                      _number(step.width_after) if math.isfinite(step.width_after) else "–")  # fmt: skip
    if proposal.steps:
        console.print(table)
        console.print(f"together {proposal.cost:.3g} {proposal.unit}", soft_wrap=True)
    if proposal.next is not None:
        step = proposal.next
        console.print(
            f"the best run after these, {candidates.labels[step.candidate]}, takes {100 * step.gain:.2g} % of the "
            f"variance for {step.cost:.3g} {proposal.unit}: stop where that is not worth it", soft_wrap=True,
        )  # fmt: skip
    if (told := proposal.certificate) is not None:
        by = f"this order reaches it for {told.budget:.3g} {proposal.unit}; " if told.budget is not None else ""
        least = f"none for less than {told.least:.3g}: " if told.least is not None else ""
        console.print(f"a width of {told.width:g}: {by}{least}{told.reason}", soft_wrap=True)
    for reason in proposal.reasons:
        console.print(terminal.text(("note", "yellow"), f" {reason}"), soft_wrap=True)
