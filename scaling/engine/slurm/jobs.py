"""Tasks as jobs of a Slurm cluster, through submitit: an array, one job a task.

Jobs outlive the process that submitted them. It keeps a book, ``<workdir>/slurm/<submission>.json``, written before the
submission and again after it: a later call finds its predecessor's jobs there, and by their name in the queue, and
follows them; it submits nothing twice. Jobs report by their sign of life (``signs.Board``), in which they also leave
their answer. The work folder, the results and the prepared data are on a file system that all nodes share.

Preemption and time limit: Slurm's signal makes the loop save a checkpoint, then submitit requeues the job and the run
goes on from there. A job that dies is submitted again, as a worker of ``workers.Local`` is started again.

What a trunk carries is submitted when a job has left its checkpoint. Detached, nobody is there to see that: then it is
submitted at once, to start when the trunk's job is over, and a last job gives the whole command again
(``slurm_follow``).

submitit hands a job over as a pickle, in ``<workdir>/slurm/jobs``. What it pickles here is the name of a plain
function, ``job`` or ``follow.follow``, and one string, JSON: no grid, record or config is ever pickled.
"""

import contextlib
import importlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scaling import records
from scaling.engine.folder import signs
from scaling.engine.run import worker
from scaling.engine.run.executor import Detached, Executor, Orders, Runner
from scaling.engine.run.tasks import LOOP, MAX_TRIES, Answer, Attempts, Task, ignore, stop_if_disk
from scaling.engine.slurm import follow, news, options
from scaling.engine.slurm.book import Book, Job
from scaling.engine.slurm.submitting import MAX_ARRAY, Submitter

POLL_SECONDS = 2.0  # between two looks at the jobs' signs


def job(order: str) -> None:
    """What a job of the array runs: one task, its answer left in its sign of life.

    ``order`` is JSON: the task, the module that trains, the work folder, and the name of the sign.
    """
    told = json.loads(order)
    task, workdir = Task(**told["task"]), Path(told["workdir"])
    loop = importlib.import_module(told["loop"])
    asked: list[int] = []

    def stop(signum, frame) -> None:
        asked.append(signum)
        loop.stop_requested.set()

    # submitit's own handlers requeue at once. Until here that was right; from here on there is something to save.
    requeue_signal = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
    requeue = signal.signal(requeue_signal, stop)
    signal.signal(signal.SIGTERM, stop)
    before = records.read_or_empty(signs.sign_path(workdir, told["sign"])).get("ended", {})
    furthest, about = -1, {"name": told["sign"], "job": _own_id()}
    with signs.Board(workdir, "slurm", {task.key: told["run_ids"]}, **about) as board:

        def on_event(event: dict) -> None:
            if event["event"] == "said":  # into the job's log
                print(event["text"], flush=True)
            nonlocal furthest
            furthest = max(furthest, event.get("step", furthest))
            board.on_event({**event, "key": task.key})

        board.on_event({"event": "start", "key": task.key})
        try:
            answer = worker.execute(loop, task.command, task.payload, on_event)
            ended: dict[str, Any] = {"event": "done", "answer": answer}
        except loop.Interrupted:
            if requeue_signal not in asked:  # SIGTERM alone: cancelled, or preempted by a Slurm that requeues itself
                raise SystemExit(f"stopped by a signal after step {furthest}, where it saved a checkpoint") from None
            ended = _requeued(furthest, before)
        except Exception as e:
            with contextlib.suppress(OSError):
                traceback.print_exc()  # into the job's log
            ended = {**worker.failure(e), "step": furthest}
        board.leave(ended)
    if ended["event"] == "requeued":
        requeue(requeue_signal, None)  # type: ignore[operator, misc]  # submitit's handler


def _checkpoint(order: str):
    """submitit's hook: what a requeued job runs. The same: where to go on is in the run's own checkpoint."""
    import submitit

    return submitit.helpers.DelayedSubmission(job, order)


job.checkpoint = _checkpoint  # type: ignore[attr-defined]  # where submitit looks for its hook


