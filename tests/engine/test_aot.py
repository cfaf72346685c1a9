"""What is read from a compiled program, against programs whose collectives are known; the compiler's process."""

import dataclasses
import importlib.util
import io

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.console import Console

from scaling import grid
from scaling.engine.plan import table
from scaling.engine.slices import aot, meshes
from scaling.execution import MeshConfig

TINY = {
    "recipe": "none",
    "base": {
        "model": {"d_model": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "d_ff": 256},
        "data": {"seq_len": 128},
        "optim": {"peak_lr": 1e-3, "warmup_tokens": 0},
        "batch_size": 8,
        "horizon": {"steps": 10},
    },
    "execution": {"mesh": {"data": 1, "fsdp": -1}, "remat": "full"},
}


def seven_b():
    return grid.load("sweeps/pretrain_7b.yaml")


def test_collectives_of_a_program_by_construction():
    """On 8 devices: five times round a loop, an all-reduce of 64 floats; before it, a gather of 8 × 16 floats."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def program(a, b):
        gathered = jax.lax.all_gather(b, "x")

        def once(carry, _):
            return jnp.sin(jax.lax.psum(carry, "x")), None

        return jax.lax.scan(once, a, None, length=5)[0], gathered.sum(0)

    sharded = jax.shard_map(program, mesh=mesh, in_specs=(P(), P("x")), out_specs=(P(), P()), check_vma=False)
    args = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((8 * 16,), jnp.float32)
    found = aot.collectives(jax.jit(sharded).lower(*args).compile().as_text(), 8)
    assert found["all-reduce"] == {"count": 5, "sent_bytes": 5 * 2 * 7 / 8 * 64 * 4}
    assert found["all-gather"] == {"count": 1, "sent_bytes": 7 / 8 * 8 * 16 * 4}


def test_tpu_text():
    """Phases of one gather count once; an all-reduce whose parts are dealt out is a reduce-scatter; a kernel's metadata
    that spans lines does not end its computation."""
    text = """HloModule m

%phase.1 (p: bf16[1,8]) -> bf16[4,8] {
  %g.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}
}

