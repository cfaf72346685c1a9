"""Batches against a brute-force cut of the text; preparation against what can happen to it."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling import data
from scaling.config import DataConfig
from tests import counting

REPO = Path(__file__).parents[2]


def write_texts(folder: Path, num_documents: int = 40, chars: int = 60) -> list[str]:
    """A folder of small, distinct text files; returns their texts in order of path."""
    folder.mkdir(parents=True)
    texts = [f"document {i} é " + "".join(chr(97 + (i * j) % 26) for j in range(chars)) for i in range(num_documents)]
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return texts


def config_of(source: str, **kwargs) -> DataConfig:
    return DataConfig(**{"source": source, "seq_len": 16, "validation_fraction": 0.25, **kwargs})


@pytest.fixture
def texts(tmp_path) -> list[str]:
    return write_texts(tmp_path / "texts")


@pytest.fixture
def config(tmp_path, texts) -> DataConfig:
    return config_of(f"text:{tmp_path / 'texts'}")


@pytest.fixture
def corpus(tmp_path, config) -> data.Corpus:
    data.prepare(config, tmp_path / "cache")
    return data.open(config, tmp_path / "cache")


def corpus_of_range(num_train: int, num_validation: int, seq_len: int) -> data.Corpus:
    """A corpus whose tokens are their own positions, so that a window says where it was cut."""
    counts = {"train": num_train, "validation": num_validation}
    manifest = {
        "splits": {split: {"tokens": n} for split, n in counts.items()},
        "tokenizer": {"vocab_size": 2**16, "separator_id": 0},
    }
    arrays = {split: data.TokenArray([np.arange(n, dtype="<u2")]) for split, n in counts.items()}
    return data.Corpus(manifest, arrays, seq_len)


# --- The array -------------------------------------------------------------------------------------------------------


def test_arrays_are_the_documents_split_by_hash(texts, corpus):
    stream = {"train": b"", "validation": b""}
    for text in texts:
        raw = text.encode()
        share = int(hashlib.sha256(raw).hexdigest()[:16], 16) / 2**64
        stream["validation" if share < 0.25 else "train"] += b"\0" + raw
    assert corpus.arrays["train"].tobytes() == stream["train"]
    assert corpus.arrays["validation"].tobytes() == stream["validation"]
    assert (corpus.train_tokens, corpus.validation_tokens) == tuple(map(len, stream.values()))


def test_description_counts_what_is_there(texts, corpus):
    told = corpus.describe()
    assert told["num_documents"] == len(texts) == corpus.num_documents
    assert told["text_bytes"] == sum(len(t.encode()) for t in texts)
    held_out = [t for t in texts if t.encode() in corpus.arrays["validation"].tobytes()]
    assert told["num_validation_documents"] == len(held_out)
    assert told["tokens_per_byte"] == (corpus.validation_tokens - 1) / sum(len(t.encode()) for t in held_out)
    assert corpus.bytes_per_token["validation"] * told["tokens_per_byte"] == pytest.approx(1, rel=1e-15)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert str(corpus.manifest["source_state"]) not in json.dumps(told)  # time stamps are no part of a record


def test_adding_documents_moves_none_and_duplicates_are_dropped(tmp_path, texts, config, corpus):
    more = tmp_path / "more"
    write_texts(more, 70)
    (more / "zz_copy.txt").write_text(texts[3], encoding="utf-8")
    (more / "zz_empty.txt").write_text("")
    config = config_of(f"text:{more}")
    data.prepare(config, tmp_path / "cache")
    larger = data.open(config, tmp_path / "cache")
    for split in data.SPLITS:
        documents = set(corpus.arrays[split].tobytes().split(b"\0"))
        assert documents <= set(larger.arrays[split].tobytes().split(b"\0"))
    assert (larger.num_documents, larger.num_duplicates, larger.manifest["num_empty_removed"]) == (70, 1, 1)


def test_the_fingerprint_is_of_content_and_rule_alone(tmp_path, texts, config, corpus):
    again = config_of(f"text:{tmp_path / 'elsewhere'}")
    write_texts(tmp_path / "elsewhere")
    data.prepare(again, tmp_path / "cache2")
    assert data.open(again, tmp_path / "cache2").fingerprint == corpus.fingerprint

    edited = config_of(f"text:{tmp_path / 'edited'}")
    write_texts(tmp_path / "edited")
    (tmp_path / "edited" / "007.txt").write_text(texts[7] + ".", encoding="utf-8")
    other_rule = dataclasses.replace(config, validation_fraction=0.3)
    for changed in (edited, other_rule):
        data.prepare(changed, tmp_path / "cache2")
        assert data.open(changed, tmp_path / "cache2").fingerprint != corpus.fingerprint


def test_seq_len_does_not_build_another_array(tmp_path, config, corpus):
    folders = {data.prepare(dataclasses.replace(config, seq_len=T), tmp_path / "cache")[0] for T in (16, 32)}
    assert len(folders) == 1


# --- Batches ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(2, 700),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 17),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_window_once_per_epoch(num_tokens, seq_len, batch_size, seed):
    num_tokens = max(num_tokens, seq_len + 1)
    corpus = corpus_of_range(num_tokens, 2, seq_len)
    W = corpus.windows_per_epoch
    every_target = list(range(1, W * seq_len + 1))  # all but a tail shorter than a window
    assert num_tokens - 1 - len(every_target) < seq_len
    steps = math.ceil(2 * W / batch_size)  # straddles the border unless B divides W
    rows = np.concatenate([corpus.batch(step, batch_size, seed) for step in range(steps)])[: 2 * W]
    assert rows.dtype == np.int32
    assert rows.shape == (2 * W, seq_len + 1)
    assert (np.diff(rows, axis=1) == 1).all()  # a window is contiguous
    for epoch in (rows[:W], rows[W:]):
        assert sorted(epoch[:, 1:].ravel()) == every_target


def test_epochs_and_seeds_have_their_own_order():
    corpus = corpus_of_range(16 * 500 + 1, 2, 16)
    orders = [tuple(corpus.batch(e, 500, seed)[:, 0]) for e in range(3) for seed in range(3)]
    assert len(set(orders)) == 9
    for one, other in itertools.combinations(orders, 2):
        # Two random orders agree in Poisson(1) places: 10 or more happens in 1e-7 of the pairs.
        assert sum(a == b for a, b in zip(one, other)) < 10


@settings(deadline=None, max_examples=60)
@given(batch_size=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=6), step=st.integers(0, 10**12))
def test_rows_of_any_hosts_make_the_batch(batch_size, cuts, step):
    corpus = corpus_of_range(16 * 37 + 5, 2, 16)
    borders = [0, *sorted(min(c, batch_size) for c in cuts), batch_size]
    parts = [corpus.batch(step, batch_size, 3, slice(a, b)) for a, b in itertools.pairwise(borders)]
    np.testing.assert_array_equal(np.concatenate(parts), corpus.batch(step, batch_size, 3))
    strided = [corpus.batch(step, batch_size, 3, slice(host, None, 4)) for host in range(4)]
    for host, part in enumerate(strided):
        np.testing.assert_array_equal(part, corpus.batch(step, batch_size, 3)[host::4])


def test_an_epoch_longer_than_a_memo_is_the_permutation():
    corpus = corpus_of_range(2 * 9000 + 1, 2, 2)
    for epoch in (0, 1):
        index = np.arange(9000, dtype=np.uint64) + np.uint64(9000 * epoch)
        expected = data.permute(np.arange(9000, dtype=np.uint64), 9000, f"train 5 {epoch}") * np.uint64(2)
        np.testing.assert_array_equal(corpus.windows(index, 5)[:, 0], expected)
    straddling = corpus.windows(np.array([4095, 4096, 8999, 9000, 17999, 18000], np.uint64), 5)
    assert len(straddling) == 6


def test_reopened_corpus_gives_equal_batches(tmp_path, config, corpus):
    again = data.open(config, tmp_path / "cache")
    assert again.fingerprint == corpus.fingerprint
    for step in (0, 1, 77, 10**9):
        np.testing.assert_array_equal(again.batch(step, 6, 5), corpus.batch(step, 6, 5))


def test_batches_are_what_they_were_when_the_records_were_made():
    """If this fails, the order of training data changed: committed records can no longer be reproduced."""
    corpus = corpus_of_range(8 * 101 + 1, 8 * 11, 8)
    assert (corpus.batch(20, 10, seed=1)[:, 0] // 8).tolist() == [100, 8, 24, 80, 45, 26, 92, 67, 84, 75]
    assert (corpus.validation()[0][:, 0] // 8).tolist() == [1, 6, 9, 10, 2, 7, 3, 4, 8, 5, 0]


def test_no_row_of_a_batch_costs_python():
    """1.7 µs a row at 64 rows (scaling.bench --data): what Python does is done once for all of them."""
    corpus = corpus_of_range(128 * 5000 + 1, 2, 128)
    corpus.batch(0, 64, 0)
    few, many = (counting.calls(lambda rows=rows: corpus.batch(1, rows, 0)) for rows in (64, 1024))
    assert many <= few + 64


def test_negative_step_is_refused(corpus):
    with pytest.raises(ValueError, match="step is -1"):
        corpus.batch(-1, 4, 0)


# --- The permutation -------------------------------------------------------------------------------------------------


def permute_one(i: int, size: int, key: str) -> int:
    """The same permutation in Python's integers, from its definition."""

    def mix(x: int) -> int:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> 33)) * factor % 2**64
        return x ^ (x >> 33)

    a = math.ceil(math.sqrt(size))
    b = math.ceil(size / a)
    stream = hashlib.shake_256(key.encode()).digest(64)
    keys = [int.from_bytes(stream[k : k + 8], "little") for k in range(0, 64, 8)]
    while True:
        left, right = divmod(i, b)
        for on_left, on_right in zip(keys[::2], keys[1::2]):
            left = (left + mix(right ^ on_left) % a) % a
            right = (right + mix(left ^ on_right) % b) % b
        i = left * b + right
        if i < size:
            return i


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 10**12), key=st.integers(), data_=st.data())
def test_permutation_equals_its_definition(size, key, data_):
    index = data_.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    out = data.permute(np.array(index, np.uint64), size, str(key))
    assert out.tolist() == [permute_one(i, size, str(key)) for i in index]


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 600), key=st.integers())
def test_permutation_is_a_bijection(size, key):
    out = data.permute(np.arange(size, dtype=np.uint64), size, str(key))
    assert sorted(out.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 2**16 - 1, 2**16, 2**16 + 1, 250_000])
