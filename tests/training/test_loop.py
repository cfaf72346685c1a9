"""The loop: resume to the bit, failure as data, validation as defined. On a corpus of a few kilobytes."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from scaling import accounting, data, records
from scaling.config import DataConfig
from scaling.data import corpus as data_corpus
from scaling.execution import ExecutionConfig
from scaling.fields import to_dict
from scaling.training import evaluation, models
from scaling.training.member import Member
from scaling.training.pack import Pack
from tests.training.lab import EXECUTION, cell, essence, train, train_and_stop_at


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    return train([cell(corpus[0])], corpus, tmp_path_factory.mktemp("undisturbed"))[0]


def test_a_run_learns_and_its_record_is_complete(undisturbed, corpus):
    r = undisturbed
    assert r.status == "completed"
    assert r.loss < 3.5 < r.curve["loss"][0]
    assert r.curve["step"] == accounting.eval_steps(24, 6)
    assert r.curve["step"][-1] == r.num_steps == 24
    assert r.num_tokens == 24 * 8 * 16
    described = data.open(*corpus).describe()
    assert r.unique_tokens == described["epoch_tokens"]
    assert r.epochs == r.num_tokens / described["epoch_tokens"]
    assert r.bits_per_byte == pytest.approx(r.loss / np.log(2) * described["tokens_per_byte"])
    assert r.timing["tokens_per_s"] > 0
    assert r.environment["backend"] == "cpu"


@pytest.mark.slow
def test_the_final_loss_is_the_mean_over_every_validation_token(corpus, tmp_path):
    """Against a plain product over the whole split, one window at a time, from the final checkpoint's parameters."""
    kept = dataclasses.replace(EXECUTION, keep_final_checkpoint=True)
    record = train([cell(corpus[0], steps=3)], corpus, tmp_path, kept)[0]
    import orbax.checkpoint as ocp

    path = tmp_path / "work" / "checkpoints" / record.run_id / "3" / "state"
    params = {n: np.asarray(p[0]) for n, p in ocp.StandardCheckpointer().restore(path.absolute())["params"].items()}
    run = cell(corpus[0], steps=3).run
    windows, weights = data.open(*corpus).validation()
    reference = ExecutionConfig(attention="einsum")
    logits = jax.jit(lambda p, t: models.apply(run.model, reference, p, t))(params, windows[:, :-1])
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nll = -np.take_along_axis(log_probs, windows[:, 1:, None], axis=-1)[..., 0]
    assert record.num_eval_tokens == weights.sum() == data.open(*corpus).validation_tokens - 1
    assert record.loss == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-5)


def test_a_part_of_validation_is_a_mean_over_its_first_windows(corpus, tmp_path):
    """Two runs that differ in ``final_tokens`` alone train alike; the loss of the part is within the whole's noise."""
    whole, part = cell(corpus[0], steps=3), cell(corpus[0], steps=3)
    asked = 10 * corpus[0].seq_len
    run = dataclasses.replace(part.run, eval=dataclasses.replace(part.run.eval, final_tokens=asked))
    part = dataclasses.replace(part, run=run)
    assert whole.run.run_id != part.run.run_id
    (first,), (second,) = (train([one], corpus, tmp_path / name) for one, name in ((whole, "a"), (part, "b")))
    assert first.curve == second.curve
    assert second.num_eval_tokens == asked < first.num_eval_tokens
    assert second.loss != first.loss
    assert abs(second.loss - first.loss) < 5 * second.loss_standard_error


def test_evaluation_holds_no_more_than_a_batch_of_windows(corpus, tmp_path, monkeypatch):
    """Of a split of any size: no call makes more rows than the program takes, nor all of them at once."""
    sizes, made = [], data_corpus.Corpus.validation_windows

    def counted(self, start, stop, num_tokens=None):
        sizes.append(stop - start)
        return made(self, start, stop, num_tokens)

    monkeypatch.setattr(data_corpus.Corpus, "validation_windows", counted)
    monkeypatch.setattr(data_corpus.Corpus, "validation", None)
    record = train([cell(corpus[0], steps=3)], corpus, tmp_path)[0]
    windows = len(data.open(*corpus).validation_counts())
    assert record.status == "completed"
    assert max(sizes) < windows
    assert sum(sizes) >= windows


