"""Trains one pack of runs and leaves their records.

    until all members have ended:
        until the next boundary: dispatch a step; read the metrics of the one before; evaluate and save when it is time
        at the boundary: riders branch off, heirs are left what they start from, members that have ended leave

The host is one step behind the device: reading the metrics of the step just dispatched would stall it. Its batches are
some steps ahead, made in a thread that lives from boundary to boundary. A batch is a function of its step, so resuming
is restoring the state and a number; nothing else has memory but the host's curve, which is saved with the state.
"""

import contextlib
import dataclasses
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from scaling import accounting, config, data, objectives, records, storage
from scaling.execution import ExecutionConfig
from scaling.grid import Cell
from scaling.training import checkpoint, outcome, sharding, starts
from scaling.training.calibration import calibrate, measure_memory, pack_size
from scaling.training.evaluation import to_host
from scaling.training.logs import StepLogs
from scaling.training.member import Heir, Member, Rider
from scaling.training.pack import Pack
from scaling.training.programs import for_pack, use_compilation_cache

# What a worker asks of a loop (``scaling.engine.run.worker``).
__all__ = ["Interrupted", "calibrate", "compile_ahead", "measure_memory", "pack_size", "stop_requested", "train"]

# Set it, and training saves a checkpoint after the step under way and raises Interrupted.
stop_requested = threading.Event()

_PROGRESS_SECONDS = 0.5
# With several processes all must decide alike: process 0's clock decides, asked this often.
_STEPS_BETWEEN_AGREEMENTS = 16


class Interrupted(Exception):
    """Training was asked to stop, and saved where it was."""


