"""Runs a measurement and prints it: tokens/s and FLOP/s by model size with all workers busy, or what an option names.

    python -m scaling.bench                               three sizes at sequence 256
    python -m scaling.bench --family recurrent            of another family, and its layers beside another library's
    python -m scaling.bench --grid sweeps/chinchilla.yaml the shapes of a grid
    python -m scaling.bench --packs 2 4 8                 what packs of so many runs gain
    python -m scaling.bench --family recurrent --widths 64 --packs 2 4 8
    python -m scaling.bench --startup                     how long until a process trains

    python -m scaling.bench --gpu-day --minutes 8 --out D  an accelerator in one sitting, resumed by the same command
    python -m scaling.bench --data                        tokenising, batches and synthetic sources, one core
    python -m scaling.bench --laws                        the fits
    python -m scaling.bench --coverage 400                what intervals hold, by kind of noise and design
    python -m scaling.bench --design-curve 20             FLOPs that an exponent takes: designed, by budgets, at random
    python -m scaling.bench --design                      what targets are predicted from runs chosen one by one

Every worker times the same compiled step at the same time, as in a sweep: the sum is what the machine does. Ratios
between runs of this command on one machine mean something; single figures drift with its other load.
"""

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from scaling import accounting, data, fields, grid, machine, records, storage, terminal
from scaling.bench.families import FAMILIES, compare
from scaling.config import RunConfig
from scaling.engine.plan import timings
from scaling.engine.plan.table import step_flops
from scaling.engine.run.tasks import ExecutorError, Task
from scaling.engine.run.workers import Local, auto_workers
from scaling.execution import ExecutionConfig
from scaling.laws.payload import finite
from scaling.machine import processor


def grid_runs(path: str) -> tuple[list[RunConfig], ExecutionConfig]:
    """One run of each distinct shape of a grid file, smallest step first, and how the grid executes them."""
    loaded = grid.load(path, data.epochs_of(storage.cache_dir()))
    shapes = {timings.shape_key(cell.run): cell.run for cell in loaded.cells}
    return sorted(shapes.values(), key=step_flops), loaded.execution


