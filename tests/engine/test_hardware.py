"""Profiles against the vendors' figures they cite, costs by hand, the energy counter against a made-up one."""

import dataclasses
import math

import pytest

from scaling import accounting, devices
from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig
from scaling.devices import PROFILES
from scaling.engine.plan import hardware
from scaling.engine.plan.hardware import Hardware
from scaling.execution import HardwareConfig
from scaling.families.transformer import TransformerConfig


def run_of(dtype="bfloat16"):
    model = TransformerConfig(
        d_model=4096, num_layers=32, num_heads=32, head_dim=128, num_kv_heads=32, d_ff=16384, vocab_size=50304,
        dtype=dtype,
    )  # fmt: skip
    return RunConfig(model, OptimConfig(1e-3, 100), Horizon(steps=1000), batch_size=512)


def of(name=None, *, has_accelerator=False, **given):
    return Hardware.of(HardwareConfig(name, **given), has_accelerator=has_accelerator)


def test_every_name_has_a_profile_and_every_figure_a_source():
    for profile in PROFILES.values():
        for name in ("peak_flops", "memory_bytes", "memory_bandwidth", "power_watts", "price_per_device_hour"):
            if getattr(profile, name):
                assert len(profile.sources[name]) > 10, (profile.name, name)
        assert list(profile.mfu) == sorted(profile.mfu, key=lambda p: p.num_params)
        assert all(0.05 < p.mfu < 0.75 and p.source for p in profile.mfu)


@pytest.mark.parametrize(
    "name, ridge",  # FLOPs per byte at which compute and memory balance: from the field's own rooflines
    [("h100", 295), ("b200", 281), ("a100", 153), ("tpu-v5e", 240), ("tpu-v5p", 166), ("tpu-v6e", 560)],
)
def test_peak_over_bandwidth_is_the_known_ridge_point(name, ridge):
    profile = PROFILES[name]
    assert profile.peak_flops["bfloat16"] / profile.memory_bandwidth == pytest.approx(ridge, rel=0.01)


def test_seconds_money_and_energy_are_those_of_a_hand_calculation():
    h100 = of("h100", devices=8, mfu=0.4, price_per_device_hour=2.0, power_watts=500)
    run, flops = run_of(), 1e21
    seconds = 1e21 / (8 * 989.4e12 * 0.4)
    assert h100.seconds(run, flops) == pytest.approx(seconds, rel=1e-12)
    cost = h100.cost(seconds)
    assert cost.device_hours == pytest.approx(8 * seconds / 3600)
    assert cost.dollars == pytest.approx(8 * seconds / 3600 * 2.0)
    assert cost.kwh == pytest.approx(8 * seconds / 3600 * 0.5)
    half = h100.seconds(run_of("float32"), flops)
    assert half == pytest.approx(2 * seconds)  # TF32 runs at half of bfloat16's peak


def test_what_is_not_known_is_not_invented():
    assert of("tpu-v5e").cost(3600).kwh is None  # Google publishes no power
    assert of("tpu-v6e").cost(3600).dollars is None
    assert dataclasses.astuple(of().cost(3600)) == (3600, 1.0, None, None)
    assert of().seconds(run_of(), 1e18) is None
    assert dataclasses.astuple(of("h100").cost(None)) == (None,) * 4
    assert of(power_watts=100).cost(3600).kwh == pytest.approx(0.1)


def test_mfu_is_published_between_linear_in_the_logarithm_and_flat_outside():
    points = PROFILES["a100"].mfu
    assert devices.mfu_of(points, 1.0) == points[0]
    assert devices.mfu_of(points, 1e15) == points[-1]
    middle = math.sqrt(points[0].num_params * points[1].num_params)
    assert devices.mfu_of(points, middle).mfu == pytest.approx((points[0].mfu + points[1].mfu) / 2)
    assert devices.mfu_of((), 1e9) is None
    total = accounting.param_counts(run_of().model)["total"]
    assert of("a100").mfu_for(run_of()) == devices.mfu_of(points, total)


@pytest.mark.parametrize(
    "name, width, layers, heads, tokens_per_s",  # of one GPU, as published (llm-foundry), sequences of 2,048
    [("a100", 768, 12, 12, 142_830), ("a100", 1024, 24, 16, 58_782), ("a100", 1536, 24, 12, 32_434),
     ("a100", 2048, 24, 16, 20_513), ("a100", 4096, 32, 32, 4_641), ("h100", 1536, 24, 12, 63_147),
     ("h100", 2048, 24, 16, 45_455), ("h100", 4096, 32, 32, 10_643)],
)  # fmt: skip
def test_published_tokens_per_second_are_what_a_plan_has(name, width, layers, heads, tokens_per_s):
    """Of the published model itself, built and counted here: the count of FLOPs is the plan's, not the publisher's."""
    model = TransformerConfig(
        d_model=width, num_layers=layers, num_heads=heads, head_dim=width // heads, num_kv_heads=heads, d_ff=4 * width,
        vocab_size=50_368, tied_embeddings=True, positions="learned", num_positions=2048, norm="layer",
        dtype="bfloat16",
    )  # fmt: skip
    run = RunConfig(model, OptimConfig(1e-3, 100), Horizon(steps=1), batch_size=1, data=DataConfig(seq_len=2048))
    assert of(name).seconds(run, accounting.flops_of(run)["exact"] * 1e6) == pytest.approx(1e6 / tokens_per_s, rel=3e-3)


@pytest.mark.parametrize(
    "name, has_accelerator, is_here",
    [(None, False, True), (None, True, True), ("cpu", False, True), ("cpu", True, False), ("h100", False, False),
     ("h100", True, True)],
)  # fmt: skip
def test_hardware_is_here_if_this_machine_could_be_it(name, has_accelerator, is_here):
    assert of(name, has_accelerator=has_accelerator).is_here is is_here


@pytest.mark.parametrize("bad", [{"mfu": 1.5}, {"mfu": 0.0}, {"devices": 0}, {"power_watts": float("nan")}])
def test_impossible_hardware_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HardwareConfig("h100", **bad)


def test_energy_is_the_sum_over_packages_and_survives_a_wrap(tmp_path):
    for i, start in enumerate((1_000_000, 90_000_000)):
        package = tmp_path / f"intel-rapl:{i}"
        package.mkdir()
        (package / "energy_uj").write_text(str(start))
        (package / "max_energy_range_uj").write_text("100000000")
        core = tmp_path / f"intel-rapl:{i}:0"  # part of its package: not counted again
        core.mkdir()
        (core / "energy_uj").write_text("5")
    meter = hardware.EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("4000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2000000")  # wrapped: 10 J to the end, 2 J after
    assert meter.kwh() == pytest.approx((3 + 12) / 3.6e6)
    assert hardware.EnergyMeter(tmp_path / "none").kwh() is None
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.kwh() is None
