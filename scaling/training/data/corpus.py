"""Prepared token arrays as batches: a batch is a function of its step, so there is no iterator whose state a checkpoint
would have to keep."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np

from scaling.config import DataConfig
from scaling.training import synthetic
from scaling.training.data import shards
from scaling.training.data.permutation import permute
from scaling.training.data.preparation import folders_of
from scaling.training.data.shards import TokenArray, read_manifest
from scaling.training.data.stream import Stream

# Arrays up to this size are hashed again on opening (about a second); of larger ones only the length is checked.
VERIFY_BYTES = 2**30
# More passes over a train split than this are taken for a mistake, unless ``unique_tokens`` asks for repetition.
MAX_EPOCHS = 100
# A mixture's weights are resolved to windows out of so many.
MIXTURE_BLOCK = 1000


def open(config: DataConfig, cache_dir: Path) -> "Corpus | Mixture | Stream":
    """Opens what ``prepare`` built; numpy and the standard library suffice.

    Raises ValueError if it is not there, truncated or corrupt (saying what to delete), or shorter than a window.
    """
    if synthetic.is_synthetic(config.source):
        return Stream(config)
    opened = [(weight, _open_one(part, folder)) for weight, part, folder in folders_of(config, cache_dir)]
    return opened[0][1] if len(opened) == 1 else Mixture(config.source, opened)


def _open_one(config: DataConfig, folder: Path) -> "Corpus":
    if not folder.exists():
        raise ValueError(
            f"data.source is {config.source!r}: no tokens prepared for it in {folder.parent}: call prepare first"
        )
    manifest = read_manifest(folder)
    arrays = {split: _map_split(folder, entry) for split, entry in manifest["splits"].items()}
    T = config.seq_len
    for split, tokens in arrays.items():
        least = T + 1 if split == "train" else 2
        if len(tokens) < least:
            raise ValueError(
                f"data.seq_len is {T}: the {split} split of {config.source} has {len(tokens)} tokens, a "
                f"window takes {least}: add text or shorten the windows"
            )
    if config.unique_tokens is not None:
        arrays["train"] = _subset(config, folder, manifest["splits"]["train"])
    return Corpus(manifest, arrays, T, unique_tokens=config.unique_tokens)


def _subset(config: DataConfig, folder: Path, entry: dict) -> TokenArray:
    """The windows that ``unique_tokens`` targets fill, cut from the documents in order of their hash."""
    num_windows = config.unique_tokens // config.seq_len
    if not num_windows:
        raise ValueError(
            f"data.unique_tokens is {config.unique_tokens}: write at least one window, data.seq_len {config.seq_len}"
        )
    need = num_windows * config.seq_len + 1
    if need > entry["tokens"]:
        raise ValueError(
            f"data.unique_tokens is {config.unique_tokens}: the train split of {config.source} has "
            f"{entry['tokens']}: write {entry['tokens'] - 1} or less, or null for all"
        )
    try:
        line = json.loads((folder / "by_hash.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"data.unique_tokens is {config.unique_tokens}: no order by hash prepared in {folder}: call prepare first"
        ) from None
    return _map_split(folder, {**entry, "shards": [line]}).prefix(need)


def _map_split(folder: Path, entry: dict) -> TokenArray:
    """Raises ValueError if a shard is missing, truncated or, where it is small enough to look, damaged."""
    dtype = np.dtype(entry["dtype"])
    for line in entry["shards"]:
        path = folder / line["file"]
        size, want = path.stat().st_size if path.exists() else 0, line["tokens"] * dtype.itemsize
        if size != want:
            raise ValueError(f"{path} holds {size} bytes instead of {want}: delete {folder} and run again")
    if entry["tokens"] * dtype.itemsize <= VERIFY_BYTES:
        shards.hash_stream(folder, entry["shards"])
    return TokenArray([shards.map_shard(folder, line, dtype) for line in entry["shards"]])


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
        return sum(s["documents"] for s in self.manifest["splits"].values())

    @property
    def num_duplicates(self) -> int:
        return self.manifest["num_duplicates_removed"]

    @property
    def bytes_per_token(self) -> dict[str, float | None]:
        """UTF-8 bytes of text per predicted token, by split (the first token of a split is not predicted); None of
        tokens whose maker did not say."""
        splits = self.manifest["splits"]
        return {
            name: None if s["text_bytes"] is None else s["text_bytes"] / (s["tokens"] - 1) for name, s in splits.items()
        }

    @property
    def windows_per_epoch(self) -> int:
        return (len(self.arrays["train"]) - 1) // self.seq_len

    @property
    def epoch_tokens(self) -> int:
        """Targets that lie in a window, which is what an epoch trains on."""
        return self.windows_per_epoch * self.seq_len

    def describe(self) -> dict:
        """What the record says of the data. Bits per byte = loss in nats per token × tokens_per_byte / ln 2."""
        manifest, per_token = self.manifest, self.bytes_per_token["validation"]
        splits = manifest["splits"]
        text_bytes = [s["text_bytes"] for s in splits.values()]
        return {
            "source": manifest["source"],
            "source_version": manifest["source_version"],
            "licence": manifest["licence"],
            "tokenizer": manifest["tokenizer"]["name"],
            "fingerprint": self.fingerprint,
            "split_rule": manifest["split_rule"],
            "vocab_size": self.vocab_size,
            "train_tokens": self.train_tokens,
            "epoch_tokens": self.epoch_tokens,
            "validation_tokens": self.validation_tokens,
            "tokens_per_byte": None if per_token is None else 1 / per_token,
            "num_documents": self.num_documents,
            "num_validation_documents": splits["validation"]["documents"],
            "num_duplicates_removed": self.num_duplicates,
            "num_near_duplicates_removed": manifest["num_near_duplicates_removed"],
            # Of those, for a document that another source of the mixture holds out.
            "num_near_duplicates_across_sources": manifest.get("num_near_duplicates_across_sources", 0),
            "num_empty_removed": manifest["num_empty_removed"],
            "num_lossy_validation_documents": manifest["num_lossy_validation_documents"],
            "text_bytes": None if None in text_bytes else sum(text_bytes),
        }

    def require_vocab(self, vocab_size: int) -> None:
        """Raises ValueError if a model of this vocabulary cannot read the corpus."""
        if vocab_size < self.vocab_size:
            name = self.manifest["tokenizer"]["name"]
            raise ValueError(
                f"model.vocab_size is {vocab_size}: write {self.vocab_size} or more, the tokenizer {name} has as many"
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
        window_W = self._validation_order(0, _validation_size(num_tokens, self.num_validation_windows, self.seq_len))
        left_W = self.validation_tokens - 1 - window_W * self.seq_len
        return np.minimum(left_W, self.seq_len).astype(np.float32)

    @property
    def num_validation_windows(self) -> int:
        return math.ceil((self.validation_tokens - 1) / self.seq_len)

    def _validation_order(self, start: int, stop: int) -> np.ndarray:
        places = np.arange(start, stop, dtype=np.uint64)
        return permute(places, self.num_validation_windows, "validation").astype(np.int64)

    def validation_windows(self, start: int, stop: int, num_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Makes windows ``start`` to ``stop`` of ``validation(num_tokens)``, and the weights of their targets."""
        tokens, T = self.arrays["validation"], self.seq_len
        # The last window may be short: it is read further left, moved into place and padded.
        start_W = self._validation_order(start, stop) * T
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

    def validation_shares(self, num_tokens: int | None = None) -> list[tuple[str, float, slice]]:
        """(source, weight in the loss, its windows among those of ``validation``)."""
        return [(self.manifest["source"], 1.0, slice(None))]


