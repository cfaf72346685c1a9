"""One self-contained HTML page from a sweep's records and fits.

    python -m scaling.report results/chinchilla

writes report.html, which needs no network, and figures/*.svg|png beside it. Nothing is fitted here: fit.json says what
was, or why it could not be.
"""

import base64
import functools
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from scaling import records, storage
from scaling.laws.answers import multiplier, of_runs, precision
from scaling.laws.intervals import influence
from scaling.report import figures, live, words
from scaling.report.figures import drawing, of_groups, of_laws, of_training
from scaling.report.words import fixed, num, scientific, span

MOST_ROWS = 500  # of the table of runs: ten thousand would be most of the page
MOST_SVG_BYTES = 600_000
# What is said of cells that have no record and need none, by their status in sweep.json.
NOT_RUN = {"dropped": "left out", "candidate": "not bought"}


@dataclass(frozen=True)
class Results:
    """What a results folder holds. Files that are not there are empty."""

    folder: Path
    runs: list[records.RunRecord]
    fit: dict
    manifest: dict
    forecast: dict
    num_strangers: int = 0  # records of runs that are not in the manifest's grid: kept out
    groups: tuple["Results", ...] = ()  # those of laws of their own (``fit.by`` of the grid)
    is_provisional: bool = False  # of a sweep that still runs (``provisional``)

    @property
    def name(self) -> str:
        return self.manifest.get("name") or (self.runs[0].sweep.get("name") if self.runs else None) or self.folder.name

    @functools.cached_property
    def table(self):
        return records.table(self.runs)


def read(results_dir: Path) -> Results:
    """Reads a results folder, or that of a group in one.

    Raises ValueError when there is no such folder, it holds no record, or a file in it is not readable.
    """
    folder = storage.folder(results_dir)
    runs = records.load_records(folder)
    if not runs and not folder.is_dir():
        raise ValueError(f"{folder}: no such folder: write a sweep's results folder, as in results/chinchilla")
    if not runs:
        raise ValueError(f"{folder}/runs: no records: run the sweep first")
    manifest = records.manifest(folder)
    groups = tuple(manifest.get("groups") or ())
    fit, forecast = (records.read_json(folder / f"{name}.json") for name in ("fit", "forecast"))
    if groups:  # with laws apart only a comparison of them stands here; anything else is of another ``fit.by``
        compared = (fit.get("multiplier") or {}).get("column")
        fit, forecast = fit if compared and all(g.startswith(f"{compared}=") for g in groups) else {}, {}
    held_out = {cell["run_id"] for cell in manifest.get("cells") or [] if cell["holdout"]}
    fit = with_sealed_forecast(fit, forecast, runs, held_out if manifest else None)
    return Results(
        folder, runs, of_runs.complete(fit, runs), manifest, forecast,
        len(records.strangers(folder)),
        tuple(read(folder / name) for name in groups if records.load_records(folder / name)),
    )  # fmt: skip


def build(results_dir: Path, out: Path | None = None) -> Path:
    """Writes the report of a results folder, and its figures, and returns the report's path.

    Where groups of the runs have laws of their own, each has its report and figures in its own folder, and this one
    sets their answers side by side.

    Args:
      results_dir: folder with runs/*.json, and fit.json, sweep.json, forecast.json where they exist.
      out: the HTML file; by default report.html in ``results_dir``. Figures go to figures/ beside it.

    Raises:
      ValueError: nothing to report on, or a file that cannot be read.
    """
    results = read(results_dir)
    return _build(results, storage.folder(out) if out else results.folder / "report.html")


def _build(results: Results, out: Path) -> Path:
    for group in results.groups:
        _build(group, out.parent / group.folder.name / out.name)
    saved = figures.write(out.parent / "figures", results.table, results.fit, results.runs, _group_rows(results))
    return write(results, out, saved)


def write(results: Results, out: Path, saved: Sequence[figures.Saved]) -> Path:
    """Writes the page alone, with figures ``saved`` before; returns its path."""
    storage.write(out, _render(results, results.fit["learning_rates"], saved, out), synced=False)
    return out


