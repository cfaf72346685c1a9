"""The Transformer against oracles that share none of its code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling.execution import ExecutionConfig
from scaling.families.transformer import TransformerConfig
from scaling.training import models
from scaling.training.models import attention, transformer
from tests.training.lab import initial, quick_jit

SMALL = TransformerConfig(d_model=16, num_layers=2, num_heads=4, head_dim=4, num_kv_heads=2, d_ff=24, vocab_size=32)
VARIANTS = {
    "gelu": SMALL,
    "swiglu": dataclasses.replace(SMALL, activation="swiglu"),
    "relu2, qk-norm": dataclasses.replace(SMALL, activation="relu2", qk_norm=True),
    "tied": dataclasses.replace(SMALL, tied_embeddings=True),
    "narrow heads": dataclasses.replace(SMALL, num_heads=2, num_kv_heads=1, head_dim=6),
}


def tokens(rows, length, vocab=32, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length), dtype=np.int32)


@functools.partial(quick_jit, static_argnums=0)
def apply(config, params, batch):
    return models.apply(config, ExecutionConfig(), params, batch)


def logits_of(config, batch):
    return apply(config, initial(config, 0), batch)


def naive_attention(q_BTHK, k_BTGK, v_BTGK, scale):
    """Loops over rows in float64."""
    B, T, H, _ = q_BTHK.shape
    out = np.zeros(q_BTHK.shape)
    for b in range(B):
        for h in range(H):
            g = h // (H // k_BTGK.shape[2])
            for t in range(T):
                logits = k_BTGK[b, : t + 1, g].astype(float) @ q_BTHK[b, t, h].astype(float) * scale
                weights = np.exp(logits - logits.max())
                out[b, t, h] = weights @ v_BTGK[b, : t + 1, g].astype(float) / weights.sum()
    return out


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("name,length", [("einsum", 20), ("block_causal", 20), ("block_causal", 150), ("cudnn", 20)])
def test_attention_is_the_definition(name, length, heads, kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, length, heads, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, 8)).astype(np.float32)
    # On CPU the float32 path of "cudnn" is XLA's fused softmax; the kernel itself needs a GPU.
    out = quick_jit(functools.partial(attention.IMPLEMENTATIONS[name], scale=0.3))(q, k, v)
    assert_allclose(out, naive_attention(q, k, v, 0.3), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["einsum", "block_causal", "cudnn", pytest.param("splash", marks=pytest.mark.slow)])
def test_bfloat16_logits_are_not_rounded_to_bfloat16(name):
    """Logits of 64 give or take one, where a bfloat16 is good to .25: their weights would be off by up to a quarter."""
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(2 + 0.3 * rng.normal(size=(2, 1, 128, 2, 128)), jnp.bfloat16)
    v = jnp.asarray(rng.normal(size=(1, 128, 2, 128)), jnp.bfloat16)
    function = attention.IMPLEMENTATIONS[name]
    if name == "cudnn":  # what it falls back to on CPU; the kernel itself keeps float32
        function = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    out = np.asarray(function(q, k, v, scale=0.125), np.float64)
    exact = naive_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), 0.125)
    assert np.abs(out - exact).max() < 0.01 * np.abs(exact).max()  # .07 with bfloat16 logits


@pytest.mark.slow
def test_splash_attention_and_its_gradient_are_the_reference():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 128, 2, 128)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 128, 1, 128)).astype(np.float32)

    def value_and_grads(name):
        function = attention.IMPLEMENTATIONS[name]
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(function(*a, 0.1))), argnums=(0, 1, 2))(q, k, v)

    reference, splash = value_and_grads("einsum"), value_and_grads("splash")
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-4), reference, splash)


def test_scores_depend_on_relative_position_only():
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 8)).astype(np.float32)
    rotated = np.asarray(transformer.rotary(jnp.asarray(np.repeat(x, 12, axis=1)), 100.0))[0, :, 0]
    scores = rotated @ rotated.T
    for offset in range(12):
        diagonal = np.diagonal(scores, offset)
        assert_allclose(diagonal, diagonal[0], rtol=1e-5)
    assert_allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(x), rtol=1e-6)


@pytest.mark.parametrize("name", ["einsum", "cudnn"])
def test_attention_both_ways_is_the_softmax_over_all(name):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 20, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 20, 4, 8)).astype(np.float32)
    out = quick_jit(functools.partial(attention.IMPLEMENTATIONS[name], scale=0.3, causal=False))(q, k, v)
    logits = np.einsum("bthk,bshk->bhts", q, k).astype(float) * 0.3
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    exact = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
    assert_allclose(out, exact, rtol=2e-5, atol=2e-6)


def test_blocks_of_a_triangle_are_refused_where_the_square_is_wanted():
    assert attention.choose("auto", "cpu", 64, causal=False).func is attention.einsum
    with pytest.raises(ValueError, match="write auto or einsum"):
        attention.choose("block_causal", "cpu", 64, causal=False)


@pytest.mark.slow
@pytest.mark.parametrize("config", [VARIANTS["swiglu"], VARIANTS["relu2, qk-norm"]], ids=["swiglu", "relu2"])
def test_execution_changes_rounding_only(config):
    params = initial(config, 0)
    batch = tokens(2, 16)

    def loss_and_grads(execution):
        def loss(params):
            logits = models.apply(config, execution, params, batch)
            return jnp.mean(jnp.square(jax.nn.log_softmax(logits)))

        return jax.jit(jax.value_and_grad(loss))(params)

    reference = loss_and_grads(ExecutionConfig(attention="einsum", scan_layers=False))
    for execution in (
        ExecutionConfig(attention="block_causal", scan_layers=True),
        ExecutionConfig(attention="einsum", scan_layers=True, remat="full"),
        ExecutionConfig(attention="einsum", scan_layers=False, remat="dots"),
    ):
        other = loss_and_grads(execution)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), reference, other)


def test_softcap_bounds_and_init_is_near_uniform():
    config = dataclasses.replace(SMALL, logit_softcap=0.5)
    params = initial(SMALL, 0)  # these, and their shapes, are one program for all that asks for them
    uncapped = apply(SMALL, params, tokens(4, 16))
    capped = apply(config, params, tokens(4, 16))
    assert_allclose(capped, 0.5 * np.tanh(np.asarray(uncapped) / 0.5), rtol=1e-5, atol=1e-6)
    log_probs = jax.nn.log_softmax(uncapped)
    picked = np.take_along_axis(np.asarray(log_probs), tokens(4, 16, seed=1)[..., None], axis=-1)
    # Logits of variance 1: E[-log p] = ln V + 1/2 for random targets.
    assert -picked.mean() == pytest.approx(np.log(32) + 0.5, abs=0.25)


def test_bfloat16_computes_near_float32_from_float32_weights():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    assert {p.dtype for p in shapes.values()} == {jnp.dtype("float32")}
    half, full = (apply(c, initial(SMALL, 0), tokens(4, 16)) for c in (config, SMALL))
    assert half.dtype == jnp.float32
    relative = np.linalg.norm(half - full) / np.linalg.norm(full)
    assert 1e-4 < relative < 3e-2  # rounded, and by no more than bfloat16 rounds


def logit_change(config, steps=3):
    """RMS change of the logits after a few updates of Adam's sign-like size, with μP's rates."""
    from scaling.training import optimizers

    params = start = initial(config, 0)
    batch = tokens(4, 32)
    multipliers = optimizers.rate_multipliers(config, transformer.param_specs(config))
    run = jax.jit(lambda p: models.apply(config, ExecutionConfig(), p, batch[:, :-1]))

    @jax.jit
    @jax.grad
    def grad(p):
        logits = models.apply(config, ExecutionConfig(), p, batch[:, :-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], axis=-1))

    for _ in range(steps):
        grads = grad(params)
        params = {n: p - 0.003 * multipliers[n] * jnp.sign(grads[n]) for n, p in params.items()}
    return float(jnp.sqrt(jnp.mean(jnp.square(run(params) - run(start)))))


@pytest.mark.slow
def test_mup_coordinate_check():
    """Under μP the movement of the logits settles as width grows; under the standard parameterisation it runs away."""

    def at(width, parameterization):
        base = {"base_d_model": 32, "base_head_dim": 8} if parameterization == "mup" else {}
        config = TransformerConfig(
            d_model=width, num_layers=2, num_heads=width // 8, head_dim=8, num_kv_heads=width // 8, d_ff=4 * width,
            vocab_size=32, parameterization=parameterization, **base,
        )  # fmt: skip
        return logit_change(config)

    mup = [at(w, "mup") for w in (32, 128, 512)]
    standard = [at(w, "standard") for w in (32, 128, 512)]
    assert mup[0] == pytest.approx(standard[0], rel=1e-4)  # at the base width they are the same model
    assert mup[2] < mup[1] < mup[0]
    assert mup[1] / mup[2] < 1.4
    assert standard[2] > 1.7 * standard[1]
    assert standard[2] > 2 * standard[0]


@pytest.mark.parametrize("name", ["einsum", "block_causal", pytest.param("splash", marks=pytest.mark.slow)])
def test_a_document_is_attended_to_alone(name):
    """By every kernel, in values and gradients, what softmax over the document's own past gives."""
    rng = np.random.default_rng(0)
    B, T, H, G, K = 2, 128, 4, 2, 8
    q, k, v = (rng.normal(size=(B, T, heads, K)).astype(np.float32) for heads in (H, G, G))
    # Documents of one token, across the border of a block, and one that began before the window.
    document = np.stack([np.searchsorted([0, 20, 21, 90], np.arange(T), "right"),
                         np.searchsorted([7, 64, 65], np.arange(T), "right")])  # fmt: skip
    expected = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        past = [s for s in range(t + 1) if document[b, s] == document[b, t]]
        logits = 0.3 * k[b, past, h // (H // G)].astype(np.float64) @ q[b, t, h]
        weights = np.exp(logits - logits.max())
        expected[b, t, h] = weights / weights.sum() @ v[b, past, h // (H // G)]
    attend = quick_jit(functools.partial(attention.IMPLEMENTATIONS[name], scale=0.3))
    assert_allclose(attend(q, k, v, document_BT=document), expected, rtol=2e-4, atol=2e-5)

    def gradient(name):
        function = attention.IMPLEMENTATIONS[name]
        return quick_jit(jax.grad(lambda q, k, v: jnp.sum(function(q, k, v, 0.3, document) ** 2), argnums=(0, 1, 2)))

    for found, want in zip(gradient(name)(q, k, v), gradient("einsum")(q, k, v)):
        assert_allclose(found, want, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_a_window_of_documents_gives_what_each_gives_in_its_own():
    """Positions too count from each document's start: rotary logits know distances alone."""
    config, execution = VARIANTS["relu2, qk-norm"], ExecutionConfig()
    window = tokens(1, 24)
    window[window == 0] = 1
    window[0, [8, 16]] = 0
    params = initial(config, 1)
    apply = jax.jit(functools.partial(models.apply, config, execution), static_argnames="mask_documents")
    masked = apply(params, window, mask_documents=True)
    alone = apply(params, window.reshape(3, 8), mask_documents=False)
    assert_allclose(masked.reshape(alone.shape), alone, rtol=2e-4, atol=2e-5)
    assert np.abs(apply(params, window, mask_documents=False) - masked).max() > 0.01


def test_a_kernel_without_document_masks_says_so_and_auto_takes_another():
    with pytest.raises(ValueError, match=r"^data.mask_documents is true: the cudnn kernel has no mask .*: write"):
        models.apply(SMALL, ExecutionConfig(attention="cudnn"), initial(SMALL, 0),
                          tokens(1, 8), mask_documents=True)  # fmt: skip
    assert attention.choose("auto", "gpu", 128, mask_documents=True) is attention.block_causal
    assert attention.choose("auto", "gpu", 128) is attention.cudnn
