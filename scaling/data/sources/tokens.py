"""``tokens:<folder>``: token arrays that somebody else made, .bin (raw) or .npy, and a tokens.json that describes them:

    {"vocab_size": 50257, "dtype": "uint16", "separator_id": 50256, "bytes_per_token": 4.3, "licence": "CC-BY-4.0"}

``dtype`` is uint8, uint16 or uint32, little-endian. ``separator_id`` stands between documents: without documents there
is no split by document. The last two keys are optional; without bytes_per_token no loss is given in bits per byte. In
the prepared arrays the separator and id 0 have changed places, because 0 opens a document in every corpus.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scaling.config import DataConfig
from scaling.data.sources.source import PART_BYTES, Document, Part, Source, TokenFormat, state_of

_DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
_LOOK_AHEAD = 2**16


def survey(config: DataConfig, workdir: Path) -> Source:
    description, files = _read(config.source)
    parts = []
    for path in files:
        tokens = _map(path, description)
        step = PART_BYTES // tokens.itemsize
        for start in range(0, len(tokens), step):
            stop = min(start + step, len(tokens))
            parts.append(Part((stop - start) * tokens.itemsize, [str(path), start, stop]))
    identity = [description["vocab_size"], description["separator_id"]]
    return Source(
        parts=parts,
        licence=description.get("licence") or description.get("license"),
        state=state_of(files),
        tokens=TokenFormat(
            vocab_size=description["vocab_size"],
            fingerprint=hashlib.sha256(json.dumps(["token ids", *identity]).encode()).hexdigest(),
            bytes_per_token=description.get("bytes_per_token"),
        ),
    )


def current_state(config: DataConfig) -> str:
    return state_of(_read(config.source)[1])


def documents(config: DataConfig, part: Part, workdir: Path) -> Iterator[Document]:
    description, _ = _read(config.source)
    name, start, stop = part.where
    tokens = _map(Path(name), description)
    separator = description["separator_id"]
    begins = np.flatnonzero(tokens[start:stop] == separator) + start + 1
    if start == 0:
        begins = np.concatenate([[0], begins])
    ends = [*(begins[1:] - 1), _next_separator(tokens, begins[-1], separator)] if len(begins) else []
    for begin, end in zip(begins.tolist(), ends):
        yield Document(f"{name}, token {begin}", _checked(tokens[begin:end], name, begin, description))


def _next_separator(tokens: np.ndarray, start: int, separator: int) -> int:
    for at in range(start, len(tokens), _LOOK_AHEAD):
        found = np.flatnonzero(tokens[at : at + _LOOK_AHEAD] == separator)
        if len(found):
            return at + int(found[0])
    return len(tokens)


def _checked(ids: np.ndarray, path: str, begin: int, description: dict) -> np.ndarray:
    """The document, its ids in range, 0 and the separator exchanged (inside a document there is no separator)."""
    if len(ids) and ids.max() >= description["vocab_size"]:
        at = int(np.argmax(ids >= description["vocab_size"]))
        raise ValueError(
            f"{path}: token {begin + at} is {ids[at]}: tokens.json says vocab_size {description['vocab_size']}: "
            "write the tokenizer's size there, or the dtype the file really has"
        )
    return np.where(ids == 0, ids.dtype.type(description["separator_id"]), ids)


def _read(source: str) -> tuple[dict[str, Any], list[Path]]:
    folder = Path(source.removeprefix("tokens:")).expanduser()
    path = folder / "tokens.json"
    want = '{"vocab_size": 50257, "dtype": "uint16", "separator_id": 50256}'
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"data.source is {source!r}: no {path}: write one, e.g. {want}") from None
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not readable as JSON ({e}): write e.g. {want}") from None
    if not isinstance(description, dict):
        raise ValueError(f"{path}: a {type(description).__name__}: write an object, e.g. {want}")
    size, separator = description.get("vocab_size"), description.get("separator_id")
    if type(size) is not int or size < 2:
        raise ValueError(f"{path}: vocab_size is {size!r}: write the number of ids the tokenizer has")
    if type(separator) is not int or not 0 <= separator < size:
        raise ValueError(
            f"{path}: separator_id is {separator!r}: write the id in [0, {size}) that stands between documents"
        )
    if description.get("dtype") not in _DTYPES:
        raise ValueError(f"{path}: dtype is {description.get('dtype')!r}: write one of {', '.join(_DTYPES)}")
    per_token = description.get("bytes_per_token", 1.0)
    if not isinstance(per_token, (int, float)) or not (math.isfinite(per_token) and per_token > 0):
        raise ValueError(f"{path}: bytes_per_token is {per_token!r}: write a positive number or leave it out")
    files = sorted((p for p in folder.rglob("*") if p.suffix in (".bin", ".npy")), key=lambda p: p.as_posix())
    if not files:
        raise ValueError(f"data.source is {source!r}: no .bin or .npy file in {folder}: write the folder that has them")
    return description, files


def _map(path: Path, description: dict) -> np.ndarray:
    """The file's tokens, memory-mapped. Raises ValueError if it is not what tokens.json says."""
    dtype = np.dtype(_DTYPES[description["dtype"]])
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            raise ValueError(f"{path}: not a NumPy array file ({e}): save it again, or leave it out") from None
        if tokens.dtype != dtype or tokens.ndim != 1:
            raise ValueError(
                f"{path}: an array of {tokens.dtype} of shape {tokens.shape}: tokens.json says {description['dtype']}, "
                "and it must have one axis"
            )
        return tokens
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{path}: {size} bytes are no whole number of {description['dtype']}: mend dtype or the file")
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)
