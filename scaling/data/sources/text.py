"""``text:<folder or glob>``: a document per file, or per line of a .jsonl; compressed or not."""

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from scaling.config import DataConfig
from scaling.data.sources.source import PART_BYTES, Document, Part, Source, decoded, state_of

JSON_LINES = (".jsonl", ".ndjson")
# A plain file is one document and is held in memory whole.
MAX_DOCUMENT_BYTES = 2**30


def survey(config: DataConfig, workdir: Path) -> Source:
    files = text_files(config.source)
    return Source(parts=_parts(files), state=state_of(files))


def current_state(config: DataConfig) -> str:
    return state_of(text_files(config.source))


def text_files(source: str) -> list[Path]:
    """Files that ``text:<folder or glob>`` names, in order of path: all that are not hidden, or those that match.

    Raises ValueError if there are none.
    """
    where = os.path.expanduser(source.removeprefix("text:"))
    if os.path.isdir(where):
        found = [p for p in Path(where).rglob("*") if not _is_hidden(p.relative_to(where))]
    elif os.path.exists(where):  # a file called so, and no pattern, whatever is in its name
        found = [Path(where)]
    else:
        found = [Path(p) for p in glob.glob(where, recursive=True)]
    found = sorted((p for p in found if p.is_file()), key=lambda p: p.as_posix())
    if not found:
        raise ValueError(
            f"data.source is {source!r}: no file there; write text:<folder> or a glob such as text:notes/**/*.md"
        )
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _parts(files: list[Path]) -> list[Part]:
    """Small files together, in order; a large uncompressed file of lines in stretches of bytes, [path, start, stop]."""
    parts: list[Part] = []
    together: list[list] = []
    size = 0
    for path in files:
        num_bytes = path.stat().st_size
        if size and size + num_bytes > PART_BYTES:
            parts.append(Part(size, together))
            together, size = [], 0
        if num_bytes > PART_BYTES and path.suffix in JSON_LINES:
            for start in range(0, num_bytes, PART_BYTES):
                stop = min(start + PART_BYTES, num_bytes)
                parts.append(Part(stop - start, [[str(path), start, stop]]))
        else:
            together.append([str(path), 0, None])
            size += num_bytes
    return [*parts, Part(size, together)] if together else parts


def documents(config: DataConfig, part: Part, workdir: Path) -> Iterator[Document]:
    for name, start, stop in part.where:
        path = Path(name)
        opener = _OPENERS.get(path.suffix, open)
        plain = path.with_suffix("") if opener is not open else path
        try:
            with opener(path, "rb") as f:
                if plain.suffix in JSON_LINES:
                    yield from _lines(f, name, start, stop, config.text_key)
                else:
                    yield Document(name, decoded(_whole(f, name), name))
        except (OSError, zlib.error, lzma.LZMAError, EOFError, _BrokenZstdError) as e:
            if isinstance(e, OSError) and e.errno is not None:  # bz2 and gzip raise bare ones at what is not theirs
                raise ValueError(f"{path}: cannot be read ({e.strerror}): mend that or leave the file out") from e
            raise ValueError(f"{path}: not a whole {_FORMATS[path.suffix]} file ({e}): compress it again") from e


def _whole(f: BinaryIO, name: str) -> bytes:
    raw = f.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{name}: more than 1 GiB in one document: cut it into files, or into lines of a .jsonl")
    return raw


def _lines(f: BinaryIO, path: str, start: int, stop: int | None, text_key: str) -> Iterator[Document]:
    """The lines that begin in [start, stop): the one that ``start`` cuts belongs to the stretch before."""
    at = start
    if start:
        f.seek(start - 1)
        at += len(f.readline()) - 1
    for number, line in enumerate(f, 1):
        if stop is not None and at >= stop:
            return
        if line.strip():
            name = f"{path}, line at byte {at}" if start else f"{path}:{number}"
            yield Document(name, _jsonl_text(line, name, text_key))
        at += len(line)


def _jsonl_text(line: bytes, name: str, text_key: str) -> str:
    try:
        row = json.loads(decoded(line, name))
    except json.JSONDecodeError as e:
        raise ValueError(f"{name}: not JSON ({e})") from None
    except RecursionError:
        raise ValueError(f"{name}: nested too deep for JSON text: leave the line out") from None
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise ValueError(f"{name}: no text under {text_key!r} (keys: {keys}): set data.text_key")
    return text


def _open_zstd(path: Path, mode: str) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{path}: reading .zst takes the package zstandard: pip install 'scaling[zstd]', or decompress it"
        ) from None
    return io.BufferedReader(_Zstd(path, zstandard), 2**20)


class _Zstd(io.RawIOBase):
    """Decompresses frame after frame. The library's own reader takes a truncated file for a whole one."""

    def __init__(self, path: Path, zstandard):
        self._file, self._library = path.open("rb"), zstandard
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        raw = b""
        while not self._ready:
            raw = raw or self._file.read(2**17)
            if not raw:
                if self._frame is not None:
                    raise _BrokenZstdError("it ends inside a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(raw)
            except self._library.ZstdError as e:
                raise _BrokenZstdError(str(e)) from None
            raw = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        # What is left of a frame's end belongs to the next call.
        self._file.seek(-len(raw), os.SEEK_CUR)
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


class _BrokenZstdError(Exception):
    pass


_OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
_FORMATS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
