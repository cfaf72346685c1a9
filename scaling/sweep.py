"""The main command: a grid → its plan → the runs → laws, forecast, report.

    python -m scaling.sweep --grid sweeps/chinchilla.yaml

What is done stays done: the command can be stopped at any moment and given again.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from scaling import grid, machine, records, storage, terminal
from scaling.conclusion import Conclusion, get_ready
from scaling.engine import options, show
from scaling.engine.executors import EXECUTORS
from scaling.engine.folder import lease, manifest
from scaling.engine.folder.cells import Cells, Selection, of_another_grid, select
from scaling.engine.folder.lock import HeldError
from scaling.engine.folder.workdir import claim, give_up
from scaling.engine.plan import table
from scaling.engine.plan.timings import TimingCache
from scaling.engine.run import hosts, status, tasks
from scaling.engine.run.events import JsonLines, Sink
from scaling.engine.run.executor import Detached
from scaling.engine.session import BadInputError, Session, bad_input
from scaling.engine.slices import meshes
from scaling.engine.slurm import launch
from scaling.engine.slurm import options as slurm_options
from scaling.execution import ExecutionConfig
from scaling.training import distributed
from scaling.training.distributed import Group

DONE, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 2, 3, tasks.INTERRUPTED


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None, *, loop: str = tasks.LOOP) -> int:
    """Runs the command and returns its exit code; ``loop`` names the module that trains."""
    args = _parser().parse_args(argv)
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a log in ASCII is better than none
    as_json = args.progress == "json"  # alone on stdout, so that another program can read it
    console = terminal.console(sys.stderr if as_json else sys.stdout)
    # A signal that is ignored stays so: nohup's hang-up.
    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, _interrupt) for s in wanted}
    try:
        return _on_this_host(args, arguments, console, loop)
    except Detached as e:
        console.print(f"submitted: {e}; the last of them gives this command again; see how they do with --status")
        return DONE
    except (BadInputError, HeldError, tasks.ExecutorError) as e:
        print(f"error: {e}", file=sys.stderr)
        return BAD_INPUT
    except storage.errors() as e:
        print(f"error: {e}; nothing that was finished is lost: mend it and give the same command", file=sys.stderr)
        return INCOMPLETE
    except KeyboardInterrupt:
        print(f"interrupted; go on from here with: {_typed(arguments)}", file=sys.stderr)
        return INTERRUPTED
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _typed(arguments: Sequence[str]) -> str:
    return f"python -m scaling.sweep {shlex.join(arguments)}"


def _on_this_host(args: argparse.Namespace, arguments: Sequence[str], console: Console, loop: str) -> int:
    """The whole command; as one of several processes, its part: process 0 leads, the others follow and say nothing."""
    with bad_input():
        place, cache_dir = distributed.parse(args.distributed), storage.cache_dir()
        alone = not EXECUTORS[args.executor].can_be_distributed
        if place is not None and (alone or args.plan or args.status or args.shard):
            raise ValueError(f"--distributed {args.distributed}: it trains: write --executor inline, without --shard")
    if place is None:
        return Sweep(args, arguments, console, loop).run()
    with bad_input():
        group = distributed.join(place)
    if not group.is_first:
        code = hosts.follow(group, cache_dir, loop)
        group.leave()
        return code
    code = INTERRUPTED
    try:
        code = Sweep(args, arguments, console, loop, group).run()
    except (BadInputError, HeldError, tasks.ExecutorError):
        code = BAD_INPUT
        raise
    except storage.errors():  # as in ``main``: a launcher that requeues on 130 would do so for ever
        code = INCOMPLETE
        raise
    finally:
        group.publish({"stop": code})
        group.leave()
    return code


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
    add("--results", metavar="DIR", type=_folder,
        help="records, laws and report: a path, or gs://bucket/folder (default results/<grid's name>)")  # fmt: skip
    add("--workdir", metavar="DIR", type=_folder,
        help="checkpoints and logs, likewise (default .scaling/<grid's name>); logs stay on a disk")  # fmt: skip
    add("--only", metavar="RUN_ID", nargs="+", default=[], help="train these cells alone (first digits suffice)")
    add("--shard", metavar="I/N", type=_shard, help="train every N-th cell, the I-th share of 1…N: one per machine")
    add("--status", action="store_true", help="print what is done, runs, waits or failed, and stop")
    add("--progress", choices=("auto", "rich", "plain", "json"), default="auto",
        help="while it runs: redrawn in place (rich; auto on a terminal), a line a minute (plain), or every event as a "
        "line of JSON, with all else on stderr")  # fmt: skip
    add("--executor", choices=tuple(EXECUTORS), default="local",
        help="worker processes here, all in this process, or jobs of a Slurm cluster")  # fmt: skip
    add("--workers", metavar="N", type=_workers, default="auto",
        help="worker processes (auto: one a core on CPU); with slurm, jobs at a time (auto: no limit)")  # fmt: skip
    slurm_options.add_options(parser)
    add("--distributed", metavar="HOW", default="off",
        help="with --executor inline, the same command on every host: one model over the devices of all. auto (TPU, "
        "Slurm, GKE), or coordinator=HOST:PORT,processes=N,process=I (default off)")  # fmt: skip
    add("--pack", metavar="K", type=_workers, default="auto",
        help="train up to K cells of equal shape as one program (auto: as many as a device's memory holds; 1 on a CPU, "
        "where more gains nothing)")  # fmt: skip
    add("--disk-budget", metavar="GB", type=_gigabytes,
        help="of all checkpoints together (default: the grid's execution.disk_budget_gb)")  # fmt: skip
    add("--train-unkept", action="store_true", help="train again the completed runs whose final checkpoint "
        "execution.keep_final_checkpoint asks for and is not there")  # fmt: skip
    add("--remove-orphans", action="store_true", help="remove checkpoints of runs that the grid no longer has")
    options.add_options(parser)
    meshes.add_options(parser)
    launch.add_options(parser)
    return parser


def _folder(text: str) -> Path:
    try:
        return storage.folder(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _workers(text: str) -> int | str:
    return text if text == "auto" else options.whole_number(text)


def _gigabytes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes above 0")
    return float(text)


def _shard(text: str) -> str:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 ≤ I ≤ N, e.g. 1/4")
    return text


def _require_laws(path: str, names: Sequence[str], *, may_import: bool) -> list[str]:
    """Returns those of ``names`` that were not checked: a law in a module of the user's own is code that runs when it
    is imported, which what trains nothing leaves alone. Raises ValueError before anything trains, not after, for a law
    that does not exist."""
    if names:
        from scaling.laws.forms import catalogue
    unchecked = []
    for i, name in enumerate(names):
        if ":" in name and not may_import:
            unchecked.append(name)
            continue
        try:
            catalogue.get(name)
        except ValueError as e:
            raise ValueError(f"{path}: fit.laws[{i}]: {e}") from None
    return unchecked


def _check_workdir(workdir: Path, grid_path: str, name: str, cache_dir: Path) -> None:
    """Raises ValueError, in one line, for a work folder whose checkpoints could never be read, or that is another's."""
    if name in ("", ".", ".."):
        raise ValueError(f"{grid_path}: its folders would be called {name!r}: give the file another name")
    here = workdir if storage.is_remote(workdir) else workdir.absolute()
    try:
        storage.require_literal(here)
    except ValueError as e:
        raise ValueError(f"--workdir {e}") from None
    cache = cache_dir.absolute()
    if here == cache or cache in here.parents or here in cache.parents:
        raise ValueError(
            f"--workdir {workdir}: checkpoints would lie among prepared data, which are in {cache_dir}: write another "
            "--workdir, or give the grid's file another name"
        )


