"""The network of recurrent models: a cell's equations, and one scan over time for all of them.

Shapes: B batch, T tokens, D d_model, G gates, P what a cell sees, V vocabulary, L layers. With x a layer's input, h its
state (of the LSTM c besides), W x + b and U h by gate,

    rnn (Elman 1990)          h' = tanh(x + h)
    lstm (Gers et al. 2000)   c' = σ(f + 1) c + σ(i) tanh(g)    h' = σ(o) tanh(c')
    gru (Cho et al. 2014)     n = tanh(x_n + r (h_n + b_h))     h' = (1 - z) n + z h        r, z behind σ

as Flax and cuDNN compute them. The forget gate's bias counts from 1, so that a new LSTM remembers (Jozefowicz et al.
2015, and Keras; Flax and PyTorch begin at 0): Flax's bias is ours plus 1. The products with x are one, of all times at
once, outside the scan; the scan does those with h.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.execution import ExecutionConfig
from scaling.families.recurrent import CELLS, RecurrentConfig
from scaling.training.models.parameters import Hidden, ParamSpec, dense, rms_norm
from scaling.training.models.stack import embedded, through_layers


def param_specs(config: RecurrentConfig) -> dict[str, ParamSpec]:
    """Every parameter by name: matrices at fan_in^-1/2, biases at 0, embedding and head as the transformer's."""
    c, D, L, cell = config, config.d_model, config.num_layers, CELLS[config.cell]
    head_std = D**-0.5

    def matrix(std):
        shape, axes = (L, D, cell.gates, D), ("layers", "embed", None, "mlp")
        return ParamSpec(shape, axes, std, "recurrent", matrix=(1, 3), mup="hidden", decay=True)

    specs = {
        "embedding": ParamSpec(
            (c.vocab_size, D), ("vocab", "embed"), head_std if c.tied_embeddings else 1.0, "embedding", mup="input"
        ),
        "norm": ParamSpec((L, D), ("layers", "norm"), None, "norm"),
        "w_x": matrix(D**-0.5),
        "w_h": matrix(D**-0.5 / math.sqrt(2)),  # products with x and with h are added up
        "bias": ParamSpec((L, cell.gates, D), ("layers", None, "norm"), 0.0, "recurrent"),
    }
    if cell.apart:
        specs["bias_h"] = ParamSpec((L, D), ("layers", "norm"), 0.0, "recurrent")
    specs["final_norm"] = ParamSpec((D,), ("norm",), None, "norm")
    if not c.tied_embeddings:
        head = ParamSpec((D, c.vocab_size), ("embed", "vocab"), head_std, "unembedding", mup="output", decay=True)
        specs["unembedding"] = head
    return specs


State = tuple[jax.Array, ...]  # (B, D) each; the first is the layer's output


def rnn(state: State, pre_BD) -> State:
    return (jnp.tanh(pre_BD),)


def lstm(state: State, i_BD, f_BD, g_BD, o_BD) -> State:
    _, c_BD = state
    c_BD = jax.nn.sigmoid(f_BD + 1) * c_BD + jax.nn.sigmoid(i_BD) * jnp.tanh(g_BD)
    return jax.nn.sigmoid(o_BD) * jnp.tanh(c_BD), c_BD


def gru(state: State, r_BD, z_BD, n_BD, from_h_BD) -> State:
    (h_BD,), r_BD, z_BD = state, jax.nn.sigmoid(r_BD), jax.nn.sigmoid(z_BD)
    n_BD = jnp.tanh(n_BD + r_BD * from_h_BD)
    return ((1 - z_BD) * n_BD + z_BD * h_BD,)


# (states, what the cell sees) → the states after it: the sums of the gates' products; of gates that see the two apart,
# the last ones, first those with x and then those with h.
MOVES: dict[str, Callable[..., State]] = {"rnn": rnn, "lstm": lstm, "gru": gru}


