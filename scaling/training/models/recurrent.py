"""The network of recurrent models: gated recurrent units (Cho et al. 2014), as cuDNN and Flax compute them.

Shapes: B batch, T tokens, D d_model, G gates, V vocabulary, L layers. With x a layer's input and h its state,

    r = σ(W_r x + U_r h + b_r)    z = σ(W_z x + U_z h + b_z)    n = tanh(W_n x + b_n + r (U_n h + c))
    h' = (1 - z) n + z h

The products with x are one, of all times at once, outside the scan over time; the scan does those with h.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.execution import ExecutionConfig
from scaling.families.recurrent import GATES, RecurrentConfig
from scaling.training.models.parameters import Hidden, ParamSpec, dense, rms_norm
from scaling.training.models.stack import embedded, through_layers


def param_specs(config: RecurrentConfig) -> dict[str, ParamSpec]:
    """Every parameter by name: matrices at fan_in^-1/2, biases at 0, embedding and head as the transformer's."""
    c, D, L, G = config, config.d_model, config.num_layers, GATES[config.cell]
    head_std = D**-0.5

    def matrix(std):
        shape, axes = (L, D, G, D), ("layers", "embed", None, "mlp")
        return ParamSpec(shape, axes, std, "recurrent", matrix=(1, 3), mup="hidden", decay=True)

    specs = {
        "embedding": ParamSpec(
            (c.vocab_size, D), ("vocab", "embed"), head_std if c.tied_embeddings else 1.0, "embedding", mup="input"
        ),
        "norm": ParamSpec((L, D), ("layers", "norm"), None, "norm"),
        "w_x": matrix(D**-0.5),
        "w_h": matrix(D**-0.5 / math.sqrt(2)),  # products with x and with h are added up
        "bias": ParamSpec((L, G, D), ("layers", None, "norm"), 0.0, "recurrent"),
        "bias_h": ParamSpec((L, D), ("layers", "norm"), 0.0, "recurrent"),
        "final_norm": ParamSpec((D,), ("norm",), None, "norm"),
    }
    if not c.tied_embeddings:
        head = ParamSpec((D, c.vocab_size), ("embed", "vocab"), head_std, "unembedding", mup="output", decay=True)
        specs["unembedding"] = head
    return specs


def gru(p: dict[str, jax.Array], x_BTD, fresh_BT=None):
    """The states h_BTD of a layer, its own weights in ``p``; where ``fresh_BT`` is true the state before is zero."""
    B, _, D = x_BTD.shape
    gates_BTGD = dense(x_BTD, p["w_x"].reshape(D, -1)).reshape(*x_BTD.shape[:2], -1, D) + p["bias"][None, None]
    gates_TBGD = nn.with_logical_constraint(gates_BTGD.swapaxes(0, 1), ("seq", "batch", None, "mlp"))
    u_DX = p["w_h"].reshape(D, -1)

    def step(h_BD, inputs):
        gates_BGD, fresh_B = inputs
        if fresh_B is not None:
            h_BD = jnp.where(fresh_B[:, None], 0, h_BD)
        from_h_BGD = (h_BD @ u_DX).reshape(gates_BGD.shape)
        r_BD, z_BD = (jax.nn.sigmoid(gates_BGD[:, g] + from_h_BGD[:, g]) for g in (0, 1))
        n_BD = jnp.tanh(gates_BGD[:, 2] + r_BD * (from_h_BGD[:, 2] + p["bias_h"][None]))
        h_BD = (1 - z_BD) * n_BD + z_BD * h_BD
        return h_BD, h_BD

    start_BD = nn.with_logical_constraint(jnp.zeros((B, D), x_BTD.dtype), ("batch", "act_embed"))
    # Not unrolled: by 2, 4, 8 and 16 times a step takes 1.1 to 2.3 times as long on a CPU (results/README.md).
    fresh_TB = None if fresh_BT is None else fresh_BT.swapaxes(0, 1)
    _, h_TBD = jax.lax.scan(step, start_BD, (gates_TBGD, fresh_TB))
    return nn.with_logical_constraint(h_TBD.swapaxes(0, 1), ("batch", "seq", "act_embed"))


def hidden(
    config: RecurrentConfig,
    execution: ExecutionConfig,
    params: dict[str, jax.Array],
    tokens_BT,
    *,
    causal: bool = True,
    mask_documents: bool = False,
) -> Hidden:
    """Returns h_BTD for tokens_BT, the last layer's output, normalised, in the compute dtype.

    ``causal`` is true (``RunConfig`` has seen to it); ``mask_documents``: see ``DataConfig``.
    """  # fmt: skip
    c, specs = config, param_specs(config)
    params, x_BTD = embedded(c, specs, params, tokens_BT)
    fresh_BT = tokens_BT == 0 if mask_documents else None  # id 0 opens a document in every corpus

    def one_layer(p, x_BTD):
        h_BTD = gru(p, rms_norm(x_BTD, p["norm"], c.norm_eps), fresh_BT)
        return (x_BTD + h_BTD if c.residual else h_BTD), None

    x_BTD, _ = through_layers(one_layer, execution, specs, params, x_BTD)
    return Hidden(rms_norm(x_BTD, params["final_norm"], c.norm_eps))
