"""The cells of a grid as one call of the command sees them: which are in, which it is to do, how long they take."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from scaling import fields, records, storage
from scaling.engine.plan import table, trunks
from scaling.engine.plan.plan import Plan
from scaling.engine.plan.table import Row
from scaling.grid import Grid
from scaling.records import read_or_empty


class Cells:
    """The rows of a grid, the statuses of the records that are in its results folder (``found``, by run_id), and the
    latest plan's word on each row (``adopt``). Of a grid with a design ``rows`` are those bought and those held out;
    the others are ``candidates``."""

    def __init__(self, grid: Grid, results: Path):
        self.results = results
        self.rows = table.rows(grid.cells, grid.execution.remat)
        self._groups = {name: set(run_ids) for name, run_ids in grid.groups.items()}
        self._have_trunks = grid.execution.trunks
        self.candidates: list[Row] = []
        self._order = {row.run_id: i for i, row in enumerate(self.rows)}
        self.found: dict[str, str] = {}

    def adopt(self, plan: Plan) -> None:
        """Takes the rows of a plan for the grid's: with what it knows of them, without those that it leaves out."""
        self.rows = list(plan.grid)

    @property
    def every(self) -> list[Row]:
        """The rows, and the candidates."""
        return [*self.rows, *self.candidates]

    def offer(self, bought: Collection[str]) -> None:
        """Makes candidates of all rows but those ``bought`` (run_ids) and those held out."""
        self.candidates = [row for row in self.rows if not (row.cell.holdout or row.run_id in bought)]
        self.rows = [row for row in self.rows if row.cell.holdout or row.run_id in bought]

    def buy(self, run_ids: Collection[str]) -> None:
        """Makes rows of candidates, in the grid's order."""
        bought = [row for row in self.candidates if row.run_id in run_ids]
        self.candidates = [row for row in self.candidates if row.run_id not in run_ids]
        self.rows = sorted([*self.rows, *bought], key=lambda row: self._order[row.run_id])

    def look(self, *, set_aside: bool) -> list[str]:
        """Reads which cells are in; returns a line for each record that cannot be read (see ``cells.statuses``)."""
        self.found, complaints = statuses(self.results, [r.run_id for r in self.every], set_aside=set_aside)
        return complaints

    def apart(self) -> dict[Path, list[Row]]:
        """The rows that have laws of their own, by the folder of these laws: all of them in the results folder, or the
        groups of the grid each in one in it."""
        if not self._groups:
            return {self.results: self.rows}
        return {self.results / n: [r for r in self.rows if r.run_id in ids] for n, ids in self._groups.items()}

    def is_done(self, row: Row) -> bool:
        return is_done(self.found, row.run_id)

    def without_record(self) -> list[Row]:
        return [row for row in self.rows if row.run_id not in self.found]

    def record(self, row: Row) -> records.RunRecord:
        """What a cell left, with what the grid says of it today."""
        return records.overlaid(records.read(records.path_of(self.results, row.run_id)), row.cell.place)

    def recorded(self) -> list[records.RunRecord]:
        return [self.record(row) for row in self.rows if row.run_id in self.found]

    def choose(self, only: Sequence[str], shard: str | None) -> list[str]:
        """The cells (run_ids) that ``only`` names by their first digits, and of those the share ``shard``, "I/N".

        Raises ValueError for digits of no cell or of several.
        """
        mine = select(self.rows, only)
        if shard:
            mine = deal(mine, *map(int, shard.split("/")), together=self._have_trunks)
        return [row.run_id for row in mine]

    @property
    def done(self) -> set[str]:
        """The cells (run_ids) that need not train, as ``is_done`` has it."""
        return {run_id for run_id in self.found if is_done(self.found, run_id)}


