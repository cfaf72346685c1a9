"""The state of a pack, its train step and its evaluation.

Everything is written once, for one run; ``lift`` makes it a pack's. Every leaf of a pack's state has a leading axis
``run`` of K members. Shapes: K members, B rows, T tokens, W windows, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scaling import accounting
from scaling.config import ExecutionConfig, RunConfig, program_execution
from scaling.training import loss, optim, sharding
from scaling.training.models import transformer

# Tokens of a part of a batch on a CPU, at least. Parts of 1,024 are 1.08 to 1.10 times as fast as 4,096 at once at 49K
# to 984K parameters, and 1.03 to 1.04 times as fast as 2,048 at once in the default grid. Fewer gain up to 1.16 at 21K
# parameters and lose as much at 308K (results/README.md).
PART_TOKENS = 1024


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
    num_parts = _num_parts(run, execution.accumulation_steps)
    grads, mean_loss = _accumulated(gradient, num_parts, specs, state["params"], tokens_BS)
    params, opt_state, metrics = optim.update(
        run.model, run.optim, specs, hp, state["step"], grads, state["opt"], state["params"]
    )
    state = {"step": state["step"] + 1, "hparams": hp, "params": params, "opt": opt_state}
    return state, {"loss": mean_loss, **metrics}


def _num_parts(run: RunConfig, given: int | None) -> int:
    """The parts of a batch; see ``ExecutionConfig.accumulation_steps``."""
    if given is not None:
        return given
    if sharding.platform() != "cpu" or math.prod(sharding.mesh_sizes().values()) > 1:
        return 1
    most = run.batch_tokens // PART_TOKENS
    return max((n for n in range(1, min(most, run.batch_size) + 1) if run.batch_size % n == 0), default=1)


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


def _under_rules(function):
    """Logical axes are resolved while tracing, and are not in jit's cache key: so enter the rules inside the trace."""

    @functools.wraps(function)
    def wrapped(*args):
        with nn.logical_axis_rules(sharding.RULES):
            return function(*args)

    return wrapped


@dataclass(frozen=True)
class Lowered:
    """The programs of one pack shape on one mesh, each traced when it is first asked for, and not compiled; see
    ``Programs``."""

    key: RunConfig
    execution: ExecutionConfig
    num_members: int
    mesh: Mesh
    abstract_state: dict  # of the pack
    eval_rows: int

    @functools.cached_property
    def init(self) -> jax.stages.Lowered:
        init = jax.jit(_init_of(self.key, self.num_members), out_shardings=_shardings_of(self.abstract_state))
        return init.lower(*_init_args(self.key, self.num_members))

    @functools.cached_property
    def train(self) -> jax.stages.Lowered:
        one_step = _under_rules(functools.partial(train_step, self.key, self.execution))
        train = jax.jit(
            lift(one_step, self.num_members),
            out_shardings=(_shardings_of(self.abstract_state), NamedSharding(self.mesh, P("run"))),
            donate_argnums=0,
        )
        shape = (self.num_members, self.key.batch_size, self.key.data.seq_len + 1)
        return train.lower(self.abstract_state, self._spec(shape, np.int32, P("run", ("data", "fsdp"))))

    @functools.cached_property
    def evaluate(self) -> jax.stages.Lowered:
        one_eval = _under_rules(functools.partial(eval_step, self.key, self.execution))
        by_run = NamedSharding(self.mesh, P("run"))
        evaluate = jax.jit(lift(one_eval, self.num_members, in_axes=(0, None, None)), out_shardings=by_run)
        S = self.key.data.seq_len + 1
        windows = self._spec((self.eval_rows, S), np.int32, P(("data", "fsdp")))
        weights = self._spec((self.eval_rows, S - 1), np.float32, P(("data", "fsdp")))
        return evaluate.lower(self.abstract_state["params"], windows, weights)

    def _spec(self, shape, dtype, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))


