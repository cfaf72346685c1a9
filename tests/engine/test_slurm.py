"""Jobs of a Slurm cluster: what is submitted, and a real cluster of one node whose jobs are killed, requeued, left
behind and found again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("submitit", reason="the slurm extra is not installed")

from scaling import grid, records, sweep
from scaling.engine.folder.signs import read_signs
from scaling.engine.run import worker
from scaling.engine.run.tasks import ExecutorError, Task
from scaling.engine.slurm import book as slurm_book
from scaling.engine.slurm import follow, jobs, news
from scaling.engine.slurm.options import parse
from tests.engine import slurm_cluster

HERE = Path(__file__).parent
GRID = """
recipe: default@1
isoflop:
  sizes: [8, 16]
  budgets: [3e8, 6e8, {flops: 1.2e9, sizes: [16]}]
holdout: {budgets: [1.2e9]}
"""
# One family, flat for 16, 32 and 64 steps; the held-out run rides to 64.
TRUNKS = """
recipe: default@1
base: {model: {width: 8}, data: {seq_len: 64}, batch_size: 4, optim: {warmup_tokens: 1024}}
axes: {horizon.steps: [20, 40, 80, 120]}
holdout: {cells: [{steps: 120}]}
"""
BRANCHES = {20: 16, 40: 32, 80: 0, 120: 64}
# The cheapest eight cells begin, and each round buys two more: the driver's laws are none that a design could ask.
ROUNDS = """
recipe: default@1
base: {batch_size: 8, optim: {warmup_tokens: 8192}}
isoflop: {sizes: [8, 16, 24, 32], budgets: [2e9, 4e9, 8e9, {flops: 1.6e10, sizes: [24]}]}
holdout: {budgets: [1.6e10]}
design: {budget_flops: 1e12, batch: 2}
"""
SBATCH_HELP = """
  -L, --licenses=names        required license, comma separated
      --reservation=name      allocate resources from named reservation
