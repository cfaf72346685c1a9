"""Trunks and branches, packs regrouped: whoever trains which steps, a run's record is its lone run's, bit for bit."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from scaling import accounting, records
from scaling.execution import MeshConfig
from scaling.training import checkpoint, optimizers
from tests.training.lab import EXECUTION, cell, essence, train, train_and_stop_at

FLAT = {"cooldown_fraction": 0.25}


def family(data_config):
    """A trunk of 40 steps, flat for 30; riders that leave it at 12, 15 (down to a tenth of the rate), 18 and 30."""
    trunk = cell(data_config, 40, schedule=FLAT)
    riders = [
        cell(data_config, 16, schedule=FLAT),
        cell(data_config, 20, schedule=FLAT | {"final_lr_fraction": 0.1}),
        cell(data_config, 36, schedule={"cooldown_fraction": 0.5, "final_lr_fraction": 0.3}),
        cell(data_config, 60, schedule=FLAT, holdout=True),
    ]
    return trunk, riders


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The record of each of the family, by run_id, trained alone."""
    folder = tmp_path_factory.mktemp("alone")
    trunk, riders = family(corpus[0])
    return {c.run.run_id: train([c], corpus, folder)[0] for c in (trunk, *riders)}


def carry(corpus, folder, stop_at=None, execution=EXECUTION):
    trunk, riders = family(corpus[0])
    events = []
    if stop_at is not None:
        return train_and_stop_at(stop_at, [trunk], corpus, folder, riders={trunk.run.run_id: riders})
    return train(
        [trunk], corpus, folder, execution, riders={trunk.run.run_id: riders}, on_event=events.append
    ), [e["run_id"] for e in events if e["event"] == "branched"]  # fmt: skip


def assert_all_equal(corpus, folder, alone):
    """Trains what has no record yet, run by run, and compares all."""
    _, riders = family(corpus[0])
    for c in riders:
        train([c], corpus, folder)
    found = {r.run_id: r for r in records.load_records(folder / "results")}
    assert {i: essence(r) for i, r in found.items()} == {i: essence(r) for i, r in alone.items()}
    assert not list((folder / "work" / "checkpoints").iterdir())
    return found


@pytest.mark.slow
def test_a_branch_is_its_lone_run_bit_for_bit(corpus, alone, tmp_path):
    trunk, riders = family(corpus[0])
    finished, branched = carry(corpus, tmp_path)
    assert [r.run_id for r in finished] == [trunk.run.run_id]
    assert branched == [c.run.run_id for c in riders]
    steps = {c.run.run_id: checkpoint.newest_step(tmp_path / "work", c.run.run_id) for c in riders}
    assert list(steps.values()) == [12, 15, 18, 30]  # the longer one goes on from where the trunk cools down
    found = assert_all_equal(corpus, tmp_path, alone)
    for run_id, step in steps.items():
        assert found[run_id].timing["branched_from"] == trunk.run.run_id
        assert found[run_id].timing["branch_step"] == step
    assert found[trunk.run.run_id].timing["branched_from"] is None
    # Seconds and tokens of the steps it trained itself alone
    took = found[riders[0].run.run_id].timing
    assert took["tokens_per_s"] == pytest.approx(4 * 128 / (took["step_seconds"] + took["data_seconds"]))


@pytest.mark.slow
def test_with_dropout_too_a_trunk_its_branch_and_what_was_resumed_are_equal_to_the_bit(corpus, tmp_path):
    """What is dropped follows from the seed and the step, which a checkpoint and a rider's both have."""
    trunk, rider = (cell(corpus[0], steps, seed=5, schedule=FLAT, dropout=0.2) for steps in (40, 16))
    riders = {trunk.run.run_id: [rider]}
    lone = {c.run.run_id: train([c], corpus, tmp_path / "lone")[0] for c in (trunk, rider)}
    assert train_and_stop_at(7, [trunk], corpus, tmp_path, riders=riders) is None
    train([trunk], corpus, tmp_path, riders=riders)
    assert checkpoint.newest_step(tmp_path / "work", rider.run.run_id) == 12
    train([rider], corpus, tmp_path)
    found = {r.run_id: r for r in records.load_records(tmp_path / "results")}
    assert found[rider.run.run_id].timing["branched_from"] == trunk.run.run_id
    assert {i: essence(r) for i, r in found.items()} == {i: essence(r) for i, r in lone.items()}
    plain = train([cell(corpus[0], 16, seed=5, schedule=FLAT)], corpus, tmp_path / "plain")[0]
    assert plain.loss != found[rider.run.run_id].loss


@pytest.mark.slow
def test_a_trunk_cut_off_anywhere_leaves_the_same(corpus, alone, tmp_path):
    for stop_at in (3, 12, 13, 16, 39):  # before a branch, at it, after it
        assert carry(corpus, tmp_path, stop_at) is None
    assert carry(corpus, tmp_path)[0]
    assert_all_equal(corpus, tmp_path, alone)