def with_sealed_forecast(
    fit: Mapping, forecast: Mapping, runs: Sequence[records.RunRecord], held_out: Collection[str] | None = None
) -> dict:
    """fit.json with the forecast that was written before the held-out cells' own steps, where there is one; of those
    that are ``held_out`` today (run_ids) alone, where they are given.

    A fit made afterwards could only repeat it or improve on it: what counts is what was said before.
    """
    if not forecast.get("cells"):
        return dict(fit)
    actual = {r.run_id: r.loss for r in runs}
    mine = [cell for cell in forecast["cells"] if held_out is None or cell["run_id"] in held_out]
    return {**fit, "forecast": [{**cell, "actual": actual.get(cell["run_id"])} for cell in mine]}


def forecast_seal(forecast: Mapping) -> str | None:
    """What the hash in forecast.json says: that it is as it was written, or that it was changed. None without one."""
    if not forecast:
        return None
    when = f"written {forecast.get('written', 'at an unknown time')}, before the held-out cells' own steps"
    if records.seal(forecast) == forecast.get("sha256"):
        return f"Forecast {when}; its sha256, {forecast['sha256'][:12]}…, matches."
    return f"The sha256 of forecast.json ({when}) does not match: the file was changed after it was written."


def headlines(results: Results, cells: Sequence[Mapping]) -> list[dict]:
    """The answer: {value, interval, text (HTML)} for each of the few numbers that a reader came for."""
    out, table = [], results.table
    if not of_training.is_about_rates(cells, table):
        out += [*_exponent_headline(results.fit), *_ratio_headline(results.fit), *_forecast_headline(results.fit)]
        out += _irreducible_headline(results)
    out += _multiplier_headlines(results.fit)
    if cells:
        interior = sum(c["interior"] for c in cells)
        text = "cells of the learning-rate sweep whose best rate lies inside the range tried"
        out.append(_headline(f"{interior} of {len(cells)}", None, text))
    planned = max(len(table), sum(c.get("status") != "candidate" for c in results.manifest.get("cells") or []))
    completed = int((table["status"] == "completed").sum())
    text = "runs completed" + "".join(
        f", {n} {status}" for status in ("diverged", "failed") if (n := int((table["status"] == status).sum()))
    )
    return [*out, _headline(f"{completed} of {planned}", None, text)]


def _exponent_headline(fit: Mapping) -> list[dict]:
    isoflop, law = fit.get("isoflop") or {}, fit.get("allocation") or {}
    # Two points always lie on a line: below three minima the exponent of IsoFLOP has no evidence in it.
    if isoflop.get("a") is not None and isoflop.get("num_bracketed", 0) >= 3:
        value, interval, source = isoflop["a"], isoflop.get("a_interval"), "by IsoFLOP minima"
    elif law.get("a_local") is not None:
        value, interval, source = (
            law["a_local"],
            law.get("a_local_interval"),
            "by the parametric law, in the fitted range",
        )
    else:
        return []
    return [_headline(f"{value:.2f}", interval, f"exponent a of N* ∝ C<sup>a</sup>, {source}", "{:.2f}".format)]


def _ratio_headline(fit: Mapping) -> list[dict]:
    law = fit.get("allocation") or {}
    top = (law.get("fitted_flops") or [0, float("inf")])[1] * 1.02  # budgets are means of what runs achieved
    fitted = {float(c): entry for c, entry in (law.get("tokens_per_param") or {}).items() if float(c) <= top}
    if not fitted:
        return []
    flops, entry = max(fitted.items())
    budget = scientific(_budget(flops))
    text = f"tokens per parameter are best at {budget} FLOPs, the largest fitted budget, by the parametric law"
    return [_headline(num(entry["value"], 3), entry.get("interval"), text, lambda v: num(v, 3))]


def _budget(flops: float) -> float:
    """As the grid wrote it: runs achieve a whole number of steps, hence 2.003e12 for 2e12."""
    return float(f"{flops:.2g}")


def _forecast_headline(fit: Mapping) -> list[dict]:
    known = [row for row in fit.get("forecast") or [] if row.get("actual") is not None]
    if not known:
        return []
    errors = [100 * abs(row["predicted"] / row["actual"] - 1) for row in known]
    inside = sum(row["interval"][0] <= row["actual"] <= row["interval"][1] for row in known)
    text = (
        f"mean error of the forecast on held-out cells, {max(errors):.2g} % at worst; {inside} of {len(known)} "
        f"losses inside the {100 * known[0].get('level', 0.9):.0f} % interval"
    )
    return [_headline(f"{sum(errors) / len(errors):.2g} %", None, text)]