def train(
    cells: Sequence[Cell],
    *,
    execution: ExecutionConfig,
    workdir: Path,
    results: Path,
    cache_dir: Path,
    sweep_name: str,
    riders: Mapping[str, Sequence[Cell]] = types.MappingProxyType({}),
    on_event: Callable[[dict], None] = lambda event: None,
) -> list[records.RunRecord]:
    """Trains one pack, each run from its own newest checkpoint or from the start; saves and returns their records.

    ``cells`` have equal ``config.program_key``; those that already have a record are left out. ``riders`` holds, by the
    run_id of a cell, runs that equal it but for horizon and cooldown: they are carried along and left a checkpoint
    where they branch off; and runs that start from it, which are left its weights. Checkpoints are under ``workdir``;
    prepared data and compiled programs under ``cache_dir``.
    ``on_event`` is called with {"event": "progress", "run_ids", "step", "num_steps", "loss"} about twice a second, of
    the member with the most steps left, and with {"event": "branched", "run_id"} for every rider as soon as there is
    nothing more to wait for: its checkpoint, or that it will not be carried; and with {"event": "said", "run_id",
    "text"} for a checkpoint that could not be read.

    Raises ValueError on a config that the data or the mesh cannot serve; RuntimeError when a checkpoint was made from
    other data; Interrupted after ``stop_requested`` is set.
    """
    done = {c.run.run_id for c in cells if _agree(records.is_done(results, c.run.run_id))}
    for run_id in done:  # left by a call that was killed between the record and this
        if not execution.keep_final_checkpoint and jax.process_index() == 0:
            storage.remove_tree(checkpoint.folder_of(workdir, run_id))
    cells = [c for c in cells if c.run.run_id not in done]
    if not cells:
        return []
    if len({config.program_key(c.run) for c in cells}) > 1:
        raise ValueError(f"a pack's members must share their shapes: {[c.run.run_id for c in cells]} do not")
    use_compilation_cache(cache_dir)
    run = cells[0].run
    corpus = data.open(run.data, cache_dir)
    corpus.require_vocab(run.model.vocab_size, objectives.extra_ids(run.objective, run.data.seq_len))
    objectives.require_windows(run.objective, corpus, run.eval.final_tokens)
    mesh = sharding.make_mesh(execution.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        workdir, results = storage.folder(workdir), storage.folder(results)
        call = _Call(execution, workdir, results, sweep_name, execution.disk_budget_gb * 1e9 / len(cells), stack)
        pack = Pack([call.open_member(c, riders) for c in cells], corpus, execution, mesh)
        _start(pack, call, on_event)
        return _run(pack, call, on_event)


def compile_ahead(cells: Sequence[Cell], execution: ExecutionConfig) -> None:
    """Compiles what a call of ``train`` with these cells, in this process, will ask for; for a thread of its own,
    beside one that trains. They are the same objects: nothing is compiled twice, whatever the cache on disk holds."""
    mesh = sharding.make_mesh(execution.mesh)
    with jax.set_mesh(mesh):
        programs = for_pack(config.program_key(cells[0].run), execution, sharding.rows_for(len(cells), mesh), mesh)
        _ = programs.train, programs.evaluate, programs.init


@dataclasses.dataclass(frozen=True)
class _Call:
    """What one call of ``train`` was told: where things are, and the disk that each member may use."""

    execution: ExecutionConfig
    workdir: Path
    results: Path
    sweep_name: str
    disk_bytes: float
    stack: contextlib.ExitStack  # closes what the call opens

    def open_member(self, cell: Cell, riders: Mapping[str, Sequence[Cell]]) -> Member:
        """A member with its riders, logs and checkpoints."""
        member = self._member(cell)
        member.checkpoints = self.checkpoints(member.plan)
        self.stack.callback(member.checkpoints.close)
        for other in riders.get(cell.run.run_id, ()):
            if starts.is_heir(other.run, cell.run):
                member.heirs.append(Heir(other, other.run.start.step or member.plan.num_steps))
            else:
                rider = self._member(other)
                member.riders.append(Rider(rider, min(_flat_steps(member), _flat_steps(rider))))
        return member

    def _member(self, cell: Cell) -> Member:
        logs = None
        if (self.execution.tensorboard or self.execution.wandb) and jax.process_index() == 0:
            logs = StepLogs(self.execution, cell.run, self.workdir / "tensorboard", self.sweep_name)
            self.stack.callback(logs.close)
        return Member(cell, accounting.plan(cell.run), logs)

    def checkpoints(self, plan: accounting.Plan) -> checkpoint.Checkpoints:
        """Those of the run that is planned so."""
        folder = checkpoint.folder_of(self.workdir, plan.run_id)
        return checkpoint.Checkpoints(folder, plan.checkpoint_bytes, self.disk_bytes)

    def has_begun(self, heir: Heir) -> bool:
        """Whether an heir has had what it starts from."""
        run_id = heir.cell.run.run_id
        return _agree(checkpoint.has_any(self.workdir, run_id) or records.is_done(self.results, run_id))

    def is_past(self, rider: Rider) -> bool:
        """Whether a rider needs no carrying: it has been where it branches off."""
        return _agree(checkpoint.is_past(self.workdir, self.results, rider.member.run.run_id, rider.branch_step))


def _flat_steps(member: Member) -> int:
    return accounting.flat_steps(member.run, member.plan)


def _start(pack: Pack, call: _Call, on_event) -> None:
    """Puts every member where its newest checkpoint left it, or at step 0: with another's weights if it starts so."""
    restored, begun = {}, {}
    for k, member in enumerate(pack.members):
        if member is None:
            continue
        waiting = [r.member.run.run_id for r in member.riders] + [h.cell.run.run_id for h in member.heirs]
        member.riders = [r for r in member.riders if not call.is_past(r)]
        member.heirs = [h for h in member.heirs if not call.has_begun(h)]

        def abstract_row_for(host: dict, member=member):
            if starts.is_start(host):
                return starts.taken(member.run.start, pack.abstract_row)
            _ = host["member"]["riders"]  # another version's checkpoint has none
            if host["fingerprint"] != pack.corpus.fingerprint:
                raise _OtherData(
                    f"{member.checkpoints.folder}: made from data {host['fingerprint'][:12]}, but "
                    f"{member.run.data.source!r} is now {pack.corpus.fingerprint[:12]}: bring the old data back, or "
                    "delete that folder to start again"
                )
            return pack.abstract_row

        found = member.checkpoints.restore(abstract_row_for)
        complaints = list(member.checkpoints.complaints)
        if found is not None and not starts.is_start(found[1]):
            restored[k], host = found
            member.restore(host["member"])
            member.heirs = [h for h in member.heirs if h.step >= member.step]  # what others needed of it is gone
        elif found is not None:
            begun[k], _ = found
        elif member.run.start is not None and _agree(starts.cannot_be(call.results, member.run.start)):
            member.diverged_at_step = 0
        elif member.run.start is not None:
            begun[k] = starts.from_kept(member.run, pack, call.checkpoints, call.results)
        elif complaints:
            complaints.append(f"{member.run.run_id}: no checkpoint of it can be read: it begins again at step 0")
        for text in complaints:
            on_event({"event": "said", "run_id": member.run.run_id, "text": text})
        still = {r.member.run.run_id for r in member.riders} | {h.cell.run.run_id for h in member.heirs}
        for run_id in set(waiting) - still:
            on_event({"event": "branched", "run_id": run_id})
    if len(restored) < len(pack.members):
        pack.initialise()
    restored |= {k: {**pack.row(k), **taken} for k, taken in begun.items()}
    for k, row in restored.items():
        pack.put_row(k, row)


class _OtherData(RuntimeError):
    """Kept apart from ValueError, which a damaged checkpoint raises: this one must not be skipped over."""


def _run(pack: Pack, call: _Call, on_event) -> list[records.RunRecord]:
    finished = []
    while True:
        _branch_off(pack, call, finished, on_event)
        _leave_to_heirs(pack, call, on_event)
        _leave(pack, call, finished, on_event)
        pack.shrink()
        if not pack.live:
            return finished
        _train_to_boundary(pack, on_event)


def _branch_off(pack: Pack, call: _Call, finished: list, on_event) -> None:
    """Leaves every rider that is due its checkpoint; one that has diverged, its record."""
    for k, member in enumerate(pack.members):
        if member is None or not member.riders:
            continue
        due = [r for r in member.riders if r.branch_step <= r.member.step or r.member.diverged_at_step is not None]
        if member.diverged_at_step is not None:  # its riders go no further here
            due = list(member.riders)
        for rider in due:
            run = rider.member
            run.branched_from, run.branch_step = member.run.run_id, run.step
            if run.diverged_at_step is not None and not run.cell.holdout:
                finished.append(_save_record(call, outcome.record(pack, run, None, 0, call.sweep_name)))
            elif run.diverged_at_step is None and rider.branch_step == run.step and member.diverged_at_step is None:
                # Runs that are carried still, or branch off here too, can be carried on by this one.
                run.riders = [r for r in member.riders if r is not rider and r.branch_step >= rider.branch_step]
                checkpoints = call.checkpoints(run.plan)
                with pack.clock.timed("save"):
                    checkpoints.save(run.step, pack.rider_row(k, run), pack.host_state(run))
                    checkpoints.close()  # whole before anybody hears of it
                run.riders = []
            on_event({"event": "branched", "run_id": run.run.run_id})
        member.riders = [r for r in member.riders if r not in due]


def _leave_to_heirs(pack: Pack, call: _Call, on_event) -> None:
    """Leaves every heir of a member that is where the heir starts the member's weights, in a checkpoint of the heir's
    own: as long as it has not ended they stay, whatever becomes of the member."""
    for k, member in enumerate(pack.members):
        if member is None or member.diverged_at_step is not None:
            continue
        due = [heir for heir in member.heirs if heir.step == member.step]
        for heir in due:
            run = heir.cell.run
            checkpoints = call.checkpoints(accounting.plan(run))
            with pack.clock.timed("save"):
                checkpoints.save(0, starts.taken(run.start, pack.row(k)), starts.host_state(run.start))
                checkpoints.close()  # whole before anybody hears of it
            on_event({"event": "branched", "run_id": run.run_id})
        member.heirs = [heir for heir in member.heirs if heir not in due]


def _leave(pack: Pack, call: _Call, finished: list, on_event) -> None:
    """Saves the records of the members that have ended, and deletes their checkpoints."""
    ended = {k: m for k, m in enumerate(pack.members) if m is not None and m.has_ended}
    whole = [k for k, m in ended.items() if m.diverged_at_step is None]
    evaluated, num_eval_tokens = pack.evaluate_all(whole) if whole else ({}, 0)
    if ended:
        pack.clock.charge(list(ended.values()))
    for k, member in ended.items():
        record = outcome.record(pack, member, evaluated.get(k), num_eval_tokens, call.sweep_name)
        keep = call.execution.keep_final_checkpoint
        if keep:  # whole before the record is there: nobody trains a run again that has one
            member.checkpoints.save(member.step, pack.row(k), pack.host_state(member))
            member.checkpoints.keep_newest()
        finished.append(_save_record(call, record))
        if not keep:
            member.checkpoints.delete()
        for heir in member.heirs:  # of one that diverged, as its record says
            on_event({"event": "branched", "run_id": heir.cell.run.run_id})
        member.checkpoints, pack.members[k] = None, None


def _save_record(call: _Call, record: records.RunRecord) -> records.RunRecord:
    if jax.process_index() == 0:
        records.save(call.results, record)
    return record


def _train_to_boundary(pack: Pack, on_event) -> None:
    """Trains until a member ends or diverges, or a rider branches off."""
    members = pack.live
    pending: dict | None = None
    steps_left = pack.steps_to_boundary
    last_progress = time.perf_counter()
    pack.clock.start_lap()

    def read() -> None:
        """Waits for the newest dispatched step, and takes its metrics in."""
        nonlocal pending
        if pending is not None:
            metrics_K = {name: to_host(values) for name, values in pending.items()}
            for k, member in members.items():
                member.observe(member.step, {name: float(values[k]) for name, values in metrics_K.items()})
            pending = None

    with pack.batches(steps_left) as batches:
        while steps_left and all(m.diverged_at_step is None for m in members.values()):
            tokens_KBS = pack.batch(batches, in_flight=pending)
            pack.state, metrics = pack.programs.train(pack.state, tokens_KBS)
            read()
            for member in members.values():
                member.advance()
            pack.num_steps_done += 1
            pending = metrics
            steps_left -= 1
            if any(m.wants_evaluation for m in members.values()):
                read()
                pack.evaluate_curves(members)
            now = time.perf_counter()
            if now - last_progress > _PROGRESS_SECONDS:
                last_progress = now
                on_event(_progress(pack, members))
            what = _agreed(pack, stop_requested.is_set(), pack.wants_save(now))
            if what == "stop" or (what == "save" and steps_left):
                read()
                pack.save(members)
            if what == "stop":
                raise Interrupted
    read()
    pack.clock.end_lap()
    pack.clock.charge(list(members.values()))
    on_event(_progress(pack, members))


def _agree(flag: bool) -> bool:
    """What process 0 says, in all processes: a folder that they share may have changed between two looks."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def _agreed(pack: Pack, stop: bool, save: bool) -> str | None:
    """What all processes do now: "stop" (and save), "save", or nothing. Any may be asked to stop; when to save is for
    process 0 to decide."""
    if jax.process_count() > 1:
        if pack.num_steps_done % _STEPS_BETWEEN_AGREEMENTS:
            return None
        from jax.experimental import multihost_utils

        wishes = multihost_utils.process_allgather(np.array([stop, save]))
        stop, save = bool(wishes[:, 0].any()), bool(wishes[0, 1])
    return "stop" if stop else "save" if save else None


def _progress(pack: Pack, members: Mapping[int, Member]) -> dict:
    losses = [m.last["loss"] for m in members.values() if "loss" in m.last]
    longest = max(members.values(), key=lambda m: m.plan.num_steps - m.step)
    return {
        "event": "progress",
        "run_ids": [m.run.run_id for m in members.values()],
        "step": longest.step,
        "num_steps": longest.plan.num_steps,
        "loss": sum(losses) / len(losses) if losses else None,
    }
