"""Machines that die, disks that fill up, files that break: the records are those of a sweep that nobody disturbed.

At length: ``CHAOS_KILLS=120 CHAOS_SCALE=5 pytest tests/test_chaos.py -n 0 -s -k real_runs``.
"""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from scaling import records
from scaling.engine.folder.signs import read_signs
from tests import babble

ENGINE = Path(__file__).parent / "engine"
KILLS = int(os.environ.get("CHAOS_KILLS", "4"))
SCALE = float(os.environ.get("CHAOS_SCALE", "1"))  # of the real runs' length
SEED = int(os.environ.get("CHAOS_SEED", "0"))
CHECKPOINT_SECONDS = 1.0

REAL_GRID = f"""
recipe: default@1
base:
  data: {{source: "text:text", seq_len: 32, validation_fraction: 0.2}}
  eval: {{num_points: 5, curve_tokens: 1024}}
isoflop:
  rule: exact
  sizes: [8, 16, 24]
  budgets: [{4e9 * SCALE:g}, {6e9 * SCALE:g}, {8e9 * SCALE:g}, {1e10 * SCALE:g}, {{flops: {1.6e10 * SCALE:g}, sizes: [16]}}]
holdout: {{budgets: [{1.6e10 * SCALE:g}]}}
fit: {{bootstrap: 20}}
execution: {{checkpoint_seconds: {CHECKPOINT_SECONDS}}}
"""  # noqa: E501
# Two families of six horizons, of which the longest is held out: it rides its trunk, and goes on from where that cools
# down.
TRUNK_STEPS = [round(SCALE * steps) for steps in (600, 900, 1400, 2000, 3000, 4000)]
TRUNKS_GRID = f"""
recipe: default@1
base:
  data: {{source: "text:text", seq_len: 32, validation_fraction: 0.2}}
  batch_size: 8
  optim: {{warmup_tokens: 5120}}
  eval: {{num_points: 5, curve_tokens: 1024}}
axes: {{model.width: [8, 16], horizon.steps: {TRUNK_STEPS}}}
holdout: {{cells: [{{steps: {TRUNK_STEPS[-1]}}}]}}
fit: {{bootstrap: 20}}
execution: {{checkpoint_seconds: {CHECKPOINT_SECONDS}}}
"""
FAKE_GRID = """
recipe: default@1
isoflop: {sizes: [8, 16], budgets: [3e8, 6e8, {flops: 9e8, sizes: [8]}]}
seeds: [0, 1, 2]
holdout: {budgets: [9e8]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a grid of small real runs, their text, and a grid whose cells train hashes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ENGINE), str(ENGINE.parents[1])]))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as where such sweeps run
    babble.write("text")
    Path("real.yaml").write_text(REAL_GRID)
    Path("trunks.yaml").write_text(TRUNKS_GRID)
    Path("fake.yaml").write_text(FAKE_GRID)
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def real(here, cache, monkeypatch):
    """For sweeps of real runs: they prepare one text, and compile the programs of equal cells once."""
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("SCALING_CACHE", str(cache))
    return here


class Sweep:
    """The command over one results folder, again and again. ``grid``: "real", "trunks", or "fake" for a loop of
    hashes."""

    def __init__(self, grid, name, *argv):
        self.results, self.workdir = Path("results") / name, Path(".scaling") / name
        self.counts = Path("counts") / name
        self.counts.mkdir(parents=True)
        program = ENGINE / ("driver.py" if grid == "fake" else "chaos_loop.py")
        self.command = [sys.executable, str(program), "--grid", f"{grid}.yaml", "--workers", "2"]
        self.command += ["--results", str(self.results), "--workdir", str(self.workdir), *argv]
        self.output = Path(f"{name}.txt")

    def start(self):
        environment = {**os.environ, "CHAOS_COUNTS": str(self.counts)}
        with open(self.output, "ab") as out:
            return subprocess.Popen(self.command, stdout=out, stderr=out, env=environment)

    def run(self):
        """Runs the command to its end; (exit code, what it printed)."""
        before = self.output.stat().st_size if self.output.exists() else 0
        code = self.start().wait(timeout=900)
        return code, self.output.read_bytes()[before:].decode()

    def is_training(self):
        signs = [s for s in read_signs(self.workdir) if s["alive"]]
        return any("step" in pack for s in signs for pack in s["packs"])

    @property
    def science(self):
        """The records but for where and how fast they were made."""
        return [dataclasses.replace(r, environment={}, timing={}) for r in records.load_records(self.results)]

    @property
    def steps(self):
        return sum(int.from_bytes(p.read_bytes(), "little") for p in self.counts.iterdir())

    def assert_no_checkpoint_left(self):
        """Not those that branches began from either; those of a call that was killed at its very end are removed by the
        next, which has nothing else to do."""
        folder = self.workdir / "checkpoints"
        if list(folder.iterdir()):
            code, out = self.run()
            assert code == 0, out
            assert " 0 to do" in out, out
        assert not list(folder.iterdir())

    def assert_each_cell_once(self):
        manifest = json.loads((self.results / "sweep.json").read_text())
        ended = [run_id for call in manifest["calls"] for run_id in call["cells"]]
        done = [run_id for run_id in ended if ended.count(run_id) == 1]
        assert len(done) + len(self.told_again()) >= len(set(ended))
        assert {c["status"] for c in manifest["cells"]} == {"completed"}
        assert sorted(c["run_id"] for c in manifest["cells"]) == [r.run_id for r in self.science]
        assert not list(self.results.rglob("*.tmp"))

    def told_again(self):
        """Cells that failed in one call, after too many kills in a row, and were done by a later one."""
        text = self.output.read_text()
        return {r.run_id for r in self.science if any(r.run_id in x and "failed" in x for x in text.splitlines())}


def children_of(process):
    """Process ids of the workers: children that are Python and not, say, git."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if b"scaling.engine.run.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def is_alive(pid):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