def _multiplier_headlines(fit: Mapping) -> list[dict]:
    """Of each pair that was compared the multiplier at the most compute within the fitted runs."""
    compared = fit.get("multiplier") or {}
    key, _ = multiplier.prefixes(compared)
    apart, out = bool(key), []
    for pair in compared.get("pairs", ()):
        inside = [p for p in pair["points"] if not p["extrapolated"]]
        if not inside:
            continue
        point = inside[-1]
        what = multiplier.UNITS[compared["axis"]]
        text = (
            f"as many {what} takes {escape(pair['over'])} as {escape(pair['group'])} for the loss that this has for "
            f"{scientific(_budget(point[compared['axis']]))}{', by laws with exponents of their own' if apart else ''}"
        )
        value = point[f"{key}value"]
        out.append(_headline("–" if value is None else f"{value:.2f}×", point[f"{key}interval"], text, "{:.2f}".format))
    return out


def _compared(found: Mapping) -> dict:
    """The table of multipliers and the sentences below it; empty without a comparison."""
    if not found.get("pairs"):
        return {}
    rows = [{**p, "at": p[found["axis"]], "group": pair["group"], "over": pair["over"]}
            for pair in found["pairs"] for p in multiplier.told(pair["points"])]  # fmt: skip
    lead, other = multiplier.prefixes(found)
    prefixes = (lead, other, *(["same_size_"] if not lead and any("same_size_value" in row for row in rows) else []))
    return {
        **found,
        "rows": rows,
        "axis_unit": multiplier.UNITS[found["axis"]],
        "sentences": multiplier.sentences(found),
        "heads": multiplier.HEADS[lead, other],
        "sized": len(prefixes) > 2,
        "rejected": bool(lead),
        "prefixes": prefixes,
    }


def _irreducible(results: Results) -> list[dict]:
    """The irreducible loss of each law against the truth, if that is known."""
    known = results.fit.get("truth") or {}
    return [{**row, "least": known["least_loss"]} for row in known.get("irreducible", ())]


def _irreducible_headline(results: Results) -> list[dict]:
    rows = _irreducible(results)
    if not rows:
        return []
    row, least = rows[0], rows[0]["least"]
    text = (
        f"nats per token cannot be learned, by the {row['law']} law; the truth, {least:.3f}, lies "
        f"{'inside' if row['inside'] else 'outside'} the {100 * row['level']:.0f} % interval"
    )
    return [_headline(fixed(row["value"]), row["interval"], text, fixed)]


def _headline(value: str, interval, text: str, write=num) -> dict:
    return {"value": value, "interval": span(interval, write), "text": Markup(text)}


def warnings(results: Results, cells: Sequence[Mapping]) -> list[str]:
    """What a reader must know before believing the rest."""
    fit, out = results.fit, []
    if results.is_provisional:
        out.append(
            "Provisional: written while the sweep runs. What laws say here is of the runs that are in by now, by "
            "non-embedding N and exact FLOPs whatever the grid's fit asks, without resamples; figures and forecast "
            "come with the last cell."
        )
    if fit.get("laws") and of_training.is_about_rates(cells, results.table):
        out.append(
            "Most runs are here to find a learning rate, most of them at a worse one: no law through them is meant."
        )
    if not ("laws" in fit or "error" in fit or results.groups or results.is_provisional):
        out.append("No laws: there is no fit.json in this folder.")
    elif fit.get("error"):
        out.append(f"No {'comparison' if results.groups else 'laws'}: {fit['error']}")
    missing = [
        c for c in results.manifest.get("cells") or [] if c["run_id"] not in {run.run_id for run in results.runs}
    ]
    dropped = sum(c.get("status") == "dropped" for c in missing)
    if dropped:
        out.append(f"{dropped} cells were left out to stay within the budget the sweep was given.")
    waiting = [c for c in missing if c.get("status") not in NOT_RUN]
    if waiting:
        out.append(f"{len(waiting)} cells are not run yet: see the table of runs.")
    if results.num_strangers:
        out.append(f"{results.num_strangers} records in this folder belong to no cell of its grid and are not shown.")
    shown = {group.folder.name for group in results.groups}
    out += [f"{name} has no record yet." for name in results.manifest.get("groups") or {} if name not in shown]
    said = [] if shown else precision.sentences(fit["precision"])  # each group says it of its own
    imprecise = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in said]
    apart = {f"{law}: {line}" for law, lines in _doubts_by_law(fit).items() for line in lines}
    doubts = [line for line in fit.get("warnings") or [] if line not in apart]
    return [*out, *imprecise, *doubts, *(results.manifest.get("warnings") or [])]


