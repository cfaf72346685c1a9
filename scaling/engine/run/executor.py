"""The interface of executors: ``Executor`` says what it is, ``Orders`` what it is asked, ``Runner`` takes tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from scaling.engine.run.tasks import LOOP, Answer, Task, ignore
from scaling.training.distributed import Group


class Detached(Exception):
    """All is submitted and left to whom it was given; the message says to what."""


@dataclass(frozen=True)
class Orders:
    """What a call of the command asks of its executor.

    Args:
      workdir, logs: where checkpoints are, and where logs can grow.
      name: of the sweep.
      loop: the module that trains.
      workers: how many at a time; None for as many as the executor sees fit.
      group: the processes that train each run together, if several do.
      options: KEY=VALUE of the executor's own; ``detach``: whether it shall be left alone with the sweep.
      command: the arguments as typed, for whoever gives the command again.
    """

    workdir: Path
    logs: Path
    name: str
    loop: str = LOOP
    workers: int | None = None
    group: Group | None = None
    options: tuple[str, ...] = ()
    detach: bool = False
    command: tuple[str, ...] = ()


class Runner(Protocol):
    """What takes tasks, the longest first, and answers each; started by an executor."""

    def run(self, tasks: Sequence[Task], on_event: Callable[[dict], None] = ignore) -> dict[str, Answer]: ...

    def close(self) -> None: ...


class Executor:
    """A way to run tasks, entered in ``executors.EXECUTORS``; these are the answers of one that runs them here.

    Raises ValueError, in one line, for orders that it cannot follow.
    """

    trains_here: ClassVar[bool] = True  # whether it is this machine whose time and memory count
    gives_own_signs: ClassVar[bool] = False  # whether whoever runs a task keeps its sign (``signs.Board``)
    can_be_distributed: ClassVar[bool] = False  # whether several processes can train one model under it
    can_detach: ClassVar[bool] = False  # whether it can be left alone with a sweep
    options_help: ClassVar[str] = ""  # of its own option, --NAME KEY=VALUE …; without it there is none
    needs_disk: ClassVar[str] = ""  # why the work folder cannot be in a bucket

    def __init__(self, orders: Orders):
        self.orders = orders

    @property
    def times_here(self) -> bool:
        """Whether a shape timed by it says how long the shape takes under it."""
        return self.trains_here

    def num_workers(self, num_packs: int) -> int:
        """How many of so many packs train at a time."""
        return self.orders.workers or num_packs

    def start(self, workers: int, lock_fds: Sequence[int] = ()) -> Runner:
        """Returns what runs tasks; what it starts inherits ``lock_fds``."""
        raise NotImplementedError

    def test(self, num_packs: int) -> str | None:
        """What there is to say of whether so many packs would be taken, without asking for it in earnest."""
        return None

    def settle(self, is_done: Callable[[str], bool]) -> None:
        """Forgets what earlier calls left of runs (run_ids) that are done."""

    def farewell(self) -> str:
        """What to tell the person who interrupts it."""
        return "stopping: what is running saves a checkpoint (once more: stops at once)"

    @classmethod
    def left_behind(cls, workdir: Path) -> str | None:
        """What calls before this one left running, and how it is ended, in words; None if nothing."""
        return None

    @classmethod
    def has_submitted(cls, workdir: Path) -> bool:
        """Whether something of an earlier call may still be under way, asked without asking anybody."""
        return False

    @classmethod
    def queued(cls, workdir: Path) -> dict[str, str]:
        """What is said of cells that wait for a machine, by run_id."""
        return {}
