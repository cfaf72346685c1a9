"""Tables → checked observations: what a law is fitted to, and what was left out and why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from scaling.laws.tables import reading, units
from scaling.laws.tables.columns import MEASURED, NAMES, canonical, choose, says_ones, words_of
from scaling.laws.tables.reading import NOTES, listed

if TYPE_CHECKING:
    import pandas as pd

CORE = ("num_params", "num_tokens", "flops", "loss", "weight", "unique_tokens")
# Columns of one training recipe: runs of one size, horizon and data that differ in them alone are tries, not cells.
RECIPE = {
    "lr", "learning_rate", "peak_lr", "max_lr", "peak_learning_rate", "batch", "batch_size", "gbsz", "bsz", "bs",
    "global_batch_size", "global_bs", "batch_tokens", "train_batch_size", "wd", "weight_decay", "warmup", "momentum",
    "warmup_steps", "beta1", "beta2", "beta_1", "beta_2", "adam_beta1", "adam_beta2", "eps", "adam_eps", "optimizer",
}  # fmt: skip
DATA = {"unique_tokens", "data", "dataset", "dataset_name", "corpus", "group", "subset", "tokenizer"}
HELD_OUT, LEFT_OUT = "holdout", "holdout (afterwards)"  # the reasons of ``excluded``; the second: its loss was known
ONE_EPOCH = 1.05  # times the different tokens: the last batch of one epoch is no second epoch
SAME_HORIZON = 1.01  # steps of another batch size end at nearly the same token


@dataclass(frozen=True)
class Observations:
    """Rows a law is fitted to.

    Attributes:
      columns: num_params, num_tokens, flops and every other all-positive numeric column of the table, each (n,).
      loss: nats per token, (n,).
      weight: relative precision, proportional to 1/σ² of a row's log loss, (n,): its unit means nothing.
      run: label of the run a row comes from, (n,): rows of one run may be one cluster (``diagnosis.run_clusters``).
      budget: label of the compute budget a row belongs to, (n,); NaN where it has none.
      convention: which parameter count and FLOP rule the columns are in.
      excluded: rows that are not fitted: {"run", "reason", and num_params, num_tokens, flops, loss where known}.
      warnings: what a reader must know before believing a fit.
      run_column: what the table called ``run``; None where rows were numbered.
      shared_error: standard error, in the loss's unit, that all losses share, being of one validation text: that of the
        least one that has it (``loss_standard_error``), where the table says what they are of (``data``), as records
        do. Exponents, optima and forecasts on the same text have no part of it; the floor E has.
    """

    columns: dict[str, np.ndarray]
    loss: np.ndarray
    weight: np.ndarray
    run: np.ndarray
    budget: np.ndarray
    source: str = "table"
    convention: dict[str, Any] = field(default_factory=dict)
    excluded: list[dict[str, Any]] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    run_column: str | None = None
    shared_error: float | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def reading(self) -> dict[str, Any]:
        """Options of ``from_table`` by which another law of the same table counts as these rows do, and leaves out what
        has more compute than they have, by more than steps of another batch do: it is held out, or of no law."""
        counted = {k: v for k in ("num_params", "flops") if (v := self.convention.get(k)) not in (None, "as given")}
        top = SAME_HORIZON * float(self.columns["flops"].max()) if "flops" in self.columns else None
        return counted | {"holdout_flops": top}

    def left_out(self) -> list[str]:
        """How many runs are not fitted, in words, a line for each reason."""
        counts = sorted(Counter(row["reason"] for row in self.excluded).items())
        return [f"{n} {reason} {'run is' if n == 1 else 'runs are'} not fitted" for reason, n in counts]

    @property
    def repeated(self) -> str | None:
        """That rows repeat their tokens, in words; None where none does, or it is not said."""
        tokens, unique = (self.columns.get(c) for c in ("num_tokens", "unique_tokens"))
        if tokens is None or unique is None or not (again := tokens > ONE_EPOCH * unique).any():
            return None
        most = (tokens / unique).max()
        return (
            f"{again.sum()} of {len(self)} runs read their data up to {most:.3g} times, and a law of N and D takes "
            "every token for new: write --law data_constrained, or leave them out"
        )

    def take(self, rows: np.ndarray) -> "Observations":
        """The rows of a mask or an index array."""
        return replace(
            self,
            columns={name: x[rows] for name, x in self.columns.items()},
            **{name: getattr(self, name)[rows] for name in ("loss", "weight", "run", "budget")},
        )


def read_csv(path: Path) -> "pd.DataFrame":
    """Reads a CSV, JSON or JSON lines as a table with num_params, num_tokens, loss, optionally flops, run, weight.

    Names that trackers write stand for these (``columns``), any delimiter and decimal mark will do (``tables``); what
    was mapped is in ``attrs["notes"]``. Lines that begin with ``#`` are comments; extra columns are kept.
    Raises ValueError on an unreadable file.
    """
    return canonical(reading.read(path), source=str(path))


def from_table(
    table: "pd.DataFrame",
    *,
    num_params: str = "non_embedding",
    flops: str = "exact",
    holdout_flops: float | None = None,
    source: str = "table",
    target: str = "loss",
    columns: Sequence[str] = (),
    units_known: bool = False,
    sized: bool = True,
    signed: bool = False,
) -> Observations:
    """Checks a table and keeps what can be fitted.

    Args:
      table: as ``records.load`` gives it (then ``num_params`` and ``flops`` choose a count and a rule), or with
        columns num_params, num_tokens, loss and optionally flops, run, weight. Without flops, C = 6 N D.
      holdout_flops: rows with more FLOPs than this are left out, as if they were marked ``holdout``. Rows that other
        hyperparameters beat on the same cell are left out too, where the table names ``cell`` and ``setting``.
      source: what messages call the table.
      target: the column that is fitted, where a law is of something else than the loss (an error, a batch size); the
        table then needs that column and the law's own, and ``loss`` is a column like any other.
      columns: what the laws are of: runs that differ in another setting of their recipe (``lr``, ``batch`` …) at one
        size and horizon are tries of one cell, and the best is fitted.
      units_known: sizes are in ones, however small: they were counted here, or checked before.
      sized: whether num_params and num_tokens must be there; a law of tokens or of compute alone needs neither.
      signed: whether the target may be zero or negative, as a loss less that of a reference is.

    Raises:
      ValueError: a column is missing, a value is not a positive number, a chosen convention is not there, or the
        column ``data``, ``objective`` or ``started`` has several values.
    """
    table, ambiguous = _named(table, source)
    run_column = table.attrs[NAMES].get("run", "run") if "run" in table else None
    if target != "loss":
        if target not in table:
            raise ValueError(f"{source}: column {target} is missing (there is {listed(table.columns)})")
        table = table.assign(_loss=table.get("loss", np.nan), loss=table[target])
    needed = {"num_params", "num_tokens", "flops"} | ({"loss"} if target == "loss" else set())
    for name in sorted(needed & set(ambiguous)):
        raise ValueError(
            f"{source}: columns {listed(ambiguous[name])} could each be {name} and differ: rename the one to fit "
            f"to {name}" + (", and the others to what they are" if name in table else "")
        )
    notes = list(table.attrs[NOTES])
    table, convention = _convention(table, num_params, flops, source, need_size=sized and target == "loss")
    if convention.get("num_tokens"):
        notes.append("there is no num_tokens: D = C / (6 N)")
    # Counts above 2^63 arrive as objects: FLOPs of a large run do.
    table = table.assign(**{c: _numbers(table, c, source) for c in CORE if c in table})
    label = table["run"].astype(str).to_numpy() if "run" in table else np.array([f"row {i}" for i in range(len(table))])
    loss = _numbers(table, "loss", source)
    reason = np.full(len(table), "", dtype=object)
    if "status" in table:
        status = table["status"].astype(str).to_numpy()
        reason[status != "completed"] = status[status != "completed"]
    if "holdout" in table:
        held = (reason == "") & table["holdout"].fillna(False).astype(bool).to_numpy()
        reason[held] = HELD_OUT
        if "left_out_afterwards" in table:
            reason[held & table["left_out_afterwards"].to_numpy(bool)] = LEFT_OUT
    if holdout_flops is not None:
        reason[(reason == "") & (_numbers(table, "flops", source) > holdout_flops)] = HELD_OUT
    if "cell" in table:  # of records, where a setting that a law is of is none of its cells'
        for column in settings_of([c for c in columns if c in table]):
            table = table.assign(cell=table["cell"].astype(str) + " " + table[column].astype(str))
    if target == "loss":
        table = _cells(table, reason == "", notes, columns)
    if "cell" in table and "setting" in table:
        reason[_untuned(table, loss, reason == "")] = "untuned"
    kept = reason == ""
    if not kept.any():
        counts = ", ".join(f"{count} {why}" for why, count in sorted(Counter(reason).items()))
        raise ValueError(f"{source}: nothing to fit: of {len(table)} runs none is completed and fitted ({counts})")
    _require_one_kind(table[kept], source)
    _check_positive(table[kept], label[kept], source, may_be_negative=("loss",) if signed else ())
    if not units_known and convention["num_params"] == "as given" and {"num_params", "num_tokens"} <= set(table):
        fitted = [table.loc[kept, c].to_numpy(dtype=np.float64) for c in ("num_params", "num_tokens", "flops")]
        in_ones = any(says_ones(table.attrs[NAMES].get(c, c)) for c in ("num_params", "num_tokens"))
        units.check(*fitted[:2], source, in_ones=in_ones)  # type: ignore[misc, arg-type]  # two columns
        if said := units.cost_note(*fitted):
            notes.insert(0, said)
    weight = _numbers(table, "weight", source) if "weight" in table else np.ones(len(table))
    budget = _numbers(table, "budget_flops", source) if "budget_flops" in table else np.full(len(table), np.nan)
    excluded = [{"run": label[i], "reason": reason[i], **_cell(table, loss, i)} for i in np.flatnonzero(~kept)]
    measured = {
        name: x
        for name in table.columns
        if (x := _numeric(table[name])) is not None and np.isfinite(x[kept]).all() and (x[kept] > 0).all()
    }
    measured.pop(target, None)
    if "_loss" in measured:
        measured["loss"] = measured.pop("_loss")
    warnings = (*notes, *_duplicates(table[kept], label[kept]))
    everything = Observations(measured, loss, weight, label, budget, source, convention, excluded, warnings, run_column)
    shared = _shared_error(table[kept], loss[kept]) if target == "loss" else None
    return replace(everything.take(kept), shared_error=shared)


def _shared_error(table: "pd.DataFrame", loss: np.ndarray) -> float | None:
    if not {"data", "loss_standard_error"} <= set(table.columns):
        return None
    error = _numeric(table["loss_standard_error"])
    known = np.zeros(len(loss), bool) if error is None else np.isfinite(error) & (error > 0)
    return float(error[known][loss[known].argmin()]) if known.any() else None  # type: ignore[index]  # it is known


# Columns of records whose values are kinds of losses, of which no two are points of one law. Another Python version is
# another default corpus; tokens after another run's are not all that a model has seen.
_KINDS = {
    "data": "on {} different datasets",
    "objective": "of {} different objectives",
    "started": "some of which start from another's weights, and some from none",
}


def _require_one_kind(table: "pd.DataFrame", source: str) -> None:
    for column, kinds in _KINDS.items():
        counts: Any = table[column].value_counts() if column in table else []
        if len(counts) > 1:
            found = "; ".join(f"{str(name)[:12]}: {count} runs" for name, count in counts.items())
            what = f"runs {kinds.format(len(counts))} ({found})"
            raise ValueError(f"{source}: {what}: fit the runs of one at a time")


def _untuned(table: "pd.DataFrame", loss: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Rows beaten by other hyperparameters on the same model, data and horizon.

    A sweep over learning rates is fitted at each cell's best setting (lowest mean loss over its seeds): a law of the
    mistuned is a law of the grid.
    """
    rows = table.loc[candidates, ["cell", "setting"]].assign(loss=loss[candidates])
    mean = rows.groupby(["cell", "setting"])["loss"].mean()
    best = set(mean.groupby("cell").idxmin())
    beaten = [pair not in best for pair in zip(table["cell"], table["setting"])]
    return candidates & np.array(beaten, dtype=bool)


