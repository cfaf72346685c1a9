"""The validation split of a source as windows, in one fixed shuffled order: a part of it is a fair sample of it all."""

import math
from dataclasses import dataclass

import numpy as np

from scaling.data.permutation import permute
from scaling.data.shards import TokenArray

# Parts of a split that losses are kept by: enough to know a standard error to 9 % (one over √(2 · 63)), few enough that
# most of a document lies in one of them where a split has some hundred.
NUM_BLOCKS = 64


@dataclass(frozen=True, eq=False)
class Validation:
    """Validation windows of ``tokens``, by their place in the order; letters in shapes as in ``corpus.Corpus``."""

    tokens: TokenArray
    seq_len: int
    separator_id: int

    @property
    def num_windows(self) -> int:
        return math.ceil((len(self.tokens) - 1) / self.seq_len)

    def counts(self, num_tokens: int | None) -> np.ndarray:
        """How many targets each of the first windows has, as many windows as ``num_tokens`` take: float32 [W]."""
        window_W = self._order(0, size(num_tokens, self.num_windows, self.seq_len))
        left_W = len(self.tokens) - 1 - window_W * self.seq_len
        return np.minimum(left_W, self.seq_len).astype(np.float32)

    def blocks(self, num_tokens: int | None) -> np.ndarray:
        """Which of ``NUM_BLOCKS`` equal parts of the text, in its own order, each of the first windows begins in, int64
        [W]. Documents stay whole but for those at a part's ends; other windows, or fewer, have the same parts."""
        window_W = self._order(0, size(num_tokens, self.num_windows, self.seq_len))
        return window_W * self.seq_len * NUM_BLOCKS // max(len(self.tokens) - 1, 1)

    def windows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes windows ``start`` to ``stop``, int32 [W, S], and the weights of their targets, float32 [W, T]."""
        tokens, T = self.tokens, self.seq_len
        # The last window may be short: it is read further left, moved into place and padded.
        start_W = self._order(start, stop) * T
        shift_W = np.maximum(start_W + T + 1 - len(tokens), 0)
        x_WS = np.full((len(start_W), T + 1), self.separator_id, np.int32)
        inside_WS = np.arange(T + 1) < (T + 1 - shift_W)[:, None]
        whole_W = shift_W == 0
        if whole_W.any():
            x_WS[whole_W] = tokens.rows(start_W[whole_W], T + 1)
        for w in np.flatnonzero(~whole_W):
            left = len(tokens) - start_W[w]
            x_WS[w, :left] = tokens.rows(start_W[w : w + 1], left)[0]
        return x_WS, inside_WS[:, 1:].astype(np.float32)

    def _order(self, start: int, stop: int) -> np.ndarray:
        places = np.arange(start, stop, dtype=np.uint64)
        return permute(places, self.num_windows, "validation").astype(np.int64)


def size(num_tokens: int | None, num_windows: int, seq_len: int) -> int:
    """How many of a split's windows ``num_tokens`` take, all if None. Raises ValueError for fewer than one token."""
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}: write a number ≥ 1")
    return num_windows if num_tokens is None else min(num_windows, math.ceil(num_tokens / seq_len))
