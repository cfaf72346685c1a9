"""Names and words of trackers → the columns a law is fitted to, with a note of everything that was mapped.

A measured column (parameters, tokens, FLOPs, loss) is never chosen among several that differ: ``ambiguous`` names them
and whoever needs the column refuses. A name may carry its unit (``params (M)``, ``tokens_b``, ``total_gflops``).
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.tables.reading import NOTES, is_empty, listed, parse

if TYPE_CHECKING:
    import pandas as pd

# First rank: the name itself. Second: the letters and short names of the field. Third: what trackers and scripts write.
ALIASES = {
    "N": "num_params", "params": "num_params", "D": "num_tokens", "tokens": "num_tokens", "L": "loss", "C": "flops",
    "U": "unique_tokens", "name": "run", "run_name": "run", "run_id": "run", "batch": "batch_size",
}  # fmt: skip
VARIANTS = {
    "num_params": """n_params nparams num_parameters n_parameters nparameters parameters parameter_count param_count
        params_count number_of_parameters number_of_params model_params model_parameters model_size total_params
        params_total total_parameters n_params_total non_embedding_params params_non_embedding non_embedding_parameters
        nonembedding_params params_no_embed params_non_embed n_params_non_embedding num_scaling_params scaling_params
        trainable_params active_params num_param nb_params""",
    "num_tokens": """n_tokens ntokens training_tokens train_tokens tokens_trained tokens_seen total_tokens token_count
        number_of_tokens num_train_tokens n_train_tokens num_training_tokens trained_tokens seen_tokens tokens_total
        tokens_processed tokens_consumed consumed_tokens consumed_train_tokens total_train_tokens total_training_tokens
        dataset_tokens data_tokens""",
    "flops": """flop total_flops total_flop train_flops train_flop training_flops training_flop num_flops compute_flops
        flops_budget flop_budget compute_budget compute total_compute training_compute train_compute""",
    "unique_tokens": "num_unique_tokens n_unique_tokens unique_token_count",
    "run": "job_name experiment_name exp_name",
    "status": "state run_state run_status",
    "holdout": "held_out heldout hold_out is_holdout is_held_out is_heldout",
}
_THIRD = {variant: name for name, variants in VARIANTS.items() for variant in variants.split()}
NAMES = "names"
MEASURED = ("num_params", "num_tokens", "flops", "unique_tokens", "loss")
KNOWN = {*ALIASES.values(), *VARIANTS, "loss", "weight"}
# A name's unit: what one of it is in parameters, tokens or FLOPs. A petaflop/s-day is 8.64e19 (Kaplan et al. 2020).
UNITS = {
    "ones": 1.0, "k": 1e3, "thousand": 1e3, "thousands": 1e3, "m": 1e6, "mn": 1e6, "million": 1e6, "millions": 1e6,
    "b": 1e9, "bn": 1e9, "billion": 1e9, "billions": 1e9, "t": 1e12, "trillion": 1e12, "trillions": 1e12, "pf_days":
    8.64e19, "pfs_days": 8.64e19, "pfdays": 8.64e19, "petaflop_days": 8.64e19, "petaflop_s_days": 8.64e19, "pf_day":
    8.64e19,
}  # fmt: skip
PREFIXED = {"gflops": 1e9, "tflops": 1e12, "pflops": 1e15, "eflops": 1e18, "zflops": 1e21}
OF_FLOPS = UNITS | PREFIXED | {name.removesuffix("s"): size for name, size in PREFIXED.items()}
PF_DAY = UNITS["pf_day"]
OF_FLOPS |= dict.fromkeys(("pflop_s_days", "pflop_s_day", "pflops_days", "pflop_days", "petaflop_s_day"), PF_DAY)
MAX_IN_UNIT = 1e6
IN_BITS = float(np.log(2.0))  # nats in a bit: a loss is in nats here
# Words of a loss on held-out text, and words that say a column is about the loss but is not it.
HELD_OUT = {"val", "valid", "validation", "eval", "evaluation", "test", "dev", "heldout", "held", "out"}
PLAIN = HELD_OUT | {"loss", "final", "last", "best", "mean", "avg", "lm", "ce", "summary", "metrics", "nats", "min"}
NOT_THE_LOSS = {
    "se", "std", "stderr", "sem", "error", "err", "standard", "lower", "upper", "ci", "aux", "auxiliary", "balance",
    "load", "router", "z", "kl", "reg", "weight", "scale", "ratio", "teacher", "spike", "spikes", "least", "delta",
    "gap", "normalized", "name", "type", "fn", "function", "initial", "predicted", "pred", "fitted", "max", "var",
    "variance",
}  # fmt: skip
DONE = {"completed", "complete", "finished", "done", "success", "successful", "succeeded", "ok"}
NOT_DONE = {
    "failed", "fail", "crashed", "killed", "running", "diverged", "pending", "queued", "preempted", "preempting",
    "stopped", "cancelled", "canceled", "timeout", "oom", "error", "aborted", "interrupted", "nan", "scheduled",
}  # fmt: skip
YES = {"yes", "y", "true", "t", "1", "1.0", "holdout", "held_out", "heldout", "held out", "held-out", "x"}
NO = {"no", "n", "false", "f", "0", "0.0", "train", "fit", "fitted", ""}
FITTED = {"train", "training", "fit", "fitted", "candidate", "in-sample", "in_sample"}
FORECAST = {
    "holdout", "held_out", "heldout", "held out", "held-out", "hold-out", "test", "target", "forecast", "extrapolation",
    "val", "valid", "validation", "eval", "evaluation",
}  # fmt: skip


def words_of(name: Any) -> str:
    """A name in lower case, its words joined by _: "Val Loss", "valLoss" and "val-loss" are val_loss."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", str(name))
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def meaning(name: Any) -> tuple[str, int, float] | None:
    """What a column's name says it is, as (column, rank, unit); None for any other (a loss: see ``losses``)."""
    text = str(name).strip()
    if text in KNOWN:
        return text, 0, 1.0
    if text in ALIASES:
        return ALIASES[text], 1, 1.0
    *path, last = re.split(r"[/.](?![^(\[]*[)\]])", text)  # not within a bracket: compute (PFLOP/s-days)
    if {words_of(p) for p in path} & (HELD_OUT | {"dataset", "teacher"}):
        return None
    bracket = re.fullmatch(r"(.*?)\s*[(\[](.*)[)\]]", last)
    for bare, unit in ((last, ""), *([(bracket[1], words_of(bracket[2]).removeprefix("in_"))] if bracket else [])):
        word = words_of(bare)
        if not unit and not bracket and not path and bare == text and (split := _unit_of(word, bare)):
            word, unit, bare = split
        found = bare if bare in ("N", "D", "C", "U") else word
        of_flops = (ALIASES.get(found) or _THIRD.get(found) or found) == "flops"
        units = OF_FLOPS if of_flops else UNITS
        factor = 1.0 if unit in ("", "flops", "flop", "total", "train", "training") else units.get(unit)
        if factor is None and of_flops and (power := re.fullmatch(r"1e_?(\d+)(_flops?)?", unit)):
            factor = 10.0 ** int(power[1])
        for prefix, size in PREFIXED.items():
            if word in (f"total_{prefix}", f"train_{prefix}", f"training_{prefix}"):
                return "flops", 2, size
        if OF_FLOPS.get(word) == PF_DAY:  # the unit is the name: pf_days
            return "flops", 2, PF_DAY
        if factor is not None:
            known = ALIASES.get(found) or _THIRD.get(found) or (found if found in KNOWN and found != "loss" else None)
            if known and (factor == 1.0 or known in MEASURED[:4]):
                return known, 2, factor
    return None


