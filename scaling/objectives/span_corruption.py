"""Span corruption (Raffel et al. 2020, T5): spans are cut out of a text that is read, and written one after another.

Of a window's T tokens after the first, n = round(rate · T) are noise, in m = round(n / mean_span) spans, both as T5's
``random_spans_noise_mask`` has them: text and noise by turns, text first, each cut into m parts of one token or more,
every such cut as likely as another. What is read is the text with one sentinel for each span, R = T - n + m tokens;
what is written is each sentinel with its span and a last sentinel, W = n + m + 1 (their figure 2). The sentinels are
the last m + 1 ids of the vocabulary, the first of them the very last. All windows have the same lengths. Which tokens
are noise follows from the window's key alone.

An encoder reads and a decoder writes, or one decoder has the written tokens after the read ones, which it sees whole
(a prefix LM). Writing starts from the separator, id 0. A token of the text is counted once in ``num_tokens``, wherever
it is read or written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from scaling.families.counting import Lengths, Sees
from scaling.fields import require
from scaling.objectives.base import ObjectiveConfig, any_fits, each_alone, model_alone, one_network, over_vocabulary
from scaling.objectives.masked import uniform

if TYPE_CHECKING:
    import numpy as np

losses = "scaling.training.losses.likelihood"
unit = "nats per target token"
sees: Sees = "prefix"
is_likelihood = False


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(ObjectiveConfig):
    """``rate``: the share of tokens that is noise; ``mean_span``: tokens of a span on average; T5's by default."""

    name: Literal["span_corruption"] = "span_corruption"
    rate: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "rate", self.rate, "a share of the tokens in (0, 1), as 0.15")
        require(self.mean_span >= 1, "mean_span", self.mean_span, "the tokens of a span on average, 1 or more, as 3")


Config: type[ObjectiveConfig] = SpanCorruption


def noise_and_spans(config: SpanCorruption, num_tokens: int) -> tuple[int, int]:
    """How many of so many tokens are noise, and in how many spans; (0, 0) of fewer than two tokens."""
    if num_tokens < 2:
        return 0, 0
    noise = min(max(round(config.rate * num_tokens), 1), num_tokens - 1)
    # Each span has a token of noise, and one of text before it.
    return noise, min(max(round(noise / config.mean_span), 1), num_tokens - noise)


def lengths(config: SpanCorruption, seq_len: int) -> Lengths:
    require(
        config.mean_span < seq_len, "mean_span", config.mean_span,
        f"less than data.seq_len, which is {seq_len}: a span has text before it",
    )  # fmt: skip
    noise, spans = noise_and_spans(config, seq_len)
    require(
        round(noise / config.mean_span) <= seq_len - noise, "rate", config.rate,
        f"a smaller one, or a longer mean_span: {seq_len - noise} tokens of text cannot part "
        f"{round(noise / config.mean_span)} spans",
    )  # fmt: skip
    written = noise + spans + 1
    return Lengths(read=seq_len - noise + spans, written=written, predicted=written, text=seq_len)


counts, networks, guess = model_alone, one_network, over_vocabulary
require_fit, rows_together = any_fits, each_alone


def extra_ids(config: SpanCorruption, seq_len: int) -> int:
    """A sentinel for each span, and the last."""
    lengths(config, seq_len)
    return noise_and_spans(config, seq_len)[1] + 1


def predicted(config: SpanCorruption, tokens_R: "np.ndarray") -> "np.ndarray":
    """Noise and sentinels of a window that has so many tokens; none of fewer than two."""
    import numpy as np

    distinct, index_R = np.unique(tokens_R, return_inverse=True)
    each = [sum(noise_and_spans(config, int(n))) + (n >= 2) for n in distinct]
    return np.array(each, np.float32)[index_R]


def batch_spec(config: SpanCorruption, seq_len: int) -> dict[str, tuple[int, str]]:
    R, W = (n := lengths(config, seq_len)).read, n.written
    return {"read": (R, "int32"), "inputs": (W, "int32"), "targets": (W, "int32"), "weights": (W, "float32")}


