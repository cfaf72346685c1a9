"""Two spans of one document told from spans of others (van den Oord et al. 2018, InfoNCE).

Of a window's T tokens after the first, the longest stretch without a separator, of L tokens, is of one document. Two
spans of it, min(span, ⌈L / 2⌉) tokens each, are cut out independently, every place as likely as another, so that they
may overlap (Izacard et al. 2021, Contriever, whose crops are of 13 to 128 of 256 tokens; DeCLUTR's, Giorgi et al. 2021,
may too). Where they lie follows from the window's key alone. A window without a boundary is one stretch: of a long
document, or of a synthetic source. Of stretches as long as each other the first is taken; of a window that has
separators alone, its first token. Shorter spans are filled up to ``span`` with padding that none of their tokens sees.

One network that sees both ways reads either span; the mean of its last layer over a span's tokens, at unit length, is
the span's. A row's loss is the cross entropy of its own pair, by similarity / temperature, among 1 + negatives second
spans: of a batch, those of the rows after it, so that batch size, mesh and hosts do not change what it is of; of
validation, those of its group of negatives + 1 windows in their fixed order, the last group filled up from the front.
Rows of one document may be among another's negatives, as they are in the papers'.

``num_tokens`` counts what is read, 2 · span of a window, padding too; an epoch is as many tokens as the text has.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from scaling.families.counting import Counts, Lengths, Product, Sees
from scaling.fields import require, require_positive
from scaling.objectives.base import ObjectiveConfig, one_network
from scaling.objectives.masked import uniform

if TYPE_CHECKING:
    import numpy as np

    from scaling.families import ModelConfig

losses = "scaling.training.losses.contrastive"
unit = "nats per pair"
sees: Sees = "full"
is_likelihood = False


@dataclass(frozen=True, kw_only=True)
class Contrastive(ObjectiveConfig):
    """``negatives``: other spans that a pair is told from; ``temperature``: what similarities, -1 to 1, are divided by,
    Contriever's by default; ``span``: tokens of a span at most, half of a window or fewer."""

    name: Literal["contrastive"] = "contrastive"
    negatives: int = 256
    temperature: float = 0.05
    span: int = 32

    def __post_init__(self) -> None:
        require(self.negatives >= 1, "negatives", self.negatives, "an integer ≥ 1, as 256")
        require_positive(self, "temperature")
        require(self.span >= 1, "span", self.span, "an integer ≥ 1, as 32")


Config: type[ObjectiveConfig] = Contrastive
networks = one_network


def extra_ids(config: Contrastive, seq_len: int) -> int:
    return 0


def guess(config: Contrastive, vocab_size: int) -> float:
    return math.log(1 + config.negatives)


def rows_together(config: Contrastive) -> int:
    return 1 + config.negatives


def require_fit(config: Contrastive, run: Any) -> None:
    """Raises ValueError for a batch, or a part of validation, of fewer rows than a loss is of; for a head, which
    nothing would train; for experts, which padding would take part in; for μP and a z-loss, as said there."""
    of, model, together = "contrastive", run.model, rows_together(config)
    few = f"objective.negatives, which is {config.negatives}"
    want = f"{together} or more, or fewer {few}: they are other rows of the batch"
    require(run.batch_size >= together, "batch_size", run.batch_size, want)
    enough = together * run.data.seq_len
    for name in ("curve_tokens", "final_tokens"):
        tokens = getattr(run.eval, name)
        want = f"{enough} or more, or null, or fewer {few}: a loss is of {together} windows of {run.data.seq_len}"
        require(tokens is None or math.ceil(tokens / run.data.seq_len) >= together, f"eval.{name}", tokens, want)
    want = f"true: {of} has no head over the vocabulary, so nothing would train one of its own"
    require(model.tied_embeddings, "model.tied_embeddings", model.tied_embeddings, want)
    want = f"null: {of} has no logits over the vocabulary"
    require(model.logit_softcap is None, "model.logit_softcap", model.logit_softcap, want)
    want = f"no model.mlp: the padding of {of}'s short spans would be balanced among experts as their tokens are"
    experts = getattr(model, "mlp", None)  # of the families that have them
    require(experts is None, "model.mlp.experts", experts and experts.experts, want)
    want = f"standard: how rates transfer over width where states of unit length are compared, as in {of}, is not known"
    require(model.parameterization == "standard", "model.parameterization", model.parameterization, want)
    want = f"0: similarities are bounded, so that their normaliser cannot drift under {of}"
    require(run.optim.z_loss == 0, "optim.z_loss", run.optim.z_loss, want)


