"""A pack while it trains: what the host knows of each member, the state they share, their batches and evaluations.

A pack is only where its members happen to run. Each is at its own step, has its own checkpoints, and leaves at its own
end; the rest go on.

A member may be a trunk: runs that differ from it in horizon and cooldown alone are, up to where the first of the two
cools down, in the same state. These riders keep their own books beside it, and branch off with a checkpoint of their
own from which they go on like any run that was interrupted there.
"""

import copy
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from scaling import accounting, records
from scaling.config import ExecutionConfig, RunConfig, program_key
from scaling.grid import Cell
from scaling.training import data, optim, sharding, step
from scaling.training.checkpoint import Checkpoints
from scaling.training.logs import StepLogs

# Points of a run's step logs, where they are asked for.
_LOGGED_STEPS = 200


# Saving, as a part of training, at most.
MAX_SAVING_SHARE = 0.05

SPANS = ("compile", "step", "data", "eval", "save")


@dataclass
class Member:
    """What the host knows of one run."""

    cell: Cell
    plan: accounting.Plan
    logs: StepLogs | None = None
    checkpoints: Checkpoints | None = None
    riders: list["Rider"] = field(default_factory=list)
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
        threshold = self.run.divergence.loss or 1.5 * math.log(self.run.model.vocab_size)
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


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a gradient can overflow while the loss is still finite."""
    return value if value is not None and math.isfinite(value) else None


def mean_and_standard_error(sums_W: np.ndarray, tokens_W: np.ndarray) -> tuple[float, float]:
    r"""Loss per token Σs/Σn over windows and its standard error, windows taken as independent clusters.

    The ratio estimator's SE² = W/(W-1) Σ (s_w - loss n_w)² / (Σ n_w)² (Cochran 1977, §6.3).
    """
    sums_W, tokens_W = sums_W.astype(np.float64), tokens_W.astype(np.float64)
    keep = tokens_W > 0
    sums_W, tokens_W = sums_W[keep], tokens_W[keep]
    loss = sums_W.sum() / tokens_W.sum()
    W = len(tokens_W)
    if W < 2:
        return float(loss), math.nan
    residual = sums_W - loss * tokens_W
    return float(loss), float(np.sqrt(W / (W - 1) * np.square(residual).sum()) / tokens_W.sum())


class Evaluated(NamedTuple):
    """Loss over validation, nats per token, and its standard error; by source where the data are a mixture."""

    loss: float
    standard_error: float
    by_source: dict[str, dict[str, float]] | None = None


def evaluated(sums_W: np.ndarray, tokens_W: np.ndarray, shares: list[tuple[str, float, slice]]) -> Evaluated:
    """From the summed losses of windows; ``shares`` are those of ``Corpus.validation_shares``.

    Of a mixture the loss is Σ w L over its sources, whose own errors are independent.
    """
    each = {name: mean_and_standard_error(sums_W[windows], tokens_W[windows]) for name, _, windows in shares}
    if len(each) == 1:
        return Evaluated(*next(iter(each.values())))
    weights = [weight for _, weight, _ in shares]
    return Evaluated(
        math.fsum(w * loss for w, (loss, _) in zip(weights, each.values())),
        math.sqrt(math.fsum((w * error) ** 2 for w, (_, error) in zip(weights, each.values()))),
        {name: {"loss": loss, "standard_error": error} for name, (loss, error) in each.items()},
    )


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


class Evaluator:
    """Validation windows on the host, in batches of the program's size."""

    def __init__(self, corpus: data.Corpus, num_tokens: int | None, programs: step.Programs):
        self.windows_WS, self.weights_WT = corpus.validation(num_tokens)
        self.shares = corpus.validation_shares(num_tokens)
        self.tokens_W = self.weights_WT.sum(axis=1)
        self.programs = programs

    def by(self, programs: step.Programs) -> "Evaluator":
        """The same windows, evaluated by other programs."""
        other = copy.copy(self)
        other.programs = programs
        return other

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_W.sum())

    def __call__(self, params) -> list[Evaluated]:
        """What each member's loss is."""
        rows = self.programs.eval_rows
        W, S = self.windows_WS.shape
        spec, mesh = P(("data", "fsdp")), self.programs.mesh
        sums, under_way = [], None
        for start in range(0, W, rows):
            windows = _padded(self.windows_WS[start : start + rows], rows)
            weights = _padded(self.weights_WT[start : start + rows].astype(np.float32), rows)
            tokens = sharding.host_array(mesh, spec, (rows, S), lambda index, w=windows: w[index])
            mask = sharding.host_array(mesh, spec, (rows, S - 1), lambda index, w=weights: w[index])
            # One ahead of what is read: hundreds at once hold all windows in memory, and on several virtual CPU devices
            # starve each other of the threads that their collectives wait for, until XLA aborts.
            before, under_way = under_way, self.programs.evaluate(params, tokens, mask)
            if before is not None:
                sums.append(to_host(before))
        sums_KW = np.concatenate([*sums, to_host(under_way)], axis=1)[:, :W]
        return [evaluated(sums_W, self.tokens_W, self.shares) for sums_W in sums_KW]


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(array)
    return array if missing == 0 else np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array, in every process; asks the others only for what is not here already."""
    if array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Pack:
    """The runs of one compiled program: ``members[k]`` is row k of the state. Rows whose member has ended, and rows
    added to fill the mesh's ``run`` axis (None), train on and are not looked at."""

    def __init__(self, members: list[Member], corpus: data.Corpus, execution: ExecutionConfig, mesh):
        self.corpus, self.execution, self.mesh = corpus, execution, mesh
        self.run = members[0].run  # what all share of it: shapes, batch, data, evaluation
        self.members: list[Member | None] = self._filled(members)
        self.clock = Clock()
        self.state: Any = None
        self.num_steps_done = 0  # in this call
        self._last_save = time.perf_counter()
        self._save_seconds = 0.0  # of the last save
        self._compile()

    def _filled(self, members: Sequence[Member]) -> list[Member | None]:
        return [*members, *[None] * (-len(members) % self.mesh.shape["run"])]

    def _compile(self) -> None:
        self.programs = step.programs(program_key(self.run), self.execution, len(self.members), self.mesh)
        with self.clock.timed("compile"):
            _ = self.programs.train, self.programs.evaluate
        self.curve_eval = Evaluator(self.corpus, self.run.eval.curve_tokens, self.programs)

    @property
    def live(self) -> dict[int, Member]:
        """The members that have not ended, by row."""
        return {k: m for k, m in enumerate(self.members) if m is not None and not m.has_ended}

    @property
    def steps_to_boundary(self) -> int:
        """Steps until the next member ends or the next rider branches off."""
        live = self.live.values()
        ends = [m.plan.num_steps - m.step for m in live]
        return min(ends + [r.branch_step - m.step for m in live for r in m.riders])

    def initialise(self) -> None:
        """Every row at step 0, by its member's seed and hyperparameters."""
        members = [m or self.members[0] for m in self.members]
        seeds_K = np.array([m.run.seed for m in members], np.int32)
        hparams = [optim.hyperparams(m.run.optim, m.plan) for m in members]
        hparams_K = {name: np.stack([h[name] for h in hparams]) for name in hparams[0]}
        with self.clock.timed("compile"):
            init = self.programs.init
        self.state = init(seeds_K, hparams_K)

    @property
    def abstract_row(self) -> dict:
        """Shapes, dtypes and shardings of ``row``: a lone run's state."""
        return self.programs.abstract_state if len(self.members) == 1 else self.programs.abstract_row

    def row(self, k: int) -> dict:
        """The state of member k, with a leading axis of 1."""
        return self.state if len(self.members) == 1 else self.programs.take_row(self.state, np.int32(k))

    def put_row(self, k: int, row: dict) -> None:
        self.state = row if len(self.members) == 1 else self.programs.put_row(self.state, row, np.int32(k))

    def rider_row(self, k: int, rider: Member) -> dict:
        """The state of member k as that of a rider: with its hyperparameters."""
        row = self.row(k)

        def put(value, like):
            return sharding.host_array(self.mesh, like.sharding.spec, (1,), lambda index: value[None][index])

        values = optim.hyperparams(rider.run.optim, rider.plan)
        return {**row, "hparams": jax.tree.map(put, values, row["hparams"])}

    def batch(self, in_flight: dict[str, jax.Array] | None = None) -> jax.Array:
        """The next batch of every member, each at its own step; zeros where none is looked at.

        It is made while the device is busy with the step of ``in_flight``, its metrics. It counts as time spent on data
        only if that step was done before it: then the device had to wait.
        """
        run, live = self.run, self.live
        shape = (len(self.members), run.batch_size, run.data.seq_len + 1)

        def block_of(k: int, rows: slice) -> np.ndarray:
            if k not in live:
                return np.zeros((rows.stop - rows.start, shape[2]), np.int32)
            return self.corpus.batch(live[k].step, run.batch_size, live[k].run.seed, rows)

        def rows_of(index):
            runs, rows, columns = index
            return np.stack([block_of(k, rows) for k in range(runs.start, runs.stop)])[:, :, columns]

        started = time.perf_counter()
        made = sharding.host_array(self.mesh, P("run", ("data", "fsdp")), shape, rows_of)
        if in_flight is None or all(value.is_ready() for value in in_flight.values()):
            self.clock.seconds["data"] += time.perf_counter() - started
        return made

    def evaluate_curves(self, members: Mapping[int, Member]) -> None:
        """A point of the curve for every one of ``members``, by row, that wants it, and for its riders."""
        rows = [k for k, m in members.items() if m.wants_evaluation]
        for k, result in self._evaluate(self.curve_eval, rows).items():
            for member in (members[k], *(r.member for r in members[k].riders)):
                if member.step in member.eval_steps:
                    member.add_point(member.step, result.loss, result.standard_error, self.curve_eval.num_tokens)

    def evaluate_all(self, rows: Sequence[int]) -> tuple[dict[int, Evaluated], int]:
        """The loss of the members of ``rows`` over the whole validation split, and its tokens."""
        evaluator = Evaluator(self.corpus, None, self.programs)
        return self._evaluate(evaluator, rows), evaluator.num_tokens

    def _evaluate(self, evaluator: Evaluator, rows: Sequence[int]) -> dict[int, Evaluated]:
        """By row. A few rows are evaluated one by one, by a lone run's program: the pack's would evaluate all."""
        with self.clock.timed("eval"):
            if 2 * len(rows) >= len(self.members) or self.mesh.shape["run"] > 1:
                results = evaluator(self.state["params"])
                return {k: results[k] for k in rows}
            lone = evaluator.by(step.programs(program_key(self.run), self.execution, 1, self.mesh))
            return {k: lone(self.row(k)["params"])[0] for k in rows}

    def shrink(self) -> None:
        """Leaves out the rows of members that have ended, once that halves the pack: each size is another program."""
        kept = list(self.live)
        rows = len(self._filled(kept))
        if not kept or 2 * rows > len(self.members):
            return
        kept += [k for k in range(len(self.members)) if k not in kept][: rows - len(kept)]  # to fill the mesh
        live, indices = self.live, np.array(kept)
        self.members = [live.get(k) for k in kept]
        state = jax.tree.map(lambda x: x[indices], self.state)
        self._compile()
        self.state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, self.programs.abstract_state))

    def wants_save(self, now: float) -> bool:
        """A save that took long (a pack's takes a tenth of a second a member) is followed by as much more training."""
        pause = max(self.execution.checkpoint_seconds, self._save_seconds / MAX_SAVING_SHARE)
        return now - self._last_save > pause

    def save(self, members: Mapping[int, Member]) -> None:
        """Starts saving ``members``, by row, each to its own checkpoints."""
        self.clock.end_lap()
        self.clock.charge(list(members.values()))
        started = time.perf_counter()
        with self.clock.timed("save"):
            for k, member in members.items():
                member.checkpoints.save(member.step, self.row(k), self.host_state(member))
        self._last_save = time.perf_counter()
        self._save_seconds = self._last_save - started

    def host_state(self, member: Member) -> dict:
        # A copy: Orbax writes it in the background, while training goes on to change these lists.
        return copy.deepcopy({"fingerprint": self.corpus.fingerprint, "member": member.saved()})
