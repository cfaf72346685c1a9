"""How precisely the validation losses of a sweep are known, and how much held-out text would make them as precise as is
asked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scaling.numbers import compact
from scaling.records import RunRecord, loss_unit

ASKED = 0.002  # nats: a standard error that no difference of interest between cells is lost in


def of(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A row for each source that ``runs`` were validated on; of a mixture every source has its own split, and its row.

    Each: ``source``, ``fingerprint``, ``num_tokens`` held out that carry loss (pairs, where it is of these),
    ``standard_error`` (the largest of any completed run's, in ``unit``), ``enough`` (whether it is at most ``ASKED``)
    and ``tokens_needed``, the split of this kind of text whose standard error would be ``ASKED``: it falls as n^-1/2.
    Windows are taken as independent, which those of one document are not quite: the standard error, and what is needed,
    are at the least these.
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
            "unit": loss_unit(runs),
            "enough": row["standard_error"] <= ASKED,
            "tokens_needed": math.ceil(row["num_tokens"] * (row["standard_error"] / ASKED) ** 2),
        }
        for (source, fingerprint), row in found.items()
    ]


def _splits(run: RunRecord) -> list[tuple[str, int, float | None]]:
    """(source, tokens that carry loss, standard error) of each split that the run was validated on."""
    parts = run.data.get("sources")
    if parts:
        return [
            (part["source"], part.get("num_eval_tokens", part["validation_tokens"]), part.get("standard_error"))
            for part in parts
        ]
    return [(run.data.get("source") or "the data", run.num_eval_tokens, run.loss_standard_error)]


def _counted(unit: str) -> str:
    """What a loss of this unit is a mean over: tokens, pairs."""
    return unit.removeprefix("nats per ") + "s" if unit.startswith("nats per ") else "tokens"


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One for each of ``of``'s rows whose validation split is too small to know losses as precisely as is asked."""
    return [
        f"validation losses on {row['source']} have a standard error of up to {row['standard_error']:.4f} "
        f"{row['unit']}, from {compact(row['num_tokens'])} held-out {_counted(row['unit'])}, the same for all runs; it "
        f"would take about {compact(row['tokens_needed'])} to bring it to {ASKED:g}"
        for row in rows
        if not row["enough"]
    ]
