"""One sweep at a time in a results folder: by the kernel's lock on a disk, by a lease in a bucket."""

import datetime
import json
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scaling import storage
from scaling.engine.folder import lock

RENEW_SECONDS = 30.0
# Between writing a lease and believing it: longer than another takes from seeing none to having written its own.
SETTLE_SECONDS = 2.0


def hold(results: Path, shard: str | None) -> "lock.Lock | Lease":
    """Takes a results folder for this sweep; ``release`` gives it back.

    Raises HeldError if another has it, OSError or a client's error if it cannot be written to.
    """
    return Lease(results) if storage.is_remote(results) else lock.Lock(results, shard)


class Lease:
    """``<folder>/.lock`` in a bucket: who holds the folder, until when unless renewed.

    A bucket has no lock that goes with its holder, so this one runs out ``lock.LEASE_SECONDS`` after its last
    renewal: a killed sweep's folder is free that much later (at once for its own machine, which sees that it is gone).
    Of two that take it together the later writer has it, and both find out when they look again. Whoever loses it, by
    having been suspended for longer, is interrupted as if by SIGTERM. Clocks are taken to agree within a minute.
    """

    is_effective = True
    fds: Sequence[int] = ()  # for workers to inherit: there is none

    def __init__(self, results: Path):
        self._path = results / ".lock"
        self._released = threading.Event()
        self._content = {
            "pid": os.getpid(),
            "host": platform.node(),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
        }
        self._give_way()
        self._renew()
        time.sleep(SETTLE_SECONDS)
        self._give_way()
        threading.Thread(target=self._keep, daemon=True).start()

    def _read(self) -> dict:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def _give_way(self) -> None:
        found = self._read()
        if found and found.get("token") != self._content["token"] and not lock.is_dead(found):
            raise lock.HeldError(lock.held_by(self._path.parent, found))

    def _renew(self) -> None:
        storage.write(self._path, json.dumps({**self._content, "renewed": time.time()}))

    def _keep(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with suppress(*storage.errors()):  # no network for a while: the next time is soon enough
                found = self._read()
                if found and found.get("token") != self._content["token"]:
                    print(f"error: {lock.held_by(self._path.parent, found)}", file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._renew()

    def release(self) -> None:
        self._released.set()
        with suppress(*storage.errors()):
            if self._read().get("token") == self._content["token"]:
                self._path.unlink(missing_ok=True)
