"""What earlier calls left in the work folder: checkpoints of runs that are over, or that the grid no longer has."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from scaling import numbers, records, storage
from scaling.engine.executors import EXECUTORS
from scaling.engine.folder.cells import Cells
from scaling.engine.plan import disk
from scaling.engine.plan.table import Need, Row
from scaling.training import checkpoint

COMPILED_BYTES = 20_000_000_000  # of compiled programs in the cache, those used last


class Keeper:
    """Keeps a work folder tidy for ``cells``. ``keeps_final``: the grid's execution.keep_final_checkpoint."""

    def __init__(self, workdir: Path, cells: Cells, say: Callable[[str], None], *, keeps_final: bool):
        self._workdir, self._cells, self._say, self._keeps_final = workdir, cells, say, keeps_final

    def tidy(self, rows: Sequence[Row], cache_dir: Path, *, remove_orphans: bool) -> None:
        """Removes checkpoints that a call left that was killed between a run's record and their end, and programs that
        nobody has used for long; says, or removes, what is of no cell. For whoever holds the results."""
        storage.trim(cache_dir / "xla", COMPILED_BYTES)
        done = [row.run_id for row in rows if self._cells.is_done(row)]
        if self._keeps_final:
            self._say_what_is_not_kept(rows)
        elif not self._may_be_under_way():  # with jobs under way, they do it themselves
            storage.each(storage.remove_tree, (checkpoint.folder_of(self._workdir, run_id) for run_id in done))
        self._orphans(remove=remove_orphans)

    def kept_bytes(self, training: Sequence[Row]) -> int:
        """What checkpoints other than those that ``training`` will replace take: final ones that are kept, those of
        runs that the grid no longer has, and what could not be read and was set aside."""
        mine = {row.run_id for row in training}
        kept = 0
        for run_id in checkpoint.run_ids(self._workdir):
            whole = checkpoint.folder_of(self._workdir, run_id)
            unread = [path for path in whole.iterdir() if path.name.startswith("unreadable-")]
            kept += sum(map(storage.size_of, unread if run_id in mine else [whole]))
        if self._keeps_final:
            kept += sum(map(disk.checkpoint_bytes, training))
        return kept

    def require_starts(self, todo: Sequence[Row]) -> None:
        """Raises ValueError, in one line, for a row of a call, as they are shared from where they are now, that starts
        from a run which will not leave it its state: it is no part of the call, is past that step, or is done and its
        last checkpoint was not kept."""
        mine = {row.run_id for row in todo}
        for row in todo:
            if row.start not in row.needs or checkpoint.has_any(self._workdir, row.run_id):
                continue
            if why := self._why_not(row.start, mine):
                raise ValueError(f"{row.run_id} starts from {row.start.run_id} at step {row.start.step:,}, {why}")

    def _why_not(self, need: Need, mine: Collection[str]) -> str | None:
        status = self._cells.found.get(need.run_id)
        newest = checkpoint.newest_step(self._workdir, need.run_id)
        if status == "diverged" or (status == "completed" and newest == need.step):
            return None
        if status == "completed":
            path = records.path_of(self._cells.results, need.run_id)
            return f"whose weights are gone: it is done, and kept none; move {path} away, and it trains again"
        if newest > need.step:
            folder = checkpoint.folder_of(self._workdir, need.run_id)
            return f"and that is past it; remove {folder}, and it trains again"
        return None if need.run_id in mine else "which is not of this call: name it after --only too"

    def unkept(self, rows: Sequence[Row], grid_path: str) -> list[Row]:
        """The completed runs whose final checkpoint is not there. Raises ValueError if none is asked for."""
        if not self._keeps_final:
            raise ValueError(
                f"--train-unkept: {grid_path} keeps no final checkpoints: write execution: "
                "{keep_final_checkpoint: true}"
            )
        return self._without_final(rows)

    def _without_final(self, rows: Sequence[Row]) -> list[Row]:
        done = [row for row in rows if self._cells.found.get(row.run_id) == "completed"]
        return [row for row in done if checkpoint.newest_step(self._workdir, row.run_id) < row.plan.num_steps]

    def _say_what_is_not_kept(self, rows: Sequence[Row]) -> None:
        gone = [row.run_id for row in self._without_final(rows)]
        if gone:
            self._say(
                f"execution.keep_final_checkpoint is true, and {len(gone)} runs that are done have no final checkpoint "
                f"({records.named(gone)}): they were trained without it; --train-unkept trains them again"
            )

    def _orphans(self, *, remove: bool) -> None:
        """Says which checkpoints are of no cell of the grid any more, or removes them."""
        cells = {row.run_id for row in self._cells.every}
        folders = {i: checkpoint.folder_of(self._workdir, i) for i in checkpoint.run_ids(self._workdir)}
        orphans = [whole for run_id, whole in folders.items() if run_id not in cells]
        if not orphans:
            return
        size = f"{numbers.compact(sum(storage.each(storage.size_of, orphans)))}B"
        what = f"checkpoints of {len(orphans)} runs that the grid no longer has, {size}"
        if not remove:
            self._say(f"{self._workdir}: {what}, count towards the disk budget; --remove-orphans removes them")
        elif self._may_be_under_way():
            self._say(f"{self._workdir}: {what}, stay while jobs are under way that may be theirs")
        else:
            storage.each(storage.remove_tree, orphans)
            self._say(f"{self._workdir}: {what}, removed")

    def _may_be_under_way(self) -> bool:
        return any(kind.has_submitted(self._workdir) for kind in EXECUTORS.values())