def test_permutation_at_the_edges(size):
    before = np.arange(size, dtype=np.uint64)
    out = data.permute(before, size, "edge")
    assert np.bincount(out.astype(np.int64), minlength=size).tolist() == [1] * size
    assert before.tolist() == list(range(size))  # the argument is left alone


def test_permutation_of_a_huge_range_stays_inside_and_apart():
    size = 10**12 + 39
    out = data.permute(np.arange(10**5, dtype=np.uint64) * np.uint64(10**7), size, "huge")
    assert len(np.unique(out)) == 10**5
    assert out.max() < size
    assert abs(out.astype(float).mean() / size - 0.5) < 5 / math.sqrt(12 * 10**5)


def test_permutation_is_fair():
    """Where an element lands is uniform over keys, and so is the difference of neighbours: χ² with 9 σ of room."""
    size, num_keys = 20, 4000
    out = np.array([data.permute(np.arange(size, dtype=np.uint64), size, f"k{k}") for k in range(num_keys)]).astype(int)
    for landed in (out[:, 0], out[:, 7], out[:, 19]):
        counts = np.bincount(landed, minlength=size)
        assert ((counts - num_keys / size) ** 2 / (num_keys / size)).sum() < (size - 1) + 9 * math.sqrt(2 * (size - 1))
    steps = np.bincount((out[:, 1] - out[:, 0]) % size, minlength=size)[1:]
    expected = num_keys / (size - 1)
    assert ((steps - expected) ** 2 / expected).sum() < (size - 2) + 9 * math.sqrt(2 * (size - 2))


