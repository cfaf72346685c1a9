"""``tfds:<name>[/config]``: the train split of any TFDS dataset that can be read as a data source."""

import contextlib
import difflib
import functools
import importlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.config import DataConfig
from scaling.data.sources.source import PART_BYTES, Document, Part, Source, decoded


def survey(config: DataConfig, workdir: Path) -> Source:
    builder = find_builder(config.source)
    return survey_builder(builder, config.source, config.text_key)


def documents(config: DataConfig, part: Part, workdir: Path) -> Iterator[Document]:
    return examples(find_builder(config.source), config.source, config.text_key, part)


def import_tfds():
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # prepare() has its own
    return tfds


def find_builder(source: str) -> Any:
    """The TFDS builder that ``tfds:<name>[/config]`` names, from code or from files that are prepared already.

    Raises ValueError with what is near in spelling and what is prepared here.
    """
    tfds = import_tfds()
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
        raise ValueError(
            f"data.source is {source!r}: TFDS does not find it ({_first_line(e).rstrip('.')}): "
            f"{_hint(name, prepared)}prepared in {root} ($TFDS_DATA_DIR): {', '.join(prepared) or 'nothing'}"
        ) from e


def _hint(name: str, prepared: list[str]) -> str:
    tfds = import_tfds()
    base, _, config = name.partition("/")
    known = set(tfds.list_builders(with_community_datasets=False)) | set(prepared)
    if config and base in known:
        with contextlib.suppress(Exception):  # a builder of another machine's code cannot tell its configs
            names = list(tfds.builder_cls(base).builder_configs)
            close = difflib.get_close_matches(config, names, n=3) or names[:3]
            return f"did you mean {' or '.join(f'tfds:{base}/{c}' for c in close)}? " if close else ""
    close = difflib.get_close_matches(base, sorted(known))
    return f"did you mean {' or '.join(f'tfds:{c}' for c in close)}? " if close else ""


def survey_builder(builder: Any, source: str, text_key: str) -> Source:
    """Prepares the dataset if need be and cuts its examples, in order, into parts of about ``PART_BYTES``."""
    num_examples = len(_examples(builder, source))
    if text_key not in builder.info.features:
        raise ValueError(
            f"data.text_key is {text_key!r}: {source} has the features {', '.join(sorted(builder.info.features))}"
        )
    num_bytes = max(1, builder.info.splits["train"].num_bytes)
    step = max(1, num_examples * PART_BYTES // num_bytes)
    starts = range(0, num_examples, step)
    spans = [(start, min(start + step, num_examples)) for start in starts]
    return Source(
        parts=[Part(num_bytes * (stop - start) // num_examples, [start, stop]) for start, stop in spans],
        version=str(builder.version),
        licence=builder.info.as_proto.redistribution_info.license or None,
    )


def _examples(builder: Any, source: str) -> Any:
    """The train split as a random-access sequence. Other splits are not read: they are what others test on, and our
    own validation split is cut by hash."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what our progress says
            builder.download_and_prepare(file_format="array_record")  # returns at once if that was done before
        if "train" not in builder.info.splits:
            raise ValueError(f"it has no split 'train', only {', '.join(builder.info.splits) or 'none'}")
        return _data_source(builder)
    except Exception as e:  # downloads, Beam pipelines and parsers of a thousand datasets raise whatever they like
        raise ValueError(
            f"data.source is {source!r}: cannot be read as a data source ({type(e).__name__}: {_first_line(e)}): "
            f"prepare it with `tfds build --file_format=array_record` and point TFDS_DATA_DIR at the result"
        ) from e


@functools.lru_cache(maxsize=1)  # a worker reads many parts of one dataset; opening all files of C4 takes seconds
def _data_source(builder: Any) -> Any:
    return builder.as_data_source(split="train")


def examples(builder: Any, source: str, text_key: str, part: Part) -> Iterator[Document]:
    rows = _examples(builder, source)
    for index in range(*part.where):
        name, value = f"{source}, example {index}", rows[index][text_key]
        if not isinstance(value, bytes):
            raise ValueError(f"data.text_key is {text_key!r}: in {source} that is {type(value).__name__}, not text")
        yield Document(name, decoded(value, name))


def _first_line(e: BaseException) -> str:
    return next(iter(str(e).strip().splitlines()), "")
