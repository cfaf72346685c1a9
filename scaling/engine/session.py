"""Carries out a plan on behalf of one call of the command: data, timings, packs, and a record for every cell.

with session.started(num_packs):
    session.prepare_data(rows)
    session.measure(rows)
    session.train(rows)
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from scaling import config, fields, machine, objectives
from scaling.engine import measuring
from scaling.engine.call import Call
from scaling.engine.errors import BadInputError, bad_input
from scaling.engine.executors import EXECUTORS
from scaling.engine.housekeeping import Keeper
from scaling.engine.plan import lint, packing, plan, timings
from scaling.engine.plan.plan import Means, Plan
from scaling.engine.plan.table import Row
from scaling.engine.run.executor import Executor
from scaling.engine.training import Training
from scaling.records import read_or_empty
from scaling.training import checkpoint
from scaling.training.distributed import Group


class Session:
    """Plans a call, prepares it and has its cells trained by its executor. How many workers and how large packs there
    will be can be asked before any is started; ``workers`` is None until then.

    Raises BadInputError if the options contradict each other.
    """

    def __init__(self, call: Call, loop: str, group: Group | None = None):
        self.call = call
        self.workers: Any = None  # a number from ``started`` on
        self._pack_sizes: int | dict[str, int] = 1 if call.options.pack == "auto" else call.options.pack  # type: ignore[assignment]  # a number, then
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

    def plan(self, mine: Collection[str], steps: Mapping[str, int] | None = None) -> Plan:
        """The plan for the cells ``mine`` (run_ids), within the budget that was given; ``steps``: that each has
        trained already, where the plan goes by them."""
        call, means = self.call, self.means()
        with bad_input():
            made = plan.make(call.cells.rows, mine, call.cells.done, means, steps=steps)
            spent = call.manifest.spent_seconds() if call.hardware.is_here else 0.0
            made = plan.within(call.options.budget, made, means, spent_seconds=spent, drop=call.options.drop)
            if any(row.start is not None for row in made.todo):
                steps = {row.run_id: checkpoint.newest_step(call.workdir, row.run_id) for row in made.todo}
                self.keeper.require_starts(means.shared(made.todo, steps))
        return made

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
        about = {data: self._described(data) for data in {row.cell.run.data for row in cells.every}}
        tokens = {
            name: {data: known[key] for data, known in about.items() if known is not None}
            for name, key in (("train_tokens", "epoch_tokens"), ("validation_tokens", "validation_tokens"))
        }
        groups = []
        apart = cells.apart()
        for path, rows in apart.items() if not cells.candidates else {cells.results: cells.every}.items():
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
            self._training = Training(self.call, self.executor, self._runner, self.workers, self.means)
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
                        corpus.require_vocab(
                            run.model.vocab_size, objectives.extra_ids(run.objective, run.data.seq_len)
                        )
                        corpus.require_horizon(row.plan.num_tokens)
                        objectives.require_windows(run.objective, corpus, run.eval.final_tokens)

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
        """As ``Training.train``, by the workers that were started."""
        self._training.train(rows, later, when_idle)

    def write_manifest(self) -> None:
        self.call.write_manifest(self.workers)