def _named(table: "pd.DataFrame", source: str) -> tuple["pd.DataFrame", dict[str, list[Any]]]:
    """The table under this project's names, and the columns that could each be one of them."""
    if len(table) == 0:
        raise ValueError(f"{source}: no rows: nothing to fit")
    ambiguous = choose(table)[1]
    return canonical(table, source), ambiguous


def settings_of(columns: Sequence[str]) -> tuple[str, ...]:
    """Those of a law's columns that are of a training recipe: rows that differ in them are its runs, and tries of one
    cell to any other law."""
    return tuple(c for c in columns if words_of(str(c).rpartition(".")[2]) in RECIPE)


def _cells(table: "pd.DataFrame", fitted: np.ndarray, notes: list[str], used: Sequence[str]) -> "pd.DataFrame":
    """The table with ``cell`` and ``setting`` where runs of one size and horizon differ in their recipe alone.

    ``used``: columns that a law is of, which are no recipe.
    """
    recipe = [c for c in settings_of(table.columns) if c not in used]
    recipe = [c for c in recipe if table.loc[fitted, c].nunique() > 1]
    if "cell" in table or not recipe or not {"num_params", "num_tokens"} <= set(table.columns):
        return table
    by = [table[c].astype(str) for c in table.columns if words_of(c) in DATA]
    horizon = table.groupby(["num_params"])["num_tokens"].transform(_steps)
    cell = table.groupby([table["num_params"], horizon, *by], sort=False).ngroup()
    setting = table.groupby(recipe, sort=False, dropna=False).ngroup()
    tries = setting[fitted].groupby(cell[fitted]).nunique()
    if tries.max() < 2:
        return table
    notes.append(
        f"{(tries > 1).sum()} of {len(tries)} sizes and horizons were run with up to {tries.max()} settings of "
        f"{listed(recipe)}: the best of each (by mean loss) is fitted, the others are left out as untuned"
    )
    return table.assign(cell=cell, setting=setting)


