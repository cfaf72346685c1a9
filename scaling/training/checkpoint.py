"""Orbax checkpoints of a pack: the sharded state and a small JSON of what the host knows, saved together."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


class Checkpoints:
    """The newest checkpoints of one pack under ``folder``, as many as ``budget_bytes`` holds, three at most.

    Saving is asynchronous; a save that was cut off is never restored. Raises ValueError when not even two checkpoints
    of ``checkpoint_bytes`` (the one being written and the one it replaces) fit the budget.
    """

    def __init__(self, folder: epath.PathLike, checkpoint_bytes: int, budget_bytes: float):
        if 2 * checkpoint_bytes > budget_bytes:
            raise ValueError(
                f"execution.disk_budget_gb leaves {budget_bytes / 1e9:.3g} GB for this run: a checkpoint takes "
                f"{checkpoint_bytes / 1e9:.3g} GB and two must fit while one replaces the other: write at least "
                f"{2.1 * checkpoint_bytes / 1e9:.3g} for each worker"
            )
        # Orbax logs a dozen lines a save at INFO, and warns about options that it sets itself.
        logging.getLogger("absl").setLevel(logging.ERROR)
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
        """Starts saving ``state`` and the JSON-able ``host`` as of ``step``."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        self._manager.save(step, args=items, force=True)

    def restore(self, abstract_state_for: Callable[[dict], Any]) -> tuple[Any, dict] | None:
        """(state, host) of the newest checkpoint that can be read, sharded as ``abstract_state_for(host)`` says; None
        if there is none. One that cannot be read is said and set aside, and the one before it tried; what
        ``abstract_state_for`` raises is not the checkpoint's fault and passes through."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            host = self._try(step, {"host": ocp.args.JsonRestore()})
            if host is None:
                continue
            host = host["host"]
            wanted = abstract_state_for(host)
            state = self._try(step, {"state": ocp.args.StandardRestore(wanted)})
            if state is not None:
                return state["state"], host
        return None

    def _try(self, step: int, items: dict) -> Any:
        """The restored items, or None after setting the checkpoint aside."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as e:
            aside = self.folder / f"unreadable-{step}"
            print(f"{self.folder / str(step)}: unreadable checkpoint ({type(e).__name__}), set aside as {aside.name}")
            if aside.exists():
                aside.rmtree()
            (self.folder / str(step)).rename(aside)
            self._manager.reload()
            return None

    def keep_newest(self) -> None:
        """Closes, and leaves only the newest checkpoint on disk."""
        self._manager.wait_until_finished()
        for step in sorted(self._manager.all_steps())[:-1]:
            self._manager.delete(step)
        self._manager.close()

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()

    def delete(self) -> None:
        """Closes, and removes all of this pack's checkpoints."""
        self.close()
        if jax.process_index() == 0 and self.folder.exists():
            self.folder.rmtree()
