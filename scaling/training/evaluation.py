"""Losses over validation windows, with their standard errors, of every member of a pack at once."""

import copy
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from scaling import data, objectives
from scaling.config import RunConfig
from scaling.training import sharding
from scaling.training.programs import Programs


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


class Evaluator:
    """Validation windows, made in batches of the program's size as they are wanted: a split of billions of tokens takes
    no more memory than a small one, but for 4 bytes a window."""

    def __init__(self, corpus: data.Corpus, run: RunConfig, num_tokens: int | None, programs: Programs):
        self.corpus, self.run, self._asked = corpus, run, num_tokens
        self.objective = objectives.of(run.objective)
        self.shares = corpus.validation_shares(num_tokens)
        self.tokens_W = self.objective.predicted(run.objective, corpus.validation_counts(num_tokens))
        self.programs = programs

    def by(self, programs: Programs) -> "Evaluator":
        """The same windows, evaluated by other programs."""
        other = copy.copy(self)
        other.programs = programs
        return other

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_W.sum(dtype=np.float64))

    def __call__(self, params) -> list[Evaluated]:
        """What each member's loss is."""
        rows, W = self.programs.eval_rows, len(self.tokens_W)
        spec, mesh = P(("data", "fsdp")), self.programs.mesh
        sums, under_way = [], None
        for start in range(0, W, rows):
            made = self._batch(start, min(start + rows, W))
            whole = {name: _padded(part, rows) for name, part in made.items()}
            batch = {name: sharding.host_array(mesh, spec, x.shape, x.__getitem__) for name, x in whole.items()}
            # One ahead of what is read: hundreds at once hold all windows in memory, and on several virtual CPU devices
            # starve each other of the threads that their collectives wait for, until XLA aborts.
            before, under_way = under_way, self.programs.evaluate(params, batch)
            if before is not None:
                sums.append(to_host(before))
        sums_KW = np.concatenate([*sums, to_host(under_way)], axis=1)[:, :W]
        return [evaluated(sums_W, self.tokens_W, self.shares) for sums_W in sums_KW]

    def _batch(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Windows ``start`` to ``stop`` as the objective has them, corrupted alike for every run."""
        windows_WS, weights_WT = self.corpus.validation_windows(start, stop, self._asked)
        keys_W = keys_of(0, np.arange(start, stop, dtype=np.uint64))
        return self.objective.batch(self.run.objective, self.run.model.vocab_size, windows_WS, keys_W, weights_WT)


def keys_of(seed: int, index_R: np.ndarray) -> np.ndarray:
    """Returns a key a window, from a seed below 2^31 and its place in training (or validation) below 2^33."""
    return index_R + (np.uint64(seed) << np.uint64(33))


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
