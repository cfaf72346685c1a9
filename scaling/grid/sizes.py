r"""One dial → the shape of a model.

The rule, for a width d that is a multiple of 8: num_layers = max(2, round(.43 √d)); head_dim the largest power of two
that divides d and is at most √(8 d) and 128; num_heads = d / head_dim; d_ff = 4 d (SwiGLU: 8 d / 3, to the nearest
multiple of 8, which keeps the parameters). Width × layers: 16×2, 24×2, 32×2, 40×3, 48×3, 64×3, 80×4, 96×4, 128×5, …,
768×12, 4096×28. Depth grows as √d: GPT-2's aspect at 768, and shallow shapes that two cores train fast below.
"""

import functools
import math
from typing import Any

from scaling import accounting
from scaling.config import ModelConfig


def shape_of_width(width: int, activation: str = "gelu") -> dict[str, int]:
    """The fields of ModelConfig that follow from a width alone."""
    head_dim = 8
    while head_dim < 128 and width % (2 * head_dim) == 0 and (2 * head_dim) ** 2 <= 8 * width:
        head_dim *= 2
    return {
        "d_model": width,
        "num_layers": max(2, round(0.43 * math.sqrt(width))),
        "num_heads": width // head_dim,
        "head_dim": head_dim,
        "d_ff": max(8, 8 * round(width / 3)) if activation == "swiglu" else 4 * width,
    }


# Steps that keep wide models a multiple of 64.
WIDTHS = (*range(8, 64, 8), *range(64, 256, 16), *range(256, 65536 + 1, 64))


def model_fields(given: dict[str, Any]) -> dict[str, Any]:
    """``given``, the model as the grid writes it, with its dial replaced by the shape that follows from it."""
    given = dict(given)
    target, width = given.pop("params", None), given.pop("width", None)
    if target is not None:
        return _nearest(target, tuple(sorted(given.items())))
    if width is not None:
        if width < 8 or width % 8:
            raise ValueError(f"{width} is not a width on the rule; write a multiple of 8, or the shape in full")
        shape = shape_of_width(width, given.get("activation", "gelu"))
        if ("num_heads" in given) != ("head_dim" in given):
            one, other = ("num_heads", "head_dim") if "num_heads" in given else ("head_dim", "num_heads")
            if given[one] < 1 or width % given[one]:
                raise ValueError(f"{width} is not a multiple of {one}, {given[one]}; write one that is, or {other} too")
            shape[other] = width // given[one]
        given = shape | given
    if "num_heads" in given:
        given.setdefault("num_kv_heads", given["num_heads"])
    return given


@functools.lru_cache(maxsize=1024)
def _nearest(num_params: float, given: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The shape on the rule whose non-embedding parameters are nearest to ``num_params``, by ratio."""
    if num_params <= 0:
        raise ValueError(f"{num_params:g} is not positive; write e.g. 1e6")
    best, best_ratio, problem = None, math.inf, ""
    for width in WIDTHS:
        try:
            fields = model_fields({**dict(given), "width": width})
            count = accounting.param_counts(ModelConfig(**fields))["non_embedding"]
        except ValueError as e:  # a width that does not go with what else is given
            problem = str(e)
            continue
        ratio = max(count / num_params, num_params / count)
        if ratio < best_ratio:
            best, best_ratio = fields, ratio
    if best_ratio > 2:
        why = problem if best is None else f"the nearest width, {best['d_model']}, is off by {best_ratio:.3g}"
        raise ValueError(f"{num_params:g} is no size on the rule ({why}); write another, or the shape in full")
    return best
