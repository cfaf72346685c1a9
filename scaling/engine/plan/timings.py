"""What a shape takes on this machine: timed once, kept, and what other shapes take by it.

    seconds(cell) = start + num_steps · step + num_points · curve_eval + eval

with ``step``, ``curve_eval`` and ``eval`` (the whole validation split) timed per shape by the training loop itself,
all workers busy at once, as in a sweep.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from scaling import accounting, machine, records
from scaling.config import Horizon, RunConfig
from scaling.engine.plan.table import Row, step_flops
from scaling.execution import ExecutionConfig
from scaling.fields import canonical_json
from scaling.machine import processor

# Longest step, in exact FLOPs, that is timed on a CPU before a sweep: above it a few steps and their compilation would
# take a minute, and the rate of the nearest smaller shape is used instead.
MAX_CALIBRATED_STEP_FLOPS = 2e12


# A run's seconds outside steps and evaluations: tracing, the compiled program from the cache, initialisation.
START_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """What one shape takes on this machine: seconds and device memory."""

    start: float  # tracing, loading the compiled program, initialising, the last checkpoint
    step: float
    curve_eval: float
    eval: float
    memory_bytes: int | None = None  # of one device, from the compiled program; the one value here that is no time

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "Timing":
        """From what ``loop.calibrate`` answers."""
        seconds = (answer[f"{name}_seconds"] for name in ("step", "curve_eval", "eval"))
        return cls(START_SECONDS, *seconds, answer.get("memory_bytes"))  # type: ignore[call-arg]  # three of them


def shape_key(run: RunConfig) -> str:
    """Equal for runs whose steps and evaluations take equally long: everything but seed, rates and horizon."""
    same = dataclasses.replace(
        run,
        seed=0,
        horizon=Horizon(steps=1),
        optim=dataclasses.replace(run.optim, peak_lr=1.0, warmup_tokens=0),
        data=dataclasses.replace(run.data, unique_tokens=None),
    )
    return hashlib.sha256(canonical_json(same).encode()).hexdigest()[:16]


def to_calibrate(table: Sequence[Row], known: Mapping[str, Timing], *, limit: float | None) -> dict[str, RunConfig]:
    """One run of every shape that has no timing yet, the most expensive step first; steps above ``limit`` FLOPs are
    left out."""
    runs = {shape_key(row.cell.run): row.cell.run for row in reversed(table)}
    missing = {k: r for k, r in runs.items() if k not in known and (limit is None or step_flops(r) <= limit)}
    return dict(sorted(missing.items(), key=lambda item: step_flops(item[1]), reverse=True))


def predict(table: Sequence[Row], known: Mapping[str, Timing]) -> list[Row]:
    """The table with seconds filled in. A shape that was not timed runs at the FLOP/s of the nearest shape (in FLOPs
    per step) of this table that was; None if there is none."""
    timed = {k: row.cell.run for row in table if (k := shape_key(row.cell.run)) in known}
    return [
        dataclasses.replace(row, seconds=_seconds(row, known, timed), memory_bytes=_memory(row, known)) for row in table
    ]


def _memory(row: Row, known: Mapping[str, Timing]) -> int | None:
    timing = known.get(shape_key(row.cell.run))
    return timing.memory_bytes if timing else None


def _seconds(row: Row, known: Mapping[str, Timing], timed: dict[str, RunConfig]) -> float | None:
    run = row.cell.run
    key = shape_key(run)
    if key not in known:
        if not timed:
            return None
        key = min(timed, key=lambda k: abs(step_flops(run) / step_flops(timed[k]) - 1))
    timing = known[key]
    step_ratio, token_ratio = 1.0, 1.0
    if key in timed:
        step_ratio = step_flops(run) / step_flops(timed[key])
        token_ratio = step_ratio * timed[key].batch_tokens / run.batch_tokens
    own = accounting.eval_steps(row.plan.num_steps, run.eval.num_points)
    points = sum(s > row.first_step for s in own) + row.extra_points
    evals = points * timing.curve_eval + timing.eval
    return timing.start + row.own_steps * timing.step * step_ratio + evals * token_ratio


class TimingCache:
    """Timings of this machine and this code: ``<folder>/calibration-<hash>.json``, and what packs gained here,
    ``packs-<hash>.json``. Another processor, JAX version, number of workers, execution or edit of ``scaling/training``
    is another file."""

    def __init__(self, folder: Path, workers: int | str, execution: ExecutionConfig) -> None:
        self.path = Path(folder) / f"calibration-{_fingerprint(workers, execution)}.json"

    def load(self) -> dict[str, Timing]:
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            return {key: Timing(**timing) for key, timing in raw.items()}
        except (OSError, ValueError, TypeError):  # absent or damaged: measured again
            return {}

    def save(self, known: Mapping[str, Timing]) -> None:
        records.write_json(self.path, {key: dataclasses.asdict(timing) for key, timing in known.items()})

    @property
    def _packs_path(self) -> Path:
        return self.path.with_name(self.path.name.replace("calibration", "packs"))

    def save_packs(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps what packs gained here, beside that of other families, sizes and numbers of workers: rows with family,
        num_params, num_members, workers and tokens_per_s."""
        kept = ("family", "num_params", "num_members", "workers", "tokens_per_s")

        def shape(row: Mapping[str, Any]) -> tuple[Any, ...]:
            return row.get("family"), row.get("num_params"), row.get("workers")

        again = set(map(shape, rows))
        others = [row for row in self._packs() if shape(row) not in again]
        records.write_json(self._packs_path, [*others, *({name: row[name] for name in kept} for row in rows)])

    def _packs(self) -> list[dict[str, Any]]:
        try:
            rows = json.loads(self._packs_path.read_text(encoding="utf-8"))
            return [row for row in rows if "family" in row]
        except (OSError, ValueError, TypeError):  # absent or damaged
            return []

    def pack_gain(self, family: str, num_params: int, num_members: int, workers: int) -> float | None:
        """Tokens/s of so many members over those of lone runs on as many processes: of the nearest size of the family
        that was timed and, there, the nearest number. None if none was."""
        try:
            rows = [r for r in self._packs() if (r["family"], r["workers"]) == (family, workers)]
            size = min({r["num_params"] for r in rows}, key=lambda n: abs(math.log(n / num_params)))
            speed = {r["num_members"]: r["tokens_per_s"] for r in rows if r["num_params"] == size}
            return speed[min(speed.keys() - {1}, key=lambda k: abs(math.log(k / num_members)))] / speed[1]
        except (ValueError, TypeError, KeyError):  # absent, damaged, or without lone runs
            return None


def _fingerprint(workers: int | str, execution: ExecutionConfig) -> str:
    parts = [platform.machine(), processor(), len(machine.cores()), workers, platform.python_version()]
    parts.append(canonical_json(execution))
    parts += [metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    parts += [os.environ.get(name) for name in ("JAX_PLATFORMS", "XLA_FLAGS", "GLIBC_TUNABLES")]
    source = hashlib.sha256()
    package = Path(accounting.__file__).resolve().parent  # what a step does, and what it reads
    for path in sorted(path for part in ("training", "families", "data") for path in (package / part).rglob("*.py")):
        source.update(path.read_bytes())
    return hashlib.sha256(json.dumps([*parts, source.hexdigest()]).encode()).hexdigest()[:12]
