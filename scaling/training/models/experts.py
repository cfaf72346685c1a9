"""A mixture of experts: a router that chooses, tokens laid out by expert, and their products group by group.

Shapes: B windows of T tokens, N of them in all, D d_model, E experts (of this device), k active ones; P = N k pairs of
a token and one of its experts; S slots, in which pairs lie expert by expert; X, Y sides of an expert's matrix.

The grouped product is one of three, equal but for rounding (the tests hold each against a loop over tokens):

- capacity: an expert has as many slots in every window: a batched product.
- dropless on CPU: slots in blocks of one expert each, one block after another. XLA's ``ragged_dot`` there multiplies
  every row by every expert: 9 % of the speed of a dense product of the active width, where blocks have 55 to 70 %.
- dropless elsewhere: rows sorted by expert, ``jax.lax.ragged_dot``.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from scaling.families.experts import ExpertsConfig
from scaling.training import sharding

# Rows of a block of one expert, at least and at most: small ones waste less of the last block of each expert, large
# ones read its matrix less often.
BLOCK_ROWS = (32, 64)
# Values of an expert's matrix up to which blocks are one batched product on copies of their matrices: at 32 × 128 that
# gives 70 % of the speed of a dense product of the active width, block after block 58 %; at 64 × 256, 53 and 65 %.
MOST_COPIED = 4096
COUNTED_ROWS = 64  # pairs whose experts are counted in one product


class Said(NamedTuple):
    """What a layer's router did, by window: the balance loss before its coefficient, the mean square of the logits'
    logsumexp, how many tokens chose each expert, and how many choices found it full."""

    balance_B: jax.Array
    square_B: jax.Array
    load_BE: jax.Array
    dropped_B: jax.Array


class Layout(NamedTuple):
    """Which pair lies in which slot.

    Args:
      pair_S: the pair in each slot, P where there is none.
      slot_Nk: the slot of each pair, S where it has none: its expert is full, or another device's.
      product: (x_SX, w_EXY) → y_SY, each slot by its expert's matrix.
      of_slots: b_EY → b_SY, each slot's expert's row.
    """

    pair_S: jax.Array
    slot_Nk: jax.Array
    product: Callable[[Any, Any], Any]
    of_slots: Callable[[Any], Any]


def feed_forward(config: ExpertsConfig, mlp: Callable, p: Mapping[str, jax.Array], h_BTD) -> tuple[jax.Array, Said]:
    """Returns the gated sum of each token's active experts, and what the router did.

    ``mlp(p, x_SD, product)`` is a feed-forward whose weights in ``p`` have a leading axis of experts; ``product`` takes
    x, w and perhaps a bias. Each device of a mesh routes its own rows; along ``tensor`` each has some experts, and what
    they give is added up. Nothing moves but that sum.
    """
    local = functools.partial(_local, config, mlp)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return local(dict(p), h_BTD)
    rows = P(("data", "fsdp"))
    specs = {name: P() if name == "router" else P("tensor") for name in p}
    apart = functools.partial(local, axis="tensor")
    return jax.shard_map(apart, mesh=mesh, in_specs=(specs, rows), out_specs=(rows, rows), check_vma=False)(
        dict(p), h_BTD
    )


def _local(config: ExpertsConfig, mlp: Callable, p: dict[str, jax.Array], h_BTD, axis: str | None = None):
    B, T, D = h_BTD.shape
    gate_BTk, expert_BTk, said = _routed(config, p.pop("router"), h_BTD)
    E = next(iter(p.values())).shape[0]
    if axis is not None:  # the experts of this device from 0 on, all others E
        expert_BTk = expert_BTk - jax.lax.axis_index(axis) * E
        expert_BTk = jnp.where((expert_BTk >= 0) & (expert_BTk < E), expert_BTk, E)
    if config.routing == "capacity":
        layout = by_capacity(expert_BTk, E, config.capacity(T))
    elif sharding.platform() == "cpu":
        layout = in_blocks(expert_BTk.reshape(B * T, -1), E)
    else:
        layout = sorted_rows(expert_BTk.reshape(B * T, -1), E)

    def product(x_SX, w_EXY, b_EY=None):
        y_SY = layout.product(x_SX, w_EXY)
        return y_SY if b_EY is None else y_SY + layout.of_slots(b_EY)

    x_SD = _dispatched(h_BTD.reshape(B * T, D), layout.pair_S, layout.slot_Nk)
    y_SD = mlp(p, x_SD, product)
    gate_Nk = gate_BTk.reshape(B * T, -1)
    y_BTD = _collected(y_SD, gate_Nk, layout.pair_S, layout.slot_Nk).reshape(B, T, D)
    return (y_BTD if axis is None else jax.lax.psum(y_BTD, axis)), said


def _routed(config: ExpertsConfig, router_DE, h_BTD):
    """Gates and experts of each token, (B, T, k), the largest first, and what that was; all in float32."""
    E, k, T = config.experts, config.active, h_BTD.shape[1]
    # All of float32: what a 16-bit logit is rounded to would else choose (Fedus et al. 2022, section 2.4).
    h_ND = h_BTD.reshape(-1, h_BTD.shape[-1]).astype(jnp.float32)
    logits_BTE = jnp.matmul(h_ND, router_DE, precision=jax.lax.Precision.HIGHEST).reshape(*h_BTD.shape[:2], E)
    log_normalizer_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    probs_BTE = jnp.exp(logits_BTE - log_normalizer_BT[..., None])
    gate_BTk, expert_BTk = jax.lax.top_k(probs_BTE, k)
    load_BE = jnp.sum(jax.nn.one_hot(expert_BTk, E, dtype=jnp.float32), axis=(1, 2))
    return gate_BTk, expert_BTk, Said(
        balance_B=E / (k * T) * jnp.sum(load_BE * jnp.mean(probs_BTE, axis=1), axis=-1),
        square_B=jnp.mean(jnp.square(log_normalizer_BT), axis=1),
        load_BE=load_BE,
        dropped_B=jnp.sum(jnp.maximum(load_BE - config.capacity(T), 0), axis=-1),
    )  # fmt: skip


# ---- layouts --------------------------------------------------------------------------------------------------------


def _by_expert(expert_P, E: int):
    """Pairs in the order of their expert, the place of each pair in it, and how many each of E experts has, (E,)."""
    if sharding.platform() != "cpu":
        order_P = jnp.argsort(expert_P, stable=True)
        return order_P, jnp.argsort(order_P), jnp.sum(expert_P[:, None] == jnp.arange(E)[None], axis=0)
    return _counted(expert_P, E)


def _counted(expert_P, E: int):
    """What sorting by expert gives, by counting: 4,096 pairs of 8 experts in .25 ms on a CPU, where sorting takes 2."""
    P, M = expert_P.size, COUNTED_ROWS
    # E are other devices' pairs, E + 1 fills the last block.
    expert_GM = jnp.pad(expert_P, (0, -P % M), constant_values=E + 1).reshape(-1, M)
    is_of_GME = expert_GM[..., None] == jnp.arange(E + 1)[None, None]
    ones_GME = is_of_GME.astype(jnp.float32)  # whole numbers up to 2^24 are exact
    up_to_GME = jnp.einsum("ml,gle->gme", jnp.tril(jnp.ones((M, M))), ones_GME).astype(jnp.int32)
    total_GE = up_to_GME[:, -1]
    count_E = total_GE.sum(axis=0)
    first_GE = (jnp.cumsum(count_E) - count_E)[None] + jnp.cumsum(total_GE, axis=0) - total_GE
    place_P = jnp.sum(jnp.where(is_of_GME, up_to_GME - 1 + first_GE[:, None], 0), axis=-1).reshape(-1)[:P]
    order_P = jnp.zeros_like(place_P).at[place_P].set(jnp.arange(P), unique_indices=True)
    return order_P, place_P, count_E[:E]


def sorted_rows(expert_Nk, E: int) -> Layout:
    """A slot a pair, and behind them as many empty ones as there are pairs of other devices' experts."""
    order_P, place_P, count_E = _by_expert(expert_Nk.reshape(-1), E)
    slot_Nk = jnp.where(expert_Nk < E, place_P.reshape(expert_Nk.shape), expert_Nk.size)
    pair_S = jnp.where(jnp.arange(expert_Nk.size) < count_E.sum(), order_P, expert_Nk.size)
    expert_S = jnp.minimum(expert_Nk.reshape(-1)[order_P], E - 1)
    return Layout(pair_S, slot_Nk, functools.partial(ragged_product, count_E), lambda b_EY: b_EY[expert_S])