def layer(cell: str, p: dict[str, jax.Array], x_BTD, fresh_BT=None):
    """The states h_BTD of a layer, its own weights in ``p``; where ``fresh_BT`` is true the state before is zero."""
    B, T, D = x_BTD.shape
    seen_BTPD = dense(x_BTD, p["w_x"].reshape(D, -1)).reshape(B, T, -1, D) + p["bias"][None, None]
    if "bias_h" in p:
        seen_BTPD = jnp.concatenate([seen_BTPD, jnp.broadcast_to(p["bias_h"], (B, T, 1, D))], axis=2)
    seen_TBPD = nn.with_logical_constraint(seen_BTPD.swapaxes(0, 1), ("seq", "batch", None, "mlp"))
    h_TBD = over_time(cell, p["w_h"], seen_TBPD, None if fresh_BT is None else fresh_BT.swapaxes(0, 1))
    return nn.with_logical_constraint(h_TBD.swapaxes(0, 1), ("batch", "seq", "act_embed"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_time(cell: str, w_DGD, seen_TBPD, fresh_TB):
    """Returns h_TBD, the states of a cell that sees ``seen_TBPD`` and, added to it by gate, the products of its state
    before with ``w_DGD``.

    Its gradient is written out. That of w is then one product of all times after the backward scan, and not a sum over
    times that the scan carries along, which a mesh would besides add up over its devices at every step. And of a time
    step only the states and what the cell saw are kept.
    """
    return _forward(cell, w_DGD, seen_TBPD, fresh_TB)[0]


def _forward(cell: str, w_DGD, seen_TBPD, fresh_TB):
    w_DGD = nn.with_logical_constraint(w_DGD, (None, None, "mlp"))  # gathered once, not at every step

    def step(state, inputs):
        seen_BPD, fresh_B = inputs
        state = _unless(fresh_B, state)
        h_BD = nn.with_logical_constraint(state[0], ("batch", "act_embed"))
        seen_BPD = _added(cell, seen_BPD, jnp.einsum("bd,dgx->bgx", h_BD, w_DGD))
        state = _laid_out(MOVES[cell](state, *_each(seen_BPD)))
        return state, (state, seen_BPD)

    # Not unrolled: by 2, 4, 8 and 16 times a step takes 1.1 to 2.3 times as long on a CPU (results/README.md).
    _, (states_TBD, seen_TBPD) = jax.lax.scan(step, _start(cell, seen_TBPD), (seen_TBPD, fresh_TB))
    return states_TBD[0], (w_DGD, states_TBD, seen_TBPD, fresh_TB)


def _backward(cell: str, kept, d_h_TBD):
    w_DGD, states_TBD, seen_TBPD, fresh_TB = kept
    before_TBD = tuple(jnp.concatenate([jnp.zeros_like(s_TBD[:1]), s_TBD[:-1]]) for s_TBD in states_TBD)
    before_TBD = _unless(fresh_TB, before_TBD)
    turned_GDD = w_DGD.transpose(1, 2, 0)  # once: a product within the loop would turn it at every step

    def step(d_state, inputs):
        d_h_BD, before, seen_BPD, fresh_B = inputs
        _, pulled_back = jax.vjp(MOVES[cell], before, *_each(seen_BPD))
        (d_h_BD, *d_others), *d_seen = pulled_back((d_state[0] + d_h_BD, *d_state[1:]))
        d_seen_BPD = nn.with_logical_constraint(jnp.stack(d_seen, axis=1), ("batch", None, "mlp"))
        d_h_BD += jnp.einsum("bgx,gxd->bd", _of_state(cell, d_seen_BPD), turned_GDD)
        return _laid_out(_unless(fresh_B, (d_h_BD, *d_others))), d_seen_BPD

    inputs = (d_h_TBD, before_TBD, seen_TBPD, fresh_TB)
    _, d_seen_TBPD = jax.lax.scan(step, _start(cell, seen_TBPD), inputs, reverse=True)
    d_w_DGD = jnp.einsum("tbd,tbgx->dgx", before_TBD[0], _of_state(cell, d_seen_TBPD))
    return d_w_DGD, d_seen_TBPD, None


over_time.defvjp(_forward, _backward)


def _start(cell: str, seen_TBPD) -> State:
    _, B, _, D = seen_TBPD.shape
    return _laid_out((jnp.zeros((B, D), seen_TBPD.dtype),) * CELLS[cell].states)


def _laid_out(state: State) -> State:
    return tuple(nn.with_logical_constraint(s_BD, ("batch", "mlp")) for s_BD in state)


def _unless(fresh, state: State) -> State:
    """``state``, zero where ``fresh`` is true."""
    return state if fresh is None else tuple(jnp.where(fresh[..., None], 0, s) for s in state)


def _each(seen_BPD) -> list[jax.Array]:
    return [seen_BPD[:, k] for k in range(seen_BPD.shape[1])]


def _added(cell: str, seen_BPD, from_h_BGD):
    """What a cell sees, the products with its state added where they belong."""
    G, apart = CELLS[cell].gates, CELLS[cell].apart
    if not apart:
        return seen_BPD + from_h_BGD
    sums_BGD, last_BGD = from_h_BGD[:, : G - apart], from_h_BGD[:, G - apart :]
    parts = (seen_BPD[:, : G - apart] + sums_BGD, seen_BPD[:, G - apart : G], seen_BPD[:, G:] + last_BGD)
    return jnp.concatenate(parts, axis=1)


def _of_state(cell: str, seen_BPD):
    """Of what a cell sees, or of T times that, what the products with its state were added to, by gate."""
    G, apart = CELLS[cell].gates, CELLS[cell].apart
    if not apart:
        return seen_BPD
    return jnp.concatenate([seen_BPD[..., : G - apart, :], seen_BPD[..., G:, :]], axis=-2)


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
        h_BTD = layer(c.cell, p, rms_norm(x_BTD, p["norm"], c.norm_eps), fresh_BT)
        return (x_BTD + h_BTD if c.residual else h_BTD), None

    x_BTD, _ = through_layers(one_layer, execution, specs, params, x_BTD)
    return Hidden(rms_norm(x_BTD, params["final_norm"], c.norm_eps))
