"""Claims a work folder for one results folder, or gives it up: checkpoints of two sweeps never share one."""

from pathlib import Path

from scaling import records, storage
from scaling.engine.folder.lock import HeldError, held_by, holder
from scaling.records import read_or_empty


def claim(workdir: Path, results: Path) -> None:
    """Writes into a work folder whose checkpoints it holds: those of the runs of ``results``.

    Raises ValueError while it holds checkpoints of another results folder's runs, HeldError while that sweep runs: one
    would go on from, and delete, what the other has trained.
    """
    path, mine = workdir / "results.json", str(results if storage.is_remote(results) else results.absolute())
    theirs = read_or_empty(path).get("results", mine)
    if theirs != mine and (at_work := holder(storage.folder(theirs))) is not None:
        raise HeldError(f"{workdir} is the work folder of another sweep that runs: {held_by(Path(theirs), at_work)}")
    if theirs != mine and _has_checkpoints(workdir):
        raise ValueError(
            f"{workdir} holds checkpoints of the sweep with its results in {theirs}: write another --workdir, or, if "
            f"nobody wants them any more, delete {workdir / 'checkpoints'}"
        )
    if not path.exists() or theirs != mine:
        records.write_json(path, {"schema": 1, "results": mine})


def give_up(workdir: Path) -> None:
    """Takes the claim out of a work folder at the end of a call, unless there are checkpoints for it to guard."""
    if not _has_checkpoints(workdir):
        (workdir / "results.json").unlink(missing_ok=True)


def _has_checkpoints(workdir: Path) -> bool:
    checkpoints = workdir / "checkpoints"
    return checkpoints.is_dir() and any(path.is_dir() for path in checkpoints.iterdir())