%phase.2 (p: bf16[1,8]) -> bf16[4,8] {
  %g.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[1] {
  %r = f32[8]{0:T(128)} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%condition.1 (s: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
}

%body.1 (s: (s32[])) -> (s32[]) {
  %k = f32[4]{0} custom-call(%s), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="x"}
  %f.1 = bf16[4,8]{1,0} fusion(%s), kind=kOutput, calls=%phase.1
  %f.2 = bf16[4,8]{1,0} fusion(%s), kind=kOutput, calls=%phase.2
}

ENTRY %main (a: f32[8]) -> f32[1] {
  %w = (s32[]) while(%a), condition=%condition.1, body=%body.1
  ROOT %f.3 = f32[1]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert aot.collectives(text, 8) == {
        "all-gather": {"count": 32, "sent_bytes": 32 * 3 / 4 * 4 * 8 * 2},
        "reduce-scatter": {"count": 1, "sent_bytes": 7 / 8 * 32},
    }


def test_devices_of_a_collective_are_read_in_every_way_that_they_are_written():
    """Lines of a real program for h100:8x8 (JAX 0.10.2), data 16, fsdp 4; what cannot be read is said to be so."""
    line = "  %r = ((bf16[8,64]{1,0}), bf16[8,16]{1,0}) reduce-scatter-start(%x), channel_id=1, replica_groups=GROUPS, "
    ways = {
        "{{0,1,2,3},{4,5,6,7}}": 4,
        "[16,4]<=[64]": 4,
        "[4,16]<=[16,4]T(1,0)": 16,
        "mesh['axis_0'=1,'axis_1'=4,'axis_2'=16], device_ids=([16,4]T(1,0)) {'axis_1'}": 4,
        "mesh['axis_0'=4,'axis_1'=16] {'axis_0','axis_1'}": 64,
        "mesh['axis_0'=4,'axis_1'=16] {'axis_1':(1)8}": 8,
        "{}": 64,
    }
    for written, group in ways.items():
        text = "ENTRY %main (x: bf16[8,64]) -> bf16[8,16] {\n" + line.replace("GROUPS", written) + "dimensions={1}\n}\n"
        sent = (group - 1) * 8 * 16 * 2
        assert aot.collectives(text, 64) == {"reduce-scatter": {"count": 1, "sent_bytes": sent}}, written
    text = "ENTRY %main (x: bf16[8,64]) -> bf16[8,16] {\n" + line.replace("GROUPS", "<new>") + "dimensions={1}\n}\n"
    assert aot.collectives(text, 64)["reduce-scatter"]["unread"] == 1


def test_tpu_text_of_a_product_that_gathers_as_it_goes():
    """Its loop is unrolled and its counter goes by twos to 4; a permute's result is (operand, result, two words). The
    shape is that of a real program (libtpu 0.0.42, v5p:2x2x2), where all of this adds up to the byte: 16 layers, each
    1 + 2 · 4 permutes for each of 23 such products."""
    text = """HloModule m

%condition.1 (s: (bf16[8,128], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4), metadata={op_name="x"}
  %s = (bf16[8,128]{1,0}, u32[]{:T(128)}) parameter(0)
  %at.1 = u32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %less = pred[]{:T(512)} compare(%at.1, %limit), direction=LT, metadata={op_name="x"}
}

%body.1 (s: (bf16[8,128], u32[])) -> (bf16[8,128], u32[]) {
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2)
  %s.1 = (bf16[8,128]{1,0}, u32[]{:T(128)}) parameter(0)
  %at.2 = u32[]{:T(128)} get-tuple-element(%s.1), index=1
  %w = bf16[8,128]{1,0} get-tuple-element(%s.1), index=0
  %p.1 = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), channel_id=3
  %d.1 = bf16[8,128]{1,0} collective-permute-done(%p.1)
  %p.2 = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d.1), channel_id=4
  %d.2 = bf16[8,128]{1,0} collective-permute-done(%p.2)
  %next = u32[]{:T(128)} add(%at.2, %two)
  ROOT %t = (bf16[8,128]{1,0}, /*index=1*/u32[]{:T(128)}) tuple(%d.2, /*index=1*/%next)
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %l = (bf16[8,128]{1,0}, u32[]{:T(128)}) while(%a), condition=%condition.1, body=%body.1
  ROOT %r = bf16[8,128]{1,0} get-tuple-element(%l), index=0
}
"""
    assert aot.collectives(text, 8) == {"collective-permute": {"count": 4, "sent_bytes": 4 * 8 * 128 * 2}}


def test_the_model_of_a_step_on_sharded_weights():
    run, chip = seven_b().cells[0].run, meshes.Chip(1e14, 1e11, 16e9)
    mesh = MeshConfig(data=1, fsdp=64, tensor=1)
    quick, slow = meshes.Chip(1e20, 1e11, 16e9), meshes.Chip(1e14, 1e20, 16e9)
    weights = 3 * 2 * 7_241_732_096 * 63 / 64 / 1e11  # two gathers and a reduction in bfloat16
    assert meshes.step_seconds(run, mesh, "none", quick) == pytest.approx(weights, rel=1e-6)
    # 6 N_total without the embedding's 131M and the norms, plus attention: within a hundredth of 6 N D.
    products = 6 * 7.11e9 * 256 * 2048 / (64 * 1e14 * meshes.PRODUCT_EFFICIENCY)
    none, full = (meshes.step_seconds(run, mesh, remat, slow) for remat in ("none", "full"))
    assert none == pytest.approx(products, rel=0.05)
    assert full / none == pytest.approx(4 / 3, rel=0.01)
    assert meshes.step_seconds(run, mesh, "none", chip) == max(none, weights)
    # Over tensor the activations come on top: 4 all-reduces of (16 rows × 2048 × 4096) in 32 layers.
    tensor = meshes.step_seconds(run, MeshConfig(data=1, fsdp=16, tensor=4), "none", meshes.Chip(1e20, 1e11, 16e9))
    weights = 3 * 2 * 7_241_732_096 / 4 * 15 / 16 / 1e11
    assert tensor - weights == pytest.approx(4 * 32 * 2 * 3 / 4 * 16 * 2048 * 4096 * 2 / 1e11, rel=1e-6)


def test_candidates_divide_and_come_fastest_first():
    g = seven_b()
    run, chip = g.cells[0].run, meshes.Chip.of("v5e:8x8", "bfloat16")
    found = meshes.candidates(run, g.execution, 64, chip)
    assert found
    for e in found:
        m = e.mesh
        assert m.data * m.fsdp * m.tensor == 64
        assert run.model.num_kv_heads % m.tensor == run.batch_size % (m.data * m.fsdp) == 0
        assert meshes.least_bytes(run, m, e.remat) < chip.memory_bytes
    seconds = [meshes.step_seconds(run, e.mesh, e.remat, chip) for e in found]
    assert seconds == sorted(seconds)
    assert {e.remat for e in found} == {"full"}  # 7B at 4 rows a chip leaves 16 GB no room for anything else


def test_cells_that_compile_alike_are_compiled_once():
    raw = {**TINY, "axes": {"optim.peak_lr": [1e-3, 2e-3], "horizon.steps": [10, 20], "data.seq_len": [128, 256]}}
    raw["base"] = {k: v for k, v in raw["base"].items() if k != "horizon"}
    raw["base"]["optim"] = {"warmup_tokens": 0}
    rows = table.rows(grid.expand(raw, name="x").cells)
    assert len(rows) == 8
    assert [r.cell.run.data.seq_len for r in meshes.distinct(rows)] == [128, 256]


def test_refusals_come_back_in_one_line():
    run = grid.expand(TINY, name="x").cells[0].run
    execution = grid.expand({**TINY, "execution": {"mesh": {"tensor": 8}}}, name="x").execution
    verdict = aot.compile_step(run, execution, jax.devices())
    assert not verdict.fits
    assert "num_heads is 2, which the mesh's tensor = 8 does not divide" in verdict.reason
    out_of_memory = RuntimeError(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 28.51G of 15.75G hbm. Exceeded hbm capacity by 12.76G.\n\nTotal hbm usage"
    )
    assert aot._why(out_of_memory) == "out of memory: 28.51G wanted of 15.75G a device"
    out_of_memory = RuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.56G) exceeds "
        "available HBM (15.75G).\n"
    )
    assert aot._why(out_of_memory) == "out of memory: 20.56G of temporaries, 15.75G a device"


