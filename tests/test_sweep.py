"""The command, from a grid to exit codes, around a training loop of hashes; around the real one: ``test_chaos``."""

import dataclasses
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling import grid, records, storage, sweep
from scaling.engine.folder import lock
from scaling.engine.folder import manifest as manifests
from scaling.engine.plan import table, timings
from scaling.engine.plan.timings import TimingCache

ENGINE = Path(__file__).parent / "engine"
GRID = """
recipe: default@1
isoflop:
  sizes: [8, 16]
  budgets: [3e8, 6e8, {flops: 1.2e9, sizes: [16]}]
holdout: {budgets: [1.2e9]}
"""
BAD_GRID = """
recipe: default@1
base: {model: {width: 8}, horizon: {tokens: 3000}}
axes:
  bad:
    - {seed: 0, label: fine}
    - {seed: 1, label: dies}
    - {seed: 2, label: diverges}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a grid, in which the sweep trains hashes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ENGINE), str(ENGINE.parents[1])]))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    monkeypatch.syspath_prepend(str(ENGINE))
    import driver

    driver.install(monkeypatch.setitem, lambda *args: monkeypatch.setattr(*args, raising=False))
    Path("g.yaml").write_text(GRID)
    return tmp_path


def run(*argv):
    return sweep.main(["--grid", "g.yaml", *argv], loop="fake_loop")


# Where workers are not what is tested: each is an interpreter that has to import everything.
INLINE = ("--executor", "inline")


def start(*argv):
    """The same in a process of its own, in which it can be killed."""
    command = [sys.executable, str(ENGINE / "driver.py"), "--grid", "g.yaml", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def trained():
    """Run ids in the order their training was begun, with the worker's pid."""
    log = Path(".scaling/g/log.txt")
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def science(folder="results/g"):
    """The records but for where and how fast they were made."""
    return [dataclasses.replace(r, environment={}, timing={}) for r in records.load_records(folder)]


def files(folder="results/g"):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_grid_becomes_records_laws_and_report_and_then_stays(here, capsys):
    assert run() == 0
    out = capsys.readouterr().out
    cells = grid.load("g.yaml").cells
    assert [r.run_id for r in science()] == sorted(c.run.run_id for c in cells)
    for run_id in (c.run.run_id for c in cells):
        assert out.count(f"/5  {run_id}") == 1
    assert "5 cells, 5 to do on 2 workers: about" in out or "on 1 worker" in out
    assert "laws of 4 runs" in out
    assert "report: results/g/report.html" in out
    assert trained()[-1][0] == cells[-1].run.run_id  # held out: last
    manifest = json.loads(Path("results/g/sweep.json").read_text())
    assert manifest["plan"]["predicted_seconds"] > 0
    assert {c["status"] for c in manifest["cells"]} == {"completed"}
    assert manifest["grid"] == GRID
    forecast = json.loads(Path("results/g/forecast.json").read_text())
    assert forecast["fitted_run_ids"] == sorted(c.run.run_id for c in cells[:-1])
    fit = json.loads(Path("results/g/fit.json").read_text())
    assert fit["forecast"][0]["actual"] == records.read(records.path_of("results/g", cells[-1].run.run_id)).loss
    before = files()
    assert run() == 0
    assert files() == before
    assert len(trained()) == 5
    assert not list(Path("results/g").glob(".*"))


def test_plan_writes_no_results_and_the_table_adds_up(here, capsys):
    assert run("--plan", *INLINE) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if " s" in line]
    steps = [int(r[5].replace(",", "")) for r in rows if len(r[0]) == 12]
    totals = next(line.split() for line in out.splitlines() if line.startswith("5 cells   "))
    assert len(steps) == 5
    assert sum(steps) == int(totals[3].replace(",", ""))
    assert not Path("results").exists()
    assert not trained()


@pytest.mark.parametrize("text, says", [("recipe: [", "g.yaml"), ("base: {}\nfoo: 1", "foo"), (None, "no such")])
def test_a_bad_grid_is_one_line_and_exit_2(here, capsys, text, says):
    Path("g.yaml").unlink() if text is None else Path("g.yaml").write_text(text)
    assert run() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize("argv", [["--shard", "3/2"], ["--shard", "x"], ["--workers", "0"], ["--executor", "k8s"]])
