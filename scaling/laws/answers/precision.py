"""How precisely the validation losses of a sweep are known, and how much held-out text would make them as precise as is
asked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    (``_of_blocks``), Σ w D and Σ w² SE² of a mixture. None where the two have no such parts in common.
    """
    if run.data.get("fingerprint") != other.data.get("fingerprint"):
        return None
    mine, theirs = run.loss_by_block, other.loss_by_block
    if not mine or not theirs or any(mine[k] != theirs[k] for k in ("source", "block", "weight", "num_tokens")):
        return None
    return _of_blocks(mine, np.array(mine["loss"]) - np.array(theirs["loss"]))


def shared_error(runs: Sequence[RunRecord]) -> float | None:
    """Standard error that the losses of all ``runs`` share: that of the run of the least loss, by parts of the text
    where they are known, else by windows. Exponents, optima and forecasts on the same text have no part of it."""
    known = [run for run in runs if run.loss is not None]
    if not known or len({run.data.get("fingerprint") for run in known}) > 1:
        return None
    best = min(known, key=lambda run: run.loss)  # type: ignore[arg-type, return-value]  # it has one
    if best.loss_by_block is not None:
        told = _of_blocks(best.loss_by_block, np.array(best.loss_by_block["loss"]))
        if told is not None:
            return told[1]
    return best.loss_standard_error


def _of_blocks(blocks: Mapping[str, Any], value: np.ndarray) -> tuple[float, float] | None:
    """(Σ w mean, its standard error) of values by part; None where a source has fewer than two parts.

    Parts are stretches of the text one after another, so that a long document lies in several: to Σ u², u = n (value -
    mean), the products of neighbours are added, 2 (1 - k / (K + 1)) Σ u_b u_b+k for k up to K, the cube root of the
    number of parts (Newey and West 1987), where that is more.
    """
    source = np.array(blocks["source"])
    n, weight = np.array(blocks["num_tokens"]), np.array(blocks["weight"])
    total, variance = 0.0, 0.0
    for s in np.unique(source):
        here = source == s
        B = int(here.sum())
        if B < 2:
            return None
        mean = float(np.average(value[here], weights=n[here]))
        u = n[here] * (value[here] - mean)
        alone = float(np.square(u).sum())
        reach = round(B ** (1 / 3))
        shared = sum(2 * (1 - k / (reach + 1)) * float((u[k:] * u[:-k]).sum()) for k in range(1, min(reach, B - 1) + 1))
        spread = max(alone, alone + shared) / float(n[here].sum()) ** 2
        w = float(weight[here][0])
        total, variance = total + w * mean, variance + w**2 * B / (B - 1) * spread
    return total, math.sqrt(variance)


def _largest_difference(runs: Sequence[RunRecord]) -> float | None:
    known = [run for run in runs if run.loss is not None]
    if not known:
        return None
    best = min(known, key=lambda run: run.loss)  # type: ignore[arg-type, return-value]  # it has one
    errors = [told[1] for run in known if run is not best and (told := difference(run, best))]
    return max(errors, default=None)


def _splits(run: RunRecord) -> list[tuple[str, int, float | None]]:
    """(source, tokens that carry loss, standard error) of each split that the run was validated on."""
    parts = run.data.get("sources")
    if parts:
        found = [
            (part["source"], part.get("num_eval_tokens", part["validation_tokens"]), part.get("standard_error"))
            for part in parts
        ]
    else:
        found = [(run.data.get("source") or "the data", run.num_eval_tokens, run.loss_standard_error)]
    return [(name, num, _of_source(run, s) or by_windows) for s, (name, num, by_windows) in enumerate(found)]


def _of_source(run: RunRecord, source: int) -> float | None:
    """Standard error of the loss on one source by the parts of its text; None where there are no two."""
    blocks = run.loss_by_block
    if blocks is None:
        return None
    here = np.array(blocks["source"]) == source
    mine = {name: np.array(column)[here] for name, column in blocks.items()} | {"weight": np.ones(here.sum())}
    told = _of_blocks(mine, mine["loss"]) if here.any() else None
    return None if told is None else told[1]


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
