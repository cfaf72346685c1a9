"""The command that fits: records or a CSV → laws, intervals, figures.

    python -m scaling.fit SOURCE [--law NAME …] [--loss huber|lad|squared|tukey] [--out DIR]

SOURCE is a results folder (``runs/*.json``) or a CSV with columns num_params,num_tokens,loss
(any delimiter and decimal mark, JSON and JSON lines, and names that trackers write: what was mapped is said). From
Python the same is ``analyse(table)`` and ``forecast(analysis, cells)``, or ``scaling.fit_law(table, "chinchilla")`` for
one law.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scaling import records, storage, terminal
from scaling.laws import approaches, compare, diagnosis, forms
from scaling.laws.analysis import DEFAULT_LAWS, Analysis, analyse, finite, forecast
from scaling.laws.estimate import Fit
from scaling.laws.estimate import fit as _fit
from scaling.laws.observations import from_table, read_csv
from scaling.laws.tables import NOTES

__all__ = ["Analysis", "analyse", "fit_law", "forecast", "main", "with_truth"]


def fit_law(
    table,
    law="chinchilla",
    *,
    num_params: str = "non_embedding",
    flops: str = "exact",
    holdout_flops: float | None = None,
    bootstrap: int = 0,
    source: str = "table",
    **options,
) -> Fit:
    """Fits one law to a pandas table: the rows that the command fits it to, with the same result.

    Args:
      num_params, flops: the conventions to fit under, where the table carries several.
      holdout_flops: leave out rows with more compute, beside those the table marks.
      bootstrap: resamples, in the fit's ``draws``; 0 makes none.
      options: those of ``laws.estimate.fit`` (loss, delta, tau, log), and ``seed`` of the resamples.

    Raises:
      ValueError: the table cannot be read as observations, or does not identify the law; says what would mend it.

    >>> fitted = scaling.fit_law(table, "chinchilla", bootstrap=1000)
    >>> fitted.params["alpha"], fitted.converged, uncertainty.interval(fitted.draws.params["alpha"])
    """
    if bootstrap < 0:
        raise ValueError(f"bootstrap is {bootstrap}: write 0 or more")
    law = forms.get(law)
    reading = {"num_params": num_params, "flops": flops, "holdout_flops": holdout_flops}
    observations = from_table(table, **reading, source=source, target=law.target, columns=law.columns)
    seed = options.pop("seed", 0)
    rows, _ = approaches.select(observations, law)
    fitted = _fit(observations.take(rows), law, **options)
    if not bootstrap:
        return fitted
    clusters, _ = diagnosis.run_clusters(observations)
    noise = diagnosis.diagnose(fitted, None if clusters is None else clusters[rows])
    return replace(fitted, draws=diagnosis.resample(fitted, noise, bootstrap, seed))


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (2: bad input, said in one line)."""
    arguments = _arguments(argv)
    try:
        _run(arguments)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    except storage.errors() as e:
        print(f"{arguments.source}: {storage.first_line(e)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.fit",
        description="Fits scaling laws to the records of a sweep or to a CSV (num_params,num_tokens,loss[,flops]), "
        "with intervals and the evidence that each optimum was found. Writes fit.json and figures.",
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a results folder, a group's in it (results/g/source=c4), or a CSV, JSON or JSON lines "
        "(aliases N, D, L, C and what trackers write, such as val_loss; # comments)",
    )
    parser.add_argument(
        "--law", nargs="+", action="extend", metavar="NAME",
        help=f"laws to fit (default: {' '.join(DEFAULT_LAWS)}), apart by blanks or commas; any of "
        f"{', '.join(forms.FORMS)}, package.module:function, or all: every law the columns allow, ranked",
    )  # fmt: skip
    parser.add_argument(
        "--loss", default="huber", help="huber (default), lad, squared, asymmetric or tukey, on log "
        "loss; tukey (the bisquare) gives no weight to runs that are far off",
    )  # fmt: skip
    parser.add_argument("--tau", type=float, help="quantile of --loss asymmetric (.5: as Huber's)")
    parser.add_argument(
        "--delta",
        type=float,
        help="Huber's δ (default: 1.345 × the residuals' scale, 4.685 × for tukey; 1e-3 is usual)",
    )
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (0: the delta method)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--holdout-flops", type=float, metavar="C", help="leave out, and forecast, runs above C FLOPs")
    parser.add_argument(
        "--one-law", action="store_true", help="forecast from the first law of N and D, not from several forms combined"
    )
    parser.add_argument("--num-params", default="non_embedding", help="which count of a results folder (or total …)")
    parser.add_argument("--flops", default="exact", help="which FLOP rule of a results folder (or 6ND, kaplan …)")
    parser.add_argument(
        "--convention", action="store_true",
        help="also refit under every parameter count and FLOP rule the source carries, and show what moves",
    )  # fmt: skip
    parser.add_argument("--no-figures", action="store_true", help="write fit.json alone")
    parser.add_argument("--out", metavar="DIR", help="where fit.json and figures/ go (default: "
        "SOURCE's folder; fit/ in it beside those of a sweep)")  # fmt: skip
    return parser


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, SOURCE before or after the options."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    laws = [name for word in arguments.law or () for name in word.split(",") if name]
    if arguments.source is None:
        # --law takes every word that follows it: a last one that names no law is SOURCE.
        if not laws or laws[-1] in forms.FORMS or laws[-1] == "all" or ":" in laws[-1]:
            parser.error("SOURCE is missing: write a results folder or a CSV")
        laws.pop()
        arguments.source = arguments.law[-1]
    arguments.law = laws
    return arguments