# --- Validation ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(num_tokens=st.integers(2, 500), seq_len=st.integers(1, 40))
def test_every_validation_token_is_predicted_once(num_tokens, seq_len):
    corpus = corpus_of_range(seq_len + 1, num_tokens, seq_len)
    x_WS, weights_WT = corpus.validation()
    assert x_WS.dtype == np.int32
    assert weights_WT.shape == (len(x_WS), seq_len)
    assert sorted(x_WS[:, 1:][weights_WT == 1]) == list(range(1, num_tokens))
    assert set(np.unique(weights_WT)) <= {0.0, 1.0}
    assert (x_WS[:, 1:][weights_WT == 0] == corpus.separator_id).all()
    inputs = x_WS[:, :-1][weights_WT == 1]
    assert (inputs + 1 == x_WS[:, 1:][weights_WT == 1]).all()  # each target follows its input


def test_part_of_validation_is_a_prefix_of_whole_windows_of_all_of_it():
    corpus = corpus_of_range(17, 16 * 50 + 3, 16)
    x_WS, weights_WT = corpus.validation()
    for num_tokens, windows in ((1, 1), (16, 1), (17, 2), (10**9, 51)):
        part, part_weights = corpus.validation(num_tokens)
        np.testing.assert_array_equal(part, x_WS[:windows])
        np.testing.assert_array_equal(part_weights, weights_WT[:windows])
    starts = x_WS[:25, 0] // 16
    assert len(set(starts < 25)) == 2  # half of the windows come from all over the split, not from its first half
    with pytest.raises(ValueError, match="num_tokens is 0"):
        corpus.validation(0)


