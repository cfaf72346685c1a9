"""Trains the cells of a plan by the workers that there are, and sees that each ends with a record."""

import collections
import dataclasses
import statistics
import threading
from collections.abc import Callable, Sequence

from scaling import fields, records
from scaling.engine.call import Call
from scaling.engine.errors import bad_input
from scaling.engine.folder import signs
from scaling.engine.folder.cells import failed_record
from scaling.engine.plan import disk, packing, plan, timings
from scaling.engine.plan.plan import Means
from scaling.engine.plan.table import Row
from scaling.engine.run import progress, worker
from scaling.engine.run.executor import Executor, Runner
from scaling.engine.run.tasks import Task
from scaling.training import checkpoint

# A timing this many times off was taken while the machine did something else, or does so now.
DISAGREEMENT = 1.5


class Training:
    """Has rows of a call trained by ``runner``, which its ``executor`` started, and settles what each leaves.

    ``means``: what a plan of what is left is made with, as things stand when it is asked.
    """

    def __init__(self, call: Call, executor: Executor, runner: Runner, workers: int, means: Callable[[], Means]):
        self.call, self.workers, self.means = call, workers, means
        self._executor, self._runner = executor, runner
        self._ratios: dict[str, list[float]] = collections.defaultdict(list)  # by shape: seconds taken over predicted

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
        with bad_input():
            means = self.means()
        order = self._order_from_here(rows, later, means)
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
        listeners = [display.on_event, *([] if self._executor.gives_own_signs else [board.on_event])]

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
                self._runner.run(self._tasks(order, means.disk_bytes), on_event)
            if beside.ident is not None:
                beside.join()
            signs.clear_stale(call.workdir)  # of a call killed seconds before this one, which were too young before
            self._forget_wrong_timings()
        except KeyboardInterrupt:
            call.say(self._executor.farewell())
            raise
        finally:
            call.write_manifest(self.workers)

    def _forget_wrong_timings(self) -> None:
        """Drops timings of shapes whose cells took otherwise than they said: the next plan times these again."""
        if not (self._executor.times_here and self.call.hardware.is_here):
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

    def _order_from_here(self, rows: Sequence[Row], later: Sequence[Row], means: Means) -> disk.Order:
        """What trains next, from the checkpoints that there are: the plan of what is left."""
        every = [*rows, *later]
        steps = {row.run_id: checkpoint.newest_step(self.call.workdir, row.run_id) for row in every}
        mine = {row.run_id for row in every}
        with bad_input():
            made = plan.make(every, mine, (), means, steps=steps, workers=self.workers)
        return made.held_out if rows[0].cell.holdout else made.fitted

    def _tasks(self, order: disk.Order, disk_bytes: float) -> list[Task]:
        call = self.call
        # A worker's share of the disk is of what those that wait leave.
        gigabytes = (disk_bytes - order.kept - order.waiting) / self.workers / 1e9
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
        self.call.write_manifest(self.workers, at_leisure=True)
        return record