def test_bad_arguments_exit_2(here, argv):
    with pytest.raises(SystemExit) as e:
        run(*argv)
    assert e.value.code == 2


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as e:
        sweep.main(["--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    for option in ("--grid", "--plan", "--results", "--workdir", "--only", "--shard", "--executor", "--workers"):
        assert option in out


@pytest.mark.slow
def test_failed_and_diverged_cells_are_data_and_exit_3(here, capsys):
    Path("g.yaml").write_text(BAD_GRID)
    assert run() == 3
    by_label = {r.sweep["labels"]["bad"]: r for r in records.load_records("results/g")}
    assert {label: r.status for label, r in by_label.items()} == {
        "fine": "completed", "dies": "failed", "diverges": "diverged",
    }  # fmt: skip
    assert by_label["dies"].environment["failure"] == "worker killed by signal 9"
    out = capsys.readouterr().out
    assert "2 of 3 cells did not complete" in out
    assert "no laws: 1 completed runs" in out  # too few for a law: reported all the same
    assert json.loads(Path("results/g/fit.json").read_text())["error"].startswith("1 completed")
    begun = len(trained())
    assert run() == 3  # what failed is tried again; what diverged would again
    assert len(trained()) == begun + 3


HELD_OUT_GRID = """
recipe: default@1
isoflop: {{sizes: [8, 16, 24], budgets: [3e8, 6e8, {{flops: 1.2e9, sizes: [16]}}]}}
axes: {{bad: [{{seed: 1, label: {}}}]}}
holdout: {{budgets: [1.2e9]}}
"""


def test_no_forecast_is_sealed_while_a_fitted_cell_has_failed(here, capsys):
    Path("g.yaml").write_text(HELD_OUT_GRID.format("refuses"))
    assert run(*INLINE) == 3
    out = capsys.readouterr().out
    assert "1 held-out cells wait: they are forecast first, from all fitted cells, and 6 failed" in out
    assert not Path("results/g/forecast.json").exists()
    held_out = [cell.run.run_id for cell in grid.load("g.yaml").cells if cell.holdout]
    assert not {r.run_id for r in science()} & set(held_out)


def test_what_a_killed_writer_left_is_removed(here):
    assert run(*INLINE) == 0
    halves = [Path("results/g/.sweep.json.31321.tmp"), Path("results/g/runs/.0123456789ab.json.7.tmp")]
    for path in halves:
        path.write_text('{"sch')
    assert run(*INLINE, "--plan") == 0
    assert all(path.exists() for path in halves)
    assert run(*INLINE) == 0
    assert not any(path.exists() for path in halves)


def test_a_work_folder_with_anothers_checkpoints_is_refused(here, capsys):
    assert run(*INLINE, "--results", "a") == 0
    kept = Path(".scaling/g/checkpoints/0123456789ab/7")
    kept.mkdir(parents=True)
    assert run(*INLINE, "--results", "b") == 0  # a was done with it
    capsys.readouterr()
    assert run(*INLINE, "--results", "a") == 2
    said = capsys.readouterr().err
    assert f".scaling/g holds checkpoints of the sweep with its results in {Path('b').absolute()}" in said
    assert run(*INLINE, "--results", "a", "--workdir", "other") == 0
    assert run(*INLINE, "--results", "b") == 0
    assert kept.is_dir()


@pytest.mark.parametrize("name,said", [("data", "checkpoints would lie among prepared data"), ("..", "called '..'")])
def test_no_grid_is_called_what_another_folder_is(here, capsys, name, said):
    Path(f"{name}.yaml").write_text(GRID)
    assert sweep.main(["--grid", f"{name}.yaml", *INLINE], loop="fake_loop") == 2
    assert said in capsys.readouterr().err
    assert not trained()


def test_a_work_folder_that_would_be_read_as_a_pattern_is_refused(here, capsys):
    assert run(*INLINE, "--workdir", "w[z]") == 2
    assert "[ in a path is read as a pattern: write a folder without" in capsys.readouterr().err
    assert not trained()


def test_a_final_checkpoint_that_is_asked_for_too_late_is_said(here, capsys):
    assert run(*INLINE) == 0
    Path("g.yaml").write_text(GRID + "execution: {keep_final_checkpoint: true}\n")
    capsys.readouterr()
    assert run(*INLINE) == 0
    assert "5 runs that are done have no final checkpoint" in capsys.readouterr().out
    before = science()
    assert run("--train-unkept", "--plan", *INLINE) == 0
    assert "5 cells, 5 to do" in capsys.readouterr().out
    assert science() == before
    assert run("--train-unkept", *INLINE) == 0
    assert len(trained()) == 10
    assert science() == before
    Path("g.yaml").write_text(GRID)
    assert run("--train-unkept", *INLINE) == 2
    assert "g.yaml keeps no final checkpoints: write execution" in capsys.readouterr().err


def test_nothing_to_fit_is_a_result(here, capsys):
    """Every fitted cell diverged: held-out cells train all the same, and the page is there."""
    Path("g.yaml").write_text(HELD_OUT_GRID.format("diverges"))
    assert run(*INLINE) == 3
    out = capsys.readouterr().out
    assert "no forecast: 0 completed runs" in out
    assert "no laws: 0 completed runs" in out
    assert len(science()) == 7
    assert json.loads(Path("results/g/fit.json").read_text())["error"].startswith("0 completed runs")
    assert Path("results/g/report.html").exists()


def test_a_truncated_record_is_said_and_redone(here, capsys):
    assert run(*INLINE) == 0
    before = science()
    path = records.path_of("results/g", before[2].run_id)
    path.write_text(path.read_text()[:100])
    capsys.readouterr()
    assert run(*INLINE) == 0
    out = capsys.readouterr().out
    assert sum(str(path) in line for line in out.splitlines()) == 1
    assert science() == before
    assert [run_id for run_id, _ in trained()[5:]] == [before[2].run_id]


def test_what_no_shape_can_run_is_said_before_anything_trains(here, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_CALIBRATE_SAYS", "mesh of 4 devices on 1: write a smaller mesh")
    assert run() == 2
    assert "mesh of 4 devices on 1" in capsys.readouterr().err
    assert not trained()


def test_only_trains_what_it_names(here, capsys):
    cells = grid.load("g.yaml").cells
    assert run("--only", cells[1].run.run_id[:8]) == 0
    assert [r.run_id for r in science()] == [cells[1].run.run_id]
    assert "4 of 5 cells have no record yet" in capsys.readouterr().out
    assert run("--only", cells[-1].run.run_id) == 0  # held out: it waits for its forecast
    assert len(science()) == 1
    assert "held-out cells wait" in capsys.readouterr().out
    assert run("--only", "zzz") == 2
    assert "--only zzz: no cell of this grid" in capsys.readouterr().err


@pytest.mark.slow
def test_shards_together_are_the_grid(here, capsys):
    assert run("--shard", "1/2") == 0
    first = {r.run_id for r in science()}
    assert run("--shard", "2/2") == 0
    assert len(first) == 2
    for shard in ("1/2", "2/2"):  # one of them had the held-out cell, and waited
        assert run("--shard", shard, *INLINE) == 0
    assert len(trained()) == 5
    assert "laws of 4 runs" in capsys.readouterr().out
    sharded = science()
    assert run("--results", "results/h", "--workdir", ".scaling/h", *INLINE) == 0
    whole = science("results/h")
    assert sharded == whole


def test_a_folder_in_use_is_refused_with_its_holder(here, capsys):
    with_lock = lock.Lock(Path("results/g"))
    try:
        assert run() == 2
    finally:
        with_lock.release()
    err = capsys.readouterr().err
    assert f"held by another sweep: process {os.getpid()}" in err
    assert err.count("\n") == 1


def test_a_results_folder_that_cannot_be_is_one_line_and_exit_2(here, capsys):
    assert run("--results", "g.yaml/x") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --results g.yaml/x: Not a directory")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_cells_of_equal_shape_train_as_one_pack(here):
    Path("g.yaml").write_text(GRID + "seeds: [0, 1, 2]\n")
    assert run("--pack", "2") == 0
    packed = science()
    assert len(packed) == 15
    assert run("--results", "results/h", "--workdir", ".scaling/h", *INLINE) == 0
    assert science("results/h") == packed


def test_a_plan_says_what_is_packed_and_what_that_should_gain(here, capsys):
    Path("g.yaml").write_text(GRID + "seeds: [0, 1, 2]\n")
    plan_of_packs = ("--plan", "--pack", "2", "--workers", "1")
    assert run(*plan_of_packs) == 0
    out = capsys.readouterr().out
    # Six cells a fitted size, three of the held-out one: three packs of two, three, and one; a cell is left over.
    assert "packs: 14 of 15 cells in 7 of up to 2, one program each" in out
    assert "not timed here (python -m scaling.bench --grid g.yaml --packs 2 --workers 1)" in out
    timings = TimingCache(storage.cache_dir(), 1, grid.load("g.yaml").execution)
    kind = {"family": "transformer", "num_params": 1e4, "workers": 1}
    rows = [{**kind, "num_members": k, "tokens_per_s": v} for k, v in ((1, 100.0), (2, 150.0))]
    timings.save_packs(rows)
    assert run(*plan_of_packs) == 0
    assert "expected gain 1.50× the tokens/s of lone runs" in capsys.readouterr().out


HORIZONS = """
base: {model: {width: 8}, batch_size: 2, optim: {warmup_tokens: 2560}}
axes: {horizon.steps: [100, 140, 200, 300]}
seeds: [0, 1]
holdout: {cells: [{steps: 300}]}
"""


@functools.cache
def lone_runs():
    Path("g.yaml").write_text(HORIZONS + "execution: {trunks: false}\n")
    assert run("--results", "results/h", "--workdir", ".scaling/h", *INLINE) == 0
    return science("results/h")


@pytest.mark.slow  # of one branch: tests/training/test_trunks.py
@pytest.mark.parametrize("argv", [["--workers", "2"], ["--executor", "inline"], ["--pack", "2"]], ids=str)
def test_branches_leave_the_records_of_lone_runs(here, capsys, monkeypatch, argv):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    lone = lone_runs()
    assert "trunks:" not in capsys.readouterr().out
    Path("g.yaml").write_text(HORIZONS)
    assert run(*argv) == 0
    out = capsys.readouterr().out
    spent = 2 * (200 + 20 + 28 + 300 - 160)
    ratio = spent / (2 * (100 + 140 + 200 + 300))
    assert "trunks: 6 of 8 cells branch off another; " in out
    assert f"ratio {ratio:.3f}" in out
    assert science("results/g") == lone
    began = {r.num_steps: r.timing["started_at"] for r in records.load_records("results/g")}
    assert began == {100: 80, 140: 112, 200: 0, 300: 160}
    manifest = json.loads(Path("results/g/sweep.json").read_text())
    assert manifest["plan"]["flops"]["ratio"] == pytest.approx(ratio)
    assert {c["num_steps"]: c["branch_step"] for c in manifest["cells"]} == began


@pytest.mark.slow
def test_a_trunk_that_dies_lets_its_branches_go(here):
    Path("g.yaml").write_text(
        """
base: {model: {width: 8}, batch_size: 2, optim: {warmup_tokens: 2560}}
axes:
  bad:
    - {horizon: {steps: 100}, label: fine}
    - {horizon: {steps: 200}, label: dies}
"""
    )
    assert run("--workers", "2") == 3
    by_label = {r.sweep["labels"]["bad"]: r for r in records.load_records("results/g")}
    assert {label: r.status for label, r in by_label.items()} == {"fine": "completed", "dies": "failed"}
    assert by_label["fine"].timing["started_at"] == 0


def test_checkpoints_of_runs_that_left_the_grid_count_and_go_when_told(here, capsys):
    left = Path(".scaling/g/checkpoints/0123456789ab/7")
    left.mkdir(parents=True)
    (left / "state").write_bytes(bytes(3_000_000))
    assert run("--plan", "--disk-budget", "0.003", *INLINE) == 2
    assert "0.003 those of other runs, which stay" in capsys.readouterr().err
    assert run("--disk-budget", "0.1", *INLINE) == 0
    out = capsys.readouterr().out
    assert "checkpoints of 1 runs that the grid no longer has, 3MB, count towards the disk budget" in out
    assert left.exists()
    assert run("--remove-orphans", *INLINE) == 0
    assert "checkpoints of 1 runs that the grid no longer has, 3MB, removed" in capsys.readouterr().out
    assert not left.exists()


def test_timings_of_a_busy_machine_are_taken_again(here, capsys):
    """Cells that took a thousandth of what the timing of their shapes said: the next plan does not believe it."""
    assert run("--plan", *INLINE) == 0
    (path,) = Path(".scaling/data").glob("calibration-*.json")
    known = json.loads(path.read_text())
    assert len(known) == 2
    path.write_text(json.dumps({shape: {**timing, "start": 500.0} for shape, timing in known.items()}))
    capsys.readouterr()
    assert run(*INLINE) == 0
    out = capsys.readouterr().out
    assert "2 shapes took " in out
    assert "they are timed again by the next plan" in out
    assert json.loads(path.read_text()) == {}


@pytest.mark.slow
def test_a_reader_that_closes_ends_the_printing_and_not_the_work(here):
    """``| head -1``."""
    command = [sys.executable, str(ENGINE / "driver.py"), "--grid", "g.yaml", "--executor", "inline"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0, errors
    assert "Traceback" not in errors
    assert "Broken pipe" not in errors
    assert len(science()) == 5
    assert Path("results/g/report.html").exists()


def test_a_disk_that_is_too_small_is_one_line_and_exit_2(here, capsys):
    Path("g.yaml").write_text(HORIZONS)
    assert run("--disk-budget", "0.0001", *INLINE) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --disk-budget 0.0001 GB: checkpoints take up to")
    assert err.count("\n") == 1
    assert not trained()
    with pytest.raises(SystemExit) as e:
        run("--disk-budget", "lots")
    assert e.value.code == 2


def test_an_edited_forecast_is_noticed_and_kept(here, capsys):
    assert run(*INLINE) == 0
    path = Path("results/g/forecast.json")
    path.write_text(path.read_text().replace('"level": 0.9', '"level": 0.5'))
    edited = path.read_text()
    capsys.readouterr()
    assert run(*INLINE) == 0
    assert "does not match its own sha256" in capsys.readouterr().out
    assert path.read_text() == edited


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_says_how_to_go_on_and_goes_on(here, monkeypatch, signum):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.02")
    process = start("--workers", "2")
    _wait(lambda: len(trained()) >= 2)
    time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted; go on from here with: python -m scaling.sweep --grid g.yaml --workers 2" in err
    assert not list(Path("results/g").glob(".lock"))
    assert not any(_alive(pid) for _, pid in trained())
    interrupted = {run_id for run_id, _ in trained()}
    steps = sum(json.loads(p.read_text())[0] for p in Path(".scaling/g/checkpoints").glob("*.json"))
    assert interrupted
    assert steps > 0
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    assert run() == 0
    _assert_as_undisturbed()


@pytest.mark.slow
def test_killed_at_random_moments_the_records_are_the_same(here, monkeypatch):
    """Parent and workers, SIGKILL, each time somewhere else; then the records of a sweep that nobody disturbed."""
    dice = random.Random(0)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.008")
    for victim in ("parent", "worker", "parent"):
        process, begun = start("--workers", "2"), len(trained())
        _wait(lambda begun=begun: len(trained()) > begun)
        time.sleep(dice.uniform(0.02, 0.2))
        os.kill(process.pid if victim == "parent" else int(trained()[-1][1]), signal.SIGKILL)
        if victim == "worker":
            time.sleep(0.3)
            process.kill()
        process.communicate()
        _wait(lambda: not any(_alive(pid) for _, pid in trained()), seconds=3)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    assert run() == 0
    _assert_as_undisturbed()


def _assert_as_undisturbed():
    disturbed = science()
    assert run("--results", "results/h", "--workdir", ".scaling/h", *INLINE) == 0
    undisturbed = science("results/h")
    assert disturbed == undisturbed


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_a_topology_is_for_plans(tmp_path, capsys):
    assert sweep.main(["--grid", "sweeps/smoke.yaml", "--topology", "v5e:2x2"]) == 2
    assert "it compiles and trains nothing: add --plan" in capsys.readouterr().err
    assert sweep.main(["--grid", "sweeps/smoke.yaml", "--plan", "--suggest"]) == 2
    assert "add --topology" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--hardware", "h100"], "add --plan"),
        (["--budget-hours", "1e-6"], "too much"),
        (["--budget-dollars", "1"], "--price"),
        (["--budget-kwh", "1"], "--power"),
        (["--strict"], "--strict: "),
        (["--mfu", "2", "--plan"], "mfu is 2.0"),
        (["--plan", "--json", "g.yaml/x"], "--json g.yaml/x"),
    ],
)
def test_what_the_plan_forbids_trains_nothing_and_exits_2(here, capsys, argv, says):
    assert run(*argv, *INLINE) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not trained()


def test_a_plan_for_elsewhere_needs_nothing_of_this_machine(here, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_CALIBRATE_SAYS", "nothing is timed here")
    argv = ["--plan", "--hardware", "h100", "--devices", "8", "--mfu", "0.4", "--price", "2", "--json", "plan.json"]
    assert run(*argv) == 0
    written = json.loads(Path("plan.json").read_text())
    total, flops = written["total"], sum(c["flops"]["exact"] for c in written["cells"])
    assert total["seconds"] == pytest.approx(flops / (8 * 494.7e12 * 0.4))
    assert total["dollars"] == pytest.approx(total["seconds"] * 8 / 3600 * 2)
    assert total["kwh"] == pytest.approx(total["seconds"] * 8 / 3600 * 0.7)
    assert written["hardware"]["sources"]["price_per_device_hour"] == "given"
    assert {w["rule"] for w in written["warnings"]} >= {"few steps", "large head"}
    assert "8 × NVIDIA H100" in capsys.readouterr().out
    assert not Path("results").exists()


def test_what_is_over_the_budget_is_left_out_and_stays_out(here, monkeypatch, capsys):
    for module in (table, manifests):
        monkeypatch.setattr(module, "CONCLUSION_SECONDS", 0.0)
    monkeypatch.setattr(timings, "START_SECONDS", 100.0)
    cells = grid.load("g.yaml").cells
    # 5 cells of 100 s on one worker: three fit into 390 s, but a budget goes as a whole
    argv = ["--workers", "1", "--price", "3600", "--budget-dollars", "390", "--drop"]
    assert run(*argv) == 0
    assert {r.run_id for r in science()} == {c.run.run_id for c in cells if c.labels["budget_flops"] == 3e8}
    out = capsys.readouterr().out
    assert "left out to stay within the budget: 3 cells of budgets 6e+08, 1.2e+09" in out
    manifest = json.loads(Path("results/g/sweep.json").read_text())
    assert sorted(c["status"] for c in manifest["cells"]) == ["completed"] * 2 + ["dropped"] * 3
    assert manifest["plan"]["dollars"] > 0
    assert manifest["actual"]["dollars"] == pytest.approx(manifest["actual"]["wall_seconds"])
    assert "plan against actual: " in out


def test_a_grids_own_hardware_counts_unless_the_command_names_another(here, capsys):
    Path("g.yaml").write_text(GRID + "hardware: {name: a100, price_per_device_hour: 7, devices: 3}\n")
    assert run("--plan", "--json", "a.json") == 0
    assert run("--plan", "--json", "b.json", "--hardware", "h100") == 0
    a, b = (json.loads(Path(f"{name}.json").read_text())["hardware"] for name in "ab")
    assert (a["name"], a["price_per_device_hour"], a["devices"]) == ("a100", 7, 3)
    assert (b["name"], b["price_per_device_hour"], b["devices"]) == ("h100", 3.99, 1)
    assert run("--hardware", "cpu", *INLINE) == 0


def test_a_budget_that_drops_a_trunk_counts_its_branches_whole(here, capsys):
    """Alone the short run takes 100 steps, not the 20 it has left when the long one carries it."""
    Path("g.yaml").write_text(
        "recipe: none\naxes: {horizon.steps: [100, 200]}\nbase:\n  model: {width: 8}\n  data: {seq_len: 32}\n"
        "  batch_size: 4\n  optim: {peak_lr: 0.01, warmup_tokens: 0}\n"
    )
    argv = ["--plan", "--hardware", "h100", "--mfu", "0.5", "--json", "plan.json"]
    assert run(*argv) == 0
    whole = json.loads(Path("plan.json").read_text())["total"]["seconds"]
    assert run(*argv, "--budget-hours", f"{whole / 220 * 100.5 / 3600}", "--drop") == 0
    short = json.loads(Path("plan.json").read_text())
    assert [c["num_steps"] for c in short["cells"]] == [100]
    assert short["total"]["seconds"] == pytest.approx(whole / 220 * 100)
    assert run(*argv, "--budget-hours", f"{whole / 220 * 99 / 3600}", "--drop") == 2


def test_the_pod_study_is_planned_without_data_or_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path / "cache"))
    assert sweep.main(["--grid", "sweeps/chinchilla_pod.yaml", "--plan"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    total = re.search(r"28 cells, 28 to do on 1 worker: about ([\d:]+), \$([\d,]+), ([\d.e+]+) kWh", said)
    assert total, said
    # 4.8e21 FLOPs on 64 devices of 989e12 FLOP/s: at full use 21 hours, at the published shares about 50; a tenth less
    # where cells share trunks.
    hours = int(total[1].split(":")[0])
    assert 0.85 * 21 / 0.47 < hours < 21 / 0.34
    assert float(total[2].replace(",", "")) == pytest.approx(hours * 64 * 3.99, rel=0.03)
    assert float(total[3]) == pytest.approx(hours * 64 * 0.7, rel=0.03)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "asks", [["--plan", "--hardware", "h100", "--mfu", "0.3"], ["--status"], ["--print-launch", "tpu"]]
)
def test_what_trains_nothing_imports_no_law_of_the_users_and_says_so(here, capsys, monkeypatch, asks):
    monkeypatch.syspath_prepend(str(here))
    Path("my_law.py").write_text("open('imported', 'w').close()\nraise ImportError('not here')\n")
    Path("g.yaml").write_text(GRID + "fit: {laws: [chinchilla, 'my_law:law']}\n")
    assert run(*asks) == 0
    assert not Path("imported").exists()
    said = "g.yaml: fit.laws: my_law:law is not imported by --plan, and so not checked"
    assert (said in capsys.readouterr().out) == (asks[0] == "--plan")
    # What trains does import it, before anything is spent; a name that is no import path is refused by a plan too.
    assert run(*INLINE) == 2
    assert Path("imported").exists()
    assert "g.yaml: fit.laws[1]: law 'my_law:law' cannot be imported" in capsys.readouterr().err
    Path("g.yaml").write_text(GRID + "fit: {laws: [chinchila]}\n")
    assert run(*asks) == 2
    assert "fit.laws[0]: law 'chinchila' is not known" in capsys.readouterr().err


def test_events_as_json_are_alone_on_stdout(here, capsys):
    """A line an event, that another program reads: the plan, every cell with its loss, the report; words on stderr."""
    assert run(*INLINE, "--progress", "json") == sweep.DONE
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "plan"
    assert kinds[-1] == "report"
    assert len(events[0]["todo"]) == events[0]["cells"] == kinds.count("cell")
    cells = {event["run_id"]: event for event in events if event["event"] == "cell"}
    for record in records.load_records(Path("results/g")):
        assert cells[record.run_id]["loss"] == record.loss
    assert "the plan" in err
    assert {"start", "done"} <= set(kinds)
