"""Trains one pack of runs and leaves their records.

    for step in range(state.step, last): dispatch(step), read the metrics of step - 1; evaluate, save when it is time

The host is one step behind the device: reading the metrics of the step just dispatched would stall it. A batch is a
function of its step, so resuming is restoring the state and a number; nothing else has memory but the host's curve,
which is saved with the state.
"""

import dataclasses
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling import accounting, config, records
from scaling.config import ExecutionConfig, RunConfig
from scaling.grid import Cell
from scaling.training import data, memory, sharding, step
from scaling.training.checkpoint import Checkpoints
from scaling.training.logs import StepLogs
from scaling.training.pack import Clock, Member, Pack, eval_steps, finite, to_host

# Set it, and training saves a checkpoint after the step under way and raises Interrupted.
stop_requested = threading.Event()

_PROGRESS_SECONDS = 0.5
# With several processes all must decide alike: process 0's clock decides, asked this often.
_STEPS_BETWEEN_AGREEMENTS = 16


class Interrupted(Exception):
    """Training was asked to stop, and saved where it was."""


def use_compilation_cache(cache_dir: Path) -> None:
    """Compiled programs go to, and come from, ``cache_dir``/xla."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(Path(cache_dir) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pack_id(cells: Sequence[Cell]) -> str:
    """The name of a pack's checkpoints: its run's id, or a hash of its members' ids."""
    ids = [cell.run.run_id for cell in cells]
    return ids[0] if len(ids) == 1 else hashlib.sha256(" ".join(sorted(ids)).encode()).hexdigest()[:12]


def train(
    cells: Sequence[Cell],
    *,
    execution: ExecutionConfig,
    workdir: Path,
    results: Path,
    cache_dir: Path,
    sweep_name: str,
    on_event: Callable[[dict], None] = lambda event: None,
) -> list[records.RunRecord]:
    """Trains one pack from its newest checkpoint, or from the start; saves and returns its records.

    ``cells`` have equal ``step.program_key``. Checkpoints are under ``workdir``; prepared data and compiled programs
    under ``cache_dir``. ``on_event`` is called with {"event": "progress", "run_ids", "step", "num_steps", "loss"} about
    twice a second. Members that already have a record are left out.

    Raises ValueError on a config that the data or the mesh cannot serve, or when a checkpoint was made from other
    data; Interrupted after ``stop_requested`` is set.
    """
    folder = Path(workdir) / "checkpoints" / pack_id(cells)
    done = {c.run.run_id for c in cells if records.is_done(results, c.run.run_id)}
    if len(done) == len(cells):
        if folder.exists() and not execution.keep_final_checkpoint and jax.process_index() == 0:
            shutil.rmtree(folder)  # left by a call that was killed between a record and this
        return []
    keys = {step.program_key(c.run) for c in cells}
    if len(keys) > 1:
        raise ValueError(f"a pack's members must share their shapes: {[c.run.run_id for c in cells]} do not")
    use_compilation_cache(cache_dir)
    run = cells[0].run
    corpus = data.open(run.data, cache_dir)
    corpus.require_vocab(run.model.vocab_size)
    mesh = sharding.make_mesh(execution.mesh)
    with jax.set_mesh(mesh):
        checkpoint_bytes = len(cells) * accounting.plan(run).checkpoint_bytes
        checkpoints = Checkpoints(folder.absolute(), checkpoint_bytes, execution.disk_budget_gb * 1e9)
        try:
            members = [Member(c, accounting.plan(c.run), _logs(c.run, execution, workdir, sweep_name)) for c in cells]
            pack = _start(members, done, corpus, execution, mesh, checkpoints)
            finished = _run(pack, checkpoints, results, sweep_name, on_event)
        except BaseException:
            checkpoints.close()
            raise
        for member in members:
            if member.logs:
                member.logs.close()
        if execution.keep_final_checkpoint:
            checkpoints.keep_newest()
        else:
            checkpoints.delete()
    return finished


def _logs(run: RunConfig, execution: ExecutionConfig, workdir: Path, sweep_name: str) -> StepLogs | None:
    wanted = (execution.tensorboard or execution.wandb) and jax.process_index() == 0
    return StepLogs(execution, run, Path(workdir) / "tensorboard", sweep_name) if wanted else None