def _doubts_by_law(fit: Mapping) -> dict[str, list[str]]:
    """What is doubtful of laws that no answer on the page is from: it stands with each, not before everything."""
    laws, lines = fit.get("laws") or {}, fit.get("warnings") or []
    leading = (fit.get("allocation") or {}).get("law") or next(iter(laws), None)
    forecasting = {member["law"] for member in (fit.get("combination") or {}).get("members") or () if "law" in member}
    rest = [law for law in laws if law != leading and law not in forecasting]
    return {law: [line.removeprefix(f"{law}: ") for line in lines if line.startswith(f"{law}: ")] for law in rest}


def _cell_rows(results: Results) -> list[dict]:
    """A row per run, and per cell of the manifest that has no record."""
    planned = {c["run_id"]: c for c in results.manifest.get("cells") or []}
    rule = results.fit.get("convention", {}).get("flops", "exact")
    rows = []
    for r in results.runs:
        rows.append(
            {
                "run_id": r.run_id,
                "labels": r.sweep.get("labels") or {},
                "holdout": bool(r.sweep.get("holdout")),
                "status": r.status,
                "num_params": r.num_params["non_embedding"],
                "num_tokens": r.num_tokens,
                "tokens_per_param": r.tokens_per_param,
                "flops": r.flops.get(rule) or r.flops.get("exact"),
                "num_steps": r.num_steps,
                "batch_tokens": r.batch_tokens,
                "peak_lr": r.config["optim"]["peak_lr"],
                "loss": r.loss,
                "loss_standard_error": r.standard_error,
                "bits_per_byte": r.bits_per_byte,
                "seconds": r.timing.get("seconds"),
                "predicted_seconds": planned.get(r.run_id, {}).get("predicted_seconds"),
                "trouble": _trouble(r),
            }
        )
    done = {r.run_id for r in results.runs}
    for cell in planned.values():
        if cell["run_id"] not in done:
            count = (cell.get("num_params") or {}).get("non_embedding")
            row = {k: cell.get(k) for k in ("run_id", "holdout", "num_tokens", "num_steps")}
            row |= {
                "status": NOT_RUN.get(cell.get("status"), "not run"),
                "trouble": None,
                "labels": cell.get("labels") or {},
            }
            rows.append({**row, "num_params": count, "flops": (cell.get("flops") or {}).get(rule)})
    order = ("num_params", "num_tokens", "peak_lr")
    return sorted(
        rows, key=lambda r: [r["labels"].get("budget_flops") or 0, *(r.get(k) or 0 for k in order), r["run_id"]]
    )


def _waiting_share(runs: Sequence[records.RunRecord]) -> float | None:
    """Of the time that training steps took, the part in which they waited for their batch; None if it is not known."""
    waited, stepped = (sum(run.timing.get(f"{name}_seconds") or 0.0 for run in runs) for name in ("data", "step"))
    known = any("data_seconds" in run.timing for run in runs) and waited + stepped > 0
    return waited / (waited + stepped) if known else None


def _precision_by(runs: Sequence[records.RunRecord]) -> str:
    """What the losses' standard errors are by: of records older than their losses by part, windows alone."""
    by_parts = [run.loss_by_block is not None for run in runs if run.loss is not None]
    if all(by_parts):
        return "by parts of the text"
    return "of windows, or by parts of the text where a record has them" if any(by_parts) else "of windows"


def _trouble(r: records.RunRecord) -> str | None:
    if r.status == "diverged":
        return f"diverged at step {r.diverged_at_step}"
    if r.status == "failed":
        return f"failed: {r.environment.get('failure', 'no reason recorded')}"
    return None


