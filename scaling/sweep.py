"""The main command: a grid → its plan → the runs → laws, forecast, report.

    python -m scaling.sweep --grid sweeps/chinchilla.yaml

What is done stays done: the command can be stopped at any moment and given again.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from scaling import config, grid, records
from scaling.engine import (
    costs,
    disk,
    executors,
    folder,
    graph,
    hosts,
    launch,
    layout,
    manifest,
    plan,
    planning,
    progress,
    slurm,
    slurm_book,
    slurm_options,
    status,
    trunks,
    worker,
)
from scaling.training import checkpoint, distributed
from scaling.training.distributed import Group

DONE, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 2, 3, 130
FORECAST_LEVEL = 0.90
# Stepping time behind a shape's timing. Its compilation, the larger part, is not lost: training reuses the program.
CALIBRATION_SECONDS = 0.5


class BadInputError(Exception):
    """One line: what is wrong with what the person gave, and what to write instead."""


def main(argv: Sequence[str] | None = None, *, loop: str = executors.LOOP) -> int:
    """Runs the command and returns its exit code; ``loop`` names the module that trains."""
    args = _parser().parse_args(argv)
    typed = f"python -m scaling.sweep {shlex.join(sys.argv[1:] if argv is None else argv)}"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a log in ASCII is better than none
    console = progress.console(sys.stdout)
    # A signal that is ignored stays so: nohup's hang-up.
    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, _interrupt) for s in wanted}
    try:
        return _on_this_host(args, typed, console, loop)
    except slurm.Detached as e:
        console.print(f"submitted: {e}; see how they do with --status, and when they are done give the same command")
        return DONE
    except (BadInputError, folder.HeldError, executors.ExecutorError) as e:
        print(f"error: {e}", file=sys.stderr)
        return BAD_INPUT
    except OSError as e:
        print(f"error: {e}; nothing that was finished is lost: mend it and give the same command", file=sys.stderr)
        return INCOMPLETE
    except KeyboardInterrupt:
        print(f"interrupted; go on from here with: {typed}", file=sys.stderr)
        return INTERRUPTED
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _on_this_host(args: argparse.Namespace, typed: str, console: Console, loop: str) -> int:
    """The whole command; as one of several processes, its part: process 0 leads, the others follow and say nothing."""
    with _bad_input():
        place = distributed.parse(args.distributed)
        if place is not None and (args.executor != "inline" or args.plan or args.status or args.shard):
            raise ValueError(f"--distributed {args.distributed}: it trains: write --executor inline, without --shard")
    if place is None:
        return Sweep(args, typed, console, loop).run()
    with _bad_input():
        group = distributed.join(place)
    if not group.is_first:
        code = hosts.follow(group, _cache_dir(), loop)
        group.leave()
        return code
    code = INTERRUPTED
    try:
        code = Sweep(args, typed, console, loop, group).run()
    except (BadInputError, folder.HeldError):
        code = BAD_INPUT
        raise
    finally:
        group.publish({"stop": code})
        group.leave()
    return code


def _cache_dir() -> Path:
    return Path(os.environ.get("SCALING_CACHE") or Path(".scaling") / "data")


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.sweep",
        description="Trains every cell of a grid, fits scaling laws to the results, forecasts the cells held out and "
        "writes a report. Stop it whenever you like: the same command goes on where it was.",
        epilog="Exit codes: 0 done; 2 bad input; 3 some cells diverged or failed; 130 interrupted. Environment: "
        "SCALING_CACHE is the folder for tokenised data and this machine's timings (default .scaling/data).",
    )
    add = parser.add_argument
    add("--grid", required=True, metavar="FILE", help="the grid, a YAML file such as sweeps/chinchilla.yaml")
    add("--plan", action="store_true", help="print what it would cost and stop")
    add("--results", metavar="DIR", type=_folder, help="records, laws and report (default results/<grid's name>)")
    add("--workdir", metavar="DIR", type=_folder, help="checkpoints and logs (default .scaling/<grid's name>)")
    add("--only", metavar="RUN_ID", nargs="+", default=[], help="train these cells alone (first digits suffice)")
    add("--shard", metavar="I/N", type=_shard, help="train every N-th cell, the I-th share of 1…N: one per machine")
    add("--status", action="store_true", help="print what is done, runs, waits or failed, and stop")
    add("--executor", choices=("local", "inline", "slurm"), default="local",
        help="worker processes here, all in this process, or jobs of a Slurm cluster")  # fmt: skip
    add("--workers", metavar="N", type=_workers, default="auto",
        help="worker processes (auto: one a core on CPU); with slurm, jobs at a time (auto: no limit)")  # fmt: skip
    add("--slurm", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="of the jobs: partition=gpu gpus_per_node=1 time=240 …, as submitit or sbatch name them; what is not done "
        "when time is up is requeued and goes on (default time=60, minutes)")  # fmt: skip
    add("--detach", action="store_true", help="with slurm: submit and stop; the next call finds the jobs")
    add("--distributed", metavar="HOW", default="off",
        help="with --executor inline, the same command on every host: one model over the devices of all. auto (TPU, "
        "Slurm, GKE), or coordinator=HOST:PORT,processes=N,process=I (default off)")  # fmt: skip
    add("--pack", metavar="K", type=_workers, default="auto",
        help="train up to K cells of equal shape as one program (auto: as many as a device's memory holds; 1 on a CPU, "
        "where more gains nothing)")  # fmt: skip
    add("--disk-budget", metavar="GB", type=_gigabytes,
        help="of all checkpoints together (default: the grid's execution.disk_budget_gb)")  # fmt: skip
    planning.add_options(parser)
    layout.add_options(parser)
    launch.add_options(parser)
    return parser


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number ≥ 1")
    return int(text)


def _folder(text: str) -> Path:
    if "://" in text:  # as a path it would become a folder called "gs:" here
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder: mount the bucket (gcsfuse) and write where it is")
    return Path(text)


def _workers(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _gigabytes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes above 0")
    return float(text)


def _shard(text: str) -> str:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 ≤ I ≤ N, e.g. 1/4")
    return text


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """ValueErrors are the person's to mend here: they say in one line what to write instead."""
    try:
        yield
    except ValueError as e:
        raise BadInputError(str(e)) from None