def measure(
    runs: Sequence[RunConfig],
    execution: ExecutionConfig,
    *,
    workers: int,
    cache_dir: Path,
    seconds: float,
    num_members: int = 1,
    tell: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Times each run's step and evaluation, in packs of ``num_members``, on ``workers`` processes at once; a row a run.

    Rows hold ``workers``, ``num_members``, ``family``, ``num_params`` (non-embedding), ``d_model``, ``num_layers``,
    ``seq_len``, ``batch_size``, and summed over workers and members ``tokens_per_s``, ``flops_per_s`` (training, rule
    exact) and ``eval_tokens_per_s``; ``compile_seconds`` is the slowest worker's, ``seconds`` the workers' mean of what
    ``loop.calibrate`` gives, ``memory_bytes`` a device's need in a train step.

    ``tell``: hears of each row when it is there. Raises ValueError with the worker's reason if a run cannot be timed.
    """
    from scaling import data

    for data_config in {run.data for run in runs}:
        data.prepare(data_config, cache_dir)
    rows = []
    with tempfile.TemporaryDirectory() as logs, contextlib.closing(Local(workers, Path(logs))) as executor:
        for run in runs:
            timed = _timed(executor, workers, run, execution, cache_dir, seconds=seconds, num_members=num_members)
            rows.append(_row(run, num_members, timed, data.open(run.data, cache_dir)))
            tell(rows[-1])
    return rows


def _timed(
    executor: Local, workers: int, run: RunConfig, execution: ExecutionConfig, cache_dir: Path,
    **options,
) -> list[dict]:  # fmt: skip
    """What ``loop.calibrate`` answers to a run in every worker at once. Raises ValueError with the first reason why one
    cannot."""
    payload = {"execution": fields.to_dict(execution), "cache_dir": str(cache_dir), "run": fields.to_dict(run)}
    tasks = [Task(f"{i}", "calibrate", payload | options) for i in range(workers)]
    answers = executor.run(tasks).values()
    failed = [answer.reason for answer in answers if answer.value is None]
    if failed:
        raise ValueError(f"{run.run_id}: {failed[0]}")
    return [answer.value for answer in answers]  # type: ignore[misc]  # none has failed


def _row(run: RunConfig, num_members: int, timed: list[dict], corpus) -> dict:
    tokens_per_s = sum(num_members * run.batch_tokens / t["step_seconds"] for t in timed)
    return {
        "workers": len(timed),
        "num_members": num_members,
        "family": run.model.family,
        "num_params": accounting.param_counts(run.model)["non_embedding"],
        "d_model": run.model.d_model,
        "num_layers": run.model.num_layers,
        "seq_len": run.data.seq_len,
        "batch_size": run.batch_size,
        "tokens_per_s": tokens_per_s,
        "flops_per_s": tokens_per_s * accounting.flops_of(run)["exact"],
        "eval_tokens_per_s": sum(num_members * corpus.validation_tokens / t["eval_seconds"] for t in timed),
        "compile_seconds": max(t["compile_seconds"] for t in timed),
        "memory_bytes": timed[0].get("memory_bytes"),
        "seconds": {name: statistics.mean(t[name] for t in timed) for name in timed[0] if name.endswith("_seconds")},
    }


def keep_for_plans(runs: Sequence[RunConfig], rows: Sequence[dict], cache: timings.TimingCache) -> None:
    """Adds the rows' seconds to the timings that a sweep's plan predicts from, in place of its own short ones."""
    measured = {
        timings.shape_key(run): timings.Timing.of(row["seconds"] | {"memory_bytes": row["memory_bytes"]})
        for run, row in zip(runs, rows)
    }
    cache.save(cache.load() | measured)


def show_laws(console: Console) -> None:
    """The speed of the fits, in seconds, beside what each should take on two quiet cores."""
    from scaling.bench import laws

    measured = laws.measure()
    points = "Epoch's 240 points" if measured["epoch"] else "240 made-up points ($SCALING_PUBLISHED has no Epoch's)"
    rows = [
        ("60 noise-free runs recovered", "noise_free_60", "0.05"),
        (f"{points}, one fit", "fit_240", "–"),
        (f"{points}, 4,000 bootstrap fits", "bootstrap_4000_of_240", "3"),
        (f"{points}, three forms and their rolling forecasts", "combine_240", "–"),
        ("10,000 runs, read from a CSV and fitted", "load_and_fit_10000", "30"),
    ]
    table = Table("fit", "seconds", "asked", title=f"{processor()}, one process", title_justify="left")
    for name, key, asked in rows:
        table.add_row(name, f"{measured[key]:.3f}", asked)
    console.print(table)
    console.print(f"noise-free recovery: relative error {measured['relative_error']:.1e} (asked: 1e-10)")
    console.print(f"bootstrap replicates converged: {100 * measured['bootstrap_converged']:.1f} %")


def show_coverage(console: Console, num_draws: int, out: Path | None) -> None:
    """Prints a line a kind of noise and design, each when it is done: coverage of nominal 90 % intervals."""
    from scaling.bench import coverage

    def line(row: dict) -> None:
        shares = ", ".join(
            f"{label} {100 * row['chosen'][k]['coverage']:.1f} % (profile {100 * row['profile'][k]['coverage']:.1f} %)"
            for k, label in (("a", "a"), ("num_params", "N*"))
        )
        console.print(f"{row['noise']}, {row['design']}, {row['num_runs']} runs: {shares}")
        if measured := row.get("measured"):
            held = ", ".join(f"{k} {100 * measured[k]['coverage']:.1f} %" for k in ("a", "num_params", "loss"))
            ratio = measured["a"]["rmse"] / row["chosen"]["a"]["rmse"]
            console.print(f"  with noise measured between repeats: {held}; RMSE of a {ratio:.3f} of the unweighted")

    rows = coverage.study(num_draws, line)
    if out:
        records.write_json(out, {"num_draws": num_draws, "rows": rows, "environment": records.software()})


def show_design_curve(console: Console, orders: int, out: Path | None) -> None:
    """Prints a line a table, each when it is done: FLOPs until the 90 % interval of a is as narrow as was asked."""
    from scaling.bench import designed

    def told(row: dict) -> str:
        lower, upper = row["interval"]
        ends = f"a {row['a']:.3f}, {lower:.3f}–{upper:.3f}" if row["a"] is not None else "no law"
        return f"{row['flops']:.2e} ({row['runs']} runs; {ends}{'' if row['reached'] else '; not reached'})"

    found = {}
    for name, rows in designed.tables().items():
        found[name] = row = designed.measure(rows, orders)
        spent = sorted(r["flops"] if r["reached"] else math.inf for r in row["random"])
        middle = f"{statistics.median(spent):.2e}, {spent[0]:.2e} to {spent[-1]:.2e}"
        held = sum(r["interval"][0] <= row["all"]["a"] <= r["interval"][1] for r in row["random"])
        console.print(f"{name}: a width of {row['goal']:.3f}; all {told(row['all'])}", soft_wrap=True)
        for order in ("designed", "isoflop"):
            console.print(f"  {order} {told(row[order])}", soft_wrap=True)
        console.print(f"  random {middle}; {held} of {orders} hold the a of all runs", soft_wrap=True)
    if out:
        records.write_json(out, {"orders": orders, "tables": finite(found), "environment": records.software()})


def show_design(console: Console, out: Path | None) -> int:
    """Prints a line a table and method, each when it is done, and then R² on the targets by method after 1, 5 and 10 %
    of the cost; exit code 2 without the tables."""
    from scaling.bench import design

    def line(row: dict) -> None:
        scores = ", ".join(f"{100 * share:g} % {r:.3f}" for share, r in zip(design.SHARES, row["r_squared"]))
        groups = ", ".join(f"{r:.3f}" for r in row["together"])
        of_groups = "" if row["together"] == row["r_squared"] else f"; of all groups' targets together {groups}"
        console.print(f"{row['table']}, {row['method']}: {scores}{of_groups} ({row['seconds']:.0f} s)")

    begin = time.perf_counter()
    try:
        rows = design.measure(line)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    found = {(row["table"], row["method"]): row["r_squared"] for row in rows}
    names = list(dict.fromkeys(row["table"] for row in rows))
    title = "mean R² on the targets after " + ", ".join(f"{100 * s:g}" for s in design.SHARES) + " % of the cost"
    table = Table("table", *design.METHODS, "published best at 10 %", title=title, title_justify="left")
    for name in names:
        cells = (" ".join(f"{r:.3f}" for r in found[name, method]) for method in design.METHODS)
        table.add_row(name, *cells, f"{design.PUBLISHED[name][0]:.2f}" if name in design.PUBLISHED else "–")
    means = (np.mean([found[name, method] for name in names], axis=0) for method in design.METHODS)
    best = [design.PUBLISHED[name][0] for name in names if name in design.PUBLISHED]
    table.add_row(
        "mean", *(" ".join(f"{r:.3f}" for r in mean) for mean in means), f"{np.mean(best):.3f}" if best else "–"
    )
    console.print(table)
    seconds = time.perf_counter() - begin
    console.print(f"{processor()}, one process: {seconds:.0f} s")
    if out:
        records.write_json(out, {"rows": rows, "seconds": seconds, "environment": records.software()})
    return 0


def show_data(console: Console, out: Path | None) -> int:
    """The speed of preparing text and of cutting batches, by tokenizer, and of generating the sources whose entropy is
    known; exit code 2 without a tokenizer's library."""
    from scaling.bench import data

    try:
        rows = data.measure()
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    table = Table(title=f"{processor()}, one process", title_justify="left")
    for heading in ("tokenizer", "training s", "MB/s", "tokens/s", "bytes/token", "µs a batch of 16×128"):
        table.add_column(heading, justify="right")
    for row in rows:
        trained = "–" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}"
        table.add_row(
            row["tokenizer"], trained, f"{row['mb_per_s']:.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['bytes_per_token']:.2f}", f"{row['batch_us']:.0f}",
        )  # fmt: skip
    console.print(table)
    generated = data.measure_synthetic()
    table = Table(title="generated while they are read", title_justify="left")
    for heading in ("source", "tables s", "tokens/s", "µs a batch of 16×128", "slowest"):
        table.add_column(heading, justify="right")
    for row in generated:
        table.add_row(
            row["source"], f"{row['setup_seconds']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['batch_us']:.0f}",
            f"{row['slowest_batch_us']:,.0f}",
        )  # fmt: skip
    console.print(table)
    if out:
        payload = {"processor": processor(), "rows": rows, "synthetic": generated}
        records.write_json(out, {**payload, "environment": records.software()})
    return 0