def _unit_of(word: str, name: str) -> tuple[str, str, str] | None:
    """A trailing unit of a name: params_m, N_B, compute_pf_days."""
    for unit in sorted(OF_FLOPS, key=len, reverse=True):
        if word.endswith(f"_{unit}"):
            return word[: -len(unit) - 1], unit, name[: -len(unit) - 1]
    return None


def says_ones(name: Any) -> bool:
    """Whether a column's name says that it counts single parameters or tokens: num_params_ones, params (ones)."""
    return words_of(name).endswith("_ones")


def losses(names: list[Any]) -> list[Any]:
    """Columns that could be the loss, where none is called so."""
    found = []
    for name in names:
        words = set(words_of(name).split("_"))
        if ("loss" in words or words_of(name) in ("cross_entropy", "xent", "nll")) and not words & NOT_THE_LOSS:
            found.append(name)
    return found


def unread(names: list[Any]) -> list[Any]:
    """Columns called training FLOPs in a unit that is not known: of ``compute (xyz)``, which nobody would miss."""
    found = []
    for name in names:
        bracket = re.fullmatch(r"\s*(.*?)\s*[(\[].*[)\]]\s*", str(name))
        if bracket and not meaning(name) and (known := meaning(bracket[1])) and known[0] == "flops":
            found.append(name)
    return found


