"""Sections of a grid file → choices of partial runs; a cell is one of each choice, merged (``grid``).

``recipe`` and ``base`` are a choice of one. ``isoflop`` is a choice among budgets × sizes, each axis one among its
entries, ``seeds`` one among seeds.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from scaling.config import Horizon, RunConfig, StartConfig
from scaling.families import FAMILIES
from scaling.families.counting import RULES
from scaling.grid import strict
from scaling.grid.recipes import RECIPES
from scaling.grid.strict import GridError, Leaves
from scaling.objectives import OBJECTIVES

# Columns of the records' table that no axis may take the name of.
RESERVED_LABELS = ("run_id", "status", "holdout", "budget_flops", "label")
RECIPE_SCHEMA = {"name": Literal[(*RECIPES, "none")], "lr_scale": float, "batch_scale": float}
# Every family's fields; which of them the family of a cell has is seen when the cell is built (``grid``).
MODEL_SCHEMA = {"width": int, "params": float, **strict.schema_of_any(FAMILIES, "family")}
# A run's start is named as cells are in ``exclude``: which run_id that is, is known when all cells are (``starts``).
START_SCHEMA = {**strict.schema_of(StartConfig), "run": dict}
# Epochs become tokens when the cell is built: a run's horizon, which run_id hashes, is of what was there.
HORIZON_SCHEMA = {**strict.schema_of(Horizon), "epochs": float}
OBJECTIVE_SCHEMA = strict.schema_of_any(OBJECTIVES, "name")
RUN_SCHEMA = {
    **strict.schema_of(RunConfig), "model": MODEL_SCHEMA, "horizon": HORIZON_SCHEMA,
    "objective": OBJECTIVE_SCHEMA, "start": START_SCHEMA, "recipe": RECIPE_SCHEMA,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One entry of a section: the part of a run that it sets, and the coordinates that name it."""

    leaves: Leaves
    labels: dict[str, Any] = field(default_factory=dict)


def of(sections: dict[str, Any]) -> list[list[Entry]]:
    """The choices of a grid, in the order in which later ones win. Raises GridError."""
    choices = []
    if "isoflop" in sections:
        choices.append(_isoflop_entries(sections["isoflop"]))
    if "axes" in sections:
        axes = strict.nonempty(sections["axes"], "axes", dict)
        choices += [_axis_entries(axis, entries) for axis, entries in axes.items()]
    if "seeds" in sections:
        choices.append(_seed_entries(sections["seeds"]))
    _refuse_shared(choices)
    choices.insert(0, [_base_entry(sections)])
    return choices


def _recipe_leaves(raw: Any, path: str) -> Leaves:
    """A recipe is a name or a mapping; null and ``none`` are: every value is written out."""
    if not isinstance(raw, dict):
        return {("recipe", "name"): (strict.leaf("none" if raw is None else raw, RECIPE_SCHEMA["name"], path), path)}
    return strict.flatten(raw, RECIPE_SCHEMA, path, ("recipe",))


def _run_leaves(raw: Any, path: str) -> Leaves:
    leaves: Leaves = {}
    for key, value in strict.mapping(raw, path, RUN_SCHEMA).items():
        where = strict.join(path, key)
        found = (
            _recipe_leaves(value, where) if key == "recipe" else strict.flatten(value, RUN_SCHEMA[key], where, (key,))
        )
        leaves |= found
    return leaves


def _base_entry(sections: dict[str, Any]) -> Entry:
    leaves: Leaves = {("recipe", "name"): ("default@2", "recipe")}
    if "recipe" in sections:
        leaves |= _recipe_leaves(sections["recipe"], "recipe")
    return Entry(leaves | _run_leaves(sections.get("base", {}), "base"))


