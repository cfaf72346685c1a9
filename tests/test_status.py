"""``--status``: what signs of life say of a sweep, from outside of it."""

import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling import numbers, records, storage, sweep, terminal
from scaling.config import Horizon, OptimConfig, RunConfig
from scaling.engine.folder import signs
from scaling.engine.folder.cells import failed_record
from scaling.engine.folder.signs import Board, clear_stale, read_signs, signs_folder
from scaling.engine.plan import table
from scaling.engine.run import status
from scaling.families.transformer import TransformerConfig
from scaling.grid import Cell

ENGINE = Path(__file__).parent / "engine"
MODEL = TransformerConfig(d_model=16, num_layers=2, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=64)


def make_rows(count, num_steps=100):
    runs = [RunConfig(MODEL, OptimConfig(1e-2, 100), Horizon(steps=num_steps), 4, seed=i) for i in range(count)]
    return table.rows(Cell(run) for run in runs)


def progress_event(row, step, loss=2.5):
    return {
        "event": "progress", "key": row.run_id, "run_ids": [row.run_id], "step": step, "num_steps": 100, "loss": loss,
    }  # fmt: skip


def save(row, results, state, seconds=None, **changes):
    record = failed_record(row, "s", changes.pop("reason", "")).__dict__
    timing = {"seconds": seconds} if seconds else {}
    records.save(results, records.RunRecord(**{**record, "status": state, "timing": timing, "loss": 2.5, **changes}))


def shown(capsys, rows, tmp_path, **options):
    status.show(terminal.console(sys.stdout, width=200), rows, tmp_path / "results", tmp_path / "work", **options)
    return capsys.readouterr().out


def a_dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_board_says_what_runs_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(signs, "WRITE_SECONDS", 0.05)
    (row,) = make_rows(1)
    with Board(tmp_path, "local", {row.run_id: [row.run_id]}) as board:
        (sign,) = read_signs(tmp_path)
        assert (sign["packs"], sign["alive"], sign["pid"]) == ([], True, os.getpid())
        board.on_event({"event": "start", "key": row.run_id, "worker": 1})
        board.on_event(progress_event(row, 7))
        _wait(lambda: "step" in str(read_signs(tmp_path)[0]["packs"]))
        board.on_event(progress_event(row, 9))
        time.sleep(0.2)
        (sign,) = read_signs(tmp_path)
        (pack,) = sign["packs"]
        assert (pack["step"], pack["first_step"], pack["num_steps"], pack["worker"]) == (9, 7, 100, 1)
        board.on_event({"event": "done", "key": row.run_id, "worker": 1})
        _wait(lambda: not read_signs(tmp_path)[0]["packs"])
    assert list((tmp_path / "status").iterdir()) == []


def test_a_last_word_is_written_once_after_all_others(tmp_path, monkeypatch):
    """Its reader removes it: written again, it would stay."""
    monkeypatch.setattr(signs, "WRITE_SECONDS", 0.01)
    written, write = [], storage.write
    monkeypatch.setattr(storage, "write", lambda *args, **kw: (written.append(json.loads(args[1])), write(*args, **kw)))
    with Board(tmp_path, "local", {"a": ["a"]}) as board:
        board.leave({"event": "done"})
        count = len(written)
        _wait(lambda: len(written) > count + 1)  # its own thread's, meanwhile
    assert [sign.get("ended") for sign in written] == [None] * (len(written) - 1) + [{"event": "done"}]


def test_a_folder_that_cannot_be_written_costs_the_sign_only(tmp_path):
    (tmp_path / "status").write_text("in the way")
    with Board(tmp_path, "local", {"a": ["a"]}) as board:
        board.on_event({"event": "start", "key": "a", "worker": 0})
    assert read_signs(tmp_path) == []


