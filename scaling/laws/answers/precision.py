"""How precisely the validation losses of a sweep are known, and how much held-out text would make them as precise as is
asked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling import parts
from scaling.numbers import compact
from scaling.records import RunRecord, loss_unit

ASKED = 0.002  # nats: a standard error that no difference of interest between cells is lost in


def of(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A row for each source that ``runs`` were validated on; of a mixture every source has its own split, and its row.

    Each: ``source``, ``fingerprint``, ``num_tokens`` held out that carry loss (pairs, where it is of these),
    ``standard_error`` (the largest of any completed run's, in ``unit``), ``enough`` (whether it is at most ``ASKED``)
    and ``tokens_needed``, the split of this kind of text whose standard error would be ``ASKED``: it falls as n^-1/2.
    It is by the parts of the text, and what neighbouring ones share, where records have losses by them: windows of one
    document are hard or easy together, and taken as independent they say a tenth of it (.006 nats for .06 over 517K
    bytes of Python). ``difference`` is the largest standard error of a difference to the run of the least loss
    (``difference``), all sources together; None where records have no losses by block.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for source, num_tokens, error in _splits(run):
            if error is None or not num_tokens:
                continue
            key = (source, run.data.get("fingerprint"))
            row = found.setdefault(key, {"num_tokens": num_tokens, "standard_error": 0.0})
            row["standard_error"] = max(row["standard_error"], error)
    return [
        {
            "source": source,
            "fingerprint": fingerprint,
            **row,
            "difference": _largest_difference([run for run in runs if run.data.get("fingerprint") == fingerprint]),
            "unit": loss_unit(runs),
            "enough": row["standard_error"] <= ASKED,
            "tokens_needed": math.ceil(row["num_tokens"] * (row["standard_error"] / ASKED) ** 2),
        }
        for (source, fingerprint), row in found.items()
    ]


def difference(run: RunRecord, other: RunRecord) -> tuple[float, float] | None:
    """Loss of ``run`` less that of ``other``, and its standard error, from the same parts of the same validation text.

    What both find hard in a part of the text is in neither's favour: with d_b the difference in part b of n_b tokens,
    D = Σ n d / Σ n and SE² = B/(B-1) Σ n² (d - D)² / (Σ n)² (Cochran 1977, §6.3) with what neighbouring parts share
    (``parts.mean_and_standard_error``), Σ w D and Σ w² SE² of a mixture. None where they have no such parts in common.
    """
    if run.data.get("fingerprint") != other.data.get("fingerprint"):
        return None
    mine, theirs = run.loss_by_block, other.loss_by_block
    if not mine or not theirs or any(mine[k] != theirs[k] for k in ("source", "block", "weight", "num_tokens")):
        return None
    return parts.mean_and_standard_error(mine, np.array(mine["loss"]) - np.array(theirs["loss"]))


def _largest_difference(runs: Sequence[RunRecord]) -> float | None:
    known = [run for run in runs if run.loss is not None]
    if not known:
        return None
    best = min(known, key=lambda run: run.loss)  # type: ignore[arg-type, return-value]  # it has one
    errors = [told[1] for run in known if run is not best and (told := difference(run, best))]
    return max(errors, default=None)


def _splits(run: RunRecord) -> list[tuple[str, int, float | None]]:
    """(source, tokens that carry loss, standard error) of each split that the run was validated on."""
    sources = run.data.get("sources")
    if sources:
        found = [
            (part["source"], part.get("num_eval_tokens", part["validation_tokens"]), part.get("standard_error"))
            for part in sources
        ]
    else:
        found = [(run.data.get("source") or "the data", run.num_eval_tokens, run.loss_standard_error)]
    # Records of before came with the error of windows as if they were independent, beside the losses of the parts.
    told = [parts.of_source(run.loss_by_block, s) for s in range(len(found))]
    return [
        (name, num, by_windows if own is None else max(by_windows or 0.0, own[1]))
        for (name, num, by_windows), own in zip(found, told)
    ]


def _counted(unit: str) -> str:
    """What a loss of this unit is a mean over: tokens, pairs."""
    return unit.removeprefix("nats per ") + "s" if unit.startswith("nats per ") else "tokens"


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One for each of ``of``'s rows whose validation split is too small to know losses as precisely as is asked."""
    return [
        f"validation losses on {row['source']} have a standard error of up to {row['standard_error']:.4f} "
        f"{row['unit']}, from {compact(row['num_tokens'])} held-out {_counted(row['unit'])}, the same for all runs; it "
        f"would take about {compact(row['tokens_needed'])} to bring it to {ASKED:g}{_of_difference(row)}"
        for row in rows
        if not row["enough"]
    ]


def _of_difference(row: Mapping[str, Any]) -> str:
    if row.get("difference") is None:
        return ""
    return f"; a difference of two runs, part by part of the same text, is known to {row['difference']:.4f} or better"