@settings(deadline=None, max_examples=40)
@given(
    num_tokens=st.integers(2, 400),
    seq_len=st.integers(1, 20),
    rows=st.integers(1, 9),
    asked=st.none() | st.integers(1, 500),
)
def test_validation_in_pieces_is_validation_at_once(num_tokens, seq_len, rows, asked):
    """The windows against a plain loop over the tokens, in whatever pieces they are made; counts without making any."""
    corpus = corpus_of_range(seq_len + 1, num_tokens, seq_len)
    counts = corpus.validation_counts(asked)
    starts = range(0, len(counts), rows)
    pieces = [corpus.validation_windows(i, min(i + rows, len(counts)), asked) for i in starts]
    seen = []
    for (x_WS, weights_WT), i in zip(pieces, starts):
        for w, (window, weights) in enumerate(zip(x_WS, weights_WT)):
            first = int(window[0])  # the corpus counts up from 0: a token is its place
            inside = min(seq_len, num_tokens - 1 - first)
            assert window[: inside + 1].tolist() == list(range(first, first + inside + 1))
            assert weights.tolist() == [1.0] * inside + [0.0] * (seq_len - inside)
            assert counts[i + w] == inside
            seen.append(first)
    wanted = min(-(-(num_tokens - 1) // seq_len), -(-(asked or num_tokens) // seq_len))
    assert len(set(seen)) == len(seen) == wanted
    assert all(first % seq_len == 0 for first in seen)


def test_corpus_that_does_not_suit_the_model(tmp_path, config, corpus):
    says = r"^data.seq_len is 9999: the train split of .* has \d+ tokens, a window takes 10000"
    with pytest.raises(ValueError, match=says):
        data.open(dataclasses.replace(config, seq_len=9999), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"^model.vocab_size is 255: write 256 or more"):
        corpus.require_vocab(255)
    corpus.require_vocab(256)


# --- What can happen to a preparation --------------------------------------------------------------------------------


def python(code: str, *args: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        cwd=REPO, capture_output=True, text=True, check=check, timeout=60,
    )  # fmt: skip


PREPARE = """
import sys
from pathlib import Path
from scaling.config import DataConfig
from scaling import data
config = DataConfig(source=sys.argv[1], seq_len=16, validation_fraction=0.25)
"""


def test_processes_and_threads_race_to_one_corpus(tmp_path, config):
    code = PREPARE + "data.prepare(config, Path(sys.argv[2])); print(data.open(config, Path(sys.argv[2])).fingerprint)"
    race = [(python, (code, config.source, str(tmp_path / "cache")))] * 3
    race += [(data.prepare, (config, tmp_path / "cache"))] * 3
    with concurrent.futures.ThreadPoolExecutor(len(race)) as pool:
        results = [f.result() for f in [pool.submit(call, *args) for call, args in race]]
    fingerprints = {r.stdout.strip() for r in results[:3]} | {data.open(config, tmp_path / "cache").fingerprint}
    assert len(fingerprints) == 1
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == ["", ".lock"]


def test_without_file_locks_the_first_to_finish_wins(tmp_path, config, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    nested = lambda line: data.prepare(config, tmp_path / "cache")  # noqa: E731  another builder overtakes this one
    [folder] = data.prepare(config, tmp_path / "cache", nested)
    assert data.open(config, tmp_path / "cache").num_documents == 40
    assert [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == [folder]


def test_killed_while_building(tmp_path, config):
    code = PREPARE + "import os; data.prepare(config, Path(sys.argv[2]), lambda line: os.kill(os.getpid(), 9))"
    killed = python(code, config.source, str(tmp_path / "cache"), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any(p.suffix == ".work" for p in (tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match="no tokens prepared"):
        data.open(config, tmp_path / "cache")
    [folder] = data.prepare(config, tmp_path / "cache")
    assert data.open(config, tmp_path / "cache").num_documents == 40
    assert {p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"} == {folder}


def test_bare_machine_opens_what_another_prepared(tmp_path, config, corpus):
    """numpy and the standard library suffice, and the source need not be there."""
    code = PREPARE.replace("import sys\n", "import sys\nfor n in sys.argv[3:]: sys.modules[n] = None\n", 1) + (
        "data.prepare(config, Path(sys.argv[2]))\nprint(data.open(config, Path(sys.argv[2])).batch(3, 2, 1).tolist())\n"
    )
    absent = ["tensorflow_datasets", "pandas", "pydantic", "jax", "flax", "yaml", "matplotlib", "scipy", "array_record"]
    (tmp_path / "texts").rename(tmp_path / "moved")
    out = python(code, config.source, str(tmp_path / "cache"), *absent).stdout
    assert json.loads(out) == corpus.batch(3, 2, 1).tolist()


def test_changed_files_are_refused(tmp_path, texts, config, corpus):
    (tmp_path / "texts" / "007.txt").write_text(texts[7].upper(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"its files changed since .*: delete that folder"):
        data.prepare(config, tmp_path / "cache")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "manifest.json"])
def test_damage_is_found_and_says_what_to_delete(tmp_path, config, corpus, name, damage):
    folder = data.folder_of(config, tmp_path / "cache")
    damage(folder / name)
    says = f"{re.escape(name)} .*: delete {re.escape(str(folder))} and run again$"
    with pytest.raises(ValueError, match=says) as caught:
        data.open(config, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_manifest_of_another_schema(tmp_path, config, corpus):
    path = data.folder_of(config, tmp_path / "cache") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(ValueError, match="is of schema 99, this version reads 2: delete"):
        data.open(config, tmp_path / "cache")
