"""The bill of a plan: time, memory, disk, money and energy of each cell, each pack and the whole; and what to leave out
to stay within a budget.

Cells of one sweep share its hardware: with w workers a cell that takes s seconds holds a w-th of the devices meanwhile,
so its share is ``Hardware.cost(s / w)``. The whole is ``Hardware.cost(wall)``, idle workers included.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.engine.plan.hardware import Cost, Hardware
from scaling.engine.plan.table import Row, step_flops


def predict_elsewhere(table: Sequence[Row], hardware: Hardware) -> list[Row]:
    """The table with the seconds of hardware that is not here: FLOPs / (devices · peak · mfu)."""
    return [dataclasses.replace(row, seconds=hardware.seconds(row.cell.run, spent_flops(row))) for row in table]


def spent_flops(row: Row) -> float:
    """Exact training FLOPs of the steps that the cell trains itself; those before are its trunk's."""
    return step_flops(row.cell.run) * row.own_steps


@dataclass(frozen=True)
class Bill:
    """What ``rows``, all of them still to be done, come to on ``hardware``; ``seconds`` is the wall time of the whole,
    None where it cannot be told."""

    rows: Sequence[Row]
    hardware: Hardware
    workers: int
    seconds: float | None

    @property
    def total(self) -> Cost:
        return self.hardware.cost(self.seconds)

    @property
    def memory_bytes(self) -> int | None:
        """The largest need of one device; None unless every cell's is known."""
        return largest_memory(self.rows)

    def share(self, row: Row) -> Cost:
        return share_of(self.hardware, self.workers, row.seconds)

    def to_json(self, packs: Sequence[Any] = ()) -> dict[str, Any]:
        """All of it. ``packs`` (``packing.Pack``) are listed with their members and sums."""
        return {
            "schema": 1,
            "hardware": self.hardware.to_json(),
            "workers": self.workers,
            "total": {
                **dataclasses.asdict(self.total),
                "memory_bytes": self.memory_bytes,
                "flops": _sums([row.plan.flops for row in self.rows]),
                "spent_flops": sum(map(spent_flops, self.rows)),
                "num_tokens": sum(row.plan.num_tokens for row in self.rows),
                "num_steps": sum(row.plan.num_steps for row in self.rows),
            },
            "packs": [self._pack_json(pack) for pack in packs],
            "cells": [self._cell_json(row) for row in self.rows],
        }

    def _cell_json(self, row: Row) -> dict[str, Any]:
        counts = row.plan
        mfu = None if self.hardware.is_here else self.hardware.mfu_for(row.cell.run)
        return {
            "run_id": row.run_id,
            "holdout": row.cell.holdout,
            "labels": row.cell.labels,
            "num_params": counts.num_params,
            "num_tokens": counts.num_tokens,
            "num_steps": counts.num_steps,
            "flops": counts.flops,
            "branch_step": row.first_step,
            "starts_from": None if row.start is None else dataclasses.asdict(row.start),
            "carriers": list(row.carriers),
            "spent_flops": spent_flops(row),
            **cost_json(self.share(row), row.seconds),
            "memory_bytes": row.memory_bytes,
            "checkpoint_bytes": counts.checkpoint_bytes,
            "assumed_mfu": None if mfu is None else dataclasses.asdict(mfu),
        }

    def _pack_json(self, pack: Any) -> dict[str, Any]:
        known = all(row.seconds is not None for row in pack.rows)
        seconds = sum(row.seconds for row in pack.rows) if known else None
        return {
            "run_ids": [row.run_id for row in pack.rows],
            "flops": _sums([row.plan.flops for row in pack.rows]),
            "num_tokens": sum(row.plan.num_tokens for row in pack.rows),
            **cost_json(share_of(self.hardware, self.workers, seconds), seconds),
            "checkpoint_bytes": sum(row.plan.checkpoint_bytes for row in pack.rows),
        }


def share_of(hardware: Hardware, workers: int, seconds: float | None) -> Cost:
    """What one of ``workers`` costs while it is busy for ``seconds``."""
    return hardware.cost(None if seconds is None else seconds / workers)


def cost_json(cost: Cost, seconds: float | None) -> dict[str, Any]:
    return {"seconds": seconds, "device_hours": cost.device_hours, "dollars": cost.dollars, "kwh": cost.kwh}


