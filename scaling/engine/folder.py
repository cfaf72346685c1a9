"""A sweep's results folder: who holds it, which cells are in, and what was forecast."""

import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from scaling import config, records, storage
from scaling.engine import plan

# A lease in a bucket (``lease.Lease``) counts for so long after it was last renewed.
LEASE_SECONDS = 120.0


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
                self._require_one_cut(folder, shard)
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
                if not is_dead(holder) or time.monotonic() > deadline:
                    raise HeldError(held_by(path.parent, holder)) from None
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

    def _require_one_cut(self, folder: Path, shard: str) -> None:
        """Raises HeldError beside shards of another number: they would train some cells twice, and some not at all."""
        for path in folder.glob(".lock-shard-*"):
            theirs = path.name.removeprefix(".lock-shard-").replace("-of-", "/")
            if theirs.partition("/")[2] != shard.partition("/")[2] and (other := _holder_of(path)) is not None:
                raise HeldError(f"--shard {shard} beside --shard {theirs}, which runs: {held_by(folder, other)}")

    def release(self) -> None:
        for fd, path in reversed(self._held):
            with suppress(OSError):  # raised if another shard still has it: then it stays
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            os.close(fd)
        self._held = []


def _holder_of(path: Path) -> dict | None:
    """What a lock file says of who holds it; None if nobody does."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(fd)
    except OSError:  # no locks here
        return None
    finally:
        os.close(fd)
    return None


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
    except (ValueError, *storage.errors()):
        return None
    return None if is_dead(found) else found


def is_dead(holder: dict) -> bool:
    """Whether the process that took the lock is known to be gone, or its lease has run out."""
    if time.time() - holder.get("renewed", math.inf) > LEASE_SECONDS:
        return True
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
def alone(path: Path) -> Iterator[None]:
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


def held_by(folder: Path, holder: dict) -> str:
    """What there is to say to somebody who wants a folder that another sweep holds."""
    pid, host, started = (holder.get(key, "?") for key in ("pid", "host", "started"))
    return (
        f"{folder} is held by another sweep: process {pid} on {host}, since {started}; wait for it, stop it, "
        "or write to another folder with --results"
    )


def claim(workdir: Path, results: Path) -> None:
    """Writes into a work folder whose checkpoints it holds: those of the runs of ``results``.

    Raises ValueError while it holds checkpoints of another results folder's runs, HeldError while that sweep runs: one
    would go on from, and delete, what the other has trained.
    """
    path, mine = workdir / "results.json", str(results if storage.is_remote(results) else results.absolute())
    theirs = read_or_empty(path).get("results", mine)
    if theirs != mine and (at_work := holder(storage.folder(theirs))) is not None:
        raise HeldError(f"{workdir} is the work folder of another sweep that runs: {held_by(Path(theirs), at_work)}")
    if theirs != mine and _has_checkpoints(workdir):
        raise ValueError(
            f"{workdir} holds checkpoints of the sweep with its results in {theirs}: write another --workdir, or, if "
            f"nobody wants them any more, delete {workdir / 'checkpoints'}"
        )
    if not path.exists() or theirs != mine:
        records.write_json(path, {"schema": 1, "results": mine})


def give_up(workdir: Path) -> None:
    """Takes the claim out of a work folder at the end of a call, unless there are checkpoints for it to guard."""
    if not _has_checkpoints(workdir):
        (workdir / "results.json").unlink(missing_ok=True)


def _has_checkpoints(workdir: Path) -> bool:
    checkpoints = workdir / "checkpoints"
    return checkpoints.is_dir() and any(path.is_dir() for path in checkpoints.iterdir())


def of_another_grid(results: Path, run_ids: Sequence[str], grid_path: str) -> str | None:
    """What there is to say of records in a results folder that are of none of these cells.

    Raises ValueError where all that is there is the sweep of another file: of one with the same stem, most likely.
    """
    extra = records.strangers(results, set(run_ids))
    if not extra:
        return None
    before = read_or_empty(results / "sweep.json")
    theirs = {cell["run_id"] for cell in before.get("cells", [])}
    if theirs and theirs.isdisjoint(run_ids) and before["grid_path"] != grid_path:
        raise ValueError(
            f"{results} has the sweep of another grid, {before['grid_path']}, and none of the cells of {grid_path}: "
            f"write another --results, or, if this one replaces it, move {results / 'sweep.json'} away"
        )
    return f"{results}: {len(extra)} records are of no cell of this grid: they stay, in no law and no report"


def statuses(results: Path, run_ids: Sequence[str], *, set_aside: bool) -> tuple[dict[str, str], list[str]]:
    """Status by run_id of the records that are there, and a line for each that cannot be read.

    An unreadable record counts as absent, so its run is done again; with ``set_aside`` it becomes
    ``<run_id>.json.unreadable``.
    """
    found, complaints = {}, []
    paths = [records.path_of(results, run_id) for run_id in run_ids]
    for run_id, path, status in zip(run_ids, paths, storage.each(_status, paths)):
        if isinstance(status, str):
            found[run_id] = status
        elif status is not None:
            if set_aside:
                storage.set_aside(path, f"{path.name}.unreadable")
            complaint = str(status).removesuffix(": delete it and run the sweep again")
            complaints.append(f"{complaint}: set aside, the run is done again")
    return found, complaints


def _status(path: Path) -> str | ValueError | None:
    """A record's status, None where there is none, or why it cannot be read."""
    try:
        return records.read(path).status if path.exists() else None
    except ValueError as e:
        return e


def is_done(found: Mapping[str, str], run_id: str) -> bool:
    """Whether a run with these ``statuses`` is over for good: one that failed is tried again."""
    return found.get(run_id, "failed") != "failed"


def failed_record(row: plan.Row, sweep_name: str, reason: str) -> records.RunRecord:
    """The record of a run that could not be done; ``environment["failure"]`` says why. The next sweep tries again."""
    cell, counts = row.cell, row.plan
    return records.RunRecord(
        run_id=row.run_id,
        status="failed",
        config=config.to_dict(cell.run),
        sweep={"name": sweep_name, **cell.place},
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


def read_or_empty(path: Path) -> dict:
    """An object that can be made again, as it was left; empty if there is none or it is damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return raw if isinstance(raw, dict) and raw.get("schema") == 1 else {}


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").digest()


def digest(paths: Sequence[Path], options: str) -> str:
    """sha256 over the contents of files (absent ones count as empty) and a text."""
    whole = hashlib.sha256(options.encode())
    for part in storage.each(_digest, paths):
        whole.update(part)
    return whole.hexdigest()


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
        return not self._payload or self._payload.get("sha256") == records.seal(self._payload)

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
        self._payload = {**payload, "sha256": records.seal(payload)}
        records.write_json(self.path, self._payload)
