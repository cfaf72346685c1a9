"""The critical batch of a sweep's own runs, for the question of a deadline."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.fitting.estimate import Fit, fit
from scaling.laws.forms import catalogue
from scaling.laws.tables.columns import canonical
from scaling.laws.tables.observations import SAME_HORIZON, Observations, as_counted, from_table

if TYPE_CHECKING:
    import pandas as pd

LAW = "finite_batch"
# Of one size and horizon: with fewer batches, or nearer ones, the law's bend is not seen apart from its noise.
MIN_BATCHES, MIN_RANGE, MIN_CELLS = 3, 4.0, 2
BATCH = ("b", "gamma")
RATES = ("peak_lr", "learning_rate", "lr", "max_lr")


def fitted(table: "pd.DataFrame", found: Observations) -> tuple[Fit, tuple[str, ...]]:
    """Fits L(N, D, batch) (``finite_batch``) to runs whose batches were varied; returns it and what is doubtful of it.

    Of each size, horizon and batch the best of the rates that were tried is taken.

    Args:
      table: of all runs; column ``batch_tokens`` is the batch.
      found: what the law in use is fitted to, whose conventions are taken.

    Raises:
      ValueError: batches are missing, or were not varied by enough; says what to write.
    """
    source, form = found.source, catalogue.get(LAW)
    table = canonical(table, source)
    if "batch_tokens" not in table:
        raise ValueError(
            f"{source}: --critical-batch is runs, and there is no column batch_tokens: add it (sequences times their "
            "length), or write a number"
        )
    rows = from_table(table, source=source, columns=form.columns, **found.reading)
    varied = _batches(rows)
    enough = [d for d, b in varied if len(b) >= MIN_BATCHES and b[-1] >= MIN_RANGE * b[0]]
    if len(enough) < MIN_CELLS:
        most = max((b for _, b in varied), key=len)
        raise ValueError(
            f"{source}: --critical-batch is runs, and batches say it where {MIN_CELLS} sizes and horizons have "
            f"{MIN_BATCHES} of them over {MIN_RANGE:g} times or more: {len(enough)} have (the most: {len(most)}, "
            f"{most[0]:g} to {most[-1]:g} tokens): add axes {{recipe.batch_scale: [0.25, 0.5, 1, 2, 4]}}, or write a "
            "number"
        )
    law = fit(rows, form)
    horizons = {round(math.log(d), 1) for d in enough}
    one = ["batches were varied at one horizon: how B_crit moves with data is not known"] if len(horizons) < 2 else []
    return law, (*law.reasons, *_doubts(as_counted(table, rows.convention), law), *one)


def critical_batch(params: Any, log_d: Any) -> Any:
    """B_crit = b D^γ, tokens, of the D that are read."""
    return params["b"] * np.exp(params["gamma"] * log_d)


def _batches(rows: Observations) -> list[tuple[float, np.ndarray]]:
    """(tokens, batches rising) of each size and horizon."""
    columns = rows.columns
    order = np.lexsort((columns["num_tokens"], columns["num_params"]))
    size, tokens, batch = (columns[c][order] for c in ("num_params", "num_tokens", "batch_tokens"))
    new = np.append(True, (size[1:] != size[:-1]) | (tokens[1:] > SAME_HORIZON * tokens[:-1]))
    first = np.flatnonzero(new)
    return [(float(d), np.unique(b)) for d, b in zip(tokens[first], np.split(batch, first[1:]))]


def _doubts(table: "pd.DataFrame", law: Fit) -> list[str]:
    held = [name for name in BATCH if name in law.at_bound]
    return [f"{name} of B_crit = b D^γ is at a bound: these runs do not tell it" for name in held] + _of_rates(table)


def _of_rates(table: "pd.DataFrame") -> list[str]:
    rate = next((c for c in RATES if c in table), None)
    if rate is None:
        return ["which rates were tried at each batch is not said: one that is best at one batch is not at another"]
    tried = table.groupby(["num_params", table["num_tokens"].round(-2), "batch_tokens"])[rate].nunique()
    alone = int((tried < 2).sum())
    if not alone:
        return []
    return [f"{alone} of {len(tried)} batches have one rate: what is read as the batch's may be its rate's"]
