"""Who holds a results folder, and the files a sweep keeps in it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from scaling import records
from scaling.config import Horizon, OptimConfig, RunConfig
from scaling.engine.folder import cells, forecast, manifest, workdir
from scaling.engine.folder.lock import HeldError, Lock
from scaling.engine.plan import table as plan
from scaling.engine.plan.hardware import EnergyMeter
from scaling.execution import ExecutionConfig
from scaling.families.transformer import TransformerConfig
from scaling.grid import Cell, FitConfig, Grid

HOLD = """
import sys, time, subprocess
from pathlib import Path
from scaling.engine.folder.lock import Lock
lock = Lock(Path(sys.argv[1]), *sys.argv[2:])
print("held", flush=True)
time.sleep(60)
"""


def hold(path, *shard):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *shard], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def end(process, signum=signal.SIGKILL):
    process.send_signal(signum)
    process.wait()
    process.stdout.close()


def test_the_second_sweep_is_told_who_holds_the_folder(tmp_path):
    process = hold(tmp_path / "r")
    try:
        with pytest.raises(HeldError, match=rf"held by another sweep: process {process.pid} on \S+, since 2"):
            Lock(tmp_path / "r")
        with pytest.raises(HeldError):
            Lock(tmp_path / "r", "1/2")
    finally:
        end(process)
    Lock(tmp_path / "r").release()  # a killed holder leaves nothing that needs clearing
    assert list((tmp_path / "r").iterdir()) == []


def test_shards_share_the_folder_but_not_their_shares(tmp_path):
    process = hold(tmp_path, "1/2")
    try:
        other = Lock(tmp_path, "2/2")
        with pytest.raises(HeldError):
            Lock(tmp_path, "1/2")
        with pytest.raises(HeldError):
            Lock(tmp_path)
        other.release()
        with pytest.raises(HeldError):
            Lock(tmp_path)
    finally:
        end(process)
    Lock(tmp_path).release()
    assert [p.name for p in tmp_path.iterdir()] == [".lock-shard-1-of-2"]  # the killed one's: locks nobody out
    Lock(tmp_path, "1/2").release()
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_number_are_refused(tmp_path):
    """1/3 beside 1/2: some cells would be trained twice, some not at all."""
    process = hold(tmp_path, "1/2")
    try:
        with pytest.raises(HeldError, match=r"--shard 1/3 beside --shard 1/2, which runs: .* is held by"):
            Lock(tmp_path, "1/3")
        Lock(tmp_path, "2/2").release()
    finally:
        end(process)
    Lock(tmp_path, "1/3").release()  # what a killed shard left refuses nobody


def test_a_killed_sweeps_folder_is_held_until_its_last_worker_is_gone(tmp_path):
    lock = Lock(tmp_path)
    reads = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    orphan = subprocess.Popen(reads, stdin=subprocess.PIPE, pass_fds=lock.fds)
    # As if this process had been killed: its descriptor closes, the pid in the file is nobody's.
    gone = subprocess.Popen(["true"])
    gone.wait()
    path = tmp_path / ".lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": gone.pid}))
    for fd in lock.fds:
        os.close(fd)
    told = threading.Timer(0.5, orphan.stdin.close)
    told.start()
    Lock(tmp_path).release()
    assert told.finished.is_set()
    orphan.wait()


def row(seed=0, holdout=False):
    model = TransformerConfig(d_model=16, num_layers=2, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=64)
    run = RunConfig(model, OptimConfig(1e-2, 100), Horizon(steps=10), batch_size=4, seed=seed)
    return plan.rows([Cell(run, holdout, "default@1", {"budget_flops": 1e9})])[0]


def test_failed_runs_have_records_that_analysis_can_read(tmp_path):
    for seed in range(2):
        records.save(tmp_path, cells.failed_record(row(seed), "sweep", "worker killed by signal 9"))
    table = records.load(tmp_path)
    assert list(table.status) == ["failed", "failed"]
    assert list(table.budget_flops) == [1e9, 1e9]
    assert len(records.curves(records.load_records(tmp_path))) == 0
    assert not records.is_done(tmp_path, row().run_id)


@pytest.mark.parametrize(
    "damage", [lambda t: t[: len(t) // 2], lambda t: "", lambda t: t.replace('"schema": 1', '"schema": 0')]
)
def test_a_damaged_record_is_said_and_set_aside(tmp_path, damage):
    whole, damaged = row(0), row(1)
    for r in (whole, damaged):
        records.save(tmp_path, cells.failed_record(r, "sweep", "x"))
    path = records.path_of(tmp_path, damaged.run_id)
    path.write_text(damage(path.read_text()))
    ids = [whole.run_id, damaged.run_id, "f" * 12]
    found, complaints = cells.statuses(tmp_path, ids, set_aside=False)
    assert path.exists()
    assert cells.statuses(tmp_path, ids, set_aside=True) == (found, complaints)
    assert found == {whole.run_id: "failed"}
    assert len(complaints) == 1
    assert str(path) in complaints[0]
    assert "\n" not in complaints[0]
    assert not path.exists()
    assert cells.statuses(tmp_path, ids, set_aside=True) == (found, [])


def manifest_of(tmp_path, shard=None):
    grid = Grid("g", "seeds: [0]", [], ExecutionConfig(), FitConfig())
    written = manifest.Manifest(tmp_path, grid=grid, grid_path="g.yaml", command="sweep", shard=shard)
    written._meter = EnergyMeter(tmp_path / "no counters")
    return written


def record_of(r, step_seconds):
    failed = cells.failed_record(r, "g", "x")
    return records.RunRecord(**{**vars(failed), "timing": {"step_seconds": step_seconds}})


def test_the_manifest_sums_over_calls(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(manifest.time, "monotonic", lambda: clock[0])
    rows = [row(0), row(1)]
    ids = [r.run_id for r in rows]
    first = manifest_of(tmp_path)
    with first.training():
        clock[0] += 4
        first.cell_ended(record_of(rows[0], 3.0))
        first.write(rows, {ids[0]: "completed"}, 2)
        clock[0] += 50  # killed here: not counted
    time.sleep(0.002)
    second = manifest_of(tmp_path)
    clock[0] += 1
    with second.training():
        for _ in range(2):  # written again and again while it runs: counted once
            clock[0] += 3
            second.write(rows, {}, 1)
        second.cell_ended(record_of(rows[1], 5.0))
    second.write(rows, dict.fromkeys(ids, "completed"), 1)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [call["cells"] for call in written["calls"]] == [[ids[0]], [ids[1]]]
    assert written["actual"] == {
        "wall_seconds": 4.0 + 7.0,
        "training_seconds": 4.0 + 6.0,
        "seconds_in_steps": 3.0 + 5.0,
        "fraction_not_in_steps": round(1 - 8 / (2 * 4 + 1 * 6), 4),
        "fraction_of_command_not_in_steps": round(1 - 8 / (2 * 4 + 1 * 7), 4),
        "dollars": None,
        "kwh": None,
        "measured_kwh": None,
        "peak_device_bytes": None,
    }
    assert [cell["status"] for cell in written["cells"]] == ["completed", "completed"]
    before = (tmp_path / "sweep.json").read_text()
    manifest_of(tmp_path).write(rows, dict.fromkeys(ids, "completed"), None)
    assert (tmp_path / "sweep.json").read_text() == before  # a call that trained nothing leaves no trace


def test_the_manifest_of_a_large_grid_is_not_written_after_every_cell(tmp_path, monkeypatch):
    """What a write takes grows with the grid: cells that end faster than that would wait for it."""
    clock = [0.0]
    monkeypatch.setattr(manifest.time, "monotonic", lambda: clock[0])
    rows = [row(seed) for seed in range(300)]
    written, whole = manifest_of(tmp_path), manifest.Manifest._write
    writes = []

    def slow(self, table, found, workers):
        clock[0] += 0.5
        writes.append(len(found))
        whole(self, table, found, workers)

    monkeypatch.setattr(manifest.Manifest, "_write", slow)
    found = {}
    for one in rows:
        clock[0] += 1.0
        found[one.run_id] = "completed"
        written.cell_ended(record_of(one, 1.0))
        written.write(rows, found, 1, at_leisure=True)
    assert 0.5 * len(writes) <= 0.03 * clock[0]
    assert writes[:2] == [1, 26]  # half a second in every 25
    written.write(rows, found, 1)
    told = json.loads((tmp_path / "sweep.json").read_text())
    assert {cell["status"] for cell in told["cells"]} == {"completed"}
    assert len(told["calls"][0]["cells"]) == 300


WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_folder as t
share = int(sys.argv[3])
rows = [t.row(seed) for seed in range(40)]
m, found = t.manifest_of(Path(sys.argv[2]), f"{share + 1}/2"), {}
for r in rows[share::2]:
    found[r.run_id] = "completed"
    m.cell_ended(t.record_of(r, 1.0))
    m.write(rows, found, 1)
"""


