"""Text to token ids and back. A tokenizer is named in the config (``data.tokenizer``) and hashed into the corpus."""

import hashlib
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer.

    ``separator_id`` opens every document; ``encode`` never produces it, so documents can be told apart in the stream.
    ``fingerprint`` changes whenever some text would be encoded differently.
    """

    name: str
    vocab_size: int
    separator_id: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one document, without a separator, in the smallest unsigned dtype that holds the vocabulary.

        Raises ValueError if the text cannot be represented.
        """
        ...

    def decode(self, ids: np.ndarray) -> str: ...


class ByteTokenizer:
    """A token per UTF-8 byte.

    Id 0 is the separator: the byte 0 is the character U+0000 alone, which text does not contain (``encode`` refuses
    it), so no 257th id is needed.
    """

    name = "bytes"
    vocab_size = 256
    separator_id = 0
    fingerprint = hashlib.sha256(b"utf-8 bytes, separator 0").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise ValueError(
                f"lone surrogate {text[e.start]!a} at character {e.start} is not text: remove it"
            ) from None
        if (position := encoded.find(0)) >= 0:
            raise ValueError(
                f"NUL character (U+0000) at byte {position} is kept for the separator of documents: remove it"
            )
        return np.frombuffer(encoded, np.uint8)

    def decode(self, ids: np.ndarray) -> str:
        """Text of ``ids``; a character cut by the ends of a window becomes U+FFFD."""
        return np.asarray(ids, np.uint8).tobytes().decode("utf-8", errors="replace")


def load(name: str) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names.

    Raises ValueError if there is none of that name.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    raise ValueError(f"data.tokenizer is {name!r}: write {ByteTokenizer.name!r}")
