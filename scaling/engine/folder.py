"""A sweep's results folder: who holds it, which cells are in, what was planned, forecast, and what happened."""

import datetime
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from scaling import config, records
from scaling.engine import costs, plan, trunks
from scaling.engine.hardware import EnergyMeter, Hardware
from scaling.grid import Grid


class HeldError(Exception):
    """Another sweep works on this folder; the message says which process, where, since when."""


class Lock:
    """A folder for one sweep at a time (``shard`` "I/N": for the other shards too).

    The kernel's ``flock`` on ``<folder>/.lock``: gone with the last process that has it open, so no lock is ever stale.
    Workers inherit ``fds``: a killed sweep's folder is free when its last worker is gone.
    """

    def __init__(self, folder: Path, shard: str | None = None):
        self._held: list[tuple[int, Path]] = []
        self.is_effective = True  # false where the file system has no locks
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._acquire(folder / ".lock", exclusive=shard is None)
            if shard is not None:
                self._acquire(folder / f".lock-shard-{shard.replace('/', '-of-')}", exclusive=True)
        except BaseException:
            self.release()
            raise

    @property
    def fds(self) -> list[int]:
        return [fd for fd, _ in self._held]

    def _acquire(self, path: Path, exclusive: bool, patience: float = 5.0) -> None:
        deadline = time.monotonic() + patience
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read_holder(fd)
                os.close(fd)
                if not _is_dead(holder) or time.monotonic() > deadline:
                    raise HeldError(_who(path.parent, holder)) from None
                time.sleep(0.1)  # the sweep was killed; its workers are about to notice
                continue
            except OSError as e:
                if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    os.close(fd)
                    raise
                self.is_effective = False
            with suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == path.stat().st_ino:
                    break
            os.close(fd)  # the last holder has just removed the file: the lock on it protects nothing
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        os.ftruncate(fd, 0)
        holder = {"pid": os.getpid(), "host": platform.node(), "started": started}
        os.pwrite(fd, json.dumps(holder).encode(), 0)
        self._held.append((fd, path))

    def release(self) -> None:
        for fd, path in reversed(self._held):
            with suppress(OSError):  # raised if another shard still has it: then it stays
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            os.close(fd)
        self._held = []


def _read_holder(fd: int) -> dict:
    try:
        return dict(json.loads(os.pread(fd, 4096, 0)))
    except ValueError:
        return {}


