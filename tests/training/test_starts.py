"""Runs that start from another's weights: the state that they begin with, against the parent's own to the bit."""

import dataclasses
import itertools
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scaling import accounting, config, records
from scaling.config import Horizon, StartConfig
from scaling.execution import MeshConfig
from scaling.training import checkpoint, loop, optimizers, programs, sharding
from scaling.training.pack import Pack
from tests.training.lab import EXECUTION, cell, essence, train, train_and_stop_at

KEPT = dataclasses.replace(EXECUTION, keep_final_checkpoint=True)


def started(parent, steps=10, seed=3, **start):
    """A cell like ``parent``, of so many steps, that starts from it."""
    run = dataclasses.replace(
        parent.run, horizon=Horizon(steps=steps), seed=seed, start=StartConfig(parent.run.run_id, **start)
    )
    return dataclasses.replace(parent, run=run)


def family(data_config):
    """A parent of 24 steps, and four that start from it: at its end, twice, in its middle, and with its moments."""
    parent = cell(data_config, 24, schedule={"cooldown_fraction": 0.25})
    return parent, [
        started(parent),
        started(parent, steps=14, seed=4),
        started(parent, step=15),
        started(parent, step=15, take="params+optimizer"),
    ]


def leave(corpus, folder, execution=EXECUTION):
    """Trains the parent; the events that it gives."""
    parent, heirs = family(corpus[0])
    events = []
    train([parent], corpus, folder, execution, riders={parent.run.run_id: heirs}, on_event=events.append)
    return [e["run_id"] for e in events if e["event"] == "branched"]


@pytest.fixture(scope="module")
def found(corpus, tmp_path_factory):
    """The records of the family, by run_id, and the folder where the parent's last checkpoint is kept."""
    folder = tmp_path_factory.mktemp("starts")
    _, heirs = family(corpus[0])
    assert leave(corpus, folder, KEPT) == [h.run.run_id for h in (heirs[2], heirs[3], heirs[0], heirs[1])]
    shutil.copytree(folder / "work" / "checkpoints", folder / "left")
    for heir in heirs:
        train([heir], corpus, folder)
    return {r.run_id: r for r in records.load_records(folder / "results")}, folder


def saved(folder, run_id, step):
    """What Orbax itself reads of a checkpoint."""
    return ocp.StandardCheckpointer().restore(folder / run_id / str(step) / "state")


def states_of(run, corpus, num_steps, state=None):
    """The state of one run after so many steps, made by its compiled programs alone, without a loop; the losses."""
    mesh = sharding.make_mesh(EXECUTION.mesh)
    with jax.set_mesh(mesh):
        made = programs.for_pack(config.program_key(run), EXECUTION, 1, mesh)
        hparams = optimizers.hyperparams(run.optim, accounting.plan(run))
        fresh = made.init(np.array([run.seed], np.int32), {k: v[None] for k, v in hparams.items()})
        state = fresh if state is None else {**fresh, **state}
        member = loop.Member(cell(run.data), accounting.plan(run))
        member.cell = dataclasses.replace(member.cell, run=run)
        pack = Pack([member], loop.data.open(run.data, corpus[1]), EXECUTION, mesh)
        losses = []
        with pack.batches(num_steps) as batches:
            for _ in range(num_steps):
                state, metrics = made.train(state, pack.batch(batches))
                losses.append(float(metrics["loss"][0]))
    return jax.device_get(state), losses


