"""Decoder-only Transformer with the norms, positions, activations, biases and dropout that its config names.

Shapes: B batch, T tokens, D d_model, F d_ff, H query heads, G key/value heads, K head_dim, V vocabulary, L layers.
A parameter is declared once, in ``param_specs``: shape, logical axes, initialisation, group, and how μP and Muon treat
it. Layers are stored stacked, (L, …), however they are executed, so a checkpoint does not depend on that.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.execution import ExecutionConfig
from scaling.families.experts import ExpertsConfig
from scaling.families.transformer import GATED, MAX_DISTANCE, NUM_BUCKETS, TransformerConfig, norm_has_bias
from scaling.training import sharding
from scaling.training.models import attention, experts
from scaling.training.models.parameters import Hidden, ParamSpec, dense, layer_norm, rms_norm
from scaling.training.models.stack import embedded, through_layers


def param_specs(config: TransformerConfig) -> dict[str, ParamSpec]:
    """Every parameter by name.

    Standard: matrices at fan_in^-1/2, those that write to the residual stream divided by (2 L)^1/2 (GPT-2) unless each
    sum is normalised anyway (post-norm), the embedding at 1, where it is not tied or scaled, and the head at D^-1/2.
    Positions at half of what the embedding is read at (.01 to .02 in GPT-2's code), biases by distance at D^-1/2
    (Hugging Face's T5), other biases at 0. μP (Yang et al. 2022, table 8, Adam): the same, with the head fixed at what
    the base width would have and its logits divided by m in ``apply``.
    """
    c = config
    attn_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    residual = 1.0 / math.sqrt(2 * c.num_layers) if c.norm_position == "pre" else 1.0
    head_std = _head_std(c)

    def matrix(axes, fan_in, fan_out, group, scale=1.0):
        shape, std = (c.num_layers, fan_in, fan_out), scale * fan_in**-0.5
        return ParamSpec(shape, ("layers", *axes), std, group, matrix=(1, 2), mup="hidden", decay=True)

    def of_layers(size, init_std, group, axis="norm"):
        return ParamSpec((c.num_layers, size), ("layers", axis), init_std, group)

    # A tied table is read as embedding and as head, so it takes the head's scale. Otherwise 1, so that the residual
    # stream starts at the scale of what the layers add to it: see the init entry of results/README.md.
    embedding_std = head_std if c.tied_embeddings or c.scaled_embeddings else 1.0
    specs = {
        "embedding": ParamSpec((c.vocab_size, c.d_model), ("vocab", "embed"), embedding_std, "embedding", mup="input"),
        "attn_norm": of_layers(c.d_model, None, "norm"),
        "w_q": matrix(("embed", "heads"), c.d_model, attn_width, "attention"),
        "w_k": matrix(("embed", "kv_heads"), c.d_model, kv_width, "attention"),
        "w_v": matrix(("embed", "kv_heads"), c.d_model, kv_width, "attention"),
        "w_o": matrix(("heads", "embed"), attn_width, c.d_model, "attention", residual),
        "mlp_norm": of_layers(c.d_model, None, "norm"),
        **_mlp_specs(c, residual),
    }
    if c.norm_position == "pre":
        specs["final_norm"] = ParamSpec((c.d_model,), ("norm",), None, "norm")
    if c.activation in GATED:  # declared after what other activations have too, whose draws stay what they were
        specs |= {name: spec for name, spec in _mlp_specs(c, residual, gates=True).items() if name not in specs}
    if c.qk_norm:
        specs |= {name: of_layers(c.head_dim, None, "norm") for name in ("q_norm", "k_norm")}
    if not c.tied_embeddings:
        shape = (c.d_model, c.vocab_size)
        specs["unembedding"] = ParamSpec(shape, ("embed", "vocab"), head_std, "unembedding", mup="output", decay=True)
    if c.positions == "learned":
        std = 0.5 * (1.0 if c.scaled_embeddings else embedding_std)
        specs["positions"] = ParamSpec((c.num_positions, c.d_model), (None, "embed"), std, "embedding", mup="input")
    if c.positions == "relative":  # in float32, as the logits that it is added to
        shape = (NUM_BUCKETS, c.num_heads)
        specs["distances"] = ParamSpec(shape, (None, "heads"), c.d_model**-0.5, "embedding", in_float32=True)
    if norm_has_bias(c):
        norms = [(name, spec) for name, spec in specs.items() if spec.group == "norm"]
        specs |= {f"{name}_bias": dataclasses.replace(spec, init_std=0.0) for name, spec in norms}
    if c.biases:  # a dimension of the residual stream is whole on every device
        linear = [(name, spec) for name, spec in specs.items() if spec.matrix is not None]
        for name, spec in linear:
            into = spec.matrix[0]
            shape, axes = (of[:into] + of[into + 1 :] for of in (spec.shape, spec.logical_axes))
            axes = tuple("norm" if axis == "embed" else axis for axis in axes)
            specs[name.replace("w_", "b_", 1)] = ParamSpec(shape, axes, 0.0, spec.group)
    return specs


def _mlp_specs(config: TransformerConfig, residual: float, gates: bool = False) -> dict[str, ParamSpec]:
    """The matrices of the feed-forward, or of all experts, each drawn as a feed-forward of its width; and the router.

    An expert lies whole on one device; ``gates``: with SwiGLU's or GEGLU's. The router's sides do not both grow with
    width, so that no optimiser of matrices works on it.
    """
    m, L, D, F = config.mlp, config.num_layers, config.d_model, config.expert_width
    kinds = {"in": (D, F, 1.0), "out": (F, D, residual)} | ({"gate": (D, F, 1.0)} if gates else {})
    # prefix → how many there are, and the axes of that number and of an expert's width
    stacks: dict[str, tuple[tuple[int, ...], tuple[str | None, ...], str | None]] = {"w_": ((), (), "mlp")}
    if m is not None:
        stacks = {"w_": ((m.experts,), ("experts",), None)}
        stacks |= {"w_shared_": ((m.shared,), (None,), "mlp")} if m.shared else {}
    specs = {}
    for prefix, (count, axis, width) in stacks.items():
        for name, (fan_in, fan_out, scale) in kinds.items():
            sides = (width, "embed") if name == "out" else ("embed", width)
            specs[prefix + name] = ParamSpec(
                (L, *count, fan_in, fan_out), ("layers", *axis, *sides), scale * fan_in**-0.5, "mlp",
                matrix=(1 + len(count), 2 + len(count)), mup="hidden", decay=True,
            )  # fmt: skip
    if m is not None:
        shape, axes = (L, D, m.experts), ("layers", "embed", None)
        specs["router"] = ParamSpec(shape, axes, D**-0.5, "router", mup="output", decay=True, in_float32=True)
    return specs


def _head_std(config: TransformerConfig) -> float:
    return (config.base_d_model or config.d_model) ** -0.5


def sinusoids(length: int, width: int) -> np.ndarray:
    """Fixed positions, float64 [length, width]: sin(t / 10000^(2i/D)) in 2i, its cosine in 2i + 1 (Vaswani et al. 2017,
    section 3.5)."""
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, width, 2)[None, :] / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, width)


def placed(config: TransformerConfig, params: dict[str, jax.Array], tokens_BT, x_BTD, mask_documents: bool):
    """x_BTD with what is added for each token's position, counted in its window, or in its document if masked."""
    T = tokens_BT.shape[1]
    if config.positions == "learned":  # gathered from the whole table, as embeddings are
        table_TD = nn.with_logical_constraint(params["positions"], (None, None))[:T]
    else:
        table_TD = jnp.asarray(sinusoids(T, config.d_model), x_BTD.dtype)
    if not mask_documents:
        return x_BTD + table_TD[None]
    at_1T = jnp.arange(T)[None]  # of a document that began before the window, from the window's start
    place_BT = at_1T - jax.lax.cummax(jnp.where(tokens_BT == 0, at_1T, 0), axis=1)
    return nn.with_logical_constraint(x_BTD + table_TD[place_BT], ("batch", "seq", "act_embed"))


def dropped(rate: float, keys_B, x_BTD):
    """x with each value 0 by chance ``rate``, and the others divided by 1 - rate (Srivastava et al. 2014).

    Each row is drawn by its own key, so that no part, mesh or pack changes it. Without keys, x as it is.
    """
    if keys_B is None:
        return x_BTD
    kept_BTD = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[1:]))(keys_B)
    kept_BTD = nn.with_logical_constraint(kept_BTD, ("batch", "seq", "act_embed"))
    return jnp.where(kept_BTD, x_BTD / (1 - rate), 0)


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


