"""Runs tasks in worker processes of this machine, which may die and are tried again.

One interface: ``run(tasks, on_event)`` takes tasks, the longest first, and returns an ``Answer`` for each; ``close()``
ends whatever was started. Executors know nothing of training: a task is a command of ``worker.execute`` and its JSON.
"""

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from scaling import machine
from scaling.engine.run.deaths import Deaths
from scaling.engine.run.executor import Executor, Runner
from scaling.engine.run.tasks import LOOP, MAX_TRIES, Answer, Attempts, ExecutorError, Line, Task, ignore, stop_if_disk
from scaling.machine import has_accelerator, worker_environment

SILENT_SECONDS = 900.0
LOG_BYTES = 10_000_000  # a worker's log of earlier calls: beyond, it becomes the old one, in place of an older


class _Worker:
    """One worker process and the pipe to it; restarted by ``start`` after it died."""

    def __init__(self, index: int, command: list[str], env: dict, log: Path, inbox: queue.Queue, pass_fds):
        self.index, self.command, self.env, self.log = index, command, env, log
        self.inbox, self.pass_fds = inbox, pass_fds
        self.task: Task | None = None
        self.heard_at = time.monotonic()  # the last sign of life of its task; infinity: its silence was said
        self.programs: set[str] = set()  # compiled, or loaded, by the process that runs now
        self.process: subprocess.Popen | None = None
        self.was_ready = False

    @property
    def running(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        self.was_ready = False
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".old.log"))
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=self.pass_fds,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops its workers in order
            )
        self.listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self.listener.start()

    def _listen(self, process: subprocess.Popen) -> None:
        with process.stdout:
            for line in process.stdout:
                with suppress(ValueError):  # half a line: its writer was killed
                    self.inbox.put((self, json.loads(line)))
        peak_bytes = None
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        except ChildProcessError:  # ``close`` was first
            process.wait()
        with suppress(BrokenPipeError):  # of a task that was never read
            process.stdin.close()
        self.inbox.put((self, {"event": "died", "returncode": process.returncode, "peak_bytes": peak_bytes}))

    def send(self, task: Task, following: Task | None) -> None:
        """``following``: what it will probably be sent next."""
        self.task, self.heard_at = task, time.monotonic()
        if task.program is not None:
            self.programs.add(task.program)
        after = following and following.payload
        line = json.dumps({"key": task.key, "command": task.command, "payload": task.payload, "next": after}) + "\n"
        with suppress(BrokenPipeError, ValueError):  # it died meanwhile, the pipe may be closed: _listen says so
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def stop(self) -> None:
        """Asks an idle worker to end (end of input) and a busy one to save what it can and end (SIGTERM); one that is
        still starting has nothing to lose."""
        if self.task is not None:
            self.process.terminate()
        elif not self.was_ready:
            self.process.kill()
        else:
            with suppress(BrokenPipeError):
                self.process.stdin.close()


class Processes(Executor):
    """Worker processes of this machine."""

    def num_workers(self, num_packs: int) -> int:
        return self.orders.workers or auto_workers(num_packs)

    def start(self, workers: int, lock_fds: Sequence[int] = ()) -> Runner:
        return Local(workers, self.orders.logs, loop=self.orders.loop, pass_fds=lock_fds)