def of_another_grid(results: Path, run_ids: Sequence[str], grid_path: str) -> str | None:
    """What there is to say of records in a results folder that are of none of these cells.

    Raises ValueError where all that is there is the sweep of another file: of one with the same stem, most likely.
    """
    extra = records.strangers(results, set(run_ids))
    if not extra:
        return None
    before = read_or_empty(results / "sweep.json")
    theirs = {cell["run_id"] for cell in before.get("cells", [])}
    if theirs and theirs.isdisjoint(run_ids) and before["grid_path"] != grid_path:
        raise ValueError(
            f"{results} has the sweep of another grid, {before['grid_path']}, and none of the cells of {grid_path}: "
            f"write another --results, or, if this one replaces it, move {results / 'sweep.json'} away"
        )
    return f"{results}: {len(extra)} records are of no cell of this grid: they stay, in no law and no report"


def statuses(results: Path, run_ids: Sequence[str], *, set_aside: bool) -> tuple[dict[str, str], list[str]]:
    """Status by run_id of the records that are there, and a line for each that cannot be read.

    An unreadable record counts as absent, so its run is done again; with ``set_aside`` it becomes
    ``<run_id>.json.unreadable``.
    """
    found, complaints = {}, []
    paths = [records.path_of(results, run_id) for run_id in run_ids]
    for run_id, path, status in zip(run_ids, paths, storage.each(_status, paths)):
        if isinstance(status, str):
            found[run_id] = status
        elif status is not None:
            if set_aside:
                storage.set_aside(path, f"{path.name}.unreadable")
            complaint = str(status).removesuffix(": delete it and run the sweep again")
            complaints.append(f"{complaint}: set aside, the run is done again")
    return found, complaints


def _status(path: Path) -> str | ValueError | None:
    """A record's status, None where there is none, or why it cannot be read."""
    try:
        return records.read(path).status if path.exists() else None
    except ValueError as e:
        return e


def is_done(found: Mapping[str, str], run_id: str) -> bool:
    """Whether a run with these ``statuses`` is over for good: one that failed is tried again."""
    return found.get(run_id, "failed") != "failed"


def failed_record(row: table.Row, sweep_name: str, reason: str) -> records.RunRecord:
    """The record of a run that could not be done; ``environment["failure"]`` says why. The next sweep tries again."""
    cell, counts = row.cell, row.plan
    return records.RunRecord(
        run_id=row.run_id,
        status="failed",
        config=fields.to_dict(cell.run),
        sweep={"name": sweep_name, **cell.place},
        num_params=counts.num_params,
        num_tokens=0,
        num_steps=0,
        batch_tokens=counts.batch_tokens,
        unique_tokens=0,
        epochs=0.0,
        tokens_per_param=0.0,
        flops=dict.fromkeys(counts.flops, 0.0),
        loss=None,
        loss_standard_error=None,
        bits_per_byte=None,
        num_eval_tokens=0,
        diverged_at_step=None,
        curve={column: [] for column in records.CURVE_COLUMNS},
        data={},
        environment={"failure": reason},
    )


def select(rows: Sequence[Row], prefixes: Sequence[str]) -> list[Row]:
    """The rows whose run ids begin with one of ``prefixes``, each of which must name one row; all if there are none.

    Raises ValueError for a prefix of none or of several.
    """
    if not prefixes:
        return list(rows)
    chosen: dict[str, Row] = {}
    for prefix in prefixes:
        matches = [row for row in rows if row.run_id.startswith(prefix)]
        if len(matches) != 1:
            what = "no cell" if not matches else f"{len(matches)} cells"
            raise ValueError(f"--only {prefix}: {what} of this grid: write the first digits of a run id, see --plan")
        chosen[matches[0].run_id] = matches[0]
    return list(chosen.values())


def deal(rows: Sequence[Row], share: int, num_shares: int, *, together: bool = False) -> list[Row]:
    """The ``share``-th of ``num_shares`` (from 1), about equally costly; every machine deals alike. ``together``: cells
    that share a trajectory fall to one machine, as those do that start from each other."""
    units = trunks.together(rows, share=together)

    def cost(unit: list[Row]) -> tuple[float, str]:
        return -trunks.flops(trunks.share(unit) if together else unit)["spent"], min(row.run_id for row in unit)

    return [row for unit in sorted(units, key=cost)[share - 1 :: num_shares] for row in unit]
