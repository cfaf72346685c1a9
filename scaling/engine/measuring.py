"""Measures before a sweep trains: what each shape takes on this machine, and how many of one fit a device."""

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from scaling import terminal
from scaling.config import RunConfig
from scaling.engine.errors import BadInputError
from scaling.engine.plan import packing, timings
from scaling.engine.plan.table import Row
from scaling.engine.run.executor import Runner
from scaling.engine.run.tasks import Task

# Stepping time behind a shape's timing. Its compilation, the larger part, is not lost: training reuses the program.
CALIBRATION_SECONDS = 0.3


def shapes(
    missing: Mapping[str, RunConfig], runner: Runner, about: Callable[[RunConfig], dict], console: Console, grid: str
) -> dict[str, timings.Timing]:
    """Times a run of each shape on this machine, all workers at once; a shape that cannot be timed is left out.

    ``about``: what a task says of a run; ``grid``: whose shapes they are, in messages. Raises BadInputError if none can
    be, all for the same reason: then no cell can train either.
    """
    console.print(f"timing {len(missing)} shapes on this machine …")
    seconds = {"seconds": CALIBRATION_SECONDS}
    tasks = [
        Task(key, "calibrate", about(run) | seconds, program=packing.shape_of(run)) for key, run in missing.items()
    ]
    done = itertools.count(1)
    with console.status("") as shown:  # on a terminal alone

        def on_event(event: dict) -> None:
            if event["event"] in ("done", "failed"):
                shown.update(terminal.text(f"{next(done)} of {len(tasks)} timed"))

        answers = runner.run(tasks, on_event)
    reasons = {answer.reason for answer in answers.values()}
    if len(reasons) == 1 and None not in reasons:
        raise BadInputError(f"{grid}: {reasons.pop()}")
    return {key: timings.Timing.of(answer.value) for key, answer in answers.items() if answer.value is not None}


def pack_sizes(
    rows: Sequence[Row], runner: Runner, about: Callable[[RunConfig], dict], console: Console
) -> dict[str, int] | None:
    """Members that a device holds, by shape, for every shape that several of the rows have; None if none has."""
    counts = collections.Counter(packing.shape_of(row.cell.run) for row in rows)
    tasks = {
        shape: Task(row.run_id, "pack_size", about(row.cell.run) | {"most": counts[shape]})
        for row in rows
        if counts[shape := packing.shape_of(row.cell.run)] > 1
    }
    if not tasks:
        return None
    console.print(f"compiling {len(tasks)} shapes, to see how many runs of each fit a device …")
    answers = runner.run(list(tasks.values()))
    found = {shape: answers[task.key].value for shape, task in tasks.items()}
    return {shape: value["members"] for shape, value in found.items() if value is not None}
