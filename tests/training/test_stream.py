"""A synthetic source as training reads it, from batches to the record."""

import hashlib
import math
import re

import numpy as np
import pytest

from scaling import data
from scaling.config import DataConfig, EvalConfig, Horizon, OptimConfig, RunConfig
from scaling.data.corpus import Corpus
from scaling.data.mixture import Mixture
from scaling.data.stream import BLOCK_WINDOWS, STREAM_TOKENS, Stream
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.transformer import TransformerConfig
from scaling.grid import Cell
from scaling.training import loop

SMALL = "synthetic:markov?symbols=5&order=1"
CONFIG = DataConfig(source=SMALL, seq_len=16)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    assert data.prepare(CONFIG, folder) == []
    stream = data.open(CONFIG, folder)
    assert not list(folder.iterdir()), "it needs no file"
    return stream


def test_whatever_training_reads_answers_the_same_questions():
    """Of a corpus, a mixture and a source without end: none may lack what another is asked."""
    asked = [{n for n in dir(kind) if n.startswith("validation") or n == "batch"} for kind in (Corpus, Mixture, Stream)]
    assert asked[0] - {"validation"} <= asked[1] & asked[2]


def test_parts_of_the_validation_split_are_64_whatever_is_read_of_it(stream):
    block_W = stream.validation_blocks()
    assert len(block_W) == len(stream.validation_counts())
    assert np.bincount(block_W).tolist() == [len(block_W) // 64] * 64
    assert (stream.validation_blocks(16 * 100) == block_W[:100]).all()


def test_a_batch_is_a_pure_function_and_hosts_read_their_rows(stream):
    whole = stream.batch(7, 12, seed=3)
    assert whole.shape == (12, 17)
    assert whole.dtype == np.int32
    assert (whole == data.open(CONFIG, "").batch(7, 12, seed=3)).all()
    parts = [stream.batch(7, 12, seed=3, rows=slice(i, i + 4)) for i in (0, 4, 8)]
    assert (np.concatenate(parts) == whole).all()
    for other in (stream.batch(8, 12, seed=3), stream.batch(7, 12, seed=4)):
        assert (other != whole).any(axis=1).all()


def test_a_window_is_a_separator_and_symbols(stream):
    for windows in (stream.batch(0, 64, seed=0), stream.validation(1000)[0]):
        assert (windows[:, 0] == stream.separator_id).all()
        assert set(np.unique(windows[:, 1:])) == set(range(1, stream.vocab_size))


def test_batches_cross_the_blocks_that_windows_are_made_in(stream):
    at_once = stream.batch(0, BLOCK_WINDOWS + 8, seed=0)
    in_turn = np.concatenate([stream.batch(step, 8, seed=0) for step in range(BLOCK_WINDOWS // 8 + 1)])
    assert (at_once == in_turn).all()
    assert len(np.unique(at_once, axis=0)) > 0.99 * len(at_once)  # 5^16 windows: hardly one comes twice


def test_validation_is_a_stream_of_its_own_of_half_a_million_tokens(stream):
    windows, weights = stream.validation()
    assert weights.sum() == windows[:, 1:].size == stream.validation_tokens >= 500_000
    part, _ = stream.validation(1000)
    assert len(part) == math.ceil(1000 / 16)
    assert (part == windows[: len(part)]).all()
    train = {row.tobytes() for row in stream.batch(0, 4096, seed=0)}
    assert (
        sum(row.tobytes() in train for row in windows[:4096]) < 41
    )  # one in a hundred: there are few enough to come twice
    assert stream.validation_shares() == [(SMALL, 1.0, slice(None))]


def test_the_same_text_on_every_machine():
    """Bytes of SHAKE-256 and integer tables: another value here means that records made before are of other data."""
    found = {}
    for name in ("markov", "hierarchy"):
        stream = data.open(DataConfig(source=f"synthetic:{name}", seq_len=128), "")
        windows = [stream.batch(0, 64, seed=0), stream.validation(8192)[0]]
        found[name] = hashlib.sha256(np.concatenate(windows).astype("<i4").tobytes()).hexdigest()[:12]
    assert found == {"markov": "d4240005ca6d", "hierarchy": "0cec6fc0ada2"}


def test_unique_tokens_bound_the_stream_and_nest():
    seen = {}
    for unique in (16 * 50, 16 * 200):
        limited = data.open(DataConfig(source=SMALL, seq_len=16, unique_tokens=unique), "")
        assert limited.train_tokens == unique
        epochs = limited.batch(0, 2 * unique // 16, seed=0)
        first, second = (sorted(row.tobytes() for row in half) for half in np.split(epochs, 2))
        assert first == second, "an epoch is every window once"
        assert (epochs[: len(epochs) // 2] != epochs[len(epochs) // 2 :]).any(), "in another order"
        seen[unique] = set(first)
    small, large = seen.values()
    assert small < large


def test_the_fingerprint_names_the_text(stream):
    other = data.open(DataConfig(source=SMALL + "&seed=1", seq_len=16), "")
    longer = data.open(DataConfig(source=SMALL, seq_len=32), "")
    limited = data.open(DataConfig(source=SMALL, seq_len=16, unique_tokens=160), "")
    assert len({stream.fingerprint, other.fingerprint, longer.fingerprint}) == 3
    assert limited.fingerprint == stream.fingerprint


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"source": "synthetic:marcov"}, "there is no process 'marcov'"),
        ({"source": "synthetic:hierarchy", "seq_len": 100}, "data.seq_len is 100: write a multiple of 32"),
        ({"source": SMALL, "tokenizer": "bpe:512"}, "data.tokenizer is 'bpe:512'"),
        ({"source": SMALL, "near_duplicates": "drop"}, "data.near_duplicates is 'drop'"),
        ({"source": SMALL, "unique_tokens": 5}, "data.unique_tokens is 5: write at least one window"),
        ({"source": f"0.5 * {SMALL} + 0.5 * python-stdlib"}, "a synthetic source has no text to mix"),
    ],
)
def test_what_such_a_source_has_not_is_refused_in_one_line(settings, says, tmp_path):
    with pytest.raises(ValueError, match=rf"^.*{re.escape(says)}.*$") as e:
        data.prepare(DataConfig(**settings), tmp_path)
    assert "\n" not in str(e.value)


def test_a_vocabulary_that_is_too_small_is_refused(stream):
    with pytest.raises(ValueError, match=r"model.vocab_size is 5: write 6 or more: .* has 5 symbols and a separator"):
        stream.require_vocab(5)
    stream.require_vocab(6)


@pytest.mark.slow
def test_a_model_comes_down_to_the_entropy_and_the_record_has_it(stream, tmp_path):
    """Targets, weights and loss at once: an order-1 chain of five symbols is learned in no time."""
    run = RunConfig(
        TransformerConfig(d_model=16, num_layers=1, num_heads=1, head_dim=16, num_kv_heads=1, d_ff=16, vocab_size=6),
        OptimConfig(peak_lr=0.03, warmup_tokens=16 * 64 * 20),
        Horizon(steps=250),
        batch_size=64,
        data=CONFIG,
        eval=EvalConfig(num_points=2, curve_tokens=256),
    )
    [record] = loop.train(
        [Cell(run)], execution=ExecutionConfig(mesh=MeshConfig(), eval_batch_size=512), workdir=tmp_path / "work",
        results=tmp_path, cache_dir=tmp_path, sweep_name="t",
    )  # fmt: skip
    truth = stream.process
    assert record.data["entropy_rate"] == truth.entropy_rate
    assert record.data["best_loss"] == truth.best_loss(16)
    assert abs(record.data["best_validation_loss"] - truth.best_loss(16)) < 3 * record.loss_standard_error
    assert 0 < record.loss - record.data["best_validation_loss"] < 0.01
    assert record.num_eval_tokens == stream.validation_tokens
    assert record.bits_per_byte is None
    assert record.unique_tokens == STREAM_TOKENS
    assert 0 < record.epochs < 1e-6