def show(console: Console, rows: Sequence[dict], workers: int) -> None:
    title = f"{processor()}, {workers} worker{'s' if workers > 1 else ''}; training FLOPs by rule exact"
    table = Table(title=title, title_justify="left")
    for heading in ("width×layers", "parameters", "seq", "batch", "tokens/s", "GFLOP/s", "eval tokens/s", "compile s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['d_model']}×{row['num_layers']}",
            f"{row['num_params']:,}",
            f"{row['seq_len']}",
            f"{row['batch_size']}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['flops_per_s'] / 1e9:,.1f}",
            f"{row['eval_tokens_per_s']:,.0f}",
            f"{row['compile_seconds']:.1f}",
        )
    console.print(table)


def show_compared(console: Console, rows: Sequence[dict], family: str) -> None:
    """A line a model: forward and backward pass of its layers, ours and the other library's."""
    other = FAMILIES[family].other
    title = f"{processor()}, one process, forward and backward pass of a stack of layers, in turn"
    table = Table(title=title, title_justify="left")
    for heading in ("layers", "width", "ours ms", f"{other} ms", f"{other}'s time over ours"):
        table.add_column(heading, justify="right")
    for row in rows:
        ours, others = (f"{1e3 * row[key]:.1f}" for key in ("ours_seconds", "other_seconds"))
        table.add_row(row["model"], f"{row['d_model']}", ours, others, f"{row['ratio']:.2f}×")
    console.print(table)