def lengths(config: Contrastive, seq_len: int) -> Lengths:
    want = f"half of data.seq_len or less, which is {seq_len}: two spans are cut out of a window"
    require(2 * config.span <= seq_len, "span", config.span, want)
    return Lengths(read=0, written=config.span, predicted=1, passes=2)


def counts(config: Contrastive, model: "ModelConfig", of_model: Counts) -> Counts:
    """The model's without its head: a pair's 1 + negatives products of D numbers stand for it, by the 2 · span tokens
    that it is of. What is worked out is all rows against all, more than the loss is of."""
    inner = [p for p in of_model.products if p.group != "unembedding"]
    pair = Product("unembedding", model.d_model, 1 + config.negatives, share=0.5 / config.span)
    lookups = model.vocab_size * model.d_model
    return dataclasses.replace(of_model, products=(*inner, pair), lookups=lookups)


def predicted(config: Contrastive, tokens_R: "np.ndarray") -> "np.ndarray":
    """Pairs: one of every window that has a token."""
    import numpy as np

    return (tokens_R > 0).astype(np.float32)


def batch_spec(config: Contrastive, seq_len: int) -> dict[str, tuple[int, str]]:
    return {
        "spans": (2 * config.span, "int32"),  # one after the other, each filled up with id 0
        "length": (1, "int32"),  # of either
        "weights": (1, "float32"),
    }


def batch(
    config: Contrastive,
    vocab_size: int,
    windows_RS: "np.ndarray",
    keys_R: "np.ndarray",
    present_RT: "np.ndarray | None" = None,
) -> "dict[str, np.ndarray]":
    import numpy as np

    tokens_RT = windows_RS[:, 1:]
    there_RT = np.ones(tokens_RT.shape, bool) if present_RT is None else present_RT > 0
    start_R1, L_R1 = (x[:, None] for x in _longest_stretch((tokens_RT != 0) & there_RT))
    length_R1 = np.minimum(config.span, (L_R1 + 1) // 2)
    starts_R2 = start_R1 + np.floor(uniform(keys_R, 2, salt=0) * (L_R1 - length_R1 + 1)).astype(int)
    column_1C = np.arange(config.span)[None]
    rows = np.arange(len(tokens_RT))[:, None]
    spans = [
        np.where(column_1C < length_R1, tokens_RT[rows, np.minimum(at_R1 + column_1C, tokens_RT.shape[1] - 1)], 0)
        for at_R1 in (starts_R2[:, :1], starts_R2[:, 1:])
    ]
    return {
        "spans": np.concatenate(spans, axis=1).astype(np.int32),
        "length": length_R1.astype(np.int32),
        "weights": there_RT.any(axis=1, keepdims=True).astype(np.float32),
    }


def read(batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return batch["spans"], batch["spans"], batch["weights"]


def _longest_stretch(inside_RT: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Where the first of a row's longest stretches of True begins, and its length; (0, 1) where there is none."""
    import numpy as np

    at_1T = np.arange(1, inside_RT.shape[1] + 1)[None]
    length_RT = at_1T - np.maximum.accumulate(np.where(inside_RT, 0, at_1T), axis=1)  # of the stretch up to here
    end_R = length_RT.argmax(axis=1)
    L_R = length_RT.max(axis=1)
    return np.maximum(end_R + 1 - L_R, 0) * (L_R > 0), np.maximum(L_R, 1)
