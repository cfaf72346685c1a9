"""What a sweep over learning rates found: the best rate of each cell, and whether it lies inside the range tried."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from scaling.numbers import compact
from scaling.records import RunRecord


def cells(runs: Sequence[RunRecord], fewest: int = 3) -> list[dict[str, Any]]:
    """Cells, that is runs equal in all but peak_lr and seed, that tried at least ``fewest`` rates.

    Each: name, num_params, num_tokens, batch_tokens, rates, losses (mean over seeds; null where every seed diverged),
    best (rate or null) and interior: whether a lower and a higher rate were tried. A higher one that diverged counts.
    """
    groups: dict[str, dict[float, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.status != "failed":
            optim = {k: v for k, v in run.config["optim"].items() if k != "peak_lr"}
            key = json.dumps({**run.config, "optim": optim, "seed": None}, sort_keys=True)
            groups[key][run.config["optim"]["peak_lr"]].append(run)
    found = [_cell(by_rate) for by_rate in groups.values() if len(by_rate) >= fewest]
    found.sort(key=lambda c: (c["num_params"], c["num_tokens"], c["batch_tokens"]))
    # Two digits: batches of other sizes round a horizon to other whole steps.
    names = [compact(float(f"{c['num_tokens']:.1e}")) for c in found]
    if len({(c["num_params"], name) for c, name in zip(found, names)}) < len(found):
        names = [f"{name}, batch {c['batch_tokens']}" for c, name in zip(found, names)]
    return [{"name": name, **cell} for name, cell in zip(names, found)]


def _cell(by_rate: Mapping[float, Sequence[RunRecord]]) -> dict[str, Any]:
    rates = sorted(by_rate)
    known = [[r.loss for r in by_rate[rate] if r.loss is not None] for rate in rates]
    losses = [sum(seeds) / len(seeds) if seeds else None for seeds in known]
    best = min((loss, rate) for loss, rate in zip(losses, rates) if loss is not None)[1] if any(known) else None
    first = by_rate[rates[0]][0]
    return {
        "num_params": first.num_params["non_embedding"],
        "num_tokens": max(r.num_tokens for runs in by_rate.values() for r in runs),  # a diverged run stopped short
        "batch_tokens": first.batch_tokens,
        "rates": rates,
        "losses": losses,
        "best": best,
        "interior": best is not None and rates[0] < best < rates[-1],
    }
