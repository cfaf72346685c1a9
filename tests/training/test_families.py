"""What every family must pass, over ``FAMILIES``: a new one adds an entry to ``CONFIGS`` and its own oracle."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from scaling import accounting, families, objectives
from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig, program_key
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.encoder_decoder import EncoderDecoderConfig
from scaling.families.recurrent import RecurrentConfig
from scaling.families.transformer import TransformerConfig
from scaling.objectives.masked import Masked
from scaling.objectives.span_corruption import SpanCorruption
from scaling.training import models, optimizers, programs, sharding
from scaling.training.models import recurrent
from tests.training.lab import QUICK, initial, quick_jit

TRANSFORMER = TransformerConfig(
    d_model=16, num_layers=2, num_heads=4, head_dim=4, num_kv_heads=2, d_ff=24, vocab_size=32
)
GPT2 = dataclasses.replace(
    TRANSFORMER, num_kv_heads=4, norm="layer", positions="learned", num_positions=33, biases=True, tied_embeddings=True
)
VASWANI = dataclasses.replace(
    TRANSFORMER, num_kv_heads=4, norm="layer", norm_position="post", positions="sinusoidal", biases=True,
    activation="relu", scaled_embeddings=True,
)  # fmt: skip
T5 = EncoderDecoderConfig(
    d_model=16, num_layers=2, num_encoder_layers=3, num_heads=4, head_dim=4, num_kv_heads=2, d_ff=24, vocab_size=32
)
T5_APART = dataclasses.replace(
    T5, shared_embeddings=False, norm="layer", biases=True, positions="learned", num_positions=33, qk_norm=True
)
T5_VASWANI = dataclasses.replace(
    T5, num_kv_heads=4, norm="layer", norm_position="post", positions="sinusoidal", biases=True, activation="relu",
    scaled_embeddings=True, tied_embeddings=True,
)  # fmt: skip
GRU = RecurrentConfig(d_model=16, num_layers=2, vocab_size=32)
CONFIGS = {
    "transformer": TRANSFORMER,
    "transformer, swiglu": dataclasses.replace(TRANSFORMER, activation="swiglu"),
    "transformer, relu2, qk-norm": dataclasses.replace(TRANSFORMER, activation="relu2", qk_norm=True),
    "transformer, tied": dataclasses.replace(TRANSFORMER, tied_embeddings=True),
    "transformer, narrow heads": dataclasses.replace(TRANSFORMER, num_heads=2, num_kv_heads=1, head_dim=6),
    "transformer, gpt2": GPT2,
    "transformer, gpt2, rms": dataclasses.replace(GPT2, norm="rms", qk_norm=True),
    "transformer, vaswani": VASWANI,
    "transformer, vaswani, swiglu": dataclasses.replace(VASWANI, activation="swiglu", qk_norm=True),
    "transformer, no positions": dataclasses.replace(TRANSFORMER, positions="none", norm="layer"),
    "encoder_decoder": T5,
    "encoder_decoder, apart": T5_APART,
    "encoder_decoder, vaswani": T5_VASWANI,
    "encoder_decoder, swiglu": dataclasses.replace(T5, activation="swiglu", num_encoder_layers=1),
    "recurrent": GRU,
    "recurrent, tied": dataclasses.replace(GRU, tied_embeddings=True, residual=False),
}
ONE_EACH = [CONFIGS[family] for family in families.FAMILIES]
CAUSAL = {name: c for name, c in CONFIGS.items() if "causal" in families.of(c).sees}
ONE_CAUSAL_EACH = [c for c in ONE_EACH if c in CAUSAL.values()]


def tokens(rows, length, vocab=32, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length), dtype=np.int32)


def test_every_family_is_tried():
    assert {config.family for config in CONFIGS.values()} == set(families.FAMILIES)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_param_counts_are_those_of_the_model(config):
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    specs = models.param_specs(config)
    by_group = dict.fromkeys(families.of(config).counts(config).groups, 0)
    for name, leaf in shapes.items():
        by_group[specs[name].group] += leaf.size
    counts = accounting.param_counts(config)
    assert by_group == {group: counts[group] for group in by_group}
    assert counts["total"] == sum(leaf.size for leaf in shapes.values())
    assert counts["non_embedding"] == counts["total"] - counts["embedding"] - counts["unembedding"]


def test_gpt2_has_the_parameters_of_gpt2():
    config = dataclasses.replace(
        GPT2, d_model=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, d_ff=3072, vocab_size=50_257,
        num_positions=1024,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in shapes.values()) == accounting.param_counts(config)["total"] == 124_439_808
    specs = models.param_specs(config)
    assert sum(leaf.size for name, leaf in shapes.items() if specs[name].matrix is not None) == 84_934_656


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_products_are_the_matrices_that_are_declared(config):
    """Whatever has two sides is a product, and no product is without its matrix; the head may be the table."""
    counts, specs = families.of(config).counts(config), models.param_specs(config)
    declared = sum(np.prod(spec.shape) for spec in specs.values() if spec.matrix is not None)
    assert declared == counts.inner_weights
    assert counts.head_weights == config.d_model * config.vocab_size


SWIGLU_TIED = dataclasses.replace(TRANSFORMER, activation="swiglu", tied_embeddings=True)


@pytest.mark.parametrize(
    "config", [*ONE_CAUSAL_EACH, SWIGLU_TIED, GPT2, pytest.param(VASWANI, marks=pytest.mark.slow)],
    ids=["transformer", "recurrent", "swiglu, tied", "gpt2", "vaswani"],
)  # fmt: skip
def test_exact_flops_are_within_2_percent_of_the_compilers(config, monkeypatch):
    """On a wide and short model, so that what is no product stays small; every loop unrolled, as the compiler counts a
    loop's body once."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    wide = {"d_model": 256, "vocab_size": 512}
    config = dataclasses.replace(config, **wide, **({"head_dim": 64, "d_ff": 768} if "d_ff" in vars(config) else {}))
    rows, length = (2, 32) if config.family == "transformer" else (8, 8)
    params = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    execution = ExecutionConfig(attention="einsum", scan_layers=False)

    def loss(params, batch):
        logits = models.apply(config, execution, params, batch)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    lowered = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((rows, length), jnp.int32))
    counted = lowered.compile(compiler_options=QUICK).cost_analysis()["flops"]
    ours = accounting.flops_per_token(config, length, causal=False)["exact"] * rows * length
    print(f"{config.family}: the compiler counts {counted / ours:.4f} of ours")
    assert counted == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize(
    "config", [c if c in ONE_EACH else pytest.param(c, marks=pytest.mark.slow) for c in CAUSAL.values()], ids=CAUSAL
)
def test_the_future_does_not_reach_the_past(config):
    before = tokens(2, 12)
    after = before.copy()
    after[:, 7] = (after[:, 7] + 1) % 32
    both = np.concatenate([before, after])  # one program: what differs is the tokens alone
    logits = quick_jit(lambda p, t: models.apply(config, ExecutionConfig(), p, t))(initial(config, 0), both)
    change = np.abs(np.subtract(*np.split(np.asarray(logits), 2))).max(axis=(0, 2))
    assert (change[:7] == 0).all()
    assert (change[7:] > 1e-6).all()


