"""A worker process: reads one task a line, answers in JSON lines, ends with its parent.

    python -m scaling.engine.run.worker [--loop MODULE] [--cores 0,1]

In, on stdin: ``{"key", "command", "payload", "next"}``, ``next`` being the payload of the pack that probably comes
after this one, to be compiled meanwhile, or null. Out, on stdout: ``{"event": "ready"}`` once, then per task any number
of ``progress`` and one ``done`` or ``failed`` with the task's key. Whatever else is printed goes to stderr, which the
parent keeps as a log. SIGTERM: the run under way saves a checkpoint and the worker exits. End of input means that the
parent is gone or has nothing left: a busy worker then exits at once (its checkpoints are whole at any moment), so that
no orphan trains on.
"""

import argparse
import errno
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TextIO

from scaling import config, fields, storage
from scaling.execution import ExecutionConfig
from scaling.grid import Cell


def cell_to_json(cell: Cell) -> dict:
    return {"run": fields.to_dict(cell.run), **cell.place}


def cell_from_json(raw: dict) -> Cell:
    return Cell(**{**raw, "run": fields.from_dict(config.RunConfig, raw["run"])})


def execute(loop: ModuleType, command: str, payload: dict, on_event: Callable[[dict], None]) -> dict:
    """Does one task in this process and returns its answer, plain JSON.

    ``train``: one pack through ``loop.train``, which saves the records itself; answers ``{"run_ids": [...]}``.
    ``calibrate``: times one shape through ``loop.calibrate``, with ``seconds`` and, if given, ``num_members`` and
    ``since``; answers its seconds and memory.
    ``memory``: compiles one shape for ``num_members`` through ``loop.measure_memory``; answers {"memory": its bytes}.
    ``pack_size``: how many of one shape, at most ``most``, fit one program; answers {"members": their number}.
    """
    execution = fields.from_dict(ExecutionConfig, payload["execution"])
    cache_dir = Path(payload["cache_dir"])
    if command == "calibrate":
        run = fields.from_dict(config.RunConfig, payload["run"])
        options = {name: payload[name] for name in ("num_members", "since") if name in payload}
        return loop.calibrate(run, execution, cache_dir, payload["seconds"], **options)
    if command == "memory":
        run = fields.from_dict(config.RunConfig, payload["run"])
        return {"memory": loop.measure_memory(run, execution, cache_dir, payload["num_members"])}
    if command == "pack_size":
        run = fields.from_dict(config.RunConfig, payload["run"])
        return {"members": loop.pack_size(run, execution, cache_dir, payload["most"])}
    if command != "train":
        raise ValueError(f"unknown command {command!r}")
    records = loop.train(
        [cell_from_json(raw) for raw in payload["cells"]],
        execution=execution,
        workdir=storage.folder(payload["workdir"]),
        results=storage.folder(payload["results"]),
        cache_dir=cache_dir,
        sweep_name=payload["sweep_name"],
        riders={run_id: [cell_from_json(raw) for raw in cells] for run_id, cells in payload.get("riders", {}).items()},
        on_event=on_event,
    )
    return {"run_ids": [record.run_id for record in records]}


class Ahead:
    """Compiles the next pack's programs in a thread, beside the pack that trains: XLA lets go of Python's lock.

    Worth it where the device computes and the cores are idle; on a CPU that computes it takes its cores from the steps.
    """

    def __init__(self, loop: ModuleType):
        self._loop = loop
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def during(self, payload: dict | None, on_event: Callable[[dict], None]) -> Callable[[dict], None]:
        """``on_event`` for a task, which starts compiling for ``payload`` at the first sign of progress: the task's own
        programs are compiled by then, and need no core any more. To be called when the task begins: it waits until what
        was begun before is done, since that is what the task is about to ask for."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

        def watch(event: dict) -> None:
            if payload is not None and self._thread is None and event["event"] == "progress":
                self._thread = threading.Thread(target=self._compile, args=(payload,))
                self._thread.start()
            on_event(event)

        return watch

    def _compile(self, payload: dict) -> None:
        with suppress(Exception):  # the task itself will meet it, and say so
            self._loop.compile_ahead(
                [cell_from_json(raw) for raw in payload["cells"]],
                fields.from_dict(ExecutionConfig, payload["execution"]),
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scaling.engine.run.worker")
    parser.add_argument("--loop", default="scaling.training.loop", help="module with train and calibrate")
    parser.add_argument("--cores", default="", help="run on these cores only, e.g. 0,1")
    args = parser.parse_args()
    if args.cores:  # before JAX is imported: XLA sizes its thread pools by the affinity mask
        os.sched_setaffinity(0, [int(core) for core in args.cores.split(",")])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a stray print must not break the protocol
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(BrokenPipeError):
        _serve(importlib.import_module(args.loop), answers)
    return 0


def _serve(loop: ModuleType, answers: TextIO) -> None:
    busy = threading.Event()
    tasks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(tasks, busy), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: loop.stop_requested.set() if busy.is_set() else sys.exit(0))

    def say(event: dict) -> None:
        if event["event"] == "said":  # the log keeps it too
            print(event["text"], file=sys.stderr, flush=True)
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    say({"event": "ready"})
    ahead = Ahead(loop)
    while (line := tasks.get()) is not None:
        task = json.loads(line)
        try:
            answer = execute(loop, task["command"], task["payload"], ahead.during(task["next"], say))
            busy.clear()  # before the answer: the next task may come right after it
            say({"event": "done", "key": task["key"], "answer": answer})
        except (BrokenPipeError, loop.Interrupted):
            if ahead.is_busy:
                os._exit(0)  # a compilation cannot be stopped, and nobody needs it any more
            return
        except Exception as e:
            with suppress(OSError):  # the log may be on the disk that is full
                traceback.print_exc()
            busy.clear()
            say({**failure(e), "key": task["key"]})


def failure(error: Exception) -> dict:
    """The event of a task that raised. ``final``: bad input, trying again would say the same; ``disk``: no cell's fault
    and the same for all: the sweep stops until somebody has made room."""
    no_room = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    e: BaseException | None = error
    chain: list[BaseException] = []
    while e is not None and e not in chain:
        chain.append(e)
        e = e.__cause__ or e.__context__
    # What libraries make of it has no errno, only its text.
    disk = any(getattr(e, "errno", None) in no_room or os.strerror(errno.ENOSPC) in str(e) for e in chain)
    final = isinstance(error, ValueError) and not disk
    return {"event": "failed", "reason": describe(error), "final": final, "disk": disk}


def describe(error: Exception) -> str:
    """An exception in one line."""
    first_line = str(error).partition("\n")[0]
    return first_line if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line}"


def _read_tasks(tasks: queue.SimpleQueue, busy: threading.Event) -> None:
    for line in sys.stdin:
        busy.set()
        tasks.put(line)
    if busy.is_set():
        os._exit(1)
    tasks.put(None)


if __name__ == "__main__":
    sys.exit(main())
