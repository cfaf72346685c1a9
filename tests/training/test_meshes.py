"""One model on six meshes, whole and in parts, kept and recomputed: the same losses over 20 steps."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from scaling import accounting
from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig, program_key
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.transformer import TransformerConfig
from scaling.training import optimizers, sharding
from scaling.training.programs import lower
from tests.training.lab import QUICK

STEPS = 20
MODEL = TransformerConfig(
    d_model=32, num_layers=2, num_heads=8, head_dim=4, num_kv_heads=8, d_ff=64, vocab_size=64, activation="swiglu"
)
RUN = RunConfig(MODEL, OptimConfig(0.01, 0), Horizon(steps=STEPS), batch_size=16, data=DataConfig(seq_len=32))
MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, tensor=8),
    MeshConfig(data=2, fsdp=4),
    MeshConfig(data=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
]
# Whole, and each departure from it on each mesh: parts, either recomputation, chunks. Parts and recomputation stand
# together, as a fault of one would be seen beside the other, and each program takes seconds to compile.
WAYS = {
    "whole": ExecutionConfig(),
    "2 parts, full": ExecutionConfig(accumulation_steps=2, remat="full"),
    "2 parts, dots, chunks": ExecutionConfig(accumulation_steps=2, remat="dots", loss_chunk_tokens=64),
}


@functools.cache
def initial(mesh):
    """The program that initialises RUN on a mesh, the same in whatever way it is then trained and computed."""
    with jax.set_mesh(mesh):
        return lower(program_key(RUN), ExecutionConfig(), 1, mesh).init.compile(compiler_options=QUICK)


def losses(run, execution, devices):
    mesh = sharding.make_mesh(execution.mesh, devices)
    tokens = np.random.default_rng(0).integers(0, 3, (STEPS, 1, 16, 33)).cumsum(-1).astype(np.int32) % 64
    with jax.set_mesh(mesh):
        train = lower(program_key(run), execution, 1, mesh).train.compile(compiler_options=QUICK)
        hparams = {k: v[None] for k, v in optimizers.hyperparams(run.optim, accounting.plan(run)).items()}
        state = initial(mesh)(np.zeros(1, np.int32), hparams)
        seen = []
        for batch in tokens:
            spec = P("run", ("data", "fsdp"))
            x = sharding.host_array(mesh, spec, batch.shape, lambda at, batch=batch: batch[at])
            state, metrics = train(state, {"tokens": x})
            seen.append(float(metrics["loss"][0]))
    return np.array(seen)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(capsys):
    table = []
    for dtype in ("float32", "bfloat16"):
        run = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, dtype=dtype))
        one = losses(run, ExecutionConfig(), jax.devices()[:1])
        assert one[-1] < one[0] - 0.5  # it learns
        for way, execution in WAYS.items():
            for mesh in MESHES if way == "whole" or dtype == "float32" else MESHES[-1:]:
                many = losses(run, dataclasses.replace(execution, mesh=mesh), jax.devices())
                table.append((dtype, way, mesh, np.abs(many - one).max()))
    with capsys.disabled():
        print(f"\nlargest difference of the loss from one device's over {STEPS} steps, nats")
        for dtype, way, mesh, difference in table:
            sizes = f"data {'8' if mesh.data == -1 else mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}"
            print(f"  {dtype:9} {way:22} {sizes:26} {difference:.1e}")
    assert max(d for dtype, *_, d in table if dtype == "float32") < 1e-5
    # Products of other shapes are rounded elsewhere, by 2^-9 each.
    assert max(d for dtype, *_, d in table if dtype == "bfloat16") < 0.02


@pytest.mark.slow
def test_no_device_ever_holds_the_whole_model():
    """Initialised where it belongs: what a device needs for that is a few times its own eighth of the weights."""
    model = dataclasses.replace(MODEL, d_model=256, d_ff=1024, num_layers=4, num_heads=8, head_dim=32, vocab_size=4096)
    run = dataclasses.replace(RUN, model=model)
    whole = 4 * accounting.param_counts(model)["total"]
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8), jax.devices())
    with jax.set_mesh(mesh):
        init = lower(program_key(run), ExecutionConfig(), 1, mesh).init.compile(compiler_options=QUICK)
    memory = init.memory_analysis()
    # Weights and two moments, an eighth each; the norms are on every device.
    assert memory.output_size_in_bytes < 3 * whole / 8 * 1.02
    assert memory.temp_size_in_bytes < whole / 2
