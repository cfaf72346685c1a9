"""Carries out a plan on behalf of one call of the command: data, timings, packs, and a record for every cell.

with session.started(num_packs):
    session.prepare_data(rows)
    session.measure(rows)
    session.train(rows)
"""

import collections
import contextlib
import dataclasses
import statistics
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from scaling import config, fields, machine, objectives, records, storage
from scaling.engine import measuring
from scaling.engine.errors import BadInputError, bad_input
from scaling.engine.executors import EXECUTORS
from scaling.engine.folder import signs
from scaling.engine.folder.cells import Cells, failed_record
from scaling.engine.folder.manifest import Manifest
from scaling.engine.housekeeping import Keeper
from scaling.engine.options import Options
from scaling.engine.plan import disk, lint, packing, plan, timings
from scaling.engine.plan.hardware import Hardware
from scaling.engine.plan.plan import Means, Plan
from scaling.engine.plan.table import Row
from scaling.engine.run import progress, worker
from scaling.engine.run.events import Sink
from scaling.engine.run.executor import Executor, Orders
from scaling.engine.run.tasks import Task
from scaling.grid import Grid
from scaling.records import read_or_empty
from scaling.training import checkpoint
from scaling.training.distributed import Group

# A timing this many times off was taken while the machine did something else, or does so now.
DISAGREEMENT = 1.5


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

    def orders(self, loop: str, group: Group | None) -> Orders:
        """What the executor is asked. Logs grow, and objects in a bucket do not: then they stay on this machine."""
        home = Path(".scaling") / self.grid.name if storage.is_remote(self.workdir) else self.workdir
        asked = self.options
        return Orders(
            self.workdir, home / "logs", self.grid.name, loop, workers=asked.num_workers, group=group,
            options=tuple(asked.slurm), detach=asked.detach, command=asked.typed,
        )  # fmt: skip


