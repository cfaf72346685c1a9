"""What a run takes over from the run that it starts from, and where it finds it.

Its parent leaves it a checkpoint of step 0 in its own folder, as a trunk does to a rider; so it needs nobody any more,
and its parent's checkpoints can go. A parent that is done has left nothing to who came later, but its last checkpoint
where the grid keeps these.
"""

from collections.abc import Callable
from pathlib import Path

from scaling import accounting, config, fields, records
from scaling.accounting import Plan
from scaling.config import RunConfig, StartConfig
from scaling.training import programs
from scaling.training.checkpoint import Checkpoints
from scaling.training.pack import Pack


def is_heir(run: RunConfig, parent: RunConfig) -> bool:
    return run.start is not None and run.start.run == parent.run_id


def taken(start: StartConfig, state: dict) -> dict:
    """The parts of a parent's state, or of its shapes, that a run takes over."""
    names = ("params", "opt") if start.take == "params+optimizer" else ("params",)
    return {name: state[name] for name in names}


def host_state(start: StartConfig) -> dict:
    """What is saved beside them, by which ``is_start`` knows them."""
    return {"start": fields.to_dict(start)}


def is_start(host: dict) -> bool:
    return "start" in host


def cannot_be(results: Path, start: StartConfig) -> bool:
    """Whether the parent diverged: then what starts from it has, too, before its first step."""
    path = records.path_of(results, start.run)
    return path.exists() and records.read(path).status == "diverged"


def from_kept(run: RunConfig, pack: Pack, checkpoints: Callable[[Plan], Checkpoints], results: Path) -> dict:
    """Reads what ``run`` takes over from the checkpoint that its parent, which is done, was told to keep.

    Raises ValueError, in one line, where there is none of that step.
    """
    start = run.start
    path = records.path_of(results, start.run)
    if path.exists():
        parent = fields.from_dict(RunConfig, records.read(path).config)
        plan = accounting.plan(parent)
        theirs = programs.for_pack(config.program_key(parent), pack.execution, len(pack.members), pack.mesh)
        abstract = theirs.abstract_state if len(pack.members) == 1 else theirs.abstract_row
        kept = checkpoints(plan)
        found = kept.restore(lambda host: abstract)
        kept.close()
        if found is not None and found[1]["member"]["step"] == (start.step or plan.num_steps):
            return taken(start, found[0])
    at = "its end" if start.step is None else f"step {start.step}"
    raise ValueError(
        f"{run.run_id} starts from {start.run} at {at}, which has left it nothing: see why that one failed, or train "
        "it again"
    )
