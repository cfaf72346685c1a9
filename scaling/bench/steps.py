"""Compiled steps timed in every worker at once, as a sweep runs them: throughput, packs, the way to the first step."""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scaling import accounting, data, fields, grid, storage
from scaling.config import RunConfig
from scaling.engine.plan import timings
from scaling.engine.plan.table import step_flops
from scaling.engine.run.tasks import Task
from scaling.engine.run.workers import Local
from scaling.execution import ExecutionConfig
from scaling.machine import processor


def grid_runs(path: str) -> tuple[list[RunConfig], ExecutionConfig]:
    """One run of each distinct shape of a grid file, smallest step first, and how the grid executes them."""
    loaded = grid.load(path, data.epochs_of(storage.cache_dir()))
    shapes = {timings.shape_key(cell.run): cell.run for cell in loaded.cells}
    return sorted(shapes.values(), key=step_flops), loaded.execution


def of_widths(runs: Sequence[RunConfig], widths: Sequence[int]) -> list[RunConfig]:
    """Those of ``runs`` that are so wide. Raises ValueError for a width that none has."""
    there = list(dict.fromkeys(run.model.d_model for run in runs))
    if wrong := [width for width in widths if width not in there]:
        raise ValueError(f"--widths is {wrong[0]}: write some of {', '.join(map(str, there))}")
    return [run for run in runs if run.model.d_model in widths]


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


def measure_startup(runs: Sequence[RunConfig], execution: ExecutionConfig, *, workers: int) -> list[dict]:
    """How long until each run's first step is done, the slowest of ``workers`` that do it at once; a row a run.

    ``cold_seconds`` from the start of a process that has to compile, ``warm_seconds`` from the start of one that finds
    the programs on disk, ``next_seconds`` from one cell to the next of its shape in the same process; the data are
    prepared before. Raises ValueError with the worker's reason if a run cannot be timed.
    """
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


def show_startup(console: Console, rows: Sequence[dict], workers: int) -> None:
    title = f"{processor()}, {workers} worker{'s' if workers > 1 else ''}: seconds to the end of the first step"
    table = Table(title=title, title_justify="left")
    for heading in ("width×layers", "parameters", "nothing compiled", "compiled before", "next cell of the shape"):
        table.add_column(heading, justify="right")
    for row in rows:
        seconds = (f"{row[key]:.2f}" for key in ("cold_seconds", "warm_seconds", "next_seconds"))
        table.add_row(f"{row['d_model']}×{row['num_layers']}", f"{row['num_params']:,}", *seconds)
    console.print(table)


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
