"""The Transformer against oracles that share none of its code."""

import dataclasses
import functools

import flax.linen as nn
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

# Settings of the textbook's and of GPT-2's; together with the others below they take every value of each field.
GPT2 = {"norm": "layer", "biases": True, "positions": "learned", "num_positions": 40, "tied_embeddings": True}
VASWANI = {"norm": "layer", "norm_position": "post", "biases": True, "positions": "sinusoidal", "activation": "relu",
           "tied_embeddings": True, "scaled_embeddings": True}  # fmt: skip
KINDS = {
    "gpt2": GPT2,
    "vaswani": VASWANI,
    "post, rms, rotary": {"norm_position": "post", "biases": True, "activation": "swiglu", "qk_norm": True},
    "pre, rms, none": {"positions": "none", "activation": "relu2"},
    "pre, layer, rotary": {"norm": "layer", "activation": "swiglu", "qk_norm": True},
    "pre, layer, sinusoidal": {"norm": "layer", "biases": True, "qk_norm": True, "positions": "sinusoidal"},
    "pre, rms, relative": {"positions": "relative", "activation": "geglu"},
    "post, layer, relative": {"norm": "layer", "norm_position": "post", "biases": True, "positions": "relative",
                              "activation": "geglu", "qk_norm": True},
    "post, rms, learned": {"norm_position": "post", "positions": "learned", "num_positions": 17,
                           "scaled_embeddings": True, "logit_softcap": 3.0},
}  # fmt: skip


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["einsum", "block_causal", "cudnn", "splash"])
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


# ---- the textbook and its descendants -------------------------------------------------------------------------------


