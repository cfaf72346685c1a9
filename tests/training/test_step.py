"""Packs and meshes against the lone run on one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from scaling import accounting
from scaling.config import Horizon, OptimConfig, RunConfig, program_key
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.transformer import TransformerConfig
from scaling.training import optimizers, sharding, step
from scaling.training.programs import for_pack, lower
from tests.training.lab import QUICK, quick_jit

# One layer: test_meshes and the slow tests here have two, which take twice as long to compile.
MODEL = TransformerConfig(
    d_model=16, num_layers=1, num_heads=4, head_dim=4, num_kv_heads=2, d_ff=32, vocab_size=32, activation="swiglu"
)
RUN = RunConfig(MODEL, OptimConfig(0.01, 0), Horizon(steps=20), batch_size=8)
EXECUTION = ExecutionConfig()


def tokens(step_number, members=1, length=33):
    rng = np.random.default_rng(step_number)
    steps = rng.integers(0, 3, (1, 8, length))
    return np.repeat(np.cumsum(steps, axis=-1) % 32, members, axis=0).astype(np.int32)


def losses(runs, mesh_config=None, num_devices=1, steps=10, execution=EXECUTION):
    """Training losses (steps, K) of a pack of ``runs``, all on the same tokens."""
    mesh = sharding.make_mesh(mesh_config or MeshConfig(), jax.devices()[:num_devices])
    key = dataclasses.replace(program_key(runs[0]), data=dataclasses.replace(runs[0].data, seq_len=32))
    with jax.set_mesh(mesh):
        programs = lower(key, execution, len(runs), mesh)
        init, train = (p.compile(compiler_options=QUICK) for p in (programs.init, programs.train))
        hparams = [optimizers.hyperparams(r.optim, accounting.plan(r)) for r in runs]
        state = init(
            np.array([r.seed for r in runs], np.int32), {k: np.stack([h[k] for h in hparams]) for k in hparams[0]}
        )
        seen = []
        for i in range(steps):
            spec = P("run", ("data", "fsdp"))
            batch = sharding.host_array(mesh, spec, (len(runs), 8, 33), lambda at, i=i: tokens(i, len(runs))[at])
            state, metrics = train(state, {"tokens": batch})
            seen.append(np.asarray(metrics["loss"]))
    return np.array(seen), state


@pytest.fixture(scope="module")
def alone():
    return losses([RUN])[0]


MESHES = [MeshConfig(1, 2, 2, 2), pytest.param(MeshConfig(1, 1, 8, 1), marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_changes_rounding_only(mesh, alone):
    sharded, state = losses([RUN], mesh, num_devices=8)
    assert_allclose(sharded, alone, rtol=0, atol=1e-5)
    moments = state["opt"].mu["w_in"].sharding.spec
    assert moments == state["params"]["w_in"].sharding.spec == P("run", None, "fsdp", "tensor")


@pytest.mark.slow
def test_members_of_a_pack_are_their_lone_runs_on_any_mesh():
    two_layers = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, num_layers=2))
    other = dataclasses.replace(
        two_layers,
        seed=5,
        optim=dataclasses.replace(RUN.optim, peak_lr=0.003, weight_decay=0.0, beta2=0.9, z_loss=1e-3),
    )
    lone = np.concatenate([losses([r])[0] for r in (two_layers, other)], axis=1)
    for mesh, devices in ((MeshConfig(), 1), (MeshConfig(run=2, fsdp=4), 8)):
        pack, _ = losses([two_layers, other], mesh, num_devices=devices)
        assert_allclose(pack, lone, rtol=1e-5)


@pytest.mark.slow
def test_a_diverging_member_does_not_touch_the_others(alone):
    wild = dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, peak_lr=1e30, clip_norm=None))
    pack, _ = losses([RUN, wild])
    assert not np.isfinite(pack[-1, 1])
    assert_allclose(pack[:, :1], alone, rtol=1e-5)


DROPPING = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, dropout=0.3))


@pytest.mark.slow
def test_what_is_dropped_depends_on_seed_step_row_and_place_alone(alone):
    """Not on the parts of the batch, nor on a mesh; and it is other for another seed, under the same weights."""
    whole, state = losses([DROPPING], steps=4)
    assert state["hparams"]["seed"].dtype == np.int32
    assert np.abs(whole - alone[:4]).max() > 0.01
    assert_allclose(losses([DROPPING], execution=ExecutionConfig(accumulation_steps=4), steps=4)[0], whole, atol=1e-5)
    assert_allclose(losses([DROPPING], MeshConfig(data=2), num_devices=2, steps=4)[0], whole, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_each_seed_and_step_drops_other_values_and_evaluation_none():
    hp = optimizers.hyperparams(RUN.optim, accounting.plan(RUN))
    batch = {"tokens": tokens(0)[0], "weights": np.ones((8, 32), np.float32)}
    state = quick_jit(lambda seed: step.init_state(DROPPING, seed, hp))(np.int32(3))
    assert set(state["hparams"]) == {*hp, "seed"}
    assert int(state["hparams"]["seed"]) == 3
    plain = jax.eval_shape(lambda: step.init_state(RUN, 3, hp))
    assert set(plain["hparams"]) == set(hp)  # states without dropout, and checkpoints of them, are as they were

    @quick_jit
    def trained(seed, number):
        at = {**state, "step": number, "hparams": {**hp, "seed": seed}}
        return step.train_step(DROPPING, EXECUTION, at, batch)[1]["loss"]

    losses = [float(trained(np.int32(seed), np.int32(n))) for seed, n in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))]
    assert losses[0] == losses[4]
    assert len(set(losses)) == 4
    evaluated = [
        quick_jit(functools.partial(step.eval_step, r, EXECUTION))(state["params"], batch) for r in (DROPPING, RUN)
    ]
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, evaluated), strict=True))


def test_one_program_serves_every_horizon_and_rate():
    def with_rate(rate, steps):
        return dataclasses.replace(
            RUN, horizon=Horizon(steps=steps), seed=steps, optim=dataclasses.replace(RUN.optim, peak_lr=rate)
        )

    assert program_key(with_rate(0.1, 5)) == program_key(with_rate(0.2, 500))
    assert program_key(RUN) != program_key(dataclasses.replace(RUN, batch_size=16))
    muon = dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, name="muon"))
    assert program_key(RUN) != program_key(muon)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"batch_size": 6}, r"batch_size is 6.*data × fsdp = 4.*write 4 or 8"),
        ({"model": {"d_model": 17}}, r"model.d_model is 17.*fsdp = 2.*write 16 or 18"),
        ({"model": {"num_heads": 3, "num_kv_heads": 3}}, r"model.num_heads is 3.*tensor = 2.*write 2 or 4"),
        ({"model": {"num_kv_heads": 1}}, r"model.num_kv_heads is 1.*tensor = 2.*write 2,"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_the_sizes(change, message):
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
    model = dataclasses.replace(MODEL, **change.get("model", {}))
    with pytest.raises(ValueError, match=message):
        sharding.check_divides(model, change.get("batch_size", 8), 1, mesh)


def test_where_a_run_is_kept_does_not_compile_it_again():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    kept = ExecutionConfig(disk_budget_gb=1, checkpoint_seconds=9, keep_final_checkpoint=True, trunks=False)
    with jax.set_mesh(mesh):
        one, same, other = (
            for_pack(program_key(RUN), e, 1, mesh)
            for e in (ExecutionConfig(), kept, ExecutionConfig(eval_batch_size=4))
        )
    assert one is same
    assert one is not other


def test_parts_of_a_batch_must_divide_too():
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"batch_size is 8.*times accumulation_steps, = 16.*write 16"):
        sharding.check_divides(MODEL, 8, 1, mesh, accumulation_steps=4)


def test_offload_is_refused_where_there_is_no_other_memory():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"remat is 'offload'.*write full, dots or none"):
        for_pack(program_key(RUN), ExecutionConfig(remat="offload"), 1, mesh)


def test_a_mesh_of_other_than_all_devices_is_refused():
    with pytest.raises(ValueError, match="run 1 × data 3 × fsdp 2 × tensor 1 but there are 8 devices"):
        sharding.make_mesh(MeshConfig(1, 3, 2, 1))
    assert dict(sharding.make_mesh(MeshConfig(run=2, fsdp=2)).shape) == {"run": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert sharding.make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2)).shape["fsdp"] == 4


def test_axes_that_collide_are_refused():
    with pytest.raises(ValueError, match="claim a mesh axis twice"):
        sharding.partition_spec(("embed", "batch"))
    with pytest.raises(ValueError, match="no rule"):
        sharding.partition_spec(("embd",))