@pytest.mark.slow
def test_this_machines_devices_in_a_process_of_its_own(monkeypatch):
    g = grid.expand(TINY, name="x")
    with aot.Compiler(aot.HERE) as compiler:
        verdict = compiler.ask(g.cells[0].run, g.execution)
        assert verdict.fits
        assert verdict.num_devices == jax.device_count()
        state = meshes.accounting.plan(g.cells[0].run).state_bytes
        # Norms are on every device; all else is a part each.
        assert state / jax.device_count() < verdict.bytes["argument"] < 1.1 * state / jax.device_count() + 16_000
        assert verdict.collectives["all-gather"]["count"] > 0
        compiler._process.kill()
        assert "the compiler ended (-9)" in compiler.ask(g.cells[0].run, g.execution).reason


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
def test_a_tpu_slice_that_is_not_here():
    g = grid.expand(TINY, name="x")
    run = dataclasses.replace(g.cells[0].run, model=dataclasses.replace(g.cells[0].run.model, dtype="bfloat16"))
    with aot.Compiler("v5e:2x2") as compiler:
        verdict = compiler.ask(run, g.execution)
    assert verdict.fits, verdict.reason
    assert verdict.device_kind == "TPU v5 lite"
    assert verdict.mesh == {"run": 1, "data": 1, "fsdp": 4, "tensor": 1}
    with aot.Compiler("v5e:7x3") as compiler:
        assert "topology 'v5e:7x3'" in compiler.ask(run, g.execution).reason


