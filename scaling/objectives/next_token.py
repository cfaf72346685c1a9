"""Next token: each is predicted from those before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from scaling.families.counting import Lengths, Sees
from scaling.objectives.base import ObjectiveConfig, any_fits, each_alone, model_alone, one_network, over_vocabulary

if TYPE_CHECKING:
    import numpy as np

losses = "scaling.training.losses.likelihood"
unit = "nats per token"
sees: Sees = "causal"
is_likelihood = True


@dataclass(frozen=True, kw_only=True)
class NextToken(ObjectiveConfig):
    name: Literal["next_token"] = "next_token"


Config: type[ObjectiveConfig] = NextToken


def lengths(config: NextToken, seq_len: int) -> Lengths:
    return Lengths(read=0, written=seq_len, predicted=seq_len)


counts, networks, guess = model_alone, one_network, over_vocabulary
require_fit, rows_together = any_fits, each_alone


def extra_ids(config: NextToken, seq_len: int) -> int:
    return 0


def predicted(config: NextToken, tokens_R: "np.ndarray") -> "np.ndarray":
    return tokens_R


def batch_spec(config: NextToken, seq_len: int) -> dict[str, tuple[int, str]]:
    return {"tokens": (seq_len + 1, "int32")}


def batch(
    config: NextToken,
    vocab_size: int,
    windows_RS: "np.ndarray",
    keys_R: "np.ndarray",
    present_RT: "np.ndarray | None" = None,
) -> "dict[str, np.ndarray]":
    whole = {"tokens": windows_RS}
    return whole if present_RT is None else {**whole, "weights": present_RT}


def read(batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch.get("weights")
