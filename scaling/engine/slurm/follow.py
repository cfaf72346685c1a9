"""The job that follows up on those of ``--detach``: the same command again, once they are over.

It takes in their answers, forecasts and submits what is held out, with a follow-up of its own, and at last fits and
reports. It is in the book like the others, as a submission without tasks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scaling import storage
from scaling.engine.run.tasks import ExecutorError
from scaling.engine.slurm.book import Book

PROGRAM = ("-m", "scaling.sweep")  # of this Python
RECORDS_BEFORE = "SCALING_FOLLOW_UP_RECORDS"  # in a follow-up's environment: when it was submitted


def follow(order: str) -> None:
    """What the job runs. ``order`` is JSON: the command, and the number of records when it was submitted."""
    told = json.loads(order)
    # As on a login node: what Slurm says of this job would be taken for wishes for those that it submits.
    environment = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "SLURMD_"))}
    environment[RECORDS_BEFORE] = str(told["records"])
    done = subprocess.run(told["command"], env=environment, check=False)
    print(f"exit code {done.returncode}")


def _checkpoint(order: str):
    """submitit's hook: the command that ran out of time is given again."""
    import submitit

    return submitit.helpers.DelayedSubmission(follow, order)


follow.checkpoint = _checkpoint  # type: ignore[attr-defined]  # where submitit looks for its hook


def number_of_records(results: Path) -> int:
    return sum(1 for _ in (storage.folder(results) / "runs").glob("*.json"))


def refuse_in_vain(results: Path) -> None:
    """Raises ExecutorError in a follow-up before which no job has left a record: what fails always would be submitted
    for ever."""
    before = os.environ.get(RECORDS_BEFORE)
    if before is not None and int(before) >= number_of_records(results):
        raise ExecutorError(
            f"{results}: none of the detached jobs left a record: see their logs, then give the command again"
        )


def submit(book: Book, executor, name: str, arguments: Sequence[str], results: Path) -> None:
    """Submits the follow-up through submitit's ``executor``, set up to wait for the others, unless one is queued.

    Raises what submitit raises.
    """
    if any(not entry["tasks"] for entry in book.submissions()):
        return
    order = {"command": [sys.executable, *PROGRAM, *arguments], "records": number_of_records(results)}
    entry = {"schema": 1, "submission": name.rpartition("-")[2], "name": name, "job_id": None, "over": [], "tasks": []}
    book.write(entry)
    entry["job_id"] = executor.submit(follow, json.dumps(order)).job_id
    book.write(entry)
