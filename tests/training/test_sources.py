"""Every source against texts written here; what is wrong with one is said in one line."""

import dataclasses
import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling.config import DataConfig
from scaling.training import data, sources


def config_of(source: str, **kwargs) -> DataConfig:
    return DataConfig(**{"source": source, "seq_len": 16, "validation_fraction": 0.25, **kwargs})


def documents(config: DataConfig, workdir: Path) -> list[str]:
    found = sources.survey(config, workdir)
    return [document.content for part in found.parts for document in sources.documents(config, part, workdir)]


def test_text_reads_plain_jsonl_and_gzip_in_order_of_path(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_bytes(b"# one\r\n")
    (folder / "b.jsonl").write_text('{"body": "two\\n"}\n\n{"body": "thr\\u00e9e", "text": "no"}\n')
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"body": "four"}\n'))
    (folder / "sub" / "d.txt.gz").write_bytes(gzip.compress("fünf".encode()))
    (folder / ".hidden").write_bytes(b"\xff")
    assert documents(config_of(f"text:{folder}", text_key="body"), tmp_path) == [
        "# one\r\n",
        "two\n",
        "thrée",
        "four",
        "fünf",
    ]
    assert documents(config_of(f"text:{folder}/**/*.md"), tmp_path) == ["# one\r\n"]


@pytest.mark.parametrize(
    "name, raw, says",
    [
        ("a.txt", b"good \xff bad", r"a\.txt: byte 0xff at offset 5 is not UTF-8: .*\*\*/\*\.txt"),
        ("a.txt", b"nul \0", r"a\.txt: NUL character \(U\+0000\) at byte 4"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl:1: no text under 'text' \(keys: body\): set data\.text_key"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: no text under 'text' \(keys: none, it is a list\)"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: lone surrogate"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], r"a\.txt\.gz: not a whole gzip file"),
        ("a.txt", b"the only one", "of its 1 distinct documents none falls into (train|validation)"),
        ("a.txt", b"", "of its 0 distinct documents none falls into train"),
    ],
)
def test_bad_text_is_one_line_and_leaves_nothing(tmp_path, name, raw, says):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(raw)
    with pytest.raises(ValueError, match=says) as caught:
        data.prepare(config_of(f"text:{tmp_path / 'texts'}"), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("source", ["text:{}", "text:{}/*.txt", "text:{}/nowhere"])
def test_no_text_files(tmp_path, source):
    with pytest.raises(ValueError, match=r"^data.source is 'text:.*': no file there; write text:<folder>"):
        data.prepare(config_of(source.format(tmp_path)), tmp_path / "cache")


def test_unknown_source(tmp_path):
    with pytest.raises(ValueError, match=r"^data.source is 'c4': write python-stdlib, tfds:"):
        data.prepare(config_of("c4"), tmp_path / "cache")


def test_file_that_vanishes(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    config = config_of(f"text:{tmp_path}")
    [part] = sources.survey(config, tmp_path).parts
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt: cannot be read \(No such file or directory\)"):
        next(sources.documents(config, part, tmp_path))


def test_python_without_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(ValueError, match=r"this Python carries no source in .*python311\.zip: write text:<folder"):
        data.prepare(config_of("python-stdlib"), tmp_path / "cache")


@pytest.fixture
def tiny_tfds(tmp_path, monkeypatch) -> Path:
    """A TFDS dataset with a config, prepared as files whose code is gone."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class TinyText(tfds.core.GeneratorBasedBuilder):
            code_path = None
            VERSION = tfds.core.Version("1.2.3")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en")]

            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(0, 30), "test": self._generate_examples(30, 40)}

            def _generate_examples(self, start, stop):
                for i in range(start, stop):
                    yield i, {"text": f"übung {i} " + "x" * i, "number": i}

    tfds.disable_progress_bar()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    TinyText(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    return tmp_path / "tfds"


def test_tfds_dataset_by_name(tmp_path, tiny_tfds, capfd):
    config = config_of("tfds:tiny_text/en")
    capfd.readouterr()
    data.prepare(config, tmp_path / "cache")
    corpus = data.open(config, tmp_path / "cache")
    found = b"".join(corpus.arrays[split].tobytes() for split in data.SPLITS).decode().split("\0")[1:]
    assert sorted(found) == sorted(f"übung {i} " + "x" * i for i in range(30))  # train alone
    assert corpus.describe()["source_version"] == "1.2.3"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "source, text_key, says",
    [
        ("tfds:tiny_txt/en", "text", r"did you mean tfds:tiny_text.*prepared in .* \(\$TFDS_DATA_DIR\): tiny_text$"),
        ("tfds:tiny_text/de", "text", r"TFDS does not find it"),
        ("tfds:", "text", r"^data.source is 'tfds:': write python-stdlib, tfds:<name>"),
        ("tfds:tiny_text/en", "txt", r"^data.text_key is 'txt': tfds:tiny_text/en has the features number, text$"),
        ("tfds:tiny_text/en", "number", r"^data.text_key is 'number': in tfds:tiny_text/en that is int, not text$"),
    ],
)
def test_bad_tfds_names_are_one_line(tmp_path, tiny_tfds, source, text_key, says):
    with pytest.raises(ValueError, match=says) as caught:
        data.prepare(config_of(source, text_key=text_key), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_tfds_finds_the_large_text_corpora():
    """Their builders are found; nothing is downloaded. (TFDS hides them when one of its optional imports fails.)"""
    for name in ("c4/en", "wiki40b/en", "lm1b", "pg19"):
        assert sources.tfds.find_builder(f"tfds:{name}").name == name.split("/")[0]


def test_standard_library_corpus(tmp_path, capfd):
    """The default source, in full: real text, silent, large enough, and the files of this Python."""
    config, lines = DataConfig(validation_fraction=0.06), []
    data.prepare(config, tmp_path, lines.append)
    assert capfd.readouterr() == ("", "")
    assert lines[-1].startswith("python-stdlib: ")
    assert "tensorflow" not in sys.modules
    corpus = data.open(config, tmp_path)
    assert 8e6 < corpus.train_tokens < 20e6
    assert corpus.validation_tokens >= 400_000
    assert corpus.describe()["source_version"] == ".".join(map(str, sys.version_info[:3]))
    everything = b"".join(corpus.arrays[split].tobytes() for split in data.SPLITS)
    assert everything.count(b"\0" + Path(dataclasses.__file__).read_bytes()) == 1
    assert not [p for p in sources.stdlib_files() if {"test", "tests", "site-packages"} & set(p.parts)]