@pytest.mark.slow
def test_what_is_left_is_the_parents_to_the_bit(corpus, found):
    """Its last weights, those of step 15 made again without a loop, and moments only where they are taken."""
    parent, (last, _, middle, moments) = family(corpus[0])
    left = found[1] / "left"
    final = saved(left, parent.run.run_id, 24)
    jax.tree.map(np.testing.assert_array_equal, saved(left, last.run.run_id, 0), {"params": final["params"]})
    made, _ = states_of(parent.run, corpus, 15)
    for heir, names in ((middle, {"params"}), (moments, {"params", "opt"})):
        mine = saved(left, heir.run.run_id, 0)
        assert set(mine) == names
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves({name: made[name] for name in names})):
            np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_it_trains_on_from_there_with_its_own_rate_data_and_step(corpus, found):
    """Against the same step program run by hand from the parent's weights, step 0 of its own schedule and seed."""
    parent, (_, _, middle, moments) = family(corpus[0])
    made, _ = states_of(parent.run, corpus, 15)
    for heir, names in ((middle, ("params",)), (moments, ("params", "opt"))):
        taken = jax.tree.map(jax.numpy.asarray, {name: made[name] for name in names})
        _, losses = states_of(heir.run, corpus, 10, taken)
        curve = found[0][heir.run.run_id].curve
        steps = [0, *curve["step"]]
        means = [np.mean(losses[a:b]) for a, b in itertools.pairwise(steps)]
        np.testing.assert_allclose(curve["train_loss"], means, rtol=1e-6)
    fresh, with_moments = (found[0][h.run.run_id] for h in (middle, moments))
    assert fresh.loss != with_moments.loss
    assert fresh.num_tokens == 10 * fresh.batch_tokens
    assert fresh.timing["branch_step"] == 0


@pytest.mark.slow
def test_cut_off_anywhere_they_are_the_same(corpus, found, tmp_path):
    """The parent stopped before, between and after it leaves its weights; an heir stopped on its way."""
    parent, heirs = family(corpus[0])
    for i, stop_at in enumerate((7, 16, 23)):
        folder = tmp_path / str(i)
        train_and_stop_at(stop_at, [parent], corpus, folder, riders={parent.run.run_id: heirs})
        assert set(leave(corpus, folder)) == {h.run.run_id for h in heirs}
        train_and_stop_at(4, [heirs[2]], corpus, folder)
        for heir in heirs:
            train([heir], corpus, folder)
        again = {r.run_id: essence(r) for r in records.load_records(folder / "results")}
        assert again == {run_id: essence(record) for run_id, record in found[0].items()}
        assert not list((folder / "work" / "checkpoints").iterdir())


@pytest.mark.slow
def test_who_comes_later_starts_from_what_was_kept(corpus, found, tmp_path):
    """The parent is done: its last checkpoint serves at its end; nothing serves in its middle."""
    parent, (last, _, middle, _) = family(corpus[0])
    shutil.copytree(found[1] / "results", tmp_path / "results")
    for heir in (last, middle):
        records.path_of(tmp_path / "results", heir.run.run_id).unlink()
    shutil.copytree(found[1] / "left" / parent.run.run_id, tmp_path / "work" / "checkpoints" / parent.run.run_id)
    (record,) = train([last], corpus, tmp_path)
    assert essence(record) == essence(found[0][last.run.run_id])
    assert checkpoint.newest_step(tmp_path / "work", parent.run.run_id) == 24
    with pytest.raises(ValueError, match=f"{middle.run.run_id} starts from {parent.run.run_id} at step 15, which has"):
        train([middle], corpus, tmp_path)


def test_what_starts_from_a_run_that_diverged_has_diverged_before_its_first_step(corpus, tmp_path):
    parent = cell(corpus[0], 24, peak_lr=1e6, clip_norm=None, warmup_tokens=0)
    heir = started(parent)
    events = []
    riders = {parent.run.run_id: [heir]}
    (record,) = train([parent], corpus, tmp_path, riders=riders, on_event=events.append)
    assert record.status == "diverged"
    assert {"event": "branched", "run_id": heir.run.run_id} in events
    (record,) = train([heir], corpus, tmp_path)
    assert (record.status, record.diverged_at_step, record.num_tokens, record.loss) == ("diverged", 0, 0, None)
    assert not list((tmp_path / "work" / "checkpoints").iterdir())


@pytest.mark.slow
def test_in_packs_and_on_another_mesh(corpus, found, tmp_path):
    """Four of them as one program of two members, two by two of the mesh's devices: the losses of lone ones."""
    _, heirs = family(corpus[0])
    leave(corpus, tmp_path)
    mesh = dataclasses.replace(EXECUTION, mesh=MeshConfig(run=2, data=2, fsdp=2))
    alike = [[heirs[0], heirs[1]], [heirs[2], heirs[3]]]
    for pack in alike:
        for record in train(pack, corpus, tmp_path, mesh):
            lone = found[0][record.run_id]
            assert record.loss == pytest.approx(lone.loss, rel=2e-5)
            np.testing.assert_allclose(record.curve["loss"], lone.curve["loss"], rtol=2e-5)
