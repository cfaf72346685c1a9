"""The state of a pack, its train step and its evaluation.

Everything is written once, for one run; ``lift`` makes it a pack's. Every leaf of a pack's state has a leading axis
``run`` of K members. Shapes: K members, B rows, T tokens, W windows, V vocabulary.
"""

import dataclasses
import functools
import time
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scaling import accounting
from scaling.config import ExecutionConfig, Horizon, RunConfig
from scaling.training import loss, optim, sharding
from scaling.training.models import transformer


def program_key(run: RunConfig) -> RunConfig:
    """``run`` with everything that the compiled program does not depend on set to a fixed value.

    Two runs with equal keys can be members of one pack.
    """
    neutral = dataclasses.replace(
        run.optim,
        peak_lr=1.0,
        warmup_tokens=0,
        beta1=0.0,
        beta2=0.0,
        eps=1.0,
        weight_decay=0.0,
        clip_norm=None,
        z_loss=0.0,
        schedule=dataclasses.replace(run.optim.schedule, cooldown_fraction=0.0, final_lr_fraction=0.0),
    )
    return dataclasses.replace(run, optim=neutral, horizon=Horizon(steps=1), seed=0)


def lift(function, num_members: int, in_axes=0):
    """Makes a function of one run a function of a pack, whose arrays have a leading axis of ``num_members``.

    One member: the axis is squeezed and restored, because on CPU batched products over an axis of 1 leave the fast path
    (1.3 to 1.8 times slower). More: vmap, the axis named so that sharding constraints inside carry ``run``.
    """
    if num_members > 1:
        return jax.vmap(function, in_axes=in_axes, spmd_axis_name="run")

    def lifted(*args):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        squeezed = (jax.tree.map(lambda x: x[0], a) if axis == 0 else a for a, axis in zip(args, axes))
        return jax.tree.map(lambda x: x[None], function(*squeezed))

    return lifted


def init_state(run: RunConfig, seed, hparams: dict) -> dict:
    """The state of one run after 0 updates. ``seed`` and ``hparams`` may be traced."""
    params = transformer.init(run.model, jax.random.key(seed))
    specs = transformer.param_specs(run.model)
    return {
        "step": jnp.zeros((), jnp.int32),
        "hparams": hparams,
        "params": params,
        "opt": optim.transform(run.optim, hparams, specs).init(params),
    }


def train_step(run: RunConfig, execution: ExecutionConfig, state: dict, tokens_BS) -> tuple[dict, dict]:
    """One update of one run. Metrics: ``loss`` (nats per token, before the update, without the z-loss), ``grad_norm``,
    ``learning_rate``."""
    hp = state["hparams"]

    def objective(params, tokens_BS):
        losses_BT, log_normalizer_BT = loss.token_losses(run, execution, params, tokens_BS)
        mean = jnp.mean(losses_BT)
        return mean + hp["z_loss"] * jnp.mean(jnp.square(log_normalizer_BT)), mean

    specs = transformer.param_specs(run.model)
    gradient = jax.grad(objective, has_aux=True)
    grads, mean_loss = _accumulated(gradient, execution.accumulation_steps, specs, state["params"], tokens_BS)
    params, opt_state, metrics = optim.update(
        run.model, run.optim, specs, hp, state["step"], grads, state["opt"], state["params"]
    )
    state = {"step": state["step"] + 1, "hparams": hp, "params": params, "opt": opt_state}
    return state, {"loss": mean_loss, **metrics}


