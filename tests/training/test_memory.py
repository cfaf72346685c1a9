"""Bytes the compiler promises against the state counted by hand, and against what a process then really grows by."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from scaling import accounting, grid
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.training import memory

ROOT = Path(__file__).resolve().parents[2]


def run_of(width=8, seq_len=32, batch_size=4):
    base = {"model": {"width": width}, "data": {"seq_len": seq_len}, "batch_size": batch_size, "horizon": {"steps": 9}}
    return grid.expand({"base": base}, name="x").cells[0].run


@pytest.mark.slow
def test_what_goes_in_is_the_state_and_the_batch():
    run = run_of(batch_size=2 * jax.device_count())
    needs = memory.of_run(run, ExecutionConfig())  # of one device, all of which hold the state
    batch = 4 * 2 * (run.data.seq_len + 1)
    exact = accounting.plan(run).state_bytes + batch
    assert exact < needs["argument_bytes"] < exact + 200  # the step counters and hyperparameters: a few numbers
    assert needs["alias_bytes"] == pytest.approx(accounting.plan(run).state_bytes, abs=200)  # donated
    parts = sum(needs[f"{name}_bytes"] for name in ("argument", "output", "temp", "generated_code"))
    assert needs["total_bytes"] == parts - needs["alias_bytes"]


def test_the_process_knows_its_peak():
    peak = memory.peak()
    assert peak["device_peak_bytes"] is None  # the CPU keeps no count
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert memory.peak()["process_peak_bytes"] >= peak["process_peak_bytes"]
    assert memory.peak()["process_peak_bytes"] > 300_000_000


MEASURE = """
import gc, sys
import jax, numpy as np
sys.path.insert(0, sys.argv[1])
from test_memory import run_of
from scaling import accounting
from scaling.config import program_key
from scaling.execution import ExecutionConfig
from scaling.training import memory, optimizers, programs, sharding

def resident(field):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

K, width, batch_size, parts = map(int, sys.argv[2:])
run, execution = run_of(width, 256, batch_size), ExecutionConfig(accumulation_steps=parts or None)
mesh = sharding.make_mesh(execution.mesh)
with jax.set_mesh(mesh):
    compiled = programs.for_pack(program_key(run), execution, K, mesh)
    compiled.init, compiled.train, compiled.evaluate  # each compiles when first asked for
    gc.collect()
    before = resident("VmRSS")
    one = optimizers.hyperparams(run.optim, accounting.plan(run))
    state = compiled.init(np.arange(K, dtype=np.int32), {name: np.stack([value] * K) for name, value in one.items()})
    spec = jax.sharding.PartitionSpec("run", ("data", "fsdp"))
    tokens = np.zeros((K, run.batch_size, run.data.seq_len + 1), np.int32)
    tokens = jax.device_put(tokens, jax.sharding.NamedSharding(mesh, spec))
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts anew
    for _ in range(3):
        state, metrics = compiled.train(state, {"tokens": tokens})
        jax.block_until_ready(metrics)
    print(memory.of_programs(compiled)["total_bytes"], resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(
    "num_members, width, batch_size, parts",
    [(1, 96, 32, 1), (2, 96, 16, 1), (2, 256, 32, 0)],
    ids=["one", "two", "two, in the parts that a CPU takes"],
)
def test_the_promise_is_within_a_tenth_of_what_is_used(num_members, width, batch_size, parts):
    """Of 500 MB and more: a process grows by 20 to 40 MB that are no program's, whatever the program needs."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    numbers = map(str, (num_members, width, batch_size, parts))
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parent), *numbers]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    promised, used = map(int, done.stdout.split())
    assert promised == pytest.approx(used, rel=0.1)


@pytest.mark.parametrize("run_axis, most", [(1, 64), (1, 5), (2, 63), (4, 64), (1, 1)])
@pytest.mark.parametrize("step_at", [100, 7])
def test_the_largest_pack_is_the_one_brute_force_finds(monkeypatch, run_axis, most, step_at):
    """A program whose need grows by a line, with a jump in it that the line through the first two does not foresee."""
    limit = 20_000

    def total(members):
        return 500 + 600 * members // run_axis + (3000 if members >= step_at * run_axis else 0)

    compiled = []

    def of_run(run, execution, num_members):
        compiled.append(num_members)
        assert num_members % run_axis == 0
        return {"total_bytes": total(num_members)}

    device = type("Device", (), {"memory_stats": lambda self: {"bytes_limit": limit}})()
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(memory, "of_run", of_run)
    members, needs = memory.largest_pack(run_of(), ExecutionConfig(mesh=MeshConfig(run=run_axis)), most)
    sizes = range(run_axis, max(most, run_axis) + 1, run_axis)
    best = max(k for k in sizes if total(k) <= memory.PACK_SHARE * limit)
    assert needs == total(members) <= memory.PACK_SHARE * limit
    assert 0.8 * best <= members <= best
    assert len(compiled) <= 8


def test_where_a_device_does_not_say_what_it_has_a_pack_is_one_run():
    assert memory.largest_pack(run_of(), ExecutionConfig(), 64) == (1, None)
