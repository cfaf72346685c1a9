"""Holds a folder for one sweep at a time, by the kernel's lock; says who holds it."""

import datetime
import errno
import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scaling import storage

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
    except (ValueError, *storage.errors()):  # type: ignore[misc]  # all of them exceptions
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