def _require_laws(path: str, names: Sequence[str]) -> None:
    """A law that does not exist is said before anything trains, not after."""
    if names:
        from scaling.laws import forms
    for i, name in enumerate(names):
        try:
            forms.get(name)
        except ValueError as e:
            raise ValueError(f"{path}: fit.laws[{i}]: {e}") from None


@dataclass(frozen=True)
class _Selection:
    """What this call is to do: ``mine`` of the grid's rows, of which ``todo`` have no record yet."""

    mine: list[plan.Row]
    todo: list[plan.Row]


class Sweep:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace, typed: str, console: Console, loop: str, group: Group | None = None):
        self.args, self.console, self.loop, self.group = args, console, loop, group
        with _bad_input():
            layout.check_options(args)
            self.grid = grid.load(args.grid)
            _require_laws(args.grid, self.grid.fit.laws or ())
            self.rows = plan.rows(self.grid.cells, self.grid.execution.remat)
            self.hardware = planning.hardware_of(args, self.grid.hardware, has_accelerator=executors.has_accelerator())
        self.budget = planning.budget_of(args)
        self.results = args.results or Path("results") / self.grid.name
        self.workdir = args.workdir or Path(".scaling") / self.grid.name
        self.cache_dir = _cache_dir()
        self.timings = plan.TimingCache(self.cache_dir, args.workers, self.grid.execution)
        self.manifest = manifest.Manifest(
            self.results, grid=self.grid, grid_path=args.grid, command=typed, shard=args.shard, hardware=self.hardware
        )
        self.found: dict[str, str] = {}
        self.workers: int | None = None
        self.pack_sizes: int | dict[str, int] = 1 if args.pack == "auto" else args.pack
        self.disk_bytes = 1e9 * (args.disk_budget or self.grid.execution.disk_budget_gb)
        self.slurm = self._slurm() if args.executor == "slurm" else None
        if self.slurm is None and (args.slurm or args.detach):
            raise BadInputError(f"{'--slurm' if args.slurm else '--detach'}: write --executor slurm with it")

    def _slurm(self) -> slurm.Slurm:
        with _bad_input():
            parameters = slurm_options.parse(self.args.slurm)
        parallel = None if self.args.workers == "auto" else self.args.workers
        name = parameters.pop("job_name", self.grid.name)
        return slurm.Slurm(
            self.workdir, parameters, name=name, parallel=parallel, loop=self.loop, detach=self.args.detach
        )

    def run(self) -> int:
        if self.args.status:
            queued = slurm_book.Book(self.workdir).queued()
            status.show(self.console, self.rows, self.results, self.workdir, queued)
            return DONE
        if self.args.print_launch:
            with _bad_input():
                print(launch.text_of(self.args.print_launch, self.args, self.grid.name), end="")
            return DONE
        if self.args.topology:
            return self._compile_elsewhere()
        with contextlib.ExitStack() as stack:
            fds: list[int] = []
            if not self.args.plan:
                lock = self._lock()
                stack.callback(lock.release)
                fds = lock.fds
            self._look()
            selection = self._select()
            if self.args.plan and not self.hardware.is_here:
                self.rows, self.workers = costs.predict_elsewhere(self.rows, self.hardware), 1
                self._show_plan(selection)
            elif selection.todo or (self.args.plan and not self._predict()):
                self._work(selection, fds)
            else:
                self._predict()
                self._show_plan(selection)
            if self.args.plan:
                return DONE
            self._conclude()
            return self._exit_code(selection)

    def _compile_elsewhere(self) -> int:
        with _bad_input():
            rows = graph.select(self.rows, self.args.only)
            execution, topology = self.grid.execution, self.args.topology
            fits = layout.show(self.console, rows, execution, topology, suggest=self.args.suggest)
        return DONE if fits else INCOMPLETE

    # ---- what is there, what is to do -------------------------------------------------------------------------------

    def _lock(self) -> folder.Lock:
        try:
            lock = folder.Lock(self.results, self.args.shard)
        except OSError as e:
            raise BadInputError(
                f"--results {self.results}: {e.strerror}: write a folder that can be written to"
            ) from None
        if not lock.is_effective:
            self.console.print(f"{self.results}: its file system has no locks: start no second sweep on it")
        return lock

    def _look(self) -> None:
        """Reads which cells are in; damaged records are set aside (``--plan`` writes nothing and counts them out)."""
        self.found, complaints = folder.statuses(
            self.results, [r.run_id for r in self.rows], set_aside=not self.args.plan
        )
        for line in complaints:
            self.console.print(line, markup=False)

    def _is_done(self, row: plan.Row) -> bool:
        return self.found.get(row.run_id, "failed") != "failed"

    def _select(self) -> _Selection:
        with _bad_input():
            mine = graph.select(self.rows, self.args.only)
        together = self.grid.execution.trunks
        if self.args.shard:
            mine = graph.deal(mine, *map(int, self.args.shard.split("/")), together=together)
        self._share_trunks(mine)
        shared = {row.run_id: row for row in self.rows}
        mine = [shared[row.run_id] for row in mine]
        return _Selection(mine, [row for row in mine if not self._is_done(row)])

    def _share_trunks(self, rows: Sequence[plan.Row]) -> None:
        """Finds which of ``rows``, that this call trains or trained, share steps; the others stand for themselves."""
        if self.grid.execution.trunks:
            shared = {row.run_id: row for row in trunks.share(rows)}
            self.rows = [shared.get(row.run_id, row) for row in self.rows]

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def _predict(self) -> bool:
        """Fills in predicted seconds from timings made before; whether that covers every cell."""
        self.rows = plan.predict(self.rows, self.timings.load())
        limit = None if executors.has_accelerator() else plan.MAX_CALIBRATED_STEP_FLOPS
        return not plan.to_calibrate(self.rows, self.timings.load(), limit=limit)

    def _predict_again(self) -> None:
        self.rows = self._with_seconds(self.rows)

    def _with_seconds(self, rows: Sequence[plan.Row]) -> list[plan.Row]:
        if self.hardware.is_here:
            return plan.predict(rows, self.timings.load())
        return costs.predict_elsewhere(rows, self.hardware)

    def _calibrate(self, executor, rows: Sequence[plan.Row]) -> None:
        """Times the shapes of ``rows`` that have not been timed on this machine, all workers at once."""
        known = self.timings.load()
        limit = None if executors.has_accelerator() else plan.MAX_CALIBRATED_STEP_FLOPS
        missing = plan.to_calibrate(rows, known, limit=limit)
        if not missing:
            return
        self.console.print(f"timing {len(missing)} shapes on this machine …")
        seconds = {"seconds": CALIBRATION_SECONDS}
        tasks = [executors.Task(key, "calibrate", self._about_shape(run) | seconds) for key, run in missing.items()]
        answers = executor.run(tasks)
        reasons = {answer.reason for answer in answers.values()}
        if len(reasons) == 1 and None not in reasons:  # all for the same reason: then no cell can train either
            raise BadInputError(f"{self.args.grid}: {reasons.pop()}")
        for key, answer in answers.items():
            if answer.value is not None:
                known[key] = plan.Timing.of(answer.value)
        self.timings.save(known)

    def _show_plan(self, selection: _Selection) -> _Selection:
        """Prints the plan, with what is doubtful about the grid; returns the selection within the budget."""
        mine = {row.run_id for row in selection.mine}
        rows = [row for row in self.rows if row.run_id in mine]
        todo = [row for row in rows if not self._is_done(row)]
        spent = self.manifest.spent_seconds() if self.hardware.is_here else 0.0
        with _bad_input():
            dropped = planning.stay_within(
                self.console, self.budget, todo, self._bill_alone, self.hardware, spent, drop=self.args.drop
            )
        if dropped:
            gone = {row.run_id for row in dropped}
            self.manifest.dropped = dropped
            self.rows = [row for row in self.rows if row.run_id not in gone]
            self._share_trunks([row for row in rows if row.run_id not in gone])
            self._predict_again()
            rows = [row for row in self.rows if row.run_id in mine]
            todo = [row for row in rows if not self._is_done(row)]
        bill = self._bill(todo)
        self.console.print(progress.plan_table(rows, self.found, f"{self.args.grid}: the plan", bill.share))
        line = f"{len(rows)} cells, {len(todo)} to do"
        if todo:
            line += f" on {bill.workers} {'worker' if bill.workers == 1 else 'workers'}"
            line += f": {summary}" if (summary := planning.summary(bill)) else ""
        self.console.print(line, style="bold", soft_wrap=True)
        self._show_trunks(rows, todo, bill.workers)
        with _bad_input():
            findings = self._warn() if todo or self.args.plan else []
            if self.args.json:
                planning.write_json(self.args.json, bill, graph.build(todo, self.pack_sizes), findings)
        return _Selection(rows, todo)

    def _bill_alone(self, rows: Sequence[plan.Row]) -> costs.Bill:
        """The bill of these rows if the others were not in the grid: a trunk that is left out carries nobody."""
        alone = trunks.share(rows) if self.grid.execution.trunks else rows
        return self._bill(self._with_seconds(alone))

    def _show_trunks(self, rows: Sequence[plan.Row], todo: Sequence[plan.Row], workers: int) -> None:
        """Says what sharing saves, and what it takes of the disk; refuses what the disk cannot hold."""
        fitted, held_out = ([row for row in todo if row.cell.holdout == out] for out in (False, True))
        peak = max(self._ordered(*phase, workers).total for phase in ((fitted, held_out), (held_out, ())))
        if self.grid.execution.trunks:
            for line in trunks.describe(rows):
                self._say(line)
        if any(row.carriers for row in todo):
            self._say(f"checkpoints: {progress.compact(peak)}B on disk at once, at the least")

    def _bill(self, rows: Sequence[plan.Row]) -> costs.Bill:
        """What training these rows comes to, and the conclusion where this machine is the one."""
        workers = self.workers or self._num_workers(len(rows))
        wall = plan.predicted_wall(rows, workers)
        if wall is not None and rows and self.hardware.is_here:
            wall += plan.CONCLUSION_SECONDS
        return costs.Bill(rows, self.hardware, workers, wall)

    def _warn(self) -> list:
        about = planning.about_data({row.cell.run.data for row in self.rows}, self._describe_data)
        fit = folder.read_json(self.results / "fit.json")
        findings = planning.warn(self.console, self.rows, self.hardware, fit, about, strict=self.args.strict)
        self.manifest.warnings = [finding.text for finding in findings]
        return findings

    def _describe_data(self, data_config: config.DataConfig) -> dict | None:
        """What is known of a corpus, if it is prepared."""
        from scaling.training import data

        if not data.is_prepared(data_config, self.cache_dir):
            return None
        with _bad_input():
            return data.open(data_config, self.cache_dir).describe()

    def _num_workers(self, num_packs: int) -> int:
        if self.args.executor == "inline":
            return 1
        if self.args.executor == "slurm" and self.args.workers == "auto":
            return num_packs
        return executors.auto_workers(num_packs) if self.args.workers == "auto" else self.args.workers

    # ---- the work ---------------------------------------------------------------------------------------------------

    def _work(self, selection: _Selection, fds: Sequence[int]) -> None:
        """Times what was never timed, shows the plan and, unless that is all, trains."""
        num_packs = len(graph.build(selection.todo or selection.mine, self.pack_sizes))
        self.workers = self._num_workers(num_packs)
        with contextlib.closing(self._executor(fds)) as executor:
            self._prepare_data(selection)
            # This machine's timings say nothing of the cluster's; and processes that time a step together would each
            # stop after a number of their own.
            if self.slurm is None and self.group is None:
                self._calibrate(executor, selection.todo or selection.mine)
                self._choose_pack_sizes(executor, selection.todo or selection.mine)
                self._predict()
            elif self.slurm is not None and not self.hardware.is_here:
                self.rows = costs.predict_elsewhere(self.rows, self.hardware)
            selection = self._show_plan(selection)
            if self.args.plan:
                if self.slurm is not None:
                    self._say(f"sbatch --test-only: {self.slurm.test_only(num_packs)}")
                return
            self._write_manifest()
            todo = {row.run_id for row in selection.todo}
            fitted = [row for row in self.rows if row.run_id in todo and not row.cell.holdout]
            held_out = [row for row in self.rows if row.run_id in todo and row.cell.holdout]
            self._train(executor, fitted, held_out)
            if held_out and self._may_train_held_out(held_out):
                self._forecast()
                self._train(executor, held_out)

    def _executor(self, fds: Sequence[int]) -> executors.Inline | executors.Local | slurm.Slurm:
        if self.slurm is not None:
            return self.slurm
        jobs = slurm_book.Book(self.workdir).unfinished()
        if jobs:
            raise BadInputError(
                f"{self.workdir}: jobs of an earlier call are queued or running ({' '.join(jobs)}): follow them with "
                "--executor slurm, or end them with scancel"
            )
        if self.group is not None:
            return hosts.Leader(self.group, self.loop)
        if self.args.executor == "inline":
            return executors.Inline(self.loop)
        # started first: they import JAX while the data is prepared here
        return executors.Local(self.workers, self.workdir / "logs", loop=self.loop, pass_fds=fds)

    def _prepare_data(self, selection: _Selection) -> None:
        from scaling.training import data

        for data_config in dict.fromkeys(row.cell.run.data for row in selection.mine):
            rows = [row for row in selection.mine if row.cell.run.data == data_config]
            with _bad_input():
                data.prepare(data_config, self.cache_dir, progress=self._say)
                corpus = data.open(data_config, self.cache_dir)
                for row in rows:
                    corpus.require_vocab(row.cell.run.model.vocab_size)
                    corpus.require_horizon(row.plan.num_tokens)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _packs(self, rows: Sequence[plan.Row], later: Sequence[plan.Row] = ()) -> disk.Order:
        """What trains next, from where it is; ``later`` are carried as far as their trunks among ``rows`` go."""
        every = [*rows, *later]
        if self.grid.execution.trunks:
            steps = {row.run_id: checkpoint.newest_step(self.workdir, row.run_id) for row in every}
            every = trunks.share(every, steps)
            if self.slurm is None:
                every = plan.predict(every, self.timings.load())
        return self._ordered(every[: len(rows)], every[len(rows) :], self.workers)

    def _ordered(self, rows: Sequence[plan.Row], later: Sequence[plan.Row], workers: int) -> disk.Order:
        packs = graph.build(rows, self.pack_sizes, carried=later)
        with _bad_input():
            return disk.order(packs, workers, self.disk_bytes)

    def _choose_pack_sizes(self, executor, rows: Sequence[plan.Row]) -> None:
        """As many members as a device holds, for every shape that several cells have."""
        if self.args.pack != "auto" or self.slurm is not None or not executors.has_accelerator():
            return
        shapes = collections.Counter(map(graph.shape_of, rows))
        tasks = {
            shape: executors.Task(row.run_id, "pack_size", self._about_shape(row.cell.run) | {"most": shapes[shape]})
            for row in rows
            if shapes[shape := graph.shape_of(row)] > 1
        }
        if tasks:
            self.console.print(f"compiling {len(tasks)} shapes, to see how many runs of each fit a device …")
            answers = executor.run(list(tasks.values()))
            found = {shape: answers[task.key].value for shape, task in tasks.items()}
            self.pack_sizes = {shape: value["members"] for shape, value in found.items() if value is not None}

    def _about_shape(self, run: config.RunConfig) -> dict:
        return {
            "execution": config.to_dict(self.grid.execution),
            "cache_dir": str(self.cache_dir),
            "run": config.to_dict(run),
        }

    def _train(self, executor, rows: Sequence[plan.Row], later: Sequence[plan.Row] = ()) -> None:
        """Trains the rows in packs and prints a line for each that ends; one that cannot be done gets a record too."""
        if not rows:
            return
        order = self._packs(rows, later)
        packs = {pack.key: pack for pack in order.packs}
        execution = self._execution_of_one_worker(order)
        tasks = [
            executors.Task(pack.key, "train", self._train_payload(pack, execution), pack.after, pack.carried)
            for pack in packs.values()
        ]
        display = progress.Progress(
            self.console, list(packs.values()),
            workers=self.workers, done=sum(map(self._is_done, self.rows)), total=len(self.rows),
        )  # fmt: skip

        board = self._board({pack.key: pack.run_ids for pack in packs.values()})

        def on_event(event: dict) -> None:
            display.on_event(event)
            if self.slurm is None:  # jobs of a cluster give their own
                board.on_event(event)
            if event["event"] in ("done", "failed"):
                pack = packs[event["key"]]
                for row in pack.rows:
                    display.cell_ended(row, self._settle(row, event.get("reason")))

        try:
            with self.manifest.training(), display, board:
                executor.run(tasks, on_event)
        except KeyboardInterrupt:
            if self.slurm is None:
                self._say("stopping: what is running saves a checkpoint (once more: stops at once)")
            else:
                self._say(f"{self.slurm.job_ids()} left to Slurm: the same command follows again, scancel ends them")
            raise
        finally:
            self._write_manifest()

    def _board(self, packs: dict[str, list[str]]) -> status.Board:
        """The sign of life of this process and its workers."""
        status.clear_stale(self.workdir)
        return status.Board(self.workdir, self.args.executor, packs)

    def _execution_of_one_worker(self, order: disk.Order) -> config.ExecutionConfig:
        """The grid's, with this worker's share of the disk: what those that wait leave."""
        gigabytes = (self.disk_bytes - order.waiting) / self.workers / 1e9
        return dataclasses.replace(self.grid.execution, disk_budget_gb=gigabytes)

    def _train_payload(self, pack: graph.Pack, execution: config.ExecutionConfig) -> dict:
        return {
            "cells": [worker.cell_to_json(row.cell) for row in pack.rows],
            "riders": {run_id: [worker.cell_to_json(r.cell) for r in riders] for run_id, riders in pack.riders.items()},
            "execution": config.to_dict(execution),
            "workdir": str(self.workdir),
            "results": str(self.results),
            "cache_dir": str(self.cache_dir),
            "sweep_name": self.grid.name,
        }

    def _settle(self, row: plan.Row, reason: str | None) -> records.RunRecord:
        """The record of a cell that ended: its worker's, or one that says why there is none."""
        path = records.path_of(self.results, row.run_id)
        if reason is not None and not records.is_done(self.results, row.run_id):
            records.save(self.results, folder.failed_record(row, self.grid.name, reason))
        record = records.read(path)
        self.found[row.run_id] = record.status
        self.manifest.cell_ended(record)
        self._write_manifest()
        return record

    def _write_manifest(self) -> None:
        self.manifest.write(self.rows, self.found, self.workers)

    # ---- laws, forecast, report -------------------------------------------------------------------------------------

    def _may_train_held_out(self, held_out: Sequence[plan.Row]) -> bool:
        missing = [row for row in self.rows if not row.cell.holdout and row.run_id not in self.found]
        if missing:
            self.console.print(
                f"{len(held_out)} held-out cells wait: they are forecast first, from all fitted cells, and "
                f"{len(missing)} of those are not in yet; give this command again when they are"
            )
        return not missing

    def _analysis(self):
        """The laws of this grid's fitted cells. Raises ValueError when they are too few for any."""
        from scaling import fit

        runs = [self._record(row) for row in self.rows if row.run_id in self.found]
        options = {field: getattr(self.grid.fit, field) for field in self.grid.fit.__dataclass_fields__}
        if options["laws"] is None:
            del options["laws"]
        return fit.analyse(records.table(runs), records.curves(runs), source=str(self.results), **options)

    def _forecast(self) -> None:
        """Forecasts loss and interval of the held-out cells that are about to train, once and for all."""
        with self.manifest.in_turn():
            self._add_to_forecast()

    def _add_to_forecast(self) -> None:
        with _bad_input():
            forecast = folder.Forecast(self.results)
        known = {entry["run_id"] for entry in forecast.entries}
        new = [r for r in self.rows if r.cell.holdout and r.run_id not in known and not self._is_done(r)]
        if not new:
            return
        from scaling import fit

        self.console.print("fitting the finished cells, to forecast those held out …")
        cells = {row.run_id: _forecast_cell(row, self.grid.fit) for row in new}
        try:
            predicted = fit.forecast(self._analysis(), list(cells.values()), level=FORECAST_LEVEL)
        except ValueError as e:
            self.console.print(f"no forecast: {e}", markup=False)
            return
        fitted = [r for r in self.rows if not r.cell.holdout and self.found.get(r.run_id) == "completed"]
        forecast.add(
            [{**cells[entry["run_id"]], **entry, "level": FORECAST_LEVEL} for entry in predicted],
            [row.run_id for row in fitted],
        )

    def _conclude(self) -> None:
        """Fits, reports and prints, once every cell of the grid has a record."""
        missing = sum(row.run_id not in self.found for row in self.rows)
        if missing:
            self.console.print(
                f"{missing} of {len(self.rows)} cells have no record yet: laws and report wait for them "
                f"(python -m scaling.fit {self.results} fits what is there)"
            )
            return
        from scaling import fit

        self._write_manifest()
        payload, page = folder.read_json(self.results / "fit.json"), self.results / "report.html"
        if payload.get("inputs_sha256") != self._inputs_sha256() or not _is_newer(page, self.results / "fit.json"):
            payload, page = self._fit_and_report()
        self.console.print()
        if "error" in payload:
            self.console.print(f"no laws: {payload['error']}", markup=False)
        else:
            fit.show(self.console, payload)
        planning.show_against_actual(
            self.console, folder.read_json(self.manifest.path), [self._record(row) for row in self.rows]
        )
        self.console.print(f"report: {page}", markup=False)

    def _inputs_sha256(self) -> str:
        """Of all that laws and report are made from: records, forecast, manifest, options and the code that makes them.
        Equal: nothing to do again."""
        here = Path(__file__).parent
        code = [p for p in here.rglob("*") if p.suffix in (".py", ".html") and p.parent.name in ("scaling", "laws")]
        paths = [records.path_of(self.results, row.run_id) for row in self.rows] + sorted(code)
        paths += [self.results / name for name in ("forecast.json", "sweep.json")]
        return folder.digest(paths, repr(self.grid.fit))

    def _fit_and_report(self) -> tuple[dict, Path]:
        """Writes fit.json and the report; returns the one's content and the other's path."""
        from scaling import report

        forecast = self._forecast_against_actual()
        try:
            payload = self._analysis().to_json()
        except ValueError as e:
            payload = {"schema": 1, "error": str(e)}
        payload |= {"forecast": forecast, "inputs_sha256": self._inputs_sha256()}
        records.write_json(self.results / "fit.json", payload)
        with _bad_input():
            return payload, report.build(self.results)

    def _forecast_against_actual(self) -> list[dict]:
        with _bad_input():
            forecast = folder.Forecast(self.results)
        if not forecast.is_intact:
            self.console.print(f"{forecast.path}: does not match its own sha256: it was edited", markup=False)
        entries = []
        for entry in forecast.entries:
            if entry["run_id"] in self.found:
                actual = records.read(records.path_of(self.results, entry["run_id"])).loss
                entries.append({**entry, "actual": actual})
        return entries

    def _record(self, row: plan.Row) -> records.RunRecord:
        return records.read(records.path_of(self.results, row.run_id))

    def _exit_code(self, selection: _Selection) -> int:
        bad = [row for row in selection.mine if self.found.get(row.run_id) in ("diverged", "failed")]
        if bad:
            names = ", ".join(f"{row.run_id} {self.found[row.run_id]}" for row in bad)
            self.console.print(f"{len(bad)} of {len(selection.mine)} cells did not complete: {names}")
        return INCOMPLETE if bad else DONE


def _is_newer(path: Path, than: Path) -> bool:
    """Whether ``path`` is there and was written after ``than``: a call may have been killed between the two."""
    return path.exists() and path.stat().st_mtime_ns >= than.stat().st_mtime_ns


def _forecast_cell(row: plan.Row, fit_config: grid.FitConfig) -> dict:
    """A cell as ``fit.forecast`` takes it, counted by the fit's conventions."""
    return {
        "run_id": row.run_id,
        "num_params": row.plan.num_params[fit_config.num_params],
        "num_tokens": row.plan.num_tokens,
        "flops": row.plan.flops[fit_config.flops],
    }


if __name__ == "__main__":
    sys.exit(main())
