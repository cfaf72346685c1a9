"""Tasks on all hosts at once: process 0 publishes each and does its part, the others follow."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path

from scaling.config import RunConfig, from_dict
from scaling.engine import executors
from scaling.engine import worker as worker_module
from scaling.training.distributed import Group


class Leader(executors.Inline):
    """``Inline`` on process 0, with the other processes doing the same.

    An error that is not about bad input cannot be a cell's alone here: the others are inside the same computation, or
    one of them is gone. So it ends the command everywhere.
    """

    def __init__(self, group: Group, loop: str = executors.LOOP):
        super().__init__(loop, compile_ahead=False)  # the others would not
        self._group = group

    def _execute(self, loop, task: executors.Task, on_event: Callable[[dict], None]) -> dict:
        self._group.publish({"task": dataclasses.asdict(task)})
        return _together(self._group, loop, task, on_event)


def follow(group: Group, cache_dir: Path, loop: str = executors.LOOP) -> int:
    """What a process other than 0 does: its part of every task, until process 0 says with which exit code to stop.

    ``cache_dir`` is this host's: where it is not shared with process 0, the data is prepared here too.
    """
    module = importlib.import_module(loop)
    with executors.stopping_politely(module):
        for message in group.published():
            if "stop" in message:
                return message["stop"]
            task = executors.Task(**message["task"])
            task.payload["cache_dir"] = str(cache_dir)
            try:
                _prepare(task.payload, cache_dir)
                _together(group, module, task, lambda event: None)
            except (ValueError, module.Interrupted):
                pass  # the same on process 0, which says what comes of it
    raise AssertionError("process 0 ended without a last word")


def _prepare(payload: dict, cache_dir: Path) -> None:
    from scaling.training import data

    for raw in payload.get("cells", ()):
        data.prepare(from_dict(RunConfig, raw["run"]).data, cache_dir)


def _together(group: Group, loop, task: executors.Task, on_event) -> dict:
    try:
        return worker_module.execute(loop, task.command, task.payload, on_event)
    except (ValueError, loop.Interrupted):
        raise
    except Exception as e:
        group.abandon(worker_module.describe(e)[:200])
