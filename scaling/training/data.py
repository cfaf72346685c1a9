"""Text to a token array once; ``batch(step)`` ever after.

    folder = prepare(config, cache_dir)   # reads the source, tokenises, writes two memory-mapped arrays and a manifest
    corpus = open(config, cache_dir)      # numpy and the standard library only
    x = corpus.batch(step, batch_size, seed)

A document's split is decided by the hash of its text, so it never moves when others are added; exact duplicates are
dropped. In the array every document follows a separator token, so a document's first token is predicted too.

A batch is a function of its step: there is no iterator whose state a checkpoint would have to keep.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scaling.config import DataConfig
from scaling.records import write_json
from scaling.training import sources, tokenizers

SCHEMA = 1
SPLITS = ("train", "validation")
# Arrays up to this size are hashed again on opening (about a second); of larger ones only the length is checked.
VERIFY_BYTES = 2**30

Progress = Callable[[str], None]


# --- Preparing: documents to token arrays ----------------------------------------------------------------------------


def folder_of(config: DataConfig, cache_dir: Path) -> Path:
    """Where the token arrays of this source, tokenizer and split rule lie; ``seq_len`` does not enter."""
    key = [config.source, config.tokenizer, config.text_key, config.validation_fraction]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", config.source).strip("-")[-40:]
    return Path(cache_dir) / f"{slug}-{config.tokenizer.replace(':', '-')}-{digest}"


def prepare(config: DataConfig, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Builds the token arrays of ``config`` unless they are there, and returns their folder.

    Nothing half-written is ever seen: the folder is built under another name and moved. Processes that race wait for
    the first; one that was killed leaves nothing that the next does not clear away.

    Args:
      cache_dir: a local or shared folder (it is memory-mapped, so no bucket).
      progress: called with a line of text now and then.

    Raises:
      ValueError: bad source, no text in one of the splits, or text files that changed since the arrays were built.
    """
    cache_dir, folder = Path(cache_dir), folder_of(config, cache_dir)
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{folder.name}.lock") as alone:
            if alone:
                for leftover in cache_dir.glob(f".{folder.name}.*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)
            if not folder.exists():
                _build(config, folder, progress or (lambda line: None))
    _refuse_changed_files(config, folder)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds an advisory lock; yields False on a file system without locks, where racers build the same thing twice."""
    import fcntl

    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True  # released when the file is closed, also by kill -9


def _build(config: DataConfig, folder: Path, progress: Progress) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        write_json(temporary / "manifest.json", _write_arrays(config, temporary, progress))
        temporary.chmod(0o755)  # mkdtemp's 0700 would shut others out of a shared cache
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.exists():  # else another process was first, and built the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_changed_files(config: DataConfig, folder: Path) -> None:
    """Text files that changed under a built corpus are an error: to train on the old text in silence is worse."""
    state = sources.current_state(config)
    if state is not None and state != _read_manifest(folder)["source_state"]:
        raise ValueError(
            f"data.source is {config.source!r}: its files changed since {folder} was built from them: "
            "delete that folder to build it again (same text, same fingerprint)"
        )


class _SplitWriter:
    """Appends documents to one split's array, counting and hashing as it goes."""

    def __init__(self, file: BinaryIO, tokenizer: tokenizers.Tokenizer):
        self._file, self._hash = file, hashlib.sha256()
        self._dtype = _token_dtype(tokenizer.vocab_size)
        self._separator = np.array([tokenizer.separator_id], self._dtype).tobytes()
        self._num_tokens = self._text_bytes = self._num_documents = 0

    def append(self, ids: np.ndarray, text_bytes: int) -> None:
        chunk = self._separator + ids.astype(self._dtype).tobytes()
        self._file.write(chunk)
        self._hash.update(chunk)
        self._num_tokens += 1 + len(ids)
        self._text_bytes += text_bytes
        self._num_documents += 1

    def finish(self) -> dict:
        """Puts the array on the disk and returns what the manifest says of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {
            "tokens": self._num_tokens,
            "text_bytes": self._text_bytes,
            "documents": self._num_documents,
            "dtype": self._dtype.str,
            "sha256": self._hash.hexdigest(),
        }


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(next(d for d in ("<u1", "<u2", "<u4") if vocab_size <= 2 ** (8 * np.dtype(d).itemsize)))


def _write_arrays(config: DataConfig, folder: Path, progress: Progress) -> dict:
    """Tokenises, splits and writes every distinct document; returns the manifest."""
    tokenizer = tokenizers.load(config.tokenizer)
    source = sources.read(config, folder)
    with contextlib.ExitStack() as files:
        writers = {
            split: _SplitWriter(files.enter_context((folder / f"{split}.bin").open("wb")), tokenizer)
            for split in SPLITS
        }
        removed = _write_distinct(config, source.documents, tokenizer, writers, progress)
        splits = {split: writer.finish() for split, writer in writers.items()}
    _require_both_splits(config, splits)
    manifest = {
        "schema": SCHEMA,
        "source": config.source,
        "source_version": source.version,
        "source_state": source.state,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "separator_id": tokenizer.separator_id,
        },
        "split_rule": f"first 64 bits of sha256(text) < {config.validation_fraction!r} * 2^64: validation",
        "splits": splits,
        **removed,
    }
    manifest["fingerprint"] = _fingerprint(manifest)
    return {**manifest, "manifest_sha256": _digest(manifest)}


def _write_distinct(
    config: DataConfig,
    documents: Iterator[sources.Document],
    tokenizer: tokenizers.Tokenizer,
    writers: dict[str, _SplitWriter],
    progress: Progress,
) -> dict[str, int]:
    """Sends each distinct document to its split; returns how many were left out as duplicates and as empty."""
    seen: set[bytes] = set()
    num_duplicates = num_empty = text_bytes = 0
    reported = time.monotonic()
    progress(f"{config.source}: reading")
    for name, text in documents:
        try:
            ids = tokenizer.encode(text)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        encoded = text.encode("utf-8")
        digest = hashlib.sha256(encoded).digest()
        if not text:
            num_empty += 1
        elif digest in seen:
            num_duplicates += 1
        else:
            seen.add(digest)
            writers[split_of(digest, config.validation_fraction)].append(ids, len(encoded))
            text_bytes += len(encoded)
        if time.monotonic() - reported > 0.5:
            reported = time.monotonic()
            progress(f"{config.source}: {len(seen)} documents, {text_bytes / 1e6:.1f} MB of text so far")
    progress(f"{config.source}: {len(seen)} documents, {text_bytes / 1e6:.1f} MB of text")
    return {"num_duplicates_removed": num_duplicates, "num_empty_removed": num_empty}


def split_of(digest: bytes, validation_fraction: float) -> str:
    """The split of the document whose text has this sha256: a function of the text alone."""
    return "validation" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"


def _require_both_splits(config: DataConfig, splits: dict[str, dict]) -> None:
    total = sum(s["documents"] for s in splits.values())
    for split, counts in splits.items():
        if not counts["documents"]:
            raise ValueError(
                f"data.source is {config.source!r}: of its {total} distinct documents none falls into {split} at "
                f"validation_fraction {config.validation_fraction}: add documents (a file or a JSONL line is one), "
                "or change the fraction"
            )


def _fingerprint(manifest: dict) -> str:
    """sha256 over both token arrays, the tokenizer and the split rule: equal if and only if every batch is equal."""
    arrays = {split: (s["sha256"], s["dtype"]) for split, s in manifest["splits"].items()}
    return _digest([arrays, manifest["tokenizer"], manifest["split_rule"]])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- Reading: token arrays to batches --------------------------------------------------------------------------------


def open(config: DataConfig, cache_dir: Path) -> "Corpus":
    """Opens what ``prepare`` built.

    Raises ValueError if it is not there, truncated or corrupt (saying what to delete), or shorter than a window.
    """
    folder = folder_of(config, cache_dir)
    if not folder.exists():
        raise ValueError(
            f"data.source is {config.source!r}: no tokens prepared for it in {cache_dir}: call prepare first"
        )
    manifest = _read_manifest(folder)
    arrays = {split: _map_array(folder, split, manifest) for split in SPLITS}
    for split, tokens in arrays.items():
        least = config.seq_len + 1 if split == "train" else 2
        if len(tokens) < least:
            raise ValueError(
                f"data.seq_len is {config.seq_len}: the {split} split of {config.source} has {len(tokens)} tokens, a "
                f"window takes {least}: add text or shorten the windows"
            )
    return Corpus(manifest, arrays, config.seq_len)


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digest, schema = manifest.pop("manifest_sha256"), manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        manifest = digest = schema = None
    if manifest is None or (schema == SCHEMA and digest != _digest(manifest)):
        raise ValueError(f"{path} is corrupt or missing: delete {folder} and run again")
    if schema != SCHEMA:
        raise ValueError(f"{path} is of schema {schema!r}, this version reads {SCHEMA}: delete {folder} and run again")
    return manifest


def _map_array(folder: Path, split: str, manifest: dict) -> np.ndarray:
    path, counts = folder / f"{split}.bin", manifest["splits"][split]
    dtype = np.dtype(counts["dtype"])
    size, want = path.stat().st_size if path.exists() else 0, counts["tokens"] * dtype.itemsize
    if size != want:
        raise ValueError(f"{path} holds {size} bytes instead of {want}: delete {folder} and run again")
    tokens = np.asarray(np.memmap(path, dtype, mode="r"))
    if size <= VERIFY_BYTES and hashlib.sha256(tokens.data).hexdigest() != counts["sha256"]:
        raise ValueError(f"{path} is corrupt (its sha256 changed): delete {folder} and run again")
    return tokens


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Memory-mapped tokens of one source, cut into windows.

    Letters in shapes: B sequences of a batch, R those of them this host reads, W windows, T ``seq_len``, S T + 1.
    Window w is tokens [wT, wT + T]: T inputs and, one to the right, their T targets. Targets of different windows do
    not overlap. Up to T - 1 tokens at the end of the train split are in no window.
    """

    manifest: dict
    arrays: dict[str, np.ndarray]
    seq_len: int

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def separator_id(self) -> int:
        return self.manifest["tokenizer"]["separator_id"]

    @property
    def train_tokens(self) -> int:
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
    def bytes_per_token(self) -> dict[str, float]:
        """UTF-8 bytes of text per predicted token, by split (the first token of a split is not predicted)."""
        return {split: s["text_bytes"] / (s["tokens"] - 1) for split, s in self.manifest["splits"].items()}

    @property
    def windows_per_epoch(self) -> int:
        return (self.train_tokens - 1) // self.seq_len

    def describe(self) -> dict:
        """What the record says of the data. Bits per byte = loss in nats per token × tokens_per_byte / ln 2."""
        splits = self.manifest["splits"]
        return {
            "source": self.manifest["source"],
            "source_version": self.manifest["source_version"],
            "tokenizer": self.manifest["tokenizer"]["name"],
            "fingerprint": self.fingerprint,
            "split_rule": self.manifest["split_rule"],
            "vocab_size": self.vocab_size,
            "train_tokens": self.train_tokens,
            "validation_tokens": self.validation_tokens,
            "tokens_per_byte": 1 / self.bytes_per_token["validation"],
            "num_documents": self.num_documents,
            "num_validation_documents": splits["validation"]["documents"],
            "num_duplicates_removed": self.num_duplicates,
            "num_empty_removed": self.manifest["num_empty_removed"],
            "text_bytes": sum(s["text_bytes"] for s in splits.values()),
        }

    def require_vocab(self, vocab_size: int) -> None:
        """Raises ValueError if a model of this vocabulary cannot read the corpus."""
        if vocab_size < self.vocab_size:
            name = self.manifest["tokenizer"]["name"]
            raise ValueError(
                f"model.vocab_size is {vocab_size}: write {self.vocab_size} or more, the tokenizer {name} has as many"
            )

    def batch(self, step: int, batch_size: int, seed: int, rows: slice | None = None) -> np.ndarray:
        """The windows trained on at ``step``: int32 [B, S], or [R, S] with ``rows`` of the B.

        A pure function. Windows come in order of a seeded permutation of all of them, another one each epoch; a batch
        may straddle the border between two epochs.
        """
        if step < 0:
            raise ValueError(f"step is {step}: write a number ≥ 0")
        index_R = np.arange(batch_size, dtype=np.uint64)[rows or slice(None)] + np.uint64(step * batch_size)
        epoch_R, window_R = np.divmod(index_R, np.uint64(self.windows_per_epoch))
        for epoch in np.unique(epoch_R):
            here = epoch_R == epoch
            window_R[here] = permute(window_R[here], self.windows_per_epoch, f"train {seed} {epoch}")
        return self._windows_WS[window_R.astype(np.int64)].astype(np.int32)

    @functools.cached_property
    def _windows_WS(self) -> np.ndarray:
        """All train windows as a view; a row overlaps the next by the one token that is target here, input there."""
        every = np.lib.stride_tricks.sliding_window_view(self.arrays["train"], self.seq_len + 1)
        return every[:: self.seq_len]

    def validation(self, num_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Validation windows, int32 [W, S], and the weights of their targets, float32 [W, T], 0 where padded.

        Without ``num_tokens``: the whole split; every token after the first is predicted exactly once. With it: the
        first ceil(num_tokens / T) windows. They come in one fixed shuffled order, so that such a part is a fair sample
        of the split and lies inside every larger one.
        """
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}: write a number ≥ 1")
        tokens, T = self.arrays["validation"], self.seq_len
        num_windows = math.ceil((len(tokens) - 1) / T)
        take = num_windows if num_tokens is None else min(num_windows, math.ceil(num_tokens / T))
        window_W = permute(np.arange(take, dtype=np.uint64), num_windows, "validation").astype(np.int64)
        index_WS = window_W[:, None] * T + np.arange(T + 1)
        inside_WS = index_WS < len(tokens)
        x_WS = np.where(inside_WS, tokens[np.minimum(index_WS, len(tokens) - 1)], self.separator_id)
        return x_WS.astype(np.int32), inside_WS[:, 1:].astype(np.float32)


_NUM_ROUNDS = 8


@functools.lru_cache(maxsize=256)
def _round_keys(key: str) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * _NUM_ROUNDS), "<u8")


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where the permutation of range(``size``) that ``key`` names sends ``index`` (uint64 in, uint64 out).

    O(1) per element and nothing to keep, unlike a shuffled array, and the same under every version of numpy, unlike
    numpy.random. A Feistel network on pairs (left, right) in Z_a × Z_b, ab ≥ size: each round adds to one half a hash
    of the other, which can be undone, so it is a bijection; what falls on the ab - size < a numbers outside is sent
    through again until it is inside (cycle walking; Black and Rogaway 2002).
    """
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)
    out = _feistel(index, np.uint64(a), np.uint64(b), _round_keys(key))
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], np.uint64(a), np.uint64(b), _round_keys(key))
    return out


def _feistel(x: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(x, b)
    for i in range(0, _NUM_ROUNDS, 2):
        left = (left + _mix(right ^ keys[i]) % a) % a
        right = (right + _mix(left ^ keys[i + 1]) % b) % b
    return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
