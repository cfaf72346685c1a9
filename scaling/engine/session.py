"""Training on behalf of one call of the command: workers, data, timings, packs, and a record for every cell.

with session.started(num_packs):
    session.prepare_data(rows)
    session.measure(rows)
    session.train(rows)
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from scaling import config, fields, machine, numbers, objectives, records, storage, terminal
from scaling.engine.executors import EXECUTORS
from scaling.engine.folder import signs
from scaling.engine.folder.cells import Cells, failed_record
from scaling.engine.folder.manifest import Manifest
from scaling.engine.plan import disk, packing, timings
from scaling.engine.plan.table import Row
from scaling.engine.run import progress, worker
from scaling.engine.run.events import Sink
from scaling.engine.run.executor import Orders
from scaling.engine.run.tasks import Task
from scaling.grid import Grid
from scaling.training import checkpoint
from scaling.training.distributed import Group

# Stepping time behind a shape's timing. Its compilation, the larger part, is not lost: training reuses the program.
CALIBRATION_SECONDS = 0.3
# A timing this many times off was taken while the machine did something else, or does so now.
DISAGREEMENT = 1.5
COMPILED_BYTES = 20_000_000_000  # of compiled programs in the cache, those used last


class BadInputError(Exception):
    """One line: what is wrong with what the person gave, and what to write instead."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """ValueErrors are the person's to mend here: they say in one line what to write instead."""
    try:
        yield
    except ValueError as e:
        raise BadInputError(str(e)) from None


