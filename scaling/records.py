"""What a run left behind: one JSON file each, and the tables that analysis reads.

A record is all that crosses from training to analysis. No log is parsed and no name decoded: every count, under every
convention, is a field.
"""

import dataclasses
import functools
import hashlib
import json
import platform
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from scaling import parts, storage
from scaling.config import RunConfig, num_params_of
from scaling.fields import from_dict, value_at
from scaling.objectives import OBJECTIVES, Objective

if TYPE_CHECKING:
    import pandas as pd
    import pydantic

SCHEMA = 1
Status = Literal["completed", "diverged", "failed"]

CURVE_COLUMNS = (
    "step", "num_tokens", "loss", "standard_error", "num_eval_tokens", "train_loss", "learning_rate", "grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """One run. Every field but ``environment`` and ``timing`` is a function of ``config`` and the data alone."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    run_id: str
    status: Status
    config: dict[str, Any]  # RunConfig, every default written out
    sweep: dict[
        str, Any
    ]  # the cell: name, holdout, recipe, labels ({"budget_flops": …, "size": …} and the grid's other axes)
    num_params: dict[str, int]  # by group, and non_embedding, total
    num_tokens: int  # trained on (at the last step, if diverged)
    num_steps: int
    batch_tokens: int
    unique_tokens: int  # of the train split, those that lie in a window; of a mixture see Mixture.distinct_tokens
    epochs: float  # num_tokens / unique_tokens
    tokens_per_param: float
    flops: dict[str, float]  # achieved training FLOPs by rule
    loss: float | None  # validation, in the objective's unit, whole split, at the last step; null if diverged
    # By parts of the split's text (``parts``), else over its windows; in records of before over windows, which
    # ``standard_error`` makes good.
    loss_standard_error: float | None
    bits_per_byte: float | None
    num_eval_tokens: int  # behind ``loss``: those that carry it; pairs, where it is of these
    diverged_at_step: int | None
    curve: dict[str, list[Any]]  # a list for each of CURVE_COLUMNS
    # source, tokenizer, fingerprint, train_tokens, validation_tokens, tokens_per_byte; of a synthetic source the truth:
    # entropy_rate, best_loss (the least expected over windows), best_validation_loss (on this validation split)
    data: dict[str, Any]
    # Of the tokens trained on, those that carry loss, or the pairs of them that do; None in records older than the
    # count, of which all do.
    num_predicted_tokens: int | None = None
    # Validation loss by place in the window, where tokens are read in order: ``until`` (where each bin ends), ``loss``,
    # ``standard_error``. None in records older than it.
    loss_by_position: dict[str, list[Any]] | None = None
    # Validation loss by part of the split's text, the same parts for every run on these data: ``source``, ``block`` in
    # it, ``weight`` of the source, ``num_tokens``, ``loss``. None in records older than it.
    loss_by_block: dict[str, list[float]] | None = None
    # What an objective or a family keeps of the validation split besides, {name: {"value": a number or a list}}:
    # a generator's loss, the load of experts.
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)  # versions, git, devices, mesh, pack: where it happened
    timing: dict[str, Any] = field(
        default_factory=dict
    )  # seconds, step_seconds, eval_seconds, tokens_per_s, flops_per_s, …
    schema: int = SCHEMA

    @property
    def standard_error(self) -> float | None:
        """Of ``loss``, by parts of the text where that is more: windows of one document are hard or easy together."""
        told = None if self.loss_by_block is None else parts.mean_and_standard_error(self.loss_by_block)
        return max((e for e in (self.loss_standard_error, told and told[1]) if e is not None), default=None)


