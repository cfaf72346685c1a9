"""One dial, a width or a number of parameters → the shape of a model, by its family's rule."""

import functools
import json
import math
from typing import Any

from scaling import accounting, fields
from scaling.families import FAMILIES, ModelConfig

# Steps that keep wide models a multiple of 64.
WIDTHS = (*range(8, 64, 8), *range(64, 256, 16), *range(256, 65536 + 1, 64))


def model_fields(given: dict[str, Any]) -> dict[str, Any]:
    """``given``, the model as the grid writes it, with its dial replaced by the shape that follows from it."""
    given = dict(given)
    target, width = given.pop("params", None), given.pop("width", None)
    if target is not None:
        return _nearest(target, json.dumps(given, sort_keys=True))
    family = FAMILIES[given.get("family", "transformer")]
    if width is not None:
        step = 4 if {"num_heads", "head_dim"} & set(given) else 8  # the rule's own heads are of 8 and more
        if width < step or width % step:
            raise ValueError(f"{width} is not a width on the rule; write a multiple of {step}, or the shape in full")
        given = family.shape(width, given) | given
    return family.completed(given)


@functools.lru_cache(maxsize=1024)
def _nearest(num_params: float, given: str) -> dict[str, Any]:
    """The shape on the rule whose non-embedding parameters are nearest to ``num_params``, by ratio.

    ``given``: what else the grid says of the model, as JSON.
    """
    if num_params <= 0:
        raise ValueError(f"{num_params:g} is not positive; write e.g. 1e6")
    best: dict[str, Any] | None = None
    best_ratio, problem = math.inf, ""
    for width in WIDTHS:
        try:
            shape = model_fields({**json.loads(given), "width": width})
            count = accounting.param_counts(fields.from_dict(ModelConfig, shape))["non_embedding"]
        except ValueError as e:  # a width that does not go with what else is given
            problem = str(e)
            continue
        ratio = max(count / num_params, num_params / count)
        if ratio < best_ratio:
            best, best_ratio = shape, ratio
    if best_ratio > 2:
        why = problem if best is None else f"the nearest width, {best['d_model']}, is off by {best_ratio:.3g}"
        raise ValueError(f"{num_params:g} is no size on the rule ({why}); write another, or the shape in full")
    return best  # type: ignore[return-value]  # a ratio of at most 2 is of a shape that was found