def row_of(distance, both_ways, rows=32, farthest=128):
    """The row for a key ``distance`` tokens after its query, told in words by Raffel et al. 2020, section 2.1, in whole
    numbers: beyond the first half, the largest k such that n / half ≥ (farthest / half)^(k / half)."""
    if both_ways:
        return row_of(-abs(distance), False, rows // 2, farthest) + (rows // 2 if distance > 0 else 0)
    n, half = max(-distance, 0), rows // 2
    if n < half:
        return n
    return half + max(k for k in range(half) if n**half * half**k >= half**half * farthest**k)


@pytest.mark.parametrize("both_ways", [False, True])
def test_rows_of_distances_are_t5s(both_ways):
    distances = np.arange(-300, 301)
    rows = transformer.bucket(distances, both_ways)
    assert rows.tolist() == [row_of(int(d), both_ways) for d in distances]
    assert set(rows) == set(range(32)) - ({16} if both_ways else set())  # no key is both after and 0 away
    far = rows[distances == -128] if both_ways else rows[distances <= -128]
    assert set(far) == {15 if both_ways else 31}


@pytest.mark.parametrize("both_ways", [False, True])
def test_biases_and_their_gradient_are_the_tables_rows(both_ways):
    """Against a loop over pairs; T beyond the farthest distance that has a row of its own."""
    T, H, rng = 140, 3, np.random.default_rng(0)
    table, weights = rng.normal(size=(32, H)).astype(np.float32), rng.normal(size=(H, T, T)).astype(np.float32)
    bias, pull = jax.vjp(lambda t: transformer.bias_by_distance(t, T, both_ways), table)
    bias, rows = np.asarray(bias), [row_of(d, both_ways) for d in range(1 - T, T)]
    summed = np.zeros((32, H))
    for t in range(T):
        for s in range(T):
            row = rows[s - t + T - 1]
            assert (bias[:, t, s] == table[row]).all()
            summed[row] += weights[:, t, s]
    assert_allclose(pull(weights)[0], summed, rtol=1e-4, atol=1e-3)


class Textbook(nn.Module):
    """The same models of Flax's own layers, with complex numbers for rotations and dropout as given ``masks``."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens_BT, masks=None):
        c = self.config
        T, K = tokens_BT.shape[1], c.head_dim
        embed = nn.Embed(c.vocab_size, c.d_model, name="embedding")
        drop = iter([1.0] * (1 + 2 * c.num_layers) if masks is None else masks)

        def norm(name, x):
            layer = nn.RMSNorm if c.norm == "rms" else functools.partial(nn.LayerNorm, use_bias=c.biases)
            return layer(epsilon=c.norm_eps, name=name)(x)

        def linear(name, *shape):
            return nn.DenseGeneral(shape, axis=-1 if name != "o" else (-2, -1), use_bias=c.biases, name=name)

        def rotated(x_BTHK):
            turns = np.exp(1j * np.arange(T)[:, None] * c.rope_theta ** (-np.arange(K // 2) * 2 / K))
            turned = (x_BTHK[..., : K // 2] + 1j * x_BTHK[..., K // 2 :]) * turns[None, :, None]
            return jnp.concatenate([turned.real, turned.imag], axis=-1)

        def attention(i, h):
            q = linear(f"q{i}", c.num_heads, K)(h)
            k, v = (linear(f"{n}{i}", c.num_kv_heads, K)(h) for n in "kv")
            if c.qk_norm:
                q, k = norm(f"q_norm{i}", q), norm(f"k_norm{i}", k)
            if c.positions == "rotary":
                q, k = rotated(q), rotated(k)
            k, v = (jnp.repeat(x, c.num_heads // c.num_kv_heads, axis=2) for x in (k, v))
            bias = None
            if c.positions == "relative":
                rows = [[row_of(s - t, both_ways=False) for s in range(T)] for t in range(T)]
                bias = nn.Embed(32, c.num_heads, name=f"distances{i}")(np.array(rows)).transpose(2, 0, 1)[None]
            o = nn.dot_product_attention(q, k, v, bias, mask=nn.make_causal_mask(tokens_BT))
            return nn.DenseGeneral(c.d_model, axis=(-2, -1), use_bias=c.biases, name=f"o{i}")(o)

        def mlp(i, h):
            up = linear(f"in{i}", c.d_ff)(h)
            act = {"gelu": nn.gelu, "relu": nn.relu, "relu2": lambda x: nn.relu(x) ** 2, "swiglu": lambda x: x,
                   "geglu": lambda x: x}  # fmt: skip
            up = act[c.activation](up)
            if gate := {"swiglu": nn.swish, "geglu": nn.gelu}.get(c.activation):
                up = up * gate(linear(f"gate{i}", c.d_ff)(h))
            return linear(f"out{i}", c.d_model)(up)

        x = embed(tokens_BT) * (np.sqrt(c.d_model) if c.scaled_embeddings else 1)
        if c.positions == "learned":
            x = x + self.param("positions", nn.initializers.zeros, (c.num_positions, c.d_model))[:T]
        elif c.positions == "sinusoidal":
            t, j = np.arange(T)[:, None], np.arange(c.d_model)[None, :]
            angle = t / 10_000 ** (2 * (j // 2) / c.d_model)
            x = x + np.where(j % 2 == 0, np.sin(angle), np.cos(angle))
        x = x * next(drop)
        for i in range(c.num_layers):
            for f, name in ((attention, f"attn_norm{i}"), (mlp, f"mlp_norm{i}")):
                if c.norm_position == "pre":
                    x = x + f(i, norm(name, x)) * next(drop)
                else:
                    x = norm(name, x + f(i, x) * next(drop))
        if c.norm_position == "pre":
            x = norm("final_norm", x)
        head = embed.attend if c.tied_embeddings else nn.Dense(c.vocab_size, use_bias=False, name="unembedding")
        return head(x) if c.logit_softcap is None else c.logit_softcap * nn.tanh(head(x) / c.logit_softcap)


def as_textbook(config, p):
    """Our parameters under Flax's names, in Flax's shapes."""
    c = config
    out = {"embedding": {"embedding": p["embedding"]}}
    out |= {name: p[name] for name in ("positions",) if name in p}
    if "unembedding" in p:
        out["unembedding"] = {"kernel": p["unembedding"]}

    def norm(name, of):
        return {"scale": of(name)} | ({"bias": of(f"{name}_bias")} if f"{name}_bias" in p else {})

    if "final_norm" in p:
        out["final_norm"] = norm("final_norm", p.get)
    heads = {"q": (c.num_heads, c.head_dim), "k": (c.num_kv_heads, c.head_dim), "v": (c.num_kv_heads, c.head_dim)}
    for i in range(c.num_layers):
        if "distances" in p:  # the same table in every layer
            out[f"distances{i}"] = {"embedding": p["distances"]}
        for name in ("q", "k", "v", "o", "in", "out", "gate"):
            if f"w_{name}" in p:
                w = p[f"w_{name}"][i]
                w = (
                    w.reshape(c.num_heads, c.head_dim, -1)
                    if name == "o"
                    else w.reshape(len(w), *heads.get(name, (-1,)))
                )
                out[f"{name}{i}"] = {"kernel": w}
                if f"b_{name}" in p:
                    out[f"{name}{i}"]["bias"] = p[f"b_{name}"][i].reshape(heads.get(name, (-1,)))
        for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm"):
            if name in p:
                out[f"{name}{i}"] = norm(name, lambda n, i=i: p[n][i])
    return {"params": out}


def perturbed(config, seed=0):
    """First parameters with noise on each, so that biases and scales do something."""
    rng = np.random.default_rng(seed)
    shapes = {name: spec.shape for name, spec in transformer.param_specs(config).items()}
    stds = {name: spec.init_std for name, spec in transformer.param_specs(config).items()}
    noise = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {n: np.float32(stds[n] is None) + np.float32(stds[n] or 0.3) * z for n, z in noise.items()}


def unseen_bias(config):
    """The bias that all keys have in common: no softmax sees it, unless keys are rotated, each by another angle."""
    return None if config.positions == "rotary" else "k_norm_bias" if config.qk_norm else "b_k"


def assert_alike(ours, theirs, params, unseen):
    """Values and gradients of a function of the logits; all but that of ``unseen`` are there."""

    def both(function):
        return quick_jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(function(p)))))(params)

    with jax.numpy_rank_promotion("allow"):  # as Flax's layers are written
        expected, expected_grads = both(theirs)
    value, grads = both(ours)
    assert float(value) == pytest.approx(float(expected), rel=1e-5, abs=1e-4)
    for name, grad in grads.items():
        size = np.abs(expected_grads[name]).max()
        assert (size > 1e-3) == (name != unseen), name
        size = max(size, 1.0)
        assert_allclose(grad, expected_grads[name], rtol=1e-4, atol=2e-5 * size, err_msg=name)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if name == "gpt2" else pytest.mark.slow, id=name) for name, k in KINDS.items()]
)
def test_a_transformer_and_its_gradient_are_flaxs(kind):
    config = dataclasses.replace(SMALL, **kind)
    batch = tokens(2, 17)
    assert_alike(
        lambda p: models.apply(config, ExecutionConfig(), p, batch),
        lambda p: Textbook(config).apply(as_textbook(config, p), batch),
        perturbed(config),
        unseen_bias(config),
    )


@pytest.mark.slow
@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_is_where_the_textbook_has_it(position):
    """Of the embedding with its positions and of each addition to x, by a mask a row from the row's key."""
    config = dataclasses.replace(SMALL, **GPT2 | {"norm_position": position}, dropout=0.25)
    batch = tokens(3, 9)
    keys = jax.random.split(jax.random.key(7), 3)
    masks = [[jax.random.bernoulli(key, 0.75, (9, 16)) / 0.75 for key in jax.random.split(row, 5)] for row in keys]
    assert_alike(
        lambda p: models.apply(config, ExecutionConfig(), p, batch, keys_B=keys),
        lambda p: Textbook(config).apply(as_textbook(config, p), batch, [jnp.stack(m) for m in zip(*masks)]),
        perturbed(config),
        unseen_bias(config),
    )


def test_dropout_drops_its_share_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 8)
    x = np.asarray(transformer.dropped(0.2, keys, jnp.ones((8, 50, 64))))
    assert set(np.unique(x)) == {0.0, np.float32(1.25)}
    assert x.mean() == pytest.approx(1, abs=5 * 0.5 / np.sqrt(x.size))  # 5 standard errors: (.2 / .8)^1/2 each
    assert all((x[i] != x[j]).mean() == pytest.approx(0.32, abs=0.04) for i in range(8) for j in range(i))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_decay_and_matrix_optimisers_leave_norms_biases_and_tables_alone(kind):
    from scaling.config import OptimConfig
    from scaling.training import optimizers

    specs = transformer.param_specs(dataclasses.replace(SMALL, **kind))
    matrices = {name for name in specs if name.startswith("w_")}
    assert {name for name, spec in specs.items() if spec.matrix is not None} == matrices
    decayed = {name for name, spec in specs.items() if optimizers.decays(OptimConfig(0.1, 0), spec)}
    assert decayed == matrices | ({"unembedding"} & set(specs))
    mup = {name: spec.mup for name, spec in specs.items() if spec.mup != "vector"}
    table = {"embedding": "input", "positions": "input", "unembedding": "output"}
    assert mup == {name: table.get(name, "hidden") for name in specs if name in matrices or name in table}
    zeros = {name for name, spec in specs.items() if spec.init_std == 0}
    assert zeros == {name for name in specs if name.startswith("b_") or name.endswith("_bias")}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_stream_starts_at_the_scale_of_what_layers_read(kind):
    """Embedding and learned positions as the first layer reads them, and logits of the order of 1."""
    config = dataclasses.replace(SMALL, d_model=64, head_dim=16, vocab_size=512, **kind)
    specs = transformer.param_specs(config)
    read = specs["embedding"].init_std * (8 if config.scaled_embeddings else 1)
    assert read == (1 / 8 if config.tied_embeddings and not config.scaled_embeddings else 1)
    if config.positions == "learned":
        assert specs["positions"].init_std == read / 2
    assert specs["w_o"].init_std == pytest.approx(64**-0.5 / (2 if config.norm_position == "pre" else 1))


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
    run = quick_jit(lambda p: models.apply(config, ExecutionConfig(), p, batch[:, :-1]))

    @quick_jit
    @jax.grad
    def grad(p):
        logits = models.apply(config, ExecutionConfig(), p, batch[:, :-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], axis=-1))

    for _ in range(steps):
        grads = grad(params)
        params = {n: p - 0.003 * multipliers[n] * jnp.sign(grads[n]) for n, p in params.items()}
    return float(jnp.sqrt(jnp.mean(jnp.square(run(params) - run(start)))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [{}, {**VASWANI, "logit_softcap": None}, {**GPT2, "tied_embeddings": False}],
    ids=["default", "vaswani", "gpt2, untied"],
)  # fmt: skip
def test_mup_coordinate_check(kind):
    """Under μP the movement of the logits settles as width grows; under the standard parameterisation it runs away."""

    def at(width, parameterization):
        base = {"base_d_model": 32, "base_head_dim": 8} if parameterization == "mup" else {}
        config = TransformerConfig(
            d_model=width, num_layers=2, num_heads=width // 8, head_dim=8, num_kv_heads=width // 8, d_ff=4 * width,
            vocab_size=32, parameterization=parameterization, **base, **kind,
        )  # fmt: skip
        return logit_change(config)

    mup = [at(w, "mup") for w in (32, 128, 512)]
    standard = [at(w, "standard") for w in (32, 128, 512)]
    assert mup[0] == pytest.approx(standard[0], rel=1e-4)  # at the base width they are the same model
    assert mup[2] < mup[1] < mup[0]
    assert mup[1] / mup[2] < 1.4
    assert standard[2] > 1.7 * standard[1]
    assert standard[2] > 2 * standard[0]


@pytest.mark.parametrize("length, num_blocks, prefix", [(150, 2, 0), (40, 1, 0), (131, 2, 90)])
def test_the_few_blocks_of_a_gpu_are_the_whole_square(monkeypatch, length, num_blocks, prefix):
    """In values and gradients, whose logits are computed again; a block's rows may be of another number than 64."""
    monkeypatch.setattr(attention.sharding, "platform", lambda: "gpu")
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    document = np.stack([np.searchsorted(at, np.arange(length), "right") for at in ([30, 31, 80], [7, 75])])

    def of(function):
        def value(q, k, v):
            return jnp.sum(jnp.sin(function(q, k, v, 0.3, document_BT=document, prefix=prefix)))

        return value

    for found, want in zip(*(quick_jit(jax.grad(of(f), argnums=(0, 1, 2)))(q, k, v)
                             for f in (attention.block_causal, attention.einsum))):  # fmt: skip
        assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    traced = str(jax.make_jaxpr(of(attention.block_causal))(q, k, v))
    assert traced.count("remat2[") == num_blocks


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


def test_positions_are_counted_in_documents():
    config = dataclasses.replace(SMALL, positions="learned", num_positions=9)
    window = np.array([[3, 0, 0, 5, 6, 0, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    places = [[0, 0, 0, 1, 2, 0, 1, 2, 3], list(range(9))]
    table = np.arange(9 * 16, dtype=np.float32).reshape(9, 16)

    def placed(mask_documents):
        return np.asarray(
            transformer.placed(config, {"positions": table}, window, jnp.ones((2, 9, 16)), mask_documents)
        )

    assert (placed(mask_documents=True) == 1 + table[np.array(places)]).all()
    assert (placed(mask_documents=False) == 1 + table).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, GPT2, VASWANI], ids=["rotary", "learned", "sinusoidal"])
def test_a_window_of_documents_gives_what_each_gives_in_its_own(kind):
    """Positions too count from each document's start: rotary logits know distances alone."""
    config, execution = dataclasses.replace(VARIANTS["relu2, qk-norm"], **kind), ExecutionConfig()
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
    with pytest.raises(ValueError, match=r"^execution.attention is .cudnn., which has no mask for documents .*: write"):
        models.apply(SMALL, ExecutionConfig(attention="cudnn"), initial(SMALL, 0),
                          tokens(1, 8), mask_documents=True)  # fmt: skip
    assert attention.choose("auto", "gpu", 128, mask_documents=True) is attention.block_causal
    both_ways = attention.choose("auto", "gpu", 128, mask_documents=True, causal=False)
    assert (both_ways.func, both_ways.keywords) == (attention.einsum, {"causal": False})
    assert attention.choose("auto", "gpu", 128).func is attention.fused_or_not


@pytest.mark.slow
@pytest.mark.parametrize(
    "queries, keys, head_dim, causal, kernel",
    [(64, 64, 16, True, True), (64, 64, 12, True, False), (64, 64, 264, True, False),
     (64, 64, 192, True, True), (63, 63, 16, True, False),
     (104, 460, 64, False, True), (104, 461, 64, False, False), (103, 460, 64, False, False)],
)  # fmt: skip
def test_shapes_that_the_fused_kernel_does_not_serve_take_another(monkeypatch, queries, keys, head_dim, causal, kernel):
    """JAX refuses odd lengths and heads of 12 when a step is compiled for a GPU (seen for h100:8)."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, n, heads, head_dim)), jnp.bfloat16)
        for n, heads in ((queries, 4), (keys, 2), (keys, 2))
    )
    asked = []
    monkeypatch.setattr(attention, "_widest_head", lambda: 256)  # of Hopper and later
    monkeypatch.setattr(attention, "cudnn", lambda *a, **kw: asked.append(kw) or a[0])
    got = attention.choose("auto", "gpu", queries, causal=causal, cross=queries != keys)(q, k, v, 0.3)
    assert bool(asked) is kernel
    if not kernel:
        square = attention.einsum(q, k, v, 0.3, causal=causal)
        assert_allclose(np.float32(got), np.float32(square), rtol=0.03, atol=0.03)
    monkeypatch.undo()
    if not kernel:
        with pytest.raises(ValueError, match=r"here \d+ queries, \d+ keys, heads of \d+: write auto, or einsum"):
            attention.cudnn(q, k, v, 0.3)


def test_kernels_without_biases_say_so_and_auto_takes_another():
    config = dataclasses.replace(SMALL, positions="relative")
    for name in ("cudnn", "splash"):
        refusal = f"^execution.attention is '{name}', which takes no biases .*: write auto or einsum"
        with pytest.raises(ValueError, match=refusal):
            models.apply(config, ExecutionConfig(attention=name), initial(config, 0), tokens(1, 128))
    for platform in ("cpu", "gpu", "tpu"):
        assert attention.choose("auto", platform, 128, biased=True) is attention.block_causal
        assert attention.choose("auto", platform, 128, biased=True, causal=False).func is attention.einsum
        assert attention.choose("auto", platform, 128, biased=True, prefix=8).func is attention.block_causal


@pytest.mark.parametrize("prefix", [0, 70])
def test_blocks_with_biases_are_the_square(prefix):
    """Documents too; and the gradient by the biases."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 150, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 150, 2, 8)).astype(np.float32)
    bias = rng.normal(size=(4, 150, 150)).astype(np.float32)
    document = np.cumsum(rng.random((2, 150)) < 0.05, axis=1)

    def both(function):
        def total(q, bias):
            return jnp.sum(jnp.sin(function(q, k, v, 0.3, document, prefix=prefix, bias_HTS=bias)))

        return quick_jit(jax.value_and_grad(total, argnums=(0, 1)))(q, bias)

    ours, square = both(attention.block_causal), both(attention.einsum)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, square)


def test_biases_by_distance_are_refused_under_mup():
    with pytest.raises(ValueError, match="parameterization is 'mup': write standard: how rates of biases by distance"):
        dataclasses.replace(SMALL, positions="relative", parameterization="mup", base_d_model=8, base_head_dim=4)
