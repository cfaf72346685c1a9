"""A pack's programs: the step of one run lifted to K members, lowered and compiled on a mesh."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scaling import accounting, objectives
from scaling.config import RunConfig
from scaling.execution import ExecutionConfig, program_execution
from scaling.training import losses, optimizers, sharding
from scaling.training.step import eval_step, init_state, train_step


def use_compilation_cache(cache_dir: Path) -> None:
    """Compiled programs go to, and come from, ``cache_dir``/xla, wherever the process goes from here."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(Path(cache_dir).absolute() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


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
        rows = self.key.batch_size
        spec = P("run", ("data", "fsdp"))
        batch = {
            name: self._spec((self.num_members, rows, columns), dtype, spec)
            for name, (columns, dtype) in batch_spec(self.key).items()
        }
        return train.lower(self.abstract_state, batch)

    @functools.cached_property
    def evaluate(self) -> jax.stages.Lowered:
        one_eval = _under_rules(functools.partial(eval_step, self.key, self.execution))
        by_run = NamedSharding(self.mesh, P("run"))
        evaluate = jax.jit(lift(one_eval, self.num_members, in_axes=(0, None)), out_shardings=by_run)
        batch = {
            name: self._spec((self.eval_rows, columns), dtype, P(("data", "fsdp")))
            for name, (columns, dtype) in batch_spec(self.key, weighed=True).items()
        }
        return evaluate.lower(self.abstract_state["params"], batch)

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
        return self.lowered.init.compile(compiler_options=optimised(0))

    @functools.cached_property
    def train(self) -> jax.stages.Compiled:
        """(state, batch of (K, B, …)) → (state, metrics of (K,)); the state is donated."""
        return self.lowered.train.compile(compiler_options=optimised(2))

    @functools.cached_property
    def evaluate(self) -> jax.stages.Compiled:
        """(params, batch of (W, …)) → what ``eval_step`` says of each window, (K, W, …)."""
        return self.lowered.evaluate.compile(compiler_options=optimised(2))

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


def optimised(level: int) -> dict[str, int] | None:
    """XLA's options on a CPU, whose code LLVM optimises at ``level`` of 3; None elsewhere.

    At 2 the default grid's train steps compile in .93 of the time they take at 3 and run 1.02 times as fast (.99 to
    1.07; results/README.md).
    """
    return {"xla_backend_optimization_level": level} if sharding.platform() == "cpu" else None


def batch_spec(run: RunConfig, *, weighed: bool = False) -> dict[str, tuple[int, str]]:
    """Columns and dtype of each array of a run's batches; ``weighed``: of validation, where padding weighs nothing."""
    spec = objectives.of(run.objective).batch_spec(run.objective, run.data.seq_len)
    return {"weights": (run.data.seq_len, "float32"), **spec} if weighed else spec


def _shardings_of(abstract):
    return jax.tree.map(lambda a: a.sharding, abstract)


def _init_of(key: RunConfig, num_members: int):
    return lift(_under_rules(functools.partial(init_state, key)), num_members)


def _init_args(key: RunConfig, num_members: int) -> tuple:
    hparams = optimizers.hyperparams(key.optim, accounting.plan(key))
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
    together = objectives.of(key.objective).rows_together(key.objective)
    eval_rows = max(1, execution.eval_batch_size // together) * together  # whole groups
    abstract = jax.eval_shape(_init_of(key, num_members), *_init_args(key, num_members))
    specs = losses.param_specs(key)
    axes = {name: spec.logical_axes for name, spec in specs.items()}
    shardings = sharding.state_shardings(mesh, abstract, axes, optimizers.state_axes(key.optim, specs))
    return Lowered(
        key=key,
        execution=execution,
        num_members=num_members,
        mesh=mesh,
        abstract_state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        ),
        eval_rows=-(-eval_rows // rows) * rows,
    )


def _check_can_run(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> None:
    objectives.require_whole(key.objective, execution.asked_parts)
    sharding.check_divides(key.model, key.batch_size, num_members, mesh, execution.asked_parts)
    if execution.remat == "offload" and sharding.platform() == "cpu":
        raise ValueError("execution.remat is 'offload': a CPU has no other memory to wait in: write full, dots or none")


def for_pack(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> Programs:
    """The programs of ``num_members`` runs whose ``config.program_key`` is ``key``, to be compiled; the same object for
    the same programs.

    Raises ValueError when the mesh does not divide an axis. Call it, and what it returns, under ``jax.set_mesh(mesh)``.
    """
    return _for_pack(key, program_execution(execution), num_members, mesh)


@functools.lru_cache(maxsize=16)
def _for_pack(key: RunConfig, execution: ExecutionConfig, num_members: int, mesh: Mesh) -> Programs:
    return Programs(lower(key, execution, num_members, mesh))