def test_every_state_has_its_line(tmp_path, capsys):
    done, runs, stale, waits, queued, diverged, failed, again = rows = make_rows(8)
    results, workdir = tmp_path / "results", tmp_path / "work"
    save(done, results, "completed", seconds=10.0)
    save(diverged, results, "diverged", diverged_at_step=40)
    save(failed, results, "failed", reason="out of [paper]")
    save(again, results, "failed", reason="an earlier call's")
    (workdir / "checkpoints" / stale.run_id / "30").mkdir(parents=True)
    now = time.time()
    signs = signs_folder(workdir)
    signs.mkdir()

    def sign(name, row, step, **about):
        pack = {**progress_event(row, step), "since": now - 20, "progressed": now - 4, "first_step": 0, "worker": 0}
        about = {"schema": 1, "host": "elsewhere", "pid": 1, "started": now, "packs": [pack], "updated": now, **about}
        (signs / f"{name}.json").write_text(json.dumps(about))

    sign("a", runs, 50, job="12_3")
    sign("b", stale, 35, updated=now - 600)
    sign("c", again, 0, host=platform.node(), pid=os.getpid())
    sign("d", done, 100, ended={"event": "done"})
    (signs / "e.json").write_text('{"schema": 1, ')  # half of a file
    out = shown(capsys, rows, tmp_path, queued={queued.run_id: "job 12_4 pending (Priority)"})
    assert "8 cells: 1 completed, 2 running, 3 waiting, 1 diverged, 1 failed; about" in out
    lines = {line.split()[0]: re.sub(" +", " ", line) for line in out.splitlines() if line}
    assert "running step 50 of 100 loss 2.5000 4" in lines[runs.run_id]
    assert "elsewhere, job 12_3" in lines[runs.run_id]
    assert "stale saved at step 30 no sign from elsewhere for 10:00" in lines[stale.run_id]
    assert lines[waits.run_id].split()[2:] == ["waiting"]
    assert "waiting job 12_4 pending (Priority)" in lines[queued.run_id]
    assert "diverged at step 40" in lines[diverged.run_id]
    assert "failed out of [paper]" in lines[failed.run_id]
    assert "running" in lines[again.run_id]
    assert done.run_id not in lines
    # Equal cells: 10 s for the one that is done, 16 s for half of a running one: 26 s for 1.5 cells. Two workers have
    # half a cell and a whole one; three whole ones wait, and .7 of one: .5 + 1 + 1 beside 1 + 1 + .7.
    left = re.search(r"about (\d+) s left", out)
    assert int(left[1]) == pytest.approx(2.7 * 26 / 1.5, abs=0.6)


def a_family(results, workdir, at):
    """Trunk of 1,000 steps, at ``at``; branches of 300 and 600 steps, at 240 and 480; one of 100 that is done: its own
    20 steps took 10 s. So a step takes .5 s."""
    optim = OptimConfig(1e-2, 100)
    cells = [Cell(RunConfig(MODEL, optim, Horizon(steps=steps), 4)) for steps in (100, 300, 600, 1000)]
    rows = table.rows(cells)
    record = failed_record(rows[0], "s", "").__dict__
    timing = {"seconds": 10.0, "branched_from": rows[3].run_id, "branch_step": 80}
    records.save(results, records.RunRecord(**{**record, "status": "completed", "timing": timing, "loss": 2.5}))
    for row in rows[1:3]:
        branch = row.plan.num_steps * 4 // 5
        if branch <= at:
            (workdir / "checkpoints" / row.run_id / str(branch)).mkdir(parents=True)
    now = time.time()
    pack = {**progress_event(rows[3], at), "num_steps": 1000, "since": now - 0.5 * at, "progressed": now}
    sign = {"schema": 1, "host": "elsewhere", "pid": 1, "started": now, "updated": now}
    signs_folder(workdir).mkdir(parents=True)
    sign["packs"] = [{**pack, "first_step": 0, "worker": 0}]
    (signs_folder(workdir) / "a.json").write_text(json.dumps(sign))
    return rows


@pytest.mark.parametrize(
    "at, have_trunks, seconds",
    [
        (200, True, 490),  # one worker: (800 + 60 + 120 steps) · .5 s
        (300, True, 440),
        (500, True, 340),
        (200, False, 850),  # as if each trained alone: 800 + 300 + 600
    ],
)
def test_time_left_of_a_family_is_that_of_its_own_steps(tmp_path, capsys, at, have_trunks, seconds):
    rows = a_family(tmp_path / "results", tmp_path / "work", at)
    out = shown(capsys, rows, tmp_path, have_trunks=have_trunks)
    assert "4 cells: 1 completed, 1 running, 2 waiting; about" in out
    assert f"about {numbers.duration(seconds)} left" in out
    lines = {line.split()[0]: re.sub(" +", " ", line) for line in out.splitlines() if line}
    for row, branch in zip(rows[1:3], (240, 480)):
        waits = f"branches off {rows[3].run_id} at step {branch}"
        assert (waits in lines[row.run_id]) == (have_trunks and branch > at)
        assert (f"saved at step {branch}" in lines[row.run_id]) == (branch <= at)


