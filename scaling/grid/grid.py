r"""A grid file → a list of cells.

A grid file:

    recipe: default@2                   # or {name: default@2, lr_scale: 2, batch_scale: 0.5}, or none
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
    hardware: {name: h100, devices: 8}  # HardwareConfig: what the plan counts time, money and energy on
    fit: {flops: exact, by: shape}      # FitConfig; by: a law of its own for each value of that axis; compare: shape
                                        # the same, and how much compute each saves over the others
    design: {target: a, interval: .08, budget_flops: 8e13}   # in rounds, those cells that narrow a (``designed``)

Later sections win over earlier ones, value by value: recipe, base, isoflop, axes in the order of the file, seeds. What
the grid writes wins over what the recipe proposes. Cells are named in ``exclude`` and ``holdout`` by their labels
(``budget_flops``, ``size``, ``width``, the axes' last path component) or by any path into the run (``model.d_ff``).

A cell may start from another's weights: ``start: {run: {stage: pretrain}}`` in an entry of an axis ``stage`` names it
by coordinates, as a selector does; ``step: 500`` takes those of that step instead of the last, and ``take:
params+optimizer`` the optimiser's moments too. Which of several cells is meant, see ``starts``.

A horizon is one of ``tokens``, ``flops``, ``tokens_per_param``, ``steps`` and ``epochs``: these of prepared data alone,
whose tokens the run then says.

A size is one dial, ``model.width`` or ``model.params`` (non-embedding; the nearest width), from which the shape follows
by its family's rule (``families``), or it is given in full. A number among ``sizes`` is a width. Any value that the
rule decides may be given beside the dial and then wins.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scaling import accounting, fields, objectives
from scaling.config import DataConfig, Horizon, ParamCount, RunConfig
from scaling.execution import ExecutionConfig, HardwareConfig
from scaling.families import FAMILIES, ModelConfig
from scaling.families.counting import RULES
from scaling.grid import designed, sizes, starts, strict
from scaling.grid.cell import Cell, called, coordinate, select
from scaling.grid.choices import Entry, of
from scaling.grid.designed import DesignConfig
from scaling.grid.recipes import RECIPES
from scaling.grid.strict import GridError, Leaves, shown
from scaling.numbers import check_resamples
from scaling.objectives import OBJECTIVES, ObjectiveConfig

MAX_CELLS = 100_000
SECTIONS = (
    "recipe", "base", "isoflop", "axes", "seeds", "exclude", "holdout", "execution", "hardware", "fit", "design",
)  # fmt: skip
HORIZONS = ("tokens", "flops", "tokens_per_param", "steps", "epochs")
# How many tokens an epoch of some data has, None where they are not prepared (``data.epochs_of``).
EpochTokens = Callable[[DataConfig], int | None]
DIALS = ("width", "params", "d_model")


@dataclass(frozen=True)
class FitConfig:
    """How the sweep's records are fitted: options of ``python -m scaling.fit`` (no asymmetric loss), its defaults.

    ``delta`` null takes Huber's δ from the residuals (``solver.DEFAULT_DELTA``); 1e-3 is the field's habit. ``noise``
    ``measured`` weighs cells by 1/σ², σ as their repeats with other seeds say it (``run_noise.measure``). ``by``
    names a coordinate of the cells, a label or a path into the run: those that agree in it have laws, a forecast and a
    report of their own (``Grid.groups``). Other data, or another optimiser, are not points of one law. ``compare`` does
    as ``by`` does and says besides what each group is worth against the others (``scaling.compare``).
    """

    num_params: ParamCount = "non_embedding"
    flops: str = "exact"
    loss: Literal["huber", "lad", "squared", "tukey"] = "huber"
    delta: float | None = None
    noise: Literal["constant", "measured"] = "constant"
    bootstrap: int = 1000
    seed: int = 0
    laws: tuple[str, ...] | None = None  # as --law of scaling.fit; null: its default
    by: str | None = None
    compare: str | None = None

    def __post_init__(self) -> None:
        if self.flops not in RULES:
            raise ValueError(f"flops is {self.flops!r}: write one of {', '.join(RULES)}")
        if self.delta is not None and not (math.isfinite(self.delta) and self.delta > 0):
            raise ValueError(f"delta is {self.delta!r}: write a positive number")
        check_resamples("bootstrap", self.bootstrap)
        if self.compare is not None and self.by not in (None, self.compare):
            raise ValueError(f"compare is {self.compare!r} beside by {self.by!r}: write one, or the same for both")

    @property
    def options(self) -> dict[str, Any]:
        """Those of ``fit.analyse``: all but what tells groups apart, and ``laws`` where they are named."""
        asked = {k: v for k, v in vars(self).items() if k not in ("by", "compare")}
        return asked if self.laws is not None else {k: v for k, v in asked.items() if k != "laws"}

    @property
    def told_by(self) -> tuple[str, str] | None:
        """The coordinate that tells groups apart, and the key that names it; None where all runs are of one law."""
        if self.compare is not None:
            return self.compare, "fit.compare"
        return None if self.by is None else (self.by, "fit.by")


@dataclass(frozen=True)
class Grid:
    """A grid file, expanded."""

    name: str  # the file's stem; results/<name>/
    text: str  # the file as it was, for the report
    cells: list[Cell]
    execution: ExecutionConfig
    fit: FitConfig
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    # run_ids by "<fit.by>=<value>" (or fit.compare's), the folder of their laws in the results; empty where all runs
    # are of one law
    groups: dict[str, list[str]] = field(default_factory=dict)
    design: DesignConfig | None = None  # cells that are not held out are candidates, bought in rounds


def load(path: str | Path, epoch_tokens: EpochTokens = lambda data: None) -> Grid:
    """Reads and expands a grid file; ``epoch_tokens`` knows the data that its ``horizon.epochs`` are of.

    Raises GridError, in one line with the file, the key's path, the value and what to write instead.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in sorted(path.parent.glob("*.y*ml"))]
        raise GridError(f"{path}: no such grid file{strict.did_you_mean(path, siblings)}") from None
    except (OSError, ValueError) as e:  # a folder, no permission, not UTF-8
        raise GridError(f"{shown(str(path))}: not a readable text file ({e}); write the path of a YAML grid") from None
    try:
        return expand(strict.read_yaml(text), name=path.stem, text=text, epoch_tokens=epoch_tokens)
    except GridError as e:
        raise GridError(f"{path}: {e}") from None


