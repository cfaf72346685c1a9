"""``design`` of a grid: its cells are candidates, of which some are bought in rounds; what that is to reach, and where
it begins. Which cells a round buys is decided elsewhere (``scaling.rounds``): here is what a person wrote of it.

    design:
      target: a                 # what is to be known: a, E, allocation@C, loss@C, loss@N,D, of two groups multiplier@C
      compare: [muon, adamw]    # of a multiplier: the two, of the coordinate that fit.compare names
      interval: .08             # stop when its 90 % interval is at most this wide, with caution where few runs tell the
                                # noise (``laws.answers.rounds.caution``); of an allocation, in log N*
      budget_flops: 8e13        # or before more is spent: exact training FLOPs of bought cells, what is shared once
      batch: 4                  # cells of a round at most
      exponent: .4              # a cell's gain counts over its cost to this power
      seed_cells: [{width: 16}, {budget_flops: 1e10}]   # trained first; else the cheapest that identify the law

Held-out cells are no candidates: they train last, forecast first.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.grid import strict
from scaling.grid.cell import Cell, called, coordinate, select
from scaling.grid.strict import GridError, shown


@dataclass(frozen=True)
class DesignConfig:
    """What the rounds are to reach, and by which steps.

    ``compare`` are the two groups of a multiplier, what one is worth over the other; () of other targets. ``exponent``
    is κ of gain / cost^κ; ``seed_cells`` are run_ids here, () for those that the rounds choose themselves.
    """

    target: str = "a"
    compare: tuple[str, ...] = ()
    interval: float | None = None
    budget_flops: float | None = None
    batch: int = 4
    exponent: float = 0.4
    seed_cells: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("interval", "budget_flops"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}: write a positive number")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch!r}: write a whole number ≥ 1")
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"exponent is {self.exponent!r}: write a number from 0 (cost is no matter) to 1")


def read(sections: Mapping[str, Any], cells: Sequence[Cell], told_by: tuple[str, str] | None) -> DesignConfig | None:
    """The section ``design`` of a grid of these cells, None where it has none.

    ``told_by``: the coordinate that the grid has laws apart by, and the key that names it. Raises GridError.
    """
    if "design" not in sections:
        return None
    raw = strict.mapping(sections["design"], "design", [f.name for f in dataclasses.fields(DesignConfig)])
    compared = _compared(raw.get("compare"), cells, told_by)
    if not any(raw.get(key) is not None for key in ("interval", "budget_flops")):
        raise GridError(f"design: {shown(dict(raw))} never ends; write interval: .08, budget_flops: 1e13, or both")
    for cell in cells:
        if cell.run.start is not None:
            what = f"{called(cell.labels)} starts from another, which may not be bought"
            raise GridError(f"design: {what}; write cells without a start")
    lists = ("compare", "seed_cells")
    schema = {**strict.schema_of(DesignConfig), **dict.fromkeys(lists)}
    leaves = strict.flatten({k: v for k, v in raw.items() if k not in lists}, schema, "design")
    values: dict[tuple[str, ...], Any] = {key: value for key, (value, _) in leaves.items()} | {("compare",): compared}
    if raw.get("seed_cells") is not None:
        values["seed_cells",] = _chosen(raw["seed_cells"], cells)
    return strict.build(DesignConfig, values, leaves, "design")


def _compared(raw: Any, cells: Sequence[Cell], told_by: tuple[str, str] | None) -> tuple[str, ...]:
    """The two groups of a multiplier, () where none is asked. Raises GridError unless they are the grid's."""
    if raw is None:
        if told_by is None:
            return ()
        raise GridError(
            f"design: one law is what rounds narrow; write it without {told_by[1]}, in a grid for each, or target: "
            "multiplier@C and compare: [GROUP, OVER], with fit.compare"
        )
    if told_by is None or told_by[1] != "fit.compare":
        raise GridError("design.compare: the grid compares no groups; write fit: {compare: …}, whose values they are")
    names = [str(name) for name in strict.nonempty(raw, "design.compare")]
    values = dict.fromkeys(str(coordinate(cell, told_by[0], told_by[1])) for cell in cells if not cell.holdout)
    if len(set(names)) != 2 or len(names) != 2 or not set(names) <= set(values):
        raise GridError(f"design.compare: {shown(raw)}: write two of {', '.join(values)}")
    return tuple(names)


def _chosen(selectors: Any, cells: Sequence[Cell]) -> tuple[str, ...]:
    """run_ids of the cells that one of ``selectors`` names, in the grid's order. Raises GridError for held-out ones."""
    chosen = [False] * len(cells)
    for i, selector in enumerate(strict.nonempty(selectors, "design.seed_cells")):
        path = f"design.seed_cells[{i}]"
        found = select(cells, selector, path)
        if all(cell.holdout for cell, is_one in zip(cells, found) if is_one):
            raise GridError(f"{path}: {shown(selector)} names held-out cells only, which no law sees; write others")
        chosen = [a or b for a, b in zip(chosen, found)]
    return tuple(cell.run.run_id for cell, is_one in zip(cells, chosen) if is_one and not cell.holdout)
