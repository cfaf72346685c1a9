"""The main command: a grid → its plan → the runs → laws, forecast, report.

    python -m scaling.sweep --grid sweeps/chinchilla.yaml

What is done stays done: the command can be stopped at any moment and given again.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from scaling import data, grid, machine, records, storage, terminal
from scaling.conclusion import Conclusion, get_ready
from scaling.engine.adopt import adopt
from scaling.engine.call import Call
from scaling.engine.errors import BadInputError, bad_input
from scaling.engine.executors import EXECUTORS
from scaling.engine.folder import lease, manifest
from scaling.engine.folder.cells import Cells, of_another_grid, select
from scaling.engine.folder.lock import HeldError
from scaling.engine.folder.workdir import claim, give_up
from scaling.engine.options import Options, hardware_of, parse, parser
from scaling.engine.plan.plan import Plan
from scaling.engine.plan.table import Row
from scaling.engine.run import hosts, status, tasks
from scaling.engine.run.events import JsonLines, Sink
from scaling.engine.run.executor import Detached
from scaling.engine.session import Session
from scaling.engine.slices import meshes
from scaling.engine.slurm import launch
from scaling.execution import ExecutionConfig
from scaling.rounds import Rounds
from scaling.training import distributed
from scaling.training.distributed import Group

DONE, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 2, 3, tasks.INTERRUPTED


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None, *, loop: str = tasks.LOOP) -> int:
    """Runs the command and returns its exit code; ``loop`` names the module that trains."""
    asked = parse(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a log in ASCII is better than none
    as_json = asked.progress == "json"  # alone on stdout, so that another program can read it
    console = terminal.console(sys.stderr if as_json else sys.stdout)
    # A signal that is ignored stays so: nohup's hang-up.
    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, _interrupt) for s in wanted}
    try:
        return _on_this_host(asked, console, loop)
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
        print(f"interrupted; go on from here with: {asked.command}", file=sys.stderr)
        return INTERRUPTED
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _on_this_host(asked: Options, console: Console, loop: str) -> int:
    """The whole command; as one of several processes, its part: process 0 leads, the others follow and say nothing."""
    with bad_input():
        place, cache_dir = distributed.parse(asked.distributed), storage.cache_dir()
        alone = not EXECUTORS[asked.executor].can_be_distributed
        if place is not None and (alone or asked.plan or asked.status or asked.shard):
            raise ValueError(f"--distributed {asked.distributed}: it trains: write --executor inline, without --shard")
    if place is None:
        return Sweep(asked, console, loop).run()
    with bad_input():
        group = distributed.join(place)
    if not group.is_first:
        code = hosts.follow(group, cache_dir, loop)
        group.leave()
        return code
    code = INTERRUPTED
    try:
        code = Sweep(asked, console, loop, group).run()
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


def _check_buckets(args: Options, execution: ExecutionConfig) -> None:
    """Raises ValueError, in one line, for what a folder in a bucket cannot do."""
    results, workdir = (folder and storage.is_remote(folder) for folder in (args.results, args.workdir))
    if workdir and not os.fspath(args.workdir).startswith("gs://"):  # type: ignore[arg-type]  # there is one
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

    def __init__(self, options: Options, console: Console, loop: str, group: Group | None = None):
        self.options, self.console = options, console
        with bad_input():
            options.check()
            self.grid = grid.load(options.grid, data.epochs_of(storage.cache_dir()))
            may_import = not (options.plan or options.status or options.print_launch)
            self._unchecked_laws = _require_laws(options.grid, self.grid.fit.laws or (), may_import=may_import)
            _check_buckets(options, self.grid.execution)
            hardware = hardware_of(options, self.grid.hardware, has_accelerator=machine.has_accelerator())
            self.results = options.results or Path("results") / self.grid.name
            self.workdir = options.workdir or Path(".scaling") / self.grid.name
            cache_dir = storage.cache_dir()
            _check_workdir(self.workdir, options.grid, self.grid.name, cache_dir)
            self.cells = Cells(self.grid, self.results)
        self.manifest = manifest.Manifest(
            self.results, grid=self.grid, grid_path=options.grid, command=options.command, shard=options.shard,
            hardware=hardware,
        )  # fmt: skip
        events = Sink(*([JsonLines(sys.stdout)] if options.progress == "json" else []))
        self.call = Call(
            options, self.grid, self.cells, hardware, self.manifest, self.workdir, cache_dir, console, events
        )  # fmt: skip
        self.session = Session(self.call, loop, group)
        self.conclusion = Conclusion(self.cells, self.grid.fit, self.manifest, console)
        self.rounds = Rounds(self.call, self.session.means, self.conclusion.analysis)

    def run(self) -> int:
        """Does what the options ask for; returns the exit code."""
        if self.options.status:
            queued = {k: said for kind in EXECUTORS.values() for k, said in kind.queued(self.workdir).items()}
            rows, have_trunks = self.cells.rows, self.grid.execution.trunks
            if said := self.rounds.describe():
                self.call.say(said)
            status.show(self.console, rows, self.results, self.workdir, queued, have_trunks=have_trunks)
            return DONE
        if self.options.print_launch:
            with bad_input():
                print(launch.text_of(self.options.print_launch, parser(), self.options.typed, self.grid.name), end="")
            return DONE
        if self.options.topology:
            return self._compile_elsewhere()
        for name in self._unchecked_laws:
            self.call.say(f"{self.options.grid}: fit.laws: {name} is not imported by --plan, and so not checked")
        with _held(self.results, self.options, self.console) as lock_fds:
            mine = self._look()
            if not self.options.plan:
                self._make_ready(mine)
                self.rounds.advance()  # of a call that was stopped between two rounds
            self._plan_and_train(lock_fds, mine)
            mine = mine if self.grid.design is None else [row.run_id for row in self.cells.rows]
            if self.options.plan:
                return DONE
            if not self.options.shard:  # others may be between two checkpoints
                give_up(self.workdir)
            self._conclude()
            return self._exit_code(mine)

    def _compile_elsewhere(self) -> int:
        with bad_input():
            rows = select(self.cells.every, self.options.only)
            execution, topology = self.grid.execution, self.options.topology
            suggest, out = self.options.suggest, self.options.json
            fits = meshes.show(self.console, rows, execution, topology, suggest=suggest, out=out)  # type: ignore[arg-type]  # there is one: see run
        return DONE if fits else INCOMPLETE

    def _look(self) -> list[str]:
        """Finds what is to do, cells by run_id; damaged records are set aside (``--plan`` writes nothing and counts
        them out)."""
        with bad_input():
            if said := of_another_grid(self.results, [row.run_id for row in self.cells.every], self.options.grid):
                self.call.say(said)
        for line in self.cells.look(set_aside=not self.options.plan):
            self.console.print(line)
        self.rounds.begin()
        with bad_input():
            mine = self.cells.choose(self.options.only, self.options.shard)
            if self.options.train_unkept:
                for row in self.session.keeper.unkept(self._rows_of(mine), self.options.grid):
                    del self.cells.found[row.run_id]
                    if not self.options.plan:  # kept beside, until the run has been trained again and for good
                        path = records.path_of(self.results, row.run_id)
                        storage.set_aside(path, f"{path.name}.before")
        return mine

    def _rows_of(self, mine: Collection[str]) -> list[Row]:
        return [row for row in self.cells.rows if row.run_id in mine]

    def _make_ready(self, mine: Collection[str]) -> None:
        """Claims the work folder and tidies what earlier calls left there."""
        if not self.options.shard:
            storage.each(storage.remove_halves, [self.results, self.results / "runs"])
        with bad_input():
            claim(self.workdir, self.results)
        rows = self._rows_of(mine)
        self.session.executor.settle({row.run_id for row in rows if self.cells.is_done(row)}.__contains__)
        self.session.keeper.tidy(rows, self.call.cache_dir, remove_orphans=self.options.remove_orphans)
        self.rounds.tidy()

    def _plan_and_train(self, lock_fds: Sequence[int], mine: Collection[str]) -> None:
        """Times what was never timed, shows the plan and, unless that is all, trains."""
        session, rounds, only_plan = self.session, self.rounds, self.options.plan
        mine = rounds.of_them(mine)
        todo = self._todo_of(mine)
        for said in rounds.about(is_plan=only_plan):
            self.call.say(said)
        is_elsewhere = only_plan and not self.call.hardware.is_here
        if is_elsewhere or not (todo or (only_plan and session.untimed(self.cells.rows))):
            adopt(session.plan(mine, rounds.steps()), self.call, session.findings)
            return
        rows = todo or self._rows_of(mine)
        num_packs = max(session.num_packs(rows), rounds.batch)
        with session.started(num_packs, lock_fds):
            session.prepare_data([*self._rows_of(mine), *self.cells.candidates])
            session.measure(rows)
            plan = session.plan(mine, rounds.steps())
            adopt(plan, self.call, session.findings)
            if only_plan:
                if doubt := session.executor.test(num_packs):
                    self.call.say(doubt)
                return
            session.write_manifest()
            with self.conclusion.watched(self.call.events):
                self._train(plan)

    def _todo_of(self, mine: Collection[str]) -> list[Row]:
        return [row for row in self._rows_of(mine) if not self.cells.is_done(row)]

    def _train(self, plan: Plan) -> None:
        """Trains a plan's fitted cells, round by round where there are rounds, and then those held out."""
        session, rounds = self.session, self.rounds
        held_out = plan.todo_of(holdout=True)
        while True:
            fitted = plan.todo_of(holdout=False)
            kept = rounds.carried(fitted, held_out, session.workers)
            session.train(fitted, later=[*held_out, *kept], when_idle=get_ready)
            if not rounds.advance():
                break
            mine = rounds.of_them(())
            session.measure(self._todo_of(mine))
            plan = session.plan(mine, rounds.steps())
            adopt(plan, self.call, list)  # what is doubtful about the grid was said of all its cells
            session.write_manifest()
            held_out = plan.todo_of(holdout=True)
        if held_out and self._may_train(held_out):
            session.train(held_out, when_idle=get_ready)

    def _may_train(self, held_out: Sequence[Row]) -> bool:
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
            self.conclusion.conclude()
        self.call.events({"event": "report", "report": str(self.results / "report.html")})

    def _exit_code(self, mine: Collection[str]) -> int:
        found = self.cells.found
        bad = [run_id for run_id in mine if found.get(run_id) in ("diverged", "failed")]
        if bad:
            names = ", ".join(f"{run_id} {found[run_id]}" for run_id in bad)
            self.console.print(f"{len(bad)} of {len(mine)} cells did not complete: {names}")
        return INCOMPLETE if bad else DONE


@contextlib.contextmanager
def _held(results: Path, options: Options, console: Console) -> Iterator[list[int]]:
    """While it lasts no other sweep works on the results; yields what keeps it so in workers. ``--plan`` takes no
    hold of anything."""
    if options.plan:
        yield []
        return
    try:
        lock = lease.hold(results, options.shard)
    except storage.errors() as e:
        why = getattr(e, "strerror", None) or storage.first_line(e)
        raise BadInputError(f"--results {results}: {why}: write a folder that can be written to") from None
    try:
        if not lock.is_effective:
            console.print(f"{results}: its file system has no locks: start no second sweep on it")
        yield lock.fds  # type: ignore[misc]  # a list or tuple of them
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main())
