"""Cells → packs: which of them become one program."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scaling.config import RunConfig, program_key
from scaling.engine.plan import trunks
from scaling.engine.plan.table import Row
from scaling.fields import canonical_json


@dataclass(frozen=True)
class Pack:
    """Cells that train together, in one compiled step over a leading ``run`` axis. A lone run is a pack of one.

    ``riders``: by the run_id of a row, the rows that need its state, riders and those that start from it; ``after``:
    rows of this pack that need another's, so that it waits until they have it.
    """

    rows: tuple[Row, ...]
    riders: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names the pack in events: the run_id of its first member."""
        return self.rows[0].run_id

    @property
    def run_ids(self) -> list[str]:
        return [row.run_id for row in self.rows]

    @property
    def carried(self) -> tuple[str, ...]:
        """The runs that need the state of one of this pack."""
        return tuple(rider.run_id for riders in self.riders.values() for rider in riders)

    @property
    def cost(self) -> tuple[float, float]:
        """Orders packs by length: predicted seconds where known, else exact FLOPs."""
        seconds = sum(row.seconds or 0.0 for row in self.rows)
        return seconds, trunks.flops(self.rows)["spent"]

    def steps_left(self, step: int, num_steps: int) -> int:
        """Steps that the pack still makes when, of ``num_steps`` of its longest member, ``step`` are done."""
        return min(self.num_steps, max(0, num_steps - step))

    @property
    def num_steps(self) -> int:
        """Steps that the pack makes: as many as its longest member."""
        return max(row.own_steps for row in self.rows)

    def steps_before(self, rider: Row) -> int:
        """Steps that the pack makes until it has what ``rider`` needs of its member."""
        first = {row.run_id: row.first_step for row in self.rows}
        (need,) = (need for need in rider.needs if need.run_id in first)
        return need.step - first[need.run_id]


def shape_of(run: RunConfig) -> str:
    """Equal for runs that one program can train."""
    return canonical_json(program_key(run))


def build(rows: Sequence[Row], members: int | Mapping[str, int] = 1, *, carried: Sequence[Row] = ()) -> list[Pack]:
    """Groups rows that one program can train (``config.program_key``; seeds, rates, horizons are free) into packs of at
    most ``members``, the longest pack first. Rows that need another's state are packed apart from those that do not,
    and those that need theirs in turn apart from both. ``members`` may also hold a number by the ``shape_of`` a run.
    ``carried``: rows that train later, and need what these have already.
    """
    here = {row.run_id for row in rows}
    riders: dict[str, list[Row]] = {}
    for row in [*rows, *carried]:
        for need in row.needs:
            if need.run_id in here:
                riders.setdefault(need.run_id, []).append(row)
    depths = _depths(rows)
    groups: dict[tuple[bool, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.cell.holdout, depths[row.run_id], shape_of(row.cell.run)), []).append(row)
    packs = []
    for (_, waiting, shape), group in groups.items():
        most = members if isinstance(members, int) else members.get(shape, 1)
        # Members of about one length, riders of one trunk together: a pack is as long as its longest.
        group.sort(key=lambda row: (row.needs[-1].run_id if waiting else "", -row.own_steps, row.run_id))
        size = -(-len(group) // -(-len(group) // most))  # as few packs as can be, all about as large
        for i in range(0, len(group), size):
            some = tuple(group[i : i + size])
            carries = {row.run_id: tuple(riders[row.run_id]) for row in some if row.run_id in riders}
            packs.append(Pack(some, carries, tuple(row.run_id for row in some) if waiting else ()))
    return sorted(packs, key=lambda pack: pack.cost, reverse=True)


def _depths(rows: Sequence[Row]) -> dict[str, int]:
    """By run_id, how many of these rows have to train one after the other before it can: 0 of most."""
    at = {row.run_id: row for row in rows}
    depths: dict[str, int] = {}
    for row in rows:
        chain = [row]
        while (need := chain[-1].need_among(at)) is not None and need.run_id not in depths:
            chain.append(at[need.run_id])
        for link in reversed(chain):
            need = link.need_among(at)
            depths[link.run_id] = 0 if need is None else depths[need.run_id] + 1
    return depths
