"""Losses over validation windows, with their standard errors, of every member of a pack at once."""

import copy
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from scaling import data, objectives, parts
from scaling.config import RunConfig
from scaling.data.validation import NUM_BLOCKS
from scaling.training import sharding
from scaling.training.member import finite
from scaling.training.programs import Programs
from scaling.training.step import position_bins


def mean_and_standard_error(sums_W: np.ndarray, tokens_W: np.ndarray) -> tuple[float, float]:
    r"""Loss per token Σs/Σn over windows and its standard error, windows taken as independent clusters: of few that lie
    far from one another they are; of a whole split, where a document is many windows, see ``with_parts``.

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
    """Loss over validation, nats per token, and its standard error; by source where the data are a mixture; by place in
    the window (``ByPosition.of``) and by part of the text (``by_block``) where that was asked for."""

    loss: float
    standard_error: float
    by_source: dict[str, dict[str, float]] | None = None
    by_position: dict[str, list] | None = None
    measures: dict[str, dict[str, Any]] = {}
    by_block: dict[str, list] | None = None


def evaluated(
    sums_W: np.ndarray, tokens_W: np.ndarray, shares: list[tuple[str, float, slice]], together: int = 1
) -> Evaluated:
    """From the summed losses of windows; ``shares`` are those of ``Corpus.validation_shares``.

    Of a mixture the loss is Σ w L over its sources, whose own errors are independent. Of windows that have their losses
    ``together``, so many after one another, it is these groups that are independent clusters.
    """
    each = {}
    for name, _, windows in shares:
        first = np.arange(*windows.indices(len(sums_W))) // together
        starts = np.flatnonzero(np.diff(first, prepend=-1))
        clusters = (np.add.reduceat(x_W[windows].astype(np.float64), starts) for x_W in (sums_W, tokens_W))
        each[name] = mean_and_standard_error(*clusters)
    if len(each) == 1:
        return Evaluated(*next(iter(each.values())))
    weights = [weight for _, weight, _ in shares]
    return Evaluated(
        math.fsum(w * loss for w, (loss, _) in zip(weights, each.values())),
        math.sqrt(math.fsum((w * error) ** 2 for w, (_, error) in zip(weights, each.values()))),
        {name: {"loss": loss, "standard_error": error} for name, (loss, error) in each.items()},
    )


def measured(sums_W, weights_W: np.ndarray, shares: list[tuple[str, float, slice]]) -> dict[str, Any]:
    """Returns ``value`` Σs/Σn over windows, of a mixture Σ w of them; a list where the sums have further axes."""
    s, n = sums_W.astype(np.float64), weights_W.astype(np.float64)
    parts = [(weight, s[windows].sum(axis=0), n[windows].sum()) for _, weight, windows in shares]
    if any(n == 0 for _, _, n in parts):
        return {"value": None}
    return {"value": sum(weight * s / n for weight, s, n in parts).tolist()}


def by_block(sums_W: np.ndarray, tokens_W: np.ndarray, block_W: np.ndarray, shares: list) -> dict[str, list]:
    """Returns columns of the parts of the text that have a window: the number of its ``source``, ``block`` in it, the
    ``weight`` of the source in the loss, ``num_tokens`` and ``loss``, nats per token. Σ weight Σ n loss / Σ n, the
    inner sums by source, is the loss."""
    n_b = np.bincount(block_W, tokens_W.astype(np.float64))
    sums_b = np.bincount(block_W, sums_W.astype(np.float64))
    known = np.flatnonzero(n_b > 0)
    source_b, block_b = np.divmod(known, NUM_BLOCKS)
    weight_b = np.array([weight for _, weight, _ in shares])[source_b]
    columns = {"source": source_b, "block": block_b, "weight": weight_b, "num_tokens": n_b[known].astype(int)}
    return {name: x.tolist() for name, x in (columns | {"loss": sums_b[known] / n_b[known]}).items()}


def with_parts(found: Evaluated, by_block: dict[str, list], shares: list[tuple[str, float, slice]]) -> Evaluated:
    """Returns ``found`` with the losses by part of the text, and standard errors, of the loss and of every source, that
    allow for what the windows of a document share (``parts``), where there are two parts of each and it is more: what
    rows share that have their losses together, wherever they lie, only the former know of."""
    told = parts.mean_and_standard_error(by_block)
    if told is None:
        return found._replace(by_block=by_block)
    by_source = found.by_source and {
        name: {**found.by_source[name], "standard_error": _larger(found.by_source[name]["standard_error"], by_part)}
        for s, (name, _, _) in enumerate(shares)
        for _, by_part in (parts.of_source(by_block, s),)
    }
    return found._replace(by_block=by_block, standard_error=_larger(found.standard_error, told[1]), by_source=by_source)


def _larger(error: float, other: float) -> float:
    return other if math.isnan(error) else max(error, other)


class ByPosition:
    """Losses by bin of places in a window, of all members, added up batch by batch: no window is kept.

    ``shares`` are those of ``Corpus.validation_shares``, of ``num_windows`` in all.
    """

    def __init__(self, seq_len: int, shares: list[tuple[str, float, slice]], num_windows: int):
        self.bins_TP = position_bins(seq_len)
        self._ranges = [(weight, *windows.indices(num_windows)[:2]) for _, weight, windows in shares]
        self._moments: list[Any] = [0.0] * len(shares)  # of each share: Σ s, s², s n, n, n², windows, each (K, P)
        self._done = 0

    def add(self, sums_KWP: np.ndarray, weights_WT: np.ndarray) -> None:
        """Takes in the next windows: their summed losses by bin, and what each of their tokens weighs."""
        n_WP = weights_WT.astype(np.float64) @ self.bins_TP
        for i, (_, start, stop) in enumerate(self._ranges):
            here = slice(max(start - self._done, 0), max(stop - self._done, 0))
            n, s = n_WP[None, here], sums_KWP[:, : len(n_WP)][:, here].astype(np.float64)
            parts = (s, s * s, s * n, n + 0 * s, n * n + 0 * s, (n > 0) + 0 * s)
            self._moments[i] = self._moments[i] + np.stack([part.sum(axis=1) for part in parts])
        self._done += len(n_WP)

    def of(self, k: int) -> dict[str, list]:
        """Returns, of member k, where each bin ends, its loss and its standard error, the ratio estimator's as of the
        whole (``mean_and_standard_error``); of a mixture Σ w L. None where too few windows reach a bin."""
        mean, variance = 0.0, 0.0
        for (weight, _, _), moments in zip(self._ranges, self._moments):
            s, ss, sn, n, nn, W = moments[:, k]
            with np.errstate(divide="ignore", invalid="ignore"):
                loss = s / n
                spread = np.maximum(ss - 2 * loss * sn + loss**2 * nn, 0.0)
                mean, variance = mean + weight * loss, variance + weight**2 * W / (W - 1) * spread / n**2
        edges = np.flatnonzero(np.diff(self.bins_TP.argmax(axis=1), append=-1)) + 1
        return {
            "until": edges.tolist(),
            "loss": [finite(x) for x in mean],
            "standard_error": [finite(x) for x in np.sqrt(variance)],
        }


class Evaluator:
    """Validation windows, made in batches of the program's size as they are wanted: a split of billions of tokens takes
    no more memory than a small one, but for 4 bytes a window."""

    def __init__(self, corpus: data.Corpus, run: RunConfig, num_tokens: int | None, programs: Programs):
        self.corpus, self.run, self._asked = corpus, run, num_tokens
        self.objective = objectives.of(run.objective)
        self.shares = corpus.validation_shares(num_tokens)
        self.together = self.objective.rows_together(run.objective)
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

    def __call__(self, params, *, final: bool = False) -> list[Evaluated]:
        """What each member's loss is; ``final``: by position too where the objective reads tokens in their order,
        and the measures of ``losses.Losses``."""
        rows, W = self.programs.eval_rows, len(self.tokens_W)
        taken = rows // self.together * self.together  # whole groups
        spec, mesh = P(("data", "fsdp")), self.programs.mesh
        in_order = self.objective.sees == "causal"
        places = ByPosition(self.run.data.seq_len, self.shares, W) if final and in_order else None
        sums: list[np.ndarray] = []
        measures: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []

        def read(results: tuple[jax.Array, jax.Array, dict], weights_WT: np.ndarray) -> None:
            sums.append(to_host(results[0])[:, :taken])
            if final:
                host = {name: (to_host(s), to_host(n)) for name, (s, n) in results[2].items()}
                measures.append({name: (s[:, :taken], n[:, :taken]) for name, (s, n) in host.items()})
            if places is not None:
                places.add(to_host(results[1]), weights_WT)

        under_way = None
        whole = -(-W // self.together) * self.together
        for start in range(0, whole, taken):
            made = self._batch(start, min(start + taken, whole))
            full = {name: _padded(part, rows) for name, part in made.items()}
            batch = {name: sharding.host_array(mesh, spec, x.shape, x.__getitem__) for name, x in full.items()}
            # One ahead of what is read: hundreds at once hold all windows in memory, and on several virtual CPU devices
            # starve each other of the threads that their collectives wait for, until XLA aborts.
            before, under_way = under_way, (self.programs.evaluate(params, batch), self.objective.read(made)[2])
            if before is not None:
                read(*before)
        read(*under_way)
        sums_KW = np.concatenate(sums, axis=1)[:, :W]
        found = [evaluated(sums_W, self.tokens_W, self.shares, self.together) for sums_W in sums_KW]
        if final:
            block_W = self.corpus.validation_blocks(self._asked)
            for k, sums_W in enumerate(sums_KW):
                found[k] = with_parts(found[k], by_block(sums_W, self.tokens_W, block_W, self.shares), self.shares)
        if places is not None:
            found = [member._replace(by_position=places.of(k)) for k, member in enumerate(found)]
        for name in measures[0] if measures else ():
            s_KW, n_KW = (np.concatenate([m[name][i] for m in measures], axis=1)[:, :W] for i in (0, 1))
            for k, member in enumerate(found):
                found[k] = member._replace(measures=member.measures | {name: measured(s_KW[k], n_KW[k], self.shares)})
        return found

    def _batch(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Windows ``start`` to ``stop`` as the objective has them, corrupted alike for every run; those beyond the last
        are the first ones again, at no weight."""
        if (beyond := stop - len(self.tokens_W)) > 0:
            last, first = self._batch(start, len(self.tokens_W)), self._batch(0, beyond)
            first["weights"] = np.zeros_like(first["weights"])
            return {name: np.concatenate([last[name], first[name]]) for name in last}
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
