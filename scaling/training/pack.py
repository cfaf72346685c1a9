"""A pack while it trains: what the host knows of each member, the state they share, their batches and evaluations."""

import copy
import math
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from scaling import accounting, records
from scaling.config import ExecutionConfig, RunConfig
from scaling.grid import Cell
from scaling.training import data, optim, sharding, step
from scaling.training.logs import StepLogs

# Points of a run's step logs, where they are asked for.
_LOGGED_STEPS = 200


def eval_steps(num_steps: int, num_points: int) -> list[int]:
    """The steps of a curve: ``num_points`` log-spaced from a hundredth of the run to its end, distinct."""
    if num_points < 2:
        return [num_steps] * num_points
    return sorted({max(1, round(s)) for s in np.geomspace(num_steps / 100, num_steps, num_points)})


@dataclass
class Member:
    """What the host knows of one run."""

    cell: Cell
    plan: accounting.Plan
    logs: StepLogs | None = None
    curve: dict[str, list] = field(default_factory=lambda: {c: [] for c in records.CURVE_COLUMNS})
    # Since the last point of the curve: sum of training losses, number of steps; and the last step's metrics.
    loss_sum: float = 0.0
    loss_count: int = 0
    last: dict[str, float] = field(default_factory=dict)
    steps_above: int = 0  # in a row, above the divergence threshold
    diverged_at_step: int | None = None

    _SAVED = ("curve", "loss_sum", "loss_count", "last", "steps_above", "diverged_at_step")

    @property
    def run(self) -> RunConfig:
        return self.cell.run

    def saved(self) -> dict:
        return {name: getattr(self, name) for name in self._SAVED}

    def restore(self, saved: dict) -> None:
        for name in self._SAVED:
            setattr(self, name, saved[name])

    def observe(self, step_done: int, metrics: dict[str, float]) -> None:
        """Takes in the metrics of the update that led to ``step_done``; marks the run diverged if it did."""
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


@dataclass
class Clock:
    """Seconds by what they went into, over all the calls that trained this pack."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("compile", "step", "data", "eval", "save"), 0.0)
    )

    def timed(self, name: str):
        return _Timed(self, name)

    def start_lap(self) -> None:
        self._lap_started, self._lap_others = time.perf_counter(), self._others()

    def end_lap(self) -> None:
        """Counts the time since the lap started as ``step``, less what went into anything else; starts the next."""
        inside = self._others() - self._lap_others
        self.seconds["step"] += time.perf_counter() - self._lap_started - inside
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
        self.tokens_W = self.weights_WT.sum(axis=1)
        self.programs = programs

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_W.sum())

    def __call__(self, params) -> list[tuple[float, float]]:
        """(loss, standard error) of each member, nats per token."""
        rows = self.programs.eval_rows
        W, S = self.windows_WS.shape
        spec, mesh = P(("data", "fsdp")), self.programs.mesh
        sums = []
        for start in range(0, W, rows):
            windows = _padded(self.windows_WS[start : start + rows], rows)
            weights = _padded(self.weights_WT[start : start + rows].astype(np.float32), rows)
            tokens = sharding.host_array(mesh, spec, (rows, S), lambda index, w=windows: w[index])
            mask = sharding.host_array(mesh, spec, (rows, S - 1), lambda index, w=weights: w[index])
            sums.append(self.programs.evaluate(params, tokens, mask))
        sums_KW = np.concatenate([to_host(s) for s in sums], axis=1)[:, :W]
        return [mean_and_standard_error(sums_W, self.tokens_W) for sums_W in sums_KW]


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(array)
    return array if missing == 0 else np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Pack:
    """The members still training, their state and programs."""

    def __init__(self, members: list[Member], corpus: data.Corpus, execution: ExecutionConfig, mesh, clock: Clock):
        self.members, self.corpus, self.execution, self.mesh, self.clock = members, corpus, execution, mesh, clock
        self.state: Any = None
        self.step = 0
        self._compile()

    def _compile(self) -> None:
        run = self.members[0].run
        with self.clock.timed("compile"):
            self.programs = step.programs(step.program_key(run), self.execution, len(self.members), self.mesh)
        self.curve_eval = Evaluator(self.corpus, run.eval.curve_tokens, self.programs)

    @property
    def next_boundary(self) -> int:
        """The step at which the next member is done."""
        return min(m.plan.num_steps for m in self.members)

    def initialise(self) -> None:
        seeds_K = np.array([m.run.seed for m in self.members], np.int32)
        hparams = [optim.hyperparams(m.run.optim, m.plan) for m in self.members]
        hparams_K = {name: np.stack([h[name] for h in hparams]) for name in hparams[0]}
        self.state = self.programs.init(seeds_K, hparams_K)

    def batch(self, at_step: int) -> jax.Array:
        run = self.members[0].run
        shape = (len(self.members), run.batch_size, run.data.seq_len + 1)

        def rows_of(index):
            runs, rows, columns = index
            blocks = [self.corpus.batch(at_step, run.batch_size, m.run.seed, rows) for m in self.members[runs]]
            return np.stack(blocks)[:, :, columns]

        with self.clock.timed("data"):
            return sharding.host_array(self.mesh, P("run", ("data", "fsdp")), shape, rows_of)

    def evaluate_curve(self) -> None:
        """A point of the curve for every member that wants one at this step."""
        wanting = [
            k for k, m in enumerate(self.members) if self.step in eval_steps(m.plan.num_steps, m.run.eval.num_points)
        ]
        if not wanting:
            return
        with self.clock.timed("eval"):
            results = self.curve_eval(self.state["params"])
        for k in wanting:
            self.members[k].add_point(self.step, *results[k], self.curve_eval.num_tokens)

    def evaluate_all(self) -> tuple[list[tuple[float, float]], int]:
        """(loss, standard error) of every member over the whole validation split, and its tokens."""
        with self.clock.timed("eval"):
            evaluator = Evaluator(self.corpus, None, self.programs)
            return evaluator(self.state["params"]), evaluator.num_tokens

    def keep(self, kept: list[int]) -> None:
        """Goes on with these members only; the others have left."""
        self.members = [self.members[k] for k in kept]
        if kept:
            indices = np.array(kept)
            state = jax.tree.map(lambda x: x[indices], self.state)
            self._compile()
            shardings = jax.tree.map(lambda a: a.sharding, self.programs.abstract_state)
            self.state = jax.device_put(state, shardings)

    def host_state(self) -> dict:
        state = {
            "run_ids": [m.run.run_id for m in self.members],
            "members": [m.saved() for m in self.members],
            "fingerprint": self.corpus.fingerprint,
            "seconds": self.clock.seconds,
        }
        # A copy: Orbax writes it in the background, while training goes on to change these lists.
        return copy.deepcopy(state)
