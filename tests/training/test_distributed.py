"""Two processes of four virtual devices each: the same losses as one process, after a kill too."""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling import grid, storage
from scaling.training import checkpoint, distributed
from tests import gcs_server

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120
GRID = """
recipe: none
base:
  model: {d_model: 32, num_layers: 2, num_heads: 4, num_kv_heads: 4, head_dim: 8, d_ff: 64}
  data: {source: "text:SOURCE", seq_len: 32}
  optim: {peak_lr: 0.01, warmup_tokens: 1000}
  eval: {num_points: 5, curve_tokens: 1024}
  batch_size: 8
  horizon: {steps: STEPS}
seeds: [0, 1]  # the second never trains, so that the command draws no figures
execution: {mesh: {data: 2, fsdp: 2, tensor: 2}, checkpoint_seconds: 0.5}
fit: {bootstrap: 0}
"""


def test_how_processes_are_named():
    assert distributed.parse("off") is None
    assert distributed.parse("auto") == distributed.Place()
    written = "coordinator=10.0.0.1:1234,processes=2,process=1"
    assert distributed.parse(written) == distributed.Place("10.0.0.1:1234", 2, 1)


@pytest.mark.parametrize(
    "text, says",
    [
        ("yes", r"--distributed yes: write auto, off, or coordinator="),
        ("coordinator=here,processes=2,process=0", r"coordinator is 'here': write host:port"),
        ("coordinator=here:1,processes=two,process=0", r"processes is 'two': write a whole number"),
        ("coordinator=here:1,processes=2,process=2", r"process is 2 of 2: write 0 to 1"),
    ],
)
def test_bad_places_say_what_to_write(text, says):
    with pytest.raises(ValueError, match=says):
        distributed.parse(text)


class Command:
    """``scaling.sweep`` on one or two hosts that share their folders, which are in ``home``."""

    def __init__(self, tmp_path: Path, steps: int, text: str = GRID):
        source = tmp_path / "text"
        if not source.exists():
            source.mkdir()
            for i in range(40):
                words = " ".join(str((i * 7919 + j * j * 31) % 997) for j in range(400))
                (source / f"{i}.txt").write_text(words)
        self.folder = self.home = tmp_path
        self.grid = tmp_path / "grid.yaml"
        self.grid.write_text(text.replace("SOURCE", str(source)).replace("STEPS", str(steps)))

        self.run_id = grid.load(self.grid).cells[0].run.run_id

    def start(self, name: str, hosts: int) -> list[subprocess.Popen]:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        return [self._host(name, hosts, i, port) for i in range(hosts)]

    def _host(self, name: str, hosts: int, i: int, port: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "scaling.sweep", "--grid", self.grid, "--executor", "inline"]
        command += [
            "--only",
            self.run_id,
            "--results",
            self.home / name / "results",
            "--workdir",
            self.home / name / "work",
        ]
        if hosts > 1:
            command += ["--distributed", f"coordinator=localhost:{port},processes={hosts},process={i}"]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(8 // hosts)}
        env |= {"SCALING_CACHE": str(self.folder / "cache"), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def run(self, name: str, hosts: int) -> list[tuple[str, str]]:
        processes = self.start(name, hosts)
        out = [p.communicate(timeout=600) for p in processes]
        assert [p.returncode for p in processes] == [0] * hosts, out
        return out

    def record(self, name: str) -> dict:
        (path,) = (self.home / name / "results" / "runs").glob("*.json")
        return json.loads(path.read_text())

    def step_saved(self, name: str) -> int:
        return checkpoint.newest_step(self.home / name / "work", self.run_id)

    def kill_the_second(self, name: str) -> tuple[int, str, float]:
        """Two hosts, the second killed once there is a checkpoint; the first's exit code and errors, and the seconds it
        took to stop."""
        first, second = self.start(name, hosts=2)
        deadline = time.monotonic() + 300
        while not self.step_saved(name):
            assert time.monotonic() < deadline
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        second.send_signal(signal.SIGKILL)
        died = time.monotonic()
        _, errors = first.communicate(timeout=90)
        second.communicate()
        return first.returncode, errors, time.monotonic() - died


def assert_same_training(one: dict, other: dict) -> None:
    assert one["run_id"] == other["run_id"]
    assert one["curve"]["step"] == other["curve"]["step"]
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    for column in ("loss", "train_loss"):
        assert one["curve"][column] == pytest.approx(other["curve"][column], abs=1e-5)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A folder in which one process has trained the run."""
    command = Command(tmp_path_factory.mktemp("hosts"), STEPS)
    command.run("one", hosts=1)
    return command


@pytest.mark.slow
def test_two_processes_are_one_and_one_may_die(command):
    outputs = command.run("two", hosts=2)
    assert "1 of 2 cells have no record yet" in outputs[0][0]
    # The second host says nothing and writes nothing; the library that connects them talks, on several threads whose
    # lines run into each other.
    assert [line for line in outputs[1][0].splitlines() if not re.search("Gloo|peer ranks", line)] == []
    assert_same_training(command.record("one"), command.record("two"))
    assert command.record("two")["environment"]["num_processes"] == 2

    # The second host dies once there is a checkpoint; the first stops within a minute, with one line.
    code, errors, seconds = command.kill_the_second("killed")
    assert seconds < 60
    assert code != 0
    said = [line for line in errors.splitlines() if line.startswith("error: process 0 of 2 stops: ")]
    assert len(said) == 1, errors
    assert "give the same command" in said[0]

    # On one host it goes on from the checkpoint, with the same batches and the same losses.
    assert 0 < command.step_saved("killed") < STEPS
    command.run("killed", hosts=1)
    assert_same_training(command.record("one"), command.record("killed"))


@pytest.mark.slow
def test_two_processes_tell_pairs_from_the_same_rows(tmp_path):
    """Negatives are rows of the whole batch, most of them another process's."""
    text = GRID.replace("d_ff: 64}", "d_ff: 64, tied_embeddings: true}")
    text = text.replace("batch_size: 8", "batch_size: 16\n  objective: {name: contrastive, negatives: 10, span: 12}")
    command = Command(tmp_path, 40, text)
    command.run("one", hosts=1)
    command.run("two", hosts=2)
    assert_same_training(command.record("one"), command.record("two"))
    assert command.record("one")["measures"] == command.record("two")["measures"]


@pytest.mark.slow
def test_two_processes_and_a_bucket(command):
    """As on a slice of hosts that share no disk: killed, gone on with by both, and the losses of a lone process."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed (extra gcs)")
    one, command = command.record("one"), copy.copy(command)
    with gcs_server.running("bucket") as store:
        command.home = storage.folder("gs://bucket")
        code, errors, _ = command.kill_the_second("two")
        assert code != 0, errors
        assert 0 < command.step_saved("two") < STEPS
        command.run("two", hosts=2)
        assert_same_training(one, command.record("two"))
        assert not [name for name in store.names("bucket") if name.startswith("two/work/")]
