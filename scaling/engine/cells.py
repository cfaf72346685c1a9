"""The cells of a grid as one call of the command sees them: which are in, which it is to do, how long they take."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling import records
from scaling.config import RunConfig
from scaling.engine import costs, executors, folder, graph, plan, trunks
from scaling.engine.hardware import Hardware
from scaling.engine.plan import Row
from scaling.grid import Grid


@dataclass(frozen=True)
class Selection:
    """What a call is to do: ``mine`` of the grid's rows, of which ``todo`` have no record yet."""

    mine: list[Row]
    todo: list[Row]


class Cells:
    """The grid's cost table, ``rows``, with what is known by now: the seconds predicted, who carries whom, and in
    ``found``, by run_id, the status of the records that are in the results folder."""

    def __init__(self, grid: Grid, results: Path, hardware: Hardware, timings: plan.TimingCache):
        self.results, self.hardware, self.timings = results, hardware, timings
        self.rows = plan.rows(grid.cells, grid.execution.remat)
        self._groups = {name: set(run_ids) for name, run_ids in grid.groups.items()}
        self.found: dict[str, str] = {}
        self.have_trunks = grid.execution.trunks

    def look(self, *, set_aside: bool) -> list[str]:
        """Reads which cells are in; returns a line for each record that cannot be read (see ``folder.statuses``)."""
        self.found, complaints = folder.statuses(self.results, [r.run_id for r in self.rows], set_aside=set_aside)
        return complaints

    def apart(self) -> dict[Path, list[Row]]:
        """The rows that have laws of their own, by the folder of these laws: all of them in the results folder, or the
        groups of the grid each in one in it."""
        if not self._groups:
            return {self.results: self.rows}
        return {self.results / n: [r for r in self.rows if r.run_id in ids] for n, ids in self._groups.items()}

    def is_done(self, row: Row) -> bool:
        return folder.is_done(self.found, row.run_id)

    def without_record(self) -> list[Row]:
        return [row for row in self.rows if row.run_id not in self.found]

    def record(self, row: Row) -> records.RunRecord:
        """What a cell left, with what the grid says of it today."""
        return records.overlaid(records.read(records.path_of(self.results, row.run_id)), row.cell.place)

    def recorded(self) -> list[records.RunRecord]:
        return [self.record(row) for row in self.rows if row.run_id in self.found]

    # ---- what is to do ----------------------------------------------------------------------------------------------

    def select(self, only: Sequence[str], shard: str | None) -> Selection:
        """The cells that ``only`` names by their first digits, and of those the share ``shard``, "I/N".

        Raises ValueError for digits of no cell or of several.
        """
        mine = graph.select(self.rows, only)
        if shard:
            mine = graph.deal(mine, *map(int, shard.split("/")), together=self.have_trunks)
        self._share_trunks(mine)
        now = {row.run_id: row for row in self.rows}
        mine = [now[row.run_id] for row in mine]
        return Selection(mine, [row for row in mine if not self.is_done(row)])

    def refresh(self, selection: Selection) -> Selection:
        """The same cells, in the grid's order, with what is known of them by now; without those left out since."""
        mine = {row.run_id for row in selection.mine}
        rows = [row for row in self.rows if row.run_id in mine]
        return Selection(rows, [row for row in rows if not self.is_done(row)])

    def leave_out(self, dropped: Collection[Row], selection: Selection) -> None:
        """Takes rows out of the grid; what they would have carried falls to the others of ``selection``."""
        gone = {row.run_id for row in dropped}
        self.rows = [row for row in self.rows if row.run_id not in gone]
        self._share_trunks([row for row in selection.mine if row.run_id not in gone])
        self.predict()

    def _share_trunks(self, rows: Sequence[Row]) -> None:
        """Finds which of ``rows``, that this call trains or trained, share steps; the others stand for themselves."""
        shared = {row.run_id: row for row in self.shared(rows)}
        self.rows = [shared.get(row.run_id, row) for row in self.rows]

    def shared(self, rows: Sequence[Row], steps: dict[str, int] | None = None) -> list[Row]:
        """``rows`` as they carry each other when no other cell is there (``trunks.share``), if the grid allows it."""
        return trunks.share(rows, steps) if self.have_trunks else list(rows)

    # ---- how long it takes ------------------------------------------------------------------------------------------

    def predict(self) -> None:
        self.rows = self.predicted(self.rows)

    def predicted(self, rows: Sequence[Row]) -> list[Row]:
        """``rows`` with seconds: from timings made on this machine, or of the hardware that is not here."""
        if self.hardware.is_here:
            return plan.predict(rows, self.timings.load())
        return costs.predict_elsewhere(rows, self.hardware)

    def untimed(self, rows: Sequence[Row]) -> dict[str, RunConfig]:
        """A run of each shape of ``rows`` that is to be timed on this machine, and was not yet."""
        limit = None if executors.has_accelerator() else plan.MAX_CALIBRATED_STEP_FLOPS
        return plan.to_calibrate(rows, self.timings.load(), limit=limit)