def load(source: Path):
    """(table, curves) of a results folder, of that of a group in one, or of a CSV.

    Raises ValueError saying what SOURCE should be.
    """
    source = storage.folder(source)
    runs = [] if source.is_file() else records.load_records(source)
    if groups := runs and records.manifest(source).get("groups"):
        raise ValueError(f"{source}: its laws are apart: write one of {', '.join(f'{source}/{g}' for g in groups)}")
    if runs:
        table = records.table(runs)
        table.attrs[NOTES] = _about_records(source, runs)
        return table, records.curves(runs)
    if source.is_dir():
        raise ValueError(f"{source}: no runs/*.json in it: write a results folder or a CSV")
    return read_csv(source), None


def _about_records(folder: Path, runs) -> list[str]:
    """What of a results folder is not read, or is read otherwise than it was written, in words."""
    notes, extra = records.changed_sides(runs), records.strangers(folder)
    if extra:
        where = f"of no cell of its grid, as {folder / 'sweep.json'} has it, are left out"
        notes.append(f"{len(extra)} records {where} ({records.named(extra)})")
    return notes


def _out(arguments: argparse.Namespace, source: Path) -> Path:
    """Where fit.json and figures go. A sweep's own, made from its grid's options, stay as they are unless asked."""
    if arguments.out:
        return storage.folder(arguments.out)
    if source.is_file():
        return source.parent
    return source / "fit" if "inputs_sha256" in records.read_json(source / "fit.json") else source


def with_truth(payload: dict, table) -> dict:
    """fit.json of a table of runs with ``truth`` added, where all runs read one source that knows its own entropy:
    ``least_loss``, what that source itself has on the validation split, nats per token, and ``irreducible``, every
    interval of a law's E against it (``truth.irreducible``)."""
    if "least_loss" not in table:
        return payload
    from scaling import truth  # and with it matplotlib

    least = truth.least_loss(table)
    if least is None:
        return payload
    return payload | {"truth": {"least_loss": least, "irreducible": truth.irreducible(payload, least)}}


def _run(arguments: argparse.Namespace) -> None:
    if arguments.bootstrap < 0:
        raise ValueError(f"--bootstrap is {arguments.bootstrap}: write 0 or more")
    if arguments.tau is not None and arguments.loss != "asymmetric":
        raise ValueError(f"--tau is the quantile of --loss asymmetric, and --loss is {arguments.loss}: write both")
    source = storage.folder(arguments.source)
    table, curves = load(source)
    reading = {"holdout_flops": arguments.holdout_flops, "source": str(arguments.source)}
    objective = {"loss": arguments.loss, "delta": arguments.delta}
    objective["tau"] = 0.5 if arguments.tau is None else arguments.tau
    resampling = {"bootstrap": arguments.bootstrap, "seed": arguments.seed}
    counted = {"num_params": arguments.num_params, "flops": arguments.flops}
    asked = arguments.law or DEFAULT_LAWS
    laws = dict.fromkeys([*(DEFAULT_LAWS if "all" in asked else ()), *(law for law in asked if law != "all")])
    options = {"combined": not arguments.one_law, **counted, **reading, **objective, **resampling}
    out = _out(arguments, source)
    analysis = analyse(table, curves, laws=tuple(laws), **options)
    payload = with_truth(analysis.to_json(), table)
    if "all" in asked:
        rows = compare.laws(analysis.observations, compare.surfaces(analysis.observations), **objective)
        payload["comparison"] = finite(rows)
    if arguments.convention:
        payload["conventions"] = finite(compare.conventions(table, **reading, **objective, **resampling))
    records.write_json(out / "fit.json", payload)
    show(terminal.console(sys.stdout, width=160, fold=False), payload)
    print(f"\nwritten: {out / 'fit.json'}")
    if not arguments.no_figures:
        from scaling import figures

        saved = figures.write(out / "figures", table, curves, payload)
        print(f"written: {len(saved)} figures in {out / 'figures'}")


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
    if payload["allocation"].get("tokens_per_param"):
        console.print(_ratio_table(payload["allocation"]))
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
    return " … ".join("unbounded" if end is None else _number(end) for end in interval)


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
        ends = "by construction" if "a_local" in fixed else _range(law["a_local_interval"])
        table.add_row(name, _number(law["a_local"]), ends, "", "")
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


if __name__ == "__main__":
    sys.exit(main())
