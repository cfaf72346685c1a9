"""Cells that a design may buy: what some of them cost as things stand, and the checkpoints that trunks leave them.

A candidate is to its trunk what a held-out cell is: a rider of a later call, left a checkpoint of its own where
it branches off. Bought in a later round it then costs its extension and its cooldown alone, and nothing has to keep a
trunk's own checkpoints for somebody who may never come.
"""

import dataclasses
from collections.abc import Callable, Sequence

from scaling import storage
from scaling.engine.call import Call
from scaling.engine.plan import disk, plan
from scaling.engine.plan.plan import Means
from scaling.engine.plan.prices import Prices
from scaling.engine.plan.table import Row, step_flops
from scaling.training import checkpoint

# As many checkpoints as the training loop keeps of a run: what a later round's own cells may need on disk.
KEPT = 3


class Candidates:
    """The candidates of a call's cells. ``means``: what a plan is made with, as things stand when it is asked."""

    def __init__(self, call: Call, means: Callable[[], Means]):
        self._call, self._means = call, means

    def steps(self, rows: Sequence[Row]) -> dict[str, int]:
        """Of those of ``rows`` that are not done, the step of the newest checkpoint."""
        left = [row for row in rows if not self._call.cells.is_done(row)]
        return {row.run_id: checkpoint.newest_step(self._call.workdir, row.run_id) for row in left}

    def prices(self, rows: Sequence[Row]) -> Prices:
        """What some of these rows, by number, cost together: exact training FLOPs from the checkpoints that there are,
        steps that they share once."""
        return Prices(rows, self._means(), steps=self.steps(rows))

    def from_nothing(self, rows: Sequence[Row]) -> Prices:
        """What some of these rows would cost together, had none of them been begun."""
        return Prices(rows, self._means())

    def cost(self, rows: Sequence[Row]) -> float:
        """What those of these rows that are not done cost together."""
        left = [row for row in rows if not self._call.cells.is_done(row)]
        return self.prices(left)(range(len(left)))

    def carried(self, rows: Sequence[Row], held_out: Sequence[Row], workers: int, batch: int) -> list[Row]:
        """Candidates that trunks among ``rows`` leave a checkpoint while they train, as rows held out, as many as the
        disk has room for: those first whose checkpoint saves most FLOPs a byte.

        ``batch``: cells of a later round at the most, for whose own checkpoints room is left.
        """
        cells, means = self._call.cells, self._means()
        apart = [
            dataclasses.replace(row, cell=dataclasses.replace(row.cell, holdout=True))
            for row in cells.candidates
            if not cells.is_done(row)
        ]
        if not (rows and apart):
            return []
        every, mine = [*rows, *held_out, *apart], {row.run_id for row in rows}
        steps = self.steps(every)
        saved = {
            row.run_id: step_flops(row.cell.run) * (row.first_step - steps[row.run_id]) / disk.checkpoint_bytes(row)
            for row in means.shared(every, steps)
            if mine & set(row.carriers)
        }
        riders = sorted((row for row in apart if row.run_id in saved), key=lambda row: -saved[row.run_id])
        largest = max(map(disk.checkpoint_bytes, every))
        room = means.disk_bytes - means.kept_bytes(every) - largest * (2 * workers + KEPT * batch)
        riders = riders[: max(0, int(room // largest))]
        while riders and not self._fits(means, [*rows, *held_out, *riders], steps, workers):
            riders = riders[: len(riders) // 2]
        return riders

    def _fits(self, means: Means, rows: Sequence[Row], steps: dict[str, int], workers: int) -> bool:
        try:
            plan.make(rows, {row.run_id for row in rows}, (), means, steps=steps, workers=workers)
        except ValueError:
            return False
        return True

    def forget(self) -> None:
        """Removes the checkpoints that were kept for cells that nobody buys any more."""
        folders = [checkpoint.folder_of(self._call.workdir, row.run_id) for row in self._call.cells.candidates]
        storage.each(storage.remove_tree, folders)
