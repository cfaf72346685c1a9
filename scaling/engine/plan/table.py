"""Cells → rows: a cell, its parameters, tokens and FLOPs, and the seconds and bytes that were predicted for it.

A sweep is a schedule: the longest pack first, each to the next free worker.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from scaling import accounting
from scaling.config import RunConfig
from scaling.engine.plan import timetable
from scaling.grid import Cell

# Two fits with a thousand resamples, one of them before the held-out cells train, and the report.
CONCLUSION_SECONDS = 10.0


@dataclass(frozen=True)
class Row:
    """A cell, what it costs, and how long it will take and how much it will hold (None: nothing to predict from)."""

    cell: Cell
    plan: accounting.Plan
    seconds: float | None = None
    memory_bytes: int | None = None  # of one device, from the compiled program of a pack of one
    # What ``trunks.share`` found: the runs that carry this one, one after the other, up to the step from which it
    # trains by itself; and points of the curves of those that it carries.
    carriers: tuple[str, ...] = ()
    first_step: int = 0
    extra_points: int = 0

    @property
    def run_id(self) -> str:
        return self.plan.run_id

    @property
    def own_steps(self) -> int:
        """Steps that it trains itself."""
        return self.plan.num_steps - self.first_step

    def share_before(self, rider: "Row") -> float:
        """Of its own steps, the share before ``rider`` branches off; below 0 where it is past that."""
        return (rider.first_step - self.first_step) / max(1, self.own_steps)


def rows(cells: Iterable[Cell], remat: str = "none") -> list[Row]:
    """The cost table without times. Raises ValueError when a horizon is shorter than a step."""
    return [Row(cell, accounting.plan(cell.run, remat)) for cell in cells]


def step_flops(run: RunConfig) -> float:
    """Exact training FLOPs of one step."""
    return accounting.flops_of(run)["exact"] * run.batch_tokens


def schedule(table: Sequence[Row], workers: int, running: Collection[str] = ()) -> float:
    """Wall time of the rows on so many ``workers``, on which those of ``running`` (run_ids) are already; one that
    another row carries can start when that one has got to where it branches off."""
    at = {row.run_id: row for row in table}

    def work(row: Row) -> timetable.Work:
        carrier = next((at[c] for c in reversed(row.carriers) if c in at), None)
        after = () if carrier is None else ((carrier.run_id, carrier.share_before(row)),)
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