@pytest.mark.slow
def test_riders_that_cannot_be_carried_are_let_go(corpus, alone, tmp_path):
    """A trunk that began without them, or is past where they branch, does not know their curves."""
    trunk, riders = family(corpus[0])
    assert train_and_stop_at(5, [trunk], corpus, tmp_path) is None
    branched = carry(corpus, tmp_path)[1]
    assert sorted(branched) == sorted(c.run.run_id for c in riders)
    assert not any(checkpoint.newest_step(tmp_path / "work", i) for i in branched)
    assert_all_equal(corpus, tmp_path, alone)


@pytest.mark.slow
def test_killed_between_a_branch_and_the_next_save(corpus, alone, tmp_path):
    """The trunk goes back to step 3; the first rider, gone on meanwhile, is not sent back with it."""
    trunk, riders = family(corpus[0])
    assert carry(corpus, tmp_path, 3) is None
    saved = tmp_path / "work" / "checkpoints" / trunk.run.run_id
    before = shutil.copytree(saved, tmp_path / "before")
    assert carry(corpus, tmp_path, 13) is None
    shutil.rmtree(saved)
    before.rename(saved)
    assert train_and_stop_at(14, [riders[0]], corpus, tmp_path) is None
    assert carry(corpus, tmp_path)[0]
    assert checkpoint.newest_step(tmp_path / "work", riders[0].run.run_id) == 14
    assert_all_equal(corpus, tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["results", "work"])
def test_results_or_checkpoints_lost(corpus, alone, tmp_path, lost):
    _, riders = family(corpus[0])
    assert carry(corpus, tmp_path, 16) is None
    train([riders[0]], corpus, tmp_path)
    shutil.rmtree(tmp_path / lost)
    assert carry(corpus, tmp_path)[0]
    assert_all_equal(corpus, tmp_path, alone)


def test_a_trunk_that_diverges_takes_its_riders_with_it(corpus, tmp_path):
    wild = {"peak_lr": 1e4, "clip_norm": None, "schedule": FLAT}
    trunk, rider, held = (
        cell(corpus[0], 40, **wild), cell(corpus[0], 32, **wild), cell(corpus[0], 36, holdout=True, **wild)
    )  # fmt: skip
    finished = train([trunk], corpus, tmp_path, riders={trunk.run.run_id: [rider, held]})
    assert [r.run_id for r in finished] == [rider.run.run_id, trunk.run.run_id]
    assert {r.status for r in finished} == {"diverged"}
    alone = train([rider], corpus, tmp_path / "alone")[0]
    assert essence(finished[0]) == essence(alone)
    assert not records.is_done(tmp_path / "results", held.run.run_id)  # its turn comes after the forecast


def test_the_rate_of_trunk_and_branch_is_equal_to_the_bit_while_flat(corpus):
    trunk, riders = family(corpus[0])
    fractions = [{"final_lr_fraction": f} for f in np.linspace(0, 0.999, 40)]
    riders += [cell(corpus[0], s, schedule=FLAT | f) for s in (17, 23, 1000) for f in fractions]
    schedule = trunk.run.optim.schedule
    rate = jax.jit(jax.vmap(lambda hp, step: optimizers.learning_rate(schedule, hp, step), (None, 0)))

    def rates(c):
        plan = accounting.plan(c.run)
        every = np.asarray(rate(optimizers.hyperparams(c.run.optim, plan), np.arange(1000)))
        return every[: accounting.flat_steps(c.run, plan)]

    expected = rates(trunk)
    for rider in riders:
        got = rates(rider)
        n = min(len(got), len(expected))
        assert (got[:n] == expected[:n]).all()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(run=2, fsdp=4)], ids=["one", "run"])
def test_packs_at_different_steps_are_regrouped_at_will(corpus, tmp_path, mesh):
    """Members at steps 0, 7 and 12 in one pack; a riding branch in it; one that diverges: the rest equal lone runs."""
    execution = dataclasses.replace(EXECUTION, mesh=mesh)
    a, b = cell(corpus[0], 24), cell(corpus[0], 40, seed=1, schedule=FLAT)
    rider = cell(corpus[0], 16, seed=1, schedule=FLAT)
    c, wild = (
        cell(corpus[0], 10, seed=2, beta2=0.9, z_loss=1e-3),
        cell(corpus[0], 24, seed=3, peak_lr=1e4, clip_norm=None),
    )
    lone = {x.run.run_id: train([x], corpus, tmp_path / "lone")[0] for x in (a, b, rider, c)}
    riders = {b.run.run_id: [rider]}
    assert train_and_stop_at(7, [a, c], corpus, tmp_path, execution) is None
    assert train_and_stop_at(12, [b], corpus, tmp_path, EXECUTION, riders=riders) is None
    finished = train([wild, b, a, c], corpus, tmp_path, execution, riders=riders)
    assert checkpoint.newest_step(tmp_path / "work", rider.run.run_id) == 12
    finished += train([rider], corpus, tmp_path, EXECUTION)
    by_id = {r.run_id: r for r in finished}
    assert by_id.pop(wild.run.run_id).status == "diverged"
    assert set(by_id) == set(lone)
    for run_id, record in by_id.items():
        assert record.loss == pytest.approx(lone[run_id].loss, rel=1e-5)
        assert record.curve["step"] == lone[run_id].curve["step"]
        assert record.curve["train_loss"] == pytest.approx(lone[run_id].curve["train_loss"], rel=1e-5)
    assert not list((tmp_path / "work" / "checkpoints").iterdir())