def measure_startup(runs: Sequence[RunConfig], execution: ExecutionConfig, *, workers: int) -> list[dict]:
    """How long until each run's first step is done, the slowest of ``workers`` that do it at once; a row a run.

    ``cold_seconds`` from the start of a process that has to compile, ``warm_seconds`` from the start of one that finds
    the programs on disk, ``next_seconds`` from one cell to the next of its shape in the same process; the data are
    prepared before. Raises ValueError with the worker's reason if a run cannot be timed.
    """
    from scaling import data

    rows = []
    with tempfile.TemporaryDirectory() as fresh:
        for data_config in {run.data for run in runs}:
            data.prepare(data_config, Path(fresh))
        for run in runs:
            num_params = accounting.param_counts(run.model)["non_embedding"]
            row = {"d_model": run.model.d_model, "num_layers": run.model.num_layers, "num_params": num_params}
            for name in ("cold_seconds", "warm_seconds"):
                since, following = time.time(), dataclasses.replace(run, seed=run.seed + 1)
                with contextlib.closing(Local(workers, Path(fresh) / "logs")) as executor:
                    for key, one in ((name, run), ("next_seconds", following)):
                        timed = _timed(executor, workers, one, execution, Path(fresh), seconds=0.0, since=since)
                        row[key] = max(t["first_step_seconds"] for t in timed)
                        since = time.time()
            rows.append(row)
    return rows


