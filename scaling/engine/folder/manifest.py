"""``sweep.json``: what a sweep planned, what it did, and what that cost."""

import datetime
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from scaling import machine, records
from scaling.engine.folder.lock import alone
from scaling.engine.plan import costs, trunks
from scaling.engine.plan.hardware import EnergyMeter, Hardware
from scaling.engine.plan.table import CONCLUSION_SECONDS, Row, predicted_wall
from scaling.grid import Grid
from scaling.machine import processor
from scaling.records import read_or_empty

# Between two writes after cells that end: seconds, and as many more as keep writing to this share of the time.
WRITE_EVERY_SECONDS = 2.0
WRITE_SHARE = 0.02
CANDIDATE = "candidate"  # status of a cell that a design may buy


class Manifest:
    """``sweep.json``: the grid, its cells with cost and status, the plan, and what each call of the command did.

    A call's entry is written when it starts and again, every few seconds at most, with the cells that end: a killed
    call is counted but for its last seconds. ``actual`` sums the calls; ``hardware`` says what turns time into money
    and energy. Shards of one folder write it in turn, each with what it found there.
    """

    def __init__(
        self, results: Path, *, grid: Grid, grid_path: str, command: str, shard: str | None,
        hardware: Hardware | None = None,
    ):  # fmt: skip
        self.path = results / "sweep.json"
        self._shared = shard is not None
        self.dropped: Sequence[Row] = ()  # left out to stay within a budget
        self.warnings: Sequence[str] = ()  # about the grid
        self.candidates: Callable[[], Sequence[Row]] = tuple  # cells that a design may buy, and has not
        self.design: dict[str, Any] | None = None  # of a grid that has one: its rounds, and how they ended
        self._hardware = hardware or Hardware.of(grid.hardware, has_accelerator=False)
        self._meter = EnergyMeter()
        self._clock = time.monotonic()
        self._next_write = 0.0
        self._training_since: float | None = None
        self._call: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "shard": shard,
            "workers": None,
            "wall_seconds": 0.0,
            "training_seconds": 0.0,
            "seconds_in_steps": 0.0,
            "measured_kwh": None,
            "peak_device_bytes": None,
            "cells": [],
        }
        self._head = {
            "schema": 1, "name": grid.name, "grid": grid.text, "grid_path": grid_path, "command": command,
            "groups": grid.groups,
        }  # fmt: skip

    def cell_ended(self, record: records.RunRecord) -> None:
        """Counts a cell. Its seconds are its share of its pack's, and of the steps that it trained itself."""
        self._call["cells"].append(record.run_id)
        self._call["seconds_in_steps"] += record.timing.get("step_seconds") or 0.0
        peaks = [self._call["peak_device_bytes"], record.environment.get("device_peak_bytes")]
        self._call["peak_device_bytes"] = max((p for p in peaks if p is not None), default=None)

    @contextmanager
    def training(self) -> Iterator[None]:
        """While it lasts, workers train; what they did between two writes is lost if the call is killed."""
        self._training_since = time.monotonic()
        try:
            yield
        finally:
            self._count_training()
            self._training_since = None

    def _count_training(self) -> None:
        if self._training_since is not None:
            now = time.monotonic()
            self._call["training_seconds"] += now - self._training_since
            self._training_since = now

    def in_turn(self) -> AbstractContextManager:
        """While it lasts the folder's other shards do not write what they share: this manifest and the forecast."""
        return alone(self.path.parent / ".lock-manifest") if self._shared else nullcontext()

    def spent_seconds(self) -> float:
        """Wall time of the calls so far, this one's included."""
        before = (read_or_empty(self.path).get("actual") or {}).get("wall_seconds") or 0.0
        return before + time.monotonic() - self._clock

    def write(
        self, table: Sequence[Row], found: dict[str, str], workers: int | None, *, at_leisure: bool = False
    ) -> None:
        """Writes the file; ``at_leisure`` not if that was done lately: what it takes grows with the grid, and after
        every cell it would in the end take longer than the cell."""
        begun = time.monotonic()
        if at_leisure and begun < self._next_write:
            return
        with self.in_turn():
            self._write(table, found, workers)
        ended = time.monotonic()
        self._next_write = ended + max(WRITE_EVERY_SECONDS, (ended - begun) / WRITE_SHARE)

    def _write(self, table: Sequence[Row], found: dict[str, str], workers: int | None) -> None:
        before = read_or_empty(self.path)
        if self._shared:  # what other shards have finished since this one looked
            found = {c["run_id"]: c["status"] for c in before.get("cells", []) if c["status"] != "waiting"} | found
        self._count_training()
        if workers is not None:
            self._call["workers"] = workers
        self._call["wall_seconds"] = round(time.monotonic() - self._clock, 3)
        self._call["measured_kwh"] = self._meter.kwh()
        own = (self._call["started"], self._call["shard"])
        calls = [c for c in before.get("calls", []) if (c["started"], c["shard"]) != own]
        if self._call["cells"] or self._call["training_seconds"]:  # a call that trained nothing cost the sweep nothing
            calls.append(self._call)
        share = functools.partial(costs.share_of, self._hardware, workers or 1)
        cells = [_cell_json(row, found, share) for row in table]
        cells += [_cell_json(row, {row.run_id: "dropped"}, share) for row in self.dropped]
        bought = {cell["run_id"] for cell in cells}
        cells += [_cell_json(row, {row.run_id: CANDIDATE}, share) for row in self.candidates()]
        training = predicted_wall(table, workers) if workers else None
        same_cells = bought == {c["run_id"] for c in before.get("cells", []) if c["status"] != CANDIDATE}
        if training is None:  # nothing to predict from; of a design's next round it is predicted anew
            planned = before.get("plan") if same_cells or self.design is None else None
        elif same_cells and before.get("plan"):  # what was predicted first stands
            planned = before.get("plan")
        else:  # of the whole command: what it took to get here is known
            so_far = self._call["wall_seconds"] - self._call["training_seconds"]  # some, where rounds came before
            whole = round(so_far + training + CONCLUSION_SECONDS, 3)
            bill = costs.Bill(table, self._hardware, workers, whole)  # type: ignore[arg-type]  # training is known: there are workers
            planned = {
                "predicted_seconds": whole,
                "predicted_training_seconds": training,
                "workers": workers,
                "memory_bytes": bill.memory_bytes,
                "dollars": bill.total.dollars,
                "kwh": bill.total.kwh,
                "flops": trunks.flops(table),
            }
        records.write_json(
            self.path,
            {
                **self._head,
                **({} if self.design is None else {"design": self.design}),
                "cells": self._keep_steps(_keep_predictions(cells, before.get("cells", [])), before),
                "plan": planned,
                "hardware": self._hardware.to_json(),
                "warnings": list(self.warnings) or before.get("warnings", []),
                "actual": _totals(calls, self._hardware),
                "calls": calls,
                "environment": _environment() if workers else before.get("environment", {}),
            },
        )

    def _keep_steps(self, cells: list[dict], before: dict) -> list[dict]:
        """The cells; those of a design that were in when this call began with the step from which they trained: a plan
        of all rounds at once would have them branch off elsewhere."""
        if self.design is None:
            return cells
        done = {
            c["run_id"]: c["branch_step"] for c in before.get("cells", []) if c["status"] in ("completed", "diverged")
        }
        return [c | {"branch_step": done[c["run_id"]]} if c["run_id"] in done else c for c in cells]


