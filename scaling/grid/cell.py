"""A cell: one run of a grid and its place in it; cells named by their coordinates, as ``exclude`` and others do."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scaling.config import RunConfig
from scaling.grid import strict
from scaling.grid.strict import GridError, shown


@dataclass(frozen=True)
class Cell:
    """One run of a grid and its place in it. ``labels`` are the grid's coordinates (budget_flops, size, axes …)."""

    run: RunConfig
    holdout: bool = False
    recipe: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> dict[str, Any]:
        """What no training depends on: a grid may change it when the run is done."""
        return {"holdout": self.holdout, "recipe": self.recipe, "labels": self.labels}


def called(labels: dict[str, Any]) -> str:
    if not labels:
        return "base"
    return "cell " + ", ".join(f"{key}={v if isinstance(v, str) else shown(v)}" for key, v in labels.items())


def select(cells: Sequence[Cell], selector: Any, path: str) -> list[bool]:
    """Which cells match every entry of a selector, whose values may be lists of alternatives.

    Raises GridError when no cell does: a selector that selects nothing is a mistake.
    """
    wanted = {
        key: value if isinstance(value, list) else [value]
        for key, value in strict.nonempty(selector, path, dict).items()
    }
    found = {key: [coordinate(cell, key, strict.join(path, key)) for cell in cells] for key in wanted}
    chosen = [all(found[key][i] in values for key, values in wanted.items()) for i in range(len(cells))]
    if not any(chosen):
        have = "; ".join(f"{key} {', '.join(map(shown, list(dict.fromkeys(found[key]))[:12]))}" for key in found)
        raise GridError(f"{path}: {shown(selector)} matches no cell; write from {have}")
    return chosen


def coordinate(cell: Cell, key: Any, where: str) -> Any:
    """A cell's label, or the value at a path into its run; None at a section of it. Raises GridError."""
    if key in cell.labels:
        return cell.labels[key]
    if key == "recipe":
        return cell.recipe
    node: Any = cell.run
    for name in ("model.d_model" if key == "width" else str(key)).split("."):
        if not dataclasses.is_dataclass(node) or name not in {f.name for f in dataclasses.fields(node)}:
            names = [*cell.labels, "width", "recipe"]
            guess = strict.did_you_mean(key, [*names, *strict.paths_of(strict.schema_of(RunConfig))])
            raise GridError(f"{where}: no cell has that; write one of {', '.join(names)}{guess}")
        node = getattr(node, name)
        if node is None:  # a model without experts has no number of them
            return None
    return None if dataclasses.is_dataclass(node) else node