"""


# ---- what a person may ask for --------------------------------------------------------------------------------------


@pytest.fixture
def a_login_node(tmp_path, monkeypatch):
    """sbatch and srun on the path, of which sbatch only knows --help."""
    for name in ("sbatch", "srun"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{SBATCH_HELP}\nEND\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_options_become_submitits_parameters(a_login_node):
    options = ["partition=gpu", "gpus-per-node=1", "time=1-02:30", "mem=16G", "reservation=big", "exclusive=true"]
    assert parse([*options, "setup=module load cuda", "setup=export A=b"]) == {
        "partition": "gpu",
        "gpus_per_node": 1,
        "time": 26 * 60 + 30,
        "exclusive": True,
        "setup": ["module load cuda", "export A=b"],
        "signal_delay_s": 90,
        "additional_parameters": {"requeue": True, "mem": "16G", "reservation": "big"},
    }


@pytest.mark.parametrize(
    "text, minutes",
    [("240", 240), ("90:30", 91), ("4:00:00", 240), ("2-0", 2880), ("1-1:1:1", 1502), ("0:30", 1), ("0:0:1", 1)],
)
def test_time_in_each_of_slurms_notations(a_login_node, text, minutes):
    parameters = parse([f"time={text}"])
    assert parameters["time"] == minutes
    assert 0 < parameters["signal_delay_s"] <= minutes * 15


@pytest.mark.parametrize(
    "option, says",
    [
        ("partitoin=gpu", "did you mean partition"),
        ("lisences=x", "did you mean licenses"),
        ("gpu", "write KEY=VALUE"),
        ("nodes=2", "one process on one node here: write nodes=1"),
        ("ntasks_per_node=8", "write ntasks_per_node=1"),
        ("time=four hours", "write minutes, H:M:S or D-H:M:S"),
        ("array_parallelism=4", "write --workers N"),
        ("qwxyz=4", "see sbatch --help"),
    ],
)
def test_bad_options_are_one_line(a_login_node, option, says):
    with pytest.raises(ValueError, match=says) as e:
        parse([option])
    assert "\n" not in str(e.value)


def test_without_a_cluster_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "g.yaml").write_text(GRID)
    assert sweep.main(["--grid", str(tmp_path / "g.yaml"), "--executor", "slurm"]) == 2
    assert "no sbatch here" in capsys.readouterr().err
    assert sweep.main(["--grid", str(tmp_path / "g.yaml"), "--slurm", "time=2"]) == 2
    assert "--slurm: write --executor slurm with it" in capsys.readouterr().err


def test_a_time_limit_too_short_for_any_progress_ends_the_requeues():
    ended, fates = {}, []
    for furthest in (10, 20, 20, 20, 20):
        ended = jobs._requeued(furthest, ended)
        fates.append(ended["event"])
    assert fates == ["requeued"] * 4 + ["failed"]
    assert "write a longer --slurm time" in ended["reason"]


class Desk:
    """sbatch and squeue of a cluster that takes every job and starts none."""

    def __init__(self):
        self.taken = []  # (name of the function, how many jobs, what they wait for)

    def update_parameters(self, **parameters):
        self.dependency = parameters.get("dependency")

    def map_array(self, function, orders):
        self.taken.append((function.__name__, len(orders), self.dependency))
        number = str(100 * len(self.taken))
        return [SimpleNamespace(job_id=f"{number}_{i}" if len(orders) > 1 else number) for i in range(len(orders))]

    def submit(self, function, order):
        return self.map_array(function, [order])[0]

    def queue(self, names, patience=0):
        return {
            f"{100 * (i + 1)}_{k}" if count > 1 else f"{100 * (i + 1)}": ("PENDING", "")
            for i, (function, count, _) in enumerate(self.taken)
            for k in range(count)
        }


def test_detached_submits_what_waits_behind_what_it_waits_for(tmp_path, monkeypatch):
    desk = Desk()
    monkeypatch.setattr("submitit.SlurmExecutor", lambda *args, **options: desk)
    monkeypatch.setattr(news, "queue", desk.queue)
    monkeypatch.setattr(slurm_book, "queue", desk.queue)
    cells = {c.run.horizon.steps: c for c in grid.expand(yaml.safe_load(TRUNKS), name="g").cells}

    def task(steps, **waits):
        payload = {"cells": [worker.cell_to_json(cells[steps])], "results": str(tmp_path / "results")}
        return Task(cells[steps].run.run_id, "train", payload, **waits)

    tasks = [task(80, releases=("a", "b")), task(120), task(20, after=("a",)), task(40, after=("b",))]

    def submit():
        parameters = {"dependency": "singleton"}
        with pytest.raises(jobs.Detached) as said:
            jobs.Slurm(tmp_path / "work", parameters, name="g", detach=["--grid", "g.yaml"]).run(tasks)
        return str(said.value)

    assert submit() == "jobs 100 200"
    expected = [
        ("job", 2, "singleton"),
        ("job", 2, "singleton,afterany:100_0"),
        ("follow", 1, "singleton,afterany:100:200"),
    ]
    assert desk.taken == expected
    assert submit() == "jobs 100 200"  # nothing twice
    assert desk.taken == expected


# ---- a real cluster -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if slurm_cluster.missing():
        pytest.skip(slurm_cluster.missing())
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield environment


@pytest.fixture
def here(cluster, tmp_path, monkeypatch):
    """A folder with a grid on a machine of the cluster; the sweep trains hashes, and asks Slurm often."""
    for key, value in cluster.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.1")
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(news, "ASK_SECONDS", 0.5)
    import driver

    driver.install(monkeypatch.setitem, lambda *args: monkeypatch.setattr(*args, raising=False))
    Path("g.yaml").write_text(GRID)
    return tmp_path


SLURM = ("--executor", "slurm", "--slurm", "partition=main", "time=10")


def run(*argv):
    return sweep.main(["--grid", "g.yaml", *argv], loop="fake_loop")


def science(folder="results/g"):
    return [dataclasses.replace(r, environment={}, timing={}) for r in records.load_records(folder)]


def assert_as_inline():
    disturbed = science()
    os.environ["FAKE_STEP_SECONDS"] = "0"  # the fixture puts it back
    assert run("--results", "results/h", "--workdir", ".scaling/h", "--executor", "inline") == 0
    assert disturbed == science("results/h")


def begun():
    """Run ids in the order their training was begun."""
    log = Path(".scaling/g/log.txt")
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def signs_under_way():
    """Signs of jobs that have trained some steps."""
    signs = [s for s in read_signs(Path(".scaling/g")) if "ended" not in s]
    return [s for s in signs if any(p.get("step") for p in s["packs"])]


def wait(condition, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return value


@pytest.mark.slow
def test_a_job_killed_and_a_job_requeued_leave_the_records_of_an_inline_sweep(here, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.15")  # jobs of seconds: on a loaded machine shorter ones go unseen
    done = []

    def disturb():
        first = wait(signs_under_way)[0]
        # Not by scancel --signal: told to try again later, it does, and so signals the requeued job once more.
        os.kill(first["pid"], signal.SIGUSR2)
        done.append(("requeued", first["packs"][0]["key"]))
        second = wait(lambda: [s for s in signs_under_way() if s["job"] != first["job"]])[0]
        os.kill(second["pid"], signal.SIGKILL)
        done.append(("killed", second["packs"][0]["key"]))

    thread = threading.Thread(target=disturb)
    thread.start()
    assert run(*SLURM) == 0
    thread.join()
    out = capsys.readouterr().out
    assert "was requeued; goes on from its last checkpoint" in out
    assert "failed without an answer" in out
    assert [what for what, _ in done] == ["requeued", "killed"]
    for _, key in done:
        assert begun().count(key) == 2
    assert len(begun()) == 5 + 2
    cells = grid.load("g.yaml").cells
    assert begun()[-1] == cells[-1].run.run_id  # held out: after its forecast
    assert not list(Path(".scaling/g/slurm").glob("*.json"))  # nothing is left to follow
    assert not list(Path(".scaling/g/status").glob("*.json"))
    assert list(Path(".scaling/g/slurm/jobs").glob("*_log.err"))
    assert_as_inline()


@pytest.mark.slow
def test_detached_jobs_and_those_of_a_killed_parent_are_found_again(here, capsys):
    assert run(*SLURM, "--detach", "--workers", "1") == 0
    out = capsys.readouterr().out
    assert "submitted: job" in out
    assert run() == 2  # not twice at once
    assert "jobs of an earlier call are queued or running" in capsys.readouterr().err
    wait(signs_under_way)
    assert run("--status") == 0
    out = capsys.readouterr().out
    assert "1 running, 4 waiting" in out
    assert "pending" in out
    command = [sys.executable, str(HERE / "driver.py"), "--grid", "g.yaml", *SLURM]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(3)
    process.kill()
    process.wait()
    assert run(*SLURM) == 0
    assert len(begun()) == 5  # each cell once: nobody submitted it again
    assert_as_inline()


def assert_branched():
    """Each rider began where it leaves its trunk, and each run once."""
    assert {r.num_steps: r.timing["started_at"] for r in records.load_records("results/g")} == BRANCHES
    assert len(begun()) == len(set(begun())) == 4
    fitted = {r.run_id for r in records.load_records("results/g") if not r.sweep["holdout"]}
    assert set(begun()[:3]) == fitted  # the other after its forecast


@pytest.mark.slow
def test_a_grid_with_trunks(here):
    Path("g.yaml").write_text(TRUNKS)
    assert run(*SLURM) == 0
    assert_branched()
    assert not list(Path(".scaling/g/slurm").glob("*.json"))
    assert_as_inline()


@pytest.mark.slow
def test_detached_jobs_finish_without_another_call(here):
    """What is carried, what is held out, its forecast and the report."""
    Path("g.yaml").write_text(TRUNKS)
    assert run(*SLURM, "--detach") == 0
    assert not Path("results/g/runs").exists()
    wait(Path("results/g/report.html").exists, seconds=120)
    wait(lambda: not slurm_book.Book(Path(".scaling/g")).unfinished())
    assert_branched()
    assert len(json.loads(Path("results/g/forecast.json").read_text())["cells"]) == 1
    assert not list(Path(".scaling/g/slurm").glob("*.json"))
    assert not list(Path(".scaling/g/status").glob("*.json"))
    assert_as_inline()


@pytest.mark.slow
@pytest.mark.parametrize("detached", [False, True])
def test_rounds_of_a_design_are_those_of_an_inline_sweep(here, monkeypatch, detached):
    """Waited for, or each round submitted by the follow-up of the one before it, with no other call."""
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    Path("g.yaml").write_text(ROUNDS)
    assert run(*SLURM, *["--detach"] * detached) == 0
    wait(Path("results/g/report.html").exists)
    wait(lambda: not slurm_book.Book(Path(".scaling/g")).unfinished())
    assert len(begun()) == 13  # each once
    assert_as_inline()
    designs = [json.loads(Path(f"results/{name}/sweep.json").read_text())["design"] for name in "gh"]
    assert [len(one["cells"]) for one in designs[0]["rounds"]] == [8, 2, 2]
    assert designs[0]["stopped"]["reason"].startswith("no interval, and every candidate is bought: no law")
    assert designs[0] == designs[1]


def test_a_follow_up_of_jobs_that_left_no_record_submits_nothing(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    runs.mkdir()
    follow.refuse_in_vain(tmp_path)  # a person's call
    monkeypatch.setenv(follow.RECORDS_BEFORE, "1")
    (runs / "a.json").touch()
    with pytest.raises(ExecutorError, match="left a record: see their logs"):
        follow.refuse_in_vain(tmp_path)
    (runs / "b.json").touch()
    follow.refuse_in_vain(tmp_path)


@pytest.mark.slow
def test_killed_while_it_submits_it_finds_the_array_by_its_name(here):
    assert run(*SLURM, "--detach") == 0
    books = {path: json.loads(path.read_text()) for path in Path(".scaling/g/slurm").glob("*.json")}
    ((path, book),) = ((path, book) for path, book in books.items() if book["tasks"])  # not the follow-up
    path.write_text(json.dumps({**book, "job_id": None}))  # as it is before sbatch has answered
    assert run(*SLURM) == 0
    assert len(begun()) == 5
    assert_as_inline()


@pytest.mark.slow
def test_a_cancelled_job_is_a_failed_cell_and_an_unknown_partition_one_line(here, capsys):
    def cancel():
        subprocess.run(["scancel", wait(signs_under_way)[0]["job"]], check=True)

    thread = threading.Thread(target=cancel)
    thread.start()
    assert run(*SLURM) == 3
    thread.join()
    assert "cancelled without an answer, log: " in capsys.readouterr().out
    assert run(*SLURM) == 0
    assert_as_inline()
    assert run("--results", "x", "--executor", "slurm", "--slurm", "partition=nope") == 2
    err = capsys.readouterr().err
    assert err == "error: sbatch: error: Batch job submission failed: invalid partition specified: nope\n" or (
        err.count("\n") == 1 and "partition" in err
    )


@pytest.mark.slow
def test_the_plan_asks_sbatch_and_submits_nothing(here, capsys):
    assert run("--plan", *SLURM) == 0
    assert "sbatch --test-only: Job " in capsys.readouterr().out
    assert run("--plan", "--executor", "slurm", "--slurm", "partition=nope") == 2
    assert "sbatch --test-only: " in capsys.readouterr().err
    assert slurm_book.queue(["g"]) == {}


REAL_GRID = """
recipe: default@1
base:
  data: {source: "text:text", seq_len: 32, validation_fraction: 0.2}
  eval: {num_points: 5, curve_tokens: 1024}
  batch_size: 8
  optim: {warmup_tokens: 5120}
