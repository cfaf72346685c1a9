"""The mesh, and the one table that maps logical axes to it.

Mesh axes: ``run`` (members of a pack), ``data`` (rows of the batch), ``fsdp`` (rows of the batch, and the width of
every weight), ``tensor`` (heads, mlp, experts, vocabulary). Any of them may be 1.
"""

import math
import types
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from scaling import families
from scaling.execution import MeshConfig
from scaling.families import ModelConfig

MESH_AXES = ("run", "data", "fsdp", "tensor")

# Logical axis → mesh axes. Parameters name theirs in the model's ``param_specs``.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("run", "run"),
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", "tensor"),
    ("layers", None),
    ("norm", None),
    ("seq", None),
    ("act_embed", None),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices`` (default: all), the axis of size -1 taking what the others leave.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    asked = tuple(getattr(config, axis) for axis in MESH_AXES)
    left = len(devices) // math.prod(size for size in asked if size != -1)
    shape = tuple(left if size == -1 else size for size in asked)
    if math.prod(shape) != len(devices):
        sizes = " × ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, asked))
        raise ValueError(
            f"execution.mesh is {sizes} but there are {len(devices)} devices: write sizes whose product is "
            f"{len(devices)}, or data: -1 with run · fsdp · tensor a divisor of it"
        )
    # An axis of ours may take part of a physical one: a slice of 16×16 holds fsdp 64, tensor 4.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def platform() -> str:
    """What the program that is being traced will run on, "cpu", "gpu" or "tpu": the mesh's platform, which need not be
    here, or without a mesh the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def mesh_sizes() -> dict[str, int]:
    """Sizes of the axes of the mesh in force, 1 each where there is none."""
    return dict.fromkeys(MESH_AXES, 1) | dict(jax.sharding.get_abstract_mesh().shape)


def partition_spec(logical_axes: Sequence[str | None]) -> P:
    """The mesh axes of an array from its logical axes.

    Raises ValueError for a logical axis without a rule, or when two axes of one array claim the same mesh axis.
    """
    rules = dict(RULES)
    unknown = [axis for axis in logical_axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"logical axes {unknown} have no rule: add them to sharding.RULES")
    mapped = [rules[axis] if axis is not None else None for axis in logical_axes]
    claimed = [m for entry in mapped if entry for m in ((entry,) if isinstance(entry, str) else entry)]
    if len(claimed) != len(set(claimed)):
        raise ValueError(f"logical axes {tuple(logical_axes)} claim a mesh axis twice: {claimed}")
    return P(*mapped)


def check_divides(
    model: ModelConfig, batch_size: int, num_members: int, mesh: Mesh, accumulation_steps: int = 1
) -> None:
    """Raises ValueError, naming both sizes, for the first axis that the mesh does not divide."""
    size = dict(mesh.shape)
    rows = size["data"] * size["fsdp"]
    parts = ("data × fsdp", rows)
    if accumulation_steps > 1:
        parts = ("data × fsdp, times accumulation_steps,", rows * accumulation_steps)
    wanted = [
        ("members of the pack", num_members, "run", size["run"]),
        ("batch_size", batch_size, *parts),
        *((f"model.{name}", n, axis, size[axis]) for name, n, axis in families.of(model).divided(model)),
    ]
    for name, value, axes, divisor in wanted:
        if value % divisor:
            lower, upper = value // divisor * divisor, (value // divisor + 1) * divisor
            choices = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(
                f"{name} is {value}, which the mesh's {axes} = {divisor} does not divide: write {choices}, "
                "or another execution.mesh"
            )


def state_shardings(mesh: Mesh, abstract_state, param_axes: Mapping, own_axes: Mapping = types.MappingProxyType({})):
    """A NamedSharding for every leaf of a pack's state, whose leading axis is ``run``.

    Optimiser moments are recognised by the parameter's name at the end of their path and its shape, so that they are
    sharded like it: left to the compiler, they can come out replicated. ``own_axes``: logical axes of what has another
    shape than its parameter, by (field of the optimiser's state, parameter).
    """

    def sharding_of(path, leaf):
        name, field = getattr(path[-1], "key", None), getattr(path[-2], "name", None) if len(path) > 1 else None
        axes = own_axes.get((field, name)) or param_axes.get(name)
        if axes is not None and leaf.ndim == len(axes) + 1:
            return NamedSharding(mesh, partition_spec(("run", *axes)))
        return NamedSharding(mesh, P("run") if leaf.ndim else P())

    return jax.tree_util.tree_map_with_path(sharding_of, abstract_state)


# Of a global array, what one process holds: index (start and end along each axis) → values.
Blocks = dict[tuple[tuple[int, int], ...], np.ndarray]


def host_array(mesh: Mesh, spec: P, shape: tuple[int, ...], rows_of) -> jax.Array:
    """A global array from a host function: ``rows_of(index)`` gives the block at ``index``, a tuple of slices with
    explicit ends. Each process computes the blocks of its own devices only, each of them once."""
    return from_blocks(mesh, spec, shape, host_blocks(mesh, spec, shape, rows_of))


def host_blocks(mesh: Mesh, spec: P, shape: tuple[int, ...], rows_of) -> Blocks:
    """What ``from_blocks`` makes the array of. It touches no device: it can be made in another thread."""
    indices = NamedSharding(mesh, spec).addressable_devices_indices_map(shape).values()
    ends = {_ends(index, shape) for index in indices}
    return {index: np.asarray(rows_of(tuple(slice(*pair) for pair in index))) for index in ends}


def from_blocks(mesh: Mesh, spec: P, shape: tuple[int, ...], blocks: Blocks) -> jax.Array:
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda index: blocks[_ends(index, shape)])


def _ends(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape))


def rows_for(num_members: int, mesh: Mesh) -> int:
    """Rows of the state of a pack: its members, and what fills the mesh's ``run`` axis."""
    return num_members + -num_members % mesh.shape["run"]