class Session:
    """What trains ``cells``, by the options of the command (``args``) and the grid's execution.

    ``arguments``: the command's, as typed. ``group``: the processes that train each run together, of which this one
    leads. How many workers and how large packs there will be can be asked before any is started; ``workers`` is None
    until then.

    Raises BadInputError if the options contradict each other.
    """

    def __init__(
        self, args: argparse.Namespace, grid: Grid, cells: Cells, manifest: Manifest, console: Console, *,
        workdir: Path, cache_dir: Path, loop: str, events: Sink, arguments: Sequence[str] = (), group: Group | None = None,
    ):  # fmt: skip
        self.cells, self.manifest, self.console, self.events = cells, manifest, console, events
        self.workers: int | None = None
        self.pack_sizes: int | dict[str, int] = 1 if args.pack == "auto" else args.pack
        self._args, self._grid = args, grid
        self._workdir, self._cache_dir = workdir, cache_dir
        self._ratios: dict[str, list[float]] = collections.defaultdict(list)  # by shape: seconds taken over predicted
        self._disk_bytes = 1e9 * (args.disk_budget or grid.execution.disk_budget_gb)
        orders = Orders(
            workdir, self._logs_home() / "logs", grid.name, loop,
            workers=None if args.workers == "auto" else args.workers, group=group, options=tuple(args.slurm),
            detach=args.detach, command=tuple(arguments),
        )  # fmt: skip
        with bad_input():
            self.executor = EXECUTORS[args.executor](orders)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    # ---- what a plan asks -------------------------------------------------------------------------------------------

    def num_workers(self, num_packs: int) -> int:
        is_elsewhere = self._args.plan and not self.cells.hardware.is_here  # all of it for one run at a time
        return 1 if is_elsewhere else self.executor.num_workers(num_packs)

    def packs(self, rows: Sequence[Row]) -> list[packing.Pack]:
        return packing.build(rows, self.pack_sizes)

    def order(self, rows: Sequence[Row], later: Sequence[Row], workers: int) -> disk.Order:
        """The packs of ``rows`` as the disk lets them be handed out; ``later``: rows that they carry too."""
        packs = packing.build(rows, self.pack_sizes, carried=later)
        with bad_input():
            return disk.order(packs, workers, self._disk_bytes, self._kept_bytes([*rows, *later]))

    def _kept_bytes(self, training: Sequence[Row]) -> int:
        """What checkpoints other than those that ``training`` will replace take: final ones that are kept, those of
        runs that the grid no longer has, and what could not be read and was set aside."""
        mine = {row.run_id for row in training}
        kept = 0
        for run_id in checkpoint.run_ids(self._workdir):
            whole = checkpoint.folder_of(self._workdir, run_id)
            unread = [path for path in whole.iterdir() if path.name.startswith("unreadable-")]
            kept += sum(map(storage.size_of, unread if run_id in mine else [whole]))
        if self._grid.execution.keep_final_checkpoint:
            kept += sum(map(disk.checkpoint_bytes, training))
        return kept

    def describe_data(self, data_config: config.DataConfig) -> dict | None:
        """What is known of a corpus, if it is prepared."""
        from scaling import data

        if not data.is_prepared(data_config, self._cache_dir):
            return None
        with bad_input():
            return data.open(data_config, self._cache_dir).describe()

    def tidy(self, rows: Sequence[Row]) -> None:
        """Removes what earlier calls left of ``rows`` that are over: the book of their jobs; and checkpoints, where one
        was killed between a run's record and the end of its checkpoints. To be called by whoever holds the results."""
        storage.trim(self._cache_dir / "xla", COMPILED_BYTES)
        done = [row.run_id for row in rows if self.cells.is_done(row)]
        self.executor.settle(set(done).__contains__)
        if not (self._grid.execution.keep_final_checkpoint or self._may_be_under_way()):
            # With jobs under way, they do it themselves.
            storage.each(storage.remove_tree, (checkpoint.folder_of(self._workdir, run_id) for run_id in done))
        elif self._grid.execution.keep_final_checkpoint:
            self._say_what_is_not_kept(rows)
        self._remove_orphans()

    def _remove_orphans(self) -> None:
        """Says which checkpoints are of no cell of the grid any more; with --remove-orphans, removes them."""
        cells = {row.run_id for row in self.cells.rows}
        folders = {i: checkpoint.folder_of(self._workdir, i) for i in checkpoint.run_ids(self._workdir)}
        orphans = [whole for run_id, whole in folders.items() if run_id not in cells]
        if not orphans:
            return
        size = f"{numbers.compact(sum(storage.each(storage.size_of, orphans)))}B"
        what = f"checkpoints of {len(orphans)} runs that the grid no longer has, {size}"
        if not self._args.remove_orphans:
            self.say(f"{self._workdir}: {what}, count towards the disk budget; --remove-orphans removes them")
        elif self._may_be_under_way():
            self.say(f"{self._workdir}: {what}, stay while jobs are under way that may be theirs")
        else:
            storage.each(storage.remove_tree, orphans)
            self.say(f"{self._workdir}: {what}, removed")

    def unkept(self, rows: Sequence[Row]) -> list[Row]:
        """The completed runs whose final checkpoint is not there. Raises BadInputError if none is asked for."""
        if not self._grid.execution.keep_final_checkpoint:
            raise BadInputError(
                f"--train-unkept: {self._args.grid} keeps no final checkpoints: write execution: "
                "{keep_final_checkpoint: true}"
            )
        done = [row for row in rows if self.cells.found.get(row.run_id) == "completed"]
        return [row for row in done if checkpoint.newest_step(self._workdir, row.run_id) < row.plan.num_steps]

    def _say_what_is_not_kept(self, rows: Sequence[Row]) -> None:
        """Names the completed runs whose final checkpoint is asked for and is not there."""
        gone = [row.run_id for row in self.unkept(rows)]
        if gone:
            self.say(
                f"execution.keep_final_checkpoint is true, and {len(gone)} runs that are done have no final checkpoint "
                f"({records.named(gone)}): they were trained without it; --train-unkept trains them again"
            )

    # ---- before training --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def started(self, num_packs: int, lock_fds: Sequence[int] = ()) -> Iterator[None]:
        """While it lasts there are workers, as many as so many packs need; they inherit ``lock_fds``."""
        self.workers = self.num_workers(num_packs)
        self._refuse_beside_others()
        # started first: they import JAX while the data is prepared here
        with contextlib.closing(self.executor.start(self.workers, lock_fds)) as self._runner:
            yield

    def _refuse_beside_others(self) -> None:
        """Raises BadInputError while another executor is at the sweep, by an earlier call."""
        for kind in EXECUTORS.values():
            left = None if isinstance(self.executor, kind) else kind.left_behind(self._workdir)
            if left:
                raise BadInputError(f"{self._workdir}: jobs of an earlier call are queued or running ({left}")

    def _may_be_under_way(self) -> bool:
        return any(kind.has_submitted(self._workdir) for kind in EXECUTORS.values())

    def _logs_home(self) -> Path:
        """Logs grow, and objects in a bucket do not: then they stay on this machine."""
        return Path(".scaling") / self._grid.name if storage.is_remote(self._workdir) else self._workdir

    def prepare_data(self, rows: Sequence[Row]) -> None:
        """Prepares what ``rows`` read, and sees that it is enough for them."""
        from scaling import data

        for data_config in dict.fromkeys(row.cell.run.data for row in rows):
            with bad_input():
                data.prepare(data_config, self._cache_dir, progress=self.say)
                corpus = data.open(data_config, self._cache_dir)
                for row in rows:
                    if row.cell.run.data == data_config:
                        run = row.cell.run
                        corpus.require_vocab(run.model.vocab_size, objectives.of(run.objective).extra_ids)
                        corpus.require_horizon(row.plan.num_tokens)

    def measure(self, rows: Sequence[Row]) -> None:
        """Times the shapes of ``rows`` that were never timed here, sees how many fit a device, and predicts."""
        # This machine's timings say nothing of a cluster's.
        here = self.executor.times_here
        if here:
            self._calibrate(rows)
            self._choose_pack_sizes(rows)
        if here or not self.cells.hardware.is_here:
            self.cells.predict()

    def _calibrate(self, rows: Sequence[Row]) -> None:
        """Times shapes on this machine, all workers at once."""
        missing = self.cells.untimed(rows)
        if not missing:
            return
        self.console.print(f"timing {len(missing)} shapes on this machine …")
        seconds = {"seconds": CALIBRATION_SECONDS}
        tasks = [
            Task(key, "calibrate", self._about_shape(run) | seconds, program=packing.shape_of(run))
            for key, run in missing.items()
        ]
        done = itertools.count(1)
        with self.console.status("") as shown:  # on a terminal alone

            def on_event(event: dict) -> None:
                if event["event"] in ("done", "failed"):
                    shown.update(terminal.text(f"{next(done)} of {len(tasks)} timed"))

            answers = self._runner.run(tasks, on_event)
        reasons = {answer.reason for answer in answers.values()}
        if len(reasons) == 1 and None not in reasons:  # all for the same reason: then no cell can train either
            raise BadInputError(f"{self._args.grid}: {reasons.pop()}")
        timed = {key: timings.Timing.of(answer.value) for key, answer in answers.items() if answer.value is not None}
        self.cells.timings.save(self.cells.timings.load() | timed)

    def _choose_pack_sizes(self, rows: Sequence[Row]) -> None:
        """As many members as a device holds, for every shape that several cells have."""
        if self._args.pack != "auto" or not machine.has_accelerator():
            return
        shapes = collections.Counter(packing.shape_of(row.cell.run) for row in rows)
        tasks = {
            shape: Task(row.run_id, "pack_size", self._about_shape(row.cell.run) | {"most": shapes[shape]})
            for row in rows
            if shapes[shape := packing.shape_of(row.cell.run)] > 1
        }
        if tasks:
            self.console.print(f"compiling {len(tasks)} shapes, to see how many runs of each fit a device …")
            answers = self._runner.run(list(tasks.values()))
            found = {shape: answers[task.key].value for shape, task in tasks.items()}
            self.pack_sizes = {shape: value["members"] for shape, value in found.items() if value is not None}

    def _about_shape(self, run: config.RunConfig) -> dict:
        return {
            "execution": fields.to_dict(self._grid.execution),
            "cache_dir": str(self._cache_dir),
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
        order = self._order_from_here(rows, later)
        packs = {pack.key: pack for pack in order.packs}
        display = progress.Progress(
            self.console, list(packs.values()), workers=self.workers,
            done=sum(map(self.cells.is_done, self.cells.rows)), total=len(self.cells.rows),
            in_place={"rich": True, "auto": None}.get(self._args.progress, False),
        )  # fmt: skip
        waiting, beside = set(packs), threading.Thread(target=when_idle, daemon=True)
        signs.clear_stale(self._workdir)
        run_ids = {pack.key: pack.run_ids for pack in packs.values()}
        board = signs.Board(self._workdir, self._args.executor, run_ids)  # of this process and its workers

        listeners = [display.on_event, *([] if self.executor.gives_own_signs else [board.on_event])]

        def on_event(event: dict) -> None:
            self.events(event)
            if event["event"] in ("done", "failed"):
                for row in packs[event["key"]].rows:
                    record = self._settle(row, event.get("reason"))
                    self.events({"event": "cell", "row": row, "record": record})
                waiting.discard(event["key"])
                if 0 < len(waiting) < self.workers and beside.ident is None:
                    beside.start()

        try:
            with self.manifest.training(), display, board, self.events.heard_by(*listeners):
                self._runner.run(self._tasks(order), on_event)
            if beside.ident is not None:
                beside.join()
            signs.clear_stale(self._workdir)  # of a call killed seconds before this one, which were too young before
            self._forget_wrong_timings()
        except KeyboardInterrupt:
            self.say(self.executor.farewell())
            raise
        finally:
            self.write_manifest()

    def _forget_wrong_timings(self) -> None:
        """Shapes whose cells took otherwise than their timing said are timed again by the next plan."""
        if not (self.executor.times_here and self.cells.hardware.is_here):
            return
        median = {shape: statistics.median(ratios) for shape, ratios in self._ratios.items()}
        wrong = {s: r for s, r in median.items() if not 1 / DISAGREEMENT < r < DISAGREEMENT}
        known = self.cells.timings.load()
        if wrong and known.keys() & wrong.keys():
            self.cells.timings.save({shape: timing for shape, timing in known.items() if shape not in wrong})
            low, high = min(wrong.values()), max(wrong.values())
            times = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
            self.say(
                f"{len(wrong)} shapes took {times} times what their timing said, which was taken while the machine was "
                "more, or less, busy: they are timed again by the next plan"
            )

    def _order_from_here(self, rows: Sequence[Row], later: Sequence[Row]) -> disk.Order:
        """What trains next, from the checkpoints that there are."""
        every = [*rows, *later]
        if self._grid.execution.trunks:
            steps = {row.run_id: checkpoint.newest_step(self._workdir, row.run_id) for row in every}
            every = self.cells.shared(every, steps)
            if self.executor.trains_here:
                every = self.cells.predicted(every)
        return self.order(every[: len(rows)], every[len(rows) :], self.workers)

    def _tasks(self, order: disk.Order) -> list[Task]:
        # A worker's share of the disk is of what those that wait leave.
        gigabytes = (self._disk_bytes - order.kept - order.waiting) / self.workers / 1e9
        shared = {
            "execution": fields.to_dict(dataclasses.replace(self._grid.execution, disk_budget_gb=gigabytes)),
            "workdir": str(self._workdir),
            "results": str(self.cells.results),
            "cache_dir": str(self._cache_dir),
            "sweep_name": self._grid.name,
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
        results = self.cells.results
        if reason is not None and not records.is_done(results, row.run_id):
            records.save(results, failed_record(row, self._grid.name, reason))
        record = self.cells.record(row)
        self.cells.found[row.run_id] = record.status
        if record.status == "completed" and record.timing.get("seconds") and row.seconds:
            self._ratios[timings.shape_key(row.cell.run)].append(record.timing["seconds"] / row.seconds)
        self.manifest.cell_ended(record)
        self.write_manifest(at_leisure=True)
        return record

    def write_manifest(self, *, at_leisure: bool = False) -> None:
        self.manifest.write(self.cells.rows, self.cells.found, self.workers, at_leisure=at_leisure)
