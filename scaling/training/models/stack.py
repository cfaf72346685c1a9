"""What comes before layers and how they follow one another, unrolled or scanned, kept or recomputed."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from scaling.execution import ExecutionConfig
from scaling.families import ModelConfig
from scaling.training import sharding
from scaling.training.models.parameters import ParamSpec

# Layers that are unrolled on a CPU at most: a scan costs 1.4× there; unrolled, the compile time grows with depth.
MOST_UNROLLED = 12


def embedded(config: ModelConfig, specs: Mapping[str, ParamSpec], params: Mapping, tokens_BT) -> tuple[dict, jax.Array]:
    """Returns the declared parameters in the compute dtype, and x_BTD, the rows of the table that tokens name."""
    params = {n: params[n] if spec.in_float32 else params[n].astype(config.dtype) for n, spec in specs.items()}
    # Gathering from a table sharded both ways makes XLA replicate activations; gather from the whole table.
    table_VD = nn.with_logical_constraint(params["embedding"], (None, None))
    return params, nn.with_logical_constraint(table_VD[tokens_BT], ("batch", "seq", "act_embed"))


def through_layers(
    one_layer: Callable,
    execution: ExecutionConfig,
    specs: Mapping[str, ParamSpec],
    params: Mapping,
    x_BTD,
    others: Mapping[str, jax.Array] = types.MappingProxyType({}),
) -> tuple[jax.Array, Any]:
    """Returns what layer after layer makes of x, and what each says besides, stacked.

    ``one_layer(p, x_BTD)`` gives both, None where it has nothing to say; ``p``: a layer's own weights and ``others``.

    The weights are the parameters whose first logical axis is ``layers``, which the arrays of ``others`` have too;
    ``execution`` says whether they are scanned over and what of a layer the backward pass computes again.
    """
    weights = {name: params[name] for name, spec in specs.items() if spec.logical_axes[0] == "layers"}
    axes = {name: specs[name].logical_axes[1:] for name in weights}
    layers = weights | others
    num_layers = specs[next(iter(weights))].shape[0]
    scanned = execution.scan_layers
    if scanned is None:
        scanned = sharding.platform() != "cpu" or num_layers > MOST_UNROLLED

    def of_layer(x_BTD, p):
        if scanned:  # says it of their gradients too, which would else be added up whole on every device
            p = p | {name: nn.with_logical_constraint(p[name], axes[name]) for name in weights}
        return one_layer(p, checkpoint_name(x_BTD, "layer_input") if execution.remat == "offload" else x_BTD)

    layer = _rematerialised(execution.remat, of_layer, scanned)
    if scanned:
        return jax.lax.scan(layer, x_BTD, layers)
    said = []
    for i in range(num_layers):
        x_BTD, more = layer(x_BTD, {name: w[i] for name, w in layers.items()})
        said.append(more)
    return x_BTD, jax.tree.map(lambda *xs: jnp.stack(xs), *said)


def _rematerialised(policy: str, function: Callable, scanned: bool) -> Callable:
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    saved = {
        "full": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]
    # Inside a scan nothing can be merged with the forward pass anyway, and the barrier costs.
    return jax.checkpoint(function, policy=saved, prevent_cse=not scanned)
