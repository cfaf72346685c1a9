"""Self-attention, one function per implementation, equal within rounding.

Shapes: B batch, T tokens, H query heads, G key/value heads, R = H/G queries a key/value head, K head_dim.
Every implementation maps q_BTHK, k_BTGK, v_BTGK and a scale to o_BTHK = softmax(scale · q kᵀ + mask) v, with
logits and softmax in float32 whatever the inputs are: a logit of 60 in bfloat16 is off by up to .125, its weight
by 13 %. ``document_BT``, where given, numbers each token's document, and none sees another's tokens; padding has a
number of its own. Rotary logits
depend on distances alone, so that is at once what positions counted from each document's start would give; positions
that are added to the embedding are counted so where they are (``transformer``). No weight is dropped at random: the
fused kernels cannot, and all are to be equal. Without ``causal`` a token sees those after it too, and there may be
other keys than queries; the first ``prefix`` tokens are seen by all. ``bias_HTS``, where given, is added to the logits
of every row of the batch; the fused kernels do not take it.
"""

import functools
import math

import jax
import jax.numpy as jnp

from scaling.training import sharding

# Rows a block of ``block_causal``: see results/README.md for the sweep over 32, 64, 128.
_BLOCK_ROWS = 64
# Blocks on a GPU, where no kernel wants 64 rows and each is compiled by itself: two, of .75 of the square, or more of
# as many rows. Forward and backward at 1,024 tokens compile in 2.5, 5.8 and 12.6 seconds of a processor for 1, 2 and 4
# blocks, 4.2 for ``einsum``, whose memory is 1.8 times that of two.
_GPU_BLOCKS, _GPU_BLOCK_ROWS = 2, 2048


