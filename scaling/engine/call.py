"""One call of the command, as all that carry it out see it."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from scaling import storage
from scaling.engine.folder.cells import Cells
from scaling.engine.folder.manifest import Manifest
from scaling.engine.options import Options
from scaling.engine.plan import timings
from scaling.engine.plan.hardware import Hardware
from scaling.engine.run.events import Sink
from scaling.engine.run.executor import Orders
from scaling.grid import Grid
from scaling.training.distributed import Group


@dataclass(frozen=True)
class Call:
    """One call of the command: what was asked, of which grid, on what, and where it goes."""

    options: Options
    grid: Grid
    cells: Cells
    hardware: Hardware
    manifest: Manifest
    workdir: Path
    cache_dir: Path
    console: Console
    events: Sink

    @property
    def timings(self) -> timings.TimingCache:
        return timings.TimingCache(self.cache_dir, self.options.workers, self.grid.execution)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def write_manifest(self, workers: int | None, *, at_leisure: bool = False) -> None:
        """Writes what is known of the cells by now; ``workers``: how many train, None before there are any."""
        self.manifest.write(self.cells.rows, self.cells.found, workers, at_leisure=at_leisure)

    def orders(self, loop: str, group: Group | None) -> Orders:
        """What the executor is asked. Logs grow, and objects in a bucket do not: then they stay on this machine."""
        home = Path(".scaling") / self.grid.name if storage.is_remote(self.workdir) else self.workdir
        asked = self.options
        return Orders(
            self.workdir, home / "logs", self.grid.name, loop, workers=asked.num_workers, group=group,
            options=tuple(asked.of_executors.get(asked.executor, ())), detach=asked.detach, command=asked.typed,
        )  # fmt: skip