def _spread(rows: Sequence, most: int) -> list:
    """At most ``most`` of the rows, evenly spaced, the ends among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _environments(results: Results) -> list[tuple[str, str]]:
    """The environment of the runs, each key once; a key that differs between runs says how many values it has."""
    values: dict[str, list[str]] = defaultdict(list)
    for source in [*(r.environment for r in results.runs), results.manifest.get("environment") or {}]:
        for key, value in source.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if text not in values[key]:
                values[key].append(text)
    return [
        (key, v[0] if len(v) == 1 else f"{len(v)} values: {' | '.join(v[:3])}") for key, v in sorted(values.items())
    ]


def _render(results: Results, cells: Sequence[Mapping], saved: Sequence[figures.Saved], out: Path) -> str:
    """The page. Everything in it is a function of the folder's files: no date, no path of the machine."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scaling.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(words.FILTERS, inline_image=_inline_image, script=_script, as_json=_as_json)
    fit, rows = results.fit, _cell_rows(results)
    conventions = [one.fit.get("convention") for one in (results, *results.groups)]  # all of one sweep's are the same
    return environment.get_template("report.html").render(
        name=results.name,
        command=results.manifest.get("command"),
        grid=results.manifest.get("grid"),
        grid_path=results.manifest.get("grid_path"),
        plan=results.manifest.get("plan") or {},
        actual=results.manifest.get("actual") or {},
        hardware=results.manifest.get("hardware") or {},
        waiting_share=_waiting_share(results.runs),
        costs=records.plan_against_actual(results.manifest, results.runs),
        sources=list(dict.fromkeys(f"{r.data['source']} ({r.data['tokenizer']})" for r in results.runs if r.data)),
        convention=next(filter(None, conventions), drawing.convention({})),
        headlines=headlines(results, cells),
        warnings=warnings(results, cells),
        doubts=_doubts_by_law(fit),
        compared=_compared(fit.get("multiplier") or {}),
        groups=[
            _group(group, None if results.is_provisional else f"{group.folder.name}/{out.name}")
            for group in results.groups
        ],
        root=Markup(f" {words.PROVISIONAL}") if results.is_provisional else "",
        side_by_side=_group_rows(results),
        seal=forecast_seal(results.forecast),
        figures=saved,
        cells=_spread(rows, MOST_ROWS),
        num_cells=len(rows),
        troubles=[r for r in rows if r["trouble"]],
        learning_rates=cells,
        fit=fit,
        loss_unit=drawing.loss_unit(fit),
        precision_by=_precision_by(results.runs),
        truth=results.fit.get("truth"),
        irreducible=_irreducible(results),
        exponents=of_laws.exponent_rows(fit),
        leverage=influence.told(fit["leverage"]) if fit.get("leverage") else [],
        design=fit.get("design") or {},
        frontier=_spread(fit.get("frontier") or [], 9),
        environment=_environments(results),
        page=live.of(fit, results.runs, results.folder, out, drawing.loss_unit(fit)),
    )


def _group_rows(results: Results) -> list[dict]:
    compared = results.fit.get("multiplier") or {}
    return of_groups.group_rows({group.folder.name: group.fit for group in results.groups}, compared)


def _group(results: Results, page: str | None) -> dict:
    """What the page of the whole sweep says of one of its groups, whose own is ``page``; None: it has none yet."""
    cells = results.fit["learning_rates"]
    return {
        "name": results.folder.name,
        "page": page,
        "headlines": headlines(results, cells),
        "irreducible": _irreducible(results),
        "warnings": warnings(results, cells),
        "seal": forecast_seal(results.forecast),
    }


def _script(name: str) -> Markup:
    """A script of this folder, to stand in the page."""
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))  # the project's own


def _as_json(value: object) -> Markup:
    return htmlsafe_json_dumps(value, separators=(",", ":"))


def _inline_image(saved: figures.Saved) -> str:
    """The picture as a data URL: the drawing, or where its points make that too long what was painted of it."""
    drawing = saved.svg.read_bytes()
    kind, data = ("svg+xml", drawing) if len(drawing) <= MOST_SVG_BYTES else ("png", saved.png.read_bytes())
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