class Local:
    """Worker processes on this machine, started at once (JAX is imported while the parent does other things) and kept,
    with the programs they compiled, until ``close``.

    A worker that dies is started again and its task goes back to the head of the queue; a task that failed
    ``MAX_TRIES`` times without getting further is answered with the reason. ``pass_fds`` stay open in the workers: a
    lock held through one is held until the last worker is gone. ``compile_ahead``: a worker compiles for its next task
    while one runs (None: where there is an accelerator, for then there is one worker).
    """

    def __init__(
        self,
        workers: int,
        log_dir: Path,
        *,
        loop: str = LOOP,
        pass_fds: Sequence[int] = (),
        compile_ahead: bool | None = None,
    ):
        self._compile_ahead = has_accelerator() and workers == 1 if compile_ahead is None else compile_ahead
        self._inbox: queue.Queue = queue.Queue()
        self._failed_starts = 0
        self._deaths = Deaths(workers)
        log_dir.mkdir(parents=True, exist_ok=True)
        env, cores = worker_environment(), assign_cores(workers)
        self._pool = []
        for i in range(workers):
            command = [sys.executable, "-m", "scaling.engine.run.worker", "--loop", loop]
            if cores:
                command += ["--cores", ",".join(map(str, cores[i]))]
            log = log_dir / f"worker-{i}.log"
            self._pool.append(_Worker(i, command, env, log, self._inbox, tuple(pass_fds)))
        for worker in self._pool:
            worker.start()

    def run(self, tasks: Sequence[Task], on_event: Callable[[dict], None] = ignore) -> dict[str, Answer]:
        """Hands out ``tasks`` in order, each to the next free worker, and returns when all are answered.

        ``on_event`` is called in this thread with ``start``, ``progress``, ``said``, ``retry``, ``done`` and ``failed``
        events, and with a ``tick`` when there is nothing to say.

        Raises ExecutorError if workers cannot be started.
        """
        waiting, attempts = Line(tasks), {task.key: Attempts() for task in tasks}
        answers: dict[str, Answer] = {}
        while len(answers) < len(tasks):
            self._hand_out(waiting, on_event)
            self._say_who_is_silent(on_event)
            try:
                worker, event = self._inbox.get(timeout=0.5)
            except queue.Empty:
                on_event({"event": "tick"})
                continue
            task, worker.heard_at = worker.task, time.monotonic()
            event = self._settle(worker, event)
            if task is None or event is None:
                continue
            if event["event"] == "progress":
                attempts[task.key].furthest = max(attempts[task.key].furthest, event["step"])
            elif event["event"] == "branched":
                waiting.release(event["run_id"])
            elif event["event"] == "said":
                pass  # to be shown, nothing to be done
            elif event["event"] == "done":
                answers[task.key] = Answer(event.pop("answer"))
            elif event["event"] == "failed" and (
                stop_if_disk(event) or event.pop("final") or attempts[task.key].are_used_up()  # type: ignore[func-returns-value]  # it raises, or says nothing
            ):
                answers[task.key] = Answer(None, event["reason"])
            else:
                event["event"] = "retry"
                waiting.put_first(task)
            if task.key in answers:
                waiting.release(*task.releases)
            on_event({**event, "key": task.key, "worker": worker.index})
        return answers

    def _hand_out(self, waiting: Line, on_event) -> None:
        for worker in self._pool:
            if not waiting:
                return
            if worker.task is None and (task := waiting.next(worker.programs)) is not None:
                if not worker.running:
                    worker.start()
                worker.send(task, waiting.after(task) if self._compile_ahead else None)
                on_event({"event": "start", "key": worker.task.key, "worker": worker.index})  # type: ignore[attr-defined]  # just sent

    def _say_who_is_silent(self, on_event) -> None:
        """A worker may compile, evaluate or write for long, and it may hang: which, a person can see, and end it."""
        now = time.monotonic()
        for worker in self._pool:
            if worker.task is not None and worker.running and now - worker.heard_at > SILENT_SECONDS:
                worker.heard_at = math.inf
                on_event({
                    "event": "said", "key": worker.task.key, "worker": worker.index,
                    "text": f"worker {worker.index} has said nothing of {worker.task.key} for "
                    f"{SILENT_SECONDS / 60:.3g} minutes: it compiles, evaluates, or hangs. Its log is {worker.log}; "
                    f"kill {worker.process.pid}, and it is tried again from its last checkpoint",
                })  # fmt: skip

    def _settle(self, worker: _Worker, event: dict) -> dict | None:
        """Keeps the book on the worker; what is left concerns its task (None: nothing does)."""
        kind = event["event"]
        if kind == "ready":
            worker.was_ready, self._failed_starts = True, 0
            return None
        if kind == "died":
            reason = self._deaths.reason(event["returncode"], event["peak_bytes"])
            worker.process = None
            worker.programs.clear()
            if worker.was_ready:
                event = {"event": "failed", "reason": reason, "final": False, "disk": False}
            else:  # not the task's fault
                self._count_failed_start(worker, reason)
                event = {"event": "retry", "reason": reason}
        if event["event"] in ("done", "failed", "retry"):
            worker.task = None
        return event

    def _count_failed_start(self, worker: _Worker, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_TRIES:  # in a row, of all workers
            lines = worker.log.read_text(encoding="utf-8", errors="replace").splitlines()
            last = lines[-1] if lines else "empty"
            raise ExecutorError(f"workers do not start ({reason}); {worker.log} ends with: {last}")

    def close(self, timeout: float = 30.0) -> None:
        """Stops all workers: idle ones end, busy ones save what they can; whoever takes longer is killed."""
        alive = [w for w in self._pool if w.running]
        for worker in alive:
            worker.stop()
        deadline = time.monotonic() + timeout
        try:
            for worker in alive:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: at once
            pass
        for worker in alive:
            worker.process.kill()
            worker.listener.join()
            worker.process = None


def auto_workers(num_tasks: int) -> int:
    """Workers worth starting: one a core on CPU (several models in one program gain nothing there), one in all on
    accelerators; never more than there are tasks."""
    return 1 if has_accelerator() else max(1, min(len(machine.cores()), num_tasks))


def assign_cores(workers: int) -> list[list[int]] | None:
    """Cores for each worker: shares of equal size; one each, in turn, if there are more workers than cores. None
    where processes cannot be pinned or the work is done elsewhere."""
    if has_accelerator() or not hasattr(os, "sched_setaffinity"):
        return None
    cores = machine.cores()
    if workers >= len(cores):
        return [[cores[i % len(cores)]] for i in range(workers)]
    share = len(cores) // workers
    return [cores[i * share : (i + 1) * share] for i in range(workers)]