def expand(raw: Any, *, name: str, text: str = "", epoch_tokens: EpochTokens = lambda data: None) -> Grid:
    """A grid from the plain dicts and lists of its file; pure if ``epoch_tokens`` is. Raises GridError."""
    sections = strict.mapping(raw, "", SECTIONS)
    choices = of(sections)
    count = math.prod(map(len, choices))
    if count > MAX_CELLS:
        raise GridError(f"axes: {count} cells; write at most {MAX_CELLS}, in several grids if need be")
    drafts = [_cell(choice, epoch_tokens) for choice in itertools.product(*choices)]
    drafts = list(itertools.compress(drafts, _kept([cell for cell, _ in drafts], sections)))
    cells = starts.resolve([cell for cell, _ in drafts], [start for _, start in drafts])
    _refuse_duplicates(cells)
    execution = _settings(ExecutionConfig, sections, "execution")
    _refuse_parts(cells, execution)
    cells, fit = _hold_out(cells, sections), _settings(FitConfig, sections, "fit")
    starts.require_before(cells)
    return Grid(
        name=name,
        text=text,
        cells=cells,
        execution=execution,
        fit=fit,
        hardware=_settings(HardwareConfig, sections, "hardware"),
        groups={} if fit.told_by is None else _groups(cells, *fit.told_by),
        design=designed.read(sections, cells, fit.told_by),
    )


def _settings(cls: type, sections: dict[str, Any], name: str) -> Any:
    leaves = strict.flatten(sections.get(name, {}), strict.schema_of(cls), name)
    return strict.build(cls, {key: value for key, (value, _) in leaves.items()}, leaves, name)


# ---- cells ----------------------------------------------------------------------------------------------------------


def _cell(chosen: tuple[Entry, ...], epoch_tokens: EpochTokens) -> tuple[Cell, Leaves]:
    """Merges one choice of entries into a run without its start, and what is said of that (``starts``)."""
    leaves: Leaves = {}
    labels: dict[str, Any] = {}
    for entry in chosen:
        leaves |= entry.leaves
        labels |= entry.labels
    try:
        start = {key: entry for key, entry in leaves.items() if key[0] == "start"}
        here = {key: entry for key, entry in leaves.items() if key not in start}
        return _resolve(here, labels, epoch_tokens), start
    except OverflowError:
        raise GridError(f"{called(labels)}: its numbers overflow; write smaller ones") from None


