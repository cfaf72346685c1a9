"""A sitting at an accelerator: what is kept, what is done again, figures by hand; the parts themselves on a CPU."""

import dataclasses
import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from scaling import accounting, devices, records
from scaling.bench import gpu_day
from scaling.training import calibration

SMALL = gpu_day.Day(
    alone={"t": (32, 2, 512)}, packed={"t": (16, 2, 512)}, compared=(32, 2, 512), seq_lens=(64,), packed_seq_len=64,
    pack_sizes=(1, 2), num_steps=3, seconds=0.1, vocab_size=256, grid="sweeps/smoke.yaml",
)  # fmt: skip


@pytest.mark.parametrize("name, wanted", [("10M", 10e6), ("75M", 75e6), ("300M", 300e6), ("1B", 1e9), ("1M", 1e6),
                                          ("5M", 5e6), ("20M", 20e6)])  # fmt: skip
def test_shapes_are_of_the_size_they_are_called_by(name, wanted):
    day = gpu_day.Day()
    run = gpu_day.run_of(day, {**day.alone, **day.packed}[name], 1024)
    assert accounting.param_counts(run.model)["non_embedding"] == pytest.approx(wanted, rel=0.07)
    assert run.model.head_dim in (64, 128)
    assert run.batch_tokens in (8_192, 16_384, 32_768, 65_536)


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    called = []

    def row(key, fails=False):
        def measured():
            called.append(key)
            if fails:
                raise RuntimeError("out of memory\nand much more")
            return {"value": len(called)}

        return measured

    later = time.time() + 60
    assert gpu_day._keep(tmp_path, "mfu", {"a": row("a"), "b": row("b", fails=True)}, later)
    kept = records.read_json(tmp_path / "mfu.json")
    assert kept["done"]
    assert kept["rows"]["b"]["error"] == "RuntimeError: out of memory"
    # The next call does what failed and what is new; the time over, it does nothing more.
    assert gpu_day._keep(tmp_path, "mfu", {"a": row("a"), "b": row("b"), "c": row("c")}, later)
    assert called == ["a", "b", "b", "c"]
    assert not gpu_day._keep(tmp_path, "mfu", {k: row(k) for k in "abcd"}, time.time() - 1)
    assert called == ["a", "b", "b", "c"]


def test_shares_of_the_peak_by_hand(monkeypatch):
    """Four runs of one step in .5 s on eight made-up devices of 1e12 FLOP/s each."""
    timed = {"step_seconds": 0.5, "compile_seconds": 1.0, "memory_bytes": 7}
    monkeypatch.setattr(calibration, "calibrate", lambda *a: timed)
    monkeypatch.setattr("scaling.data.prepare", lambda *a: None)
    monkeypatch.setattr(gpu_day, "_profile", lambda: dataclasses.replace(devices.PROFILES["h100"],
                                                                         peak_flops={"bfloat16": 1e12}))  # fmt: skip
    run = gpu_day.run_of(SMALL, SMALL.packed["t"], 64)
    row = gpu_day._timed(run, 1.0, 4)
    assert row["tokens_per_s"] == 4 * 512 / 0.5
    # 6 N D with every parameter: 12 · 2 layers · 16², two tables of 256 · 16, five norms of 16.
    num_params = 12 * 2 * 16**2 + 2 * 256 * 16 + 5 * 16
    assert row["mfu"]["6ND_total"] == pytest.approx(4 * 512 / 0.5 * 6 * num_params / 8e12)
    assert row["flops_per_s"]["exact"] == pytest.approx(row["mfu"]["exact"] * 8e12)
    console = Console(file=io.StringIO(), width=200)
    console.print(gpu_day._table("packs", {"t × 1": {**row, "tokens_per_s": 512.0}, "t × 4": row}, {"t": row}))
    assert "MFU by exact" in console.file.getvalue()


def test_a_sitting_goes_on_where_it_was(tmp_path, monkeypatch):
    asked = []

    def in_process(part, out, until, day):
        asked.append(part)
        if part != "study":
            rows = {"x": {"error": "no room"}} if part == "packs" else {}
            records.write_json(out / f"{part}.json", {"done": True, "rows": rows})
        return 3 if part == "study" else 0

    monkeypatch.setattr(gpu_day, "_in_process", in_process)
    console = Console(file=io.StringIO())
    assert gpu_day.sit(console, tmp_path, 1.0, SMALL) == 3
    assert tuple(asked) == gpu_day.PARTS
    asked.clear()
    assert gpu_day.sit(console, tmp_path, 1.0, SMALL) == 3
    assert asked == ["packs", "study"]  # what failed, and what was not done
    assert "left: packs, study; the same command goes on" in console.file.getvalue()
    with pytest.raises(ValueError, match="is of other shapes: write another --out"):
        gpu_day.sit(console, tmp_path, 1.0, gpu_day.Day())


@pytest.mark.slow
def test_the_parts_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path / "cache"))
    records.write_json(tmp_path / "day.json", gpu_day._plain(SMALL))
    for part in ("device", *gpu_day.ROWS):
        assert gpu_day.main([part, str(tmp_path), str(time.time() + 600)]) == 0
        rows = records.read_json(tmp_path / f"{part}.json")["rows"]
        assert not any("error" in row for row in rows.values()), rows
    found = {part: records.read_json(tmp_path / f"{part}.json")["rows"] for part in gpu_day.PARTS[:-1]}
    # Of one device with itself: the same to the bit, and in float32 within rounding by another way of attention.
    assert found["equality"]["float32"]["most"] == 0.0
    assert found["equality"]["float32_default"]["most"] < 1e-5
    assert set(found["packs"]) == {"t × 1", "t × 2"}
    assert found["mfu"]["t, 64"]["mfu"] is None  # nobody knows a CPU's peak
    console = Console(file=io.StringIO(), width=200)
    gpu_day.show(console, tmp_path)
    assert "t × 2" in console.file.getvalue()


@pytest.mark.parametrize("kind, profile", [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
    ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", None),
])  # fmt: skip
def test_a_share_is_of_the_board_that_is_here(monkeypatch, kind, profile):
    monkeypatch.setattr("jax.devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert gpu_day._profile() == (None if profile is None else devices.PROFILES[profile])


def test_losses_that_are_no_numbers_are_a_row_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "_losses", lambda *asked: [2.0, float("nan")])
    assert gpu_day._keep(tmp_path, "equality", gpu_day._equalities(SMALL), time.time() + 60)
    rows = records.read_json(tmp_path / "equality.json")["rows"]
    assert all("losses are not finite: nan and nan" in row["error"] for row in rows.values())