def largest_memory(rows: Sequence[Row]) -> int | None:
    known = [row.memory_bytes for row in rows]
    return None if None in known else max(known, default=None)  # type: ignore[type-var]  # None is not in it


def _sums(counts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {rule: sum(flops[rule] for flops in counts) for rule in (counts[0] if counts else ())}


# ---- budgets --------------------------------------------------------------------------------------------------------

DROP_RULE = (
    "whole FLOP budgets, the largest first, held-out ones among them; cells of no budget one by one, the most "
    "expensive first. The cells of a budget stay or go together, so no IsoFLOP minimum loses the cells on either side; "
    "what starts from a cell goes with it"
)


@dataclass(frozen=True)
class Budget:
    """The most a sweep may come to, what earlier calls spent included; None: no limit."""

    hours: float | None = None
    dollars: float | None = None
    kwh: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.hours, self.dollars, self.kwh))

    def excess(self, cost: Cost) -> list[str]:
        """A phrase for each limit that ``cost`` is over. Raises ValueError for a limit on what is not known."""
        hours = None if cost.seconds is None else cost.seconds / 3600
        untimed = (
            "no time is known of some cells: run without it, name --hardware, or add --mfu where none is published"
        )
        no_price = "no price is known: add --price, dollars per device-hour"
        no_power = "no power is known: add --power, watts per device"
        checks = (
            ("hours", self.hours, hours, "h", untimed),
            ("dollars", self.dollars, cost.dollars, "$", untimed if hours is None else no_price),
            ("kwh", self.kwh, cost.kwh, "kWh", untimed if hours is None else no_power),
        )
        over = []
        for name, limit, value, unit, mend in checks:
            if limit is None:
                continue
            if value is None:
                raise ValueError(f"--budget-{name} {limit:g}: {mend}")
            if value > limit:
                over.append(
                    f"--budget-{name} {limit:g}: the plan takes {value:.3g} {unit}, {value - limit:.3g} too much"
                )
        return over


def levels(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows by what they cost, cheapest level first: a FLOP budget is one level, other cells of equal FLOPs are."""
    groups: dict[tuple[float, bool], list[Row]] = {}
    for row in rows:
        budget = row.cell.labels.get("budget_flops")
        key = (row.plan.flops["exact"], False) if budget is None else (float(budget), True)
        groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]


def within(
    budget: Budget, rows: Sequence[Row], cost_of: Callable[[Sequence[Row]], Cost], *, drop: bool
) -> tuple[list[Row], list[Row]]:
    """Rows that stay and rows that are left out, by ``DROP_RULE``, so that ``cost_of`` the former is within ``budget``.

    Raises ValueError, in one line, when they are too many and ``drop`` is false, or when none could stay.
    """
    over = budget.excess(cost_of(rows))
    if not over:
        return list(rows), []
    steps = levels(rows)
    kept: list[Row] = list(rows)
    dropped: list[Row] = []
    while steps and budget.excess(cost_of(kept)):
        leaving = [row for row in steps.pop() if row in kept]
        while leaving:
            dropped = [*leaving, *dropped]
            gone = {row.run_id for row in dropped}
            kept = [row for row in kept if row.run_id not in gone]
            leaving = [row for row in kept if row.start is not None and row.start.run_id in gone]
    if not any(not row.cell.holdout for row in kept):
        raise ValueError(f"{'; '.join(over)}; no level of cells fits: raise it or write a smaller grid")
    if not drop:
        raise ValueError(f"{'; '.join(over)}; without {describe(dropped)} it fits: add --drop, or raise it")
    return kept, dropped


def describe(rows: Sequence[Row], most: int = 8) -> str:
    """Cells in a phrase: their budgets, how many, and the first of their ids."""
    budgets = sorted({row.cell.labels["budget_flops"] for row in rows if "budget_flops" in row.cell.labels})
    ids = ", ".join(row.run_id for row in rows[:most]) + (", …" if len(rows) > most else "")
    what = f"{len(rows)} {'cell' if len(rows) == 1 else 'cells'}"
    if budgets:
        what += f" of budget{'s' if len(budgets) > 1 else ''} {', '.join(f'{b:g}' for b in budgets)}"
    return f"{what} ({ids})"