@pytest.mark.parametrize(
    "config", [*ONE_CAUSAL_EACH, *(pytest.param(c, marks=pytest.mark.slow) for c in (GPT2, VASWANI))],
    ids=["transformer", "recurrent", "gpt2", "vaswani"],
)  # fmt: skip
def test_a_document_does_not_know_the_one_before_it(config):
    """Id 0 opens a document: with documents masked the logits of the second are those it has alone."""
    window = tokens(1, 16) % 31 + 1
    window[0, 6] = 0
    model = quick_jit(lambda p, t: models.apply(config, ExecutionConfig(), p, t, mask_documents=True))
    params = initial(config, 0)
    other = window.copy()
    other[0, :6] = (other[0, :6] + 5) % 31 + 1
    assert_allclose(model(params, window)[:, 6:], model(params, other)[:, 6:], atol=1e-6)


WIDER = {"d_model": 32, "num_heads": 8, "num_kv_heads": 8, "d_ff": 64, "vocab_size": 64}
RUNS = {
    name: RunConfig(
        dataclasses.replace(config, **sizes),
        OptimConfig(0.01, 0),
        Horizon(steps=8),
        batch_size=16,
        data=DataConfig(seq_len=32),
    )
    for name, config, sizes in (
        ("transformer", TRANSFORMER, WIDER),
        ("gpt2, dropout", GPT2, {**WIDER, "dropout": 0.1}),
        ("vaswani, dropout", VASWANI, {**WIDER, "dropout": 0.1}),
        ("recurrent", GRU, {"d_model": 32, "vocab_size": 64}),
    )
}
SPANS = {"objective": SpanCorruption(), "data": DataConfig(seq_len=32)}
RUNS |= {
    "encoder_decoder, dropout": dataclasses.replace(
        RUNS["recurrent"], model=dataclasses.replace(T5_APART, **WIDER, dropout=0.1), **SPANS
    ),
    "prefix": dataclasses.replace(RUNS["transformer"], **SPANS),
}
MESHES = [
    MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=1, tensor=8), MeshConfig(data=2, fsdp=4),
    MeshConfig(data=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2),
]  # fmt: skip
WAYS = {
    "scanned, recomputed": ExecutionConfig(scan_layers=True, remat="full"),
    "2 parts": ExecutionConfig(accumulation_steps=2),
}