def choose(table: "pd.DataFrame") -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Which column stands for which: ({old: (new, unit)}, {new: columns that differ and could all be it})."""
    found: dict[str, list[Any]] = {}
    for name in table.columns:
        if known := meaning(name):
            found.setdefault(known[0], []).append((known[1], name, known[2]))
    candidates = losses([c for c in table.columns if not meaning(c)])
    if "loss" not in found:
        found["loss"] = [(2, name, IN_BITS if "bits" in words_of(name).split("_") else 1.0) for name in candidates]
    chosen, ambiguous = {}, {}
    for new, options in found.items():
        best = min((rank for rank, *_ in options), default=0)
        first = [(name, unit) for rank, name, unit in options if rank == best]
        same = all(unit == first[0][1] and _equal(table[name], table[first[0][0]]) for name, unit in first)
        if first and (same or new == "run"):
            chosen[first[0][0]] = (new, first[0][1])
        elif first:
            ambiguous[new] = [name for name, _ in first]
    taken = next((old for old, (new, _) in chosen.items() if new == "loss"), None)
    if taken is not None and meaning(taken):
        others = [
            c for c in candidates
            if set(words_of(c).split("_")) <= PLAIN and set(words_of(c).split("_")) & HELD_OUT
            and not _equal(table[c], table[taken])
        ]  # fmt: skip
        if others:
            ambiguous["loss"] = [taken, *others]
    return chosen, ambiguous


def _equal(a: "pd.Series", b: "pd.Series") -> bool:
    return a is b or a.equals(b)


def canonical(table: "pd.DataFrame", source: str = "table") -> "pd.DataFrame":
    """A table under the names of this project, its numbers numbers and its words read, with ``attrs["notes"]`` and, in
    ``attrs["names"]``, what each renamed column was called.

    Done twice it is done once. Raises ValueError on a word of ``holdout``, ``split`` or ``status`` that is not known,
    and on training FLOPs in a unit that is not.
    """
    notes = list(table.attrs.get(NOTES, ()))
    if table.columns.nlevels > 1:
        raise ValueError(f"{source}: its columns have {table.columns.nlevels} levels: write one, as loss, num_params")
    if twice := list(table.columns[table.columns.duplicated()].unique()):
        raise ValueError(f"{source}: column {listed(twice)} is there twice: drop one")
    chosen, _ = choose(table)
    if lost := [] if "flops" in {new for new, _ in chosen.values()} else unread(list(table.columns)):
        raise ValueError(
            f"{source}: {listed(lost)}: training FLOPs in a unit that is not known: write FLOPs, GFLOPs … ZFLOPs, "
            "PF-days or 1e18 in the bracket, or rename the column if it is something else"
        )
    table = table.copy()
    mapped = []
    for old, (new, unit) in chosen.items():
        if new in MEASURED:
            table[old] = _numbers(table[old], unit, old, source)
            if new == "loss" and unit != 1 and "loss_standard_error" in table:
                table["loss_standard_error"] = _numbers(table["loss_standard_error"], unit, old, source)
            if unit != 1 and new not in ("flops", "loss"):
                _require_in_unit(table[old], unit, old, source)
        if old != new:
            mapped.append(f"{old} as {new}" + (f" × {unit:g}" if unit != 1 else ""))
    names = {old: new for old, (new, _) in chosen.items() if old != new}
    table = table.rename(columns=names)
    if any(meaning(old)[1] > 1 if meaning(old) else True for old in names):  # type: ignore[index]  # has one
        notes.append(f"columns read under other names: {', '.join(mapped)}")
    if "status" in table:
        table["status"] = _status(table["status"], source)
    if "holdout" in table:
        table["holdout"] = _holdout(table["holdout"], source)
    elif "split" in table:
        table = _split(table, notes, source)
    table.attrs[NOTES] = tuple(dict.fromkeys(notes))
    table.attrs[NAMES] = table.attrs.get(NAMES, {}) | {new: str(old) for old, new in names.items()}
    return table


def _numbers(series: "pd.Series", unit: float, name: Any, source: str) -> "pd.Series":
    """A measured column as numbers, times its unit; text that is none is left for its row to be named."""
    import pandas as pd

    values = series
    if not pd.api.types.is_numeric_dtype(series):
        found = [parse(x) for x in series]
        if any(x is None for x in found):
            if unit == 1.0:
                return series
            row = next(i for i, x in enumerate(found) if x is None)
            raise ValueError(f"{source}: row {row + 1}: {name} is {series.iloc[row]!r}: write a number")
        values = pd.Series(found, index=series.index, dtype=float)
    return values if unit == 1.0 else values * unit


def _require_in_unit(values: "pd.Series", unit: float, name: Any, source: str) -> None:
    """A column named in millions that holds 53300000 is in ones."""
    middle = values.median() / unit
    if middle > MAX_IN_UNIT:
        raise ValueError(
            f"{source}: {name} says × {unit:g} and its middle value is {middle:g}: rename it without the unit, or "
            "write values in it"
        )


def _status(series: "pd.Series", source: str) -> "pd.Series":
    words = [x.strip().lower() if isinstance(x, str) else x for x in series]
    for i, word in enumerate(words):
        if word not in DONE | NOT_DONE:
            raise ValueError(
                f"{source}: row {i + 1}: status is {series.iloc[i]!r}: write finished, failed, crashed, killed, "
                "running or diverged, or rename the column"
            )
    return _series(["completed" if word in DONE else word for word in words], series)


def _holdout(series: "pd.Series", source: str) -> "pd.Series":
    out = []
    for i, value in enumerate(series):
        word = "" if is_empty(value) else str(value).strip().lower()
        if word not in YES | NO:
            raise ValueError(f"{source}: row {i + 1}: holdout is {value!r}: write yes or no")
        out.append(word in YES)
    return _series(out, series)


def _split(table: "pd.DataFrame", notes: list[str], source: str) -> "pd.DataFrame":
    """``split`` as holdout, where its words are of runs fitted and runs forecast."""
    words = ["" if is_empty(x) else str(x).strip().lower() for x in table["split"]]
    known = set(words)
    if len(known) == 1:
        return table
    if not known <= FITTED | FORECAST or not known & FITTED:
        raise ValueError(
            f"{source}: is split ({listed(sorted(known))}) what is fitted and what is held out? write train and "
            "holdout in it, or rename the column"
        )
    held = np.array([word in FORECAST for word in words])
    keys = [c for c in ("run", "num_params", "num_tokens") if c in table and c != "run"]
    if len(keys) == 2:
        sides = table.assign(_held=held).groupby(keys)["_held"].nunique()
        if (sides > 1).any() and "group" not in table:
            raise ValueError(
                f"{source}: split has one num_params and num_tokens on both sides ({listed(sorted(known))}): if it "
                "says what a loss was measured on, keep the rows of one and rename the column"
            )
    notes.append(f"split is read as holdout: {listed(sorted(known & FORECAST))} held out, {held.sum()} runs")
    return table.assign(holdout=held)


def _series(values: list[Any], like: "pd.Series") -> "pd.Series":
    import pandas as pd

    return pd.Series(values, index=like.index)
