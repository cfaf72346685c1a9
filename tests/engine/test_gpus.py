"""GPUs that are not here: names, memory, bandwidths by hand, kernels in lines of real programs, one compilation."""

import dataclasses
import importlib.util
import re
import types

import pytest

from scaling import devices, grid
from scaling.engine.slices import aot, gpus, kernels, meshes
from scaling.execution import MeshConfig

SMALL = {
    "recipe": "none",
    "base": {
        "model": {
            "d_model": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "d_ff": 1024,
            "vocab_size": 512, "dtype": "bfloat16",
        },
        "data": {"source": "synthetic:markov", "seq_len": 512},
        "optim": {"peak_lr": 1e-3, "warmup_tokens": 0},
        "batch_size": 32,
        "horizon": {"steps": 10},
    },
    "execution": {"mesh": {"data": 1, "fsdp": -1}},
}  # fmt: skip


@pytest.mark.parametrize("name, hosts, per_host", [("h100:8", 1, 8), ("h200:2x8", 2, 8), ("b200:1x4", 1, 4)])
def test_names_of_hosts(name, hosts, per_host):
    found = gpus.parse(name)
    assert (found.hosts, found.per_host) == (hosts, per_host)
    assert found.description.title.lower().startswith(f"nvidia {found.name}")


@pytest.mark.parametrize(
    "name, message",
    [
        ("h100:16", "a host has 8 h100 at most: write h100:2x8"),
        ("h200:3x12", "a host has 8 h200 at most: write h200:5x8"),
        ("h100", "write h100:8, or hosts × devices as h100:2x8"),
        ("h100:0x8", "write h100:8, or hosts × devices as h100:2x8"),
        ("b200:2x2x2", "write b200:8, or hosts × devices as b200:2x8"),
        ("a100:8", "write a TPU slice, as v5e:8x8, or GPUs of h100, h200, b200, as h100:8"),
    ],
)
def test_names_of_none_are_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        aot.Compiler(name)
    assert "\n" not in str(refusal.value)


def test_without_the_wheels_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"jax-cuda13-plugin .* is not installed: .*pip install '\.\[gpu-plan\]'"):
        aot.Compiler("h100:8")
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpus, "_has_assembler", lambda: False)
    with pytest.raises(ValueError, match=r"ptxas is not here .*pip install '\.\[gpu-plan\]'"):
        aot.Compiler("h100:8")


def test_what_jax_will_own(monkeypatch):
    for setting in gpus.FRACTION_SETTINGS:
        monkeypatch.delenv(setting, raising=False)

    def no_stats():
        raise RuntimeError("MemoryStats is only supported for addressable PjRt devices.")

    absent = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=no_stats)
    limit, setting = gpus.limit_of(absent)
    assert limit == 0.75 * 84_942_979_072
    assert "XLA_CLIENT_MEM_FRACTION" in setting
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert gpus.limit_of(absent) == (int(0.9 * 84_942_979_072), "XLA_PYTHON_CLIENT_MEM_FRACTION=.9")
    here = types.SimpleNamespace(platform="gpu", device_kind="any", memory_stats=lambda: {"bytes_limit": 7})
    assert gpus.limit_of(here)[0] == 7
    assert gpus.limit_of(types.SimpleNamespace(platform="tpu")) is None
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "90")
    with pytest.raises(ValueError, match=r"XLA_CLIENT_MEM_FRACTION is '90': write a share .* as \.9"):
        gpus.memory_fraction()


def test_a_program_larger_than_that_is_refused():
    assert aot._too_large(63 << 30, 63 << 30, "") is None
    assert aot._too_large(1 << 50, None, "") is None
    refused = aot._too_large(263 << 30, 60 << 30, "JAX's default")
    assert refused == "out of memory: 263.00G wanted of 60.00G that JAX owns of a device (JAX's default)"


def test_how_large_a_pack_the_memory_holds():
    """A pack of 16 of 5M parameters peaked at 15.9 times one (results/README.md): of its 1,102 MiB 60 GiB hold 55."""
    verdict = aot.Verdict(bytes={"peak": 1102 << 20}, limit_bytes=60 << 30)
    assert verdict.most_members == 55
    assert dataclasses.replace(verdict, reason="out of memory").most_members is None
    assert dataclasses.replace(verdict, limit_bytes=None).most_members is None


def test_bandwidths_of_a_ring():
    """In a host NVLink; between hosts as many adapters of 50 GB/s as the ring has devices in each, NVLink at most."""
    h100, b200 = (meshes.Chip.of(f"{name}:8x8", "bfloat16") for name in ("h100", "b200"))
    assert h100.memory_bytes == gpus.owned_bytes("h100")
    assert (h100.bandwidth(8, 1), b200.bandwidth(2, 4)) == (450e9, 900e9)
    assert (h100.bandwidth(64, 1), h100.bandwidth(32, 2), h100.bandwidth(8, 8)) == (400e9, 200e9, 50e9)
    assert meshes.Chip.of("h100:8x4", "bfloat16").bandwidth(8, 4) == 50e9
    slice_chip = meshes.Chip.of("v5e:16x16", "bfloat16")
    assert slice_chip.bandwidth(256, 1) == slice_chip.bandwidth(2, 128) == 200e9


