"""Initialises, trains and evaluates one run for one step; ``programs.lift`` makes a pack's programs of it.

Everything is written once, for one run; ``lift`` makes it a pack's. Every leaf of a pack's state has a leading axis
``run`` of K members. Shapes: K members, B rows, T tokens, W windows, V vocabulary.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling import objectives
from scaling.config import RunConfig
from scaling.execution import ExecutionConfig
from scaling.training import losses, models, optimizers, sharding

# Tokens of a part of a batch on a CPU, at least. Parts of 1,024 are 1.08 to 1.10 times as fast as 4,096 at once at 49K
# to 984K parameters, and 1.03 to 1.04 times as fast as 2,048 at once in the default grid. Fewer gain up to 1.16 at 21K
# parameters and lose as much at 308K (results/README.md).
PART_TOKENS = 1024

# Of the places in a window, for the loss by position.
POSITION_BINS = 64


def init_state(run: RunConfig, seed, hparams: dict) -> dict:
    """The state of one run after 0 updates. ``seed`` and ``hparams`` may be traced.

    Where steps draw random numbers the seed stays among ``hparams``, in the state: no constant of a program that a
    pack's members share, and what a run that is resumed, or branches off, goes on with.
    """
    specs = losses.param_specs(run)
    params = models.drawn(specs, jax.random.key(seed))
    if run.model.is_random:
        hparams = {**hparams, "seed": seed}
    return {
        "step": jnp.zeros((), jnp.int32),
        "hparams": hparams,
        "params": params,
        "opt": optimizers.transform(run.optim, hparams, specs).init(params),
    }


def train_step(run: RunConfig, execution: ExecutionConfig, state: dict, batch: dict) -> tuple[dict, dict]:
    """One update of one run, on a batch of its objective. Metrics: ``loss`` (the objective's unit, before the update,
    without the z-loss), ``grad_norm``, ``learning_rate``."""
    hp = state["hparams"]
    if "weights" in batch:  # of the whole batch, so that the mean of its parts' means is the batch's own
        batch = {**batch, "weights": batch["weights"] / jnp.mean(batch["weights"])}
    if run.model.is_random:
        batch = {**batch, "keys": _row_keys(hp["seed"], state["step"], run.batch_size)}

    def minimised(params, batch):
        found = losses.of_batch(run, execution, params, batch)

        def weighed_mean(x_BT):
            return jnp.mean(x_BT if found.weights_BT is None else x_BT * found.weights_BT)

        mean = weighed_mean(found.loss_BT)
        total = mean if found.scale == 1.0 else found.scale * mean
        if found.log_normalizer_BT is not None:
            total = total + hp["z_loss"] * weighed_mean(jnp.square(found.log_normalizer_BT))
        return (total if found.penalty is None else total + found.penalty), mean

    specs = losses.param_specs(run)
    gradient = jax.grad(minimised, has_aux=True)
    num_parts = _num_parts(run, execution.accumulation_steps)
    grads, mean_loss = _accumulated(gradient, num_parts, specs, state["params"], batch)
    params, opt_state, metrics = optimizers.update(
        run.model, run.optim, specs, hp, state["step"], grads, state["opt"], state["params"]
    )
    state = {"step": state["step"] + 1, "hparams": hp, "params": params, "opt": opt_state}
    return state, {"loss": mean_loss, **metrics}


def _row_keys(seed, step, num_rows: int):
    """A key for each row of the batch of a step, (B,): a function of (seed, step, row), whatever the parts or mesh."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_rows))


def _num_parts(run: RunConfig, given: int | None) -> int:
    """The parts of a batch; see ``ExecutionConfig.accumulation_steps``."""
    if given is not None:
        return given
    if objectives.of(run.objective).rows_together(run.objective) > 1:
        return 1
    if sharding.platform() != "cpu" or math.prod(sharding.mesh_sizes().values()) > 1:
        return 1
    most = run.batch_tokens // PART_TOKENS
    return max((n for n in range(1, min(most, run.batch_size) + 1) if run.batch_size % n == 0), default=1)


def _accumulated(gradient, num_parts: int, specs, params, batch: dict):
    """``gradient(params, batch)``, (grads, loss), as the mean over ``num_parts`` equal parts of the rows, one part
    after another: the same but for rounding, with the activations of one part."""
    if num_parts == 1:
        return gradient(params, batch)
    # Every n-th row, so that each device has as many rows of every part, and they are its own.

    def parts(x_BS):  # or keys_B
        x_NBS = x_BS.reshape(x_BS.shape[0] // num_parts, num_parts, *x_BS.shape[1:]).swapaxes(0, 1)
        return nn.with_logical_constraint(x_NBS, (None, "batch", *[None] * (x_NBS.ndim - 2)))

    def add(total, part):
        grads, mean_loss = gradient(params, part)
        # Sharded like the parameters after every part: whole, they would not fit.
        grads = {n: nn.with_logical_constraint(g, specs[n].logical_axes) for n, g in grads.items()}
        return jax.tree.map(jnp.add, total, (grads, mean_loss)), None

    zeros = jax.tree.map(jnp.zeros_like, (params, jnp.float32(0)))
    total, _ = jax.lax.scan(add, zeros, jax.tree.map(parts, batch))
    return jax.tree.map(lambda x: x / num_parts, total)


def eval_step(run: RunConfig, execution: ExecutionConfig, params, batch: dict) -> tuple[jax.Array, jax.Array, dict]:
    """Sums each window's weighted losses in the objective's unit: all of them, (W,), and those of every bin of places,
    (W, P); and gives the measures of ``Losses``, by window.

    ``batch`` has ``weights`` under any objective. The bins are those of ``position_bins``. Where a row's loss depends
    on others, it is on those of its ``group`` of consecutive windows alone.
    """
    if (together := objectives.of(run.objective).rows_together(run.objective)) > 1:
        batch = {**batch, "group": jnp.arange(len(batch["weights"])) // together}
    found = losses.of_batch(run, execution, params, batch)
    weighted_WT = found.loss_BT * found.weights_BT
    # As a product: one operation for all bins, in float32 also where products are taken in fewer bits by default.
    bins_WP = jnp.matmul(weighted_WT, position_bins(weighted_WT.shape[1]), precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(weighted_WT, axis=-1), bins_WP, found.measures


def position_bins(seq_len: int) -> np.ndarray:
    """Returns which of P bins each of T places in a window lies in, as ones and zeros (T, P): about equal bins, as many
    as ``POSITION_BINS`` or as there are places."""
    num_bins = min(POSITION_BINS, seq_len)
    edges = np.arange(num_bins + 1) * seq_len // num_bins
    bin_T = np.searchsorted(edges, np.arange(seq_len), side="right") - 1
    return np.eye(num_bins, dtype=np.float32)[bin_T]
