"""A training loop with the interface of ``scaling.training.loop`` and none of its arithmetic: a run is a chain of
hashes, checkpointed after every step, so that any lost, repeated or reordered step changes the record. A step takes
``FAKE_STEP_SECONDS``, asked for at each: in a test's own process another test may have imported this first."""

import hashlib
import json
import math
import os
import threading
import time
from pathlib import Path

from scaling import accounting, fields, records

stop_requested = threading.Event()


class Interrupted(Exception):
    pass


def step_seconds():
    return float(os.environ.get("FAKE_STEP_SECONDS", "0.01"))


def calibrate(run, execution, cache_dir, seconds, num_members=1):
    if "FAKE_CALIBRATE_SAYS" in os.environ:
        raise ValueError(os.environ["FAKE_CALIBRATE_SAYS"])
    return {
        "step_seconds": step_seconds(),
        "eval_seconds": 0.0,
        "curve_eval_seconds": 0.0,
        "compile_seconds": 0.0,
    }


def train(cells, *, execution, workdir, results, cache_dir, sweep_name, on_event, riders=None):
    done = []
    for cell in cells:
        note = Path(workdir) / "log.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        with open(note, "a") as f:
            f.write(f"{cell.run.run_id} {os.getpid()}\n")
        misbehave(cell, workdir)
        carried = (riders or {}).get(cell.run.run_id, [])
        done.append(train_one(cell, carried, workdir, sweep_name, on_event))
        records.save(results, done[-1])
    return done


def misbehave(cell, workdir):
    """The label ``bad`` of a cell says what goes wrong with it."""
    bad = cell.labels.get("bad")
    if bad == "dies":
        os.kill(os.getpid(), 9)
    if bad == "dies once":
        flag = Path(workdir) / "died"
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), 9)
    if bad == "hangs once":
        mark = Path(workdir) / "hung"
        if not mark.exists():
            mark.write_text("")
            time.sleep(600)
    if bad == "raises":
        raise RuntimeError("out of paper")
    if bad == "refuses":
        raise ValueError("another fingerprint")


def flat_steps(cell):
    return accounting.flat_steps(cell.run, accounting.plan(cell.run))


def train_one(cell, riders, workdir, sweep_name, on_event):
    plan = accounting.plan(cell.run)
    state, started_at = chain(cell, plan, riders, Path(workdir) / "checkpoints", on_event)
    return record(cell, plan, state, started_at, sweep_name)


def chain(cell, plan, riders, folder, on_event):
    """Hashes on from the checkpoint, or from the start: the last hash, and the step that it went on from."""
    run, checkpoint = cell.run, folder / f"{cell.run.run_id}.json"
    # What a family shares, and from the cooldown on the run's own.
    step, state = 0, f"{run.model} {run.seed} {run.batch_size} {plan.warmup_steps} {run.optim.peak_lr}"
    if checkpoint.exists():
        step, state = json.loads(checkpoint.read_text())
    started_at = step
    while step < plan.num_steps:
        own = run.run_id if step >= flat_steps(cell) else ""
        state, step = hashlib.sha256(f"{state}{step}{own}".encode()).hexdigest(), step + 1
        for rider in riders:
            if min(flat_steps(rider), flat_steps(cell)) == step:
                records.write_json(folder / f"{rider.run.run_id}.json", [step, state])
                on_event({"event": "branched", "run_id": rider.run.run_id})
        time.sleep(step_seconds())
        records.write_json(checkpoint, [step, state])
        if stop_requested.is_set():
            raise Interrupted
        progress = {"run_ids": [run.run_id], "step": step, "num_steps": plan.num_steps, "loss": 2.0}
        on_event({"event": "progress", **progress})
        if cell.labels.get("bad") == "dies often" and step == started_at + 5:
            time.sleep(0.02)  # until the parent has read of the progress
            os.kill(os.getpid(), 9)
    return state, started_at


def record(cell, plan, state, started_at, sweep_name):
    """Near a law in N and D, with noise by the last hash: another history is another loss."""
    diverged = cell.labels.get("bad") == "diverges"
    noise = (int(state[:6], 16) / 16**6 - 0.5) * 1e-3
    loss = 1.0 + 20 / plan.num_params["non_embedding"] ** 0.3 + 30 / plan.num_tokens**0.3 + noise
    steps = sorted({max(1, plan.num_steps * i // 5) for i in range(1, 6)})
    return records.RunRecord(
        run_id=cell.run.run_id,
        status="diverged" if diverged else "completed",
        config=fields.to_dict(cell.run),
        sweep={
            "name": sweep_name,
            "holdout": cell.holdout,
            "recipe": cell.recipe,
            "labels": cell.labels,
            "state": state,
        },
        num_params=plan.num_params,
        num_tokens=plan.num_tokens,
        num_steps=plan.num_steps,
        batch_tokens=plan.batch_tokens,
        unique_tokens=10**7,
        epochs=plan.num_tokens / 10**7,
        tokens_per_param=plan.tokens_per_param,
        flops=plan.flops,
        loss=None if diverged else loss,
        loss_standard_error=None if diverged else 1e-3,
        bits_per_byte=None if diverged else loss / math.log(2),
        num_eval_tokens=1000,
        diverged_at_step=plan.num_steps if diverged else None,
        curve={
            "step": steps,
            "num_tokens": [s * plan.batch_tokens for s in steps],
            "loss": [loss + 1 - s / plan.num_steps for s in steps],
            "standard_error": [1e-3 for _ in steps],
            "num_eval_tokens": [1000 for _ in steps],
            "train_loss": [loss for _ in steps],
            "learning_rate": [1e-3 for _ in steps],
            "grad_norm": [1.0 for _ in steps],
        },
        data={
            "source": "fake",
            "tokenizer": "bytes",
            "fingerprint": "0" * 64,
            "train_tokens": 10**7,
            "validation_tokens": 1000,
            "tokens_per_byte": 1.0,
        },
        timing={
            "seconds": step_seconds() * plan.num_steps,
            "step_seconds": step_seconds() * plan.num_steps,
            "started_at": started_at,
        },
    )