def _steps(values: "pd.Series") -> np.ndarray:
    """Values nearer to one another than SAME_HORIZON as one."""
    order = np.argsort(values.to_numpy(), kind="stable")
    ranked = values.to_numpy(dtype=np.float64)[order]
    with np.errstate(all="ignore"):
        group = np.concatenate([[0], np.cumsum(ranked[1:] / ranked[:-1] > SAME_HORIZON)])
    out = np.empty(len(ranked), dtype=int)
    out[order] = group
    return out


def _convention(
    table: "pd.DataFrame", num_params: str, flops: str, source: str, need_size: bool = True
) -> tuple["pd.DataFrame", dict[str, str]]:
    """The columns num_params and flops under the conventions asked for, and a statement of them."""
    count, rule = f"num_params_{num_params}", f"flops_{flops}"
    counts = [c.removeprefix("num_params_") for c in table.columns if c.startswith("num_params_")]
    rules = [c.removeprefix("flops_") for c in table.columns if c.startswith("flops_") and c != "flops_per_s"]
    derived = "num_tokens" not in table and {"num_params", "flops"} <= set(table.columns)
    if derived and need_size:
        with np.errstate(all="ignore"):  # a size of zero is refused later, with its row
            tokens = _numbers(table, "flops", source) / (6.0 * _numbers(table, "num_params", source))
        table = table.assign(num_tokens=tokens)
    sized = "num_tokens" in table and ("num_params" in table or counts)
    if "loss" not in table or (need_size and not sized):
        missing = [c for c in ("num_params", "num_tokens", "loss") if c not in table]
        raise ValueError(
            f"{source}: column {', '.join(missing)} is missing (there is {listed(table.columns)}): write columns "
            f"num_params,num_tokens,loss (or N,D,loss){_hint(table, missing)}"
        )
    convention = {"num_params": "as given", "flops": "as given" if "flops" in table else "6ND"}
    if derived and need_size:
        convention["num_tokens"] = "C/6N"
    # A table with one count of its own may carry others beside it: they are asked for by name.
    if counts and (count in table or "num_params" not in table or num_params != "non_embedding"):
        if count not in table:
            raise ValueError(f"{source}: num_params is {num_params!r}: write one of {', '.join(counts)}")
        table = table.assign(num_params=table[count])
        convention["num_params"] = num_params
    if rules and (rule in table or "flops" not in table or flops != "exact"):
        if rule not in table:
            raise ValueError(f"{source}: flops is {flops!r}: write one of {', '.join(rules)}")
        table = table.assign(flops=table[rule])
        convention["flops"] = flops
    elif "flops" not in table and sized:
        product = _numbers(table, "num_params", source) * _numbers(table, "num_tokens", source)
        table = table.assign(flops=6.0 * product)
    if sized and (counts or "tokens_per_param" not in table):
        with np.errstate(all="ignore"):  # a size of zero is refused later, with its row
            ratio = _numbers(table, "num_tokens", source) / _numbers(table, "num_params", source)
        table = table.assign(tokens_per_param=ratio)  # of the count that was chosen
    return table, convention