@pytest.mark.slow
def test_shards_that_write_the_manifest_at_once_lose_nothing(tmp_path):
    here = os.path.dirname(__file__)
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, here, str(tmp_path), str(i)]) for i in range(2)]
    assert [w.wait() for w in writers] == [0, 0]
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert {c["status"] for c in written["cells"]} == {"completed"}
    assert sorted(len(call["cells"]) for call in written["calls"]) == [20, 20]
    assert written["actual"]["seconds_in_steps"] == 40.0
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]


def test_what_was_predicted_first_stands(tmp_path):
    fast = plan.Row(row().cell, row().plan, 1.0)
    slow = plan.Row(row().cell, row().plan, 9.0)
    fast, slow = (dataclasses.replace(r, memory_bytes=m) for r, m in ((fast, 1e6), (slow, None)))  # no longer asked
    manifest_of(tmp_path).write([fast], {}, 2)
    manifest_of(tmp_path).write([slow], {}, 1)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["plan"]["predicted_training_seconds"] == 1.0
    assert written["plan"]["workers"] == 2
    assert written["plan"]["predicted_seconds"] == pytest.approx(1.0 + plan.CONCLUSION_SECONDS, abs=0.5)
    assert written["cells"][0]["predicted_seconds"] == 1.0
    assert written["cells"][0]["memory_bytes"] == 1e6