axes: {model.width: [8, 16], horizon.steps: [500, 1000, 2000]}
fit: {bootstrap: 20}
"""


@pytest.mark.slow
def test_real_runs_requeued_leave_the_records_of_an_inline_sweep(cluster, tmp_path, monkeypatch):
    """Every job, of trunks and of what they carry, is told that its time is up; what it saved then is where its
    second try begins."""
    pytest.importorskip("tensorflow_datasets")
    for key, value in {**cluster, "PYTHONPATH": str(HERE.parents[1]), "XLA_FLAGS": ""}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    Path("g.yaml").write_text(REAL_GRID)
    Path("text").mkdir()
    for i in range(100):
        Path("text", f"{i}.txt").write_text(" ".join(str((i + 7 * k) ** 2) for k in range(400)))
    command = [sys.executable, "-m", "scaling.sweep", "--grid", "g.yaml"]
    process = subprocess.Popen([*command, *SLURM], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told = set()
    while process.poll() is None:
        for job in {sign["job"] for sign in signs_under_way()} - told:
            told.add(job)
            subprocess.run(["scancel", "--signal=USR2", job], check=False, capture_output=True)
        time.sleep(0.1)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert told
    assert "was requeued; goes on from its last checkpoint" in out
    inline = [*command, "--results", "results/h", "--workdir", ".scaling/h", "--executor", "inline"]
    done = subprocess.run(inline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(science()) == 6
    assert science() == science("results/h")
    for name in ("g", "h"):
        assert {r.num_steps: r.timing["branch_step"] for r in records.load_records(f"results/{name}")} == {
            500: 400, 1000: 800, 2000: 0
        }  # fmt: skip
        assert not list(Path(".scaling", name, "checkpoints").iterdir())