def as_counted(table: "pd.DataFrame", convention: Mapping[str, str]) -> "pd.DataFrame":
    """Returns a table, all its rows, with ``num_params``, ``num_tokens`` and ``flops`` as ``convention`` counts them.

    ``convention`` is what ``from_table`` has said of the same table (fit.json's): records carry every count
    (``num_params_total``, ``flops_6ND`` …); a table of a person's one, under any of its aliases. Where it has no FLOPs
    they are 6 N D, where it has no tokens they are C / (6 N), as in the fit.
    """
    for old, (new, unit) in choose(table)[0].items():
        if new in MEASURED:
            table = table.rename(columns={old: new})
            table = table if unit == 1 else table.assign(**{new: table[new] * unit})
    for name in ("num_params", "flops"):
        counted = f"{name}_{convention.get(name)}"
        if counted in table:
            table = table.assign(**{name: table[counted]})
    if "num_tokens" not in table and {"num_params", "flops"} <= set(table.columns):
        table = table.assign(num_tokens=table["flops"] / (6.0 * table["num_params"]))
    if "flops" not in table:
        table = table.assign(flops=6.0 * table["num_params"] * table["num_tokens"])
    return table


def _hint(table: "pd.DataFrame", missing: list[str]) -> str:
    """What a column that is there could be renamed to."""
    other = {"bpb", "bpc", "bits", "ppl", "perplexity", "nll", "loss"}
    near = [c for c in table.columns if set(words_of(c).split("_")) & other]
    if missing == ["loss"] and near:
        return f"; if it is in {listed(near)}, rename that to loss (a perplexity: write its logarithm)"
    return ": rename those that hold them"