def _cell_json(row: Row, found: dict[str, str], share: Callable) -> dict:
    cost = share(row.seconds)
    return {
        "run_id": row.run_id,
        **row.cell.place,
        "num_params": row.plan.num_params,
        "num_tokens": row.plan.num_tokens,
        "num_steps": row.plan.num_steps,
        "branch_step": row.first_step,
        "flops": row.plan.flops,
        "predicted_seconds": row.seconds,
        "dollars": cost.dollars,
        "kwh": cost.kwh,
        "memory_bytes": row.memory_bytes,
        "checkpoint_bytes": row.plan.checkpoint_bytes,
        "status": found.get(row.run_id, "waiting"),
    }


def _keep_predictions(cells: list[dict], before: list[dict]) -> list[dict]:
    """What was predicted first stands: a later call may run on another machine, know the answer, or not ask."""
    first = {c["run_id"]: c for c in before}
    keys = ("predicted_seconds", "dollars", "kwh", "memory_bytes")
    return [c | {k: v for k in keys if (v := first.get(c["run_id"], {}).get(k))} for c in cells]


def _totals(calls: list[dict], hardware: Hardware) -> dict:
    def total(key: str) -> float:
        return round(sum(c[key] for c in calls), 3)

    def idle_share(key: str) -> float | None:
        worker_seconds = sum(c["workers"] * c[key] for c in calls)
        return round(1 - in_steps / worker_seconds, 4) if worker_seconds else None

    in_steps = total("seconds_in_steps")
    cost = hardware.cost(total("wall_seconds"))
    measured = [c.get("measured_kwh") for c in calls]
    peaks = [c["peak_device_bytes"] for c in calls if c.get("peak_device_bytes")]
    return {
        "wall_seconds": total("wall_seconds"),
        "training_seconds": total("training_seconds"),
        "seconds_in_steps": in_steps,
        "fraction_not_in_steps": idle_share("training_seconds"),
        "fraction_of_command_not_in_steps": idle_share("wall_seconds"),
        "dollars": cost.dollars,
        "kwh": cost.kwh,  # by the profile's power
        "measured_kwh": None if None in measured else sum(measured),  # by the processors' own counters
        "peak_device_bytes": max(peaks, default=None),
    }


def _environment() -> dict:
    return {**records.software(), "processor": processor(), "cores": len(machine.cores())}
