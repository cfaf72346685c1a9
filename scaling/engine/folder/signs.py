"""The signs that a running sweep leaves in its work folder, for --status and for whoever comes after a kill.

Whoever trains, or watches over workers that do, keeps one small file ``<workdir>/status/<name>.json``: written anew
every few seconds, atomically, and removed in the end. A killed writer leaves its last sign behind, which goes stale.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from scaling import storage
from scaling.records import read_or_empty

WRITE_SECONDS = 3.0


STALE_SECONDS = 120.0  # longer than any writer takes between two signs, clocks of two machines included


class Board:
    """One writer's sign of life, kept by a thread of its own while the block lasts.

        with Board(workdir, "local", {key: run_ids}) as board: executor.run(tasks, board.on_event)

    A folder that cannot be written to costs the sign, not the training.
    """

    def __init__(self, workdir: Path, executor: str, packs: Mapping[str, Sequence[str]], *, name: str = "", **about):
        self.path = sign_path(workdir, name or f"{platform.node()}-{os.getpid()}")
        self._packs = packs
        self._lock = threading.Lock()
        self._running: dict[str, dict] = {}
        self._content = {
            "schema": 1, "executor": executor, "host": platform.node(), "pid": os.getpid(), "started": time.time(),
            **about,
        }  # fmt: skip
        self._last_word: dict[str, Any] = {}
        self._changed = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Board":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped = True
        self._changed.set()
        self._thread.join()
        if self._last_word:
            self._content.update(self._last_word)
            self._write()
        else:
            with suppress(*storage.errors()):
                self.path.unlink(missing_ok=True)

    def on_event(self, event: dict) -> None:
        """Takes in an executor's event."""
        key: Any = event.get("key")
        kind = event["event"]
        is_news = kind == "start"  # more than one step more: said at once
        with self._lock:
            if kind == "start":
                where = {name: event[name] for name in ("worker", "log") if name in event}
                self._running[key] = {"key": key, "run_ids": list(self._packs[key]), "since": time.time(), **where}
            elif kind == "progress" and key in self._running:
                news = {name: event[name] for name in ("run_ids", "step", "num_steps", "loss")}
                pack = self._running[key]
                is_news = "step" not in pack
                news.setdefault("first_step", pack.get("first_step", event["step"]))
                pack.update(news, progressed=time.time())
            elif kind == "branched" and key in self._running:
                is_news = True
                self._running[key].setdefault("branched", []).append(event["run_id"])
            elif kind in ("done", "failed", "retry"):
                self._running.pop(key, None)
        if is_news:
            self._changed.set()

    def leave(self, ended: Mapping[str, Any]) -> None:
        """Keeps the sign's last word, with which it stays behind for its reader to remove. It is written when the block
        is left, once and last: written again, it would be there again after its reader has removed it."""
        self._last_word = {"ended": ended}

    def _beat(self) -> None:
        while True:
            self._changed.wait(WRITE_SECONDS)
            self._changed.clear()
            if self._stopped:
                return
            self._write()

    def _write(self) -> None:
        with self._lock:
            sign = {**self._content, "packs": list(self._running.values()), "updated": time.time()}
            text = json.dumps(sign)
        with suppress(OSError):
            storage.write(self.path, text, synced=False)  # after a power cut nobody needs a sign


def signs_folder(workdir: Path) -> Path:
    return storage.folder(workdir) / "status"


def sign_path(workdir: Path, name: str) -> Path:
    return signs_folder(workdir) / f"{name}.json"


def read_signs(workdir: Path) -> list[dict]:
    """All signs of a work folder, each with ``alive``: whether its writer still gives signs, as far as one can tell."""
    signs = []
    for path in sorted(signs_folder(workdir).glob("*.json")):
        sign = read_or_empty(path)
        if sign:
            signs.append({**sign, "path": path, "alive": _is_alive(sign)})
    return signs


def clear_stale(workdir: Path) -> None:
    """Removes what killed writers left behind; one that has ``ended`` is its reader's to remove."""
    for sign in read_signs(workdir):
        if not sign["alive"] and "ended" not in sign:
            sign["path"].unlink(missing_ok=True)


def _is_alive(sign: dict) -> bool:
    age = time.time() - sign["updated"]
    if sign["host"] == platform.node() and age > 3 * WRITE_SECONDS:  # a young sign needs no proof, on any machine
        with suppress(PermissionError):
            try:
                os.kill(sign["pid"], 0)
            except ProcessLookupError:
                return False
    return age < STALE_SECONDS