def batch(
    config: SpanCorruption,
    vocab_size: int,
    windows_RS: "np.ndarray",
    keys_R: "np.ndarray",
    present_RT: "np.ndarray | None" = None,
) -> "dict[str, np.ndarray]":
    """What follows the end of a shorter window is the separator, id 0, in what is read too."""
    import numpy as np

    text_RT = windows_RS[:, 1:]
    rows, T = text_RT.shape
    made = {name: np.zeros((rows, columns), dtype) for name, (columns, dtype) in batch_spec(config, T).items()}
    num_R = np.full(rows, T) if present_RT is None else present_RT.sum(axis=1).astype(int)
    cuts = [uniform(keys_R, T, salt) for salt in (0, 1)]
    for num in np.unique(num_R).tolist():
        here = np.flatnonzero(num_R == num)
        noise, spans = noise_and_spans(config, num)
        R, W = num - noise + spans, noise + spans + (noise > 0)
        read, written = _corrupted(text_RT[here, :num], noise, spans, [u[here] for u in cuts], vocab_size)
        made["read"][here, :R] = read
        made["targets"][here, :W] = written
        made["weights"][here, :W] = 1
    made["inputs"][:, 1:] = made["targets"][:, :-1]
    return made


def read(batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return batch["inputs"], batch["targets"], batch["weights"]


def _corrupted(
    text_RT: "np.ndarray", noise: int, spans: int, cuts: "list[np.ndarray]", vocab_size: int
) -> "tuple[np.ndarray, np.ndarray]":
    """What is read and what is written of rows of the same length, all cut into as much noise and as many spans."""
    import numpy as np

    rows, T = text_RT.shape
    if noise == 0:
        return text_RT, text_RT[:, :0]
    text_RM, noise_RM = _parts(cuts[0], T - noise, spans), _parts(cuts[1], noise, spans)
    # Along the window: text and noise of the first span, of the second, …
    segments_RX = np.stack([text_RM, noise_RM], axis=2).reshape(rows, 2 * spans)
    ends_RX = segments_RX.cumsum(axis=1)
    segment_RT = (np.arange(T)[None, :, None] >= ends_RX[:, None, :]).sum(axis=2)
    is_noise_RT, span_RT = segment_RT % 2 == 1, segment_RT // 2
    sentinels_M = vocab_size - 1 - np.arange(spans + 1, dtype=np.int32)
    row = np.arange(rows)[:, None]
    read = np.empty((rows, T - noise + spans), np.int32)
    written = np.empty((rows, noise + spans + 1), np.int32)
    # A token stands after its like before it and, in what is read, a sentinel for each span that has ended, in what is
    # written one for each that has begun.
    place_RT = np.where(is_noise_RT, is_noise_RT.cumsum(axis=1) + span_RT, (~is_noise_RT).cumsum(axis=1) - 1 + span_RT)
    of_row = np.broadcast_to(row, (rows, T))
    read[of_row[~is_noise_RT], place_RT[~is_noise_RT]] = text_RT[~is_noise_RT]
    written[of_row[is_noise_RT], place_RT[is_noise_RT]] = text_RT[is_noise_RT]
    span_M = np.arange(spans)[None, :]
    read[row, text_RM.cumsum(axis=1) + span_M] = sentinels_M[None, :-1]
    written[row, noise_RM.cumsum(axis=1) - noise_RM + span_M] = sentinels_M[None, :-1]
    written[:, -1] = sentinels_M[-1]
    return read, written


def _parts(uniform_RT: "np.ndarray", num_items: int, num_parts: int) -> "np.ndarray":
    """Lengths [R, num_parts], 1 or more each, that add up to ``num_items``: every such cut is as likely as another."""
    import numpy as np

    order = uniform_RT[:, : num_items - 1].argsort(axis=1, kind="stable")
    ends = np.sort(order[:, : num_parts - 1] + 1, axis=1)
    edge = np.zeros((len(ends), 1), int)
    return np.diff(np.concatenate([edge, ends, edge + num_items], axis=1), axis=1)