def bucket(distance: np.ndarray, both_ways: bool) -> np.ndarray:
    """The row of the table of biases for a key that is ``distance`` tokens after its query, int64 of the same shape.

    Of U = ``NUM_BUCKETS`` rows (``both_ways``: of each half, the second for keys that follow) the first U/2 are those
    of n = 0, 1, … tokens; then min(U - 1, U/2 + ⌊U/2 · log(2n/U) / log(2M/U)⌋) with M = ``MAX_DISTANCE`` (Raffel et
    al. 2020, arXiv 1910.10683, section 2.1, and their code). Without ``both_ways`` keys that follow are as n = 0.
    """
    n, rows = (np.abs(distance), NUM_BUCKETS // 2) if both_ways else (np.maximum(-distance, 0), NUM_BUCKETS)
    exact = rows // 2
    far = np.log(np.maximum(n, exact) / exact) / np.log(MAX_DISTANCE / exact) * (rows - exact)
    row = np.where(n < exact, n, np.minimum(exact + far.astype(np.int64), rows - 1))
    return row + rows * (distance > 0) if both_ways else row


def bias_by_distance(table_UH, length: int, both_ways: bool):
    """bias_HTT in float32, of query t and key s the row of the table for s - t.

    Each head's numbers stand once in a list of 2 T, that of distance s - t at (s - t) mod 2 T. Written T times one
    after another and cut into rows of 2 T - 1, the list begins one place later in each row. So the gradient is a sum
    over rows, and adds up at the table's rows only 2 T numbers a head instead of T².
    """
    T, H = length, table_UH.shape[1]
    distance = (np.arange(2 * T) + T) % (2 * T) - T
    list_H1N = table_UH[bucket(distance, both_ways)].T[:, None]
    all_HX = jnp.broadcast_to(list_H1N, (H, T, 2 * T)).reshape(H, -1)
    bias_HTT = all_HX[:, : T * (2 * T - 1)].reshape(H, T, 2 * T - 1)[:, :, :T]
    return nn.with_logical_constraint(bias_HTT, ("heads", None, None))


def with_distances(config: TransformerConfig, attend, params: Mapping[str, jax.Array], length: int, both_ways: bool):
    """``attend`` with the biases of a stack's table, where the config has them: of ``length`` tokens, which see those
    after them too if ``both_ways``."""
    if config.positions != "relative":
        return attend
    return functools.partial(attend, bias_HTS=bias_by_distance(params["distances"], length, both_ways))


def _activate(name: str, hidden, gate):
    if name in GATED:
        return {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}[name](gate) * hidden
    relu = jax.nn.relu(hidden)
    return {"gelu": lambda: jax.nn.gelu(hidden), "relu": lambda: relu, "relu2": lambda: jnp.square(relu)}[name]()


def _normed(config: TransformerConfig, p: dict[str, Any], name: str, x):
    if config.norm == "rms":
        return rms_norm(x, p[name], config.norm_eps)
    return layer_norm(x, p[name], p.get(f"{name}_bias"), config.norm_eps)


def _attention(config: TransformerConfig, attend, p: dict[str, Any], h_BTD, read_BSD=None):
    """Attention to the tokens themselves, or to those of ``read_BSD``, between whose positions there is no distance."""
    c = config
    B, T, _ = h_BTD.shape
    from_BSD = h_BTD if read_BSD is None else read_BSD
    S = from_BSD.shape[1]
    scale = c.head_dim**-0.5 if c.parameterization == "standard" else c.base_head_dim**0.5 / c.head_dim
    q_BTHK = dense(h_BTD, p["w_q"], p.get("b_q")).reshape(B, T, c.num_heads, c.head_dim)
    k_BTGK = dense(from_BSD, p["w_k"], p.get("b_k")).reshape(B, S, c.num_kv_heads, c.head_dim)
    v_BTGK = dense(from_BSD, p["w_v"], p.get("b_v")).reshape(B, S, c.num_kv_heads, c.head_dim)
    if c.qk_norm:
        q_BTHK = _normed(c, p, "q_norm", q_BTHK)
        k_BTGK = _normed(c, p, "k_norm", k_BTGK)
    if c.positions == "rotary" and read_BSD is None:
        q_BTHK, k_BTGK = rotary(q_BTHK, c.rope_theta), rotary(k_BTGK, c.rope_theta)
    o_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, scale)
    return dense(o_BTHK.reshape(B, T, -1), p["w_o"], p.get("b_o"))