def _resolve(leaves: Leaves, labels: dict[str, Any], epoch_tokens: EpochTokens) -> Cell:
    """Expands the size, asks the recipe for what the grid leaves open, checks and counts."""
    where = called(labels)
    dial = _only(leaves, "model", DIALS, where)
    horizon = _only(leaves, "horizon", HORIZONS, where)
    values = {key: value for key, (value, _) in leaves.items() if key[0] != "recipe"}
    recipe = {key[1]: value for key, (value, _) in leaves.items() if key[0] == "recipe"}

    family = FAMILIES[values.get(("model", "family"), "transformer")]
    strict.require_known("model", family.Config, leaves, f"family {family.Config.family}", ("width", "params"))  # type: ignore[misc, unused-ignore]  # has a default, which older mypy knows
    objective = OBJECTIVES[values.get(("objective", "name"), "next_token")]
    strict.require_known("objective", objective.Config, leaves, f"objective {objective.Config.name}")  # type: ignore[misc, unused-ignore]  # likewise
    if ("model", "vocab_size") not in values:
        values |= _vocab_of(values, leaves, where)
    _require_nested(family.Config, values, leaves, where)
    try:
        shape = sizes.model_fields(_part(values, "model"))
    except ValueError as e:
        raise GridError(f"{leaves['model', dial][1]}: {e}") from None
    for name in ("width", "params"):
        values.pop(("model", name), None)
    values |= {("model", name): value for name, value in shape.items() if not isinstance(value, dict)}
    if horizon == "epochs":
        values["horizon", "tokens"] = _tokens_of_epochs(values, leaves, where, epoch_tokens)
        labels.setdefault("epochs", values.pop(("horizon", "epochs")))
    if recipe["name"] != "none":
        values |= _ask_recipe(recipe, values, leaves, where)
    run = strict.build(RunConfig, values, leaves, where)
    path = leaves["horizon", horizon][1]
    try:
        num_steps = accounting.plan(run).num_steps
    except ValueError as e:
        raise GridError(f"{path}: {e}") from None
    if num_steps >= 2**31:
        raise GridError(f"{path}: {num_steps:.3g} steps do not fit the step counter; write a shorter horizon")

    labels = labels | {"size": f"{run.model.d_model}x{run.model.num_layers}"}
    if dial == "params" and "params" not in labels:
        labels["target_params"] = leaves["model", "params"][0]
    labels |= {name: recipe[name] for name in ("lr_scale", "batch_scale") if name in recipe}
    return Cell(run=run, recipe=None if recipe["name"] == "none" else recipe["name"], labels=labels)


def _require_nested(model: type, values: dict[tuple[str, ...], Any], leaves: Leaves, where: str) -> None:
    """Raises GridError for a config inside the model's that is not whole, before sizes are counted with it."""
    inner_configs = fields.configs_in(model)
    for name in {key[1] for key in values if key[0] == "model" and len(key) > 2}:
        inner = {key[2:]: value for key, value in values.items() if key[:2] == ("model", name)}
        strict.build(inner_configs[name], inner, leaves, where, ("model", name))


def _tokens_of_epochs(values: dict[tuple[str, ...], Any], leaves: Leaves, where: str, known: EpochTokens) -> float:
    """The tokens that so many epochs of the cell's data have. Raises GridError where nobody knows yet."""
    epochs, path = leaves["horizon", "epochs"]
    data = strict.build(DataConfig, {(k,): v for k, v in _part(values, "data").items()}, leaves, where, ("data",))
    if data.source.startswith("synthetic:"):
        raise GridError(f"{path}: {shown(epochs)}: {data.source} has no end to come back from; write tokens")
    if not epochs > 0:
        raise GridError(f"{path}: {shown(epochs)} is not positive; write e.g. 1")
    tokens = known(data)
    if tokens is None:
        raise GridError(
            f"{path}: {shown(epochs)}: how many tokens an epoch of {data.source} has is known when it is prepared; "
            "give python -m scaling.data prepare --grid with this file first"
        )
    return float(epochs) * tokens


def _vocab_of(values: dict[tuple[str, ...], Any], leaves: Leaves, where: str) -> dict[tuple[str, ...], int]:
    """The vocabulary that follows from the names of the tokenizer and of the objective."""
    objective = strict.build(
        ObjectiveConfig, {(k,): v for k, v in _part(values, "objective").items()}, leaves, where, ("objective",)
    )
    seq_len = values.get(("data", "seq_len"), DataConfig.seq_len)
    try:
        extra_ids = objectives.extra_ids(objective, seq_len)
    except ValueError:  # which ``RunConfig`` says
        extra_ids = 0
    tokenizer, path = leaves.get(("data", "tokenizer"), ("bytes", ""))
    source, source_path = leaves.get(("data", "source"), ("", ""))
    if "tokens:" in source:
        raise GridError(f"{source_path}: model.vocab_size is missing; write what tokens.json says")
    if tokenizer == "bytes":
        return {("model", "vocab_size"): 256 + extra_ids} if extra_ids else {}
    if match := re.fullmatch(r"bpe:([0-9]{1,7})", tokenizer):  # DataConfig says which sizes can be
        return {("model", "vocab_size"): int(match[1]) + extra_ids}
    raise GridError(f"{path}: model.vocab_size is missing; write it (it follows for bytes and bpe:<size> only)")


