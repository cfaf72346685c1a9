"""Orbax checkpoints of a run: its sharded state and a small JSON of what the host knows, saved together.

They are the run's own, in a folder of its name, wherever and in whatever pack it trains: so packs can be grouped anew
after an interruption, and a run that branches off another is one that goes on from a checkpoint.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scaling import records, storage

# In a bucket, where nothing can be renamed, Orbax writes a checkpoint where it stays, and this in it when it is whole.
_WHOLE = "commit_success.txt"

_HALF = ".orbax-checkpoint-tmp"

# Of what a checkpoint holds. One without a version is of the first; one of another version is set aside, not guessed
# at.
VERSION = 1

# What TensorStore's ValueErrors say where it is the storage that failed and not what lies in it (absl's status codes).
_UNREACHABLE = (
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED",
)  # fmt: skip


def folder_of(workdir: Path, run_id: str) -> Path:
    """Where a run's checkpoints are: ``<workdir>/checkpoints/<run_id>/<step>``."""
    workdir = storage.folder(workdir)
    return (workdir if storage.is_remote(workdir) else workdir.absolute()) / "checkpoints" / run_id


def run_ids(workdir: Path) -> list[str]:
    """The runs that have a folder of checkpoints."""
    folder = folder_of(workdir, "x").parent
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


def newest_step(workdir: Path, run_id: str) -> int:
    """The step of a run's newest whole checkpoint, 0 if there is none. Reads folder names alone, and imports no JAX."""
    return next(_whole_steps(workdir, run_id), 0)


def has_any(workdir: Path, run_id: str) -> bool:
    """Whether a run has a whole checkpoint, were it of step 0: what it was left to start from."""
    return next(_whole_steps(workdir, run_id), None) is not None


def _whole_steps(workdir: Path, run_id: str) -> Iterator[int]:
    """The steps of a run's whole checkpoints, the newest first."""
    folder = folder_of(workdir, run_id)
    try:
        # A save that is under way, or was cut off, has a longer name.
        found = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)
    except FileNotFoundError:
        return
    for step in found:
        if not storage.is_remote(folder) or (folder / str(step) / _WHOLE).exists():
            yield step


def is_past(workdir: Path, results: Path, run_id: str, step: int) -> bool:
    """Whether a run has a checkpoint of ``step`` or later, or its record."""
    # In this order: a run's record is written before its checkpoints are deleted.
    return newest_step(workdir, run_id) >= step or records.is_done(results, run_id)


class Checkpoints:
    """The newest checkpoints of one run under ``folder``, as many as ``budget_bytes`` holds, three at most.

    Saving is asynchronous; a save that was cut off is never restored. Raises ValueError when not even two checkpoints
    of ``checkpoint_bytes`` (the one being written and the one it replaces) fit the budget, or when the folder's name
    would be read as a pattern.
    """

    def __init__(self, folder: Path, checkpoint_bytes: int, budget_bytes: float):
        if 2 * checkpoint_bytes > budget_bytes:
            raise ValueError(
                f"execution.disk_budget_gb leaves {budget_bytes / 1e9:.3g} GB for this run: a checkpoint takes "
                f"{checkpoint_bytes / 1e9:.3g} GB and two must fit while one replaces the other: write at least "
                f"{2.1 * checkpoint_bytes / 1e9:.3g} for each worker"
            )
        storage.require_literal(folder)
        import orbax.checkpoint as ocp
        from etils import epath

        # Orbax logs a dozen lines a save at INFO, and warns about options that it sets itself.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._open = True
        self.complaints: list[str] = []  # of checkpoints that could not be read
        self.folder = epath.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=int(max(1, min(3, budget_bytes // checkpoint_bytes - 1))), enable_async_checkpointing=True
            ),
            item_names=("state", "host"),
        )

    def save(self, step: int, state, host: dict[str, Any]) -> None:
        """Starts saving ``state`` and the JSON-able ``host`` as of ``step``. Raises OSError if it, or what was being
        saved before it, cannot be written."""
        import orbax.checkpoint as ocp

        if step in self._manager.all_steps():
            return
        host = {"version": VERSION, **host}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        with self._writing():
            self._manager.save(step, args=items, force=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """TensorStore calls a full bucket, a lost connection and a missing permission ValueErrors: they are the
        storage's, to be tried again, and nothing that a person wrote."""
        try:
            yield
        except ValueError as e:
            raise OSError(f"{self.folder}: a checkpoint cannot be written: {storage.first_line(e)}") from e

    def restore(self, abstract_state_for: Callable[[dict], Any]) -> tuple[Any, dict] | None:
        """(state, host) of the newest checkpoint that can be read, sharded as ``abstract_state_for(host)`` says; None
        if there is none. One that cannot be read, or whose ``host`` lacks a key that ``abstract_state_for`` reads, is
        set aside, as ``complaints`` says, and the one before it tried; whatever else ``abstract_state_for`` raises is
        not the checkpoint's fault and passes through."""
        import orbax.checkpoint as ocp

        for step in sorted(self._manager.all_steps(), reverse=True):
            host = self._try(step, {"host": ocp.args.JsonRestore()})
            if host is None:
                continue
            host = dict(host["host"])
            version = host.pop("version", 1)
            if version != VERSION:
                self._set_aside(step, f"version {version}, this code reads {VERSION}")
                continue
            try:
                wanted = abstract_state_for(host)
            except KeyError as e:  # another version wrote it
                self._set_aside(step, type(e).__name__)
                continue
            state = self._try(step, {"state": ocp.args.StandardRestore(wanted)})
            if state is not None:
                return state["state"], host
        return None

    def _try(self, step: int, items: dict) -> Any:
        """The restored items, or None after setting the checkpoint aside. Raises OSError while the storage is away."""
        import orbax.checkpoint as ocp

        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as e:
            if any(word in str(e) for word in _UNREACHABLE):  # the checkpoint may be whole: it is tried again
                raise OSError(f"{self.folder / str(step)}: cannot be read now: {storage.first_line(e)}") from e
            self._set_aside(step, type(e).__name__)
            return None

    def _set_aside(self, step: int, why: str) -> None:
        aside = f"unreadable-{step}"
        self.complaints.append(f"{self.folder / str(step)}: unreadable checkpoint ({why}), set aside as {aside}")
        storage.set_aside(self.folder / str(step), aside)
        self._manager.reload()

    def keep_newest(self) -> None:
        """Closes, and leaves only the newest checkpoint on disk, whole. Raises OSError if it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()
        for step in sorted(self._manager.all_steps())[:-1]:
            self._manager.delete(step)
        self.close()
        self._remove_halves()

    def _remove_halves(self) -> None:
        """Saves that a kill cut off: Orbax removes those that it finds when it begins, but a worker whose sweep was
        killed may write on for a moment after that."""
        import jax

        if jax.process_index() == 0:
            for path in self.folder.iterdir():
                if _HALF in path.name:
                    storage.remove_tree(path)

    def close(self) -> None:
        """Waits for saves under way; closed twice is closed once. Raises OSError if one could not be written."""
        if self._open:
            self._open = False
            with self._writing():
                self._manager.wait_until_finished()
                self._manager.close()

    def delete(self) -> None:
        """Closes, and removes all of this run's checkpoints."""
        import jax

        self.close()
        if jax.process_index() == 0:
            storage.remove_tree(self.folder)