@dataclass(frozen=True)
class Programs:
    """The programs of one pack shape on one mesh, each compiled when it is first asked for."""

    lowered: Lowered

    @property
    def mesh(self) -> Mesh:
        return self.lowered.mesh

    @property
    def abstract_state(self) -> dict:
        return self.lowered.abstract_state

    @property
    def eval_rows(self) -> int:
        return self.lowered.eval_rows

    @functools.cached_property
    def init(self) -> jax.stages.Compiled:
        """(seeds_K, hparams of (K,)) → state."""
        # Runs once: on CPU, LLVM would take longer to optimise the random numbers than it does over the train step.
        return self.lowered.init.compile(compiler_options=_optimised(0))

    @functools.cached_property
    def train(self) -> jax.stages.Compiled:
        """(state, tokens_KBS) → (state, metrics of (K,)); the state is donated."""
        return self.lowered.train.compile(compiler_options=_optimised(2))

    @functools.cached_property
    def evaluate(self) -> jax.stages.Compiled:
        """(params, tokens_WS, weights_WT) → (K, W)."""
        return self.lowered.evaluate.compile(compiler_options=_optimised(2))

    @functools.cached_property
    def abstract_row(self) -> dict:
        """The state of one member, with a leading axis of 1 that no mesh axis divides."""

        def row_of(a):
            alone = NamedSharding(self.mesh, P(None, *a.sharding.spec[1:]))
            return jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype, sharding=alone)

        return jax.tree.map(row_of, self.abstract_state)

    @functools.cached_property
    def take_row(self):
        """(state, k) → the state of member k, its leading axis of 1 kept."""

        def take(state, k):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, k, 1, 0), state)

        return jax.jit(take, out_shardings=_shardings_of(self.abstract_row))

    @functools.cached_property
    def put_row(self):
        """(state, row, k) → the state with member k's replaced; the state is donated."""

        def put(state, row, k):
            return jax.tree.map(lambda x, r: jax.lax.dynamic_update_slice_in_dim(x, r, k, 0), state, row)

        return jax.jit(put, out_shardings=_shardings_of(self.abstract_state), donate_argnums=0)


def _optimised(level: int) -> dict[str, int] | None:
    """XLA's options on a CPU, whose code LLVM optimises at ``level`` of 3; None elsewhere.

    At 2 the default grid's train steps compile in .93 of the time they take at 3 and run 1.02 times as fast (.99 to
    1.07; results/README.md).
    """
    return {"xla_backend_optimization_level": level} if sharding.platform() == "cpu" else None


def _shardings_of(abstract):
    return jax.tree.map(lambda a: a.sharding, abstract)


def _init_of(key: RunConfig, num_members: int):
    return lift(_under_rules(functools.partial(init_state, key)), num_members)


def _init_args(key: RunConfig, num_members: int) -> tuple:
    hparams = optim.hyperparams(key.optim, accounting.plan(key))
    K = num_members
    return jax.ShapeDtypeStruct((K,), np.int32), {
        name: jax.ShapeDtypeStruct((K,), value.dtype) for name, value in hparams.items()
    }


def lower(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> Lowered:
    """The programs of ``num_members`` runs whose ``config.program_key`` is ``key``, to be traced; the mesh's devices
    need not be here.

    Raises ValueError when the mesh does not divide an axis. Call it, and what it returns, under ``jax.set_mesh(mesh)``.
    """
    _check_can_run(key, execution, num_members, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    abstract = jax.eval_shape(_init_of(key, num_members), *_init_args(key, num_members))
    axes = {name: spec.logical_axes for name, spec in transformer.param_specs(key.model).items()}
    shardings = sharding.state_shardings(mesh, abstract, axes)
    return Lowered(
        key=key,
        execution=execution,
        num_members=num_members,
        mesh=mesh,
        abstract_state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        ),
        eval_rows=-(-execution.eval_batch_size // rows) * rows,
    )


def _check_can_run(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> None:
    sharding.check_divides(key.model, key.batch_size, num_members, mesh, execution.asked_parts)
    if execution.remat == "offload" and sharding.platform() == "cpu":
        raise ValueError("execution.remat is 'offload': a CPU has no other memory to wait in: write full, dots or none")


def programs(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> Programs:
    """The programs of ``num_members`` runs whose ``config.program_key`` is ``key``, to be compiled; the same object for
    the same programs.

    Raises ValueError when the mesh does not divide an axis. Call it, and what it returns, under ``jax.set_mesh(mesh)``.
    """
    return _programs(key, program_execution(execution), num_members, mesh)


@functools.lru_cache(maxsize=16)
def _programs(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> Programs:
    return Programs(lower(key, execution, num_members, mesh))