def test_time_left_waits_for_the_trunk_to_get_there(tmp_path, capsys):
    """The trunk has 400 s to go, the branches, 60 and 30 s long, can begin in 140 and 20 s. A second worker is at a run
    of its own for 450 s: 400 + 60 beside 450 + 30; or for 50 s: both branches fit beside the trunk."""
    results, workdir = tmp_path / "results", tmp_path / "work"
    rows = a_family(results, workdir, 200)
    (other,) = table.rows([Cell(RunConfig(MODEL, OptimConfig(1e-2, 100), Horizon(steps=1200), 4, seed=9))])
    path = signs_folder(workdir) / "a.json"
    sign = json.loads(path.read_text())
    now = sign["updated"]
    pack = {**progress_event(other, 300), "num_steps": 1200, "since": now - 150, "progressed": now, "first_step": 0}
    path.write_text(json.dumps({**sign, "packs": [*sign["packs"], pack | {"worker": 1}]}))
    assert "about 8:00 left" in shown(capsys, [*rows, other], tmp_path)
    path.write_text(
        json.dumps({**sign, "packs": [*sign["packs"], pack | {"worker": 1, "step": 1100, "since": now - 550}]})
    )
    assert "about 6:40 left" in shown(capsys, [*rows, other], tmp_path)


def test_a_writer_that_died_here_is_known_at_once(tmp_path, capsys):
    (row,) = make_rows(1)
    signs = signs_folder(tmp_path / "work")
    signs.mkdir(parents=True)
    sign = {"schema": 1, "host": platform.node(), "pid": a_dead_process(), "updated": time.time() - 15}
    packs = [{**progress_event(row, 5), "since": 0, "progressed": 0}]
    (signs / "x.json").write_text(json.dumps({**sign, "packs": packs}))
    out = shown(capsys, [row], tmp_path)
    assert "1 cells: 0 completed, 0 running, 1 waiting" in out
    assert "stale" in out
    assert "no sweep is at work on it" in out
    clear_stale(tmp_path / "work")
    assert list(signs.iterdir()) == []


LOOK = """
import sys
from scaling import sweep
sweep.main(["--grid", "g.yaml", "--status"])
assert not {"jax", "pandas", "matplotlib"} & set(sys.modules), "heavy imports"
"""


@pytest.mark.slow
def test_a_look_at_a_sweep_under_way_takes_no_lock_and_no_jax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ENGINE), str(ENGINE.parents[1])]))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.05")
    Path("g.yaml").write_text(
        "recipe: default@1\naxes: {seed: [0, 1, 2, 3]}\nbase: {model: {width: 8}, horizon: {tokens: 300000}}\n"
    )
    command = [sys.executable, str(ENGINE / "driver.py"), "--grid", "g.yaml", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(lambda: [s for s in read_signs(Path(".scaling/g")) if "step" in str(s["packs"])])

        def look():
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            out = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)
            assert out.returncode == 0, out.stderr
            return out.stdout, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

        out, seconds = look()
        assert "4 cells: 0 completed, 2 running, 2 waiting" in out
        assert len(re.findall(rf"step \d+ of .* {re.escape(platform.node())}, process {process.pid}, worker", out)) == 2
        assert f"held by process {process.pid} on {platform.node()}" in out
        assert "logs: .scaling/g/logs" in out
        assert seconds < 2  # of a processor: what others do on this machine is theirs
        process.send_signal(signal.SIGKILL)
        process.wait()
        sign = read_signs(Path(".scaling/g"))[0]  # as if ten seconds had gone by
        old = {k: v for k, v in sign.items() if k not in ("path", "alive")} | {"updated": sign["updated"] - 10}
        sign["path"].write_text(json.dumps(old))
        out, _ = look()
        assert "0 running, 4 waiting" in out
        assert out.count("stale") == 2
        assert "no sweep is at work on it" in out
    finally:
        process.kill()
        process.wait()


def test_status_of_a_bad_grid_is_one_line(tmp_path, capsys):
    assert sweep.main(["--grid", str(tmp_path / "none.yaml"), "--status"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def _wait(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
