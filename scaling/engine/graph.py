"""Cells → packs: which are to be done here, and which of them become one program."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from scaling.config import Horizon, canonical_json
from scaling.engine.plan import Row


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


def deal(rows: Sequence[Row], share: int, num_shares: int) -> list[Row]:
    """The ``share``-th of ``num_shares`` (from 1), about equally costly; every machine deals alike."""
    ordered = sorted(rows, key=lambda row: (-row.plan.flops["exact"], row.run_id))
    return ordered[share - 1 :: num_shares]


@dataclass(frozen=True)
class Pack:
    """Cells that train together, in one compiled step over a leading ``run`` axis. A lone run is a pack of one."""

    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        """Names the pack in events: the run_id of its first member."""
        return self.rows[0].run_id

    @property
    def run_ids(self) -> list[str]:
        return [row.run_id for row in self.rows]

    @property
    def cost(self) -> tuple[float, float]:
        """Orders packs by length: predicted seconds where known, else exact FLOPs."""
        seconds = sum(row.seconds or 0.0 for row in self.rows)
        return seconds, sum(row.plan.flops["exact"] for row in self.rows)


def _signature(row: Row) -> tuple:
    """Equal for cells that one program can train side by side: all but the numbers that live in the state."""
    run = row.cell.run
    optim = dataclasses.replace(run.optim, peak_lr=1.0, weight_decay=0.0)
    same = dataclasses.replace(run, seed=0, optim=optim, horizon=Horizon(steps=1))
    return row.cell.holdout, row.plan.num_steps, canonical_json(same)


def build(rows: Sequence[Row], members: int = 1) -> list[Pack]:
    """Groups rows that one program can train (equal but for seed, peak rate and decay, and equally many steps) into
    packs of at most ``members``, the longest pack first.

    On CPU ``members`` is 1: vmap over runs gains nothing there, one process per core does.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(_signature(row), []).append(row)
    packs = [Pack(tuple(group[i : i + members])) for group in groups.values() for i in range(0, len(group), members)]
    return sorted(packs, key=lambda pack: pack.cost, reverse=True)
