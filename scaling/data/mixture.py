"""Opens prepared data as a corpus or a stream, or several of them mixed by weight."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scaling.config import DataConfig
from scaling.data import shards, synthetic, validation
from scaling.data.corpus import Corpus, _indices, _order
from scaling.data.preparing.preparation import folders_of, is_prepared
from scaling.data.shards import TokenArray, read_manifest
from scaling.data.stream import Stream

# Arrays up to this size are hashed again on opening (about a second); of larger ones only the length is checked.
VERIFY_BYTES = 2**30


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


def epochs_of(cache_dir: Path) -> Callable[[DataConfig], int | None]:
    """Returns a function that tells how many tokens an epoch of some data has, None where they are not prepared.

    It raises ValueError as ``open`` does.
    """

    @functools.cache
    def epoch_tokens(config: DataConfig) -> int | None:
        return open(config, cache_dir).epoch_tokens if is_prepared(config, cache_dir) else None

    return epoch_tokens


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
    num_windows = config.unique_tokens // config.seq_len  # type: ignore[operator]  # not None: see the caller
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
    def shares(self) -> list[float]:
        """Of the windows, source by source: the weights in whole windows of a block."""
        return [count / MIXTURE_BLOCK for count in self._counts]

    @property
    def epoch_tokens(self) -> int:
        """Tokens until the first of the sources has been read once and is read again."""
        return int(min(corpus.epoch_tokens / share for share, corpus in zip(self.shares, self.corpora)))

    def distinct_tokens(self, num_tokens: float) -> int:
        """As ``Corpus.distinct_tokens``; where a source repeats, what is read of each, once."""
        if num_tokens <= self.epoch_tokens:
            return self.epoch_tokens
        each = zip(self.shares, self.corpora)
        return int(sum(min(share * num_tokens, corpus.epoch_tokens) for share, corpus in each))

    @property
    def validation_tokens(self) -> int:
        return sum(corpus.validation_tokens for corpus in self.corpora)

    def describe(self) -> dict:
        """As ``Corpus.describe``, of all sources together, and ``sources``: each with its weight."""
        parts = [corpus.describe() for corpus in self.corpora]
        per_token: list[Any] = [corpus.bytes_per_token["validation"] for corpus in self.corpora]
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
            "epoch_tokens": self.epoch_tokens,
            "tokens_per_byte": 1 / bytes_per_token if known else None,  # type: ignore[operator]  # known
            "sources": [{**part, "weight": weight} for weight, part in zip(self.weights, parts)],
        }

    def require_vocab(self, vocab_size: int, extra_ids: int = 0) -> None:
        """As ``Corpus.require_vocab``; all sources have one tokenizer."""
        self.corpora[0].require_vocab(vocab_size, extra_ids)

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

    def validation_blocks(self, num_tokens: int | None = None) -> np.ndarray:
        """As ``Corpus.validation_blocks``."""
        each = enumerate(zip(self.corpora, self._tokens_each(num_tokens)))
        return np.concatenate([i * validation.NUM_BLOCKS + corpus.validation_blocks(n) for i, (corpus, n) in each])

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
            stop = start + validation.size(n, corpus.num_validation_windows, self.seq_len)
            shares.append((corpus.manifest["source"], weight, slice(start, stop)))
            start = stop
        return shares

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
