"""The command that fits: records or a CSV → laws, intervals, figures.

    python -m scaling.fit SOURCE [--law NAME …] [--loss huber|lad|squared|tukey] [--compare COLUMN] [--out DIR]

SOURCE is a results folder (``runs/*.json``) or a CSV with columns num_params,num_tokens,loss
(any delimiter and decimal mark, JSON and JSON lines, and names that trackers write: what was mapped is said). From
Python the same is ``analyse(table)`` and ``forecast(analysis, cells)``, or ``scaling.fit_law(table, "chinchilla")`` for
one law, ``scaling.compare(table, "optimizer")`` for how much better one group of runs is than another.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling import numbers, records, storage, terminal
from scaling.laws.analysis import DEFAULT_LAWS, Analysis, analyse
from scaling.laws.answers import approaches, comparison, of_runs
from scaling.laws.answers.forecast import forecast
from scaling.laws.answers.multiplier import compare
from scaling.laws.fitting import run_noise
from scaling.laws.fitting.estimate import Fit
from scaling.laws.fitting.estimate import fit as _fit
from scaling.laws.fitting.solver import DEFAULT_DELTA
from scaling.laws.forms import catalogue
from scaling.laws.intervals import diagnosis
from scaling.laws.payload import ASKED, finite, of_comparison
from scaling.laws.tables.observations import from_table, read_csv
from scaling.laws.tables.reading import NOTES
from scaling.report.printed import show

__all__ = ["Analysis", "analyse", "compare", "fit_law", "forecast", "main", "read"]


def fit_law(
    table,
    law="chinchilla",
    *,
    num_params: str = "non_embedding",
    flops: str = "exact",
    holdout_flops: float | None = None,
    bootstrap: int = 0,
    noise: str = "constant",
    source: str = "table",
    **options,
) -> Fit:
    """Fits one law to a pandas table: the rows that the command fits it to, with the same result.

    Args:
      num_params, flops: the conventions to fit under, where the table carries several.
      holdout_flops: leave out rows with more compute, beside those the table marks.
      bootstrap: resamples, in the fit's ``draws``; 0 makes none.
      noise: from run to run, ``constant`` or ``measured`` between repeats (``run_noise.measure``).
      options: those of ``laws.estimate.fit`` (loss, delta, tau, log), and ``seed`` of the resamples.

    Raises:
      ValueError: the table cannot be read as observations, or does not identify the law; says what would mend it.

    >>> fitted = scaling.fit_law(table, "chinchilla", bootstrap=1000)
    >>> fitted.params["alpha"], fitted.converged, uncertainty.interval(fitted.draws.params["alpha"])
    """
    numbers.check_resamples("bootstrap", bootstrap)
    law = catalogue.get(law)
    reading: dict[str, Any] = {"num_params": num_params, "flops": flops, "holdout_flops": holdout_flops}
    observations = from_table(
        table, **reading, source=source, target=law.target, columns=law.columns, signed=law.signed
    )
    seed = options.pop("seed", 0)
    rows, _ = approaches.select(observations, law)
    measured, _ = run_noise.asked(noise, observations, [law], options)
    if measured is not None:
        options = {**options, "variance": measured.variance}
    fitted = _fit(observations.take(rows), law, **options)
    if not bootstrap:
        return fitted
    clusters, _ = diagnosis.run_clusters(observations)
    told = diagnosis.diagnose(fitted, None if clusters is None else clusters[rows])
    return replace(fitted, draws=diagnosis.resample(fitted, told, bootstrap, seed))


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return on_source(_run, _arguments(argv))


def on_source(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Runs a command on a SOURCE; returns its exit code (2: bad input, said in one line)."""
    try:
        if arguments.bootstrap is not None:
            numbers.check_resamples("--bootstrap", arguments.bootstrap)
        run(arguments)
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
        f"{', '.join(catalogue.FORMS)}, package.module:function, or all: every law the columns allow, ranked",
    )  # fmt: skip
    parser.add_argument(
        "--loss", default="huber", help="huber (default), lad, squared, asymmetric or tukey, on log "
        "loss; tukey (the bisquare) gives no weight to runs that are far off",
    )  # fmt: skip
    parser.add_argument("--tau", type=float, help="quantile of --loss asymmetric (.5: as Huber's)")
    parser.add_argument(
        "--delta",
        type=float,
        help=f"Huber's δ (default: {DEFAULT_DELTA['huber']} × the residuals' scale, {DEFAULT_DELTA['tukey']} × for "
        "tukey; 1e-3 is usual)",
    )
    parser.add_argument(
        "--noise", default="constant", help="from run to run: constant (default), or measured where cells are "
        "repeated with seeds, as a function of N and D; fits are weighted by 1/σ²",
    )  # fmt: skip
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (0: the delta method)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--holdout-flops", type=float, metavar="C", help="leave out, and forecast, runs above C FLOPs")
    parser.add_argument(
        "--one-law", action="store_true", help="forecast from the first law of N and D, not from several forms combined"
    )
    parser.add_argument(
        "--compare", metavar="COLUMN", help="how much compute each value of COLUMN (a label, or a path into the runs "
        "such as model.family) saves over each other at equal loss; nothing else is fitted",
    )  # fmt: skip
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
        if not laws or laws[-1] in catalogue.FORMS or laws[-1] == "all" or ":" in laws[-1]:
            parser.error("SOURCE is missing: write a results folder or a CSV")
        laws.pop()
        arguments.source = arguments.law[-1]
    arguments.law = laws
    return arguments