def _only(leaves: Leaves, group: str, names: tuple[str, ...], where: str) -> str:
    """Which one of ``names`` the group is given by."""
    given = [name for name in names if leaves.get((group, name), (None, ""))[0] is not None]
    if not given:
        raise GridError(f"{where}: {group} is missing; write one of {', '.join(f'{group}.{name}' for name in names)}")
    if len(given) > 1:
        (first, first_path), (second, path) = (leaves[group, name] for name in given[:2])
        what = f"{given[1]} is a second {group} beside {given[0]}, {shown(first)} at {first_path}"
        raise GridError(f"{path}: {shown(second)}: {what}; write one of them")
    return given[0]


def _part(values: dict[tuple[str, ...], Any], group: str) -> dict[str, Any]:
    """The values of one group of the run, nested as they are; null ones count as not given."""
    return strict.nested({key[1:]: value for key, value in values.items() if key[0] == group and value is not None})


def _ask_recipe(
    recipe: dict[str, Any], values: dict[tuple[str, ...], Any], leaves: Leaves, where: str
) -> dict[tuple[str, ...], Any]:
    """The recipe's values for what the grid leaves open."""
    for scale, target in (("lr_scale", ("optim", "peak_lr")), ("batch_scale", ("batch_size",))):
        path = leaves.get(("recipe", scale), (None, ""))[1]
        if scale in recipe and recipe[scale] <= 0:
            raise GridError(f"{path}: {recipe[scale]!r} is not positive; write e.g. 0.5")
        if scale in recipe and target in values:
            raise GridError(f"{path}: {recipe[scale]!r} has no effect beside {leaves[target][1]}; write one of them")
    parts = {"model": ModelConfig, "data": DataConfig, "horizon": Horizon, "objective": ObjectiveConfig}
    model, data, horizon, objective = (
        strict.build(cls, {(k,): v for k, v in _part(values, group).items()}, leaves, where, (group,))
        for group, cls in parts.items()
    )
    optimizer = values.get(("optim", "name"), "adamw")
    asks_rate, cannot = ("optim", "peak_lr") not in values, f"{where}: {recipe['name']} cannot give"
    if asks_rate and optimizer not in ("adamw", "adam") and "lr_scale" not in recipe:
        raise GridError(
            f"{cannot} {optimizer}'s rate: it is AdamW's; write recipe.lr_scale, the multiples of it to try, or "
            "optim.peak_lr"
        )
    if asks_rate and model.parameterization == "mup":
        raise GridError(f"{cannot} μP's rate: it falls with size, and μP's does so by itself; write optim.peak_lr")
    batch_size = values.get(("batch_size",))
    if horizon.steps is not None and batch_size is None:
        path = leaves["horizon", "steps"][1]
        raise GridError(f"{path}: steps need batch_size too: the recipe's batch follows from tokens; write batch_size")
    try:
        window_tokens = objectives.of(objective).lengths(objective, data.seq_len).window
    except ValueError as e:
        raise strict.refusal(("objective",), str(e), leaves, where) from None
    num_tokens = accounting.requested_tokens(model, data.seq_len, batch_size or 1, horizon, objective)
    proposed = RECIPES[recipe["name"]](model, num_tokens, data.seq_len)
    if batch_size is None:
        batch_size = max(1, round(proposed.batch_tokens * recipe.get("batch_scale", 1.0) / window_tokens))
    batch_tokens = max(1, batch_size * window_tokens)
    answers = {
        # Six digits: pow differs in its last bit between C libraries, and run_id must not.
        ("optim", "peak_lr"): float(f"{proposed.peak_lr * recipe.get('lr_scale', 1.0):.6g}"),
        # Whole steps, rounded down: a tenth of the run stays at most a tenth.
        ("optim", "warmup_tokens"): proposed.warmup_tokens // batch_tokens * batch_tokens,
        ("optim", "beta2"): proposed.beta2,
        ("optim", "weight_decay"): 0.0 if optimizer == "adam" else proposed.weight_decay,
        ("batch_size",): batch_size,
    }
    return {key: value for key, value in answers.items() if key not in values}


