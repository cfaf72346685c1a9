"""Workers that die, fail and are killed: what comes back, and what is left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from scaling import fields, machine, records
from scaling.config import Horizon, OptimConfig, RunConfig
from scaling.engine.run import tasks, worker
from scaling.engine.run import workers as executors
from scaling.engine.run.inline import Inline, stopping_politely
from scaling.engine.run.tasks import Task
from scaling.engine.run.workers import Local
from scaling.execution import ExecutionConfig
from scaling.families.transformer import TransformerConfig
from scaling.grid import Cell

HERE = Path(__file__).parent
MODEL = TransformerConfig(d_model=16, num_layers=2, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=64)


@pytest.fixture(autouse=True)
def fake_loop(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    monkeypatch.syspath_prepend(str(HERE))


def cell(seed, num_steps=12, bad=None):
    run = RunConfig(MODEL, OptimConfig(1e-2, 100), Horizon(steps=num_steps), batch_size=4, seed=seed)
    return Cell(run, labels={"bad": bad} if bad else {})


def task(a_cell, folder):
    payload = {
        "cells": [worker.cell_to_json(a_cell)],
        "execution": fields.to_dict(ExecutionConfig()),
        "workdir": str(folder),
        "results": str(folder / "results"),
        "cache_dir": str(folder),
        "sweep_name": "test",
    }
    return Task(a_cell.run.run_id, "train", payload)


def run_local(cells, folder, workers=2):
    events = []
    executor = Local(workers, folder / "logs", loop="fake_loop")
    try:
        answers = executor.run([task(c, folder) for c in cells], events.append)
    finally:
        executor.close()
    return answers, [e for e in events if e["event"] != "tick"]


def test_cells_cross_the_pipe_unchanged():
    original = Cell(cell(3).run, True, "default@1", {"budget_flops": 3e11, "size": "16x2"})
    crossed = worker.cell_from_json(worker.cell_to_json(original))
    assert crossed == original
    assert crossed.run.run_id == original.run.run_id


def test_inline_and_local_leave_equal_records(tmp_path):
    cells = [cell(seed) for seed in range(3)]
    Inline("fake_loop").run([task(c, tmp_path / "a") for c in cells])
    run_local(cells, tmp_path / "b")
    inline, local = (records.load_records(tmp_path / x / "results") for x in "ab")
    assert inline == local
    assert len(inline) == 3


@pytest.mark.slow
def test_failures_are_answered_and_the_rest_goes_on(tmp_path):
    behaviours = [None, "dies once", "dies", "raises", "refuses", "dies often"]
    cells = {bad: cell(seed, 58 if bad == "dies often" else 12, bad) for seed, bad in enumerate(behaviours)}
    answers, events = run_local(cells.values(), tmp_path)
    reasons = {bad: answers[c.run.run_id].reason for bad, c in cells.items()}
    assert reasons == {
        None: None,
        "dies once": None,
        "dies": "worker killed by signal 9",
        "raises": "RuntimeError: out of paper",
        "refuses": "another fingerprint",
        "dies often": None,  # a death in every five steps, but each try got further
    }
    starts = [e["key"] for e in events if e["event"] == "start"]
    count = {bad: starts.count(c.run.run_id) for bad, c in cells.items()}
    assert count == {None: 1, "dies once": 2, "dies": 3, "raises": 3, "refuses": 1, "dies often": 12}
    undisturbed = tmp_path / "undisturbed"
    Inline("fake_loop").run([task(cell(0), undisturbed)])
    assert records.load_records(undisturbed / "results")[0] == records.read(
        records.path_of(tmp_path / "results", cells[None].run.run_id)
    )


def test_workers_that_cannot_start_are_an_error_with_the_log(tmp_path):
    executor = Local(2, tmp_path / "logs", loop="no_such_loop")
    with pytest.raises(tasks.ExecutorError, match=r"workers do not start.*No module named 'no_such_loop'"):
        executor.run([task(cell(0), tmp_path)])
    executor.close()


def test_no_orphan_survives_its_parent(tmp_path):
    """The parent is killed with a worker busy and one idle: both are gone within two seconds."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_executors as t\n"
        "t.run_local([t.cell(0, num_steps=100_000)], Path(sys.argv[2]))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(HERE), str(tmp_path)], env={**os.environ, "PYTHONPATH": _path()}
    )
    log = tmp_path / "log.txt"
    _wait(lambda: log.exists() and log.read_text().endswith("\n"))
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        pytest.skip("the kernel does not list children")
    pids = children.read_text().split()
    assert len(pids) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait(lambda: not any(_alive(pid) for pid in pids), seconds=2)


def test_close_lets_a_busy_worker_save_its_checkpoint(tmp_path):
    executor = Local(1, tmp_path / "logs", loop="fake_loop")

    def stop(event):
        if event["event"] == "progress" and event["step"] >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.run([task(cell(0, num_steps=100_000), tmp_path)], stop)
    process = executor._pool[0].process
    executor.close()
    assert process.returncode == 0  # it stopped by itself
    assert list((tmp_path / "checkpoints").glob("*.json"))


def test_a_worker_killed_for_memory_says_so(tmp_path, monkeypatch):
    """The kernel counts each of them; its own peak is what the process used, as the kernel told its parent."""
    counted = iter(range(100))
    monkeypatch.setattr(executors.machine, "num_killed_for_memory", lambda: next(counted))
    monkeypatch.setattr(executors.machine, "memory_bytes", lambda: 8_000_000_000)
    dies = cell(0, 12, "dies")
    answers, _ = run_local([dies], tmp_path)
    said = re.fullmatch(
        r"worker killed for want of memory at ([\d.]+) GB of the 8 GB that there are, one of 2: write --workers 1",
        answers[dies.run.run_id].reason,
    )
    assert 0.005 < float(said[1]) < 1  # an interpreter without JAX


