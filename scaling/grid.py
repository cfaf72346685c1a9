r"""YAML → a list of cells. The only module that knows YAML.

A grid file:

    recipe: default@1                   # or {name: default@1, lr_scale: 2, batch_scale: 0.5}, or none
    base:                               # what every run shares: a RunConfig, in part
      model: {activation: gelu}
      data: {seq_len: 128}
    isoflop:                            # budgets × sizes; each cell's horizon is its budget
      rule: exact
      budgets: [3e11, {flops: 6e11, sizes: [24, 32, 48]}]
      sizes: [16, 24, 32]               # for the budgets that list none of their own
    axes:                               # product across axes, and with isoflop
      recipe.lr_scale: [0.5, 1, 2]      # named by a path: a list of values
      shape:                            # any other name: a list of partial runs, whose keys move together
        - {model: {width: 64}, batch_size: 16}
        - {model: {width: 96}, batch_size: 32, label: wide}
    seeds: [0, 1]
    exclude: [{lr_scale: 2, size: 48x3}]             # cells left out; a list of values means any of them
    holdout: {budgets: [6e11], cells: [{width: 48}]} # cells kept out of the fit and forecast
    execution: {mesh: {data: 2}}        # ExecutionConfig
    fit: {flops: exact}                 # FitConfig

Later sections win over earlier ones, value by value: recipe, base, isoflop, axes in the order of the file, seeds. What
the grid writes wins over what the recipe proposes. Cells are named in ``exclude`` and ``holdout`` by their labels
(``budget_flops``, ``size``, ``width``, the axes' last path component) or by any path into the run (``model.d_ff``).

A size is one dial, ``model.width`` or ``model.params`` (non-embedding; the nearest width on the rule), or the shape in
full. A number among ``sizes`` is a width. The rule, ``shape_of_width``: width d a multiple of 8;
num_layers = max(2, round(.43 √d)); head_dim the largest power of two that divides d, is at most 128 and at most √(8d);
num_heads = d / head_dim; d_ff = 4d (SwiGLU: 8d/3 to the nearest multiple of 8). So 16×2, 24×2, 32×2, 40×3, 48×3,
64×3, 80×4, 96×4, …, 768×12, 4096×28. Any of these may be given beside the dial and then wins.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import reprlib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from scaling import accounting, config
from scaling.config import ExecutionConfig, FlopRule, ModelConfig, ParamCount, RunConfig
from scaling.recipes import RECIPES

MAX_CELLS = 100_000
HORIZONS = ("tokens", "flops", "tokens_per_param", "steps")
DIALS = ("width", "params", "d_model")
# Columns of the records' table that an axis may not take the name of.
RESERVED_LABELS = ("run_id", "status", "holdout", "recipe", "budget_flops", "label")


class GridError(ValueError):
    """A grid that cannot be expanded; the text is one line with file, key, value and what to write instead."""


@dataclass(frozen=True)
class FitConfig:
    """How the sweep's records are fitted: the same options as ``python -m scaling.fit``."""

    num_params: ParamCount = "non_embedding"
    flops: FlopRule = "exact"
    loss: Literal["huber", "lad", "squared"] = "huber"
    delta: float | None = 1e-3
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self):
        if self.delta is not None and not (math.isfinite(self.delta) and self.delta > 0):
            raise ValueError(f"delta is {self.delta!r}: write a positive number")
        if self.bootstrap < 0:
            raise ValueError(f"bootstrap is {self.bootstrap!r}: write an integer ≥ 0")