# ---- selectors: cells named by their coordinates --------------------------------------------------------------------


def _kept(cells: list[Cell], sections: dict[str, Any]) -> list[bool]:
    """Which cells ``exclude`` leaves."""
    if "exclude" not in sections:
        return [True] * len(cells)
    left_out = [False] * len(cells)
    for i, selector in enumerate(strict.nonempty(sections["exclude"], "exclude")):
        left_out = [a or b for a, b in zip(left_out, select(cells, selector, f"exclude[{i}]"))]
    if all(left_out):
        raise GridError("exclude: leaves no cell; remove an entry")
    return [not out for out in left_out]


def _hold_out(cells: list[Cell], sections: dict[str, Any]) -> list[Cell]:
    if "holdout" not in sections:
        return cells
    section = strict.mapping(sections["holdout"], "holdout", ("budgets", "cells"))
    selectors = {}
    if "budgets" in section:
        for i, budget in enumerate(strict.nonempty(section["budgets"], "holdout.budgets")):
            path = f"holdout.budgets[{i}]"
            selectors[path] = {"budget_flops": strict.leaf(budget, float, path)}
    if "cells" in section:
        selectors |= {
            f"holdout.cells[{i}]": s for i, s in enumerate(strict.nonempty(section["cells"], "holdout.cells"))
        }
    held = [False] * len(cells)
    for path, selector in selectors.items():
        held = [a or b for a, b in zip(held, select(cells, selector, path))]
    if all(held):
        raise GridError("holdout: keeps every cell out; leave some to fit")
    return [dataclasses.replace(cell, holdout=out) for cell, out in zip(cells, held)]


def _groups(cells: list[Cell], by: str, key: str) -> dict[str, list[str]]:
    """run_ids of the cells that agree in the coordinate ``by``, by the name of their folder. Raises GridError."""
    groups: dict[str, list[Cell]] = {}
    values: dict[str, Any] = {}
    for cell in cells:
        value = coordinate(cell, by, f"{key}: {shown(by)}")
        if value is None:
            raise GridError(f"{key}: {shown(by)}: {called(cell.labels)} has no value there; write one of all cells")
        name = "=".join(re.sub(r"[^\w.+-]+", "-", str(part)).strip("-.") for part in (by, value))
        other = values.setdefault(name.casefold(), value)  # some file systems take a and A for one
        if other != value:
            raise GridError(
                f"{key}: {shown(by)}: {shown(other)} and {shown(value)} would share the folder {name}; write an axis "
                "whose entries have a label"
            )
        groups.setdefault(name, []).append(cell)
    if key == "fit.compare":
        _require_comparable(groups, by)
    for name, members in groups.items():
        if all(cell.holdout for cell in members):
            raise GridError(f"holdout: keeps every cell of {name} out, which is fitted by itself; leave some to fit")
    return {name: [cell.run.run_id for cell in members] for name, members in groups.items()}


def _require_comparable(groups: dict[str, list[Cell]], by: str) -> None:
    """Raises GridError where groups could not be compared when they have trained: better said before."""
    if len(groups) < 2:
        raise GridError(f"fit.compare: {shown(by)}: every cell is of {next(iter(groups))}; write what cells differ in")
    runs = [cell.run for members in groups.values() for cell in members]
    if len(found := {run.objective.name for run in runs}) > 1:
        raise GridError(
            f"fit.compare: {shown(by)}: losses of {' and '.join(sorted(found))} do not measure the same thing; write "
            "fit.by for laws of each"
        )
    if len(found := {run.data.source for run in runs}) > 1:
        raise GridError(
            f"fit.compare: {shown(by)}: losses on {' and '.join(sorted(found))} are of other text; write fit.by for "
            "laws of each"
        )


def _refuse_parts(cells: list[Cell], execution: ExecutionConfig) -> None:
    for cell in cells:
        try:
            objectives.require_whole(cell.run.objective, execution.asked_parts)
        except ValueError as e:
            raise GridError(str(e).replace(" is ", ": ", 1)) from None


def _refuse_duplicates(cells: list[Cell]) -> None:
    first: dict[str, int] = {}
    for i, cell in enumerate(cells):
        j = first.setdefault(cell.run.run_id, i)
        if j != i:
            raise GridError(
                f"cells {j} and {i} are the same run, {cell.run.run_id}: {called(cells[j].labels)} and "
                f"{called(cell.labels)}; write it once, or exclude one"
            )
