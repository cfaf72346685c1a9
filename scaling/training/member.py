"""Keeps the books of one run while it trains: its step, its curve, who takes over from it, and where its time went.

A member may be a trunk: runs that differ from it in horizon and cooldown alone are, up to where the first of the two
cools down, in the same state. These riders keep their own books beside it, and branch off with a checkpoint of their
own from which they go on like any run that was interrupted there. Its heirs, runs that start from its weights, are
left these when it has them, and keep no books here.
"""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from scaling import accounting, objectives, records
from scaling.config import RunConfig
from scaling.grid import Cell
from scaling.training.checkpoint import Checkpoints
from scaling.training.logs import StepLogs

# Points of a run's step logs, where they are asked for.
_LOGGED_STEPS = 200

SPANS = ("compile", "step", "data", "eval", "save")


@dataclass
class Member:
    """A run in training: its cell, its plan, and what has been seen of it so far."""

    cell: Cell
    plan: accounting.Plan
    logs: StepLogs | None = None
    checkpoints: Checkpoints | None = None
    riders: list["Rider"] = field(default_factory=list)
    heirs: list["Heir"] = field(default_factory=list)
    step: int = 0
    curve: dict[str, list] = field(default_factory=lambda: {c: [] for c in records.CURVE_COLUMNS})
    # Since the last point of the curve: sum of training losses, number of steps; and the last step's metrics.
    loss_sum: float = 0.0
    loss_count: int = 0
    last: dict[str, float] = field(default_factory=dict)
    steps_above: int = 0  # in a row, above the divergence threshold
    diverged_at_step: int | None = None
    # Its share of the time of every pack that it trained in, by what it went into.
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPANS, 0.0))
    branched_from: str | None = None  # run_id of the trunk that trained it up to
    branch_step: int = 0

    _SAVED = (
        "step", "curve", "loss_sum", "loss_count", "last", "steps_above", "diverged_at_step", "seconds",
        "branched_from", "branch_step",
    )  # fmt: skip

    @property
    def run(self) -> RunConfig:
        return self.cell.run

    @property
    def has_ended(self) -> bool:
        return self.step >= self.plan.num_steps or self.diverged_at_step is not None

    @property
    def _guess(self) -> float:
        objective = self.run.objective
        return objectives.of(objective).guess(objective, self.run.model.vocab_size)

    @functools.cached_property
    def eval_steps(self) -> frozenset[int]:
        return frozenset(accounting.eval_steps(self.plan.num_steps, self.run.eval.num_points))

    @property
    def wants_evaluation(self) -> bool:
        """Whether its curve, or a rider's, has a point at this step."""
        return self.step in self.eval_steps or any(self.step in r.member.eval_steps for r in self.riders)

    def saved(self) -> dict:
        """What ``restore`` takes, JSON-able: its own books, and by run_id those of its riders."""
        own = {name: getattr(self, name) for name in self._SAVED}
        return {**own, "riders": {r.member.run.run_id: r.member.saved() for r in self.riders}}

    def restore(self, saved: dict) -> None:
        """Takes up the books of ``saved``. Riders that are not in it cannot be carried: they are dropped."""
        for name in self._SAVED:
            setattr(self, name, saved[name])
        self.riders = [r for r in self.riders if r.member.run.run_id in saved["riders"]]
        for rider in self.riders:
            rider.member.restore(saved["riders"][rider.member.run.run_id])

    def advance(self) -> None:
        self.step += 1
        for rider in self.riders:
            rider.member.step += 1

    def observe(self, step_done: int, metrics: dict[str, float]) -> None:
        """Takes in the metrics of the update that led to ``step_done``; marks the run diverged if it did."""
        for rider in self.riders:
            rider.member.observe(step_done, metrics)
        if self.diverged_at_step is not None:
            return
        loss = metrics["loss"]
        threshold = self.run.divergence.loss or 1.5 * self._guess
        self.steps_above = 0 if loss <= threshold else self.steps_above + 1
        if not math.isfinite(loss) or self.steps_above >= self.run.divergence.patience_steps:
            self.diverged_at_step = step_done
            return
        self.loss_sum += loss
        self.loss_count += 1
        self.last = metrics
        if self.logs and step_done % max(1, self.plan.num_steps // _LOGGED_STEPS) == 0:
            self.logs.write(step_done, {f"train/{name}": value for name, value in metrics.items()})

    def add_point(self, step_done: int, loss: float, standard_error: float, num_eval_tokens: int) -> None:
        if self.diverged_at_step is None and not math.isfinite(loss):
            self.diverged_at_step = step_done
        if self.diverged_at_step is not None:
            return
        point = {
            "step": step_done,
            "num_tokens": step_done * self.plan.batch_tokens,
            "loss": loss,
            "standard_error": finite(standard_error),  # none from a single window
            "num_eval_tokens": num_eval_tokens,
            "train_loss": self.loss_sum / self.loss_count if self.loss_count else None,
            "learning_rate": self.last.get("learning_rate"),
            "grad_norm": finite(self.last.get("grad_norm")),
        }
        for name in records.CURVE_COLUMNS:
            self.curve[name].append(point[name])
        self.loss_sum, self.loss_count = 0.0, 0
        if self.logs:
            self.logs.write(step_done, {"validation/loss": loss})


@dataclass
class Rider:
    """A run that is, up to ``branch_step``, the member that carries it."""

    member: Member
    branch_step: int


@dataclass
class Heir:
    """A run that starts, at a step 0 of its own, from the state that a member has after ``step`` steps."""

    cell: Cell
    step: int


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a gradient can overflow while the loss is still finite."""
    return value if value is not None and math.isfinite(value) else None


@dataclass
class Clock:
    """Seconds by what they went into, since members were last charged for them."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPANS, 0.0))

    def timed(self, name: str):
        return _Timed(self, name)

    def start_lap(self) -> None:
        self._lap_started, self._lap_others = time.perf_counter(), self._others()

    def end_lap(self) -> None:
        """Counts the time since the lap started as ``step``, less what went into anything else; starts the next."""
        inside = self._others() - self._lap_others
        self.seconds["step"] += time.perf_counter() - self._lap_started - inside
        self.start_lap()

    def charge(self, members: Sequence[Member]) -> None:
        """Shares the seconds out among ``members``, equally, and starts to count anew."""
        for name, seconds in self.seconds.items():
            for member in members:
                member.seconds[name] += seconds / len(members)
            self.seconds[name] = 0.0
        self.start_lap()

    def _others(self) -> float:
        return sum(seconds for name, seconds in self.seconds.items() if name != "step")


@dataclass
class _Timed:
    clock: Clock
    name: str
    started: float = 0.0

    def __enter__(self):
        self.started = time.perf_counter()

    def __exit__(self, *_):
        self.clock.seconds[self.name] += time.perf_counter() - self.started
