"""Encoder-decoders, prefix LMs and span corruption, against oracles that share none of their code."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from scaling import accounting, families, objectives
from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.counting import RULES, Lengths
from scaling.families.transformer import TransformerConfig
from scaling.objectives import span_corruption
from scaling.objectives.span_corruption import SpanCorruption
from scaling.training import losses, models
from scaling.training.evaluation import keys_of
from scaling.training.models import attention
from tests.training.lab import QUICK, cell, essence, initial, make_corpus, quick_jit, train, train_and_stop_at
from tests.training.test_families import T5, T5_1_1, T5_APART, T5_RAFFEL, T5_VASWANI, tokens
from tests.training.test_model import row_of

V = 300


# ---- span corruption ------------------------------------------------------------------------------------------------


def windows(rows, T, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, T + 1), dtype=np.int32)


def restored(read, written):
    """The text, by putting each span where its sentinel stands; ids from 256 on are sentinels."""
    spans, current = {}, None
    for token in written.tolist():
        if token >= 256:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    return [t for token in read.tolist() for t in (spans[token] if token >= 256 else [token])], spans


@settings(max_examples=60, deadline=None)
@given(T=st.integers(8, 90), rate=st.floats(0.05, 0.5), mean_span=st.floats(1, 7), seed=st.integers(0, 2**20))
def test_what_is_read_and_written_is_the_window(T, rate, mean_span, seed):
    config = SpanCorruption(rate=rate, mean_span=mean_span)
    num_noise = min(max(round(T * rate), 1), T - 1)
    num_spans = max(round(num_noise / mean_span), 1)
    assume(num_spans <= T - num_noise)  # else it is refused: so little text cannot part them
    lengths = span_corruption.lengths(config, T)
    x = windows(4, T, seed)
    batch = span_corruption.batch(config, V, x, keys_of(seed, np.arange(4, dtype=np.uint64)))
    assert {n: (a.shape[1], a.dtype.name) for n, a in batch.items()} == span_corruption.batch_spec(config, T)
    assert (lengths.read, lengths.written, lengths.text) == (T - num_noise + num_spans, num_noise + num_spans + 1, T)
    assert span_corruption.extra_ids(config, T) == num_spans + 1
    assert (batch["weights"] == 1).all()
    assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert (batch["inputs"][:, 0] == 0).all()
    for r in range(4):
        text, spans = restored(batch["read"][r], batch["targets"][r])
        assert text == x[r, 1:].tolist()
        assert list(spans) == [V - 1 - i for i in range(num_spans + 1)]
        sizes = [len(s) for s in spans.values()]
        assert sizes[-1] == 0
        assert min(sizes[:-1]) >= 1
        assert sum(sizes) == num_noise
        sentinels = np.flatnonzero(batch["read"][r] >= 256)
        assert sentinels[0] > 0
        assert (np.diff(sentinels) > 1).all()


def test_every_cut_into_spans_is_as_likely_as_another():
    """T5's segments: 9 noise tokens in 3 spans are cut in C(8, 2) = 28 ways."""
    config, T, rows = SpanCorruption(), 60, 14_000
    batch = span_corruption.batch(config, V, windows(rows, T), keys_of(5, np.arange(rows, dtype=np.uint64)))
    places = np.nonzero(batch["targets"] >= 256)[1].reshape(rows, 4)
    sizes = np.diff(places, axis=1) - 1
    _, counts = np.unique(sizes, axis=0, return_counts=True)
    assert len(counts) == 28
    chi2 = ((counts - rows / 28) ** 2 / (rows / 28)).sum()
    assert chi2 < 27 + 5 * (2 * 27) ** 0.5
    before = np.nonzero(batch["read"] >= 256)[1].reshape(rows, 3)[:, 0]  # text before the first span: of 51 in 3 parts
    assert before.mean() == pytest.approx(51 / 3, abs=5 * before.std() / rows**0.5)


