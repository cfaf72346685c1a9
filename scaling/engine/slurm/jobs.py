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
import io
import json
import os
import shlex
import signal
import subprocess
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scaling import machine, records
from scaling.engine.folder import signs
from scaling.engine.run import worker
from scaling.engine.run.executor import Detached, Executor, Orders, Runner
from scaling.engine.run.tasks import LOOP, MAX_TRIES, Answer, Attempts, ExecutorError, Task, ignore, stop_if_disk
from scaling.engine.slurm import follow, options
from scaling.engine.slurm.book import OVER, Book, Job, last_line, queue

POLL_SECONDS = 2.0  # between two looks at the jobs' signs
ASK_SECONDS = 15.0  # between two questions to Slurm, which many users ask
# Tasks of one array: what Slurm allows unless its administrator changed MaxArraySize.
MAX_ARRAY = 1000
# Requeued at each time limit for as long as it takes; a job that gets no further ends by itself (see ``job``).
MAX_REQUEUES = 10_000


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
        board.say(ended=ended)
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
    takes_options = True
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
        self.parallel, self.detach = parallel, detach
        self._parameters, self._name, self._loop = parameters, name, loop
        self._jobs: list[Job] = []
        self._last_asked = time.monotonic()

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
            if self.detach is not None and self._are_under_way():
                self._detach(tasks, waiting, members)
            time.sleep(POLL_SECONDS)
            on_event({"event": "tick"})
            for job, event in self._news():
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

    def _are_under_way(self) -> bool:
        """Whether all jobs are queued or running, as far as Slurm can be asked; others are to be settled first."""
        try:
            states = queue(sorted({job.name for job in self._jobs})) if self._jobs else {}
        except ExecutorError:
            return True
        return all(states.get(job.job_id, (OVER[0], ""))[0] not in OVER for job in self._jobs)

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
        name = f"{self._name}-{uuid.uuid4().hex[:8]}"
        with self._sbatch_speaks():
            executor = self._executor(name, after=every)
            follow.submit(self.book, executor, name, self.detach, tasks[0].payload["results"])  # type: ignore[arg-type]  # it detaches
        raise Detached(self.job_ids())

    # ---- submitting -------------------------------------------------------------------------------------------------

    def _submit(self, tasks: Sequence[Task], members: dict[str, set[str]], *, after: Sequence[str] = ()) -> None:
        for i in range(0, len(tasks), MAX_ARRAY):
            self._submit_array(tasks[i : i + MAX_ARRAY], members, after)

    @contextlib.contextmanager
    def _sbatch_speaks(self) -> Iterator[None]:
        """Raises ExecutorError with what sbatch said for whatever submitit raises."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):  # submitit repeats there what sbatch says
                yield
        except Exception as e:  # of submitit's many kinds; nothing was submitted
            raise ExecutorError(f"sbatch: {last_line(str(e) or said.getvalue())}") from None

    def _submit_array(self, tasks: Sequence[Task], members: dict[str, set[str]], after: Sequence[str]) -> None:
        submission = uuid.uuid4().hex[:8]
        entry: dict[str, Any] = {
            "schema": 1, "submission": submission, "name": f"{self._name}-{submission}", "job_id": None, "over": [],
            "tasks": [{"key": task.key, "run_ids": sorted(members[task.key])} for task in tasks],
        }  # fmt: skip
        self.book.write(entry)
        orders = [
            json.dumps({
                "task": {"key": task.key, "command": task.command, "payload": task.payload},
                "run_ids": sorted(members[task.key]), "loop": self._loop, "workdir": str(self.book.workdir),
                "sign": f"slurm-{submission}-{i}",
            })
            for i, task in enumerate(tasks)
        ]  # fmt: skip
        try:
            with self._sbatch_speaks():
                submitted = self._executor(entry["name"], after=after).map_array(job, orders)
        except ExecutorError:
            (self.book.folder / f"{submission}.json").unlink(missing_ok=True)
            raise
        entry["job_id"] = submitted[0].job_id.partition("_")[0]
        self.book.write(entry)
        self._jobs += self.book.jobs_of(entry)

    def _executor(self, name: str, *, after: Sequence[str] = ()):
        """submitit's, for jobs that start when those of ``after`` (job ids) are over, whatever became of them."""
        import submitit

        executor = submitit.SlurmExecutor(self.book.jobs_folder, max_num_timeout=MAX_REQUEUES)
        ours = {"job_name": name, "array_parallelism": self.parallel or MAX_ARRAY}
        # The environment that executors.Local gives its workers, set before Python starts.
        environment = machine.worker_environment()
        exports = [
            f"export {key}={shlex.quote(environment[key])}"
            for key in ("PYTHONPATH", "GLIBC_TUNABLES")
            if key in environment
        ]
        wishes = [self._parameters.get("dependency"), f"afterany:{':'.join(after)}" if after else None]
        if any(wishes):
            ours["dependency"] = ",".join(filter(None, wishes))
        own = {**self._parameters, "setup": [*self._parameters.get("setup", []), *exports]}
        executor.update_parameters(**{**own, **ours})
        return executor

    def test_only(self, num_tasks: int) -> str:
        """What ``sbatch --test-only`` says of an array like that of ``num_tasks`` tasks.

        Raises ExecutorError if it would be refused.
        """
        self.book.jobs_folder.mkdir(parents=True, exist_ok=True)
        executor = self._executor(self._name)
        executor.parameters["map_count"] = min(num_tasks, MAX_ARRAY)
        # submitit shows its script to nobody before it submits it: a private method, present in all of 1.x.
        script = executor._make_submission_file_text("true", "test")
        done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExecutorError(f"sbatch --test-only: {last_line(done.stderr)}")
        return last_line(done.stderr).removeprefix("sbatch: ")

    # ---- following --------------------------------------------------------------------------------------------------

    def _news(self) -> list[tuple[Job, dict]]:
        """What jobs' signs say that they did not say before, and who of them is over without a word."""
        news = []
        for job in self._jobs:
            sign = records.read_or_empty(signs.sign_path(self.book.workdir, job.sign))
            if sign and sign["updated"] > job.updated:
                job.updated = sign["updated"]
                news += [(job, event) for event in self._read(job, sign)]
        if time.monotonic() - self._last_asked > ASK_SECONDS:
            self._last_asked = time.monotonic()
            heard = {id(job) for job, _ in news}
            news += [(job, event) for job, event in self._missing() if id(job) not in heard]
        return news

    def _read(self, job: Job, sign: dict) -> Iterator[dict]:
        ended = sign.get("ended")
        for pack in sign["packs"]:
            if not job.is_running:
                job.is_running = True
                yield {"event": "start"}
            if "step" in pack:
                job.furthest = max(job.furthest, pack["step"])
                yield {"event": "progress", **{k: pack[k] for k in ("run_ids", "step", "num_steps", "loss")}}
            for run_id in set(pack.get("branched", ())) - job.branched:
                job.branched.add(run_id)
                yield {"event": "branched", "run_id": run_id}
        if ended and ended["event"] == "requeued":
            if job.is_running:
                job.is_running = False
                yield {"event": "retry", "reason": f"job {job.job_id} was requeued"}
        elif ended:
            job.furthest = max(job.furthest, ended.get("step", 0))
            if not job.is_running:
                yield {"event": "start"}
            yield {k: v for k, v in ended.items() if k != "step"}

    def _missing(self) -> list[tuple[Job, dict]]:
        """Jobs that Slurm says are over, twice in a row so that a slow file system can bring their answer."""
        try:
            states = queue(sorted({job.name for job in self._jobs}))
        except ExecutorError:
            return []  # a controller that restarts: the jobs do not notice, nor need we
        missing = []
        for job in self._jobs:
            state, _ = states.get(job.job_id, ("gone", ""))
            job.times_missed = job.times_missed + 1 if state in OVER or state == "gone" else 0
            if job.times_missed >= 2:
                log = Path(job.log)
                reason = f"job {job.job_id} {state.lower()} without an answer, log: {log}"
                final = state == "CANCELLED"  # somebody wants it not to run
                missing.append((job, {"event": "failed", "reason": reason, "final": final, "disk": False}))
        return missing


def _run_ids(task: Task) -> set[str]:
    return {worker.cell_from_json(cell).run.run_id for cell in task.payload["cells"]}