def _start(members: list[Member], done: set[str], corpus, execution, mesh, checkpoints) -> Pack:
    """The pack as its newest checkpoint left it, or new; without the members whose record is written."""
    by_id = {m.run.run_id: m for m in members}
    clock = Clock()
    packs: list[Pack] = []

    def abstract_state_for(host: dict):
        if host["fingerprint"] != corpus.fingerprint:
            raise _OtherData(
                f"{checkpoints.folder}: made from data {host['fingerprint'][:12]}, but {members[0].run.data.source!r} "
                f"is now {corpus.fingerprint[:12]}: bring the old data back, or delete that folder to start again"
            )
        clock.seconds = dict(host["seconds"])
        packs[:] = [Pack([by_id[i] for i in host["run_ids"]], corpus, execution, mesh, clock)]
        return packs[0].programs.abstract_state

    restored = checkpoints.restore(abstract_state_for)
    if restored is None:
        pack = Pack([m for m in members if m.run.run_id not in done], corpus, execution, mesh, clock)
        pack.initialise()
        return pack
    state, host = restored
    pack = packs[0]
    for member, saved in zip(pack.members, host["members"], strict=True):
        member.restore(saved)
    pack.state = state
    pack.step = int(to_host(state["step"])[0])
    left = [k for k, m in enumerate(pack.members) if m.run.run_id not in done]
    if len(left) < len(pack.members):
        pack.keep(left)
    return pack


class _OtherData(RuntimeError):
    """Kept apart from ValueError, which a damaged checkpoint raises: this one must not be skipped over."""


def _run(pack: Pack, checkpoints: Checkpoints, results, sweep_name, on_event) -> list[records.RunRecord]:
    finished = []
    while pack.members:
        _run_to(pack, pack.next_boundary, checkpoints, on_event)
        leaving = [
            k for k, m in enumerate(pack.members) if m.plan.num_steps == pack.step or m.diverged_at_step is not None
        ]
        evaluated, num_eval_tokens = None, 0
        if any(pack.members[k].diverged_at_step is None for k in leaving):
            evaluated, num_eval_tokens = pack.evaluate_all()
        for k in leaving:
            record = _record(pack, k, evaluated[k] if evaluated else None, num_eval_tokens, sweep_name)
            if jax.process_index() == 0:
                records.save(results, record)
            finished.append(record)
        if pack.execution.keep_final_checkpoint:
            checkpoints.save(pack.step, pack.state, pack.host_state())
        pack.keep([k for k in range(len(pack.members)) if k not in leaving])
    return finished


def _run_to(pack: Pack, last_step: int, checkpoints: Checkpoints, on_event) -> None:
    """Trains to ``last_step``, or until every member has diverged."""
    pending: dict | None = None
    last_save = last_progress = time.perf_counter()
    marks = {s for m in pack.members for s in eval_steps(m.plan.num_steps, m.run.eval.num_points)}
    pack.clock.start_lap()

    def read() -> None:
        """Waits for the newest dispatched step, and takes its metrics in."""
        nonlocal pending
        if pending is not None:
            metrics_K = {name: to_host(values) for name, values in pending.items()}
            for k, member in enumerate(pack.members):
                member.observe(pack.step, {name: float(values[k]) for name, values in metrics_K.items()})
            pending = None

    while pack.step < last_step and not all(m.diverged_at_step is not None for m in pack.members):
        tokens_KBS = pack.batch(pack.step)
        pack.state, metrics = pack.programs.train(pack.state, tokens_KBS)
        read()
        pack.step += 1
        pending = metrics
        if pack.step in marks:
            read()
            pack.evaluate_curve()
        now = time.perf_counter()
        if now - last_progress > _PROGRESS_SECONDS:
            last_progress = now
            on_event(_progress(pack))
        what = _agreed(pack.step, stop_requested.is_set(), now - last_save > pack.execution.checkpoint_seconds)
        if what == "stop" or (what == "save" and pack.step < last_step):
            last_save = now
            read()
            pack.clock.end_lap()
            with pack.clock.timed("save"):
                checkpoints.save(pack.step, pack.state, pack.host_state())
        if what == "stop":
            raise Interrupted
    read()
    pack.clock.end_lap()
    on_event(_progress(pack))


def _agreed(at_step: int, stop: bool, save: bool) -> str | None:
    """What all processes do now: "stop" (and save), "save", or nothing. Process 0 decides."""
    if jax.process_count() > 1:
        if at_step % _STEPS_BETWEEN_AGREEMENTS:
            return None
        from jax.experimental import multihost_utils

        stop, save = (bool(b) for b in multihost_utils.broadcast_one_to_all(np.array([stop, save])))
    return "stop" if stop else "save" if save else None


def _progress(pack: Pack) -> dict:
    losses = [m.last["loss"] for m in pack.members if "loss" in m.last]
    return {
        "event": "progress",
        "run_ids": [m.run.run_id for m in pack.members],
        "step": pack.step,
        "num_steps": max(m.plan.num_steps for m in pack.members),
        "loss": sum(losses) / len(losses) if losses else None,
    }