def _accumulated(gradient, num_parts: int, specs, params, tokens_BS):
    """``gradient(params, tokens_BS)``, (grads, loss), as the mean over ``num_parts`` equal parts of the rows, one part
    after another: the same but for rounding, with the activations of one part."""
    if num_parts == 1:
        return gradient(params, tokens_BS)
    B, S = tokens_BS.shape
    # Every n-th row, so that each device has as many rows of every part, and they are its own.
    tokens_NBS = tokens_BS.reshape(B // num_parts, num_parts, S).swapaxes(0, 1)
    tokens_NBS = nn.with_logical_constraint(tokens_NBS, (None, "batch", None))

    def add(total, tokens_BS):
        grads, mean_loss = gradient(params, tokens_BS)
        # Sharded like the parameters after every part: whole, they would not fit.
        grads = {n: nn.with_logical_constraint(g, specs[n].logical_axes) for n, g in grads.items()}
        return jax.tree.map(jnp.add, total, (grads, mean_loss)), None

    zeros = jax.tree.map(jnp.zeros_like, (params, jnp.float32(0)))
    total, _ = jax.lax.scan(add, zeros, tokens_NBS)
    return jax.tree.map(lambda x: x / num_parts, total)


def eval_step(run: RunConfig, execution: ExecutionConfig, params, tokens_WS, weights_WT):
    """Sum over each window of its weighted token losses, (W,), nats."""
    losses_WT, _ = loss.token_losses(run, execution, params, tokens_WS)
    return jnp.sum(losses_WT * weights_WT, axis=-1)


@dataclass(frozen=True)
class Lowered:
    """The programs of one pack shape on one mesh, traced and not yet compiled; see ``Programs``."""

    init: jax.stages.Lowered
    train: jax.stages.Lowered
    evaluate: jax.stages.Lowered
    abstract_state: dict
    eval_rows: int


@dataclass(frozen=True)
class Programs:
    """The compiled programs of one pack shape on one mesh."""

    mesh: Mesh
    init: jax.stages.Compiled  # (seeds_K, hparams of (K,)) → state
    train: jax.stages.Compiled  # (state, tokens_KBS) → (state, metrics of (K,)); the state is donated
    evaluate: jax.stages.Compiled  # (params, tokens_WS, weights_WT) → (K, W)
    abstract_state: dict
    eval_rows: int
    compile_seconds: float


def _under_rules(function):
    """Logical axes are resolved while tracing, and are not in jit's cache key: so enter the rules inside the trace."""

    @functools.wraps(function)
    def wrapped(*args):
        with nn.logical_axis_rules(sharding.RULES):
            return function(*args)

    return wrapped


def lower(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> Lowered:
    """Traces init, train and eval for ``num_members`` runs whose ``program_key`` is ``key``; the mesh's devices need
    not be here.

    Raises ValueError when the mesh does not divide an axis. Call it under ``jax.set_mesh(mesh)``.
    """
    _check_can_run(key, execution, num_members, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    eval_rows = -(-execution.eval_batch_size // rows) * rows
    K, S = num_members, key.data.seq_len + 1
    hparams = optim.hyperparams(key.optim, accounting.plan(key))
    one_state = _under_rules(functools.partial(init_state, key))
    init = lift(one_state, K)
    abstract_args = (
        jax.ShapeDtypeStruct((K,), np.int32),
        {name: jax.ShapeDtypeStruct((K,), value.dtype) for name, value in hparams.items()},
    )
    abstract = jax.eval_shape(init, *abstract_args)
    axes = {name: spec.logical_axes for name, spec in transformer.param_specs(key.model).items()}
    shardings = sharding.state_shardings(mesh, abstract, axes)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    by_run = NamedSharding(mesh, P("run"))

    def spec_of(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    train = jax.jit(
        lift(_under_rules(functools.partial(train_step, key, execution)), K),
        out_shardings=(shardings, by_run),
        donate_argnums=0,
    )
    tokens_KBS = spec_of((K, key.batch_size, S), np.int32, P("run", ("data", "fsdp")))
    evaluate = jax.jit(
        lift(_under_rules(functools.partial(eval_step, key, execution)), K, in_axes=(0, None, None)),
        out_shardings=by_run,
    )
    eval_args = (
        spec_of((eval_rows, S), np.int32, P(("data", "fsdp"))),
        spec_of((eval_rows, S - 1), np.float32, P(("data", "fsdp"))),
    )
    return Lowered(
        init=jax.jit(init, out_shardings=shardings).lower(*abstract_args),
        train=train.lower(abstract, tokens_KBS),
        evaluate=evaluate.lower(abstract["params"], *eval_args),
        abstract_state=abstract,
        eval_rows=eval_rows,
    )


def _check_can_run(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> None:
    sharding.check_divides(key.model, key.batch_size, num_members, mesh, execution.accumulation_steps)
    if execution.remat == "offload" and sharding.platform() == "cpu":
        raise ValueError("execution.remat is 'offload': a CPU has no other memory to wait in: write full, dots or none")


@functools.lru_cache(maxsize=16)
def programs(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> Programs:
    """Compiles init, train and eval for ``num_members`` runs whose ``program_key`` is ``key``.

    Raises ValueError when the mesh does not divide an axis. Call it, and what it returns, under ``jax.set_mesh(mesh)``.
    """
    started = time.perf_counter()
    lowered = lower(key, execution, num_members, mesh)
    # Runs once: on CPU, LLVM would take longer to optimise the random numbers than it does over the train step.
    quick = {"xla_backend_optimization_level": 0} if sharding.platform() == "cpu" else None
    return Programs(
        mesh=mesh,
        init=lowered.init.compile(compiler_options=quick),
        train=lowered.train.compile(),
        evaluate=lowered.evaluate.compile(),
        abstract_state=lowered.abstract_state,
        eval_rows=lowered.eval_rows,
        compile_seconds=time.perf_counter() - started,
    )
