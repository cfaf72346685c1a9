"""The plan of one call: made in one place, never changed; a measurement, a budget, a resume or a shard makes another.

``make`` only computes; ``show`` prints a plan and ``session`` carries it out.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from scaling.engine.plan import costs, disk, packing, table, timings, trunks
from scaling.engine.plan.costs import Bill, Budget
from scaling.engine.plan.hardware import Cost, Hardware
from scaling.engine.plan.packing import Pack
from scaling.engine.plan.table import Row


@dataclass(frozen=True)
class Means:
    """What there is to do the work with.

    Args:
      hardware: whose time, money and energy count.
      known: timings by ``timings.shape_key``, of the machine that trains.
      trunks: whether cells that differ in horizon alone share their steps.
      workers: how many train at a time, of so many packs.
      pack_sizes: members of a pack at most, or by ``packing.shape_of``.
      disk_bytes: that all checkpoints together may take.
      kept_bytes: that checkpoints take which stay while these rows train.
    """

    hardware: Hardware
    known: Mapping[str, timings.Timing]
    trunks: bool
    workers: Callable[[int], int]
    pack_sizes: int | Mapping[str, int]
    disk_bytes: float
    kept_bytes: Callable[[Sequence[Row]], int]

    def predicted(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with seconds: from timings made on this machine, or of hardware that is not here."""
        if self.hardware.is_here:
            return timings.predict(rows, self.known)
        return costs.predict_elsewhere(rows, self.hardware)

    def shared(self, rows: Sequence[Row], steps: Mapping[str, int] | None = None) -> list[Row]:
        """The rows as they carry each other when no other cell is there, from the ``steps`` that each has done."""
        return trunks.share(rows, steps) if self.trunks else list(rows)

    def bill(self, rows: Sequence[Row]) -> Bill:
        """What training these rows comes to, and the conclusion where this machine is the one."""
        workers = self.workers(len(packing.build(rows, self.pack_sizes)))
        wall = table.predicted_wall(rows, workers)
        if wall is not None and rows and self.hardware.is_here:
            wall += table.CONCLUSION_SECONDS
        return Bill(rows, self.hardware, workers, wall)


@dataclass(frozen=True)
class Plan:
    """What one call of the command does, and what that comes to.

    Args:
      grid: every row of the grid, those of this call with what is known of them, without those left out.
      rows: those of this call, done or not, in the grid's order; ``todo``: those that have no record.
      fitted, held_out: the packs of ``todo`` in the order in which the disk lets them be handed out.
      bill: of ``todo``.
      dropped: rows that were left out to stay within the budget.
    """

    grid: tuple[Row, ...]
    rows: tuple[Row, ...]
    todo: tuple[Row, ...]
    fitted: disk.Order
    held_out: disk.Order
    bill: Bill
    dropped: tuple[Row, ...] = ()

    @property
    def packs(self) -> list[Pack]:
        return [*self.fitted.packs, *self.held_out.packs]

    @property
    def checkpoint_bytes(self) -> int:
        """That checkpoints take on disk at once, at the least."""
        return max(self.fitted.total, self.held_out.total)

    def todo_of(self, *, holdout: bool) -> list[Row]:
        return [row for row in self.todo if row.cell.holdout == holdout]


def make(
    grid: Sequence[Row],
    mine: Collection[str],
    done: Collection[str],
    means: Means,
    *,
    steps: Mapping[str, int] | None = None,
    workers: int | None = None,
) -> Plan:
    """Plans what is not ``done`` of the rows ``mine`` (run_ids) of a grid.

    ``steps``: that each has trained already, 0 for those not named. ``workers``: how many there are, once there are.
    Raises ValueError, in one line, where the disk cannot hold the checkpoints.
    """  # fmt: skip
    shared = {row.run_id: row for row in means.shared([row for row in grid if row.run_id in mine], steps)}
    rows = means.predicted([shared.get(row.run_id, row) for row in grid])
    here = [row for row in rows if row.run_id in mine]
    todo = [row for row in here if row.run_id not in done]
    fitted, held_out = ([row for row in todo if row.cell.holdout == out] for out in (False, True))
    bill = means.bill(todo)
    orders = []
    for now, later in ((fitted, held_out), (held_out, [])):
        packs = packing.build(now, means.pack_sizes, carried=later)
        kept = means.kept_bytes([*now, *later])
        orders.append(disk.order(packs, workers or bill.workers, means.disk_bytes, kept))
    return Plan(tuple(rows), tuple(here), tuple(todo), *orders, bill)  # type: ignore[call-arg, arg-type]  # two orders, of the fitted and of the held-out


def within(budget: Budget, plan: Plan, means: Means, *, spent_seconds: float, drop: bool) -> Plan:
    """The plan without what is over the budget, what earlier calls spent included; the same plan if nothing is.

    Raises ValueError, in one line, where something is and ``drop`` is false, or nothing would stay.
    """
    if not budget or not plan.todo:
        return plan

    def cost_of(rows: Sequence[Row]) -> Cost:
        # As if the others were not in the grid: a trunk that is left out carries nobody.
        seconds = means.bill(means.predicted(means.shared(rows))).seconds if rows else 0.0
        return means.hardware.cost(None if seconds is None else seconds + spent_seconds)

    _, dropped = costs.within(budget, plan.todo, cost_of, drop=drop)
    if not dropped:
        return plan
    gone = {row.run_id for row in dropped}
    mine = [row.run_id for row in plan.rows if row.run_id not in gone]
    done = {row.run_id for row in plan.rows} - {row.run_id for row in plan.todo}
    rest = make([row for row in plan.grid if row.run_id not in gone], mine, done, means)
    return dataclasses.replace(rest, dropped=tuple(dropped))