class Session:
    """What trains the cells of a call, by its executor. How many workers and how large packs there will be can be asked
    before any is started; ``workers`` is None until then.

    Raises BadInputError if the options contradict each other.
    """

    def __init__(self, call: Call, loop: str, group: Group | None = None):
        self.workers: Any = None  # a number from ``started`` on
        self.call = call
        self._pack_sizes: int | dict[str, int] = 1 if call.options.pack == "auto" else call.options.pack  # type: ignore[assignment]  # a number, then
        self._ratios: dict[str, list[float]] = collections.defaultdict(list)  # by shape: seconds taken over predicted
        self._disk_bytes = 1e9 * (call.options.disk_budget or call.grid.execution.disk_budget_gb)
        self.keeper = Keeper(
            call.workdir, call.cells, call.say, keeps_final=call.grid.execution.keep_final_checkpoint
        )  # fmt: skip
        with bad_input():
            self.executor: Executor = EXECUTORS[call.options.executor](call.orders(loop, group))

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def num_workers(self, num_packs: int) -> int:
        is_elsewhere = self.call.options.plan and not self.call.hardware.is_here
        return 1 if is_elsewhere else self.executor.num_workers(num_packs)  # there all of it is for one run at a time

    def means(self) -> Means:
        """What a plan is made with, as things stand now."""
        return Means(
            hardware=self.call.hardware,
            known=self.call.timings.load() if self.executor.times_here else {},
            trunks=self.call.grid.execution.trunks,
            workers=self.num_workers if self.workers is None else lambda num_packs: self.workers,
            pack_sizes=self._pack_sizes,
            disk_bytes=self._disk_bytes,
            kept_bytes=self.keeper.kept_bytes,
        )

    def plan(self, mine: Collection[str]) -> Plan:
        """The plan for the cells ``mine`` (run_ids), within the budget that was given."""
        call, means = self.call, self.means()
        with bad_input():
            made = plan.make(call.cells.rows, mine, call.cells.done, means)
            spent = call.manifest.spent_seconds() if call.hardware.is_here else 0.0
            return plan.within(call.options.budget, made, means, spent_seconds=spent, drop=call.options.drop)

    def num_packs(self, rows: Sequence[Row]) -> int:
        return len(packing.build(rows, self._pack_sizes))

    def untimed(self, rows: Sequence[Row]) -> dict[str, config.RunConfig]:
        """A run of each shape of ``rows`` that is to be timed on this machine, and was not yet."""
        limit = None if machine.has_accelerator() else timings.MAX_CALIBRATED_STEP_FLOPS
        return timings.to_calibrate(rows, self.call.timings.load(), limit=limit)

    def findings(self) -> list[lint.Finding]:
        """What is doubtful about the grid, by the rules of ``lint``, its data and the fits that there are."""
        cells, profile = self.call.cells, self.call.hardware.profile
        total = None if profile.memory_bytes is None else profile.memory_bytes * self.call.hardware.devices
        about = {data: self._described(data) for data in {row.cell.run.data for row in cells.rows}}
        tokens = {
            name: {data: known[key] for data, known in about.items() if known is not None}
            for name, key in (("train_tokens", "epoch_tokens"), ("validation_tokens", "validation_tokens"))
        }
        groups = []
        for path, rows in cells.apart().items():
            fit = read_or_empty(path / "fit.json")
            groups.append((rows, lint.Expected.from_fit(fit, device_memory=total, **tokens)))
        return lint.check(*groups)

    def _described(self, data_config: config.DataConfig) -> dict | None:
        """What is known of a corpus, if it is prepared."""
        from scaling import data

        if not data.is_prepared(data_config, self.call.cache_dir):
            return None
        with bad_input():
            return data.open(data_config, self.call.cache_dir).describe()

    # ---- before training --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def started(self, num_packs: int, lock_fds: Sequence[int] = ()) -> Iterator[None]:
        """While it lasts there are workers, as many as so many packs need; they inherit ``lock_fds``."""
        self.workers = self.num_workers(num_packs)
        for kind in EXECUTORS.values():
            left = None if isinstance(self.executor, kind) else kind.left_behind(self.call.workdir)
            if left:
                raise BadInputError(f"{self.call.workdir}: jobs of an earlier call are queued or running ({left}")
        # started first: they import JAX while the data is prepared here
        with contextlib.closing(self.executor.start(self.workers, lock_fds)) as self._runner:
            yield

    def prepare_data(self, rows: Sequence[Row]) -> None:
        """Prepares what ``rows`` read, and sees that it is enough for them."""
        from scaling import data

        for data_config in dict.fromkeys(row.cell.run.data for row in rows):
            with bad_input():
                data.prepare(data_config, self.call.cache_dir, progress=self.call.say)
                corpus = data.open(data_config, self.call.cache_dir)
                for row in rows:
                    if row.cell.run.data == data_config:
                        run = row.cell.run
                        corpus.require_vocab(run.model.vocab_size, objectives.of(run.objective).extra_ids)
                        corpus.require_horizon(row.plan.num_tokens)

    def measure(self, rows: Sequence[Row]) -> None:
        """Times the shapes of ``rows`` that were never timed here, and sees how many fit a device. This machine's
        timings say nothing of a cluster's."""
        if not self.executor.times_here:
            return
        call, about = self.call, self._about_shape
        if missing := self.untimed(rows):
            found = measuring.shapes(missing, self._runner, about, call.console, call.options.grid)
            call.timings.save(call.timings.load() | found)
        if call.options.pack == "auto" and machine.has_accelerator():
            self._pack_sizes = measuring.pack_sizes(rows, self._runner, about, call.console) or self._pack_sizes

    def _about_shape(self, run: config.RunConfig) -> dict:
        return {
            "execution": fields.to_dict(self.call.grid.execution),
            "cache_dir": str(self.call.cache_dir),
            "run": fields.to_dict(run),
        }

    # ---- training ---------------------------------------------------------------------------------------------------

    def train(
        self, rows: Sequence[Row], later: Sequence[Row] = (), when_idle: Callable[[], None] = lambda: None
    ) -> None:
        """Trains the rows in packs and prints a line for each that ends; one that cannot be done gets a record too.

        ``later``: rows of a later call of this, carried now as far as their trunks among ``rows`` go. ``when_idle``: is
        called, in a thread, once a worker has nothing left to do while another has; over when this returns.
        """
        if not rows:
            return
        call = self.call
        order = self._order_from_here(rows, later)
        packs = {pack.key: pack for pack in order.packs}
        display = progress.Progress(
            call.console, list(packs.values()), workers=self.workers,
            done=sum(map(call.cells.is_done, call.cells.rows)), total=len(call.cells.rows),
            in_place={"rich": True, "auto": None}.get(call.options.progress, False),
        )  # fmt: skip
        waiting, beside = set(packs), threading.Thread(target=when_idle, daemon=True)
        signs.clear_stale(call.workdir)
        run_ids = {pack.key: pack.run_ids for pack in packs.values()}
        board = signs.Board(call.workdir, call.options.executor, run_ids)  # of this process and its workers
        listeners = [display.on_event, *([] if self.executor.gives_own_signs else [board.on_event])]

        def on_event(event: dict) -> None:
            call.events(event)
            if event["event"] in ("done", "failed"):
                for row in packs[event["key"]].rows:
                    record = self._settle(row, event.get("reason"))
                    call.events({"event": "cell", "row": row, "record": record})
                waiting.discard(event["key"])
                if 0 < len(waiting) < self.workers and beside.ident is None:
                    beside.start()

        try:
            with call.manifest.training(), display, board, call.events.heard_by(*listeners):
                self._runner.run(self._tasks(order), on_event)
            if beside.ident is not None:
                beside.join()
            signs.clear_stale(call.workdir)  # of a call killed seconds before this one, which were too young before
            self._forget_wrong_timings()
        except KeyboardInterrupt:
            call.say(self.executor.farewell())
            raise
        finally:
            self.write_manifest()

    def _forget_wrong_timings(self) -> None:
        """Shapes whose cells took otherwise than their timing said are timed again by the next plan."""
        if not (self.executor.times_here and self.call.hardware.is_here):
            return
        median = {shape: statistics.median(ratios) for shape, ratios in self._ratios.items()}
        wrong = {s: r for s, r in median.items() if not 1 / DISAGREEMENT < r < DISAGREEMENT}
        known = self.call.timings.load()
        if wrong and known.keys() & wrong.keys():
            self.call.timings.save({shape: timing for shape, timing in known.items() if shape not in wrong})
            low, high = min(wrong.values()), max(wrong.values())
            times = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
            self.call.say(
                f"{len(wrong)} shapes took {times} times what their timing said, which was taken while the machine was "
                "more, or less, busy: they are timed again by the next plan"
            )

    def _order_from_here(self, rows: Sequence[Row], later: Sequence[Row]) -> disk.Order:
        """What trains next, from the checkpoints that there are: the plan of what is left."""
        every = [*rows, *later]
        steps = {row.run_id: checkpoint.newest_step(self.call.workdir, row.run_id) for row in every}
        mine = {row.run_id for row in every}
        with bad_input():
            made = plan.make(every, mine, (), self.means(), steps=steps, workers=self.workers)
        return made.held_out if rows[0].cell.holdout else made.fitted

    def _tasks(self, order: disk.Order) -> list[Task]:
        call = self.call
        # A worker's share of the disk is of what those that wait leave.
        gigabytes = (self._disk_bytes - order.kept - order.waiting) / self.workers / 1e9
        shared = {
            "execution": fields.to_dict(dataclasses.replace(call.grid.execution, disk_budget_gb=gigabytes)),
            "workdir": str(call.workdir),
            "results": str(call.cells.results),
            "cache_dir": str(call.cache_dir),
            "sweep_name": call.grid.name,
        }
        tasks = []
        for pack in order.packs:
            riders = {name: [worker.cell_to_json(r.cell) for r in some] for name, some in pack.riders.items()}
            payload = {"cells": [worker.cell_to_json(row.cell) for row in pack.rows], "riders": riders, **shared}
            program = packing.shape_of(pack.rows[0].cell.run)
            tasks.append(Task(pack.key, "train", payload, pack.after, pack.carried, program))
        return tasks

    def _settle(self, row: Row, reason: str | None) -> records.RunRecord:
        """The record of a cell that ended: its worker's, or one that says why there is none."""
        cells = self.call.cells
        if reason is not None and not records.is_done(cells.results, row.run_id):
            records.save(cells.results, failed_record(row, self.call.grid.name, reason))
        record = cells.record(row)
        cells.found[row.run_id] = record.status
        if record.status == "completed" and record.timing.get("seconds") and row.seconds:
            self._ratios[timings.shape_key(row.cell.run)].append(record.timing["seconds"] / row.seconds)
        self.call.manifest.cell_ended(record)
        self.write_manifest(at_leisure=True)
        return record

    def write_manifest(self, *, at_leisure: bool = False) -> None:
        self.call.manifest.write(self.call.cells.rows, self.call.cells.found, self.workers, at_leisure=at_leisure)