def _own_id() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _requeued(furthest: int, before: dict) -> dict:
    """How a job ends that ran out of time: requeued, unless that happened too often without getting any further."""
    fruitless = before.get("fruitless", 0) + 1 if furthest <= before.get("step", -1) else 0
    if fruitless >= MAX_TRIES:
        reason = f"stopped {fruitless + 1} times at step {furthest} by its time limit: write a longer --slurm time"
        return {"event": "failed", "reason": reason, "final": True, "disk": False, "step": furthest}
    return {"event": "requeued", "step": furthest, "fruitless": fruitless}


# ---- the executor ---------------------------------------------------------------------------------------------------


class Jobs(Executor):
    """Jobs of a Slurm cluster; ``options`` as ``--slurm`` takes them (see ``options.parse``)."""

    trains_here = False
    gives_own_signs = True
    can_detach = True
    options_help = options.HELP
    needs_disk = "Slurm's jobs read their orders from it"

    def __init__(self, orders: Orders):
        super().__init__(orders)
        parameters = options.parse(orders.options)
        name = parameters.pop("job_name", orders.name)
        detach = orders.command if orders.detach else None
        self._slurm = Slurm(
            orders.workdir, parameters, name=name, parallel=orders.workers, loop=orders.loop, detach=detach
        )

    def start(self, workers: int, lock_fds: Sequence[int] = ()) -> Runner:
        return self._slurm

    def test(self, num_packs: int) -> str:
        return f"sbatch --test-only: {self._slurm.test_only(num_packs)}"

    def settle(self, is_done: Callable[[str], bool]) -> None:
        self._slurm.settle(is_done)

    def farewell(self) -> str:
        return f"{self._slurm.job_ids()} left to Slurm: the same command follows again, scancel ends them"

    @classmethod
    def left_behind(cls, workdir: Path) -> str | None:
        ids = Book(workdir).unfinished()
        return f"{' '.join(ids)}): follow them with --executor slurm, or end them with scancel" if ids else None

    @classmethod
    def has_submitted(cls, workdir: Path) -> bool:
        return bool(Book(workdir).submissions())

    @classmethod
    def queued(cls, workdir: Path) -> dict[str, str]:
        return Book(workdir).queued()