def test_a_forecast_once_written_never_changes_and_shows_edits(tmp_path):
    entry = {"run_id": "a", "flops": 1e9, "predicted": 2.0, "interval": [1.9, 2.1], "level": 0.9}
    assert forecast.Forecast(tmp_path).is_intact
    forecast.Forecast(tmp_path).add([entry], ["x", "w"])
    first = forecast.Forecast(tmp_path)
    assert first.is_intact
    first.add([{**entry, "run_id": "b"}], ["w", "x", "y"])
    again = forecast.Forecast(tmp_path)
    assert [e["run_id"] for e in again.entries] == ["a", "b"]
    assert again.entries[0] == first.entries[0]
    path = tmp_path / "forecast.json"
    payload = json.loads(path.read_text())
    payload["cells"][0]["predicted"] = 1.5
    path.write_text(json.dumps(payload))
    assert not forecast.Forecast(tmp_path).is_intact
    path.write_text("{")
    with pytest.raises(ValueError, match="restore it from git, or delete it"):
        forecast.Forecast(tmp_path)


def test_a_work_folder_belongs_to_one_results_folder_at_a_time(tmp_path):
    """Before either has a checkpoint too: the first that claimed it is at work."""
    work, a, b = (tmp_path / name for name in ("work", "a", "b"))
    lock = Lock(a)
    workdir.claim(work, a)
    with pytest.raises(HeldError, match=r"the work folder of another sweep that runs: .* is held by"):
        workdir.claim(work, b)
    workdir.claim(work, a)
    lock.release()
    workdir.claim(work, b)
    (work / "checkpoints" / "0123456789ab").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds checkpoints of the sweep with its results in"):
        workdir.claim(work, a)
    workdir.claim(work, b)
    workdir.give_up(work)  # not while it holds checkpoints
    assert (work / "results.json").exists()
    (work / "checkpoints" / "0123456789ab").rmdir()
    workdir.give_up(work)
    assert not (work / "results.json").exists()
    workdir.claim(work, a)