def test_a_shorter_window_is_corrupted_by_its_own_length():
    config, T = SpanCorruption(), 60
    num = np.array([60, 31, 2, 1, 0])
    present = (np.arange(T) < num[:, None]).astype(np.float32)
    x = windows(5, T) | 1  # none is the separator
    batch = span_corruption.batch(config, V, x, keys_of(0, np.arange(5, dtype=np.uint64)), present)
    for r, n in enumerate(num):
        noise, spans = span_corruption.noise_and_spans(config, int(n))
        W = noise + spans + (n >= 2)
        assert batch["weights"][r].sum() == W == span_corruption.predicted(config, num.astype(np.float32))[r]
        text, _ = restored(batch["read"][r][: n - noise + spans], batch["targets"][r][:W])
        assert text == x[r, 1 : 1 + n].tolist()
        assert (batch["read"][r][n - noise + spans :] == 0).all()
        assert (batch["targets"][r][W:] == 0).all()


# ---- attention with a prefix, and across ----------------------------------------------------------------------------


@pytest.mark.parametrize("length, prefix", [(20, 7), (150, 100), (150, 30), (64, 64)])
@pytest.mark.parametrize("name", ["einsum", "block_causal"])
def test_a_prefix_is_seen_by_all(name, length, prefix):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, length, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, 2, 8)).astype(np.float32)
    out = quick_jit(functools.partial(attention.IMPLEMENTATIONS[name], scale=0.3, prefix=prefix))(q, k, v)
    expected = np.zeros(q.shape)
    for b, t, h in np.ndindex(2, length, 4):
        seen = max(t + 1, prefix)
        logits = 0.3 * k[b, :seen, h // 2].astype(float) @ q[b, t, h]
        weights = np.exp(logits - logits.max())
        expected[b, t, h] = weights / weights.sum() @ v[b, :seen, h // 2]
    assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_without_a_mask_for_a_prefix_says_so_and_auto_takes_another():
    for name in ("cudnn", "splash"):
        with pytest.raises(ValueError, match=f"execution.attention is '{name}'.*: write auto, block_causal or einsum"):
            attention.choose(name, "gpu", 128, prefix=64)
    for platform in ("cpu", "gpu", "tpu"):
        assert attention.choose("auto", platform, 128, prefix=64).func is attention.block_causal
    assert attention.choose("auto", "tpu", 128, causal=False, cross=True).func is attention.einsum


def test_a_prefix_lm_knows_all_that_is_read_and_nothing_to_come():
    config = TransformerConfig(
        d_model=16, num_layers=2, num_heads=4, head_dim=4, num_kv_heads=2, d_ff=24, vocab_size=32
    )
    knows_the_past_and_all_that_is_read(config)


@pytest.mark.slow
@pytest.mark.parametrize("config", [T5, T5_VASWANI], ids=["t5", "vaswani"])
def test_an_encoder_decoder_knows_all_that_is_read_and_nothing_to_come(config):
    knows_the_past_and_all_that_is_read(config)


def knows_the_past_and_all_that_is_read(config):
    read, written = tokens(1, 9), tokens(1, 7, seed=1)
    other_read, other_written = read.copy(), written.copy()
    other_read[0, 8], other_written[0, 4] = (read[0, 8] + 1) % 32, (written[0, 4] + 1) % 32
    reads, writes = np.concatenate([read, other_read, read]), np.concatenate([written, written, other_written])
    apply = quick_jit(lambda p, r, w: models.apply(config, ExecutionConfig(), p, w, read_BR=r))
    logits = np.asarray(apply(initial(config, 0), reads, writes))
    by_read, by_written = (np.abs(logits[i] - logits[0]).max(axis=-1) for i in (1, 2))
    assert (by_read > 1e-6).all()
    assert (by_written[:4] == 0).all()
    assert (by_written[4:] > 1e-6).all()


# ---- the textbook ---------------------------------------------------------------------------------------------------


class Textbook(nn.Module):
    """Encoder and decoder of Flax's own layers and attention."""

    config: families.ModelConfig

    @nn.compact
    def __call__(self, read_BR, tokens_BT):
        c = self.config

        def norm(name, x):
            layer = nn.RMSNorm if c.norm == "rms" else functools.partial(nn.LayerNorm, use_bias=c.biases)
            return layer(epsilon=c.norm_eps, name=name)(x)

        def attend(name, h, other, mask=None, bias=None):
            return nn.MultiHeadDotProductAttention(
                c.num_heads, qkv_features=c.num_heads * c.head_dim, use_bias=c.biases, name=name,
                attention_fn=functools.partial(nn.dot_product_attention, bias=bias),
            )(h, other, mask=mask)  # fmt: skip

        def mlp(name, h):
            act = {"gelu": nn.gelu, "relu": nn.relu, "geglu": lambda x: x}[c.activation]
            up = act(nn.Dense(c.d_ff, use_bias=c.biases, name=f"{name}in")(h))
            if c.activation == "geglu":
                up = nn.gelu(nn.Dense(c.d_ff, use_bias=c.biases, name=f"{name}gate")(h)) * up
            return nn.Dense(c.d_model, use_bias=c.biases, name=f"{name}out")(up)

        def add(name, x, f):
            return x + f(norm(name, x)) if c.norm_position == "pre" else norm(name, x + f(x))

        def stack(prefix, embed, num_layers, x_tokens, mask=None, read=None):
            x = embed(x_tokens) * (np.sqrt(c.d_model) if c.scaled_embeddings else 1)
            T = x.shape[1]
            if c.positions == "learned":
                shape = (c.num_positions, c.d_model)
                x = x + self.param(f"{prefix}positions", nn.initializers.zeros, shape)[None, :T]
            elif c.positions == "sinusoidal":
                t, j = np.arange(T)[:, None], np.arange(c.d_model)[None, :]
                angle = t / 10_000 ** (2 * (j // 2) / c.d_model)
                x = x + np.where(j % 2 == 0, np.sin(angle), np.cos(angle))[None]
            bias = None
            if c.positions == "relative":
                rows = [[row_of(s - t, both_ways=read is None) for s in range(T)] for t in range(T)]
                bias = nn.Embed(32, c.num_heads, name=f"{prefix}distances")(np.array(rows)).transpose(2, 0, 1)[None]
            for i in range(num_layers):
                x = add(f"{prefix}attn_norm{i}", x, lambda h, i=i: attend(f"{prefix}attn{i}", h, h, mask, bias))
                if read is not None:
                    x = add(f"cross_norm{i}", x, lambda h, i=i: attend(f"cross{i}", h, read))
                x = add(f"{prefix}mlp_norm{i}", x, lambda h, i=i: mlp(f"{prefix}{i}", h))
            return norm(f"{prefix}final_norm", x) if c.norm_position == "pre" else x

        embed = nn.Embed(c.vocab_size, c.d_model, name="embedding")
        other = embed if c.shared_embeddings else nn.Embed(c.vocab_size, c.d_model, name="encoder_embedding")
        read = stack("encoder_", other, c.num_encoder_layers, read_BR)
        h = stack("", embed, c.num_layers, tokens_BT, nn.make_causal_mask(tokens_BT), read)
        return embed.attend(h) if c.tied_embeddings else nn.Dense(c.vocab_size, use_bias=False, name="head")(h)


def as_textbook(c, p):
    """Our parameters under Flax's names, in Flax's shapes."""
    out = {"embedding": {"embedding": p["embedding"]}}
    if "encoder_embedding" in p:
        out["encoder_embedding"] = {"embedding": p["encoder_embedding"]}
    if "unembedding" in p:
        out["head"] = {"kernel": p["unembedding"]}
    out |= {name: p[name] for name in ("positions", "encoder_positions") if name in p}
    out |= {name: {"embedding": p[name]} for name in ("distances", "encoder_distances") if name in p}

    def norm(name, of):
        return {"scale": of(name)} | ({"bias": of(f"{name}_bias")} if f"{name}_bias" in p else {})

    def linear(name, i, shape=None, bias_shape=None):
        w = p[name][i]
        found = {"kernel": w if shape is None else w.reshape(shape)}
        bias = name.replace("w_", "b_")
        if bias in p:
            found["bias"] = p[bias][i] if bias_shape is None else p[bias][i].reshape(bias_shape)
        return found

    heads = (c.num_heads, c.head_dim)
    for prefix, L in (("encoder_", c.num_encoder_layers), ("", c.num_layers), ("cross_", c.num_layers)):
        for i in range(L):
            names = {"query": "q", "key": "k", "value": "v"}
            own = {n: linear(f"{prefix}w_{w}", i, (c.d_model, *heads), heads) for n, w in names.items()}
            own["out"] = linear(f"{prefix}w_o", i, (*heads, c.d_model))
            out[f"cross{i}" if prefix == "cross_" else f"{prefix}attn{i}"] = own
            for name in ("cross_norm",) if prefix == "cross_" else (f"{prefix}attn_norm", f"{prefix}mlp_norm"):
                out[f"{name}{i}"] = norm(name, lambda n, i=i: p[n][i])
            if prefix != "cross_":
                for way in ("in", "out", "gate")[: 2 + ("w_gate" in p)]:
                    out[f"{prefix}{i}{way}"] = linear(f"{prefix}w_{way}", i)
        if f"{prefix}final_norm" in p:
            out[f"{prefix}final_norm"] = norm(f"{prefix}final_norm", p.get)
    return {"params": out}


TEXTBOOKS = {
    "t5": dataclasses.replace(T5, positions="none", activation="relu", num_kv_heads=4, tied_embeddings=True),
    "apart": dataclasses.replace(T5_APART, num_kv_heads=4, qk_norm=False),
    "vaswani": T5_VASWANI,
    "t5, relative": dataclasses.replace(T5_RAFFEL, num_kv_heads=4),
    "t5 1.1": dataclasses.replace(T5_1_1, num_kv_heads=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", TEXTBOOKS.values(), ids=TEXTBOOKS)
def test_an_encoder_decoder_and_its_gradient_are_flaxs(config):
    config = dataclasses.replace(config, num_layers=1, num_encoder_layers=2)
    rng = np.random.default_rng(3)
    params = {n: np.asarray(w) + 0.1 * rng.normal(size=w.shape).astype(np.float32)
              for n, w in initial(config, 0).items()}  # fmt: skip
    read, written = tokens(2, 11), tokens(2, 6, seed=1)

    def ours(p):
        return models.apply(config, ExecutionConfig(), p, written, read_BR=read)

    def theirs(p):
        return Textbook(config).apply(as_textbook(config, p), read, written)

    def of(function):
        return quick_jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(function(p)))))(params)

    (value, grads), (expected, expected_grads) = of(ours), of(theirs)
    assert value == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
    for name, grad in grads.items():
        size = max(float(np.abs(expected_grads[name]).max()), 1.0)
        assert_allclose(grad, expected_grads[name], rtol=1e-3, atol=5e-5 * size, err_msg=name)


# ---- what it costs --------------------------------------------------------------------------------------------------

DECODER = TransformerConfig(d_model=16, num_layers=2, num_heads=4, head_dim=4, num_kv_heads=2, d_ff=24, vocab_size=32)


@pytest.mark.slow
@pytest.mark.parametrize("config", [T5, DECODER], ids=["encoder_decoder", "prefix"])
def test_exact_flops_are_within_2_percent_of_the_compilers(config, monkeypatch):
    """Of the step's own loss, masked pairs counted as the square that ``einsum`` computes; every loop unrolled."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    config = dataclasses.replace(config, d_model=256, vocab_size=512, head_dim=64, d_ff=768)
    T, rows = 96, 2
    run = span_run(config, T, rows)
    spec = span_corruption.batch_spec(run.objective, T)
    execution = ExecutionConfig(attention="einsum", scan_layers=False)
    params = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))

    def loss(params, batch):
        found = losses.of_batch(run, execution, params, batch)
        return jnp.mean(found.loss_BT * found.weights_BT)

    batch = {name: jax.ShapeDtypeStruct((rows, columns), dtype) for name, (columns, dtype) in spec.items()}
    counted = jax.jit(jax.grad(loss)).lower(params, batch).compile(compiler_options=QUICK).cost_analysis()["flops"]
    counts, lengths = accounting.trained(config, run.objective), span_corruption.lengths(run.objective, T)
    unmasked = [m if m.kind == "cross" else dataclasses.replace(m, kind="full") for m in counts.mixing]
    ours = RULES["exact"](dataclasses.replace(counts, mixing=tuple(unmasked)), lengths) * rows * T
    print(f"{config.family}: the compiler counts {counted / ours:.4f} of ours")
    assert counted == pytest.approx(ours, rel=0.02)


def span_run(config, T, rows=8, steps=8):
    return RunConfig(
        config, OptimConfig(0.01, 0), Horizon(steps=steps), rows, DataConfig(seq_len=T), objective=SpanCorruption()
    )  # fmt: skip


def test_flops_by_hand():
    """A window of 20 tokens: 3 of noise in 1 span, 18 are read, 5 written."""
    run = span_run(T5, 20)
    assert span_corruption.lengths(run.objective, 20) == Lengths(18, 5, 5, 20)
    layer = 2 * 16 * (16 + 8) + 2 * 16 * 24
    met = 3 * layer * 18 + 2 * layer * 5 + 2 * (2 * 16 * 16 * 5 + 2 * 16 * 8 * 18)
    pairs = 3 * 18 * 18 + 2 * (5 * 5 / 2) + 2 * 5 * 18
    exact = accounting.flops_of(run)["exact"]
    assert exact == pytest.approx((6 * met + 12 * 16 * pairs + 6 * 16 * 32 * 5) / 20, rel=1e-12)
    whole = 3 * 18 * 18 + 2 * 5 * 5 + 2 * 5 * 18
    flops = accounting.flops_of(run)
    assert flops["kaplan"] == pytest.approx((6 * met + 6 * 16 * whole) / 20, rel=1e-12)
    both = 6 * 16 * 32 * (18 + 5 + 5)
    assert flops["chinchilla"] == pytest.approx((6 * met + 3 * (4 * 16 + 3 * 4) * whole + both) / 20, rel=1e-12)
    assert flops["6ND"] == 6 * accounting.param_counts(T5)["non_embedding"]
    prefix = accounting.flops_of(span_run(DECODER, 20))["exact"]
    seen = sum(18 if t < 18 else t + 0.5 for t in range(23))
    assert prefix == pytest.approx((6 * 2 * layer * 23 + 12 * 2 * 16 * seen + 6 * 16 * 32 * 5) / 20, rel=1e-12)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("cache"))


def span_cell(data_config, family, steps=24):
    one = cell(data_config, steps=steps)
    model = one.run.model
    if family == "encoder_decoder":
        fields = {k: v for k, v in dataclasses.asdict(model).items() if k != "family"}
        model = type(T5)(**fields, num_encoder_layers=1)
    run = dataclasses.replace(
        one.run, model=dataclasses.replace(model, vocab_size=264), objective=SpanCorruption()
    )  # fmt: skip
    return dataclasses.replace(one, run=run)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["encoder_decoder", "transformer"])
def test_a_run_learns_and_goes_on_where_it_was_stopped(corpus, tmp_path, family):
    one = span_cell(corpus[0], family, steps=40)
    execution = ExecutionConfig(mesh=MeshConfig(data=1, fsdp=8), checkpoint_seconds=1e9, eval_batch_size=8)
    (whole,) = train([one], corpus, tmp_path / "a", execution)
    assert whole.status == "completed"
    assert whole.loss < np.log(256) - 1
    assert whole.bits_per_byte is None
    assert whole.loss_by_position is None
    lengths = span_corruption.lengths(one.run.objective, 16)
    assert whole.num_tokens == 40 * 8 * 16
    assert whole.num_predicted_tokens == 40 * 8 * lengths.predicted
    counts = np.full(whole.data["validation_tokens"] // 16, 16)
    assert whole.num_eval_tokens >= span_corruption.predicted(one.run.objective, counts).sum()
    assert train_and_stop_at(20, [one], corpus, tmp_path / "b", execution) is None
    (resumed,) = train([one], corpus, tmp_path / "b", execution)
    assert essence(resumed) == essence(whole)


def test_what_does_not_go_together_is_refused_with_what_to_write():
    run = span_run(T5, 32)
    with pytest.raises(ValueError, match="'next_token': write span_corruption: of family encoder_decoder are models"):
        dataclasses.replace(run, objective=objectives.NEXT_TOKEN)
    with pytest.raises(ValueError, match=r"objective.mean_span is 40: write less than data.seq_len, which is 32"):
        dataclasses.replace(run, objective=SpanCorruption(mean_span=40))
    with pytest.raises(ValueError, match=r"objective.rate is 0.9: write a smaller one, or a longer mean_span"):
        dataclasses.replace(run, objective=SpanCorruption(rate=0.9, mean_span=1))
    with pytest.raises(ValueError, match="mask_documents is True: write false"):
        dataclasses.replace(run, data=DataConfig(seq_len=32, mask_documents=True))
    with pytest.raises(ValueError, match="parameterization is 'mup': write standard"):
        dataclasses.replace(T5, parameterization="mup", base_d_model=8, base_head_dim=4)
    short = dataclasses.replace(DECODER, positions="learned", num_positions=32)
    with pytest.raises(ValueError, match="num_positions is 32: write 37 or more"):  # 29 that are read, 8 written
        span_run(short, 32)
    span_run(dataclasses.replace(T5_APART, num_positions=29), 32)