@pytest.mark.slow
def test_interrupted_anywhere_the_record_is_the_same_to_the_bit(undisturbed, corpus, tmp_path):
    for stop in (1, 7, 8, 20, None):  # 1: before the first point of the curve
        finished = train_and_stop_at(stop, [cell(corpus[0])], corpus, tmp_path)
        assert (finished is None) == (stop is not None)
    record = finished[0]
    assert essence(record) == essence(undisturbed)
    assert not list((tmp_path / "work" / "checkpoints").iterdir())  # and its checkpoints are gone


@pytest.mark.slow
def test_members_leave_at_their_own_horizons_and_equal_their_lone_runs(undisturbed, corpus, tmp_path):
    others = [cell(corpus[0], steps=10, seed=1), cell(corpus[0], steps=24, seed=2, peak_lr=1e4, clip_norm=None)]
    by_id = {r.run_id: r for r in train([cell(corpus[0]), *others], corpus, tmp_path)}
    lone = train([others[0]], corpus, tmp_path / "lone")[0]
    long, wild = by_id[undisturbed.run_id], by_id[others[1].run.run_id]
    assert long.loss == pytest.approx(undisturbed.loss, rel=1e-5)
    assert by_id[lone.run_id].loss == pytest.approx(lone.loss, rel=1e-5)
    assert wild.status == "diverged"
    assert wild.loss is None
    assert wild.num_tokens == wild.diverged_at_step * 128 <= long.num_tokens
    assert records.read(records.path_of(tmp_path / "results", wild.run_id)) == wild


def test_data_that_changed_under_a_checkpoint_is_refused(corpus, tmp_path):
    config = corpus[0]
    assert train_and_stop_at(3, [cell(config)], corpus, tmp_path) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Corpus, "fingerprint", property(lambda self: "f" * 64))
        with pytest.raises(RuntimeError, match=r"made from data .* but .* is now ffffffffffff"):
            train([cell(config)], corpus, tmp_path)


def test_standard_error_is_the_spread_of_resampled_windows():
    rng = np.random.default_rng(0)
    tokens_W = rng.integers(5, 20, 400)
    sums_W = tokens_W * rng.normal(2, 0.3, 400)
    loss, error = evaluation.mean_and_standard_error(sums_W, tokens_W)
    picks = rng.integers(0, 400, (4000, 400))
    resampled = sums_W[picks].sum(1) / tokens_W[picks].sum(1)
    assert loss == pytest.approx(sums_W.sum() / tokens_W.sum())
    assert error == pytest.approx(resampled.std(), rel=0.05)


def test_the_loss_of_a_mixture_is_its_sources_by_weight():
    rng = np.random.default_rng(0)
    tokens_W, sums_W = np.full(40, 10.0), rng.normal(20, 1, 40)
    first, second = (evaluation.mean_and_standard_error(sums_W[s], tokens_W[s]) for s in (slice(0, 30), slice(30, 40)))
    found = evaluation.evaluated(sums_W, tokens_W, [("a", 0.8, slice(0, 30)), ("b", 0.2, slice(30, 40))])
    assert found.loss == pytest.approx(0.8 * first[0] + 0.2 * second[0])
    assert found.standard_error == pytest.approx(((0.8 * first[1]) ** 2 + (0.2 * second[1]) ** 2) ** 0.5)
    assert found.by_source["b"] == {"loss": second[0], "standard_error": second[1]}
    assert evaluation.evaluated(sums_W, tokens_W, [("a", 1.0, slice(None))]).by_source is None


@pytest.mark.slow
def test_a_run_on_a_mixture_says_how_each_source_fared(tmp_path):
    for name, text in (("a", "aaaaaaab "), ("b", "the quick brown fox ")):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.txt").write_text(f"{i} " + text * 40)
    source = f"3 * text:{tmp_path / 'a'} + 1 * text:{tmp_path / 'b'}"
    config = DataConfig(source=source, seq_len=16, validation_fraction=0.25, mask_documents=True)
    data.prepare(config, tmp_path / "cache")
    [record] = train([cell(config)], (config, tmp_path / "cache"), tmp_path)
    first, second = record.data["sources"]
    assert record.loss == pytest.approx(0.75 * first["loss"] + 0.25 * second["loss"])
    assert first["loss"] != second["loss"]
    assert first["epochs"] * first["epoch_tokens"] == pytest.approx(0.75 * record.num_tokens)
    # Until the first is read again every token is another; from there on its own, and those read of the second.
    least, opened = int(first["epoch_tokens"] / 0.75), data.open(config, tmp_path / "cache")
    assert record.unique_tokens == record.data["epoch_tokens"] == least
    assert record.epochs == record.num_tokens / least == pytest.approx(first["epochs"], rel=1e-3)
    longer = 2 * least
    assert opened.distinct_tokens(longer) == pytest.approx(first["epoch_tokens"] + 0.25 * longer, abs=1)
    assert opened.distinct_tokens(1e12) == first["epoch_tokens"] + second["epoch_tokens"]
    assert record.bits_per_byte == pytest.approx(record.loss / np.log(2) * record.data["tokens_per_byte"])


