"""Means over the parts of a text, one after another, with standard errors that allow for what neighbouring parts
share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mean_and_standard_error(
    parts: Mapping[str, Any], value: Sequence[float] | None = None
) -> tuple[float, float] | None:
    """Averages a value of each part over the text: (Σ w mean, its standard error); None where a source has fewer than
    two parts.

    Parts are stretches of the text one after another, so that a long document lies in several: to Σ u², u = n (value -
    mean) of parts of n tokens (Cochran 1977, §6.3), the products of neighbours are added, 2 (1 - k / (K + 1)) Σ u_b
    u_b+k for k up to K, the cube root of the number of parts (Newey and West 1987), where that is more.

    Args:
      parts: columns of a record's ``loss_by_block``: ``source``, ``weight`` of the source in the loss, ``num_tokens``
        and ``loss``, nats per token, each (B,).
      value: of each part (B,); their ``loss`` unless given.
    """
    source = np.array(parts["source"])
    n, weight = np.array(parts["num_tokens"]), np.array(parts["weight"])
    x = np.asarray(parts["loss"] if value is None else value, dtype=np.float64)
    if not len(x):
        return None
    total, variance = 0.0, 0.0
    for s in np.unique(source):
        here = source == s
        B = int(here.sum())
        if B < 2:
            return None
        mean = float(np.average(x[here], weights=n[here]))
        u = n[here] * (x[here] - mean)
        alone = float(np.square(u).sum())
        reach = round(B ** (1 / 3))
        shared = sum(2 * (1 - k / (reach + 1)) * float((u[k:] * u[:-k]).sum()) for k in range(1, min(reach, B - 1) + 1))
        spread = max(alone, alone + shared) / float(n[here].sum()) ** 2
        w = float(weight[here][0])
        total, variance = total + w * mean, variance + w**2 * B / (B - 1) * spread
    return total, math.sqrt(variance)


def of_source(parts: Mapping[str, Any] | None, source: int) -> tuple[float, float] | None:
    """(mean loss, its standard error) on one source of a mixture, by its number; None where it has no two parts."""
    if parts is None:
        return None
    here = np.array(parts["source"]) == source
    mine = {name: np.array(column)[here] for name, column in parts.items()} | {"weight": np.ones(here.sum())}
    return mean_and_standard_error(mine) if here.any() else None
