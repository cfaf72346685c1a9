"""What is read of a table whose groups are compared: their rows, and which of these are of one cell."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.answers import allocation
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.approaches import select
from scaling.laws.forms import catalogue
from scaling.laws.forms.joint import indicator
from scaling.laws.forms.law import Form
from scaling.laws.tables.observations import Observations, from_table

if TYPE_CHECKING:
    import pandas as pd

SAME_SIZE = 0.01  # sizes and horizons that differ by less, in log, are those of one cell
# The law where the table has that column alone.
OF_ONE = {"flops": "kaplan_c_offset", "num_tokens": "kaplan_d_offset", "num_params": "kaplan_n_offset"}


def values_of(table: "pd.DataFrame", column: str, source: str) -> dict[str, Any]:
    """The values of the compared column by their names, in order. Raises ValueError unless there are two or more."""
    if column not in table:
        raise ValueError(f"{source}: compare is {column!r}, which is no column (there is {', '.join(map(str, table))})")
    missing = table[column].isna()
    if missing.any():
        raise ValueError(f"{source}: row {int(np.argmax(missing)) + 1} has no {column}: write one, or take the row out")
    values = {str(value): value for value in table[column].unique()}
    if len(values) < 2:
        raise ValueError(
            f"{source}: {column} is {next(iter(values))} in every row: nothing to compare; write a column that tells "
            "the runs apart"
        )
    return values


def comparable(table: "pd.DataFrame", source: str) -> tuple["pd.DataFrame", str]:
    """The table with the loss that its groups have in common as ``loss``, and its unit.

    Raises ValueError where they have none: of other objectives, on other text, or per token of other tokenizers without
    bits per byte.
    """
    done = table[table["status"] == "completed"] if "status" in table else table

    def kinds(name: str) -> list[str]:
        return [str(v)[:40] for v in done[name].dropna().unique()] if name in done else []

    if len(found := kinds("objective")) > 1:
        raise ValueError(
            f"{source}: losses of {' and '.join(found)} do not measure the same thing: compare runs of one objective, "
            "or write as loss what means the same of all, such as a task's error rate"
        )
    if len(kinds("started")) > 1:
        raise ValueError(
            f"{source}: some runs start from another's weights, whose compute is not in theirs: compare runs that all "
            "start so, or none"
        )
    if len(texts := kinds("data_source") or kinds("data")) > 1:
        raise ValueError(f"{source}: losses on {' and '.join(texts)} are of other text: compare runs validated on one")
    tokenizers = kinds("tokenizer")
    if len(tokenizers) < 2:
        if len(states := kinds("data")) > 1:
            raise ValueError(
                f"{source}: losses on {len(states)} states of {texts[0]} ({' and '.join(x[:12] for x in states)}): "
                "compare runs validated on one"
            )
        return table, next(iter(kinds("loss_unit")), "nats per token")
    bits = next((c for c in ("bits_per_byte", "bpb") if c in done), None)
    if bits is None or not (done[bits] > 0).all():
        raise ValueError(
            f"{source}: losses per token of {' and '.join(tokenizers)} do not compare, their tokens are of other "
            "lengths: compare bits per byte, in a column bits_per_byte"
        )
    return table.assign(loss=table[bits]), "bits per byte"


def form_of(table: "pd.DataFrame", law: "str | Form | None", source: str) -> Form:
    """The law that is asked for, or the usual one of the table's columns. Raises ValueError for one that cannot be."""
    sized = any(str(c).startswith("num_params") for c in table)
    if law is None:
        law = "chinchilla" if sized else OF_ONE["flops" if "flops" in table else "num_tokens"]
    form = catalogue.get(law)
    ones = {name: np.ones(1) for name in form.parameters}
    of_both = set(form.columns) == {"num_params", "num_tokens"} and form.powers is not None
    of_one = len(form.columns) == 1 and form.columns[0] in OF_ONE and form.powers is not None
    if not (of_one or (of_both and allocation.exponents(form, ones) is not None)):
        raise ValueError(
            f"{source}: no multiplier by {form.name}, which is not a power of N and one of D, or one alone: write "
            f"--law chinchilla, chinchilla_tied or {', '.join(OF_ONE.values())}"
        )
    return form


