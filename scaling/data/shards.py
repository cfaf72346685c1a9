"""Token arrays on the disk: written in shards with an index of their documents, read as one array.

In the array every document follows a separator token, so a document's first token is predicted too. Beside a shard
``<name>.bin`` lies ``<name>.npy``, a row a document in order: the first 16 bytes of its sha256, its tokens (separator
included), its bytes of text.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling.data.tokenizers import token_dtype

SCHEMA = 2
SPLITS = ("train", "validation")
DOCUMENT = np.dtype([("hash", "<u8"), ("more_hash", "<u8"), ("tokens", "<u8"), ("text_bytes", "<u8")])
_BLOCK_BYTES = 2**24


def split_of(digest: bytes, validation_fraction: float) -> str:
    """The split of the document whose text has this sha256: a function of the text alone."""
    return "validation" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"


class ShardWriter:
    """Appends documents to one shard, counting and hashing as it goes; nothing is seen under its name before
    ``finish``."""

    def __init__(self, path: Path, vocab_size: int, separator_id: int):
        self._path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file, self._hash = self._temporary.open("wb"), hashlib.sha256()
        self._dtype = token_dtype(vocab_size)
        self._separator = np.array([separator_id], self._dtype).tobytes()
        self._rows: list[tuple[int, int, int, int]] = []

    def append(self, digest: bytes, ids: np.ndarray, text_bytes: int) -> None:
        chunk = self._separator + ids.astype(self._dtype).tobytes()
        self._file.write(chunk)
        self._hash.update(chunk)
        hashes = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
        self._rows.append((*hashes, 1 + len(ids), text_bytes))

    def finish(self) -> dict:
        """Puts the shard on the disk and returns its line of the manifest."""
        rows = np.array(self._rows, DOCUMENT)
        index = self._path.with_suffix(".npy")
        with open(self._temporary.with_suffix(".npy"), "wb") as f:
            np.save(f, rows, allow_pickle=False)
            _to_disk(f)
        os.replace(f.name, index)
        _to_disk(self._file)
        self._file.close()
        os.replace(self._temporary, self._path)
        return {
            "file": self._path.name,
            "tokens": int(rows["tokens"].sum()),
            "text_bytes": int(rows["text_bytes"].sum()),
            "documents": len(rows),
            "sha256": self._hash.hexdigest(),
        }

    def close(self) -> None:
        """Removes what was not finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def index_of(folder: Path, shard: dict) -> np.ndarray:
    """The documents of one shard, an array of ``DOCUMENT``."""
    return np.load((folder / shard["file"]).with_suffix(".npy"), allow_pickle=False)


def map_shard(folder: Path, shard: dict, dtype: np.dtype) -> np.ndarray:
    """The shard's tokens, memory-mapped."""
    return np.asarray(np.memmap(folder / shard["file"], dtype, mode="r"))


def documents_of(tokens: np.ndarray, index: np.ndarray) -> Iterator[np.ndarray]:
    """The documents of a shard, each without its separator."""
    ends = np.cumsum(index["tokens"]).tolist()
    for start, end in zip([0, *ends], ends):
        yield tokens[start + 1 : end]


def only(folder: Path, lines: Sequence[dict], keep: Sequence[np.ndarray], dtype: np.dtype) -> list[dict]:
    """The shards ``lines`` with the documents that ``keep`` marks, an array a shard: as they are where all stay, left
    out where none does, else written again under another name."""
    return [
        line if kept.all() else _without(folder, line, kept, dtype) for line, kept in zip(lines, keep) if kept.any()
    ]