def holder(folder: Path) -> dict | None:
    """Who holds a folder, as its lock file says: pid, host, started. None if nobody does, as far as one can tell from
    here. The lock itself is not touched: somebody may be about to take it."""
    try:
        found = dict(json.loads((folder / ".lock").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    return None if _is_dead(found) else found


def _is_dead(holder: dict) -> bool:
    """Whether the process that took the lock is known to be gone."""
    if holder.get("host") != platform.node():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError):
        pass
    return False


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While it lasts no other process is in a block with this lock file; it waits for those before it. Where the file
    system has no locks it lets everybody in."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == path.stat().st_ino:
                break
        os.close(fd)  # whoever had it has removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _who(folder: Path, holder: dict) -> str:
    pid, host, started = (holder.get(key, "?") for key in ("pid", "host", "started"))
    return (
        f"{folder} is held by another sweep: process {pid} on {host}, since {started}; wait for it, stop it, "
        "or write to another folder with --results"
    )


def statuses(results: Path, run_ids: Sequence[str], *, set_aside: bool) -> tuple[dict[str, str], list[str]]:
    """Status by run_id of the records that are there, and a line for each that cannot be read.

    An unreadable record counts as absent, so its run is done again; with ``set_aside`` it becomes
    ``<run_id>.json.unreadable``.
    """
    found, complaints = {}, []
    for run_id in run_ids:
        path = records.path_of(results, run_id)
        if not path.exists():
            continue
        try:
            found[run_id] = records.read(path).status
        except ValueError as e:
            if set_aside:
                os.replace(path, path.with_name(path.name + ".unreadable"))
            complaint = str(e).removesuffix(": delete it and run the sweep again")
            complaints.append(f"{complaint}: set aside, the run is done again")
    return found, complaints


def failed_record(row: plan.Row, sweep_name: str, reason: str) -> records.RunRecord:
    """The record of a run that could not be done; ``environment["failure"]`` says why. The next sweep tries again."""
    cell, counts = row.cell, row.plan
    return records.RunRecord(
        run_id=row.run_id,
        status="failed",
        config=config.to_dict(cell.run),
        sweep={"name": sweep_name, "holdout": cell.holdout, "recipe": cell.recipe, "labels": cell.labels},
        num_params=counts.num_params,
        num_tokens=0,
        num_steps=0,
        batch_tokens=counts.batch_tokens,
        unique_tokens=0,
        epochs=0.0,
        tokens_per_param=0.0,
        flops=dict.fromkeys(counts.flops, 0.0),
        loss=None,
        loss_standard_error=None,
        bits_per_byte=None,
        num_eval_tokens=0,
        diverged_at_step=None,
        curve={column: [] for column in records.CURVE_COLUMNS},
        data={},
        environment={"failure": reason},
    )


def read_json(path: Path) -> dict:
    """An object that can be made again, as it was left; empty if there is none or it is damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return raw if isinstance(raw, dict) and raw.get("schema") == 1 else {}


def digest(paths: Sequence[Path], options: str) -> str:
    """sha256 over the contents of files (absent ones count as empty) and a text."""
    whole = hashlib.sha256(options.encode())
    for path in paths:
        content = path.read_bytes() if path.exists() else b""
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()


class Manifest:
    """``sweep.json``: the grid, its cells with cost and status, the plan, and what each call of the command did.

    A call's entry is written when it starts and again with every cell that ends, so a killed call is counted up to its
    last cell. ``actual`` sums the calls; ``hardware`` says what turns time into money and energy. Shards of one folder
    write it in turn, each with what it found there.
    """

    def __init__(
        self, results: Path, *, grid: Grid, grid_path: str, command: str, shard: str | None,
        hardware: Hardware | None = None,
    ):  # fmt: skip
        self.path = results / "sweep.json"
        self._shared = shard is not None
        self.dropped: Sequence[plan.Row] = ()  # left out to stay within a budget
        self.warnings: Sequence[str] = ()  # about the grid
        self._hardware = hardware or Hardware.of(grid.hardware, has_accelerator=False)
        self._meter = EnergyMeter()
        self._clock = time.monotonic()
        self._training_since: float | None = None
        self._call = {
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
        return _alone(self.path.parent / ".lock-manifest") if self._shared else nullcontext()

    def spent_seconds(self) -> float:
        """Wall time of the calls so far, this one's included."""
        before = (read_json(self.path).get("actual") or {}).get("wall_seconds") or 0.0
        return before + time.monotonic() - self._clock

    def write(self, table: Sequence[plan.Row], found: dict[str, str], workers: int | None) -> None:
        with self.in_turn():
            self._write(table, found, workers)

    def _write(self, table: Sequence[plan.Row], found: dict[str, str], workers: int | None) -> None:
        before = read_json(self.path)
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
        training = plan.predicted_wall(table, workers) if workers else None
        same_cells = {c["run_id"] for c in cells} == {c["run_id"] for c in before.get("cells", [])}
        if training is None or (same_cells and before.get("plan")):  # what was predicted first stands
            planned = before.get("plan")
        else:  # of the whole command: what it took to get here is known
            whole = round(self._call["wall_seconds"] + training + plan.CONCLUSION_SECONDS, 3)
            bill = costs.Bill(table, self._hardware, workers, whole)
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
                "cells": _keep_predictions(cells, before.get("cells", [])),
                "plan": planned,
                "hardware": self._hardware.to_json(),
                "warnings": list(self.warnings) or before.get("warnings", []),
                "actual": _totals(calls, self._hardware),
                "calls": calls,
                "environment": _environment() if workers else before.get("environment", {}),
            },
        )


def _cell_json(row: plan.Row, found: dict[str, str], share: Callable) -> dict:
    cost = share(row.seconds)
    return {
        "run_id": row.run_id,
        "holdout": row.cell.holdout,
        "labels": row.cell.labels,
        "recipe": row.cell.recipe,
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
    """What was predicted first stands: a later call may run on another machine, or know the answer."""
    first = {c["run_id"]: c.get("predicted_seconds") for c in before}
    return [{**c, "predicted_seconds": first.get(c["run_id"]) or c["predicted_seconds"]} for c in cells]


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
    return {**records.software(), "processor": plan.processor(), "cores": os.cpu_count()}


class Forecast:
    """``forecast.json``: what was said of each held-out cell before it trained, and a sha256 of all that.

    An entry, once written, is never changed; entries of cells that a grid gains later are added beside it.
    """

    def __init__(self, results: Path):
        self.path = results / "forecast.json"
        try:
            self._payload = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            self._payload = {}
        except ValueError as e:
            raise ValueError(f"{self.path}: not readable as JSON ({e}): restore it from git, or delete it") from None

    @property
    def entries(self) -> list[dict]:
        return self._payload.get("cells", [])

    @property
    def is_intact(self) -> bool:
        """Whether the file is as it was written."""
        rest = {key: value for key, value in self._payload.items() if key != "sha256"}
        return not self._payload or self._payload.get("sha256") == _sha256(rest)

    def add(self, entries: Sequence[dict], fitted_run_ids: Sequence[str]) -> None:
        """Adds entries (run_id, flops, num_params, num_tokens, predicted, interval, level) and writes the file; each
        says what it was fitted on.

        Raises ValueError if the file was edited: adding to it would seal the edit.
        """
        if not self.is_intact:
            raise ValueError(f"{self.path}: does not match its own sha256: restore it from git, or delete it")
        written = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        payload = {
            "schema": 1,
            "written": written,
            "fitted_run_ids": sorted(fitted_run_ids),  # of the newest entries; older ones keep their own
            "cells": [
                *self.entries,
                *({**entry, "written": written, "fitted_run_ids": sorted(fitted_run_ids)} for entry in entries),
            ],
        }
        self._payload = {**payload, "sha256": _sha256(payload)}
        records.write_json(self.path, self._payload)


def _sha256(payload: dict) -> str:
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