def _mlp(config: TransformerConfig, p: Mapping[str, Any], h_BTD, product=dense):
    gate_BTF = product(h_BTD, p["w_gate"], p.get("b_gate")) if config.activation in GATED else None
    hidden_BTF = _activate(config.activation, product(h_BTD, p["w_in"], p.get("b_in")), gate_BTF)
    return product(hidden_BTF, p["w_out"], p.get("b_out"))


def _feed_forward(config: TransformerConfig, p: dict[str, Any], h_BTD):
    """Returns what the feed-forward of a layer gives, and what its router said; None without one."""
    if config.mlp is None:
        return _mlp(config, p, h_BTD), None
    mine = {name: w for name, w in p.items() if name == "router" or name[2:] in ("in", "gate", "out")}
    y_BTD, said = experts.feed_forward(config.mlp, functools.partial(_mlp, config), mine, h_BTD)
    for i in range(config.mlp.shared):
        one = {name.replace("shared_", ""): w[i] for name, w in p.items() if "_shared_" in name}
        y_BTD = y_BTD + _mlp(config, one, h_BTD)
    return y_BTD, said


def block(config: TransformerConfig, attend, p: dict[str, Any], x_BTD, across=None):
    """One layer: x + f(norm(x)) for f attention, then the same for f the MLP; post-norm, norm(x + f(x)).

    ``across``: (how, read_BSD) of attention to other tokens, between the two, whose weights are called ``cross_…``.
    ``p`` holds the layer's own weights and, for dropout of f's value, ``keys``, (2, B) or (3, B). Returns x, and what
    the MLP's router said; None without one.
    """
    keys_FB = p.get("keys", (None, None, None))

    def with_residual(x_BTD, norm, function, keys_B):
        h_BTD = _normed(config, p, norm, x_BTD) if config.norm_position == "pre" else x_BTD
        y_BTD, said = function(p, h_BTD)
        x_BTD = x_BTD + dropped(config.dropout, keys_B, y_BTD)
        return (_normed(config, p, norm, x_BTD) if config.norm_position == "post" else x_BTD), said

    def attention_of(p, h_BTD):
        return _attention(config, attend, p, h_BTD), None

    def attention_across(p, h_BTD):
        p = {name.removeprefix("cross_"): w for name, w in p.items() if name.startswith("cross_")}
        return _attention(config, across[0], p, h_BTD, across[1]), None

    x_BTD, _ = with_residual(x_BTD, "attn_norm", attention_of, keys_FB[0])
    if across is not None:
        x_BTD, _ = with_residual(x_BTD, "cross_norm", attention_across, keys_FB[2])
    x_BTD, said = with_residual(x_BTD, "mlp_norm", functools.partial(_feed_forward, config), keys_FB[1])
    return nn.with_logical_constraint(x_BTD, ("batch", "seq", "act_embed")), said


