"""An executor that nobody here has heard of, in a dozen lines: ``EXECUTORS`` is all that knows it."""

import concurrent.futures
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling import records, sweep
from scaling.engine import executors
from scaling.engine.run import worker
from scaling.engine.run.executor import Executor
from scaling.engine.run.tasks import Answer, Line

ROOT = Path(__file__).resolve().parents[2]


class Futures(Executor):
    """Tasks in threads of a pool, as many at a time as there are workers."""

    def start(self, workers, lock_fds=()):
        self.pool, self.loop = concurrent.futures.ThreadPoolExecutor(workers), importlib.import_module(self.orders.loop)
        return self

    def run(self, tasks, on_event=lambda event: None):
        line, running, answers = Line(tasks), {}, {}
        while len(answers) < len(tasks):
            while line and (task := line.next()) is not None:
                on_event({"event": "start", "key": task.key, "worker": 0})
                running[self.pool.submit(worker.execute, self.loop, task.command, task.payload, lambda e: None)] = task
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                task = running.pop(future)
                answers[task.key] = Answer(future.result())
                line.release(*task.releases)
                on_event({"event": "done", "key": task.key, "worker": 0})
        return answers

    def close(self):
        self.pool.shutdown(cancel_futures=True)


def main() -> int:
    executors.EXECUTORS["futures"] = Futures
    return sweep.main(sys.argv[1:])


@pytest.mark.slow
def test_the_smoke_grid_on_an_executor_of_ones_own_killed_and_resumed(tmp_path):
    """Only its name in the table: killed in the middle and given again, its records are those of ``inline``, trunks,
    branches and runs that start from a trunk's weights among them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SCALING_CACHE": str(tmp_path / "cache")}
    environment["JAX_PLATFORMS"] = "cpu"
    environment.pop("XLA_FLAGS", None)
    grid = tmp_path / "g.yaml"
    grid.write_text(
        "recipe: none\nbase: {data: {seq_len: 32}, optim: {peak_lr: 0.01, warmup_tokens: 128}, batch_size: 4,\n"
        "  eval: {num_points: 2, curve_tokens: 512, final_tokens: 2048}, model: {width: 8}}\n"
        "axes:\n  horizon.steps: [150, 200, 250]\n  stage: [{label: first, seed: 0},\n"
        "    {label: second, seed: 1, start: {run: {stage: first, steps: 250}}}]\nfit: {by: stage}\n"
    )

    def start(name, executor):
        command = [sys.executable, __file__, "--grid", str(grid), "--results", name, "--workdir", f"{name}-work"]
        command += ["--executor", executor, "--workers", "2"]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kept(name):
        runs = [json.loads(path.read_text()) for path in sorted((tmp_path / name / "runs").glob("*.json"))]
        return [{k: v for k, v in run.items() if k not in ("environment", "timing")} for run in runs]

    plain = start("inline", "inline")
    own = start("own", "futures")
    while own.poll() is None and not list((tmp_path / "own" / "runs").glob("*.json")):
        time.sleep(0.05)
    own.send_signal(signal.SIGKILL)
    own.communicate()
    done = {path.stem for path in (tmp_path / "own" / "runs").glob("*.json")}
    assert 0 < len(done) < 6, own.args
    again = start("own", "futures")
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert plain.wait() == 0, plain.stdout.read()
    plain.stdout.close()
    assert kept("own") == kept("inline")
    assert len(kept("own")) == 6
    assert {r.run_id for r in records.load_records(tmp_path / "own")} >= done


if __name__ == "__main__":
    sys.exit(main())