def show_startup(console: Console, rows: Sequence[dict], workers: int) -> None:
    title = f"{processor()}, {workers} worker{'s' if workers > 1 else ''}: seconds to the end of the first step"
    table = Table(title=title, title_justify="left")
    for heading in ("width×layers", "parameters", "nothing compiled", "compiled before", "next cell of the shape"):
        table.add_column(heading, justify="right")
    for row in rows:
        seconds = (f"{row[key]:.2f}" for key in ("cold_seconds", "warm_seconds", "next_seconds"))
        table.add_row(f"{row['d_model']}×{row['num_layers']}", f"{row['num_params']:,}", *seconds)
    console.print(table)


def measure_packs(
    runs: Sequence[RunConfig], execution: ExecutionConfig, sizes: Sequence[int], *, workers: int, **options
) -> list[dict]:
    """Rows of ``measure`` for every pack size, shape by shape: in one process with all cores, and in ``workers``
    processes at once.

    Each has ``gain``: its tokens/s over those of lone runs, one after the other, in one process.
    """
    rows = []
    for run in runs:
        for count in sorted({1, workers}):
            for size in sizes:
                rows += measure([run], execution, workers=count, num_members=size, **options)
    alone = {row["num_params"]: row["tokens_per_s"] for row in reversed(rows)}  # the first there is of each
    return [{**row, "gain": row["tokens_per_s"] / alone[row["num_params"]]} for row in rows]


def pack_line(row: dict) -> str:
    """What was timed of a pack, in a line."""
    return (
        f"{row['d_model']}×{row['num_layers']}, runs a pack: {row['num_members']}, processes: {row['workers']}: "
        f"{row['tokens_per_s']:,.0f} tokens/s, compiled in {row['compile_seconds']:.1f} s"
    )


def of_widths(runs: Sequence[RunConfig], widths: Sequence[int]) -> list[RunConfig]:
    """Those of ``runs`` that are so wide. Raises ValueError for a width that none has."""
    there = list(dict.fromkeys(run.model.d_model for run in runs))
    if wrong := [width for width in widths if width not in there]:
        raise ValueError(f"--widths is {wrong[0]}: write some of {', '.join(map(str, there))}")
    return [run for run in runs if run.model.d_model in widths]


def show_packs(console: Console, rows: Sequence[dict]) -> None:
    """A line a pack size; tokens/s of all workers together and the gain over lone runs in one process."""
    for shape in dict.fromkeys((row["d_model"], row["num_layers"], row["num_params"]) for row in rows):
        title = f"{shape[0]}×{shape[1]}, {shape[2]:,} parameters, {processor()}: tokens/s of all, and gain"
        table = Table("runs a pack", title=title, title_justify="left")
        mine = {(row["workers"], row["num_members"]): row for row in rows if row["num_params"] == shape[2]}
        counts = sorted({count for count, _ in mine})
        for count in counts:
            table.add_column(f"{count} process{'es' if count > 1 else ''}", justify="right")
        for size in sorted({size for _, size in mine}):
            found = [mine[count, size] for count in counts]
            table.add_row(f"{size}", *(f"{row['tokens_per_s']:,.0f}  {row['gain']:.2f}×" for row in found))
        console.print(table)


