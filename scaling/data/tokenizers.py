"""Text to token ids and back. A tokenizer is named in the config (``data.tokenizer``) and hashed into the corpus:

    bytes            a token per UTF-8 byte
    bpe:<size>       byte-level byte-pair encoding of that many ids, trained on the train split
    file:<path>      a tokenizer that exists: Hugging Face's tokenizer.json, or a SentencePiece .model

Whatever the tokenizer, id 0 is the separator that opens a document and stands nowhere else.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer.

    ``separator_id`` opens every document; ``encode`` never produces it, so documents can be told apart in the stream.
    ``fingerprint`` changes whenever some text would be encoded differently. ``lossless``: every text is decoded to
    itself; else each validation document is tried.
    """

    name: str
    vocab_size: int
    separator_id: int
    fingerprint: str
    lossless: bool

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
    lossless = True

    def encode(self, text: str) -> np.ndarray:
        encoded = utf8(text)
        if (position := encoded.find(0)) >= 0:
            raise ValueError(
                f"NUL character (U+0000) at byte {position} is kept for the separator of documents: remove it"
            )
        return np.frombuffer(encoded, np.uint8)

    def decode(self, ids: np.ndarray) -> str:
        """Text of ``ids``; a character cut by the ends of a window becomes U+FFFD."""
        return np.asarray(ids, np.uint8).tobytes().decode("utf-8", errors="replace")


class SubwordTokenizer:
    """A library's tokenizer with its ids moved up by one, so that 0 is free for the separator."""

    separator_id = 0

    def __init__(
        self,
        name: str,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        num_ids: int,
        fingerprint: str,
        lossless: bool,
    ):
        self.name, self.vocab_size, self.fingerprint, self.lossless = name, num_ids + 1, fingerprint, lossless
        self._encode, self._decode, self._dtype = encode, decode, token_dtype(num_ids + 1)

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        return (np.asarray(self._encode(text), np.int64) + 1).astype(self._dtype)

    def decode(self, ids: np.ndarray) -> str:
        return self._decode((np.asarray(ids, np.int64) - 1).tolist())


def utf8(text: str) -> bytes:
    """The text's bytes. Raises ValueError at a lone surrogate, which is none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"lone surrogate {text[e.start]!a} at character {e.start} is not text: remove it") from None


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned dtype that holds the vocabulary."""
    return np.dtype(next(d for d in ("<u1", "<u2", "<u4") if vocab_size <= 2 ** (8 * np.dtype(d).itemsize)))


def load(name: str, trained: Path | None = None) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names; ``trained`` is the file that ``train_bpe`` wrote for a bpe:<size>.

    Raises ValueError if there is none of that name, or its file or library is missing.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name.startswith("bpe:") and trained is not None:
        return _hugging_face(name, str(trained), trained.stat().st_mtime_ns)
    path = file_of(name)
    if path is not None:
        return (_sentencepiece if path.suffix == ".model" else _hugging_face)(name, str(path), path.stat().st_mtime_ns)
    raise ValueError(f"data.tokenizer is {name!r}: write bytes, bpe:<size> or file:<path>")


def file_of(name: str) -> Path | None:
    """The file of a file:<path>. Raises ValueError if it is not there."""
    if not name.startswith("file:"):
        return None
    path = Path(name.removeprefix("file:")).expanduser()
    if path.suffix not in (".json", ".model") or not path.is_file():
        raise ValueError(
            f"data.tokenizer is {name!r}: no such file: write file:<path> of a Hugging Face tokenizer.json or a "
            "SentencePiece .model"
        )
    return path


def train_bpe(texts: Iterable[str], size: int, path: Path) -> None:
    """Trains byte-level BPE of ``size`` ids, the separator included, and writes it to ``path``.

    Words are cut as GPT-2 cuts them; nothing is normalised, so every text is decoded to itself. A pair is merged only
    if it occurs twice, so from little text fewer ids come out.
    """
    hf = _import_hf("bpe:<size>")
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=2,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def _import_hf(name: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"data.tokenizer is {name!r}: that takes the package tokenizers: pip install 'scaling[bpe]', or write bytes"
        ) from None
    return tokenizers


# A worker loads its tokenizer once for all its parts; the time stamp is in the key because a file can be replaced.
@functools.lru_cache(maxsize=8)
def _hugging_face(name: str, path: str, modified_ns: int) -> SubwordTokenizer:
    hf = _import_hf(name)
    raw = Path(path).read_bytes()
    try:
        tokenizer = hf.Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as e:  # the Rust side raises bare Exception
        what = next(iter(str(e).splitlines()), type(e).__name__)
        raise ValueError(f"{path}: not a Hugging Face tokenizer ({what}): write its tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is nine characters there, no control token
    model = json.loads(raw)["model"]
    num_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    trained = name.startswith("bpe:")
    return SubwordTokenizer(
        name,
        lambda text: tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        num_ids=num_ids,
        # Of one trained here: its content, which does not depend on how the library lays out the file.
        fingerprint=_digest(["byte-level bpe", model["vocab"], model["merges"]]) if trained else _sha256(raw),
        lossless=trained,
    )


@functools.lru_cache(maxsize=8)
def _sentencepiece(name: str, path: str, modified_ns: int) -> SubwordTokenizer:
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(
            f"data.tokenizer is {name!r}: that takes the package sentencepiece: pip install 'scaling[bpe]', or write "
            "bytes"
        ) from None
    raw = Path(path).read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    except (RuntimeError, OSError, ValueError) as e:
        raise ValueError(f"{path}: not a SentencePiece model ({str(e).strip().splitlines()[-1]})") from None
    return SubwordTokenizer(
        name,
        processor.encode,
        processor.decode,
        num_ids=processor.get_piece_size(),
        fingerprint=_sha256(raw),
        lossless=False,  # it normalises as its trainer chose
    )


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _digest(content: Any) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())
