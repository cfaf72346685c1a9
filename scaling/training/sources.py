"""Where documents come from: the standard library of the running Python, any TFDS dataset, any text files.

Whatever the source, it ends as an iterator of documents; ``data.prepare`` does the rest in one way for all. Only
``data.prepare`` needs this module, so a machine that has its token arrays needs neither it nor TFDS.
"""

import contextlib
import difflib
import functools
import glob
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scaling.config import DataConfig


class Document(NamedTuple):
    name: str  # where it comes from, for messages
    text: str


class Source(NamedTuple):
    """Documents, once, in an order that depends on the source alone.

    ``version`` is what its publisher calls it, if anything; ``state`` tells whether the files it was read from changed
    since (None: it has no files that a person edits).
    """

    documents: Iterator[Document]
    version: str | None = None
    state: str | None = None


def read(config: DataConfig, workdir: Path) -> Source:
    """The documents of ``config.source``; what has to be built to read them is built in ``workdir``.

    Raises ValueError, here or while documents are drawn, with the file or dataset at fault and what to do.
    """
    if config.source == "python-stdlib":
        if not stdlib_files():
            raise ValueError(
                f"data.source is {config.source!r}: this Python carries no source in "
                f"{sysconfig.get_paths()['stdlib']}: write text:<folder or glob>"
            )
        builder = _stdlib_builder()(data_dir=workdir / "tfds", file_format="array_record")
        return Source(_tfds_documents(builder, config.source, "text"), version=str(builder.version))
    if config.source.startswith("tfds:"):
        builder = _tfds_builder(config.source)
        return Source(_tfds_documents(builder, config.source, config.text_key), version=str(builder.version))
    if config.source.startswith("text:"):
        files = text_files(config.source)
        return Source(_text_documents(files, config.text_key), state=_state_of(files))
    raise ValueError(
        f"data.source is {config.source!r}: write python-stdlib, tfds:<name>[/config] or text:<folder or glob>"
    )


def current_state(config: DataConfig) -> str | None:
    """``Source.state`` of the files as they are now; None if the source has none, or they are not on this machine."""
    if not config.source.startswith("text:"):
        return None
    try:
        return _state_of(text_files(config.source))
    except ValueError:
        return None


def _state_of(files: list[Path]) -> str:
    """Changes when a file is added, removed or edited; costs a stat per file."""
    stats = [(p.as_posix(), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


# Tests are half of the library, and mostly literals. pydoc_data is one generated document of 0.8 MB: under one Python
# its hash puts it into validation, where it would be most of the text, under another into train. _sysconfigdata and
# config-* hold the build paths of this machine, sitecustomize its owner's settings.
_NOT_STDLIB = re.compile(
    r"test|tests|idle_test|pydoc_data|site-packages|dist-packages|__pycache__"
    r"|config-.*|_sysconfigdata.*|sitecustomize\.py"
)


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The modules of the running Python's standard library, without tests and generated files, in order of path."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _NOT_STDLIB.fullmatch(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not _NOT_STDLIB.fullmatch(name)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


@functools.cache  # TFDS refuses to register a name twice
def _stdlib_builder() -> type:
    """The TFDS dataset of the standard library's source; its version is Python's."""
    tfds = _import_tfds()
    version = ".".join(map(str, sys.version_info[:3]))

    class PythonStdlib(tfds.core.GeneratorBasedBuilder):
        """Source of the Python standard library without its tests, an example per module."""

        # Nothing of it is downloaded, so there are no checksums beside the code; looking for them makes TFDS 4.9
        # import importlib_resources, which it does not install.
        code_path = None
        VERSION = tfds.core.Version(version)
        RELEASE_NOTES = {version: f"The standard library of Python {version}."}

        def _info(self):
            features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})
            # In order of path: the fingerprint then depends on the text alone, not on TFDS' hash of keys.
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            root = Path(sysconfig.get_paths()["stdlib"])
            for key, path in enumerate(stdlib_files(root)):
                with tokenize.open(path) as f:  # honours PEP 263 coding lines
                    yield key, {"path": path.relative_to(root).as_posix(), "text": f.read()}

    return PythonStdlib


def _import_tfds():
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # prepare() has its own
    return tfds