def einsum(
    q_BTHK, k_BTGK, v_BTGK, scale: float, document_BT=None, causal: bool = True, prefix: int = 0, bias_HTS=None
):  # fmt: skip
    """The textbook square: the reference the others are tested against."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    logits_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK * scale, k_BTGK, preferred_element_type=jnp.float32)
    if bias_HTS is not None:
        logits_BGRTS += bias_HTS.reshape(1, G, H // G, T, -1)
    square = jnp.ones((T, k_BTGK.shape[1]), bool)
    visible = (jnp.tril(square) if causal else square)[None, None, None]
    if prefix:
        visible |= (jnp.arange(k_BTGK.shape[1]) < prefix)[None, None, None, None]
    if document_BT is not None:
        visible &= (document_BT[:, :, None] == document_BT[:, None, :])[:, None, None]
    probs_BGRTS = jax.nn.softmax(jnp.where(visible, logits_BGRTS, -jnp.inf), axis=-1).astype(v_BTGK.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", probs_BGRTS, v_BTGK).reshape(B, T, H, K)


def block_causal(q_BTHK, k_BTGK, v_BTGK, scale: float, document_BT=None, prefix: int = 0, bias_HTS=None):
    """Rows in blocks, each against the keys up to its end, or the prefix's: up to half the square is never computed.

    The division by the softmax's sum is done after the product with v, on K columns instead of T. On a GPU there are
    few blocks, and the backward pass computes their logits again, as fused kernels do.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    R = H // G
    # Heads beside the batch make both products batched 2-D ones, the CPU backend's fast path.
    q_NRTK = (q_BTHK * scale).reshape(B, T, G, R, K).transpose(0, 2, 3, 1, 4).reshape(B * G, R, T, K)
    k_NTK = k_BTGK.transpose(0, 2, 1, 3).reshape(B * G, T, K)
    v_NTK = v_BTGK.transpose(0, 2, 1, 3).reshape(B * G, T, K)

    def of_rows(start, end, q_NRTK, k_NTK, v_NTK):
        rows = end - start
        seen = max(end, prefix)
        q_NMK = q_NRTK[:, :, start:end].reshape(B * G, R * rows, K)
        keys_NKS = k_NTK[:, :seen].swapaxes(1, 2)
        logits_NMS = jnp.matmul(q_NMK, keys_NKS, preferred_element_type=jnp.float32)
        if bias_HTS is not None:
            bias_1GMS = bias_HTS[:, start:end, :seen].reshape(1, G, R * rows, seen)
            logits_NMS = (logits_NMS.reshape(B, G, R * rows, seen) + bias_1GMS).reshape(logits_NMS.shape)
        visible_rowsS = jnp.arange(start, end)[:, None] >= jnp.arange(seen)[None, :]
        if prefix:
            visible_rowsS |= jnp.arange(seen)[None, :] < prefix
        visible_MS = jnp.tile(visible_rowsS, (R, 1))[None]
        if document_BT is not None:
            same_BrowsS = document_BT[:, start:end, None] == document_BT[:, None, :seen]
            visible_MS = visible_MS & jnp.repeat(jnp.tile(same_BrowsS, (1, R, 1)), G, axis=0)
        logits_NMS = jnp.where(visible_MS, logits_NMS, -jnp.inf)
        weights_NMS = jnp.exp(logits_NMS - jax.lax.stop_gradient(logits_NMS.max(-1, keepdims=True)))
        sums_NM1 = weights_NMS.sum(-1, keepdims=True)
        values_NMK = weights_NMS.astype(v_NTK.dtype) @ v_NTK[:, :seen]
        return (values_NMK / sums_NM1).astype(v_NTK.dtype).reshape(B, G, R, rows, K)

    block_rows = _BLOCK_ROWS
    if sharding.platform() == "gpu":
        block_rows = max(_BLOCK_ROWS, min(-(-T // _GPU_BLOCKS), _GPU_BLOCK_ROWS))
        of_rows = jax.checkpoint(of_rows, static_argnums=(0, 1))
    starts = range(0, T, block_rows)
    blocks = [of_rows(start, min(start + block_rows, T), q_NRTK, k_NTK, v_NTK) for start in starts]
    out_BGRTK = jnp.concatenate(blocks, axis=3)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def cudnn(q_BTHK, k_BTGK, v_BTGK, scale: float, document_BT=None, causal: bool = True):
    """cuDNN's fused kernel for 16-bit inputs on NVIDIA GPUs; XLA's fused softmax for float32, which cuDNN lacks.

    Raises ValueError with documents: as a bias their mask would take the T × T square that the kernel is there to save;
    and for shapes that the kernel does not serve.
    """
    if document_BT is not None:
        raise ValueError(
            "execution.attention is 'cudnn', which has no mask for documents or padding here: write auto, or einsum"
        )
    implementation = "cudnn" if q_BTHK.dtype in (jnp.bfloat16, jnp.float16) else "xla"
    if implementation == "cudnn" and not serves(q_BTHK, k_BTGK):
        raise ValueError(
            f"execution.attention is 'cudnn', which trains on even lengths and heads of a multiple of 8, at most "
            f"{_widest_head()}: here {q_BTHK.shape[1]} queries, {k_BTGK.shape[1]} keys, heads of {q_BTHK.shape[3]}: "
            "write auto, or einsum"
        )
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGK, scale=scale, is_causal=causal, implementation=implementation
    )


def serves(q_BTHK, k_BTGK) -> bool:
    """Whether cuDNN's kernel trains on these shapes: JAX refuses others when a step is compiled for a GPU (its
    ``check_is_flash_attention``)."""
    lengths, head_dim = (q_BTHK.shape[1], k_BTGK.shape[1]), q_BTHK.shape[3]
    return not any(length % 2 for length in lengths) and head_dim % 8 == 0 and head_dim <= _widest_head()


def _widest_head() -> int:
    """256 from Hopper on, 128 before, as JAX itself asks the device, or what stands for one that is not here."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_compute_capability
    except ImportError:  # a private name: another JAX may have none
        return 128
    return 256 if check_compute_capability("9.0") else 128


def fused_or_not(q_BTHK, k_BTGK, v_BTGK, scale: float, document_BT=None, causal: bool = True):
    """cuDNN's kernel where it serves the shapes, else by blocks, or whole."""
    plain = block_causal if causal else functools.partial(einsum, causal=False)
    if document_BT is not None or (q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and not serves(q_BTHK, k_BTGK)):
        return plain(q_BTHK, k_BTGK, v_BTGK, scale, document_BT)
    return cudnn(q_BTHK, k_BTGK, v_BTGK, scale, causal=causal)


def splash(q_BTHK, k_BTGK, v_BTGK, scale: float, document_BT=None, causal: bool = True):
    """The fused TPU kernel that JAX ships (splash attention), run by each device on its own rows and heads.

    Off TPU it runs in Pallas' interpreter, slowly: for tests. Raises ValueError when T is not a multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = q_BTHK.shape[1]
    if T % 128:
        raise ValueError(f"seq_len is {T}: the splash kernel wants a multiple of 128, or attention: einsum")

    # The kernel's own default, 128, keeps the matrix units half idle; 512 is the largest that fits every chip's VMEM.
    block = next(size for size in (512, 256, 128) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = kernel.BlockSizes(**{f"block_{name}": block for name in names})

    def local(q_BTHK, k_BTGK, v_BTGK, *document):
        # Grouped heads are repeated: the kernel's own grouped form wants one key head a device.
        repeats = q_BTHK.shape[2] // k_BTGK.shape[2]
        q_BHTK, k_BHTK, v_BHTK = (
            x.transpose(0, 2, 1, 3)
            for x in (q_BTHK * scale, jnp.repeat(k_BTGK, repeats, axis=2), jnp.repeat(v_BTGK, repeats, axis=2))
        )
        mask = masks.MultiHeadMask([masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))] * q_BTHK.shape[2])
        attend = kernel.make_splash_mha(
            mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=sharding.platform() != "tpu"
        )
        segments = [kernel.SegmentIds(q=d, kv=d) for d in document]
        return jax.vmap(attend)(q_BHTK, k_BHTK, v_BHTK, *segments).transpose(0, 2, 1, 3)

    arrays = (q_BTHK, k_BTGK, v_BTGK) if document_BT is None else (q_BTHK, k_BTGK, v_BTGK, document_BT)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return local(*arrays)
    rows = ("data", "fsdp")
    spec = jax.sharding.PartitionSpec(rows, None, "tensor", None)
    specs = (spec, spec, spec, jax.sharding.PartitionSpec(rows, None))[: len(arrays)]
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


IMPLEMENTATIONS = {"einsum": einsum, "block_causal": block_causal, "cudnn": cudnn, "splash": splash}


@functools.cache
def choose(
    name: str,
    platform: str,
    seq_len: int,
    mask_documents: bool = False,
    causal: bool = True,
    prefix: int = 0,
    cross: bool = False,
    biased: bool = False,
):
    """The implementation called ``name``; ``auto`` takes the platform's own where that can serve it.

    ``mask_documents``: it is given ``document_BT``; ``prefix``: tokens that all see; ``cross``: the keys are those of
    other tokens; ``biased``: it is given ``bias_HTS``. Raises ValueError for blocks of a triangle where the whole
    square is wanted, and for a fused kernel that has no mask for a prefix, or takes no biases.
    """
    if biased:
        if name in ("cudnn", "splash"):
            raise ValueError(
                f"execution.attention is {name!r}, which takes no biases by distance here (positions: relative): "
                "write auto or einsum"
            )
        if name == "auto":
            name = "block_causal" if causal or prefix else "einsum"
    if prefix:
        if name in ("cudnn", "splash"):
            raise ValueError(
                f"execution.attention is {name!r}, which has no mask for a prefix: write auto, block_causal or einsum"
            )
        name = "block_causal" if name == "auto" else name
        return functools.partial(IMPLEMENTATIONS[name], prefix=prefix)
    if cross and name in ("auto", "splash") and platform != "gpu":
        name = "einsum"  # splash wants as many keys as queries
    if name == "auto" and mask_documents and platform == "gpu":
        name = "block_causal" if causal else "einsum"
    if name == "auto":
        blocks = "block_causal" if causal else "einsum"
        splash_or_not = "splash" if seq_len % 128 == 0 else blocks
        if platform == "gpu":
            return functools.partial(fused_or_not, causal=causal)
        name = {"cpu": blocks, "tpu": splash_or_not}.get(platform, "einsum")
    if causal:
        return IMPLEMENTATIONS[name]
    if name == "block_causal":
        raise ValueError(
            "execution.attention is 'block_causal', and the objective sees both sides of a token: write auto or einsum"
        )
    return functools.partial(IMPLEMENTATIONS[name], causal=False)