def hidden(
    config: TransformerConfig,
    execution: ExecutionConfig,
    params: dict[str, jax.Array],
    tokens_BT,
    *,
    causal: bool = True,
    read_BR=None,
    present_BT=None,
    mask_documents: bool = False,
    keys_B=None,
) -> Hidden:
    """Returns h_BTD for tokens_BT, the last layer's output, normalised, in the compute dtype.

    ``causal``: whether a token sees only those before it; ``read_BR``: tokens before them that all see;
    ``present_BT``: false of padding, which padding alone sees; ``keys_B``: a key a row, by which dropout is drawn in
    training; ``mask_documents``: see ``DataConfig``.
    """  # fmt: skip
    prefix = 0 if read_BR is None else read_BR.shape[1]
    if prefix:
        tokens_BT = jnp.concatenate([read_BR, tokens_BT], axis=1)
    attend = attention.choose(
        execution.attention, sharding.platform(), tokens_BT.shape[1], mask_documents or present_BT is not None, causal,
        prefix, biased=config.positions == "relative",
    )  # fmt: skip
    attend = with_distances(config, attend, params, tokens_BT.shape[1], both_ways=prefix > 0 or not causal)
    if present_BT is not None:
        attend = functools.partial(attend, document_BT=present_BT.astype(jnp.int32))
    specs = param_specs(config)
    found = through_stack(
        config, execution, specs, params, tokens_BT, attend, mask_documents=mask_documents, keys_B=keys_B
    )
    return found._replace(h_BTD=found.h_BTD[:, prefix:]) if prefix else found


