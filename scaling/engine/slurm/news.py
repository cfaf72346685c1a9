"""What becomes of submitted jobs, as events: from the signs that they keep, and from Slurm of those that keep none."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from scaling import records
from scaling.engine.folder import signs
from scaling.engine.run.tasks import ExecutorError
from scaling.engine.slurm.book import OVER, Job, queue

ASK_SECONDS = 15.0  # between two questions to Slurm, which many users ask


class News:
    """Looks at jobs' signs in the work folder when asked, and now and then asks Slurm too."""

    def __init__(self, workdir: Path):
        self._workdir, self._last_asked = workdir, time.monotonic()

    def of(self, jobs: Sequence[Job]) -> list[tuple[Job, dict]]:
        """What jobs' signs say that they did not say before, and who of them is over without a word."""
        news = []
        for job in jobs:
            sign = records.read_or_empty(signs.sign_path(self._workdir, job.sign))
            if sign and sign["updated"] > job.updated:
                job.updated = sign["updated"]
                news += [(job, event) for event in _read(job, sign)]
        if time.monotonic() - self._last_asked > ASK_SECONDS:
            self._last_asked = time.monotonic()
            heard = {id(job) for job, _ in news}
            news += [(job, event) for job, event in _missing(jobs) if id(job) not in heard]
        return news


def _read(job: Job, sign: dict) -> Iterator[dict]:
    """Takes in a newer sign of a job; yields an event for all that it says for the first time."""
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


def _missing(jobs: Sequence[Job]) -> list[tuple[Job, dict]]:
    """Jobs that Slurm says are over, twice in a row so that a slow file system can bring their answer."""
    try:
        states = queue(sorted({job.name for job in jobs}))
    except ExecutorError:
        return []  # a controller that restarts: the jobs do not notice, nor need we
    missing = []
    for job in jobs:
        state, _ = states.get(job.job_id, ("gone", ""))
        job.times_missed = job.times_missed + 1 if state in OVER or state == "gone" else 0
        if job.times_missed >= 2:
            log = Path(job.log)
            reason = f"job {job.job_id} {state.lower()} without an answer, log: {log}"
            final = state == "CANCELLED"  # somebody wants it not to run
            missing.append((job, {"event": "failed", "reason": reason, "final": final, "disk": False}))
    return missing


def are_under_way(jobs: Sequence[Job]) -> bool:
    """Whether all jobs are queued or running, as far as Slurm can be asked; others are to be settled first."""
    try:
        states = queue(sorted({job.name for job in jobs})) if jobs else {}
    except ExecutorError:
        return True
    return all(states.get(job.job_id, (OVER[0], ""))[0] not in OVER for job in jobs)