def _isoflop_entries(raw: Any) -> list[Entry]:
    """Budgets × sizes: each cell's horizon is its budget under the rule."""
    strict.mapping(raw, "isoflop", ("rule", "budgets", "sizes"))
    rule = strict.leaf(raw.get("rule", "exact"), Literal[tuple(RULES)], "isoflop.rule")
    entries = []
    for i, budget in enumerate(strict.nonempty(raw.get("budgets"), "isoflop.budgets")):
        path = f"isoflop.budgets[{i}]"
        sizes, sizes_path, flops_path = raw.get("sizes"), "isoflop.sizes", path
        if isinstance(budget, dict):
            strict.mapping(budget, path, ("flops", "sizes"))
            flops_path = f"{path}.flops"
            if "sizes" in budget:
                sizes, sizes_path = budget["sizes"], f"{path}.sizes"
            budget = budget.get("flops")
        flops = strict.leaf(budget, float, flops_path)
        horizon = {("horizon", "flops"): (flops, flops_path), ("horizon", "rule"): (rule, "isoflop.rule")}
        for j, size in enumerate(strict.nonempty(sizes, sizes_path)):
            size_path = f"{sizes_path}[{j}]"
            if isinstance(size, dict):
                model = strict.flatten(size, MODEL_SCHEMA, size_path, ("model",))
            else:
                model = {("model", "width"): (strict.leaf(size, int, size_path), size_path)}
            entries.append(Entry(horizon | model, {"budget_flops": flops}))
    return entries


def _axis_entries(axis: Any, entries: Any) -> list[Entry]:
    """A path into the run with a list of values, or a name with a list of partial runs whose keys move together."""
    path = strict.join("axes", axis)
    label = str(axis).rpartition(".")[2]
    if not isinstance(axis, str) or not label or label in RESERVED_LABELS:
        raise GridError(f"{path}: no axis can be called that; write another name")
    found = []
    for i, entry in enumerate(strict.nonempty(entries, path)):
        where = f"{path}[{i}]"
        if isinstance(entry, dict):
            entry = dict(entry)
            name = strict.leaf(entry.pop("label"), str, f"{where}.label") if "label" in entry else None
            leaves = _run_leaves(strict.nonempty(entry, where, dict), where)
            value = name or ",".join(f"{key[-1]}={value}" for key, (value, _) in leaves.items())
        else:
            leaves = _value_leaves(axis, entry, path, where)
            value = next(iter(leaves.values()))[0]
        # Every cell has its recipe and its size as they are; see ``_resolve``.
        found.append(Entry(leaves, {} if axis == "recipe" else {label: value}))
    return found


def _value_leaves(axis: str, value: Any, path: str, where: str) -> Leaves:
    if axis == "recipe":
        return _recipe_leaves(value, where)
    hint: Any = RUN_SCHEMA
    key = tuple(axis.split("."))
    for name in key:
        hint = hint.get(name) if isinstance(hint, dict) else None
    if isinstance(hint, dict):
        raise GridError(
            f"{path}: {axis} is a group of fields, no value; write one of them ({axis}.{next(iter(hint))}), or under a "
            f"name mappings that set several: kind: [{{{': {'.join(key)}: {{…}}{'}' * len(key)}, …]"
        )
    if hint is None:
        paths = strict.paths_of(RUN_SCHEMA)
        by_name = {path if "." in axis else path.rpartition(".")[2]: path for path in reversed(paths)}
        guess = strict.did_you_mean(axis, by_name)
        raise GridError(f"{path}: not a path into a run; write one, as plain values need (e.g. model.width){guess}")
    return strict.flatten(value, hint, where, key)


def _seed_entries(raw: Any) -> list[Entry]:
    paths = [f"seeds[{i}]" for i in range(len(strict.nonempty(raw, "seeds")))]
    return [Entry({("seed",): (strict.leaf(seed, int, path), path)}) for seed, path in zip(raw, paths)]


def _refuse_shared(sections: list[list[Entry]]) -> None:
    """Two axes that set the same value would undo each other, and two of one name would be one column."""
    owners: dict[tuple[str, ...], str] = {}
    labels: set[str] = set()
    for entries in sections:
        mine = {key: path for entry in entries for key, (_, path) in entry.leaves.items()}
        for key, path in mine.items():
            if key in owners:
                raise GridError(f"{path}: {'.'.join(key)} is set by {owners[key]} too; write it in one of them")
        for label in entries[0].labels:
            if label in labels:
                raise GridError(f"axes: two axes would be labelled {label}; write one of them as a named group")
        owners |= mine
        labels |= set(entries[0].labels)