def through_stack(
    config: TransformerConfig,
    execution: ExecutionConfig,
    specs: dict[str, ParamSpec],
    params: dict[str, jax.Array],
    tokens_BT,
    attend,
    *,
    across=None,
    mask_documents: bool = False,
    keys_B=None,
) -> Hidden:
    """Returns h_BTD of one stack of layers for tokens_BT; ``attend``: how they see each other, ``across``: see
    ``block``; the rest as ``hidden`` has it."""
    c = config
    params, x_BTD = embedded(c, specs, params, tokens_BT)
    if mask_documents:  # id 0 opens a document in every corpus
        attend = functools.partial(attend, document_BT=jnp.cumsum(tokens_BT == 0, axis=1))
    if c.scaled_embeddings:
        x_BTD = x_BTD / _head_std(c)
    if c.positions in ("learned", "sinusoidal"):
        x_BTD = placed(c, params, tokens_BT, x_BTD, mask_documents)
    others = {}
    if keys_B is not None:  # of the embedding, and of two or three places in each layer
        F = 2 if across is None else 3
        keys_SB = jax.vmap(lambda key: jax.random.split(key, 1 + F * c.num_layers), out_axes=1)(keys_B)
        x_BTD = dropped(c.dropout, keys_SB[0], x_BTD)
        others["keys"] = keys_SB[1:].reshape(c.num_layers, F, -1)
    one_layer = functools.partial(block, c, attend, across=across)
    x_BTD, said = through_layers(one_layer, execution, specs, params, x_BTD, others)
    h_BTD = _normed(c, params, "final_norm", x_BTD) if c.norm_position == "pre" else x_BTD
    return Hidden(h_BTD) if c.mlp is None else Hidden(h_BTD, *_of_routers(c.mlp, said, tokens_BT.shape[1]))


def _of_routers(config: ExpertsConfig, said: experts.Said, num_tokens: int):
    """Returns the penalty, a sum over layers (Fedus et al. 2022, section 2.2), and the measures: the share of choices
    that fell on each expert, by layer, and of those that found theirs full; of every token, padding too."""
    balance, square = (jnp.sum(jnp.mean(x_LB, axis=1)) for x_LB in (said.balance_B, said.square_B))
    load_BLE, dropped_B = said.load_BE.swapaxes(0, 1), jnp.mean(said.dropped_B, axis=0)
    choices_B = jnp.full_like(dropped_B, config.active * num_tokens)
    measures = {"expert_load": (load_BLE, choices_B), "dropped_tokens": (dropped_B, choices_B)}
    return config.balance_loss * balance + config.router_z_loss * square, measures
