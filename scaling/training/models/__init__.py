"""Networks of the families: each a module with ``param_specs`` and ``hidden``, pure functions of a config.

What all share is here: finding the module, initialising what it declares, and the head.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling import families
from scaling.families import ModelConfig
from scaling.training.models.parameters import ParamSpec, dense, width_multiplier


def network(config: ModelConfig) -> ModuleType:
    """The module of a config's family: ``param_specs(config)`` and ``hidden(config, execution, params, inputs, …)``."""
    return importlib.import_module(families.of(config).network)


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter by name, as the family declares it."""
    return network(config).param_specs(config)


class _Declared(nn.Module):
    """What initialises the declared parameters; Flax draws each by its place among them."""

    specs: tuple[tuple[str, ParamSpec], ...]

    @nn.compact
    def __call__(self):
        for name, spec in self.specs:
            init = nn.initializers.ones if spec.init_std is None else nn.initializers.normal(spec.init_std)
            self.param(name, nn.with_logical_partitioning(init, spec.logical_axes), spec.shape, jnp.float32)


def init(config: ModelConfig, key) -> dict[str, jax.Array]:
    """Float32 parameters of a model by name."""
    return drawn(param_specs(config), key)


def drawn(specs: Mapping[str, ParamSpec], key) -> dict[str, jax.Array]:
    """Float32 parameters by name, as declared. Those declared last do not change what those before them are."""
    return nn.meta.unbox(_Declared(tuple(specs.items())).init(key)["params"])


def head(config: ModelConfig, params: dict[str, jax.Array]) -> jax.Array:
    """The matrix (D, V) from h to logits, in float32."""
    return params["embedding"].T if config.tied_embeddings else params["unembedding"]


def logits(config: ModelConfig, head_DV, h_BTD) -> jax.Array:
    """logits_BTV in float32 for what ``hidden`` gave and the ``head`` of a model."""
    # Straight to float32: a bfloat16 logit near 10 would be rounded to .06.
    product_BTV = dense(h_BTD, head_DV.astype(config.dtype), dtype=jnp.float32)
    logits_BTV = product_BTV / width_multiplier(config)
    if config.logit_softcap is not None:
        logits_BTV = config.logit_softcap * jnp.tanh(logits_BTV / config.logit_softcap)
    return logits_BTV


def apply(config: ModelConfig, execution, params: dict[str, jax.Array], tokens_BT, **sees) -> jax.Array:
    """logits_BTV in float32 for tokens_BT; ``sees``: the options of ``hidden``."""
    hidden = network(config).hidden(config, execution, params, tokens_BT, **sees)
    return logits(config, head(config, params), hidden.h_BTD)