def _without(folder: Path, shard: dict, keep: np.ndarray, dtype: np.dtype) -> dict:
    """Writes the shard again with the documents that ``keep`` marks, under another name; returns its line."""
    index = index_of(folder, shard)
    tokens = map_shard(folder, shard, dtype)
    path = (folder / shard["file"]).with_suffix(".kept.bin")
    ends = np.cumsum(index["tokens"]).tolist()
    starts = [0, *ends[:-1]]
    sha256 = hashlib.sha256()
    with open(path, "wb") as f:
        for i in np.flatnonzero(keep):
            chunk = tokens[starts[i] : ends[i]].tobytes()
            f.write(chunk)
            sha256.update(chunk)
        _to_disk(f)
    with open(path.with_suffix(".npy"), "wb") as f:
        np.save(f, index[keep], allow_pickle=False)
        _to_disk(f)
    return {
        "file": path.name,
        "tokens": int(index["tokens"][keep].sum()),
        "text_bytes": int(index["text_bytes"][keep].sum()),
        "documents": int(keep.sum()),
        "sha256": sha256.hexdigest(),
    }


def hash_stream(folder: Path, shards: Sequence[dict]) -> str:
    """sha256 of the shards' bytes one after the other.

    Raises ValueError if one of them is not what its line says.
    """
    whole = hashlib.sha256()
    for shard in shards:
        alone = hashlib.sha256()
        with open(folder / shard["file"], "rb") as f:
            while block := f.read(_BLOCK_BYTES):
                alone.update(block)
                if len(shards) > 1:
                    whole.update(block)
        if alone.hexdigest() != shard["sha256"]:
            raise ValueError(f"{folder / shard['file']} is corrupt (its sha256 changed): delete {folder} and run again")
    return whole.hexdigest() if len(shards) > 1 else alone.hexdigest()


def read_manifest(folder: Path) -> dict:
    """The manifest of a prepared folder. Raises ValueError if it is damaged or of another version."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sha256, schema = manifest.pop("manifest_sha256"), manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        manifest = sha256 = schema = None
    if manifest is None or (schema == SCHEMA and sha256 != digest(manifest)):
        raise ValueError(f"{path} is corrupt or missing: delete {folder} and run again")
    if schema != SCHEMA:
        raise ValueError(f"{path} is of schema {schema!r}, this version reads {SCHEMA}: delete {folder} and run again")
    return manifest


def require_one_tokenizer(source: str, manifests: Iterable[dict]) -> None:
    """Raises ValueError if the sources of the mixture ``source`` were tokenised differently."""
    if len({json.dumps(manifest["tokenizer"], sort_keys=True) for manifest in manifests}) > 1:
        raise ValueError(
            f"data.source is {source!r}: its sources were tokenised differently: write one data.tokenizer that all "
            "can use, and delete what was prepared with another"
        )


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TokenArray:
    """Shards read as one array of tokens. Letters in shapes: R rows, S tokens each."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self._shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self._views: dict[int, np.ndarray] = {}  # of every window of a length; making one takes longer than a batch

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, start_R: np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) of every start: (R, S). They must lie inside the array."""
        if len(self._shards) == 1:
            if length not in self._views:
                self._views[length] = np.lib.stride_tricks.sliding_window_view(self._shards[0], length)
            return self._views[length][start_R]
        out_RS = np.empty((len(start_R), length), self._shards[0].dtype)
        first_R = np.searchsorted(self._ends, start_R, side="right")
        for i, (start, shard) in enumerate(zip(start_R.tolist(), first_R.tolist())):
            filled = 0
            while filled < length:  # a window may lie across the border of shards, short ones even across several
                begin = start + filled - (int(self._ends[shard - 1]) if shard else 0)
                piece = self._shards[shard][begin : begin + length - filled]
                out_RS[i, filled : filled + len(piece)] = piece
                filled += len(piece)
                shard += 1
        return out_RS

    def prefix(self, length: int) -> "TokenArray":
        """The first ``length`` tokens."""
        kept, left = [], length
        for shard in self._shards:
            kept.append(shard[:left])
            left -= len(kept[-1])
            if not left:
                break
        return TokenArray(kept)

    def tobytes(self) -> bytes:
        return b"".join(shard.tobytes() for shard in self._shards)