def _gpu_day(console: Console, minutes: float, out: Path | None) -> int:
    from scaling.bench import gpu_day

    try:
        if out is None or (out.exists() and not out.is_dir()):
            raise ValueError("--gpu-day: say into which folder: write --out DIR")
        if not minutes > 0:
            raise ValueError(f"--minutes is {minutes}: write a number above 0, as 8")
        return gpu_day.sit(console, out, minutes, gpu_day.Day())
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scaling.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", metavar="FILE", help="time this grid's shapes, for its plan (default: three sizes)")
    parser.add_argument(
        "--family", choices=tuple(FAMILIES),
        help="time this family's sizes (default: transformer), and its layers beside another library's",
    )  # fmt: skip
    parser.add_argument("--laws", action="store_true", help="time the fits of scaling.laws instead")
    parser.add_argument(
        "--coverage", type=int, metavar="DRAWS",
        help="print how often nominal 90 %% intervals hold the truth, of so many draws a kind of noise and design",
    )  # fmt: skip
    parser.add_argument(
        "--design-curve", type=int, metavar="ORDERS",
        help="print the FLOPs that a known exponent takes of published tables ($SCALING_PUBLISHED) and the default "
        "sweep: designed, budget by budget, and by so many random orders",
    )  # fmt: skip
    parser.add_argument(
        "--design", action="store_true",
        help="print how well targets are predicted from runs chosen one by one, on the tables of $SCALING_PUBLISHED",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        action="store_true",
        help="time tokenising, cutting batches and generating synthetic sources, on one core, instead",
    )
    parser.add_argument(
        "--packs",
        type=int,
        nargs="+",
        metavar="K",
        help="time packs of these sizes, 1 first, in one process and in all",
    )
    parser.add_argument("--widths", type=int, nargs="+", metavar="W", help="time only the shapes that are so wide")
    parser.add_argument(
        "--startup", action="store_true", help="time the way from a process's start to its first step, instead"
    )
    parser.add_argument(
        "--gpu-day", action="store_true",
        help="measure an accelerator, in order of worth, into the folder --out; the same command goes on",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="of --gpu-day (8)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes at once (default: one a core on CPU)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="about how long to time each (2)")
    parser.add_argument("--out", type=Path, metavar="FILE",
        help="also write the rows and the environment as JSON; of --gpu-day, the folder")  # fmt: skip
    args = parser.parse_args(argv)
    cache_dir = storage.cache_dir()
    workers = args.workers or auto_workers(len(machine.cores()))
    console = terminal.console(sys.stdout)
    if args.coverage is not None:
        if args.coverage < 1:
            print(f"error: --coverage is {args.coverage}: write 1 or more draws", file=sys.stderr)
            return 2
        show_coverage(console, args.coverage, args.out)
        return 0
    if args.gpu_day:
        return _gpu_day(console, args.minutes, args.out)
    if args.design_curve is not None:
        if args.design_curve < 1:
            print(f"error: --design-curve is {args.design_curve}: write 1 or more random orders", file=sys.stderr)
            return 2
        show_design_curve(console, args.design_curve, args.out)
        return 0
    if args.laws:
        show_laws(console)
        return 0
    if args.design:
        return show_design(console, args.out)
    if args.data:
        return show_data(console, args.out)
    try:
        if args.grid and args.family:
            raise ValueError("--grid and --family both say what is timed: write one of them")
        family = args.family or "transformer"
        runs, execution = grid_runs(args.grid) if args.grid else (FAMILIES[family].runs, ExecutionConfig())
        runs = of_widths(runs, args.widths) if args.widths else runs
        compared: list[dict] = []
        options = {"workers": workers, "cache_dir": cache_dir, "seconds": args.seconds}
        if args.packs:
            sizes = sorted({1, *args.packs})
            rows = measure_packs(runs, execution, sizes, tell=lambda row: console.print(pack_line(row)), **options)
        elif args.startup:
            rows = measure_startup(runs, execution, workers=workers)
        else:
            rows = measure(runs, execution, **options)
            if args.family and FAMILIES[family].other:
                chosen = [c for c in FAMILIES[family].compared if args.widths is None or c.d_model in args.widths]
                compared = compare(family, seconds=args.seconds, compared=chosen)
    except (ValueError, ExecutorError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if args.packs:
        show_packs(console, rows)
    elif args.startup:
        show_startup(console, rows, workers)
    else:
        show(console, rows, workers)
    if compared:
        show_compared(console, compared, family)
    cache = timings.TimingCache(cache_dir, args.workers or "auto", execution)
    if args.packs:
        cache.save_packs(rows)
    elif args.grid and not args.startup:
        keep_for_plans(runs, rows, cache)
    if args.out:
        payload = {"processor": processor(), "workers": workers, "rows": rows, "environment": records.software()}
        if compared:
            payload["compared"] = compared
        records.write_json(args.out, payload)
        console.print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