@dataclass(frozen=True)
class Cell:
    """One run of a grid and its place in it. ``labels`` are the grid's coordinates (budget_flops, size, axes …)."""

    run: RunConfig
    holdout: bool = False
    recipe: str | None = None
    labels: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A grid file, expanded."""

    name: str  # the file's stem; results/<name>/
    text: str  # the file as it was, for the report
    cells: list[Cell]
    execution: ExecutionConfig
    fit: FitConfig


def load(path) -> Grid:
    """Reads and expands a grid file.

    Raises GridError, in one line with the file, the key's path, the value and what to write instead.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in sorted(path.parent.glob("*.y*ml"))]
        raise GridError(f"{path}: no such grid file{_hint(str(path), siblings)}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise GridError(f"{path}: not a readable text file ({e}): write the path of a YAML grid") from None
    try:
        return expand(read_yaml(text), name=path.stem, text=text)
    except GridError as e:
        raise GridError(f"{path}: {e}") from None


def expand(raw: Any, *, name: str, text: str = "") -> Grid:
    """A grid from the plain dicts and lists of its file. Pure. Raises GridError."""
    sections = _mapping(raw, "", SECTIONS)
    layers = [_layers_of_recipe_and_base(sections)]
    if "isoflop" in sections:
        layers.append(_isoflop_layers(sections["isoflop"]))
    axes = _nonempty(sections.get("axes", {}), "axes", dict) if "axes" in sections else {}
    layers += [_axis_layers(axis, entries) for axis, entries in axes.items()]
    _refuse_shared_leaves(layers[1:])
    if "seeds" in sections:
        layers.append(_seed_layers(sections["seeds"]))
    count = math.prod(len(choices) for choices in layers)
    if count > MAX_CELLS:
        raise GridError(f"axes: {count} cells: write at most {MAX_CELLS}, in several grids if need be")
    cells = [_cell(choice) for choice in itertools.product(*layers)]
    for i, selector in enumerate(_entries(sections, "exclude")):
        matches = _select(cells, selector, f"exclude[{i}]")
        cells = [cell for cell, out in zip(cells, matches) if not out]
    cells = _hold_out(cells, sections.get("holdout"))
    _refuse_duplicates(cells)
    return Grid(
        name=name,
        text=text,
        cells=cells,
        execution=_section(ExecutionConfig, sections, "execution"),
        fit=_section(FitConfig, sections, "fit"),
    )


# ---- sizes ----------------------------------------------------------------------------------------------------------


def shape_of_width(width: int, activation: str = "gelu") -> dict[str, int]:
    """The fields of ModelConfig that follow from a width alone; the rule is in the module's docstring."""
    head_dim = 8
    while head_dim < 128 and width % (2 * head_dim) == 0 and (2 * head_dim) ** 2 <= 8 * width:
        head_dim *= 2
    return {
        "d_model": width,
        "num_layers": max(2, round(0.43 * math.sqrt(width))),
        "num_heads": width // head_dim,
        "head_dim": head_dim,
        "d_ff": max(8, 8 * round(width / 3)) if activation == "swiglu" else 4 * width,
    }


# Steps that keep wide models a multiple of 64.
WIDTHS = (*range(8, 64, 8), *range(64, 256, 16), *range(256, 65536 + 1, 64))


def _model_fields(given: dict[str, Any]) -> dict[str, Any]:
    """``given``, the model as the grid writes it, with its dial replaced by the shape that follows from it."""
    given = dict(given)
    target, width = given.pop("params", None), given.pop("width", None)
    if target is not None:
        return _nearest(float(target), tuple(sorted(given.items())))
    if width is not None:
        if width < 8 or width % 8:
            raise ValueError(f"width is {width}: write a positive multiple of 8, or the shape in full")
        shape = shape_of_width(width, given.get("activation", "gelu"))
        if ("num_heads" in given) != ("head_dim" in given):
            one, other = ("num_heads", "head_dim") if "num_heads" in given else ("head_dim", "num_heads")
            if given[one] < 1 or width % given[one]:
                raise ValueError(f"{one} is {given[one]}: write a divisor of the width ({width}), or {other} too")
            shape[other] = width // given[one]
        given = shape | given
    if "num_heads" in given:
        given.setdefault("num_kv_heads", given["num_heads"])
    return given


@functools.lru_cache(maxsize=4096)
def _nearest(target: float, given: tuple) -> dict[str, Any]:
    """The shape on the rule whose non-embedding parameters are nearest to ``target``, by ratio."""

    def ratio(width: int) -> float:
        model = config.parse(ModelConfig, _model_fields({**dict(given), "width": width}))
        return math.log(accounting.param_counts(model)["non_embedding"] / target)

    lo, hi = 0, len(WIDTHS) - 1
    while hi - lo > 1:
        middle = (lo + hi) // 2
        lo, hi = (lo, middle) if ratio(WIDTHS[middle]) > 0 else (middle, hi)
    best = min((WIDTHS[lo], WIDTHS[hi]), key=lambda width: abs(ratio(width)))
    if abs(ratio(best)) > math.log(2):
        least, most = (target * math.exp(ratio(WIDTHS[i])) for i in (0, -1))
        raise ValueError(f"params is {target:g}: write a number from {least:.3g} to {most:.3g}, or the shape in full")
    return _model_fields({**dict(given), "width": best})


# ---- checking: raw YAML → {path into the run: (value, path in the file)} ------------------------------------------------

Leaves = dict[tuple[str, ...], tuple[Any, str]]
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def _schema(cls: type) -> dict:
    """Field names → type hints, nested for fields that are dataclasses."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: _schema(hints[f.name]) if dataclasses.is_dataclass(hints[f.name]) else hints[f.name]
        for f in dataclasses.fields(cls)
    }


RECIPE_SCHEMA = {"name": Literal[(*RECIPES, "none")], "lr_scale": float, "batch_scale": float}
MODEL_SCHEMA = {"width": int, "params": float, **_schema(ModelConfig)}
RUN_SCHEMA = {**_schema(RunConfig), "model": MODEL_SCHEMA, "recipe": RECIPE_SCHEMA}
SECTIONS = ("recipe", "base", "isoflop", "axes", "seeds", "exclude", "holdout", "execution", "fit")


def _join(path: str, key: Any) -> str:
    text = key if isinstance(key, str) and key.replace(".", "").isidentifier() else _short.repr(key)
    return f"{path}.{text}" if path else text


def _hint(wrong: Any, options) -> str:
    close = difflib.get_close_matches(str(wrong), options, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _paths(schema: dict, prefix: str = "") -> list[str]:
    """Every dotted path of a schema, inner nodes included."""
    nested = [_paths(hint, f"{prefix}{key}.") if isinstance(hint, dict) else [] for key, hint in schema.items()]
    return [f"{prefix}{key}" for key in schema] + [path for paths in nested for path in paths]


def _unknown(key: Any, path: str, schema) -> GridError:
    """The error for a key that is not in ``schema``, pointing to where it belongs if it is one level deeper."""
    deeper = [p for p in _paths(schema) if p.endswith(f".{key}")] if isinstance(schema, dict) else []
    hint = f"; did you mean {deeper[0]!r}?" if deeper else _hint(key, schema)
    return GridError(f"{_join(path, key)}: unknown key{hint or '; write one of ' + ', '.join(schema)}")


def _mapping(raw: Any, path: str, allowed=None) -> dict:
    if not isinstance(raw, dict):
        raise GridError(f"{path or 'grid'}: {_short.repr(raw)} is not a mapping; write `key: value` lines")
    for key in raw:
        if not isinstance(key, str) or (allowed is not None and key not in allowed):
            raise _unknown(key, path, allowed or {})
    return raw


def _nonempty(raw: Any, path: str, kind: type = list):
    if not isinstance(raw, kind) or not raw:
        want = "a list" if kind is list else "a mapping"
        raise GridError(f"{path}: {_short.repr(raw)} is not {want} with at least one entry")
    return raw


def _leaf(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the type ``hint`` asks for: whole floats become ints, ints become floats, nothing else changes."""
    options = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and type(None) in options:
        return None
    hint = options[0]
    shown = _short.repr(value)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices or isinstance(value, bool):
            raise GridError(f"{path}: {shown} is not one of {', '.join(choices)}{_hint(value, choices)}")
        return value
    if hint in (int, float):
        kind = "an integer" if hint is int else "a number"
        if isinstance(value, str) and _is_number(value):
            raise GridError(f"{path}: {shown} is text, not {kind}; write {value.strip()} without quotes")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GridError(f"{path}: {shown} is not {kind}; write e.g. {64 if hint is int else 0.01}")
        if not math.isfinite(value) or abs(value) > 1e300:
            raise GridError(f"{path}: {shown} is not finite; write {kind}")
        if hint is int and value != int(value):
            raise GridError(f"{path}: {shown} is not an integer; write e.g. {round(value)}")
        return hint(value)
    if not isinstance(value, hint):
        kind = {str: "text", bool: "true or false"}[hint]
        raise GridError(f"{path}: {shown} is not {kind}; write {'true or false' if hint is bool else 'it in quotes'}")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _flatten(raw: Any, schema: Any, path: str, key: tuple[str, ...] = ()) -> Leaves:
    """The leaves of a partial config, checked: unknown keys and wrong types are errors at their path in the file."""
    if key == ("recipe",) and not isinstance(raw, dict):
        raw = {"name": "none" if raw is None else raw}
    if not isinstance(schema, dict):
        return {key: (_leaf(raw, schema, path), path)}
    leaves: Leaves = {}
    for name, value in _mapping(raw, path, schema).items():
        leaves |= _flatten(value, schema[name], _join(path, name), (*key, name))
    return leaves


def _nest(leaves: dict[tuple[str, ...], Any]) -> dict:
    out: dict = {}
    for key, value in leaves.items():
        inner = out
        for name in key[:-1]:
            inner = inner.setdefault(name, {})
        inner[key[-1]] = value
    return out


def _section(cls: type, sections: dict, name: str) -> Any:
    leaves = _flatten(sections.get(name, {}), _schema(cls), name)
    return _parse(cls, {key: value for key, (value, _) in leaves.items()}, leaves, name)


def _parse(cls: type, values: dict[tuple[str, ...], Any], leaves: Leaves, where: str, prefix: tuple = ()) -> Any:
    """``config.parse`` on flat values; its first error as a GridError that names the place in the file."""
    import pydantic

    try:
        return config.parse(cls, _nest(values))
    except pydantic.ValidationError as e:
        error = e.errors(include_url=False)[0]
    loc = tuple(str(part) for part in error["loc"])
    if error["type"] == "missing":
        key, message = (*prefix, *loc), "missing: write it here, or under base"
    else:
        message = error["msg"].removeprefix("Value error, ")
        key = (*prefix, *loc, message.split(" is ")[0])
    if key in leaves:
        path = leaves[key][1]
        message = message.removeprefix(f"{key[-1]} is ") if error["type"] != "missing" else message
    else:  # beside a sibling that the file does have, so that the reader lands in the right block
        sibling = next((path for other, (_, path) in leaves.items() if other[:-1] == key[:-1]), None)
        path = f"{sibling.rpartition('.')[0]}.{key[-1]}" if sibling else f"{where}: {'.'.join(key)}"
    raise GridError(f"{path}: {message}")


# ---- layers: each section of the file contributes a choice of partial runs ------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One entry of a section: the part of a run that it sets, and the coordinates that name it."""

    leaves: Leaves
    labels: dict = field(default_factory=dict)


def _layers_of_recipe_and_base(sections: dict) -> list[_Layer]:
    leaves = {("recipe", "name"): ("default@1", "recipe")}
    if "recipe" in sections:
        leaves |= _flatten(sections["recipe"], RECIPE_SCHEMA, "recipe", ("recipe",))
    return [_Layer(leaves | _flatten(sections.get("base", {}), RUN_SCHEMA, "base"))]


def _isoflop_layers(raw: Any) -> list[_Layer]:
    """Budgets × sizes: each cell's horizon is its budget under the rule."""
    _mapping(raw, "isoflop", ("rule", "budgets", "sizes"))
    rule = _leaf(raw.get("rule", "exact"), FlopRule, "isoflop.rule")
    layers = []
    for i, budget in enumerate(_nonempty(raw.get("budgets"), "isoflop.budgets")):
        path, sizes, sizes_path = f"isoflop.budgets[{i}]", raw.get("sizes"), "isoflop.sizes"
        flops_path = path
        if isinstance(budget, dict):
            _mapping(budget, path, ("flops", "sizes"))
            flops_path = f"{path}.flops"
            if "sizes" in budget:
                sizes, sizes_path = budget["sizes"], f"{path}.sizes"
            budget = budget.get("flops")
        flops = _leaf(budget, float, flops_path)
        horizon = {("horizon", "flops"): (flops, flops_path), ("horizon", "rule"): (rule, "isoflop.rule")}
        for j, size in enumerate(_nonempty(sizes, sizes_path)):
            raw_size = size if isinstance(size, dict) else {"width": size}
            size_path = f"{sizes_path}[{j}]"
            leaves = _flatten(raw_size, MODEL_SCHEMA, size_path, ("model",))
            if not isinstance(size, dict):
                leaves = {("model", "width"): (leaves["model", "width"][0], size_path)}
            layers.append(_Layer(horizon | leaves, {"budget_flops": flops}))
    return layers


def _axis_layers(axis: Any, entries: Any) -> list[_Layer]:
    """A path into the run with a list of values, or a name with a list of partial runs whose keys move together."""
    path = _join("axes", axis)
    label = str(axis).rpartition(".")[2]
    if not isinstance(axis, str) or label in RESERVED_LABELS:
        raise GridError(f"{path}: not a name an axis can have; write another")
    layers = []
    for i, entry in enumerate(_nonempty(entries, path)):
        where = f"{path}[{i}]"
        if isinstance(entry, dict):
            entry = dict(entry)
            given = _leaf(entry.pop("label"), str, f"{where}.label") if "label" in entry else None
            leaves = _flatten(_nonempty(entry, where, dict), RUN_SCHEMA, where)
            value = given or ",".join(f"{key[-1]}={value}" for key, (value, _) in leaves.items())
        else:
            key, hint = tuple(axis.split(".")), RUN_SCHEMA
            for name in key:
                hint = hint.get(name) if isinstance(hint, dict) else None
            if hint is None or (isinstance(hint, dict) and key != ("recipe",)):
                raise GridError(
                    f"{path}: unknown path into a run{_hint(axis, _paths(RUN_SCHEMA))}; an axis of plain values is named "
                    "by one, e.g. model.width"
                )
            leaves = _flatten(entry, hint, where, key)
            value = next(iter(leaves.values()))[0]
        layers.append(_Layer(leaves, {label: value}))
    return layers


def _seed_layers(raw: Any) -> list[_Layer]:
    seeds = [(_leaf(seed, int, f"seeds[{i}]"), f"seeds[{i}]") for i, seed in enumerate(_nonempty(raw, "seeds"))]
    return [_Layer({("seed",): leaf}) for leaf in seeds]


def _refuse_shared_leaves(sections: list[list[_Layer]]) -> None:
    """Two axes that set the same value would silently undo each other."""
    owner: dict[tuple[str, ...], str] = {}
    labels: set[str] = set()
    for layers in sections:
        mine = {key: path for layer in layers for key, (_, path) in layer.leaves.items()}
        for key, path in mine.items():
            if key in owner:
                raise GridError(f"{path}: {'.'.join(key)} is set by {owner[key]} too; write it in one of them")
        owner |= mine
        names = set(layers[0].labels)
        if names & labels:
            raise GridError(f"axes: two axes would be called {names & labels}; name one by a group, not a path")
        labels |= names


# ---- cells ----------------------------------------------------------------------------------------------------------


def _cell(layers: tuple[_Layer, ...]) -> Cell:
    """Merges the layers, expands the size, asks the recipe for what the grid leaves open, and counts."""
    leaves: Leaves = {}
    labels: dict = {}
    for layer in layers:
        leaves |= layer.leaves
        labels |= layer.labels
    try:
        return _resolve(leaves, labels)
    except OverflowError:
        where = next(iter(layers[-1].leaves.values()))[1]
        raise GridError(f"{where}: the numbers of this cell overflow; write smaller ones") from None


def _one_of(leaves: Leaves, group: str, names: tuple[str, ...], where: str) -> str:
    given = [name for name in names if leaves.get((group, name), (None,))[0] is not None]
    if not given:
        raise GridError(f"{where}: {group} is missing; write one of {', '.join(f'{group}.{name}' for name in names)}")
    if len(given) > 1:
        first, second = (leaves[group, name] for name in given[:2])
        raise GridError(
            f"{second[1]}: {_short.repr(second[0])} is a second {group} beside {first[1]} = {_short.repr(first[0])}; "
            "write one of them"
        )
    return given[0]


def _resolve(leaves: Leaves, labels: dict) -> Cell:
    where = f"cell {labels}" if labels else "base"
    dial = _one_of(leaves, "model", DIALS, where)
    horizon = _one_of(leaves, "horizon", HORIZONS, where)
    values = {key: value for key, (value, _) in leaves.items()}
    recipe = {key[1]: values.pop(key) for key in list(values) if key[0] == "recipe"}

    if values.get(("data", "tokenizer"), "bytes") != "bytes" and ("model", "vocab_size") not in values:
        raise GridError(f"{where}: model.vocab_size is missing; only bytes' 256 follows from the tokenizer")
    values, model = _expand_size(values, leaves, leaves["model", dial][1], where)
    if recipe["name"] != "none":
        values |= _ask_recipe(recipe, model, values, leaves, horizon)
    run = _parse(RunConfig, values, leaves, where)
    try:
        accounting.plan(run)
    except ValueError as e:
        raise GridError(f"{leaves['horizon', horizon][1]}: {e}") from None

    labels = labels | {"size": f"{model.d_model}x{model.num_layers}"}
    if dial == "params":
        labels["target_params"] = leaves["model", "params"][0]
    labels |= {name: recipe[name] for name in ("lr_scale", "batch_scale") if name in recipe}
    return Cell(run=run, recipe=None if recipe["name"] == "none" else recipe["name"], labels=labels)


def _expand_size(values: dict, leaves: Leaves, dial_path: str, where: str) -> tuple[dict, ModelConfig]:
    given = {key[1]: value for key, value in values.items() if key[0] == "model"}
    try:
        fields = _model_fields(given)
    except ValueError as e:
        # pydantic's error is a ValueError of several lines: the size search met a model that cannot be
        raise GridError(f"{dial_path}: {str(e).splitlines()[0]}") from None
    values = {key: value for key, value in values.items() if key[0] != "model"}
    flat = {("model", name): value for name, value in fields.items()}
    model = _parse(ModelConfig, {key[1:]: value for key, value in flat.items()}, leaves, where, ("model",))
    return values | flat, model


def _ask_recipe(recipe: dict, model: ModelConfig, values: dict, leaves: Leaves, horizon: str) -> dict:
    """The recipe's values for what the grid leaves open: {path into the run: value}."""
    for scale, target in (("lr_scale", ("optim", "peak_lr")), ("batch_scale", ("batch_size",))):
        if scale in recipe and recipe[scale] <= 0:
            raise GridError(f"{leaves['recipe', scale][1]}: {recipe[scale]!r} is not positive; write e.g. 0.5")
        if scale in recipe and target in values:
            raise GridError(
                f"{leaves['recipe', scale][1]}: has no effect beside {leaves[target][1]}; write one of them"
            )
    batch_size = values.get(("batch_size",))
    if horizon == "steps" and batch_size is None:
        raise GridError(
            f"{leaves['horizon', 'steps'][1]}: steps need a batch_size, because the recipe's batch depends on the tokens; "
            "write batch_size, or tokens instead of steps"
        )
    data = _parse(config.DataConfig, {k[1:]: v for k, v in values.items() if k[0] == "data"}, leaves, "data", ("data",))
    of_run = {k[1:]: v for k, v in values.items() if k[0] == "horizon"}
    num_tokens = accounting.requested_tokens(
        model, data.seq_len, batch_size or 1, _parse(config.Horizon, of_run, leaves, "horizon", ("horizon",))
    )
    proposed = RECIPES[recipe["name"]](model, num_tokens, data.seq_len)
    if batch_size is None:
        batch_size = max(1, round(proposed.batch_tokens * recipe.get("batch_scale", 1.0) / data.seq_len))
    batch_tokens = batch_size * data.seq_len
    filled = {
        # Six digits: pow differs in the last bit between C libraries, and run_id must not.
        ("optim", "peak_lr"): float(f"{proposed.peak_lr * recipe.get('lr_scale', 1.0):.6g}"),
        # Whole steps, rounded down: a tenth of the run stays at most a tenth.
        ("optim", "warmup_tokens"): proposed.warmup_tokens // batch_tokens * batch_tokens,
        ("optim", "beta2"): proposed.beta2,
        ("optim", "weight_decay"): proposed.weight_decay,
        ("batch_size",): batch_size,
    }
    return {key: value for key, value in filled.items() if key not in values}


def _entries(section: dict, name: str, path: str = "") -> list:
    return _nonempty(section[name], f"{path}{name}") if name in section else []


def _hold_out(cells: list[Cell], raw: Any) -> list[Cell]:
    if raw is None:
        return cells
    section = _mapping(raw, "holdout", ("budgets", "cells"))
    held = [False] * len(cells)
    selectors = [
        ({"budget_flops": budget}, f"holdout.budgets[{i}]")
        for i, budget in enumerate(_entries(section, "budgets", "holdout."))
    ]
    selectors += [(cell, f"holdout.cells[{i}]") for i, cell in enumerate(_entries(section, "cells", "holdout."))]
    for selector, path in selectors:
        held = [a or b for a, b in zip(held, _select(cells, selector, path))]
    if all(held):
        raise GridError("holdout: keeps every cell out; leave some to fit")
    return [dataclasses.replace(cell, holdout=out) for cell, out in zip(cells, held)]


def _select(cells: list[Cell], selector: Any, path: str) -> list[bool]:
    """Which cells match every entry of a selector. Raises GridError when none does."""
    wanted = {}
    for key, value in _nonempty(selector, path, dict).items():
        wanted[key] = value if isinstance(value, list) else [value]
    chosen = [all(_coordinate(cell, key, path) in values for key, values in wanted.items()) for cell in cells]
    if not any(chosen):
        have = {key: list(dict.fromkeys(_coordinate(cell, key, path) for cell in cells))[:12] for key in wanted}
        raise GridError(f"{path}: {_short.repr(selector)} matches no cell; these have {have}")
    return chosen


def _coordinate(cell: Cell, key: Any, path: str) -> Any:
    """A cell's label, or the value at a path into its run."""
    if key in cell.labels:
        return cell.labels[key]
    node: Any = cell.run
    for name in ("model.d_model" if key == "width" else str(key)).split("."):
        if not dataclasses.is_dataclass(node) or name not in {f.name for f in dataclasses.fields(node)}:
            options = [*cell.labels, "width", *_paths(_schema(RunConfig))]
            raise GridError(f"{_join(path, key)}: no cell has it{_hint(key, options)}; write one of {[*cell.labels]}")
        node = getattr(node, name)
    return node


def _refuse_duplicates(cells: list[Cell]) -> None:
    first: dict[str, int] = {}
    for i, cell in enumerate(cells):
        j = first.setdefault(cell.run.run_id, i)
        if j != i:
            raise GridError(
                f"cells {j} and {i} are the same run {cell.run.run_id}: {cells[j].labels} and {cell.labels}; "
                "write it once, or exclude one"
            )
    if not cells:
        raise GridError("exclude: leaves no cell; remove an entry")


# ---- YAML -----------------------------------------------------------------------------------------------------------


@functools.cache
def _loader() -> type:
    """A safe loader that reads scalars as YAML 1.2 does.

    PyYAML's own YAML 1.1 takes 1e17 and 3e-3 for text, 1:30 for ninety, 010 for eight and `no` for false. Duplicate
    keys, of which it keeps the last, are errors here. No tag makes a Python object.
    """
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: typing.ClassVar[dict] = {}
        yaml_constructors: typing.ClassVar[dict] = {
            tag: yaml.SafeLoader.yaml_constructors[tag]
            for tag in (*(f"tag:yaml.org,2002:{t}" for t in ("null", "bool", "str", "seq", "map")), None)
        }

        def compose_mapping_node(self, anchor):
            node = super().compose_mapping_node(anchor)
            seen: dict[str, Any] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, key) is not key:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is here twice", problem_mark=key.start_mark)
            return node

    def number(kind):
        return lambda loader, node: kind(loader.construct_scalar(node).replace("_", ""))

    digits = r"[0-9](?:_?[0-9])*"
    resolvers = {
        "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        "int": (rf"[-+]?{digits}", list("-+0123456789")),
        "float": (
            rf"[-+]?(?:{digits}\.?(?:{digits})?|\.{digits})(?:[eE][-+]?[0-9]+)?",
            list("-+.0123456789"),
        ),
        "merge": ("<<", ["<"]),
    }
    for name, (pattern, first) in resolvers.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", number(int))
    Loader.add_constructor("tag:yaml.org,2002:float", number(float))
    return Loader


def read_yaml(text: str) -> Any:
    """The plain dicts and lists of a YAML text. Raises GridError with line and column."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise GridError(
            f"{at}not valid YAML: {' '.join(str(e.problem or e.context).split())}; mend that line"
        ) from None
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as e:
        raise GridError(f"not valid YAML: {' '.join(str(e).split())[:200]}; mend that text") from None
