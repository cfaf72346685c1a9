"""``python-stdlib``: the source of the running Python's standard library, through TFDS. The default: nothing is
downloaded, and eleven megabytes of text are on every machine that runs this."""

import functools
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.config import DataConfig
from scaling.data.sources import tfds
from scaling.data.sources.source import Document, Part, Source


def survey(config: DataConfig, workdir: Path) -> Source:
    if not stdlib_files():
        raise ValueError(
            f"data.source is {config.source!r}: this Python carries no source in "
            f"{sysconfig.get_paths()['stdlib']}: write text:<folder or glob>"
        )
    return tfds.survey_builder(_builder(workdir), config.source, "text")


def documents(config: DataConfig, part: Part, workdir: Path) -> Iterator[Document]:
    return tfds.examples(_builder(workdir), config.source, "text", part)


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


def _builder(workdir: Path) -> Any:
    return _builder_class()(data_dir=workdir / "tfds", file_format="array_record")


@functools.cache  # TFDS refuses to register a name twice
def _builder_class() -> type:
    """The TFDS dataset of the standard library's source; its version is Python's."""
    tensorflow_datasets = tfds.import_tfds()
    core, features = tensorflow_datasets.core, tensorflow_datasets.features
    version = ".".join(map(str, sys.version_info[:3]))

    class PythonStdlib(core.GeneratorBasedBuilder):  # type: ignore[name-defined]  # TFDS is imported where it is used
        """Source of the Python standard library without its tests, an example per module."""

        # Nothing of it is downloaded, so there are no checksums beside the code; looking for them makes TFDS 4.9
        # import importlib_resources, which it does not install.
        code_path = None
        VERSION = core.Version(version)
        RELEASE_NOTES = {version: f"The standard library of Python {version}."}

        def _info(self):
            # In order of path: the fingerprint then depends on the text alone, not on TFDS' hash of keys.
            return core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict({"path": features.Text(), "text": features.Text()}),
                license="PSF-2.0",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            root = Path(sysconfig.get_paths()["stdlib"])
            for key, path in enumerate(stdlib_files(root)):
                with tokenize.open(path) as f:  # honours PEP 263 coding lines
                    yield key, {"path": path.relative_to(root).as_posix(), "text": f.read()}

    return PythonStdlib