@pytest.mark.slow
def test_a_worker_that_says_nothing_is_named_once(tmp_path, monkeypatch):
    """And, killed by whoever reads it, goes on from its last checkpoint. An interpreter that is slow to start on a
    loaded machine says nothing either: what counts as long is short only while the worker hangs."""
    stuck, said, ticks = cell(0, 12, "hangs once"), [], []

    def on_event(event):
        if event["event"] == "said":
            said.append(event["text"])
        if event["event"] == "tick" and (tmp_path / "hung").exists() and len(ticks) < 3:
            ticks.append(event)
            monkeypatch.setattr(executors, "SILENT_SECONDS", 0.0 if len(ticks) < 3 else 900.0)
            if len(ticks) == 3:  # named after the first, and not again after the second
                os.kill(int(re.search(r"kill (\d+)", said[0])[1]), signal.SIGKILL)

    executor = Local(1, tmp_path / "logs", loop="fake_loop")
    try:
        answers = executor.run([task(stuck, tmp_path)], on_event)
    finally:
        executor.close()
    assert answers[stuck.run.run_id].reason is None
    assert len(said) == 1
    assert f"has said nothing of {stuck.run.run_id} for" in said[0]


def test_a_log_that_grew_becomes_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "LOG_BYTES", 10)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "worker-0.log").write_text("of calls long ago\n")
    run_local([cell(0)], tmp_path, workers=1)
    assert (tmp_path / "logs" / "worker-0.old.log").read_text() == "of calls long ago\n"
    assert "long ago" not in (tmp_path / "logs" / "worker-0.log").read_text()


COMPILE = """
import ctypes, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands it down as ignored
from scaling.engine.run import inline
import fake_loop
inline.DEAF_SECONDS = 0.5
def compile(*args, **kwargs):
    print("compiling", flush=True)
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):  # the second never returns, whatever signal comes
        c.pthread_mutex_lock(mutex)
fake_loop.train = compile
from tests.engine import test_executors as t
from pathlib import Path
inline.Inline("fake_loop").run([t.task(t.cell(0), Path(sys.argv[1]))])
"""


@pytest.mark.slow
def test_the_second_ctrl_c_ends_a_compilation(tmp_path):
    env = {**os.environ, "PYTHONPATH": _path()}
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "compiling\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    try:
        with pytest.raises(subprocess.TimeoutExpired):  # once: a step would end, and save
            process.wait(1.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        said = process.communicate()[1]
    assert "interrupted in the middle of a computation" in said


SAVING = """
import sys, time
from pathlib import Path
from scaling.engine.run import inline
import fake_loop
inline.DEAF_SECONDS = 0.2
def train(*args, **kwargs):
    print("training", flush=True)
    while not fake_loop.stop_requested.is_set():
        time.sleep(0.01)
    time.sleep(1.5)  # a checkpoint that takes its time
    print("saved", flush=True)
    raise fake_loop.Interrupted
fake_loop.train = train
from tests.engine import test_executors as t
inline.Inline("fake_loop").run([t.task(t.cell(0), Path(sys.argv[1]))])
"""


@pytest.mark.slow
def test_a_hang_up_beside_a_termination_cuts_no_checkpoint_short(tmp_path):
    """Both come where a session ends; each asks once, and the first was taken in."""
    env = {**os.environ, "PYTHONPATH": _path()}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGHUP)
    out, errors = process.communicate(timeout=30)
    assert out == "saved\n", errors


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(executors, "has_accelerator", lambda: False)
    monkeypatch.setattr(executors.machine, "cores", lambda: [2, 3, 5, 7, 8])
    assert executors.assign_cores(2) == [[2, 3], [5, 7]]
    assert executors.assign_cores(5) == [[2], [3], [5], [7], [8]]
    assert executors.assign_cores(6) == [[2], [3], [5], [7], [8], [2]]
    assert executors.auto_workers(3) == 3
    assert executors.auto_workers(30) == 5
    monkeypatch.setattr(executors, "has_accelerator", lambda: True)
    assert executors.assign_cores(2) is None
    assert executors.auto_workers(30) == 1


@pytest.mark.parametrize("platforms, expected", [("cpu", False), ("cuda,cpu", True), ("tpu", True)])
def test_accelerator_follows_jax_platforms(monkeypatch, platforms, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert machine.has_accelerator() is expected


def test_workers_get_the_malloc_setting_unless_the_person_set_one(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert "arena_max=1" in machine.worker_environment()["GLIBC_TUNABLES"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert machine.worker_environment()["GLIBC_TUNABLES"] == "glibc.malloc.check=1"
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    assert "GLIBC_TUNABLES" not in machine.worker_environment()


def _path():
    return os.pathsep.join([str(HERE), str(HERE.parents[1])])


def _alive(pid):
    """Running or at least not yet reaped by init; a zombie is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_training_in_this_process_is_asked_to_stop_before_it_is_interrupted(signum):
    asked = types.SimpleNamespace(stop_requested=threading.Event())
    before = signal.getsignal(signum)
    try:
        signal.signal(signum, signal.default_int_handler)
        with stopping_politely(asked):
            signal.raise_signal(signum)
            assert asked.stop_requested.is_set()
            with pytest.raises(KeyboardInterrupt):  # a second time: at once
                signal.raise_signal(signum)
        signal.signal(signum, signal.SIG_IGN)
        with stopping_politely(asked):
            signal.raise_signal(signum)
            assert not asked.stop_requested.is_set()
    finally:
        signal.signal(signum, before)