def test_tensor_over_hosts_is_not_suggested_before_sharded_weights():
    """A step's activations over tensor 8 are many times the weights over fsdp 8, of a model of .3B at 131K tokens."""
    g = grid.expand({**SMALL, "base": {**SMALL["base"], "batch_size": 64}}, name="x")
    model = dataclasses.replace(
        g.cells[0].run.model, d_model=1024, num_layers=24, num_heads=16, num_kv_heads=16, d_ff=4096
    )
    run = dataclasses.replace(g.cells[0].run, model=model)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, seq_len=2048))
    infinite = meshes.Chip.of("h100:8", "bfloat16")
    fast = dataclasses.replace(infinite, peak_flops=1e30)
    fsdp, tensor = (
        meshes.step_seconds(run, MeshConfig(data=1, fsdp=f, tensor=t), "full", fast) * 450e9
        for f, t in ((8, 1), (1, 8))
    )
    assert fsdp == pytest.approx(3 * 2 * 303e6 * 7 / 8, rel=0.02)
    assert tensor == pytest.approx(6 * 24 * 2 * 7 / 8 * 64 * 2048 * 1024 * 2, rel=1e-6)
    assert meshes.candidates(run, g.execution, 8, infinite)[0].mesh.tensor == 1


def test_interconnects_have_sources():
    for profile in devices.PROFILES.values():
        for name in ("interconnect", "network"):
            assert (getattr(profile, name) is None) == (name not in profile.sources), (profile.name, name)
    assert devices.PROFILES["b200"].interconnect == 14.4e12 / 8 / 2


FUSED = (
    "  %f.0 = (bf16[4,4,512,64]{3,1,2,0}, f32[4,4,512]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %v), "
    'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"algorithm": '
    '{"is_cudnn_frontend": true, "workspace_size": "%"}}}'
)
GEMMS = """
  %a = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%c, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %b = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%c, backend_config={"fusion_backend_config":{"kind":"__custom_fusion"}}
  %d = (bf16[8,8]{1,0}, s8[4]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", backend_config={}
"""  # noqa: E501


def test_kernels_in_the_text():
    assert kernels.of(GEMMS) == {"triton products": 1, "cublas products": 1}
    built, chosen = (kernels.of(GEMMS + FUSED.replace("%", size)) for size in ("1024", "0"))
    assert built["cudnn attention, forward"] == chosen["cudnn attention, forward"] == 1
    assert "not built" in kernels.said(chosen)
    assert "not built" not in kernels.said(built)
    assert kernels.said(kernels.of(GEMMS)) == (
        "products 1 by Triton, 1 by cuBLAS, chosen without timing them; attention without a fused kernel"
    )
    assert kernels.said({}) == ""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is not installed "
                    "(extra gpu-plan)")  # fmt: skip
def test_hosts_of_gpus_that_are_not_here(monkeypatch):
    """What fsdp sends is known: bfloat16 weights gathered twice, once for the tables, and gradients reduced."""
    g = grid.expand(SMALL, name="x")
    with aot.Compiler("h100:8") as compiler:
        verdict = compiler.ask(g.cells[0].run, g.execution)
    assert verdict.fits, verdict.reason
    assert verdict.device_kind == "NVIDIA H100 80GB HBM3"
    assert verdict.limit_bytes == gpus.owned_bytes("h100")
    assert verdict.kernels["cudnn attention, forward"] == verdict.kernels["cudnn attention, backward"] == 1
    assert verdict.checked_with.startswith("JAX ")
    layers, table = 4 * 12 * 256**2, 512 * 256  # the unembedding too is gathered twice
    assert verdict.collectives["all-gather"]["sent_bytes"] == 7 / 8 * 2 * (2 * layers + 3 * table)
    heads_of_12 = {**SMALL["base"]["model"], "d_model": 96, "num_heads": 8, "num_kv_heads": 8, "head_dim": 12}
    narrow = grid.expand({**SMALL, "base": {**SMALL["base"], "model": heads_of_12}}, name="x")
    with aot.Compiler("h100:8") as compiler:
        verdict = compiler.ask(narrow.cells[0].run, narrow.execution)
    assert verdict.fits, verdict.reason
    assert not any(name.startswith("cudnn attention") for name in verdict.kernels)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".002")
    with aot.Compiler("h100:8") as compiler:
        assert "that JAX owns of a device" in compiler.ask(g.cells[0].run, g.execution).reason