def _check_buckets(args: argparse.Namespace, execution: ExecutionConfig) -> None:
    """Raises ValueError, in one line, for what a folder in a bucket cannot do."""
    results, workdir = (folder and storage.is_remote(folder) for folder in (args.results, args.workdir))
    if workdir and not os.fspath(args.workdir).startswith("gs://"):
        raise ValueError(f"--workdir {args.workdir}: checkpoints go to a disk or to gs://: write one of these")
    if workdir and (why := EXECUTORS[args.executor].needs_disk):
        raise ValueError(f"--workdir {args.workdir}: {why}: write a folder on a disk")
    if workdir and execution.tensorboard:
        raise ValueError(f"execution.tensorboard: its files grow, and in {args.workdir} nothing does: write false")
    if results and args.shard:
        raise ValueError(
            f"--shard {args.shard}: shards write sweep.json in turn, by a lock that {args.results} has not: write "
            "a --results on a disk that they share"
        )


class Sweep:
    """One call of the command: what there is, what it plans, trains and concludes."""

    def __init__(
        self, args: argparse.Namespace, arguments: Sequence[str], console: Console, loop: str,
        group: Group | None = None,
    ):  # fmt: skip
        self.args, self.console = args, console
        self.events = Sink(*([JsonLines(sys.stdout)] if args.progress == "json" else []))
        with bad_input():
            meshes.check_options(args)
            self.grid = grid.load(args.grid)
            may_import = not (args.plan or args.status or args.print_launch)
            self._unchecked_laws = _require_laws(args.grid, self.grid.fit.laws or (), may_import=may_import)
            _check_buckets(args, self.grid.execution)
            hardware = options.hardware_of(args, self.grid.hardware, has_accelerator=machine.has_accelerator())
            self.results = args.results or Path("results") / self.grid.name
            self.workdir = args.workdir or Path(".scaling") / self.grid.name
            cache_dir = storage.cache_dir()
            _check_workdir(self.workdir, args.grid, self.grid.name, cache_dir)
            timings = TimingCache(cache_dir, args.workers, self.grid.execution)
            self.cells = Cells(self.grid, self.results, hardware, timings)
        kept = manifest.Manifest(
            self.results, grid=self.grid, grid_path=args.grid, command=_typed(arguments), shard=args.shard,
            hardware=hardware,
        )  # fmt: skip
        self.session = Session(
            args, self.grid, self.cells, kept, console,
            workdir=self.workdir, cache_dir=cache_dir, loop=loop, events=self.events, arguments=arguments, group=group,
        )  # fmt: skip
        self.conclusion = Conclusion(self.cells, self.grid.fit, kept, console)

    def run(self) -> int:
        """Does what the options ask for; returns the exit code."""
        if self.args.status:
            queued = {k: said for kind in EXECUTORS.values() for k, said in kind.queued(self.workdir).items()}
            cells = self.cells
            status.show(self.console, cells.rows, self.results, self.workdir, queued, have_trunks=cells.have_trunks)
            return DONE
        if self.args.print_launch:
            with bad_input():
                print(launch.text_of(self.args.print_launch, _parser(), self.args, self.grid.name), end="")
            return DONE
        if self.args.topology:
            return self._compile_elsewhere()
        for name in self._unchecked_laws:
            self.session.say(f"{self.args.grid}: fit.laws: {name} is not imported by --plan, and so not checked")
        with self._held() as lock_fds:
            selection = self._look()
            if not self.args.plan:
                if not self.args.shard:
                    storage.each(storage.remove_halves, [self.results, self.results / "runs"])
                with bad_input():
                    claim(self.workdir, self.results)
                self.session.tidy(selection.mine)
            self._plan_and_train(selection, lock_fds)
            if self.args.plan:
                return DONE
            if not self.args.shard:  # others may be between two checkpoints
                give_up(self.workdir)
            self._conclude()
            return self._exit_code(selection)

    def _compile_elsewhere(self) -> int:
        with bad_input():
            rows = select(self.cells.rows, self.args.only)
            execution, topology = self.grid.execution, self.args.topology
            fits = meshes.show(self.console, rows, execution, topology, suggest=self.args.suggest)
        return DONE if fits else INCOMPLETE

    @contextlib.contextmanager
    def _held(self) -> Iterator[list[int]]:
        """While it lasts no other sweep works on the results; yields what keeps it so in workers. ``--plan`` takes no
        hold of anything."""
        if self.args.plan:
            yield []
            return
        try:
            lock = lease.hold(self.results, self.args.shard)
        except storage.errors() as e:
            why = getattr(e, "strerror", None) or storage.first_line(e)
            raise BadInputError(f"--results {self.results}: {why}: write a folder that can be written to") from None
        try:
            if not lock.is_effective:
                self.console.print(f"{self.results}: its file system has no locks: start no second sweep on it")
            yield lock.fds
        finally:
            lock.release()

    def _look(self) -> Selection:
        """Finds what is to do; damaged records are set aside (``--plan`` writes nothing and counts them out)."""
        with bad_input():
            if said := of_another_grid(self.results, [row.run_id for row in self.cells.rows], self.args.grid):
                self.session.say(said)
        for line in self.cells.look(set_aside=not self.args.plan):
            self.console.print(line)
        with bad_input():
            selection = self.cells.select(self.args.only, self.args.shard)
            if not self.args.train_unkept:
                return selection
            for row in self.session.unkept(selection.mine):
                del self.cells.found[row.run_id]
                if not self.args.plan:  # kept beside, until the run has been trained again and for good
                    path = records.path_of(self.results, row.run_id)
                    storage.set_aside(path, f"{path.name}.before")
            return self.cells.select(self.args.only, self.args.shard)

    def _plan_and_train(self, selection: Selection, lock_fds: Sequence[int]) -> None:
        """Times what was never timed, shows the plan and, unless that is all, trains."""
        cells, session, args = self.cells, self.session, self.args
        is_elsewhere = args.plan and not cells.hardware.is_here
        if is_elsewhere or not (selection.todo or (args.plan and cells.untimed(cells.rows))):
            cells.predict()
            show.show(session, selection, args)
            return
        rows = selection.todo or selection.mine
        num_packs = len(session.packs(rows))
        with session.started(num_packs, lock_fds):
            session.prepare_data(selection.mine)
            session.measure(rows)
            selection = show.show(session, selection, args)
            if args.plan:
                if said := session.executor.test(num_packs):
                    session.say(said)
                return
            session.write_manifest()
            fitted, held_out = ([row for row in selection.todo if row.cell.holdout == out] for out in (False, True))
            session.train(fitted, later=held_out, when_idle=get_ready)
            if held_out and self._may_train(held_out):
                session.train(held_out, when_idle=get_ready)

    def _may_train(self, held_out: Sequence[table.Row]) -> bool:
        """Forecasts the held-out cells; whether that was possible yet."""
        with bad_input():
            return self.conclusion.forecast(held_out)

    def _conclude(self) -> None:
        """Fits, reports and prints, once every cell of the grid has a record."""
        missing = len(self.cells.without_record())
        if missing:
            self.console.print(
                f"{missing} of {len(self.cells.rows)} cells have no record yet: laws and report wait for them "
                f"(python -m scaling.fit {next(iter(self.cells.apart()))} fits what is there)"
            )
            return
        self.session.write_manifest()
        with bad_input():
            self.conclusion.show()
        self.events({"event": "report", "report": str(self.results / "report.html")})

    def _exit_code(self, selection: Selection) -> int:
        found = self.cells.found
        bad = [row for row in selection.mine if found.get(row.run_id) in ("diverged", "failed")]
        if bad:
            names = ", ".join(f"{row.run_id} {found[row.run_id]}" for row in bad)
            self.console.print(f"{len(bad)} of {len(selection.mine)} cells did not complete: {names}")
        return INCOMPLETE if bad else DONE


if __name__ == "__main__":
    sys.exit(main())