def load(source: Path):
    """Returns (table, curves) of a results folder, of that of a group in one, or of a CSV.

    Raises ValueError saying what SOURCE should be.
    """
    table, curves, _ = read(source)
    return table, curves


def read(source: Path, compare: str | None = None):
    """``load``, and the records: none of a CSV. Runs that are compared may have laws apart; they come as in their grid,
    with the column that they are compared by."""
    source = storage.folder(source)
    runs = [] if source.is_file() else records.load_records(source)
    manifest = records.manifest(source) if runs else {}
    if compare is not None:
        runs = as_in_grid(runs, manifest)
    elif groups := manifest.get("groups"):
        raise ValueError(f"{source}: its laws are apart: write one of {', '.join(f'{source}/{g}' for g in groups)}")
    if runs:
        table = records.table(runs)
        if compare is not None:
            table = records.with_coordinate(table, runs, compare)
        table.attrs[NOTES] = _about_records(source, runs)
        return table, records.curves(runs), runs
    if source.is_dir():
        raise ValueError(f"{source}: no runs/*.json in it: write a results folder or a CSV")
    return read_csv(source), None, []


def asked(folder: Path) -> dict[str, Any]:
    """What the fit of a results folder was asked for, by its grid or its command, as ``analyse`` takes it: laws, loss,
    delta, tau, noise, bootstrap, holdout_flops, and how N and C are counted; empty without a fit.json.

    One written before it held the question says the laws that it has, their objective (whose δ may have been given or
    found, and is found again), their resamples and whether noise was measured.

    Raises ValueError where it cannot be read.
    """
    known = records.read_json(folder / "fit.json")
    counted = {k: v for k, v in (known.get("convention") or {}).items() if k in ("num_params", "flops")}
    if "asked" in known:
        return counted | {k: v for k, v in known["asked"].items() if k in ASKED}
    if not (laws := known.get("laws")):
        return counted
    first = next(iter(laws.values()))
    found = counted | {"laws": list(laws), "loss": first["loss"]["name"]}
    if first.get("num_bootstrap"):
        found["bootstrap"] = first["num_bootstrap"]
    return found | ({"noise": "measured"} if known.get("run_noise") else {})