def in_blocks(expert_Nk, E: int) -> Layout:
    """Slots in G blocks of M, each of one expert's pairs; G is what the most uneven choice needs."""
    num_pairs = expert_Nk.size
    # The power of two next below half an even share: then a fifth or so of the slots stays empty.
    M = max(BLOCK_ROWS[0], min(BLOCK_ROWS[1], 2 ** int(math.log2(max(1, num_pairs // (2 * E))))))
    G = (num_pairs + E * (M - 1)) // M
    order_P, place_P, count_E = _by_expert(expert_Nk.reshape(-1), E)
    first_E = jnp.cumsum(count_E) - count_E  # place of its first pair
    blocks_E = (count_E + M - 1) // M
    block_E = jnp.cumsum(blocks_E) - blocks_E
    expert_G = jnp.sum(jnp.arange(G)[:, None] >= block_E[None, 1:], axis=1)
    within_GM = (jnp.arange(G) - block_E[expert_G])[:, None] * M + jnp.arange(M)[None]
    place_GM = jnp.minimum(first_E[expert_G][:, None] + within_GM, num_pairs - 1)
    pair_GM = jnp.where(within_GM < count_E[expert_G][:, None], order_P[place_GM], num_pairs)
    mine_Nk = jnp.minimum(expert_Nk, E - 1)
    slot_Nk = (block_E * M - first_E)[mine_Nk] + place_P.reshape(expert_Nk.shape)
    slot_Nk = jnp.where(expert_Nk < E, slot_Nk, G * M)

    def product(x_SX, w_EXY):
        return block_product(x_SX.reshape(G, M, -1), w_EXY, expert_G).reshape(G * M, -1)

    return Layout(pair_GM.reshape(-1), slot_Nk, product, lambda b_EY: jnp.repeat(b_EY[expert_G], M, axis=0))


def by_capacity(expert_BTk, E: int, capacity: int) -> Layout:
    """``capacity`` slots an expert and window, filled in the order of the window's tokens."""
    B, T, k = expert_BTk.shape
    C = capacity
    expert_BP = expert_BTk.reshape(B, T * k)
    order_BP, place_BP, count_BE = jax.vmap(lambda expert_P: _by_expert(expert_P, E))(expert_BP)
    first_BE = jnp.cumsum(count_BE, axis=1) - count_BE
    mine_BP = jnp.minimum(expert_BP, E - 1)
    within_BP = place_BP - jnp.take_along_axis(first_BE, mine_BP, axis=1)
    slot_BP = (mine_BP * B + jnp.arange(B)[:, None]) * C + within_BP
    slot_BP = jnp.where((expert_BP < E) & (within_BP < C), slot_BP, E * B * C)
    slot_11C = jnp.arange(C)[None, None]
    place_BEC = jnp.minimum(first_BE[..., None] + slot_11C, T * k - 1)
    pair_BEC = jnp.take_along_axis(order_BP, place_BEC.reshape(B, -1), axis=1).reshape(B, E, C)
    pair_BEC = pair_BEC + (jnp.arange(B) * T * k)[:, None, None]
    pair_BEC = jnp.where(slot_11C < count_BE[..., None], pair_BEC, B * T * k)

    def product(x_SX, w_EXY):
        return jnp.matmul(x_SX.reshape(E, B * C, -1), w_EXY).reshape(E * B * C, -1)

    pair_S = pair_BEC.swapaxes(0, 1).reshape(-1)
    return Layout(pair_S, slot_BP.reshape(B * T, k), product, lambda b_EY: jnp.repeat(b_EY, B * C, axis=0))


# Into slots and back. Each is the other's transpose, so that both gather: on a CPU a scatter is a loop over its rows.


def _rows(x_NX, index):
    """Rows by index, zeros for one beyond the last."""
    return x_NX.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _dispatched(h_ND, pair_S, slot_Nk):
    """x_SD: each slot's token, zeros where it is empty."""
    return _rows(h_ND, pair_S // slot_Nk.shape[1])


_dispatched.defvjp(
    lambda h_ND, pair_S, slot_Nk: (_dispatched(h_ND, pair_S, slot_Nk), slot_Nk),
    lambda slot_Nk, dx_SD: (jnp.sum(_rows(dx_SD, slot_Nk), axis=1), None, None),
)


@jax.custom_vjp
def _collected(y_SD, gate_Nk, pair_S, slot_Nk):
    """y_ND: of each token its slots' values times their gates, summed in float32."""
    y_NkD = _rows(y_SD, slot_Nk).astype(jnp.float32)
    return jnp.sum(y_NkD * gate_Nk[..., None], axis=1).astype(y_SD.dtype)


def _collected_backward(kept, dy_ND):
    y_SD, gate_Nk, pair_S, slot_Nk = kept
    dy_SD = _rows(dy_ND, pair_S // slot_Nk.shape[1]).astype(jnp.float32)
    dgate_S = jnp.sum(y_SD.astype(jnp.float32) * dy_SD, axis=1)
    gate_S = _rows(gate_Nk.reshape(-1), pair_S)
    return (dy_SD * gate_S[:, None]).astype(y_SD.dtype), _rows(dgate_S, slot_Nk), None, None


_collected.defvjp(lambda *args: (_collected(*args), args), _collected_backward)


# ---- grouped products -----------------------------------------------------------------------------------------------


@jax.custom_vjp
def block_product(x_GMX, w_EXY, expert_G):
    """y_GMY: each block by its expert's matrix, one after another unless the matrices are small."""
    if w_EXY[0].size <= MOST_COPIED:
        return jnp.matmul(x_GMX, w_EXY[expert_G])
    return jax.lax.map(lambda block: block[0] @ w_EXY[block[1]], (x_GMX, expert_G))


def _block_product_backward(kept, dy_GMY):
    x_GMX, w_EXY, expert_G = kept
    if w_EXY[0].size <= MOST_COPIED:
        dw_EXY = jnp.zeros_like(w_EXY).at[expert_G].add(x_GMX.mT @ dy_GMY)
        return dy_GMY @ w_EXY[expert_G].mT, dw_EXY, None

    def backward(dw_EXY, block):
        x_MX, dy_MY, expert = block
        dw_XY = jax.lax.dynamic_index_in_dim(dw_EXY, expert, keepdims=False) + x_MX.T @ dy_MY
        dw_EXY = jax.lax.dynamic_update_index_in_dim(dw_EXY, dw_XY, expert, 0)
        return dw_EXY, dy_MY @ w_EXY[expert].T

    dw_EXY, dx_GMX = jax.lax.scan(backward, jnp.zeros_like(w_EXY), (x_GMX, dy_GMY, expert_G))
    return dx_GMX, dw_EXY, None


block_product.defvjp(lambda *args: (block_product(*args), args), _block_product_backward)


@jax.custom_vjp
def ragged_product(count_E, x_SX, w_EXY):
    """y_SY: rows sorted by expert, ``count_E`` of each, by its matrix; what lies behind them by none, or the last."""
    return _ragged(count_E, x_SX, w_EXY)


def _ragged_product_backward(kept, dy_SY):
    count_E, x_SX, w_EXY = kept
    return None, _ragged(count_E, dy_SY, w_EXY.swapaxes(1, 2)), _ragged_outer(count_E, x_SX, dy_SY)


ragged_product.defvjp(lambda *args: (_ragged(*args), args), _ragged_product_backward)


@jax.custom_batching.custom_vmap
def _ragged(count_E, x_SX, w_EXY):
    return jax.lax.ragged_dot(x_SX, w_EXY, count_E)


@jax.custom_batching.custom_vmap
def _ragged_outer(count_E, x_SX, y_SY):
    """w_EXY: Σ x yᵀ over the rows of each expert."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(x_SX, y_SY, count_E, numbers)


def _whole(num_members: int, batched, args):
    """Arguments of a pack as one member's: K E experts, in the order of members.

    JAX 0.10.2 cannot batch the gradient of ``ragged_dot`` ("vmap over any dim but 0 - NYI").
    """
    count_KE, *others = (
        a if is_batched else jnp.broadcast_to(a, (num_members, *a.shape)) for a, is_batched in zip(args, batched)
    )
    rest_K = others[0].shape[1] - count_KE.sum(axis=1)  # each member's rows must fill its part
    return count_KE.at[:, -1].add(rest_K).reshape(-1), *(a.reshape(-1, *a.shape[2:]) for a in others)


@_ragged.def_vmap
def _(axis_size, in_batched, *args):
    y_SY = _ragged(*_whole(axis_size, in_batched, args))
    return y_SY.reshape(axis_size, -1, *y_SY.shape[1:]), True


@_ragged_outer.def_vmap
def _(axis_size, in_batched, *args):
    w_EXY = _ragged_outer(*_whole(axis_size, in_batched, args))
    return w_EXY.reshape(axis_size, -1, *w_EXY.shape[1:]), True
