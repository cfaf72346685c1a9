"""The real training loop, with a count of the steps it trains that outlives any kill: eight bytes a process, mapped
into memory, under ``$CHAOS_COUNTS``. At the moment that ``$CHAOS_MOMENT`` names, for the first time in that folder, the
whole machine dies: this worker and whoever started it."""

import functools
import mmap
import os
import signal
import struct
import uuid
from pathlib import Path

from scaling import data, records
from scaling.training import checkpoint, loop
from scaling.training.calibration import calibrate
from scaling.training.loop import Interrupted, stop_requested

__all__ = ["Interrupted", "calibrate", "stop_requested", "total", "train"]


def total(folder):
    """Steps trained by all processes that counted in ``folder``."""
    return sum(struct.unpack("<q", path.read_bytes())[0] for path in Path(folder).iterdir())


@functools.cache
def _counter():
    path = Path(os.environ["CHAOS_COUNTS"]) / uuid.uuid4().hex
    path.write_bytes(bytes(8))
    with open(path, "r+b") as f:
        return mmap.mmap(f.fileno(), 8)


def _die():
    (Path(os.environ["CHAOS_COUNTS"]).parent / f"died {os.environ['CHAOS_MOMENT']}").write_text("")
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


@functools.cache
def _arm():
    moment = os.environ.get("CHAOS_MOMENT", "")
    if not moment or (Path(os.environ["CHAOS_COUNTS"]).parent / f"died {moment}").exists():
        return
    owner, name = {
        "before the record": (records, "save"),
        "after the record": (records, "save"),
        "in a checkpoint": (checkpoint.Checkpoints, "save"),
        "before the final checkpoint": (checkpoint.Checkpoints, "keep_newest"),
    }[moment]
    whole = getattr(owner, name)

    def dying(*args, **kwargs):
        if moment.startswith("before"):
            _die()
        whole(*args, **kwargs)  # of a checkpoint: begun, and written in the background
        _die()

    setattr(owner, name, dying)


def train(*args, **kwargs):
    """``loop.train``; every batch of a member is a step of its run."""
    _arm()
    plain, counter = data.Corpus.batch, _counter()

    def counting(*args, **kwargs):
        (steps,) = struct.unpack("<q", counter[:])
        counter[:] = struct.pack("<q", steps + 1)
        return plain(*args, **kwargs)

    data.Corpus.batch = counting
    try:
        return loop.train(*args, **kwargs)
    finally:
        data.Corpus.batch = plain


if __name__ == "__main__":
    import sys

    from scaling import sweep

    sys.exit(sweep.main(loop="chaos_loop"))
