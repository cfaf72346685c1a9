"""A synthetic source as training sees it: windows made when they are asked for, without files."""

import functools
import hashlib
import math

import numpy as np

from scaling.config import DataConfig
from scaling.data import synthetic
from scaling.data.permutation import permute
from scaling.data.shards import digest
from scaling.data.validation import NUM_BLOCKS

SEPARATOR = 0
BLOCK_WINDOWS = 1024  # made at once: a batch is too few for the vector unit
STREAM_TOKENS = 2**40  # what ``train_tokens`` says of a stream that never repeats: more than any run reads
# At least. A loss over them has a standard error of .001 (hierarchy) to .004 nats (markov), by the runs of
# sweeps/known_entropy.yaml; fits are held against what the source itself has on the same windows, so it cancels.
VALIDATION_TOKENS = 2**19


class Stream:
    """What ``Corpus`` is to text: batches, validation, and what the record says.

    Letters in shapes: B sequences of a batch, R those of them this host reads, W windows, T ``seq_len``, S T + 1. A
    window is a separator and T symbols (ids from 1), all of them predicted; windows are independent. None is seen twice
    unless ``data.unique_tokens`` says how many there are; then every epoch has its own order, as in a ``Corpus``.
    """

    def __init__(self, config: DataConfig):
        """Raises ValueError if the source is misspelt or ``config`` asks of it what it has not."""
        self.process, self.source, self.seq_len = synthetic.process(config.source), config.source, config.seq_len
        for name, value, want in (
            ("tokenizer", config.tokenizer, "bytes"),
            ("near_duplicates", config.near_duplicates, "keep"),
        ):
            if value != want:
                raise ValueError(
                    f"data.{name} is {value!r}: {config.source} has tokens, no text or documents: leave it out"
                )
        try:
            self.best_loss = self.process.best_loss(self.seq_len)
        except ValueError as e:
            raise ValueError(f"data.source is {config.source!r}: {e}") from None
        self._epoch_windows: int | None = None
        if config.unique_tokens is not None:
            self._epoch_windows = config.unique_tokens // self.seq_len
            if not self._epoch_windows:
                raise ValueError(
                    f"data.unique_tokens is {config.unique_tokens}: write at least one window, data.seq_len "
                    f"{self.seq_len}"
                )
        # Of an endless stream only the newest blocks are wanted again, of each seed that a pack trains side by side.
        self._block = functools.lru_cache(maxsize=None if self._epoch_windows else 16)(self._made)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes whenever some batch would be another one; whichever part of the stream is read."""
        sample = self.process.sample(16, self.seq_len, "fingerprint")
        return digest([repr(self.process), self.seq_len, hashlib.sha256(sample.tobytes()).hexdigest()])

    @property
    def vocab_size(self) -> int:
        return self.process.num_symbols + 1

    @property
    def separator_id(self) -> int:
        return SEPARATOR

    @property
    def train_tokens(self) -> int:
        return STREAM_TOKENS if self._epoch_windows is None else self._epoch_windows * self.seq_len

    @property
    def epoch_tokens(self) -> int:
        return self.train_tokens

    def distinct_tokens(self, num_tokens: float) -> int:
        """As ``Corpus.distinct_tokens``."""
        return self.epoch_tokens

    @property
    def validation_tokens(self) -> int:
        return math.ceil(VALIDATION_TOKENS / self.seq_len) * self.seq_len

    def describe(self) -> dict:
        """As ``Corpus.describe``, and the truth in nats per token: ``entropy_rate``; ``best_loss``, the least mean loss
        over windows that any predictor can expect; ``best_validation_loss``, what it has on this validation split."""
        return {
            "source": self.source,
            "source_version": None,
            "licence": None,
            "tokenizer": "tokens",
            "fingerprint": self.fingerprint,
            "split_rule": "independent streams",
            "vocab_size": self.vocab_size,
            "train_tokens": self.train_tokens,
            "epoch_tokens": self.epoch_tokens,
            "validation_tokens": self.validation_tokens,
            "tokens_per_byte": None,
            "text_bytes": None,
            "entropy_rate": self.process.entropy_rate,
            "best_loss": self.best_loss,
            "best_validation_loss": self._best_validation_loss,
        }

    @functools.cached_property
    def _best_validation_loss(self) -> float:
        symbols_WT = self.validation()[0][:, 1:] - 1
        return float(self.process.negative_log_probability(symbols_WT).mean() / self.seq_len)

    def require_vocab(self, vocab_size: int, extra_ids: int = 0) -> None:
        """Raises ValueError if a model of this vocabulary cannot read the stream."""
        if vocab_size < self.vocab_size + extra_ids:
            raise ValueError(
                f"model.vocab_size is {vocab_size}: write {self.vocab_size + extra_ids} or more: {self.source} has "
                f"{self.process.num_symbols} symbols and a separator"
                + (f", and the objective {extra_ids} of its own" if extra_ids else "")
            )

    def require_horizon(self, num_tokens: float) -> None:
        """As ``Corpus.require_horizon``: a stream does not end, and ``unique_tokens`` asks for repetition."""

    def batch(self, step: int, batch_size: int, seed: int, rows: slice | None = None) -> np.ndarray:
        """The windows trained on at ``step``: int32 [B, S], or [R, S] with ``rows`` of the B. A pure function."""
        if step < 0:
            raise ValueError(f"step is {step}: write a number ≥ 0")
        index_R = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)[rows or slice(None)]
        if self._epoch_windows is None:
            return self._windows(f"train {seed}", index_R)  # other seeds read other text
        epoch_R, window_R = np.divmod(index_R, np.uint64(self._epoch_windows))
        for epoch in np.unique(epoch_R):
            here = epoch_R == epoch
            window_R[here] = permute(window_R[here], self._epoch_windows, f"train {seed} {epoch}")
        return self._windows("train", window_R)

    def validation(self, num_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Validation windows, int32 [W, S], and the weights of their targets, float32 [W, T], all 1.

        The first ceil(num_tokens / T) of a stream of their own; without ``num_tokens``, ``validation_tokens`` of it.
        """
        return self.validation_windows(0, len(self.validation_counts(num_tokens)))

    def validation_counts(self, num_tokens: int | None = None) -> np.ndarray:
        """As ``Corpus.validation_counts``."""
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}: write a number ≥ 1")
        num_windows = math.ceil(min(num_tokens or math.inf, self.validation_tokens) / self.seq_len)
        return np.full(num_windows, self.seq_len, np.float32)

    def validation_blocks(self, num_tokens: int | None = None) -> np.ndarray:
        """As ``Corpus.validation_blocks``, of the whole split."""
        window_W = np.arange(len(self.validation_counts(num_tokens)))
        return window_W * NUM_BLOCKS * self.seq_len // self.validation_tokens

    def validation_windows(self, start: int, stop: int, num_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As ``Corpus.validation_windows``."""
        x_WS = self._windows("validation", np.arange(start, stop, dtype=np.uint64))
        return x_WS, np.ones((stop - start, self.seq_len), np.float32)

    def validation_shares(self, num_tokens: int | None = None) -> list[tuple[str, float, slice]]:
        """As ``Corpus.validation_shares``."""
        return [(self.source, 1.0, slice(None))]

    def _windows(self, stream: str, index_W: np.ndarray) -> np.ndarray:
        out_WS = np.full((len(index_W), self.seq_len + 1), SEPARATOR, np.int32)
        block_W, place_W = np.divmod(index_W, np.uint64(BLOCK_WINDOWS))
        for block in np.unique(block_W).tolist():
            here = block_W == block
            out_WS[here, 1:] = self._block(stream, block)[place_W[here].astype(np.int64)]
            out_WS[here, 1:] += 1
        return out_WS

    def _made(self, stream: str, block: int) -> np.ndarray:
        return self.process.sample(BLOCK_WINDOWS, self.seq_len, f"{self.process} {stream} block {block}")