def write_json(path: Path, payload: Any) -> None:
    """Writes JSON atomically: a reader sees the old file or the new one, never half of one.

    Raises ValueError on NaN or infinity, which JSON does not have.
    """
    storage.write(path, json.dumps(payload, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def software() -> dict[str, Any]:
    """Versions and the git commit of the code that runs: the part of ``environment`` that needs no device."""
    import subprocess
    from importlib import metadata

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("scaling", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Of the code alone: results being written beside it do not make it another program.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return {
        "versions": versions,
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changed is None else bool(changed),
        "platform": platform.platform(),
    }


def path_of(results: Path, run_id: str) -> Path:
    return storage.folder(results) / "runs" / f"{run_id}.json"


def save(results: Path, record: RunRecord) -> Path:
    """Writes ``results/runs/<run_id>.json`` and returns its path."""
    path = path_of(results, record.run_id)
    write_json(path, dataclasses.asdict(record))
    return path


def read(path: Path) -> RunRecord:
    """Reads one record.

    Raises ValueError, in one line with the file's name and what to do, if it is no whole record of this schema, or not
    of the run that its name and its config say.
    """
    try:
        return _checked(path.read_text(encoding="utf-8"), path.stem)
    except (ValueError, RecursionError) as e:
        why = " ".join(str(e).split())
        raise ValueError(f"{path}: not a readable run record ({why}): delete it and run the sweep again") from None


def _checked(text: str, run_id: str) -> RunRecord:
    """The record of ``run_id`` in its JSON. Raises ValueError saying what is wrong with it."""
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError(f"it holds {type(raw).__name__}, not an object")
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"schema {raw.get('schema')!r}, this version reads {SCHEMA}")
    try:
        _adapter().validate_json(text, strict=True)
        record = RunRecord(**raw)  # not pydantic's copy, whose FLOPs are rounded to floats
    except ValueError as e:  # pydantic's: its own text has a line for each of what may be hundreds
        first = e.errors()[0] if hasattr(e, "errors") else {"loc": (), "msg": str(e)}
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")) from None
    try:
        of_config = from_dict(RunConfig, record.config).run_id
    except (TypeError, ValueError, AttributeError, KeyError) as e:
        raise ValueError(f"config is not a run's: {e}") from None
    for what, found in (("its file", run_id), ("its config", of_config)):
        if found != record.run_id:
            raise ValueError(f"run_id is {record.run_id!r}, by {what} {found!r}: it was edited or renamed")
    if record.status == "completed" and not (record.loss is not None and record.loss > 0):
        raise ValueError(f"loss is {record.loss!r} of a completed run")
    if not isinstance(record.sweep.get("labels", {}), dict):
        raise ValueError(f"sweep.labels is {record.sweep['labels']!r}, not an object")
    for name in ("holdout", "changed_sides"):
        if not isinstance(record.sweep.get(name, False), bool):
            raise ValueError(f"sweep.{name} is {record.sweep[name]!r}, not true or false")
    needed = {"num_params": {"non_embedding", "total"}, "curve": {"step", "num_tokens", "loss"}}
    if record.loss_by_block is not None:
        needed["loss_by_block"] = {"source", "block", "weight", "num_tokens", "loss"}
    for name, keys in needed.items():
        columns = getattr(record, name)
        if missing := keys - columns.keys():
            raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
        if len({len(column) for column in columns.values() if isinstance(column, list)}) > 1:
            raise ValueError(f"the columns of {name} are not equally long")
    if record.loss_by_block is not None and min(record.loss_by_block["num_tokens"], default=1) <= 0:
        raise ValueError("loss_by_block has a part without tokens")
    return record


@functools.cache
def _adapter() -> "pydantic.TypeAdapter[RunRecord]":
    import pydantic

    return pydantic.TypeAdapter(RunRecord)


def overlaid(record: RunRecord, cell: Mapping[str, Any]) -> RunRecord:
    """The record with what its grid says of its cell today: ``holdout``, ``recipe``, ``labels``.

    None of them has a part in the training, so a grid may change them afterwards. Where ``holdout`` changed, ``sweep``
    says so under ``changed_sides``.
    """
    today = {key: cell[key] for key in ("holdout", "recipe", "labels")}
    changed = today["holdout"] != record.sweep.get("holdout", False)
    return dataclasses.replace(record, sweep=record.sweep | today | ({"changed_sides": True} if changed else {}))


def named(run_ids: Sequence[str]) -> str:
    """The first three of some runs, and whether there are more, for a sentence that says how many."""
    return f"{', '.join(run_ids[:3])}{', …' if len(run_ids) > 3 else ''}"


def changed_sides(runs: Sequence[RunRecord]) -> list[str]:
    """A sentence on the runs that are held out today and were fitted when they trained, one on the others' way."""
    out = []
    for held, now, then in ((True, "held out now", "not when they trained"), (False, "fitted now", "held out then")):
        ids = [r.run_id for r in runs if r.sweep.get("changed_sides") and r.sweep["holdout"] == held]
        if ids:
            no_forecast = ": what is said of them is no forecast" if held else ""
            out.append(f"the grid has changed sides: {len(ids)} runs ({named(ids)}) are {now}, {then}{no_forecast}")
    return out


def load_records(results: Path) -> list[RunRecord]:
    """Records of a results folder, in order of run_id, whatever their status; of the folder of a group in it (see
    ``manifest``), those of the group's runs.

    Where the folder has a ``sweep.json``, these are the records of the cells of its grid, with what the grid says of
    them by now (``overlaid``); the ``strangers`` among ``<results>/runs/*.json`` are left out.
    """
    folder = storage.folder(results)
    listed = manifest(folder).get("cells")
    home = folder if _groups_around(folder).get(folder.name) is None else folder.parent
    paths = sorted((home / "runs").glob("*.json"))
    if listed is None:
        return storage.each(read, paths)
    cells = {cell["run_id"]: cell for cell in listed}
    return [overlaid(r, cells[r.run_id]) for r in storage.each(read, [p for p in paths if p.stem in cells])]


def strangers(results: Path, run_ids: Collection[str] | None = None) -> list[str]:
    """run_ids of the records in a results folder that are of none of the cells of its grid.

    ``run_ids``: the grid's cells; by default those of the folder's ``sweep.json``, without which no record is one.
    """
    folder = storage.folder(results)
    if run_ids is None:
        listed = manifest(folder).get("cells")
        if listed is None or _groups_around(folder):
            return []
        run_ids = {cell["run_id"] for cell in listed}
    return sorted(path.stem for path in (folder / "runs").glob("*.json") if path.stem not in run_ids)


def manifest(results: Path) -> dict[str, Any]:
    """``sweep.json`` of a results folder; empty if there is none.

    Its ``groups`` are run_ids by the name of a folder in it, where the laws of these runs alone are. Of such a folder,
    the manifest is the sweep's with the group's cells, and without what is said of the whole sweep: cost, warnings.

    Raises ValueError if it cannot be read.
    """
    folder = storage.folder(results)
    run_ids = _groups_around(folder).get(folder.name)
    if run_ids is None:
        return read_json(folder / "sweep.json")
    whole = manifest(folder.parent)
    cells = [cell for cell in whole.get("cells") or [] if cell["run_id"] in run_ids]
    return {**whole, "name": f"{whole.get('name')}, {folder.name}", "cells": cells, "groups": {}, "plan": None,
            "actual": None, "warnings": []}  # fmt: skip


def _groups_around(folder: Path) -> dict[str, list[str]]:
    """The groups of the results folder that this one is in, if it is none itself."""
    if "=" not in folder.name or (folder / "runs").is_dir():
        return {}
    return read_json(folder.parent / "sweep.json").get("groups") or {}


def read_json(path: Path) -> dict[str, Any]:
    """An object that a sweep wrote; empty if there is none. Raises ValueError if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: not readable as JSON ({e}): delete it and run the sweep again") from None


def is_done(results: Path, run_id: str) -> bool:
    """Whether the run has a readable record, completed or diverged; a ``failed`` one is tried again."""
    path = path_of(results, run_id)
    return path.exists() and read(path).status != "failed"


def seal(payload: Mapping[str, Any]) -> str:
    """sha256 of an object, its own key ``sha256`` left out: a file that carries it shows whether it was edited."""
    rest = {key: value for key, value in payload.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def load(results: Path) -> "pd.DataFrame":
    """A results folder as a table, a row per run (diverged and failed ones too: see ``status``).

    Columns: run_id, status, holdout and left_out_afterwards (see ``overlaid``), recipe; data (its fingerprint),
    data_source, tokenizer; cell and setting (equal for runs of one model, data and horizon, and of one optimiser and
    batch); budget_flops and the other labels; num_params (non-embedding), num_params_<group> and num_params_active (of
    a model with experts what a token meets); num_tokens, unique_tokens, epochs, tokens_per_param, num_steps,
    batch_tokens; flops_<rule>; loss, loss_unit, loss_standard_error, bits_per_byte; least_loss, what a synthetic source
    itself has on the validation split; measures.<name>, those that are numbers; seed, peak_lr, d_model, num_layers;
    seconds, tokens_per_s.
    """
    return table(load_records(results))


def table(records: Sequence[RunRecord]) -> "pd.DataFrame":
    """The table of ``load`` from records already read."""
    import pandas as pd

    return pd.DataFrame([_row(r) for r in records])


def with_coordinate(table: "pd.DataFrame", runs: Sequence[RunRecord], key: str) -> "pd.DataFrame":
    """Returns the table of ``runs`` with a column ``key``: a label of their cells, or a path into their configs such as
    ``model.family``, where it has no such column.

    Raises ValueError where a run has neither.
    """
    if key in table:
        return table
    try:
        values = [value_at(from_dict(RunConfig, r.config), "model.d_model" if key == "width" else key) for r in runs]
    except KeyError:
        labels = dict.fromkeys(label for r in runs for label in r.sweep.get("labels", {}))
        some = ", ".join([*labels, "width", "optim.name", "model.family"])
        raise ValueError(
            f"compare is {key!r}, which is no coordinate of these runs: write one of {some}, or another path"
        ) from None
    return table.assign(**{key: values})


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _row(r: RunRecord) -> dict[str, Any]:
    model, optim = r.config["model"], r.config["optim"]
    return {
        "run_id": r.run_id,
        "status": r.status,
        "holdout": r.sweep.get("holdout", False),
        "left_out_afterwards": r.sweep.get("holdout", False) and r.sweep.get("changed_sides", False),
        "recipe": r.sweep.get("recipe"),
        "cell": _digest(model, r.config["data"], r.config["horizon"], r.config.get("objective"), r.config.get("start")),
        "setting": _digest(optim, r.config["batch_size"]),
        "data": r.data.get("fingerprint"),
        "data_source": r.data.get("source"),
        "tokenizer": r.data.get("tokenizer"),
        "objective": (r.config.get("objective") or {}).get("name", "next_token"),
        "started": r.config.get("start") is not None,
        **r.sweep.get("labels", {}),
        "num_params": r.num_params["non_embedding"],
        **{f"num_params_{group}": count for group, count in r.num_params.items()},
        "num_params_active": num_params_of(r.num_params, "active"),
        "num_tokens": r.num_tokens,
        "num_predicted_tokens": r.num_tokens if r.num_predicted_tokens is None else r.num_predicted_tokens,
        "unique_tokens": r.unique_tokens,
        "epochs": r.epochs,
        "tokens_per_param": r.tokens_per_param,
        "num_steps": r.num_steps,
        "batch_tokens": r.batch_tokens,
        **{f"flops_{rule}": flops for rule, flops in r.flops.items()},
        "loss": r.loss,
        "loss_unit": objective_of(r).unit,
        "loss_standard_error": r.standard_error,
        "bits_per_byte": r.bits_per_byte,
        **{f"measures.{name}": m["value"] for name, m in r.measures.items() if not isinstance(m["value"], list)},
        **({"least_loss": least} if (least := least_loss(r)) is not None else {}),
        "diverged_at_step": r.diverged_at_step,
        "seed": r.config["seed"],
        "peak_lr": optim["peak_lr"],
        "d_model": model["d_model"],
        "num_layers": model["num_layers"],
        "seconds": r.timing.get("seconds"),
        "tokens_per_s": r.timing.get("tokens_per_s"),
        "flops_per_s": r.timing.get("flops_per_s"),
    }


def objective_of(record: RunRecord) -> Objective:
    """What the run was trained to do."""
    return OBJECTIVES[(record.config.get("objective") or {}).get("name", "next_token")]


def least_loss(record: RunRecord) -> float | None:
    """What a synthetic source itself has on the validation split, which losses of its text's likelihood tend to; None
    of other sources, and of objectives whose loss is no likelihood of the text."""
    return record.data.get("best_validation_loss") if objective_of(record).is_likelihood else None


def loss_unit(records: Sequence[RunRecord]) -> str:
    """The unit of the runs' losses: that of their objective, where all have the same."""
    units = {objective_of(record).unit for record in records}
    return units.pop() if len(units) == 1 else "nats"


def curves(records: Sequence[RunRecord]) -> "pd.DataFrame":
    """Loss curves as a long table: run_id, status, holdout, num_params (non-embedding), num_params_total, flops_<rule>
    spent so far, and the columns of ``RunRecord.curve``."""
    import pandas as pd

    frames = []
    for r in records:
        frame = pd.DataFrame(r.curve)
        frame.insert(0, "run_id", r.run_id)
        frame["status"] = r.status
        frame["holdout"] = r.sweep.get("holdout", False)
        frame["num_params"] = r.num_params["non_embedding"]
        frame["num_params_total"] = r.num_params["total"]
        for rule, flops in r.flops.items():
            frame[f"flops_{rule}"] = flops * frame["num_tokens"] / r.num_tokens
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def positions(records: Sequence[RunRecord]) -> "pd.DataFrame":
    """Validation loss by place in the window as a long table: run_id, family, holdout, num_params (non-embedding),
    num_tokens, and ``until``, ``loss``, ``standard_error``; without runs that have none or did not complete.
    """
    import pandas as pd

    frames = []
    for r in records:
        if r.status == "completed" and r.loss_by_position is not None:
            frame = pd.DataFrame(r.loss_by_position)
            frame.insert(0, "run_id", r.run_id)
            frame["family"] = r.config["model"].get("family", "transformer")
            frame["holdout"] = r.sweep.get("holdout", False)
            frame["num_params"] = r.num_params["non_embedding"]
            frame["num_tokens"] = r.num_tokens
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


# What a plan says and what then happens: key, title, unit, key of the planned value, key of the actual one.
_COMPARED = (
    ("wall", "the whole command", "s", "predicted_seconds", "wall_seconds"),
    ("training", "training", "s", "predicted_training_seconds", "training_seconds"),
    ("memory", "device memory at most", "bytes", "memory_bytes", "peak_device_bytes"),
    ("dollars", "money", "$", "dollars", "dollars"),
    ("kwh", "energy, at the power given", "kWh", "kwh", "kwh"),
    ("measured_kwh", "energy, the processors' own count", "kWh", None, "measured_kwh"),
)


def plan_against_actual(manifest: dict[str, Any], runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """What a sweep's plan said and what came of it: rows of key, title, unit, planned, actual, ratio (of the last two).

    The row ``cells`` has the median ratio of a cell's seconds, and ``low`` and ``high``, the smallest and the largest
    (a branch's seconds, said and taken, are those of its own steps). A value that is not known is None; a row of which
    nothing is known is left out, and so is all of it while cells are missing.
    """
    planned, actual = manifest.get("plan") or {}, manifest.get("actual") or {}
    cells = {c["run_id"]: c for c in manifest.get("cells") or []}
    if any(c.get("status") == "waiting" for c in cells.values()) or not actual.get("wall_seconds"):
        return []
    rows: list[dict[str, Any]] = [
        {"key": key, "title": title, "unit": unit, "planned": planned.get(a), "actual": actual.get(b)}
        for key, title, unit, a, b in _COMPARED
    ]
    for row in rows:
        row["ratio"] = row["actual"] / row["planned"] if row["actual"] and row["planned"] else None
    seconds = [
        (run.timing.get("seconds"), cells.get(run.run_id, {}).get("predicted_seconds"))
        for run in runs
        if run.status == "completed"
    ]
    ratios = sorted(took / said for took, said in seconds if took and said)
    if ratios:
        median = statistics.median(ratios)
        cells_row = {"key": "cells", "title": "a cell, median", "unit": "s", "planned": None, "actual": None}
        rows.insert(2, {**cells_row, "ratio": median, "low": ratios[0], "high": ratios[-1]})
    idle = actual.get("fraction_not_in_steps")
    rows.append({"key": "idle", "title": "share of training not in steps", "unit": "", "planned": None, "actual": idle})
    return [{"ratio": None, **row} for row in rows if row.get("ratio") or row["planned"] or row["actual"]]


def read_or_empty(path: Path) -> dict[str, Any]:
    """An object that can be made again, as it was left; empty if there is none or it is damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return raw if isinstance(raw, dict) and raw.get("schema") == 1 else {}
