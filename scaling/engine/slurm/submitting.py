"""Submits tasks to Slurm through submitit, as arrays, and says what sbatch said where it refuses them."""

import contextlib
import io
import json
import shlex
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from scaling import machine
from scaling.engine.run.tasks import ExecutorError, Task
from scaling.engine.slurm import follow
from scaling.engine.slurm.book import Book, Job, last_line

# Tasks of one array: what Slurm allows unless its administrator changed MaxArraySize.
MAX_ARRAY = 1000
# Requeued at each time limit for as long as it takes; a job that gets no further ends by itself (see ``jobs.job``).
MAX_REQUEUES = 10_000


class Submitter:
    """Submits jobs under the ``name`` of a sweep, with the ``parameters`` of ``options.parse``, and enters them in the
    book.

    ``parallel``: of an array at a time; None for as many as the cluster gives. ``loop``: the module that trains.
    """

    def __init__(self, book: Book, parameters: dict, *, name: str, parallel: int | None, loop: str):
        self._book, self._parameters, self._name = book, parameters, name
        self._parallel, self._loop = parallel, loop

    def submit(
        self,
        function: Callable[[str], None],
        tasks: Sequence[Task],
        members: Mapping[str, set[str]],
        *,
        after: Sequence[str] = (),
    ) -> list[Job]:
        """Submits at most ``MAX_ARRAY`` tasks as one array of jobs that call ``function``, each with its order.

        ``members``: run_ids by a task's key. ``after``: job ids that have to be over first. Raises ExecutorError if
        Slurm refuses the array.
        """
        submission = uuid.uuid4().hex[:8]
        name = f"{self._name}-{submission}"
        entry = {
            "schema": 1, "submission": submission, "name": name, "job_id": None, "over": [],
            "tasks": [{"key": task.key, "run_ids": sorted(members[task.key])} for task in tasks],
        }  # fmt: skip
        self._book.write(entry)
        orders = [
            json.dumps({
                "task": {"key": task.key, "command": task.command, "payload": task.payload},
                "run_ids": sorted(members[task.key]), "loop": self._loop, "workdir": str(self._book.workdir),
                "sign": f"slurm-{submission}-{i}",
            })
            for i, task in enumerate(tasks)
        ]  # fmt: skip
        try:
            with _sbatch_speaks():
                submitted = self._executor(name, after=after).map_array(function, orders)
        except ExecutorError:
            (self._book.folder / f"{submission}.json").unlink(missing_ok=True)
            raise
        entry["job_id"] = submitted[0].job_id.partition("_")[0]
        self._book.write(entry)
        return list(self._book.jobs_of(entry))

    def submit_follow_up(self, command: Sequence[str], results: Path, *, after: Sequence[str]) -> None:
        """Submits the job that gives ``command`` again when those of ``after`` are over, unless one is queued.

        Raises ExecutorError if Slurm refuses it.
        """
        name = f"{self._name}-{uuid.uuid4().hex[:8]}"
        with _sbatch_speaks():
            executor = self._executor(name, after=after)
            follow.submit(self._book, executor, name, command, results)

    def test_only(self, num_tasks: int) -> str:
        """What ``sbatch --test-only`` says of an array like that of ``num_tasks`` tasks.

        Raises ExecutorError if it would be refused.
        """
        self._book.jobs_folder.mkdir(parents=True, exist_ok=True)
        executor = self._executor(self._name)
        executor.parameters["map_count"] = min(num_tasks, MAX_ARRAY)
        # submitit shows its script to nobody before it submits it: a private method, present in all of 1.x.
        script = executor._make_submission_file_text("true", "test")
        done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExecutorError(f"sbatch --test-only: {last_line(done.stderr)}")
        return last_line(done.stderr).removeprefix("sbatch: ")

    def _executor(self, name: str, *, after: Sequence[str] = ()):
        """submitit's, for jobs that start when those of ``after`` (job ids) are over, whatever became of them."""
        import submitit

        executor = submitit.SlurmExecutor(self._book.jobs_folder, max_num_timeout=MAX_REQUEUES)
        ours = {"job_name": name, "array_parallelism": self._parallel or MAX_ARRAY}
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


@contextlib.contextmanager
def _sbatch_speaks() -> Iterator[None]:
    """Raises ExecutorError with what sbatch said for whatever submitit raises."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # submitit repeats there what sbatch says
            yield
    except Exception as e:  # of submitit's many kinds; nothing was submitted
        raise ExecutorError(f"sbatch: {last_line(str(e) or said.getvalue())}") from None
