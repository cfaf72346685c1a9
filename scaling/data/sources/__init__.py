"""Where documents come from: the standard library of the running Python, TFDS datasets, text files, token arrays.

Whatever the source, it is a sequence of parts, each an iterator of documents; ``data.prepare`` does the rest in one way
for all. Parts are a function of the source alone, so how many processes read them changes nothing. A source is spelt

    python-stdlib
    tfds:<name>[/config]
    text:<folder or glob>
    tokens:<folder>
    synthetic:<name>[?key=value&…]              not text: see scaling/training/synthetic.py
    0.7 * python-stdlib + 0.3 * text:notes      a mixture: the share of the training windows each gives

Only preparation needs this package, so a machine that has its token arrays needs neither it nor TFDS.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

from scaling.config import DataConfig
from scaling.data.sources import stdlib, text, tfds, tokens
from scaling.data.sources.source import PART_BYTES, Document, Part, Source, TokenFormat
from scaling.data.sources.stdlib import stdlib_files
from scaling.data.sources.text import text_files

__all__ = [
    "PART_BYTES", "Document", "Part", "Source", "TokenFormat", "components", "current_state", "documents",
    "stdlib_files", "survey", "text_files",
]  # fmt: skip

# Each kind of source is a module with survey(config, workdir) and documents(config, part, workdir).
_KINDS = {"python-stdlib": stdlib, "tfds": tfds, "text": text, "tokens": tokens}
_SPELLINGS = "python-stdlib, tfds:<name>[/config], text:<folder or glob>, tokens:<folder> or synthetic:<name>"
_TERM = re.compile(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*\*\s*(\S.*?)\s*")


def survey(config: DataConfig, workdir: Path) -> Source:
    """What there is to read under ``config.source``; what has to be built to read it is built in ``workdir``.

    Raises ValueError, in one line with the file or dataset at fault and what to do.
    """
    return _kind(config.source).survey(config, workdir)


def documents(config: DataConfig, part: Part, workdir: Path) -> Iterator[Document]:
    """The documents of one part, in an order that depends on the source alone. Raises ValueError as ``survey``."""
    return _kind(config.source).documents(config, part, workdir)


def current_state(config: DataConfig) -> str | None:
    """``Source.state`` of the files as they are now; None if the source has none, or they are not on this machine."""
    kind = _kind(config.source)
    try:
        return kind.current_state(config) if hasattr(kind, "current_state") else None
    except ValueError:
        return None


def _kind(source: str):
    name, colon, where = source.partition(":")
    if name == "synthetic":
        raise ValueError(
            f"data.source is {source!r}, in a mixture: a synthetic source has no text to mix: write it alone"
        )
    if name not in _KINDS or bool(colon and where) == (name == "python-stdlib"):
        raise ValueError(f"data.source is {source!r}: write {_SPELLINGS}")
    return _KINDS[name]


def components(config: DataConfig) -> list[tuple[float, DataConfig]]:
    """The sources of ``config`` with their weights, which sum to 1: itself alone, or those of a mixture.

    Raises ValueError if a mixture is misspelt.
    """
    if not _TERM.fullmatch(config.source):
        return [(1.0, config)]
    terms = [_TERM.fullmatch(term) for term in config.source.split(" + ")]
    weights = [float(term[1]) if term else math.nan for term in terms]
    names = [term[2] if term else "" for term in terms]
    if not all(weight > 0 for weight in weights):
        raise ValueError(
            f"data.source is {config.source!r}: write a mixture as <weight> * <source> + <weight> * <source>, weights "
            "above 0"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"data.source is {config.source!r}: a source is there twice: add its weights")
    if len(names) > 1 and config.unique_tokens is not None:
        raise ValueError(
            f"data.unique_tokens is {config.unique_tokens}: it counts the tokens of one source, and data.source is a "
            "mixture: write null, or one source"
        )
    for name in names:
        _kind(name)
    total = math.fsum(weights)
    return [(weight / total, dataclasses.replace(config, source=name)) for weight, name in zip(weights, names)]