def axis_of(form: Form) -> str:
    return form.columns[0] if len(form.columns) == 1 else "flops"


def rows_of(part: "pd.DataFrame", form: Form, source: str, reading: Mapping[str, Any]) -> Observations:
    """The rows of one group that are fitted. Raises ValueError where they are too few for its amplitudes."""
    found = from_table(part, **reading, source=source, columns=form.columns, sized=len(form.columns) > 1)
    if {"num_params", "num_tokens"} <= set(found.columns):
        found = found.take(select(found, form)[0])
    needed = len(form.powers.terms) + 1  # type: ignore[union-attr]  # a sum of powers
    if len(found) < needed:
        what = "amplitude" if needed == 2 else f"{needed - 1} amplitudes"
        raise ValueError(f"{source}: {len(found)} fitted runs, too few for its {what}: {needed} or more are needed")
    return found


def cost_of_rows(observations: Observations, form: Form) -> Cost | None:
    """What a token costs in this group; None of a law of one column. Raises ValueError for FLOPs that are none."""
    if len(form.columns) == 1:
        return None
    columns = observations.columns
    cost = allocation.cost_of(columns["num_params"], columns["num_tokens"], columns["flops"])
    if cost.problem:
        raise ValueError(f"{observations.source}: no compute multiplier: {cost.problem}")
    return cost


def together(parts: Sequence[Observations], source: str) -> Observations:
    """All groups' rows, with the columns that say whose each is."""
    shared = [c for c in parts[0].columns if all(c in o.columns for o in parts)]
    columns = {c: np.concatenate([o.columns[c] for o in parts]) for c in shared}
    member = member_of(parts)
    columns |= {indicator(k): np.where(member == k, np.e, 1.0) for k in range(1, len(parts))}
    rows: dict[str, Any] = {
        name: np.concatenate([getattr(o, name) for o in parts]) for name in ("loss", "weight", "run", "budget")
    }
    return Observations(
        columns=columns,
        **rows,
        source=source,
        convention=parts[0].convention,
        excluded=[row for o in parts for row in o.excluded],
        warnings=tuple(dict.fromkeys(w for o in parts for w in o.warnings)),
        run_column=parts[0].run_column,
    )


def member_of(parts: Sequence[Observations]) -> np.ndarray:
    """Which group each row of ``together`` is of, (n,)."""
    return np.repeat(np.arange(len(parts)), [len(o) for o in parts])


def cells_of(parts: Sequence[Observations], together: Observations) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each row (n,), by number, and whether all groups have it, (n,). A row without partners is a cell of
    its own.

    Rows are of one cell where they agree in size and horizon, or, of records whose groups count other sizes at one
    width, in width and budget. Seeds of one cell are drawn together.
    """
    member, n = member_of(parts), len(together)
    cells, most = np.arange(n), np.zeros(n, dtype=bool)
    budget = together.budget if np.isfinite(together.budget).all() else None
    size = [together.columns[c] for c in ("num_params", "num_tokens") if c in together.columns]
    keys = [size or [together.columns["flops"]]]
    if "d_model" in together.columns:
        horizon = budget if budget is not None else together.columns["num_tokens"]
        keys.append([together.columns["d_model"], horizon])
    for key in keys:
        place = np.unique([_numbered(x) for x in key], axis=1, return_inverse=True)[1].ravel()
        seen = np.zeros((place.max() + 1, len(parts)), dtype=bool)
        seen[place, member] = True
        paired = np.asarray(seen.all(axis=1))[place]
        if paired.sum() > most.sum():
            cells, most = np.where(paired, place, place.max() + 1 + np.arange(n)), paired
    return cells, most


def _numbered(x: np.ndarray) -> np.ndarray:
    """Numbers values so that those nearer than ``SAME_SIZE`` to the next are one."""
    order = np.argsort(x, kind="stable")
    out = np.empty(len(x), dtype=int)
    out[order] = np.cumsum(np.diff(np.log(x[order]), prepend=np.log(x[order[0]])) > SAME_SIZE)
    return out