def losses(run, execution, devices, seeds=(0,), steps=8):
    """Training losses (steps, K) of a pack of ``seeds`` on the same tokens."""
    mesh = sharding.make_mesh(execution.mesh, devices)
    rng = np.random.default_rng(0)
    objective = objectives.of(run.objective)
    windows = rng.integers(0, 3, (steps, 1, 16, 33)).cumsum(-1).astype(np.int32) % 60
    with jax.set_mesh(mesh):
        lowered = programs.lower(program_key(run), execution, len(seeds), mesh)
        init, train = (p.compile(compiler_options=QUICK) for p in (lowered.init, lowered.train))
        hparams = optimizers.hyperparams(run.optim, accounting.plan(run))
        state = init(np.array(seeds, np.int32), {k: np.stack([v] * len(seeds)) for k, v in hparams.items()})
        seen = []
        for x in windows:
            made = objective.batch(run.objective, 64, x[0], np.arange(16, dtype=np.uint64))
            batch = {
                name: sharding.host_array(mesh, P("run", ("data", "fsdp")), a.shape, a.__getitem__)
                for name, a in ((name, np.repeat(a[None], len(seeds), axis=0)) for name, a in made.items())
            }
            state, metrics = train(state, batch)
            seen.append(np.asarray(metrics["loss"]))
    return np.array(seen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in RUNS if name != "transformer"])  # whose own table is in test_meshes
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_losses_do_not_depend_on_the_mesh(kind, mesh):
    run = RUNS[kind]
    one = losses(run, ExecutionConfig(), jax.devices()[:1])
    assert one[-1] < one[0] - 0.2  # it learns
    assert np.abs(losses(run, ExecutionConfig(mesh=mesh), jax.devices()) - one).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in RUNS if name != "transformer"])
@pytest.mark.parametrize("way", WAYS)
def test_execution_changes_rounding_only(kind, way):
    one = losses(RUNS[kind], ExecutionConfig(), jax.devices()[:1])
    assert np.abs(losses(RUNS[kind], WAYS[way], jax.devices()[:1]) - one).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in RUNS if name != "transformer"])
def test_members_of_a_pack_are_their_lone_runs(kind):
    one = jax.devices()[:1]
    packed = losses(RUNS[kind], ExecutionConfig(), one, seeds=(0, 1, 2))
    for k, seed in enumerate((0, 1, 2)):
        assert_allclose(packed[:, k], losses(RUNS[kind], ExecutionConfig(), one, seeds=(seed,))[:, 0], rtol=1e-5)


# ---- recurrent ------------------------------------------------------------------------------------------------------


def as_flax(p):
    """A layer's weights under the names of ``flax.linen.GRUCell``."""
    inputs = {f"i{g}": {"kernel": p["w_x"][:, i], "bias": p["bias"][i]} for i, g in enumerate("rzn")}
    state = {f"h{g}": {"kernel": p["w_h"][:, i]} for i, g in enumerate("rzn")}
    return {"params": {"cell": inputs | state | {"hn": {**state["hn"], "bias": p["bias_h"]}}}}


def test_a_gru_and_its_gradient_are_flaxs():
    """Another cell, another loop: one product a gate and a time step, under ``nn.RNN``."""
    params = initial(GRU, 0)
    rng = np.random.default_rng(1)
    layer = {n: params[n][0] + 0.1 * rng.normal(size=params[n].shape[1:]).astype(np.float32)
             for n in ("w_x", "w_h", "bias", "bias_h")}  # fmt: skip
    x = rng.normal(size=(3, 17, 16)).astype(np.float32)

    def of_flax(p, x):
        return nn.RNN(nn.GRUCell(16)).apply(as_flax(p), x)

    def value_and_grads(function):
        both = quick_jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(function(p, x))), argnums=(0, 1)))
        return both(layer, x)

    ours, theirs = value_and_grads(recurrent.gru), value_and_grads(of_flax)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, theirs)


def test_counts_of_a_gru_by_hand():
    """Each layer: three gates, (16, 16) with the input and with the state, 3 + 1 biases of 16; a norm of 16."""
    counts = accounting.param_counts(GRU)
    assert counts["recurrent"] == 2 * (6 * 256 + 4 * 16)
    assert counts["norm"] == 3 * 16
    flops = accounting.flops_per_token(GRU, 128)
    assert flops["kaplan"] == 6 * 2 * 6 * 256  # no token meets another by a product: the context costs nothing
    assert flops["exact"] == 6 * (2 * 6 * 256 + 16 * 32)
    assert flops["chinchilla"] == flops["exact"] + 6 * 16 * 32


def test_what_a_recurrent_model_cannot_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="parameterization is 'mup': write standard: how rates transfer"):
        dataclasses.replace(GRU, parameterization="mup", base_d_model=8)
    with pytest.raises(ValueError, match=r"'masked': write next_token: a recurrent model reads one way"):
        dataclasses.replace(RUNS["recurrent"], objective=Masked())