VICTIMS = ("worker", "parent", "asked", "worker", "parent", "worker", "worker")  # in turn


@dataclasses.dataclass
class Kills:
    """What was done to a sweep; a parent takes all its workers with it, and one that is asked to end lets them save."""

    parents: int = 0
    workers: int = 0
    asked: int = 0
    workers_lost: int = 0

    @property
    def total(self):
        return self.parents + self.workers + self.asked


@functools.cache
def undisturbed(grid):
    """(records, steps trained, seconds of training a step) of the sweep that nobody disturbs, run once a process."""
    calm = Sweep(grid, "calm")
    assert calm.run()[0] == 0, calm.output.read_text()[-2000:]
    assert len(calm.science) >= 12
    seconds = sum(r.timing["step_seconds"] for r in records.load_records(calm.results))
    return calm.science, calm.steps, seconds / max(calm.steps, 1)


def complete_under_fire(sweep, dice, kills, limit, mean_seconds):
    """Runs ``sweep`` to its end; until ``limit`` kills are done, kills a worker or the parent or asks it to end, in
    turn and at random moments. A command that ends with failed cells, or because no worker lived long enough to
    start, is given again, as a person would."""
    process = sweep.start()
    while True:
        if dice.random() < 0.9:  # the rest hit a sweep that has not begun to train
            wait(lambda process=process: process.poll() is not None or sweep.is_training(), seconds=300)
        try:
            code = process.wait(dice.expovariate(1 / mean_seconds) if kills.total < limit else 900)
        except subprocess.TimeoutExpired:
            workers = children_of(process)
            victim = VICTIMS[kills.total % len(VICTIMS)]
            if workers and victim == "worker":
                with suppress(ProcessLookupError):
                    os.kill(dice.choice(workers), signal.SIGKILL)
                kills.workers += 1
                kills.workers_lost += 1
                continue
            if victim == "asked":
                process.terminate()
                assert process.wait(120) in (130, 0, 3, -signal.SIGTERM)  # the last: before it has begun to listen
                kills.asked += 1
            else:
                process.kill()
                process.wait()
                kills.parents += 1
                kills.workers_lost += len(workers)
            wait(lambda pids=workers: not any(map(is_alive, pids)))
        else:
            said = sweep.output.read_text()[-2000:]
            assert code in (0, 3) or (code == 2 and "workers do not start (worker killed by signal 9)" in said), said
            if code == 0:
                return
        process = sweep.start()