def _validation_size(num_tokens: int | None, num_windows: int, seq_len: int) -> int:
    """Windows of ``validation(num_tokens)``. Raises ValueError for fewer than one token."""
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}: write a number ≥ 1")
    return num_windows if num_tokens is None else min(num_windows, math.ceil(num_tokens / seq_len))


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


class Mixture:
    """Several corpora as one, each giving its weight's share of the windows.

    Of every 1000 windows in training each source gives a fixed number, by its weight, in an order of their own; so the
    shares are exact from 1000 windows on and every source runs through its own epochs. The loss is Σ weight · loss over
    the sources' own validation splits.
    """

    def __init__(self, source: str, components: list[tuple[float, Corpus]]):
        self.source = source
        self.weights = [weight for weight, _ in components]
        self.corpora = [corpus for _, corpus in components]
        self.seq_len = self.corpora[0].seq_len
        self._counts = _shares_of_block(source, self.weights)
        shards.require_one_tokenizer(source, [corpus.manifest for corpus in self.corpora])

    @functools.cached_property
    def fingerprint(self) -> str:
        return shards.digest([[weight, c.fingerprint] for weight, c in zip(self.weights, self.corpora)])

    @property
    def vocab_size(self) -> int:
        return self.corpora[0].vocab_size

    @property
    def separator_id(self) -> int:
        return self.corpora[0].separator_id

    @property
    def train_tokens(self) -> int:
        return sum(corpus.train_tokens for corpus in self.corpora)

    @property
    def epoch_tokens(self) -> int:
        return sum(corpus.epoch_tokens for corpus in self.corpora)

    @property
    def validation_tokens(self) -> int:
        return sum(corpus.validation_tokens for corpus in self.corpora)

    def describe(self) -> dict:
        """As ``Corpus.describe``, of all sources together, and ``sources``: each with its weight."""
        parts = [corpus.describe() for corpus in self.corpora]
        per_token = [corpus.bytes_per_token["validation"] for corpus in self.corpora]
        known = None not in per_token
        bytes_per_token = math.fsum(w * b for w, b in zip(self.weights, per_token)) if known else None

        def total(name: str) -> int | None:
            values = [part[name] for part in parts]
            return None if None in values else sum(values)

        first = {name: parts[0][name] for name in ("tokenizer", "split_rule", "vocab_size")}
        counts = [name for name in parts[0] if name.startswith("num_") or name.endswith("_tokens")]
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            **first,
            **{name: total(name) for name in (*counts, "text_bytes")},
            "tokens_per_byte": 1 / bytes_per_token if known else None,
            "sources": [{**part, "weight": weight} for weight, part in zip(self.weights, parts)],
        }

    def require_vocab(self, vocab_size: int) -> None:
        self.corpora[0].require_vocab(vocab_size)

    def require_horizon(self, num_tokens: float) -> None:
        """As ``Corpus.require_horizon``, of each source's share."""
        for weight, corpus in zip(self.weights, self.corpora):
            corpus.require_horizon(weight * num_tokens)

    def batch(self, step: int, batch_size: int, seed: int, rows: slice | None = None) -> np.ndarray:
        """As ``Corpus.batch``."""
        index_R = _indices(step, batch_size, rows)
        block_R, place_R = np.divmod(index_R, np.uint64(MIXTURE_BLOCK))
        for block in np.unique(block_R):
            here = block_R == block
            place_R[here] = _order(MIXTURE_BLOCK, f"mixture {seed} {block}", 0)[place_R[here]]
        out_RS = np.empty((len(index_R), self.seq_len + 1), np.int32)
        start = 0
        for count, corpus in zip(self._counts, self.corpora):
            mine = (place_R >= start) & (place_R < start + count)
            own_R = block_R[mine] * np.uint64(count) + (place_R[mine] - np.uint64(start))
            out_RS[mine] = corpus.windows(own_R, seed)
            start += count
        return out_RS

    def validation(self, num_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As ``Corpus.validation``, source after source; of ``num_tokens`` each gives its weight's share."""
        return self.validation_windows(0, len(self.validation_counts(num_tokens)), num_tokens)

    def validation_counts(self, num_tokens: int | None = None) -> np.ndarray:
        """As ``Corpus.validation_counts``."""
        each = zip(self.corpora, self._tokens_each(num_tokens))
        return np.concatenate([corpus.validation_counts(n) for corpus, n in each])

    def validation_windows(self, start: int, stop: int, num_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As ``Corpus.validation_windows``."""
        parts = []
        for corpus, (_, _, here) in zip(self.corpora, self.validation_shares(num_tokens)):
            low, high = max(start, here.start), min(stop, here.stop)
            if low < high:
                parts.append(corpus.validation_windows(low - here.start, high - here.start))
        x, weights = zip(*parts)
        return np.concatenate(x), np.concatenate(weights)

    def validation_shares(self, num_tokens: int | None = None) -> list[tuple[str, float, slice]]:
        """As ``Corpus.validation_shares``."""
        shares, start = [], 0
        for weight, corpus, n in zip(self.weights, self.corpora, self._tokens_each(num_tokens)):
            stop = start + _validation_size(n, corpus.num_validation_windows, self.seq_len)
            shares.append((corpus.manifest["source"], weight, slice(start, stop)))
            start = stop
        return shares

    def validation_tokens_by_source(self, num_tokens: int | None = None) -> dict[str, int]:
        """How many targets each source has in ``validation(num_tokens)``."""
        counts = self.validation_counts(num_tokens)
        shares = self.validation_shares(num_tokens)
        return {source: int(counts[here].sum(dtype=np.float64)) for source, _, here in shares}

    def _tokens_each(self, num_tokens: int | None) -> list[int | None]:
        if num_tokens is None:
            return [None] * len(self.corpora)
        return [max(1, math.ceil(weight * num_tokens)) for weight in self.weights]


def _shares_of_block(source: str, weights: list[float]) -> list[int]:
    """Weights as whole numbers that sum to the block, by largest remainder."""
    exact = [weight * MIXTURE_BLOCK for weight in weights]
    counts = [math.floor(x + 1e-9) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: MIXTURE_BLOCK - sum(counts)]:
        counts[i] += 1
    if min(counts) < 1:
        raise ValueError(f"data.source is {source!r}: a weight below 1/{MIXTURE_BLOCK} of the whole: leave it out")
    return counts
