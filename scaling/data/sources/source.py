"""What every kind of source speaks: documents, the parts they are read in, and what is known of the whole."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# About so much of a source is a part: small enough to be shared out and to lose little when killed, large enough that
# a part's files are few.
PART_BYTES = 32 * 2**20


class Document(NamedTuple):
    name: str  # where it comes from, for messages
    content: str | np.ndarray  # text, or token ids of a source that is tokenised already


class Part(NamedTuple):
    """A stretch of a source: ``where`` is what its kind needs to find it, plain JSON."""

    num_bytes: int  # about, as stored: for shares and progress
    where: list


@dataclass(frozen=True)
class TokenFormat:
    """Of a source that is tokenised already. ``bytes_per_token`` is None where its maker did not say."""

    vocab_size: int
    fingerprint: str
    bytes_per_token: float | None = None


@dataclass(frozen=True)
class Source:
    """What there is to read.

    ``version`` is what its publisher calls it, if anything; ``licence`` as its publisher says, None if it does not;
    ``state`` tells whether the files it was read from changed since (None: it has no files that a person edits).
    """

    parts: list[Part]
    version: str | None = None
    licence: str | None = None
    state: str | None = None
    tokens: TokenFormat | None = None

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def state_of(files: list[Path]) -> str:
    """Changes when a file is added, removed or edited; costs a stat per file."""
    stats = [(p.as_posix(), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def decoded(raw: bytes, name: str) -> str:
    """UTF-8 text. Raises ValueError with the byte at fault."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{name}: byte {raw[e.start]:#04x} at offset {e.start} is not UTF-8: convert the file or leave it out "
            "(a glob such as text:folder/**/*.txt chooses)"
        ) from None
