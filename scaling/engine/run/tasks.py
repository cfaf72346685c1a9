"""Tasks, the line they wait in, and their answers: what every executor takes and gives."""

import itertools
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

LOOP = "scaling.training.loop"
MAX_TRIES = 3
INTERRUPTED = 130
# Tasks at the head of the line among which a worker takes one whose program it holds: the longest are to start first.
NEAR_THE_HEAD = 3


class ExecutorError(Exception):
    """Workers cannot be started at all; the message holds the end of their log."""


@dataclass(frozen=True)
class Task:
    """One call of ``worker.execute``. ``key`` names it in events and answers.

    ``after``: names that another task has to release before this one may start, with a ``branched`` event or by its
    end; ``releases``: names that this task releases. ``program``: equal for tasks that run the same compiled programs.
    """

    key: str
    command: str
    payload: dict
    after: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    program: str | None = None


class Line:
    """Tasks waiting for a worker, in order; those that wait for a name are passed over until it is released."""

    def __init__(self, tasks: Sequence[Task]):
        self._tasks = deque(tasks)
        self._held = {name for task in tasks for name in task.releases}

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def next(self, programs: Collection[str] = ()) -> Task | None:
        """The first task that may start, or one near it that runs one of ``programs``, leaves the line; None if none
        may."""
        may_start = (task for task in self._tasks if self._held.isdisjoint(task.after))
        near = list(itertools.islice(may_start, NEAR_THE_HEAD))
        task = next((task for task in near if task.program in programs), near[0] if near else None)
        if task is not None:
            self._tasks.remove(task)
        return task

    def after(self, task: Task) -> Task | None:
        """The task that will probably be the next when ``task``, which has left the line, is over."""
        held = self._held.difference(task.releases)
        return next((other for other in self._tasks if held.isdisjoint(other.after)), None)

    def put_first(self, task: Task) -> None:
        self._tasks.appendleft(task)

    def release(self, *names: str) -> None:
        self._held.difference_update(names)


@dataclass(frozen=True)
class Answer:
    """What became of a task: ``value`` as ``worker.execute`` returned it, or the ``reason`` it failed for."""

    value: dict | None
    reason: str | None = None


def ignore(event: dict) -> None:
    pass


@dataclass
class Attempts:
    """Failures of one task in a row that got no further than those before them."""

    failures: int = 0
    furthest: int = 0  # step
    furthest_at_last_failure: int = 0

    def are_used_up(self) -> bool:
        """Counts a failure. One that got further than the last is the first of a new row: a machine that is often
        killed still ends, a crash at a fixed step does not go on for ever."""
        self.failures = 1 if self.furthest > self.furthest_at_last_failure else self.failures + 1
        self.furthest_at_last_failure = self.furthest
        return self.failures >= MAX_TRIES


def stop_if_disk(event: dict) -> None:
    """Raises OSError if a task failed because nothing can be written: no task can do better until somebody mends it."""
    if event.pop("disk"):
        raise OSError(event["reason"].removeprefix("OSError: "))
