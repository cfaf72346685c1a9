"""Every source against texts written here; what is wrong with one is said in one line."""

import bz2
import dataclasses
import gzip
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling import data
from scaling.config import DataConfig
from scaling.data import sources


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


def zst(raw: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(raw)


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
                                              (".zst", zst)])  # fmt: skip
def test_text_reads_what_is_compressed_and_says_what_is_broken(tmp_path, suffix, compress):
    rows = [f"line {i} ü" for i in range(500)]
    raw = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / f"a.jsonl{suffix}").write_bytes(compress(raw))
    (folder / f"b.txt{suffix}").write_bytes(compress("plain ü".encode()))
    assert documents(config_of(f"text:{folder}"), tmp_path) == [*rows, "plain ü"]
    whole = compress(raw)
    (folder / f"a.jsonl{suffix}").write_bytes(whole + compress(raw) + compress(raw))
    assert documents(config_of(f"text:{folder}"), tmp_path) == [*rows, *rows, *rows, "plain ü"]
    for broken in (whole[: len(whole) // 2], b"this is none", whole[:40] + b"X" * 60 + whole[100:]):
        (folder / f"a.jsonl{suffix}").write_bytes(broken)
        with pytest.raises(ValueError, match=rf"a\.jsonl{suffix}: not a whole \w+ file \(.*\): compress it again$"):
            documents(config_of(f"text:{folder}"), tmp_path)


def test_without_its_library_zst_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.txt\.zst: reading \.zst takes the package zstandard: pip install"):
        documents(config_of(f"text:{tmp_path}"), tmp_path)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 40), max_size=30), part_bytes=st.integers(1, 200), end=st.booleans())
def test_a_line_is_read_once_wherever_parts_are_cut(tmp_path, monkeypatch, lengths, part_bytes, end):
    monkeypatch.setattr(sources.text, "PART_BYTES", part_bytes)
    rows = ["é" * n for n in lengths]
    raw = "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows) + "\n" * end
    path = tmp_path / "a.jsonl"
    path.write_text(raw, encoding="utf-8")
    assert documents(config_of(f"text:{path}"), tmp_path) == rows


def test_small_files_share_a_part_and_large_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.text, "PART_BYTES", 100)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(str(i) * 30)
    (tmp_path / "5.txt").write_text("5" * 500)
    parts = sources.survey(config_of(f"text:{tmp_path}"), tmp_path).parts
    assert [len(part.where) for part in parts] == [3, 2, 1, 3, 1]
    assert sum(part.num_bytes for part in parts) == 9 * 30 + 500


def test_a_document_larger_than_memory_allows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.text, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_text("x" * 11)
    with pytest.raises(ValueError, match=r"a\.txt: more than 1 GiB in one document: cut it"):
        documents(config_of(f"text:{tmp_path}"), tmp_path)


# --- Token arrays ----------------------------------------------------------------------------------------------------


def write_tokens(folder: Path, files: dict[str, np.ndarray], **description) -> DataConfig:
    folder.mkdir()
    for name, tokens in files.items():
        if name.endswith(".npy"):
            np.save(folder / name, tokens)
        else:
            tokens.tofile(folder / name)
    told = {"vocab_size": 50, "dtype": "uint16", "separator_id": 49, **description}
    (folder / "tokens.json").write_text(json.dumps(told))
    return config_of(f"tokens:{folder}")


@settings(deadline=None, max_examples=30)
@given(
    stream=st.lists(st.integers(0, 5), max_size=80), cut=st.integers(0, 80), part=st.integers(2, 60), npy=st.booleans()
)
def test_token_documents_are_what_stands_between_separators(tmp_path_factory, stream, cut, part, npy):
    files = [stream[:cut], stream[cut:]]
    named = {f"{i}.{'npy' if npy else 'bin'}": np.array(f, "<u2") for i, f in enumerate(files)}
    config = write_tokens(tmp_path_factory.mktemp("t") / "tokens", named, vocab_size=6, separator_id=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.tokens, "PART_BYTES", part)
        patch.setattr(sources.tokens, "_LOOK_AHEAD", 3)
        found = [d.tolist() for d in documents(config, Path()) if len(d)]
    expected = [
        [3 if token == 0 else token for token in map(int, document)]
        for file in files
        for document in "".join(map(str, file)).split("3")
        if document
    ]
    assert found == expected


def test_tokens_become_a_corpus(tmp_path):
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 49, 20_000).astype("<u2")
    stream[::100] = 49
    config = write_tokens(tmp_path / "t", {"a.bin": stream}, bytes_per_token=4.0, licence="CC0-1.0")
    data.prepare(config, tmp_path / "cache")
    corpus = data.open(config, tmp_path / "cache")
    found = corpus.arrays["train"].tobytes() + corpus.arrays["validation"].tobytes()
    back = np.frombuffer(found, "u1")
    assert sorted(np.bincount(back, minlength=50)) == sorted(np.bincount(stream, minlength=50))
    assert (back == 0).sum() == 200
    told = corpus.describe()
    assert (told["licence"], told["tokenizer"], told["vocab_size"]) == ("CC0-1.0", "tokens", 50)
    assert told["tokens_per_byte"] == pytest.approx(1 / 4, rel=0.02)  # of predicted tokens, separators among them
    with pytest.raises(ValueError, match=r"^model.vocab_size is 49: write 50 or more, the tokenizer tokens has as"):
        corpus.require_vocab(49)


