"""Several processes, one model: joining JAX's multi-controller, and leaving it when a process is gone.

Every host gives the same command. Process 0 decides what is done and writes what is found; the others do what it
publishes, task by task, through the coordination service that ``jax.distributed`` has running anyway. In between all
run the same program, each on the rows of its own devices.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from scaling.training import signals

# A process that says nothing for so long is gone.
SILENCE_SECONDS = 30
_POLL_SECONDS = 5
# A process that is told to end, and in all this time not once came back from a computation that waits for the others.
DEAF_SECONDS = 60
# What one process could not do and this one is still doing after so long, it can never end.
FAILED_SECONDS = 10
_INCOMPLETE = 3  # the commands' exit code
_WANTED = "write auto, off, or coordinator=HOST:PORT,processes=N,process=I"


@dataclass(frozen=True)
class Place:
    """What ``jax.distributed.initialize`` is told; all None: it finds out (TPU, Slurm, GKE, Open MPI)."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def parse(text: str) -> Place | None:
    """``auto``, ``off`` (None) or the three written out. Raises ValueError."""
    if text in ("auto", "off"):
        return Place() if text == "auto" else None
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    if sorted(parts) != ["coordinator", "process", "processes"]:
        raise ValueError(f"--distributed {text}: {_WANTED}")
    if not re.fullmatch(r"[^\s:]+:\d+", parts["coordinator"]):
        raise ValueError(f"--distributed: coordinator is {parts['coordinator']!r}: write host:port of process 0")
    for name in ("processes", "process"):
        if not parts[name].isdecimal():
            raise ValueError(f"--distributed: {name} is {parts[name]!r}: write a whole number")
    processes, process = int(parts["processes"]), int(parts["process"])
    if not process < processes:
        raise ValueError(f"--distributed: process is {process} of {processes}: write 0 to {processes - 1}")
    return Place(parts["coordinator"], processes, process)


class Group:
    """The processes of one command, as one of them sees them.

    Each says every few seconds that it is there, and ends when another has not for ``SILENCE_SECONDS``: a computation
    or a checkpoint that waits for a process that is gone would wait for ever, or for many minutes. For the same reason
    it ends when another could not do a task that this one is still at, or when it is told to end in a computation in
    which no signal is heard. To be made in the main thread.
    """

    def __init__(self, process: int, processes: int, client):
        self.process, self.processes = process, processes
        self._client = client
        self._num_published = 0
        self._left = threading.Event()
        self._task: int | None = None  # the number of the one that this process is at
        self._is_deaf: Callable[[], bool] = lambda: False
        self._told_at: float | None = None
        self._listener = signals.Listener(self._hear)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def is_first(self) -> bool:
        return self.process == 0

    def _watch(self) -> None:
        others = {i: (None, time.monotonic()) for i in range(self.processes) if i != self.process}
        count, failed_at = 0, None
        while not self._left.wait(_POLL_SECONDS):
            count += 1
            task, at = self._task, time.monotonic()
            if task is None or not self._is_deaf():
                self._told_at = None
            elif self._told_at is not None and at - self._told_at > DEAF_SECONDS:
                self.abandon(f"it was told to end, and has been waiting for the others for {DEAF_SECONDS} seconds")
            try:
                self._client.key_value_set(f"scaling/alive/{self.process}", str(count), allow_overwrite=True)
                said = dict(self._client.key_value_dir_get("scaling/alive/"))
                failed = dict(self._client.key_value_dir_get(f"scaling/failed/{task}/"))
            except Exception as e:  # the client's errors have no type of their own
                if not self._left.is_set():
                    self.abandon(f"process 0 does not answer ({_first_line(e)})")
                return
            failed.pop(f"scaling/failed/{task}/{self.process}", None)
            if task is None or not failed:
                failed_at = None
            elif failed_at is None or failed_at[0] != task:
                failed_at = task, at
            elif at - failed_at[1] > FAILED_SECONDS and self._task == task:
                key, reason = min(failed.items())
                self.abandon(f"process {key.rpartition('/')[2]} could not do its part: {reason}")
            for i, (last, since) in others.items():
                now = said.get(f"scaling/alive/{i}")
                if now != last:
                    others[i] = now, time.monotonic()
                elif time.monotonic() - since > SILENCE_SECONDS and not self._left.is_set():
                    self.abandon(f"process {i} has said nothing for {SILENCE_SECONDS} seconds")

    def _hear(self, number: int) -> None:
        if number in signals.ENDING and self._told_at is None:
            self._told_at = time.monotonic()

    @contextmanager
    def at_task(self, is_deaf: Callable[[], bool]) -> Iterator[None]:
        """While it lasts this process does its part of the task published last. ``is_deaf``: whether it has not taken
        in a signal yet."""
        self._task, self._is_deaf = self._num_published - 1, is_deaf
        try:
            yield
        finally:
            self._task = None

    def could_not(self, reason: str) -> None:
        """Tells the others that this process cannot do its part of the task that it is at."""
        self._client.key_value_set(f"scaling/failed/{self._task}/{self.process}", reason, allow_overwrite=True)

    def gather(self, word: dict) -> list[dict]:
        """What each process says, in their order, of the message published last; for process 0, the others ``tell``."""
        self.tell(word)
        return [self._wait_for(f"scaling/told/{self._num_published - 1}/{i}") for i in range(self.processes)]

    def tell(self, word: dict) -> None:
        self._client.key_value_set(f"scaling/told/{self._num_published - 1}/{self.process}", json.dumps(word))

    def leave(self) -> None:
        """Waits for the others, so that nobody takes an early end for a death."""
        import jax

        self._left.set()
        self._listener.close()
        jax.distributed.shutdown()

    def publish(self, message: dict) -> None:
        """Process 0 gives the others something to do."""
        self._client.key_value_set(f"scaling/task/{self._num_published}", json.dumps(message))
        self._num_published += 1

    def published(self) -> Iterator[dict]:
        """What process 0 gives to do, in order; the last item is its last word, ``{"stop": exit code}``."""
        while True:
            message = self._wait_for(f"scaling/task/{self._num_published}")
            self._num_published += 1
            yield message
            if "stop" in message:
                return

    def _wait_for(self, key: str) -> dict:
        while True:
            asked = time.monotonic()
            try:
                return json.loads(self._client.blocking_key_value_get(key, round(1000 * _POLL_SECONDS)))
            except Exception as e:  # the client's errors have no type of their own
                if "DEADLINE_EXCEEDED" not in str(e):
                    self.abandon(f"process 0 does not answer ({_first_line(e)})")
                time.sleep(max(0.0, 0.1 - (time.monotonic() - asked)))

    def abandon(self, reason: str) -> NoReturn:
        """Ends this process at once with one line: the others cannot go on without each other, and an orderly end
        would wait for one that is gone."""
        print(
            f"error: process {self.process} of {self.processes} stops: {reason}; what was saved is kept: give the same "
            "command on every host again, on as many as there are",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(_INCOMPLETE)


def join(place: Place) -> Group:
    """Joins the other processes. Call it before JAX has touched a device.

    Raises ValueError when nothing says who the others are, or they cannot be reached.
    """
    import jax

    try:
        jax.distributed.initialize(place.coordinator, place.processes, place.process)
    except (ValueError, RuntimeError) as e:
        how = "neither TPU, Slurm, GKE nor Open MPI says who the others are" if place == Place() else "not joined"
        raise ValueError(f"--distributed: {how} ({_first_line(e)}): {_WANTED}") from None
    from jax._src import distributed  # the client has no public name; Orbax takes it from here too

    return Group(jax.process_index(), jax.process_count(), distributed.global_state.client)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:150]
