"""How a parameter is declared, and the layers that families share."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from scaling.families import ModelConfig


@dataclass(frozen=True)
class ParamSpec:
    """One parameter (stacked over layers, where its first logical axis is ``layers``).

    Args:
      init_std: of the normal it is drawn from; 0: zeros, of biases; None: ones, of the scales of norms.
      group: that it is counted in (``Counts.groups``).
      matrix: the two axes (in, out) of a matrix both of whose sides grow with width; over its other axes the parameter
        is a stack of them. Muon orthogonalises each, SOAP preconditions each. None: no matrix of that kind.
      mup: how μP treats it (Yang et al. 2022, table 8): ``hidden`` learns at 1 / m of the rate.
      decay: whether weight decay acts on it without being asked to.
      in_float32: whether it is worked with in float32, whatever the compute dtype.
    """

    shape: tuple[int, ...]
    logical_axes: tuple[str, ...]
    init_std: float | None
    group: str
    matrix: tuple[int, int] | None = None
    mup: Literal["input", "hidden", "output", "vector"] = "vector"
    decay: bool = False
    in_float32: bool = False


def width_multiplier(config: ModelConfig) -> float:
    """μP's m = d_model / base_d_model; 1 under the standard parameterisation."""
    return config.d_model / config.base_d_model if config.parameterization == "mup" else 1.0


class Hidden(NamedTuple):
    """What a network makes of tokens: ``h_BTD``, which the head reads; a ``penalty`` that training minimises besides,
    a mean over rows; and ``measures`` (see ``losses.Losses``)."""

    h_BTD: jax.Array
    penalty: jax.Array | None = None
    measures: dict[str, tuple[jax.Array, jax.Array]] = {}


def rms_norm(x, scale, eps: float):
    """x / rms(x) · scale over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def layer_norm(x, scale, bias, eps: float):
    """(x - mean) / std · scale + bias over the last axis, in float32; no bias where that is None (Ba et al. 2016)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    along = (1,) * (x.ndim - 1) + (-1,)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps) * scale.reshape(along)
    return (normed if bias is None else normed + bias.reshape(along)).astype(x.dtype)


def dense(x_BTX, w_XY, b_Y=None, dtype=None):
    """x w + b over the last axis, as one 2-D product: batched ones leave the CPU backend's fast path. ``dtype``: of the
    result, where it should be wider than the factors'."""
    product = jnp.matmul(x_BTX.reshape(-1, x_BTX.shape[-1]), w_XY, preferred_element_type=dtype)
    if b_Y is not None:
        product = product + b_Y[None]
    return product.reshape(*x_BTX.shape[:-1], w_XY.shape[-1])