class Slurm:
    """Runs tasks as jobs, ``parallel`` of an array at a time (None: as many as the cluster gives).

    ``parameters`` as ``options.parse`` returns them. Interrupted, it leaves the jobs to Slurm; so it does with
    ``detach``, a command's arguments, as soon as all is submitted: what waits for others as jobs that depend on them,
    and one that gives that command when all are over (see ``slurm_follow``).
    """

    def __init__(
        self,
        workdir: Path,
        parameters: dict,
        *,
        name: str,
        parallel: int | None = None,
        loop: str = LOOP,
        detach: Sequence[str] | None = None,
    ):
        self.book = Book(workdir)
        self._submitter = Submitter(self.book, parameters, name=name, parallel=parallel, loop=loop)
        self._news = news.News(self.book.workdir)
        self.detach = detach
        self._jobs: list[Job] = []

    def close(self) -> None:
        """Leaves the jobs to Slurm."""

    def run(self, tasks: Sequence[Task], on_event: Callable[[dict], None] = ignore) -> dict[str, Answer]:
        """Submits the tasks that no earlier job is at, and returns when all are answered. Events as from ``Local``.

        Raises Detached; ExecutorError if Slurm refuses the jobs.
        """
        self._jobs = self.book.jobs()
        by_key, members = {task.key: task for task in tasks}, {task.key: _run_ids(task) for task in tasks}
        ours = {job.key for job in self._jobs if members.get(job.key) == set(job.run_ids)}
        waiting = [task for task in tasks if task.key not in ours]
        attempts = {task.key: Attempts() for task in tasks}
        answers: dict[str, Answer] = {}
        held = {name for task in tasks for name in task.releases}  # until a job says so or is over
        while len(answers) < len(tasks):
            held -= {name for task in tasks if task.key in answers for name in task.releases}
            taken = {run_id for job in self._jobs for run_id in job.run_ids}  # by a pack of an earlier call, perhaps
            free = [task for task in waiting if not members[task.key] & taken and held.isdisjoint(task.after)]
            if free and self.detach is not None:
                follow.refuse_in_vain(free[0].payload["results"])
            self._submit(free, members)
            waiting = [task for task in waiting if task not in free]
            if self.detach is not None and news.are_under_way(self._jobs):
                self._detach(tasks, waiting, members)
            time.sleep(POLL_SECONDS)
            on_event({"event": "tick"})
            for job, event in self._news.of(self._jobs):
                ended = event["event"] in ("done", "failed")
                if ended:
                    self._jobs.remove(job)
                    self.book.close(job)
                if members.get(job.key) != set(job.run_ids) or job.key in answers:
                    continue
                attempts[job.key].furthest = max(attempts[job.key].furthest, job.furthest)
                if event["event"] == "branched":
                    held.discard(event["run_id"])
                elif event["event"] == "done":
                    answers[job.key] = Answer(event.pop("answer"))
                elif ended and (stop_if_disk(event) or event.pop("final") or attempts[job.key].are_used_up()):  # type: ignore[func-returns-value]  # it raises, or says nothing
                    answers[job.key] = Answer(None, event["reason"])
                elif ended:
                    event["event"] = "retry"
                    waiting.append(by_key[job.key])
                on_event({**event, "key": job.key, "worker": f"job {job.job_id}", "log": job.log})
        return answers

    def job_ids(self) -> str:
        """The submitted arrays that are not over, in words."""
        ids = sorted({job.job_id.partition("_")[0] for job in self._jobs}, key=int)
        return f"{'job' if len(ids) == 1 else 'jobs'} {' '.join(ids)}"

    def settle(self, is_done: Callable[[str], bool]) -> None:
        """Forgets the jobs of earlier calls that have answered and left a record of each of their runs (run_ids)."""
        for job in self.book.jobs():
            ended = records.read_or_empty(signs.sign_path(self.book.workdir, job.sign)).get("ended")
            if ended and ended["event"] == "done" and all(map(is_done, job.run_ids)):
                self.book.close(job)

    # ---- detaching --------------------------------------------------------------------------------------------------

    def _detach(self, tasks: Sequence[Task], waiting: Sequence[Task], members: dict[str, set[str]]) -> NoReturn:
        """Submits what waits for others and the follow-up, and leaves them to Slurm.

        What a trunk carries then starts when it is over, not when it has got there: Slurm knows of no branches. If the
        trunk has failed it trains from the start, to the same record.

        Raises Detached.
        """
        job_of = {job.key: job.job_id for job in self._jobs}
        groups: dict[tuple[str, ...], list[Task]] = {}
        for task in waiting:
            trunks = {job_of[t.key] for t in tasks if t.key in job_of and not set(t.releases).isdisjoint(task.after)}
            if trunks:  # nobody's: an earlier call's pack is at its runs; the follow-up sees to it
                groups.setdefault(tuple(sorted(trunks)), []).append(task)
        for names, riders in groups.items():
            self._submit(riders, members, after=names)
        every = sorted({job.job_id.partition("_")[0] for job in self._jobs}, key=int)
        assert self.detach is not None  # whoever calls this has seen so
        self._submitter.submit_follow_up(self.detach, tasks[0].payload["results"], after=every)
        raise Detached(self.job_ids())

    def _submit(self, tasks: Sequence[Task], members: dict[str, set[str]], *, after: Sequence[str] = ()) -> None:
        for i in range(0, len(tasks), MAX_ARRAY):
            self._jobs += self._submitter.submit(job, tasks[i : i + MAX_ARRAY], members, after=after)

    def test_only(self, num_tasks: int) -> str:
        """What ``sbatch --test-only`` says of an array like that of ``num_tasks`` tasks.

        Raises ExecutorError if it would be refused.
        """
        return self._submitter.test_only(num_tasks)


def _run_ids(task: Task) -> set[str]:
    return {worker.cell_from_json(cell).run.run_id for cell in task.payload["cells"]}
