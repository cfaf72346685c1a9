"""Decoder-only Transformer: pre-norm RMSNorm, rotary positions, GELU / SwiGLU / ReLU², grouped key/value heads.

Shapes: B batch, T tokens, D d_model, F d_ff, H query heads, G key/value heads, K head_dim, V vocabulary, L layers.
A parameter is declared once, in ``param_specs``: shape, logical axes, initialisation, group, and how μP and Muon treat
it. Layers are stored stacked, (L, …), however they are executed, so a checkpoint does not depend on that.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.execution import ExecutionConfig
from scaling.families.transformer import TransformerConfig
from scaling.training import sharding
from scaling.training.models import attention
from scaling.training.models.parameters import ParamSpec, dense, rms_norm
from scaling.training.models.stack import embedded, through_layers


def param_specs(config: TransformerConfig) -> dict[str, ParamSpec]:
    """Every parameter by name.

    Standard: matrices at fan_in^-1/2, those that write to the residual stream divided by (2 L)^1/2 (GPT-2), the
    embedding at 1 and the head at D^-1/2. μP (Yang et al. 2022, table 8, Adam): the same, with the head fixed at what
    the base width would have and its logits divided by m in ``apply``.
    """
    c = config
    attn_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    residual = 1.0 / math.sqrt(2 * c.num_layers)
    head_std = (c.base_d_model or c.d_model) ** -0.5

    def matrix(axes, fan_in, fan_out, group, scale=1.0):
        shape, std = (c.num_layers, fan_in, fan_out), scale * fan_in**-0.5
        return ParamSpec(shape, ("layers", *axes), std, group, matrix=(1, 2), mup="hidden", decay=True)

    def layer_norm(size):
        return ParamSpec((c.num_layers, size), ("layers", "norm"), None, "norm")

    # A tied table is read as embedding and as head, so it takes the head's scale. Otherwise 1, so that the residual
    # stream starts at the scale of what the layers add to it: see the init entry of results/README.md.
    embedding_std = head_std if c.tied_embeddings else 1.0
    specs = {
        "embedding": ParamSpec((c.vocab_size, c.d_model), ("vocab", "embed"), embedding_std, "embedding", mup="input"),
        "attn_norm": layer_norm(c.d_model),
        "w_q": matrix(("embed", "heads"), c.d_model, attn_width, "attention"),
        "w_k": matrix(("embed", "kv_heads"), c.d_model, kv_width, "attention"),
        "w_v": matrix(("embed", "kv_heads"), c.d_model, kv_width, "attention"),
        "w_o": matrix(("heads", "embed"), attn_width, c.d_model, "attention", residual),
        "mlp_norm": layer_norm(c.d_model),
        "w_in": matrix(("embed", "mlp"), c.d_model, c.d_ff, "mlp"),
        "w_out": matrix(("mlp", "embed"), c.d_ff, c.d_model, "mlp", residual),
        "final_norm": ParamSpec((c.d_model,), ("norm",), None, "norm"),
    }
    if c.activation == "swiglu":
        specs["w_gate"] = matrix(("embed", "mlp"), c.d_model, c.d_ff, "mlp")
    if c.qk_norm:
        specs |= {"q_norm": layer_norm(c.head_dim), "k_norm": layer_norm(c.head_dim)}
    if not c.tied_embeddings:
        shape = (c.d_model, c.vocab_size)
        specs["unembedding"] = ParamSpec(shape, ("embed", "vocab"), head_std, "unembedding", mup="output", decay=True)
    return specs


def rotary(x_BTHK, theta: float):
    """Rotary position embedding on the two halves of K (Su et al. 2021).

    The tables are constants of the program, and heads come before tokens while it is applied, as attention wants them.
    Left to XLA the sines are computed again in every loop they are fused into, and the transposition is a loop of its
    own: whole-machine steps were 1.12 times slower at 1M parameters on CPU.
    """
    T, K = x_BTHK.shape[1], x_BTHK.shape[3]
    frequencies_K = theta ** (-np.tile(np.arange(0, K, 2), 2) / K)
    angles_TK = np.arange(T)[:, None] * frequencies_K[None, :]
    sign_K = np.where(np.arange(K) < K // 2, -1.0, 1.0)
    cos, sin = (f[None, None].astype(x_BTHK.dtype) for f in (np.cos(angles_TK), sign_K[None, :] * np.sin(angles_TK)))
    x_BHTK = x_BTHK.swapaxes(1, 2)
    # A roll: 1.03× faster steps than with halves split and joined.
    return (x_BHTK * cos + jnp.roll(x_BHTK, K // 2, axis=-1) * sin).swapaxes(1, 2)


def _activate(name: str, hidden, gate):
    if name == "swiglu":
        return jax.nn.silu(gate) * hidden
    return jax.nn.gelu(hidden) if name == "gelu" else jnp.square(jax.nn.relu(hidden))


def block(config: TransformerConfig, attend, p: dict[str, Any], x_BTD):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). ``p`` holds the layer's own weights."""
    c = config
    B, T, _ = x_BTD.shape
    scale = c.head_dim**-0.5 if c.parameterization == "standard" else c.base_head_dim**0.5 / c.head_dim
    h_BTD = rms_norm(x_BTD, p["attn_norm"], c.norm_eps)
    q_BTHK = dense(h_BTD, p["w_q"]).reshape(B, T, c.num_heads, c.head_dim)
    k_BTGK = dense(h_BTD, p["w_k"]).reshape(B, T, c.num_kv_heads, c.head_dim)
    v_BTGK = dense(h_BTD, p["w_v"]).reshape(B, T, c.num_kv_heads, c.head_dim)
    if c.qk_norm:
        q_BTHK = rms_norm(q_BTHK, p["q_norm"], c.norm_eps)
        k_BTGK = rms_norm(k_BTGK, p["k_norm"], c.norm_eps)
    o_BTHK = attend(rotary(q_BTHK, c.rope_theta), rotary(k_BTGK, c.rope_theta), v_BTGK, scale)
    x_BTD = x_BTD + dense(o_BTHK.reshape(B, T, -1), p["w_o"])
    h_BTD = rms_norm(x_BTD, p["mlp_norm"], c.norm_eps)
    gate_BTF = dense(h_BTD, p["w_gate"]) if c.activation == "swiglu" else None
    hidden_BTF = _activate(c.activation, dense(h_BTD, p["w_in"]), gate_BTF)
    x_BTD = x_BTD + dense(hidden_BTF, p["w_out"])
    return nn.with_logical_constraint(x_BTD, ("batch", "seq", "act_embed"))


def hidden(
    config: TransformerConfig,
    execution: ExecutionConfig,
    params: dict[str, jax.Array],
    tokens_BT,
    *,
    causal: bool = True,
    mask_documents: bool = False,
) -> jax.Array:
    """h_BTD for tokens_BT, the last layer's output, normalised, in the compute dtype: what the head reads.

    ``causal``: whether a token sees only those before it; ``mask_documents``: see ``DataConfig``.
    """  # fmt: skip
    c, specs = config, param_specs(config)
    params, x_BTD = embedded(c, specs, params, tokens_BT)
    attend = attention.choose(execution.attention, sharding.platform(), tokens_BT.shape[1], mask_documents, causal)
    if mask_documents:  # id 0 opens a document in every corpus
        attend = functools.partial(attend, document_BT=jnp.cumsum(tokens_BT == 0, axis=1))
    x_BTD = through_layers(functools.partial(block, c, attend), execution, specs, params, x_BTD)
    return rms_norm(x_BTD, params["final_norm"], c.norm_eps)