def test_without_bytes_per_token_there_are_no_bits_per_byte(tmp_path):
    stream = np.arange(2000, dtype="<u2") % 49
    stream[::10] = 49
    stream[5::10] = np.arange(200) % 48
    config = write_tokens(tmp_path / "t", {"a.bin": stream})
    data.prepare(config, tmp_path / "cache")
    told = data.open(config, tmp_path / "cache").describe()
    assert told["tokens_per_byte"] is told["text_bytes"] is None


@pytest.mark.parametrize(
    "files, description, says",
    [
        ({"a.bin": np.array([1, 2, 99], "<u2")}, {}, r"a\.bin: token 2 is 99: tokens\.json says vocab_size 50"),
        ({"a.bin": np.array([1, 2, 3], "<u1")}, {}, r"a\.bin: 3 bytes are no whole number of uint16"),
        ({"a.npy": np.array([1.0])}, {}, r"a\.npy: an array of float64 of shape \(1,\): tokens\.json says uint16"),
        ({"a.npy": np.zeros((2, 2), "<u2")}, {}, r"a\.npy: an array of uint16 of shape \(2, 2\)"),
        ({}, {}, r"no \.bin or \.npy file in"),
        ({"a.bin": np.zeros(3, "<u2")}, {"dtype": "int64"}, r"dtype is 'int64': write one of uint8, uint16, uint32"),
        ({"a.bin": np.zeros(3, "<u2")}, {"separator_id": 50}, r"separator_id is 50: write the id in \[0, 50\)"),
        ({"a.bin": np.zeros(3, "<u2")}, {"separator_id": None}, "separator_id is None"),
        ({"a.bin": np.zeros(3, "<u2")}, {"vocab_size": "many"}, "vocab_size is 'many': write the number of ids"),
        ({"a.bin": np.zeros(3, "<u2")}, {"bytes_per_token": 0}, "bytes_per_token is 0: write a positive number"),
        ({"a.bin": np.zeros(3, "<u2")}, {}, "of its 1 distinct documents none falls into"),
    ],
)
def test_bad_tokens_are_one_line_and_leave_nothing(tmp_path, files, description, says):
    config = write_tokens(tmp_path / "t", files, **description)
    with pytest.raises(ValueError, match=says) as caught:
        data.prepare(config, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_tokens_without_a_description(tmp_path):
    with pytest.raises(ValueError, match=r"no .*tokens\.json: write one, e\.g\. \{\"vocab_size\": 50257"):
        data.prepare(config_of(f"tokens:{tmp_path}"), tmp_path / "cache")


# --- What is wrong with text -----------------------------------------------------------------------------------------


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
                return tfds.core.DatasetInfo(builder=self, features=features, license="MIT")

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
    assert (corpus.describe()["source_version"], corpus.describe()["licence"]) == ("1.2.3", "MIT")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "source, text_key, says",
    [
        ("tfds:tiny_txt/en", "text", r"did you mean tfds:tiny_text.*prepared in .* \(\$TFDS_DATA_DIR\): tiny_text$"),
        ("tfds:tiny_text/de", "text", r"TFDS does not find it"),
        ("tfds:lm1c", "text", r"did you mean tfds:lm1b"),
        ("tfds:wiki40b/eng", "text", r"did you mean tfds:wiki40b/en"),
        ("tfds:", "text", r"^data.source is 'tfds:': write python-stdlib, tfds:<name>"),
        ("tfds:tiny_text/en", "txt", r"^data.text_key is 'txt': tfds:tiny_text/en has the features number, text$"),
        ("tfds:tiny_text/en", "number", r"^data.text_key is 'number': in tfds:tiny_text/en that is int, not text$"),
    ],
)
def test_bad_tfds_names_are_one_line(tmp_path, tiny_tfds, source, text_key, says):
    with pytest.raises(ValueError, match=says) as caught:
        data.prepare(config_of(source, text_key=text_key), tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_tfds_in_parts_is_tfds_whole(tmp_path, tiny_tfds, monkeypatch):
    config = config_of("tfds:tiny_text/en")
    data.prepare(config, tmp_path / "whole")
    monkeypatch.setattr(sources.tfds, "PART_BYTES", 200)
    assert len(sources.survey(config, tmp_path).parts) > 4
    data.prepare(config, tmp_path / "parts", workers=2)
    found = [data.open(config, tmp_path / name).fingerprint for name in ("whole", "parts")]
    assert found[0] == found[1]


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


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path):
    from scaling.data.sources import text

    for name in ("a.txt", "[ab].txt"):
        (tmp_path / name).write_text(name)
    assert text.text_files(f"text:{tmp_path}/[ab].txt") == [tmp_path / "[ab].txt"]
    assert text.text_files(f"text:{tmp_path}/[a].txt") == [tmp_path / "a.txt"]