MOMENTS = ("in a checkpoint", "before the final checkpoint", "before the record", "after the record")
SHORT_GRID = """
recipe: default@1
base:
  data: {source: "text:text", seq_len: 32, validation_fraction: 0.2}
  model: {width: 8}
  batch_size: 8
  horizon: {steps: 400}
  optim: {warmup_tokens: 5120}
  eval: {num_points: 3, curve_tokens: 1024}
seeds: [0, 1]
fit: {bootstrap: 0}
execution: {checkpoint_seconds: 0.3, keep_final_checkpoint: true}
"""


@pytest.mark.slow
def test_killed_at_the_worst_moments_nothing_is_lost(real, monkeypatch):
    """In a checkpoint that is being written, and around the end of a run that keeps its final one: the same command
    again, killed at the next such moment, leaves at last the records of an undisturbed sweep, each with its
    checkpoint, whole."""
    Path("short.yaml").write_text(SHORT_GRID)
    calm, hit, other = (Sweep("short", name) for name in ("calm", "hit", "other"))
    assert calm.run()[0] == 0
    for moment in MOMENTS:
        monkeypatch.setenv("CHAOS_MOMENT", moment)
        assert hit.start().wait(timeout=300) == -signal.SIGKILL, moment
        assert Path("counts", f"died {moment}").exists()
    other.command[other.command.index("--workdir") + 1] = str(hit.workdir)  # another sweep wants the work folder
    code, out = other.run()
    assert code == 2, out
    assert "holds checkpoints of the sweep with its results in" in out, out
    code, out = hit.run()
    assert code == 0, out
    assert "Traceback" not in out
    assert hit.science == calm.science
    shutil.rmtree(next((hit.workdir / "checkpoints").iterdir()))  # as where the flag was set when a run was over
    hit.command.append("--train-unkept")
    assert ", 1 to do" in hit.run()[1]
    assert hit.science == calm.science
    for run in hit.science:
        kept = [path.name for path in (hit.workdir / "checkpoints" / run.run_id).iterdir()]
        assert kept == ["400"]


@pytest.mark.slow
def test_hashes_killed_at_random_moments_are_the_same(here, monkeypatch):
    """Every step of every cell shows in its record, so none was lost, repeated or reordered."""
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    calm, _, _ = undisturbed("fake")
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.02")
    dice, kills, rounds = random.Random(SEED), Kills(), 0
    while kills.total < max(KILLS, 10):
        sweep = Sweep("fake", f"round-{rounds}")
        complete_under_fire(sweep, dice, kills, max(KILLS, 10), mean_seconds=0.5)
        assert sweep.science == calm
        sweep.assert_each_cell_once()
        rounds += 1
    print(f"\n{len(calm)} cells, {rounds} sweeps, {kills}")


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["real", "trunks"])
def test_real_runs_killed_at_random_moments_are_the_same(real, grid):
    """Alone, and where most runs branch off another.

    Work done twice is what was done since the last checkpoint: per worker lost, at most the time between two
    checkpoints and what it takes to write one, as a share of the sweep's worker-seconds."""
    calm, steps, step_seconds = undisturbed(grid)
    dice, kills, rounds, redone = random.Random(SEED), Kills(), 0, 0
    begin = time.monotonic()
    while kills.total < KILLS:
        sweep = Sweep(grid, f"round-{rounds}")
        complete_under_fire(sweep, dice, kills, KILLS, mean_seconds=3.0)
        assert sweep.science == calm
        sweep.assert_each_cell_once()
        sweep.assert_no_checkpoint_left()
        redone += sweep.steps - steps
        rounds += 1
        lost_seconds = redone * step_seconds / kills.workers_lost
        print(
            f"\n{len(calm)} cells, {rounds} sweeps in {time.monotonic() - begin:.0f} s, {kills.parents} parents and "
            f"{kills.workers} workers killed ({kills.workers_lost} workers lost), {kills.asked} asked to end: "
            f"{redone} steps trained twice, {rounds * steps} needed; "
            f"per worker lost {lost_seconds:.2f} s of training, with a checkpoint every "
            f"{CHECKPOINT_SECONDS:g} s",
            flush=True,
        )
    # Half the interval is to be expected, and all of it when a checkpoint that was being written counts for nothing;
    # 110 kills lost 1.24 s each on two cores with a load of 25, where writing takes as long again.
    assert 0 <= lost_seconds < 3 * CHECKPOINT_SECONDS