KILLED = """
import json, sys
from pathlib import Path
from scaling.config import RunConfig
from scaling.execution import ExecutionConfig
from scaling.fields import parse
from scaling.grid import Cell
from scaling.training import loop
run, cache, folder = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
loop.train([Cell(parse(RunConfig, run), labels={"size": 16})], execution=ExecutionConfig(checkpoint_seconds=0.2),
    workdir=folder / "work", results=folder / "results", cache_dir=cache, sweep_name="t")
"""


@pytest.mark.slow
def test_killed_at_five_random_moments_the_record_is_the_same_to_the_bit(corpus, tmp_path):
    target = cell(corpus[0], steps=3000)

    def start(folder):
        command = [sys.executable, "-c", KILLED, json.dumps(to_dict(target.run)), str(corpus[1]), str(folder)]
        return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": ""})

    whole = start(tmp_path / "whole")
    assert whole.wait() == 0
    rng, kills, checkpoints = random.Random(), 0, tmp_path / "cut" / "work" / "checkpoints" / target.run.run_id
    while kills < 5:
        process = start(tmp_path / "cut")
        seen = max((int(p.name) for p in checkpoints.glob("[0-9]*") if p.name.isdigit()), default=0)
        while process.poll() is None:  # wait for it to get further than before, then a random while
            if any(p.name.isdigit() and int(p.name) > seen for p in checkpoints.glob("*")):
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    last = start(tmp_path / "cut")
    assert last.wait() == 0
    assert kills >= 3
    read = [records.read(records.path_of(tmp_path / f / "results", target.run.run_id)) for f in ("whole", "cut")]
    assert essence(read[0]) == essence(read[1])


def test_tensorboard_holds_the_curve_of_the_record(corpus, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    record = train([cell(corpus[0])], corpus, tmp_path, dataclasses.replace(EXECUTION, tensorboard=True))[0]
    (file,) = (tmp_path / "work" / "tensorboard" / record.run_id).glob("events*")
    raw, curve = file.read_bytes(), {}
    while raw:  # TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(raw[:8], "little")
        event = event_pb2.Event.FromString(raw[12 : 12 + length])
        raw = raw[16 + length :]
        for value in event.summary.value:
            if value.tag == "validation/loss":
                curve[event.step] = value.simple_value
    assert list(curve) == record.curve["step"]
    np.testing.assert_allclose(list(curve.values()), record.curve["loss"], rtol=1e-6)


def test_a_logger_that_is_not_installed_says_what_to_do(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"execution.wandb is true .* pip install"):
        train([cell(corpus[0])], corpus, tmp_path, dataclasses.replace(EXECUTION, wandb=True))


def two_checkpoints(folder):
    """A Checkpoints with steps 1 and 2 saved of a small state, and what it should restore."""
    from scaling.training.checkpoint import Checkpoints

    state = {"w": jax.numpy.arange(8.0)}
    host = {"curve": [1.5]}
    checkpoints = Checkpoints(folder.absolute(), 32, 1e9)
    for step in (1, 2):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x * s, state), host | {"step": step})
        checkpoints._manager.wait_until_finished()
    abstract = jax.eval_shape(lambda: state)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return checkpoints, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), abstract)


def test_a_truncated_checkpoint_is_set_aside_and_the_one_before_it_restored(tmp_path):
    checkpoints, abstract = two_checkpoints(tmp_path)
    (tmp_path / "2" / "host" / "metadata").write_text('{"curve": [1.')
    state, host = checkpoints.restore(lambda host: abstract)
    assert host["step"] == 1
    assert (np.asarray(state["w"]) == np.arange(8.0)).all()
    assert "2: unreadable checkpoint" in checkpoints.complaints[0]
    assert (tmp_path / "unreadable-2").exists()
    checkpoints.save(2, {"w": jax.numpy.ones(8)}, {"step": 2})  # and its place is free again
    assert checkpoints.restore(lambda host: abstract)[1] == {"step": 2}
    checkpoints.close()