def _record(pack: Pack, k: int, evaluated, num_eval_tokens: int, sweep_name: str) -> records.RunRecord:
    member = pack.members[k]
    run, plan, corpus = member.run, member.plan, pack.corpus
    diverged = member.diverged_at_step is not None or not math.isfinite(evaluated[0])
    num_tokens = (member.diverged_at_step or pack.step) * plan.batch_tokens if diverged else plan.num_tokens
    share = num_tokens / plan.num_tokens
    loss, standard_error = (None, None) if diverged else evaluated
    described = corpus.describe()
    seconds = pack.clock.seconds
    step_seconds = seconds["step"] + seconds["data"]
    flops = {rule: flops * share for rule, flops in plan.flops.items()}
    return records.RunRecord(
        run_id=run.run_id,
        status="diverged" if diverged else "completed",
        config=config.to_dict(run),
        sweep={
            "name": sweep_name,
            "holdout": member.cell.holdout,
            "recipe": member.cell.recipe,
            "labels": member.cell.labels,
        },
        num_params=plan.num_params,
        num_tokens=num_tokens,
        num_steps=plan.num_steps,
        batch_tokens=plan.batch_tokens,
        unique_tokens=corpus.train_tokens,
        epochs=num_tokens / corpus.train_tokens,
        tokens_per_param=num_tokens / plan.num_params["non_embedding"],
        flops=flops,
        loss=loss,
        loss_standard_error=finite(standard_error),
        bits_per_byte=None if loss is None else loss / math.log(2) * described["tokens_per_byte"],
        num_eval_tokens=num_eval_tokens,
        diverged_at_step=(member.diverged_at_step or pack.step) if diverged else None,
        curve=member.curve,
        data=described,
        environment=_environment(pack),
        timing={
            "seconds": sum(seconds.values()),
            **{f"{name}_seconds": value for name, value in seconds.items()},
            "tokens_per_s": num_tokens * len(pack.members) / step_seconds if step_seconds else None,
            "flops_per_s": flops["exact"] * len(pack.members) / step_seconds if step_seconds else None,
        },
    )


def _environment(pack: Pack) -> dict:
    device = jax.devices()[0]
    return records.software() | {
        "backend": jax.default_backend(),
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "mesh": dict(pack.mesh.shape),
        "execution": dataclasses.asdict(pack.execution),
        "pack": [m.run.run_id for m in pack.members],
        **memory.peak(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def calibrate(run: RunConfig, execution: ExecutionConfig, cache_dir: Path, seconds: float = 1.0) -> dict[str, Any]:
    """Times this run's compiled step and evaluation here, on its own data, for about ``seconds`` each.

    Returns seconds: ``compile_seconds``, ``step_seconds`` (the median, batch included), ``curve_eval_seconds`` for a
    point of the curve, ``eval_seconds`` for the whole validation split; and ``memory_bytes``, a device's, where known.
    """
    use_compilation_cache(cache_dir)
    corpus = data.open(run.data, cache_dir)
    mesh = sharding.make_mesh(execution.mesh)
    with jax.set_mesh(mesh):
        clock = Clock()
        pack = Pack([Member(Cell(run), accounting.plan(run))], corpus, execution, mesh, clock)
        pack.initialise()

        def one_step():
            pack.state, metrics = pack.programs.train(pack.state, pack.batch(pack.step))
            pack.step += 1
            jax.block_until_ready(metrics)

        step_seconds = _median_seconds(one_step, seconds)
        curve_eval_seconds = _median_seconds(lambda: pack.curve_eval(pack.state["params"]), seconds / 2)
    whole = corpus.validation(None)[1].sum() / pack.curve_eval.num_tokens
    return {
        "compile_seconds": clock.seconds["compile"],
        "step_seconds": step_seconds,
        "curve_eval_seconds": curve_eval_seconds,
        "eval_seconds": curve_eval_seconds * float(whole),
        "memory_bytes": (memory.of_programs(pack.programs) or {}).get("total_bytes"),
    }


def measure_memory(
    run: RunConfig, execution: ExecutionConfig, cache_dir: Path, num_members: int
) -> dict[str, int] | None:
    """What ``num_members`` runs of this one's shape need in one program, as ``memory.of_run`` has it."""
    use_compilation_cache(cache_dir)
    return memory.of_run(run, execution, num_members)


def _median_seconds(function: Callable[[], Any], seconds: float) -> float:
    """Median time of a call, after two calls to warm up, over at least three and about ``seconds``."""
    function(), function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return float(np.median(times))
