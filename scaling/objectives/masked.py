"""Masked tokens (Devlin et al. 2019, BERT): some are hidden, and predicted from all others, on both sides.

Of a window's T tokens after the first, round(rate · T) are chosen; of these 80 % become the mask, the last id of the
vocabulary, 10 % another token, 10 % stay as they are. Which and what follows from the window's key alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from scaling.families.counting import Lengths, Sees
from scaling.fields import require
from scaling.objectives.base import ObjectiveConfig, any_fits, each_alone, model_alone, one_network, over_vocabulary

if TYPE_CHECKING:
    import numpy as np

losses = "scaling.training.losses.likelihood"
unit = "nats per masked token"
sees: Sees = "full"
is_likelihood = False
MASKED, REPLACED = 0.8, 0.1  # of the chosen; the rest is left as it is


@dataclass(frozen=True, kw_only=True)
class Masked(ObjectiveConfig):
    """``rate``: the share of tokens that is chosen, BERT's 15 % by default."""

    name: Literal["masked"] = "masked"
    rate: float = 0.15

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "rate", self.rate, "a share of the tokens in (0, 1), as 0.15")


Config: type[ObjectiveConfig] = Masked


def lengths(config: Masked, seq_len: int) -> Lengths:
    return Lengths(read=0, written=seq_len, predicted=num_chosen(config.rate, seq_len))


counts, networks, guess = model_alone, one_network, over_vocabulary
require_fit, rows_together = any_fits, each_alone


def extra_ids(config: Masked, seq_len: int) -> int:
    return 1


def predicted(config: Masked, tokens_R: "np.ndarray") -> "np.ndarray":
    return _num_chosen(config.rate, tokens_R)


def batch_spec(config: Masked, seq_len: int) -> dict[str, tuple[int, str]]:
    return {"inputs": (seq_len, "int32"), "targets": (seq_len, "int32"), "weights": (seq_len, "float32")}


def batch(
    config: Masked,
    vocab_size: int,
    windows_RS: "np.ndarray",
    keys_R: "np.ndarray",
    present_RT: "np.ndarray | None" = None,
) -> "dict[str, np.ndarray]":
    import numpy as np

    targets_RT = windows_RS[:, 1:]
    T = targets_RT.shape[1]
    fate_RT, other_RT = (uniform(keys_R, T, salt) for salt in (1, 2))
    order_RT, num_R = ordered(config.rate, keys_R, T, present_RT)
    rank_RT = order_RT.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    chosen_RT = rank_RT < num_R[:, None]
    hidden_RT = np.where(fate_RT < MASKED, vocab_size - 1, np.floor(other_RT * (vocab_size - 1))).astype(np.int32)
    changed_RT = chosen_RT & (fate_RT < MASKED + REPLACED)
    inputs_RT = np.where(changed_RT, hidden_RT, targets_RT)
    return {"inputs": inputs_RT, "targets": targets_RT, "weights": chosen_RT.astype(np.float32)}


def read(batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return batch["inputs"], batch["targets"], batch["weights"]


def ordered(
    rate: float, keys_R: "np.ndarray", length: int, present_RT: "np.ndarray | None"
) -> "tuple[np.ndarray, np.ndarray]":
    """Numbers whose lowest are those of the tokens that are chosen, (R, length), and how many these are, (R,)."""
    import numpy as np

    order_RT = uniform(keys_R, length, 0)
    if present_RT is None:
        return order_RT, _num_chosen(rate, np.full(len(keys_R), length))
    return np.where(present_RT > 0, order_RT, 2.0), _num_chosen(rate, present_RT.sum(axis=1))  # padding comes last


def num_chosen(rate: float, length: int) -> int:
    """Tokens that are chosen of a window that is not padded, at least one."""
    return max(1, round(rate * length))


def _num_chosen(rate: float, tokens_R: "np.ndarray") -> "np.ndarray":
    """At least one of a window that has a token."""
    import numpy as np

    return np.minimum(np.maximum(np.round(rate * tokens_R), 1), tokens_R).astype(np.float32)


def uniform(keys_R: "np.ndarray", length: int, salt: int) -> "np.ndarray":
    """Numbers in [0, 1), float64 [R, length]: splitmix64 of (key, salt, place) (Steele et al. 2014)."""
    import numpy as np

    with np.errstate(over="ignore"):
        place = np.arange(length, dtype=np.uint64) + np.uint64(salt << 32)
        x = _mixed(keys_R.astype(np.uint64))[:, None] + place[None, :] * np.uint64(0x9E3779B97F4A7C15)
        return (_mixed(x) >> np.uint64(11)) * 2.0**-53


def _mixed(x: "np.ndarray") -> "np.ndarray":
    import numpy as np

    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
