"""How many checkpoints a sweep has on disk at once, and the order of its packs that keeps them within a budget.

Of a run that trains there are two at least, the one being written and the one it replaces; of a branch that waits for a
worker there is one. The longest packs first is the shorter schedule, but then most trunks are done before most
branches begin, and all branches may wait at once. Branches first: a trunk starts only when no branch waits, so that
those of as many trunks as there are workers wait at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scaling.engine.plan.packing import Pack
from scaling.engine.plan.table import Row

# What of a checkpoint is not state: the host's books, Orbax's own files. See tests/engine/test_disk.py.
OVERHEAD_BYTES = 100_000
# Of a run that was interrupted: as many as the training loop ever keeps.
_KEPT = 3


@dataclass(frozen=True)
class Order:
    """Packs in the order they are to be handed out, and the bytes that their checkpoints take at most.

    ``kept``: of runs that are over or of no part in this, and stay; ``waiting``: of runs that do not train yet;
    ``training``: the least for those that do, two a run.
    """

    packs: list[Pack]
    waiting: int
    training: int
    kept: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.waiting + self.training


def checkpoint_bytes(row: Row) -> int:
    return row.plan.checkpoint_bytes + OVERHEAD_BYTES


def order(packs: Sequence[Pack], workers: int, budget_bytes: float, kept: int = 0) -> Order:
    """The packs, longest first if the budget can hold that beside the bytes that are ``kept``, else branches first.

    Raises ValueError, in one line with what to write instead, when it can hold neither.
    """
    training = 2 * workers * max((_sum(pack.rows) for pack in packs), default=0)
    # Packs that wait for a trunk have their branch checkpoints counted with the trunk, in ``riders``.
    interrupted = sum(_KEPT * checkpoint_bytes(r) for p in packs if not p.after for r in p.rows if r.first_step)
    branches = [sum(_sum(riders) for riders in pack.riders.values()) for pack in packs]
    later = sum(checkpoint_bytes(r) for p in packs for riders in p.riders.values() for r in riders if r.cell.holdout)
    later = later if packs and not packs[0].rows[0].cell.holdout else 0
    longest_first = Order(list(packs), interrupted + sum(branches), training, kept)
    if longest_first.total <= budget_bytes:
        return longest_first
    at_once = min(sum(branches), sum(sorted(branches)[-workers:]) + later)
    branches_first = Order(sorted(packs, key=lambda p: not p.after), interrupted + at_once, training, kept)
    if branches_first.total <= budget_bytes:
        return branches_first
    gb, least = (f"{n / 1e9:.3g}" for n in (budget_bytes, 1.01 * branches_first.total))
    stay = f", {kept / 1e9:.3g} those of other runs, which stay" if kept else ""
    raise ValueError(
        f"--disk-budget {gb} GB: checkpoints take up to {least} at once, {training / 1e9:.3g} of them those that "
        f"{workers} {'worker keeps' if workers == 1 else 'workers keep'}, two a run{stay}; write at least {least}, "
        f"fewer --workers, or execution: {{trunks: false}}{', or --remove-orphans' if kept else ''}"
    )


def _sum(rows: Sequence[Row]) -> int:
    return sum(map(checkpoint_bytes, rows))
