"""``--slurm KEY=VALUE …`` → parameters of submitit, checked before anything is spent.

Keys are submitit's (``partition``, ``gpus_per_node``, ``time``, ``setup`` …) or any long option of this cluster's
sbatch (``reservation``, ``licenses`` …), with ``-`` or ``_``.
"""

import difflib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence

DEFAULT_MINUTES = 60
LISTS = ("setup", "teardown", "srun_args")  # given more than once, they add up
# Slurm's signal comes this long before the time limit: a checkpoint is saved meanwhile. A quarter of short limits.
NOTICE_SECONDS = 90

_OURS = {
    "array": "the grid decides it",
    "array_parallelism": "write --workers N",
    "map_count": "the grid decides it",
    "wait": "the sweep waits by itself, or write --detach",
    "test_only": "write --plan",
    "requeue": "jobs are always requeued",
    "no_requeue": "jobs are always requeued",
    "signal": "write signal_delay_s=SECONDS",
    "output": "logs are in the work folder",
    "error": "logs are in the work folder",
    "open_mode": "logs are in the work folder",
    "wrap": "it is not for a sweep",
    "parsable": "it is not for a sweep",
    "chdir": "start the sweep in that folder",
    "export": "write setup='export NAME=value'",
}
# A run on several processes needs jax.distributed to be started in each; what is here starts one process a run.
_ONE = ("nodes", "ntasks", "ntasks_per_node", "tasks_per_node")


HELP = (
    "of the jobs: partition=gpu gpus_per_node=1 time=240 …, as submitit or sbatch name them; what is not done when "
    f"time is up is requeued and goes on (default time={DEFAULT_MINUTES}, minutes)"
)


def parse(options: Sequence[str]) -> dict:
    """``["partition=gpu", "time=4:00:00", …]`` → keyword arguments of ``submitit.SlurmExecutor.update_parameters``.

    Raises ValueError with one line: what is wrong, and what to write; also where nothing can be submitted.
    """
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("--executor slurm needs submitit: pip install 'scaling[slurm]'")
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ValueError("--executor slurm: no sbatch here: give the command on a login node, or --executor local")
    import submitit

    known = submitit.SlurmExecutor._valid_parameters()  # public only as the text of its error
    others = _sbatch_options() - known
    parameters: dict = {"time": DEFAULT_MINUTES, "additional_parameters": {"requeue": True}}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals or not text:
            raise ValueError(f"--slurm {option}: write KEY=VALUE, e.g. partition=gpu")
        if key in _OURS:
            raise ValueError(f"--slurm {option}: {_OURS[key]}")
        if key in _ONE and text != "1":
            raise ValueError(f"--slurm {option}: a run is one process on one node here: write {key}=1 or leave it out")
        if key == "time":
            parameters["time"] = _minutes(text, option)
        elif key in LISTS:
            parameters.setdefault(key, []).append(text)
        elif key in ("mem", "additional_parameters") or key in others:  # mem as sbatch reads it: 16G
            parameters["additional_parameters"][key] = _value(text)
        elif key in known:
            parameters[key] = _value(text)
        else:
            close = difflib.get_close_matches(key, sorted(known | others), n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else "see sbatch --help"
            raise ValueError(f"--slurm {option}: neither submitit nor this sbatch knows {key!r}: {hint}")
    parameters.setdefault("signal_delay_s", min(NOTICE_SECONDS, parameters["time"] * 60 // 4))
    return parameters


def _value(text: str) -> int | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def _minutes(text: str, option: str) -> int:
    """Slurm's notations of a duration: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; at least a minute."""
    match = re.fullmatch(r"(?:(?P<d>\d+)-)?(?P<fields>\d+(?::\d+){0,2})", text)
    if not match:
        raise ValueError(f"--slurm {option}: write minutes, H:M:S or D-H:M:S, e.g. time=240")
    fields = [int(field) for field in match["fields"].split(":")]
    if match["d"]:
        hours, minutes, seconds = [*fields, 0, 0][:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:
        hours, (minutes, seconds) = 0, [*fields, 0][:2]
    whole = (int(match["d"] or 0) * 24 + hours) * 60 + minutes + (seconds + 59) // 60
    return max(1, whole)


def _sbatch_options() -> set[str]:
    done = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, timeout=20, check=False)
    return {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", done.stdout)}
