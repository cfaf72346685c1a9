"""Several processes that train each run together: that they agree before the first step, and that none waits for ever.

Each test starts processes that join by ``jax.distributed``, around a loop that computes nothing.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling.config import DataConfig

ENGINE = Path(__file__).parent
HOST = """
import sys
from pathlib import Path
from scaling import records
from scaling.fields import to_dict
from scaling.engine.run import hosts, tasks
from scaling.training import distributed
from tests.engine import test_hosts as t

distributed._POLL_SECONDS, distributed.DEAF_SECONDS, distributed.FAILED_SECONDS = 0.5, 3, 2
process, processes, port, cache, source = int(sys.argv[1]), 2, sys.argv[2], Path(sys.argv[3]), sys.argv[4]
seeds = [int(seed) for seed in sys.argv[5].split(",")]
if sys.argv[6:]:
    versions = records.software()
    records.software = lambda: {**versions, "versions": {**versions["versions"], "optax": sys.argv[6]}}
group = distributed.join(distributed.parse(f"coordinator=localhost:{port},processes=2,process={process}"))
if process:
    code = hosts.follow(group, cache, loop="stubborn_loop")
else:
    leader, code = hosts.Leader(group, loop="stubborn_loop"), 0
    try:
        answers = leader.run([t.task(seed, cache, source) for seed in seeds], lambda e: print(e["event"], flush=True))
        print({key: answer.reason for key, answer in answers.items()}, flush=True)
    except tasks.ExecutorError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    group.publish({"stop": code})
group.leave()
sys.exit(code)
"""


def task(seed, cache, source):
    from scaling.config import Horizon, OptimConfig, RunConfig
    from scaling.engine.run import tasks, worker
    from scaling.execution import ExecutionConfig
    from scaling.families.transformer import TransformerConfig
    from scaling.fields import to_dict
    from scaling.grid import Cell

    model = TransformerConfig(d_model=16, num_layers=2, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=64)
    config = DataConfig(source=source, seq_len=32)
    run = RunConfig(model, OptimConfig(1e-2, 100), Horizon(steps=10), batch_size=4, seed=seed, data=config)
    payload = {"cells": [worker.cell_to_json(Cell(run))], "execution": to_dict(ExecutionConfig()), "sweep_name": "s"}
    payload |= {"workdir": str(cache / "work"), "results": str(cache / "results"), "cache_dir": str(cache)}
    return tasks.Task(run.run_id, "train", payload)


class Pair:
    """Two such processes."""

    def __init__(self, folder, caches, seeds="0", versions=("", ""), homes=(None, None)):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = str(s.getsockname()[1])
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ENGINE.parents[1]}:{ENGINE}"}
        self.processes = []
        for i in range(2):
            source = "text:text" if homes[i] else f"text:{folder / 'text'}"
            command = [sys.executable, "-c", HOST, str(i), port, str(caches[i]), source, seeds]
            command += [versions[i]] * bool(versions[i])
            self.processes.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=homes[i]
                )
            )

    def end(self, seconds=120):
        """(exit code, what it printed, its errors), of each."""
        try:
            out = [p.communicate(timeout=seconds) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()
        return [(p.returncode, *texts) for p, texts in zip(self.processes, out)]


@pytest.fixture
def caches(tmp_path):
    """Two hosts' caches of one corpus."""
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(str((i * 7919 + j * j) % 997) for j in range(300)))
    return [tmp_path / "cache 0", tmp_path / "cache 1"]


def errors_of(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_each_host_prepares_what_it_has_not_and_all_go_on(tmp_path, caches):
    (code, out, _), (other, _, _) = Pair(tmp_path, caches).end()
    assert (code, other) == (0, 0)
    assert out.split("\n")[:2] == ["start", "done"]
    manifests = [json.loads(p.read_text()) for cache in caches for p in cache.rglob("manifest.json")]
    assert len(manifests) == 2


@pytest.mark.slow
def test_hosts_with_different_data_do_not_begin(tmp_path, caches):
    homes = [tmp_path / "host 0", tmp_path / "host 1"]
    for home in homes:
        shutil.copytree(tmp_path / "text", home / "text")
    (homes[1] / "text" / "3.txt").write_text("another text " * 99)
    (code, out, errors), (other, _, others) = Pair(tmp_path, caches, homes=homes).end()
    assert (code, other) == (2, 2)
    assert "start" not in out
    (said,) = errors_of(errors)
    assert said.startswith("error: process 0 has data text:text in windows of 32 ")
    assert said.endswith("prepare the data once, in a SCALING_CACHE that all see, or copy it")
    assert [line.partition("process 1 of 2: ")[2] for line in errors_of(others)] == [said.removeprefix("error: ")]


@pytest.mark.slow
def test_hosts_with_different_software_do_not_begin(tmp_path, caches):
    (code, out, errors), (other, _, _) = Pair(tmp_path, caches, versions=("", "0.0.1")).end()
    assert (code, other) == (2, 2)
    assert "start" not in out
    assert errors_of(errors)[0].endswith("process 1 has 0.0.1: install the same on every host")


@pytest.mark.slow
def test_a_host_that_cannot_prepare_is_named(tmp_path, caches):
    caches[1].write_text("a file where the cache is to be")
    (code, out, errors), (other, _, others) = Pair(tmp_path, caches).end()
    assert (code, other) == (2, 2)
    assert "start" not in out
    assert "error: process 1: " in errors
    assert "cache 1" in errors_of(errors)[0]
    assert "cache 1" in errors_of(others)[0]


@pytest.mark.slow
def test_what_one_process_cannot_do_the_others_do_not_wait_for(tmp_path, caches):
    (code, out, errors), (other, _, others) = Pair(tmp_path, caches, seeds="0,1").end()  # within its time
    assert code == 3
    assert other != 0
    assert out.split("\n")[:3] == ["start", "done", "start"]
    assert "process 0 of 2 stops: process 1 could not do its part: its disk holds half a corpus" in errors
    assert "error: process 1 of 2: its disk holds half a corpus" in others


@pytest.mark.slow
def test_told_to_end_in_a_computation_that_hears_nothing_it_ends(tmp_path, caches):
    pair = Pair(tmp_path, caches, seeds="2")
    assert pair.processes[0].stdout.readline() == "start\n"
    time.sleep(2)  # inside
    pair.processes[0].send_signal(signal.SIGTERM)
    (code, _, errors), (other, _, _) = pair.end()
    assert code == 3
    assert "it was told to end, and has been waiting for the others for 3 seconds" in errors
    assert other != 0