def _tfds_builder(source: str) -> Any:
    """The TFDS builder that ``tfds:<name>[/config]`` names, from code or from files that are prepared already."""
    tfds = _import_tfds()
    # TFDS 4.9 stops looking for its own datasets at the first family whose imports fail (h5py, at the letter n), and
    # says nothing; so the family that holds C4, wiki40b, lm1b and PG-19 is imported by hand.
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorflow_datasets.text")
    name, data_dir = source.removeprefix("tfds:"), os.environ.get("TFDS_DATA_DIR")
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as e:  # not found, no such config, no such version: each another type
        root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        prepared = sorted({path.relative_to(root).parts[0] for path in root.glob("*/**/dataset_info.json")})
        known = set(tfds.list_builders(with_community_datasets=False)) | set(prepared)
        close = difflib.get_close_matches(name.split("/")[0], sorted(known))
        hint = f"did you mean {' or '.join(f'tfds:{c}' for c in close)}? " if close else ""
        raise ValueError(
            f"data.source is {source!r}: TFDS does not find it ({_first_line(e).rstrip('.')}): {hint}"
            f"prepared in {root} ($TFDS_DATA_DIR): {', '.join(prepared) or 'nothing'}"
        ) from e


def _tfds_documents(builder: Any, source: str, text_key: str) -> Iterator[Document]:
    """The examples of a dataset's train split, prepared first if need be.

    Other splits are not read: they are what others test on, and our own validation split is cut by hash.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what our progress says
            builder.download_and_prepare(file_format="array_record")  # returns at once if that was done before
        if "train" not in builder.info.splits:
            raise ValueError(f"it has no split 'train', only {', '.join(builder.info.splits) or 'none'}")
        examples = builder.as_data_source(split="train")
    except Exception as e:  # downloads, Beam pipelines and parsers of a thousand datasets raise whatever they like
        raise ValueError(
            f"data.source is {source!r}: cannot be read as a data source ({type(e).__name__}: {_first_line(e)}): "
            f"prepare it with `tfds build --file_format=array_record` and point TFDS_DATA_DIR at the result"
        ) from e
    if text_key not in builder.info.features:
        raise ValueError(
            f"data.text_key is {text_key!r}: {source} has the features {', '.join(sorted(builder.info.features))}"
        )
    for index in range(len(examples)):
        name, value = f"{source}, example {index}", examples[index][text_key]
        if not isinstance(value, bytes):
            raise ValueError(f"data.text_key is {text_key!r}: in {source} that is {type(value).__name__}, not text")
        yield Document(name, _decoded(value, name))


def text_files(source: str) -> list[Path]:
    """Files that ``text:<folder or glob>`` names, in order of path: all that are not hidden, or those that match.

    Raises ValueError if there are none.
    """
    where = os.path.expanduser(source.removeprefix("text:"))
    if os.path.isdir(where):
        found = [p for p in Path(where).rglob("*") if not _is_hidden(p.relative_to(where))]
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


def _text_documents(paths: list[Path], text_key: str) -> Iterator[Document]:
    """A document per file; per line of a .jsonl; either may be gzipped (.gz)."""
    for path in paths:
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rb") as f:
                if plain.suffix == ".jsonl":
                    for number, line in enumerate(f, 1):
                        if line.strip():
                            yield Document(f"{path}:{number}", _jsonl_text(line, f"{path}:{number}", text_key))
                else:
                    yield Document(str(path), _decoded(f.read(), str(path)))
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise ValueError(f"{path}: not a whole gzip file ({e}): compress it again") from e
        except OSError as e:
            raise ValueError(f"{path}: cannot be read ({e.strerror}): mend that or leave the file out") from e


def _jsonl_text(line: bytes, name: str, text_key: str) -> str:
    try:
        row = json.loads(_decoded(line, name))
    except json.JSONDecodeError as e:
        raise ValueError(f"{name}: not JSON ({e})") from None
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise ValueError(f"{name}: no text under {text_key!r} (keys: {keys}): set data.text_key")
    return text


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{name}: byte {raw[e.start]:#04x} at offset {e.start} is not UTF-8: convert the file or leave it out "
            "(a glob such as text:folder/**/*.txt chooses)"
        ) from None


def _first_line(e: BaseException) -> str:
    return next(iter(str(e).strip().splitlines()), "")