def test_a_checkpoint_of_another_version_is_set_aside_and_one_of_none_read(tmp_path, monkeypatch):
    checkpoints, abstract = two_checkpoints(tmp_path)
    metadata = tmp_path / "1" / "host" / "metadata"
    without = {k: v for k, v in json.loads(metadata.read_text()).items() if k != "version"}
    metadata.write_text(json.dumps(without))  # as before there were versions
    newer = tmp_path / "2" / "host" / "metadata"
    newer.write_text(json.dumps(json.loads(newer.read_text()) | {"version": 7}))
    assert checkpoints.restore(lambda host: abstract)[1] == without
    assert checkpoints.complaints == [f"{tmp_path / '2'}: unreadable checkpoint (version 7, this code reads 1), "
                                      "set aside as unreadable-2"]  # fmt: skip
    checkpoints.close()


def test_what_the_storage_cannot_write_is_no_bad_input(tmp_path, monkeypatch):
    """TensorStore's own errors are ValueErrors: they must be tried again, as a full disk's are."""
    from scaling.engine.run import worker

    checkpoints, _ = two_checkpoints(tmp_path)

    def refuse(*args, **kw):
        raise ValueError("UNAVAILABLE: Error writing to remote: 503\nsource locations: …")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", refuse)
        with pytest.raises(OSError, match="a checkpoint cannot be written: ValueError: UNAVAILABLE") as caught:
            checkpoints.save(3, {"w": jax.numpy.ones(8)}, {})
    assert not worker.failure(caught.value)["final"]
    checkpoints.close()


def test_a_checkpoint_that_cannot_be_reached_is_not_set_aside(tmp_path, monkeypatch):
    checkpoints, abstract = two_checkpoints(tmp_path)

    def away(*args, **kw):
        raise ValueError("UNAVAILABLE: Error reading from remote: 503")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "restore", away)
        with pytest.raises(OSError, match="cannot be read now: ValueError: UNAVAILABLE"):
            checkpoints.restore(lambda host: abstract)
    assert checkpoints.restore(lambda host: abstract)[1]["step"] == 2
    assert checkpoints.complaints == []
    checkpoints.close()


def test_a_folder_that_would_be_read_as_a_pattern_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"\[ in a path is read as a pattern: write a folder without"):
        train([cell(corpus[0], steps=1)], corpus, tmp_path / "run[z]")


@pytest.mark.parametrize("moment", ["record", "after"])
def test_a_final_checkpoint_is_whole_before_the_record(undisturbed, corpus, tmp_path, monkeypatch, moment):
    """Killed between the two, or just after: the next call makes good what is missing."""
    kept = dataclasses.replace(EXECUTION, keep_final_checkpoint=True)
    save = records.save

    def killed(*args):
        if moment == "after":
            save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train([cell(corpus[0])], corpus, tmp_path, kept)
    final = tmp_path / "work" / "checkpoints" / undisturbed.run_id / "24"
    assert final.exists()
    again = train([cell(corpus[0])], corpus, tmp_path, kept)
    assert [essence(r) for r in again] == ([essence(undisturbed)] if moment == "record" else [])
    assert essence(records.read(records.path_of(tmp_path / "results", undisturbed.run_id))) == essence(undisturbed)
    assert final.exists()


def test_a_run_that_is_set_back_says_so(corpus, tmp_path):
    assert train_and_stop_at(3, [cell(corpus[0])], corpus, tmp_path) is None
    [folder] = (tmp_path / "work" / "checkpoints").iterdir()
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    events = []
    train([cell(corpus[0])], corpus, tmp_path, on_event=events.append)
    said = [event["text"] for event in events if event["event"] == "said"]
    assert "unreadable checkpoint" in said[0]
    assert said[-1] == f"{folder.name}: no checkpoint of it can be read: it begins again at step 0"


def test_a_config_that_does_not_fit_costs_no_checkpoint(tmp_path):
    checkpoints, _ = two_checkpoints(tmp_path)

    def refuse(host):
        raise ValueError("batch_size is 4, which the mesh does not divide")

    with pytest.raises(ValueError, match="batch_size is 4"):
        checkpoints.restore(refuse)
    assert {p.name for p in tmp_path.iterdir()} >= {"1", "2"}
    checkpoints.close()


def test_what_is_saved_is_not_what_training_goes_on_to_change(corpus):
    member = Member(cell(corpus[0]), None)
    some_pack = type("P", (), {"corpus": data.open(*corpus)})
    saved = Pack.host_state(some_pack, member)
    member.curve["step"].append(99)
    assert saved["member"]["curve"]["step"] == []