def _numeric(series: "pd.Series") -> np.ndarray | None:
    import pandas as pd

    if pd.api.types.is_bool_dtype(series) or not pd.api.types.is_numeric_dtype(series):
        return None
    return series.to_numpy(dtype=np.float64, na_value=np.nan)


def _numbers(table: "pd.DataFrame", column: str, source: str) -> np.ndarray:
    import pandas as pd

    x = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    text = np.flatnonzero(np.isnan(x) & table[column].notna().to_numpy())
    if len(text):
        value = table[column].iloc[text[0]]
        raise ValueError(f"{source}: row {text[0] + 1}: {column} is {value!r}: write a number")
    return x


def _check_positive(table: "pd.DataFrame", label: np.ndarray, source: str, may_be_negative: Sequence[str] = ()) -> None:
    for column in ("num_params", "num_tokens", "flops", "loss", "weight"):
        if column not in table:
            continue
        x = _numbers(table, column, source)
        if column in may_be_negative and np.isfinite(x).all():
            continue
        bad = np.flatnonzero(~(np.isfinite(x) & (x > 0)))
        if len(bad):
            raise ValueError(
                f"{source}: {label[bad[0]]}: {column} is {x[bad[0]]:g} ({len(bad)} such rows): write a positive "
                "number, or take the row out"
            )


def _cell(table: "pd.DataFrame", loss: np.ndarray, i: SupportsIndex) -> dict[str, Any]:
    row = {c: float(table[c].iloc[i]) for c in ("num_params", "num_tokens", "flops") if c in table}
    row["loss"] = float(loss[i])
    return {name: value if np.isfinite(value) else None for name, value in row.items()}


def _duplicates(table: "pd.DataFrame", label: np.ndarray) -> tuple[str, ...]:
    subset = [c for c in ("num_params", "num_tokens", "flops", "unique_tokens", "loss") if c in table]
    again = table.duplicated(subset=subset).to_numpy() & (len(subset) > 2)
    if not again.any():
        return ()
    return (f"{again.sum()} rows repeat another row's num_params, num_tokens and loss (first: {label[again][0]}); "
            "each counts as an observation of its own, so intervals are too narrow if they are copies",)  # fmt: skip
