"""Runs tasks in this process, one after the other."""

import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from scaling.engine.run import worker as worker_module
from scaling.engine.run.tasks import INTERRUPTED, LOOP, Answer, Line, Task, ignore, stop_if_disk
from scaling.machine import has_accelerator
from scaling.training import signals

# After the second signal to end: a compilation has not come back by then, everything else has.
DEAF_SECONDS = 2.0


class Inline:
    """Runs tasks one after another in this process.

    ``compile_ahead``: compiles for the next task while one runs (None: where there is an accelerator).
    """

    def __init__(self, loop: str = LOOP, *, compile_ahead: bool | None = None):
        self._loop = loop
        self._compile_ahead = has_accelerator() if compile_ahead is None else compile_ahead

    def run(self, tasks: Sequence[Task], on_event: Callable[[dict], None] = ignore) -> dict[str, Answer]:
        """Does the tasks in order and returns an answer for each; Ctrl-C lets the run under way save a checkpoint."""
        loop = importlib.import_module(self._loop)
        answers, line = {}, Line(tasks)
        ahead = worker_module.Ahead(loop)
        with stopping_politely(loop):
            while (task := line.next()) is not None:
                about = {"key": task.key, "worker": 0}
                on_event({"event": "start", **about})
                following = line.after(task) if self._compile_ahead else None
                watch = ahead.during(
                    following and following.payload,  # type: ignore[arg-type]  # no task is false
                    lambda event, about=about: on_event({**event, **about}),  # type: ignore[misc]  # about is bound
                )
                try:
                    value = self._execute(loop, task, watch)
                    answers[task.key] = Answer(value)
                    on_event({"event": "done", **about})
                except loop.Interrupted:
                    raise KeyboardInterrupt from None
                except Exception as e:  # a cell that fails is data; the others go on
                    event = worker_module.failure(e)
                    stop_if_disk(event)
                    answers[task.key] = Answer(None, event["reason"])
                    on_event({"event": "failed", "reason": event["reason"], **about})
                line.release(*task.releases)
        return answers

    def _execute(self, loop: ModuleType, task: Task, on_event: Callable[[dict], None]) -> dict:
        return worker_module.execute(loop, task.command, task.payload, on_event)

    def close(self) -> None:
        pass


@contextmanager
def stopping_politely(loop: ModuleType) -> Iterator[None]:
    """While it lasts, the first SIGINT, SIGTERM or SIGHUP asks ``loop`` to stop and the second interrupts; one that is
    ignored, as nohup's hang-up, stays so. In a compilation neither is taken in: there the second ends the process."""
    previous: dict[int, Any]
    heard: set[int]
    previous, heard, over = {}, set(), threading.Event()

    def ask(signum, frame):
        loop.stop_requested.set()
        signal.signal(signum, previous[signum])

    def hear(signum: int) -> None:
        if signum not in previous:
            return
        again = signum in heard  # not a hang-up and a termination, which come together where a session ends
        heard.add(signum)
        # Whoever has taken the first in may be saving a checkpoint by now.
        if again and not over.wait(DEAF_SECONDS) and not loop.stop_requested.is_set():
            print("interrupted in the middle of a computation; give the same command to go on", file=sys.stderr)
            os._exit(INTERRUPTED)

    listener = signals.Listener(hear)
    try:
        for signum in signals.ENDING:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                previous[signum] = signal.signal(signum, ask)
        yield
    finally:
        over.set()
        listener.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
        loop.stop_requested.clear()