def compared_as(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``asked`` a comparison of groups takes (``multiplier.compare``): one law, where one was asked for."""
    options = {k: v for k, v in asked.items() if k != "laws"}
    laws: Sequence[str] = asked.get("laws") or ()
    return options | ({"law": laws[0]} if len(laws) == 1 else {})


def as_in_grid(runs: list[records.RunRecord], manifest: Mapping[str, Any]) -> list[records.RunRecord]:
    """Records in the order of their grid's groups, or of its cells: the first group is what others are held against."""
    groups = manifest.get("groups") or {"": [cell["run_id"] for cell in manifest.get("cells") or []]}
    place = {run_id: i for i, run_id in enumerate(run_id for ids in groups.values() for run_id in ids)}
    return sorted(runs, key=lambda run: place.get(run.run_id, len(place)))


def _about_records(folder: Path, runs) -> list[str]:
    """What of a results folder is not read, or is read otherwise than it was written, in words."""
    notes, extra = records.changed_sides(runs), records.strangers(folder)
    if extra:
        where = f"of no cell of its grid, as {folder / 'sweep.json'} has it, are left out"
        notes.append(f"{len(extra)} records {where} ({records.named(extra)})")
    return notes


def _one_law(arguments: argparse.Namespace) -> str | None:
    """The law that --compare is by. Raises ValueError for several, and beside options that are of one group's laws."""
    if len(arguments.law) > 1 or "all" in arguments.law:
        raise ValueError(f"--law is {' '.join(arguments.law)}: write one law with --compare")
    if arguments.convention:
        raise ValueError("--convention refits one group's law: write it without --compare")
    return arguments.law[0] if arguments.law else None


def _out(arguments: argparse.Namespace, source: Path) -> Path:
    """Where fit.json and figures go. A sweep's own, made from its grid's options, stay as they are unless asked."""
    if arguments.out:
        return storage.folder(arguments.out)
    if source.is_file():
        return source.parent
    return source / "fit" if "inputs_sha256" in records.read_json(source / "fit.json") else source


def _run(arguments: argparse.Namespace) -> None:
    if arguments.tau is not None and arguments.loss != "asymmetric":
        raise ValueError(f"--tau is the quantile of --loss asymmetric, and --loss is {arguments.loss}: write both")
    source = storage.folder(arguments.source)
    table, curves, runs = read(source, arguments.compare)
    reading = {"holdout_flops": arguments.holdout_flops, "source": str(arguments.source)}
    objective = {"loss": arguments.loss, "delta": arguments.delta}
    objective["tau"] = 0.5 if arguments.tau is None else arguments.tau
    noise = {"noise": arguments.noise}
    resampling = {"bootstrap": arguments.bootstrap, "seed": arguments.seed}
    counted = {"num_params": arguments.num_params, "flops": arguments.flops}
    asked = arguments.law or DEFAULT_LAWS
    laws = dict.fromkeys([*(DEFAULT_LAWS if "all" in asked else ()), *(law for law in asked if law != "all")])
    options = {**counted, **reading, **objective, **noise, **resampling}
    out = _out(arguments, source)
    if arguments.compare is None:
        analysis = analyse(table, curves, laws=tuple(laws), combined=not arguments.one_law, **options)
        payload = analysis.to_json()
    else:
        law = _one_law(arguments)
        compared = compare(table, arguments.compare, law=law, **options)
        payload = of_comparison(compared, {"laws": [law] if law else None, **options})
    if runs:
        payload = of_runs.complete(payload, runs)
    if "all" in asked:
        measured = analysis.run_noise
        weighed = {**objective, "variance": None if measured is None else measured.variance}
        rows = comparison.laws(analysis.observations, comparison.surfaces(analysis.observations), **weighed)
        payload["comparison"] = finite(rows)
    if arguments.convention:
        payload["conventions"] = finite(comparison.conventions(table, **reading, **objective, **noise, **resampling))
    records.write_json(out / "fit.json", payload)
    show(terminal.console(sys.stdout, width=160, fold=False), payload)
    print(f"\nwritten: {out / 'fit.json'}")
    if not arguments.no_figures:
        from scaling.report import figures

        saved = figures.write(out / "figures", table, payload, runs)
        print(f"written: {len(saved)} figures in {out / 'figures'}")


if __name__ == "__main__":
    sys.exit(main())
