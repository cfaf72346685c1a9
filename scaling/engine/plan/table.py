"""Cells → rows: a cell, its parameters, tokens and FLOPs, and the seconds and bytes that were predicted for it.

A sweep is a schedule: the longest pack first, each to the next free worker.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from scaling import accounting
from scaling.config import RunConfig, StartConfig
from scaling.engine.plan import timetable
from scaling.grid import Cell

# Two fits with a thousand resamples, one of them before the held-out cells train, and the report.
CONCLUSION_SECONDS = 10.0


@dataclass(frozen=True)
class Need:
    """What a row begins with: the state of another row, ``run_id``, at a ``step`` of that one's own count.

    A rider has its trunk's until it branches off; a run with a start, its parent's.
    """

    run_id: str
    step: int


@dataclass(frozen=True)
class Row:
    """A cell, what it costs, and how long it will take and how much it will hold (None: nothing to predict from).

    Args:
      start: of a run that begins with another's weights, which.
      trunks: the rows that carry it, one after the other, as ``trunks.share`` found.
      first_step: the step from which it trains by itself.
      extra_points: of the curves of the runs that it carries itself.
    """

    cell: Cell
    plan: accounting.Plan
    seconds: float | None = None
    memory_bytes: int | None = None  # of one device, from the compiled program of a pack of one
    start: Need | None = None
    trunks: tuple[Need, ...] = ()
    first_step: int = 0
    extra_points: int = 0

    @property
    def run_id(self) -> str:
        return self.plan.run_id

    @property
    def own_steps(self) -> int:
        """Steps that it trains itself."""
        return self.plan.num_steps - self.first_step

    @property
    def carriers(self) -> tuple[str, ...]:
        """Its trunks' run_ids."""
        return tuple(need.run_id for need in self.trunks)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it begins with: its trunks' state, in which that of its start is, or its start."""
        return self.trunks or (() if self.start is None or self.first_step else (self.start,))

    def need_among(self, run_ids: Collection[str]) -> Need | None:
        """What of its needs one of the rows ``run_ids`` has to train; the last of several."""
        return next((need for need in reversed(self.needs) if need.run_id in run_ids), None)

    def share_before(self, step: int) -> float:
        """Of its own steps, the share before ``step``; below 0 where it is past that."""
        return (step - self.first_step) / max(1, self.own_steps)


def rows(cells: Iterable[Cell], remat: str = "none") -> list[Row]:
    """The cost table without times. Raises ValueError when a horizon is shorter than a step."""
    plans = [(cell, accounting.plan(cell.run, remat)) for cell in cells]
    num_steps = {counts.run_id: counts.num_steps for _, counts in plans}

    def need(start: StartConfig | None) -> Need | None:
        return None if start is None else Need(start.run, start.step or num_steps[start.run])

    return [Row(cell, counts, start=need(cell.run.start)) for cell, counts in plans]


def step_flops(run: RunConfig) -> float:
    """Exact training FLOPs of one step."""
    return accounting.flops_of(run)["exact"] * run.batch_tokens


def schedule(table: Sequence[Row], workers: int, running: Collection[str] = ()) -> float:
    """Wall time of the rows on so many ``workers``, on which those of ``running`` (run_ids) are already; one that
    needs another's state can start when that one has got there."""
    at = {row.run_id: row for row in table}

    def work(row: Row) -> timetable.Work:
        need = row.need_among(at)
        after = () if need is None else ((need.run_id, at[need.run_id].share_before(need.step)),)
        # a table that is scheduled has all its seconds: see ``predicted_wall``
        return timetable.Work(row.run_id, row.seconds, after, row.run_id in running)  # type: ignore[arg-type]

    return timetable.wall(map(work, table), workers)


def predicted_wall(table: Sequence[Row], workers: int, running: Collection[str] = ()) -> float | None:
    """Training time of the whole table: the cells that are fitted, then those held out; None if one is unknown.
    ``running``: see ``schedule``."""
    if any(row.seconds is None for row in table):
        return None
    phases = ([r for r in table if r.cell.holdout == held_out] for held_out in (False, True))
    return sum(schedule(phase, workers, running) for phase in phases)


def size_of(row: Row) -> str:
    model = row.cell.run.model
    return f"{model.d_model}×{model.num_layers}"