TEN_MILLION = {
    "recipe": "none",
    "base": {
        "model": {
            "d_model": 256, "num_layers": 8, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "d_ff": 1024,
            "vocab_size": 8192, "activation": "swiglu", "dtype": "bfloat16",
        },
        "data": {"source": "tfds:c4/en", "tokenizer": "bpe:8192", "seq_len": 1024},
        "optim": {"peak_lr": 1e-3, "warmup_tokens": 0},
        "batch_size": 512,
        "horizon": {"steps": 100},
    },
    "execution": {"mesh": {"data": 1, "fsdp": -1}, "remat": "full"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
def test_suggest_with_the_compiler_itself():
    """Without recomputation nothing fits, and that is seen at the first mesh; the next best does."""
    g, chip = grid.expand(TEN_MILLION, name="x"), meshes.Chip.of("v5e:2x2", "bfloat16")
    console = Console(file=io.StringIO(), width=250)
    rows = table.rows(g.cells)
    assert meshes.show(console, rows, g.execution, "v5e:2x2", suggest=True)
    lines = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    asked, suggested = ([field.strip() for field in line] for line in lines)
    assert (asked[2], asked[3], asked[4]) == ("1,1,4,1", "full", "yes")
    assert suggested[0] == f"{g.cells[0].run.run_id} *"
    assert suggested[4] == "yes"
    assert float(suggested[7]) * 2**30 < chip.memory_bytes
    tried = [line for line in console.file.getvalue().splitlines() if line.startswith("  trying")]
    assert tried == [f"  trying data 4, fsdp 1, tensor 1, remat {remat} …" for remat in ("none", "dots")]
    assert console.file.getvalue().count("out of memory") == 1


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--topology v5e:2x2: libtpu .* is not installed: pip install '.\[tpu\]'"):
        aot.Compiler("v5e:2x2")


def test_suggest_takes_the_fastest_that_the_compiler_takes():
    g = seven_b()
    run, chip = g.cells[0].run, meshes.Chip.of("v5p:4x4x4", "bfloat16")
    asked = []

    class Compiler:
        def ask(self, run, execution):
            asked.append(execution)
            return aot.Verdict(None if len(asked) == 5 else "out of memory: 99G wanted of 95G a device", 64)

    console = Console(file=io.StringIO(), width=200)
    first = aot.Verdict("out of memory", 64)
    chosen, verdict = meshes._best(console, Compiler(), run, g.execution, first, chip, "v5p:4x4x4")
    assert verdict.fits
    assert chosen == asked[4]
    found = meshes.candidates(run, g.execution, 64, chip)
    seen = found[: found.index(chosen) + 1]
    assert [e for e in seen if e in asked] == asked
    assert asked[0] == found[0]
    need = {i: meshes.least_bytes(run, e.mesh, e.remat) for i, e in enumerate(seen)}
    tried = [i for i, e in enumerate(seen) if e in asked]
    for i, e in enumerate(seen):  # left out: what needs about as much as one that was refused, and only that
        refused = [need[j] for j in tried if j < i and seen[j].remat == e.remat]
        assert (i not in tried) == any(need[i] > 0.9 * bytes_ for bytes_ in refused)
    assert len(seen) > len(asked)
    assert console.file.getvalue().count("out of memory: 99G wanted of 95G a device") == 4
    with pytest.raises(ValueError, match="the figures of v4:2x2x1's chip are not known"):
        meshes._best(console, Compiler(), run, g.execution, first, meshes.Chip.of("v4:2x2x1", "bfloat16"), "v4:2x2x1")


def test_a_product_without_tiles_is_compiled_by_the_other_library():
    """What XLA says, deviceless, of a product of 1,844 rows by Triton; any other failure is the caller's to tell."""
    asked = []

    class Lowered:
        def __init__(self, says):
            self.says = says

        def compile(self, compiler_options=None):
            asked.append(compiler_options)
            if compiler_options is None:
                raise RuntimeError(self.says)
            return "compiled"

    found = aot._compiled(Lowered("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.235"))
    assert found == "compiled"
    assert asked == [None, {"xla_gpu_enable_triton_gemm": False}]
    with pytest.raises(RuntimeError, match="out of registers"):
        aot._compiled(Lowered("INTERNAL: out of registers"))
