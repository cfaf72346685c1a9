"""Prepared token arrays as batches: a batch is a function of its step, so there is no iterator whose state a checkpoint
would have to keep."""

import dataclasses
import functools

import numpy as np

from scaling.data import description
from scaling.data.permutation import permute
from scaling.data.shards import TokenArray
from scaling.data.validation import Validation

# More passes over a train split than this are taken for a mistake, unless ``unique_tokens`` asks for repetition.
MAX_EPOCHS = 100


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Memory-mapped tokens of one source, cut into windows.

    Letters in shapes: B sequences of a batch, R those of them this host reads, W windows, T ``seq_len``, S T + 1.
    Window w is tokens [wT, wT + T]: T inputs and, one to the right, their T targets. Targets of different windows do
    not overlap. Up to T - 1 tokens at the end of the train split are in no window.
    """

    manifest: dict
    arrays: dict[str, TokenArray]
    seq_len: int
    unique_tokens: int | None = None  # asked for; ``arrays["train"]`` is cut to its windows

    @property
    def fingerprint(self) -> str:
        """Of the source whole: runs on subsets of it are comparable, and are told apart by their config."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def separator_id(self) -> int:
        return self.manifest["tokenizer"]["separator_id"]

    @property
    def train_tokens(self) -> int:
        """Of the train split, or of its subset."""
        if self.unique_tokens is not None:
            return self.epoch_tokens
        return self.manifest["splits"]["train"]["tokens"]

    @property
    def validation_tokens(self) -> int:
        return self.manifest["splits"]["validation"]["tokens"]

    @property
    def num_documents(self) -> int:
        return description.num_documents(self.manifest)

    @property
    def num_duplicates(self) -> int:
        return self.manifest["num_duplicates_removed"]

    @property
    def bytes_per_token(self) -> dict[str, float | None]:
        """UTF-8 bytes of text per predicted token, by split (the first token of a split is not predicted); None of
        tokens whose maker did not say."""
        return description.bytes_per_token(self.manifest)

    @property
    def windows_per_epoch(self) -> int:
        return (len(self.arrays["train"]) - 1) // self.seq_len

    @property
    def epoch_tokens(self) -> int:
        """Targets that lie in a window, which is what an epoch trains on."""
        return self.windows_per_epoch * self.seq_len

    def distinct_tokens(self, num_tokens: float) -> int:
        """Different tokens that a run of ``num_tokens`` has to read, beyond which they repeat."""
        return self.epoch_tokens

    def describe(self) -> dict:
        """What the record says of the data. Bits per byte = loss in nats per token × tokens_per_byte / ln 2."""
        return description.describe(self.manifest, train_tokens=self.train_tokens, epoch_tokens=self.epoch_tokens)

    def require_vocab(self, vocab_size: int, extra_ids: int = 0) -> None:
        """Raises ValueError if a model of this vocabulary, ``extra_ids`` of it not the corpus's, cannot read it."""
        if vocab_size < self.vocab_size + extra_ids:
            name = self.manifest["tokenizer"]["name"]
            own = f", and the objective {extra_ids} of its own" if extra_ids else ""
            raise ValueError(
                f"model.vocab_size is {vocab_size}: write {self.vocab_size + extra_ids} or more, the tokenizer {name} "
                f"has {self.vocab_size if extra_ids else 'as many'}{own}"
            )

    def require_horizon(self, num_tokens: float) -> None:
        """Raises ValueError if so many tokens are hundreds of epochs that nobody asked for."""
        epochs = num_tokens / self.epoch_tokens
        if epochs > MAX_EPOCHS and self.unique_tokens is None:
            raise ValueError(
                f"horizon: {num_tokens:.4g} tokens are {epochs:,.0f} epochs of the {self.train_tokens:,} train tokens "
                f"of {self.manifest['source']}: add text, shorten the horizon, or ask for the repetition with "
                f"data.unique_tokens: {self.train_tokens - 1}"
            )

    def batch(self, step: int, batch_size: int, seed: int, rows: slice | None = None) -> np.ndarray:
        """The windows trained on at ``step``: int32 [B, S], or [R, S] with ``rows`` of the B.

        A pure function. Windows come in order of a seeded permutation of all of them, another one each epoch; a batch
        may straddle the border between two epochs.
        """
        return self.windows(_indices(step, batch_size, rows), seed)

    def windows(self, index_R: np.ndarray, seed: int) -> np.ndarray:
        """The windows that come ``index_R``-th in training, uint64 counted from the start: int32 [R, S]."""
        size = self.windows_per_epoch
        epoch_R, place_R = np.divmod(index_R, np.uint64(size))
        block_R, within_R = np.divmod(place_R, np.uint64(_BLOCK))
        start_R = np.empty(len(index_R), np.int64)
        for epoch, block in {*zip(epoch_R.tolist(), block_R.tolist())}:
            here = (epoch_R == epoch) & (block_R == block)
            start_R[here] = _order(size, f"train {seed} {epoch}", block)[within_R[here]]
        start_R *= self.seq_len
        return self.arrays["train"].rows(start_R, self.seq_len + 1).astype(np.int32)

    def validation(self, num_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Validation windows, int32 [W, S], and the weights of their targets, float32 [W, T], 0 where padded.

        Without ``num_tokens``: the whole split; every token after the first is predicted exactly once. With it: the
        first ceil(num_tokens / T) windows. They come in one fixed shuffled order, so that such a part is a fair sample
        of the split and lies inside every larger one.

        All of it at once takes 8 bytes a token: ``validation_windows`` makes some of them at a time.
        """
        return self.validation_windows(0, len(self.validation_counts(num_tokens)))

    def validation_counts(self, num_tokens: int | None = None) -> np.ndarray:
        """How many targets each window of ``validation(num_tokens)`` has: float32 [W], without making any."""
        return self._validation.counts(num_tokens)

    def validation_blocks(self, num_tokens: int | None = None) -> np.ndarray:
        """Which part of the split's text each window of ``validation(num_tokens)`` begins in (``Validation.blocks``),
        int64 [W]; of a mixture each source's parts are numbered after the last one's."""
        return self._validation.blocks(num_tokens)

    @property
    def num_validation_windows(self) -> int:
        return self._validation.num_windows

    @property
    def _validation(self) -> Validation:
        return Validation(self.arrays["validation"], self.seq_len, self.separator_id)

    def validation_windows(self, start: int, stop: int, num_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Makes windows ``start`` to ``stop`` of ``validation(num_tokens)``, and the weights of their targets."""
        return self._validation.windows(start, stop)

    def validation_shares(self, num_tokens: int | None = None) -> list[tuple[str, float, slice]]:
        """(source, weight in the loss, its windows among those of ``validation``)."""
        return [(self.manifest["source"], 1.0, slice(None))]


# Places of an epoch that are permuted together: sixteen at a time, NumPy's calls took longer than their arithmetic.
_BLOCK = 4096


@functools.lru_cache(maxsize=64)
def _order(size: int, key: str, block: int) -> np.ndarray:
    """A block of consecutive places of an epoch → their windows. A memo of a pure function: nothing depends on it."""
    return permute(np.arange(block * _BLOCK, min((block + 1) * _BLOCK, size), dtype=np.uint64), size, key)


def _indices(step: int, batch_size: int, rows: slice | None) -> np.ndarray:
    if step < 0:
        raise ValueError(f"step is {step}: write a number ≥ 0")
    return np.arange(batch_size, dtype=np.uint64)[rows or slice(None)] + np.uint64(step * batch_size)
