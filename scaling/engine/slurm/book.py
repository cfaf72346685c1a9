"""The book of a sweep's Slurm jobs, ``<workdir>/slurm/<submission>.json``: what was submitted and is not over yet."""

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scaling import records, storage
from scaling.engine.folder import signs
from scaling.engine.run.tasks import ExecutorError
from scaling.records import read_or_empty

# A job in one of these states will not run again.
OVER = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip


@dataclass
class Job:
    """One job of a submission, as the process that follows it sees it."""

    submission: str
    name: str  # Slurm's, of the whole array
    index: int
    job_id: str
    key: str
    run_ids: list[str]
    log: str = ""
    updated: float = 0.0  # of the newest sign taken in
    is_running: bool = False
    times_missed: int = 0  # by Slurm, in a row, without having left an answer
    furthest: int = 0
    branched: set[str] = field(default_factory=set)  # run ids that its runs have left a checkpoint for

    @property
    def sign(self) -> str:
        return f"slurm-{self.submission}-{self.index}"


class Book:
    """``<workdir>/slurm/<submission>.json`` for every array whose answers have not all been taken in."""

    def __init__(self, workdir: Path):
        self.workdir = storage.folder(workdir)
        self.folder = self.workdir / "slurm"

    @property
    def jobs_folder(self) -> Path:
        return self.folder / "jobs"

    def write(self, submission: dict) -> None:
        records.write_json(self.folder / f"{submission['submission']}.json", submission)

    def jobs(self) -> list[Job]:
        """All jobs that somebody may still have to follow; forgets follow-ups that are not queued any more.

        Raises ExecutorError if Slurm must be asked for one, and does not answer.
        """
        found: list[Job] = []
        for path in sorted(self.folder.glob("*.json")):
            submission = read_or_empty(path)
            if submission and submission["job_id"] is None:  # killed while it submitted: did Slurm take it?
                submission["job_id"] = next((i.partition("_")[0] for i in queue([submission["name"]])), None)
                if submission["job_id"] is not None:
                    self.write(submission)
            if not submission or submission["job_id"] is None:
                path.unlink(missing_ok=True)
                continue
            if not submission["tasks"]:  # a follow-up; one that has begun is this call, or will find it in its way
                states = queue([submission["name"]])
                if states.get(submission["job_id"], ("gone", ""))[0] != "PENDING":
                    path.unlink(missing_ok=True)
            found += self.jobs_of(submission)
        return found

    def jobs_of(self, submission: dict) -> Iterator[Job]:
        array = len(submission["tasks"]) > 1
        for i, task in enumerate(submission["tasks"]):
            if i not in submission["over"]:
                job_id = f"{submission['job_id']}_{i}" if array else submission["job_id"]
                log = self.jobs_folder / f"{job_id}_0_log.err"
                yield Job(
                    submission["submission"], submission["name"], i, job_id, task["key"], task["run_ids"], str(log)
                )

    def close(self, job: Job) -> None:
        """Forgets a job that is over; its log stays."""
        path = self.folder / f"{job.submission}.json"
        submission = read_or_empty(path)
        submission["over"] = sorted({*submission["over"], job.index})
        if len(submission["over"]) == len(submission["tasks"]):
            path.unlink(missing_ok=True)
        else:
            self.write(submission)
        leftovers = [signs.sign_path(self.workdir, job.sign)]
        leftovers += [self.jobs_folder / f"{job.job_id}_{name}" for name in ("submitted.pkl", "0_result.pkl")]
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)

    def submissions(self) -> list[dict]:
        return [s for s in map(read_or_empty, sorted(self.folder.glob("*.json"))) if s]

    def unfinished(self) -> list[str]:
        """Ids of the jobs that are queued or running. Raises ExecutorError if Slurm cannot be asked."""
        names = [submission["name"] for submission in self.submissions()]
        return [job_id for job_id, (state, _) in queue(names).items() if state not in OVER] if names else []

    def queued(self, patience: float = 1.0) -> dict[str, str]:
        """What the queue says of cells in jobs that have not started, by run_id, as far as it can be asked here."""
        submissions = [s for s in self.submissions() if s["job_id"]]
        if not submissions:
            return {}
        try:
            states = queue([s["name"] for s in submissions], patience)
        except ExecutorError:
            states = None  # another machine: the book alone speaks
        said: dict[str, str] = {}
        for job in (job for s in submissions for job in self.jobs_of(s)):
            if states is None:
                said |= dict.fromkeys(job.run_ids, f"submitted as job {job.job_id}; no squeue here to ask")
            elif states.get(job.job_id, ("COMPLETED", ""))[0] not in OVER:
                state, reason = states[job.job_id]
                said |= dict.fromkeys(job.run_ids, f"job {job.job_id} {state.lower()} ({reason})")
        return said


def queue(names: Sequence[str], patience: float = 30.0) -> dict[str, tuple[str, str]]:
    """(state, reason) by job id of the jobs with these names that Slurm remembers: those that ended some minutes ago
    it does not. Raises ExecutorError if it cannot be asked."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--name={','.join(names)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ExecutorError(f"squeue does not answer ({type(e).__name__})") from None
    if done.returncode:
        raise ExecutorError(f"squeue: {last_line(done.stderr)}")
    fields = (line.strip().split("|") for line in done.stdout.splitlines())
    return {job_id: (state, reason) for job_id, state, reason in fields}


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "no reason given"