@pytest.mark.slow
def test_broken_checkpoints_and_records_are_said_and_done_again(real):
    calm, sweep = undisturbed("real")[0], Sweep("real", "broken")

    def checkpoints():
        return [p for p in sweep.workdir.glob("checkpoints/*/*") if p.name.isdigit()]

    process = sweep.start()
    wait(checkpoints, seconds=120)
    workers = children_of(process)
    process.kill()
    process.wait()
    wait(lambda: not any(map(is_alive, workers)))
    broken = checkpoints()
    for path in (p for folder in broken for p in folder.rglob("*") if p.is_file()):
        os.truncate(path, path.stat().st_size // 2)
    code, out = sweep.run()
    assert code == 0, out
    said = "".join(p.read_text() for p in (sweep.workdir / "logs").iterdir())
    assert all(f"{folder}: unreadable checkpoint" in said for folder in map(Path.absolute, broken)), said
    assert sweep.science == calm
    path = records.path_of(sweep.results, sweep.science[3].run_id)
    os.truncate(path, 1000)
    code, out = sweep.run()
    assert code == 0, out
    assert f"{path}: not a readable run record" in out
    assert "13 cells, 1 to do" in out
    assert sweep.science == calm


@pytest.fixture
def small_disk():
    """``small_disk(path, size)`` mounts a tmpfs of ``size`` and returns a function that changes its size."""
    mounted = []

    def mount(path, size, *options):
        path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_full_results_disk_stops_with_one_line_and_then_goes_on(here, small_disk, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    resize = small_disk(here / "results", "64k")
    sweep = Sweep("fake", "full")
    code, out = sweep.run()
    assert code == 3, out
    assert out.splitlines()[-1].startswith("error: [Errno 28] No space left on device"), out
    assert out.splitlines()[-1].endswith("nothing that was finished is lost: mend it and give the same command")
    assert "Traceback" not in out
    assert not list(sweep.results.rglob("*.tmp"))  # halves of files would take what room is left
    resize("8m")
    assert sweep.run()[0] == 0
    _assert_undisturbed(sweep, monkeypatch)


@pytest.mark.slow
def test_full_work_disk_stops_and_then_goes_on(here, small_disk, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    monkeypatch.setenv("SCALING_CACHE", str(here / "cache"))
    resize = small_disk(here / ".scaling", "48k")
    sweep = Sweep("fake", "full")
    code, out = sweep.run()
    assert code == 3, out
    assert "Traceback" not in out
    assert out.splitlines()[-1].startswith("error: [Errno 28] No space left on device"), out
    assert "failed" not in out  # no cell's fault
    resize("8m")
    assert sweep.run()[0] == 0
    _assert_undisturbed(sweep, monkeypatch)


@pytest.mark.slow
def test_read_only_results_are_one_line_and_exit_2(here, small_disk):
    small_disk(here / "results", "48k", "ro")
    code, out = Sweep("fake", "x").run()
    assert code == 2
    assert out == "error: --results results/x: Read-only file system: write a folder that can be written to\n"


@pytest.mark.slow
def test_of_two_sweeps_at_once_the_second_is_told_who_holds_the_folder(here, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.02")
    sweep = Sweep("fake", "two")
    first = sweep.start()
    wait(sweep.is_training)
    code, out = sweep.run()
    assert code == 2
    assert f"held by another sweep: process {first.pid} on " in out
    assert first.wait(timeout=120) == 0
    _assert_undisturbed(sweep, monkeypatch)


def _assert_undisturbed(sweep, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    assert sweep.science == undisturbed("fake")[0]
    assert {r.status for r in sweep.science} == {"completed"}
