"""What every family must pass, over ``FAMILIES``: a new one adds an entry to ``CONFIGS`` and its own oracle."""

import dataclasses
import functools
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from scaling import accounting, families, objectives
from scaling.bench.families import FLAX_CELLS, as_flax
from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig, program_key
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.encoder_decoder import EncoderDecoderConfig
from scaling.families.experts import ExpertsConfig
from scaling.families.recurrent import RecurrentConfig
from scaling.families.transformer import TransformerConfig
from scaling.objectives import NEXT_TOKEN
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
EXPERTS = dataclasses.replace(TRANSFORMER, mlp=ExpertsConfig(experts=8, active=2, shared=1, granularity=2))
FULL = dataclasses.replace(  # an expert has room for an even share
    EXPERTS, mlp=ExpertsConfig(experts=8, active=2, routing="capacity", capacity_factor=1.0)
)
DISTANCES = dataclasses.replace(TRANSFORMER, positions="relative", activation="geglu")
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
T5_RAFFEL = dataclasses.replace(
    T5, positions="relative", activation="relu", scaled_embeddings=True, tied_embeddings=True
)
T5_1_1 = dataclasses.replace(T5, positions="relative", activation="geglu")
GRU = RecurrentConfig(d_model=16, num_layers=2, vocab_size=32)
LSTM, RNN = (dataclasses.replace(GRU, cell=cell) for cell in ("lstm", "rnn"))
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
    "transformer, relative, geglu": DISTANCES,
    "transformer, experts": EXPERTS,
    "transformer, experts, swiglu, biases": dataclasses.replace(EXPERTS, activation="swiglu", biases=True, dropout=0.1),
    "transformer, experts, capacity": FULL,
    "encoder_decoder": T5,
    "encoder_decoder, apart": T5_APART,
    "encoder_decoder, vaswani": T5_VASWANI,
    "encoder_decoder, t5": T5_RAFFEL,
    "encoder_decoder, t5 1.1": T5_1_1,
    "encoder_decoder, swiglu": dataclasses.replace(T5, activation="swiglu", num_encoder_layers=1),
    "recurrent": GRU,
    "recurrent, lstm": LSTM,
    "recurrent, rnn": RNN,
    "recurrent, tied": dataclasses.replace(GRU, tied_embeddings=True, residual=False),
}
ONE_EACH = [CONFIGS[family] for family in families.FAMILIES]
CELLS = {config.cell: config for config in (GRU, LSTM, RNN)}
KINDS = {
    name: CONFIGS[name]
    for name in (
        *(family for family in families.FAMILIES if "causal" in families.FAMILIES[family].sees),
        "transformer, gpt2", "transformer, vaswani", "transformer, relative, geglu", "transformer, experts",
        "transformer, experts, capacity",
        "recurrent, lstm", "recurrent, rnn",
    )
}  # fmt: skip
# Kinds that stand for others where a test has many cases, and those that the fast set leaves to the slow one.
IN_FULL = ("transformer, gpt2", "transformer, experts", "recurrent, lstm", "encoder_decoder, dropout",
           "encoder_decoder, t5 1.1")  # fmt: skip
SLOW = ("transformer, vaswani", "transformer, relative, geglu", "transformer, experts",
        "transformer, experts, capacity", "recurrent, rnn")  # fmt: skip
EACH_KIND = [
    pytest.param(config, id=kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind, config in KINDS.items()
]
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


@pytest.mark.parametrize(
    "changed, total",
    [({}, 222_903_552), ({"activation": "geglu", "d_ff": 2048, "tied_embeddings": False}, 247_577_856)],
    ids=["T5", "T5 1.1"],
)
def test_t5_has_the_parameters_of_t5(changed, total):
    """Its base size: 12 + 12 layers, a table of 32 rows for 12 heads in each stack."""
    sizes = {"d_model": 768, "num_layers": 12, "num_encoder_layers": 12, "num_heads": 12, "num_kv_heads": 12,
             "head_dim": 64, "d_ff": 3072, "vocab_size": 32_128}  # fmt: skip
    config = dataclasses.replace(T5_RAFFEL, **sizes | changed)
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in shapes.values()) == accounting.param_counts(config)["total"] == total
    assert shapes["distances"].shape == shapes["encoder_distances"].shape == (32, 12)


def test_gpt2_has_the_parameters_of_gpt2():
    config = dataclasses.replace(
        GPT2, d_model=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, d_ff=3072, vocab_size=50_257,
        num_positions=1024,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in shapes.values()) == accounting.param_counts(config)["total"] == 124_439_808
    specs = models.param_specs(config)
    assert sum(leaf.size for name, leaf in shapes.items() if specs[name].matrix is not None) == 84_934_656


@pytest.mark.parametrize("name", accounting.OPTIMIZER_SLOTS)
def test_a_plan_counts_what_an_optimiser_keeps(name):
    for config in CONFIGS.values():
        specs, decay = models.param_specs(config), 0.0 if name == "adam" else 0.1
        objective = NEXT_TOKEN if "causal" in families.of(config).sees else SpanCorruption()
        optim = OptimConfig(0.01, 0, name=name, weight_decay=decay)
        data = DataConfig(seq_len=32)
        run = RunConfig(config, optim, Horizon(steps=10), batch_size=4, data=data, objective=objective)
        plan = accounting.plan(run)
        hp = optimizers.hyperparams(optim, plan)
        params = jax.eval_shape(lambda config=config: models.init(config, jax.random.key(0)))
        kept = params, jax.eval_shape(optimizers.transform(optim, hp, specs).init, params)
        counted = sum(4 * leaf.size for leaf in jax.tree.leaves(kept) if leaf.ndim)
        assert counted - 16 <= plan.state_bytes <= counted, config  # Muon's three coefficients lie in its state too


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_products_are_the_matrices_that_are_declared(config):
    """Whatever has two sides is a product, and no product is without its matrix; the head may be the table."""
    counts, specs = families.of(config).counts(config), models.param_specs(config)
    declared = sum(np.prod(spec.shape) for spec in specs.values() if spec.matrix is not None)
    hidden = [p for p in counts.products if p.is_hidden and p.group != "unembedding"]
    assert declared == sum(p.weights for p in hidden)
    if counts.inactive == 0:
        assert declared == counts.inner_weights
    assert counts.head_weights == config.d_model * config.vocab_size


SWIGLU_TIED = dataclasses.replace(TRANSFORMER, activation="swiglu", tied_embeddings=True)


@pytest.mark.parametrize(
    "config",
    [
        # The compiler does not count blocks of experts; with a capacity of an even share each slot is a row at work.
        *(kind for kind in EACH_KIND if kind.id != "transformer, experts"),
        pytest.param(SWIGLU_TIED, id="swiglu, tied"),
    ],
)
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
    print(f"{getattr(config, 'cell', config.family)}: the compiler counts {counted / ours:.4f} of ours")
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


@pytest.mark.slow
@pytest.mark.parametrize("config", [kind for kind in EACH_KIND if kind.values[0].mixes_documents is None])
def test_a_document_does_not_know_the_one_before_it(config):
    """Id 0 opens a document: with documents masked the logits of the second are those it has alone."""
    window = tokens(1, 16) % 31 + 1
    window[0, 6] = 0
    model = quick_jit(lambda p, t: models.apply(config, ExecutionConfig(), p, t, mask_documents=True))
    params = initial(config, 0)
    other = window.copy()
    other[0, :6] = (other[0, :6] + 5) % 31 + 1
    assert_allclose(model(params, window)[:, 6:], model(params, other)[:, 6:], atol=1e-6)


SMALL = {
    "transformer": {"d_model": 32, "num_heads": 8, "num_kv_heads": 8, "d_ff": 64, "vocab_size": 64},
    "recurrent": {"d_model": 32, "vocab_size": 64},
}
DROPOUT = {kind: {"dropout": 0.1} for kind in ("transformer, gpt2", "transformer, vaswani")}
RUNS = {
    kind: RunConfig(
        dataclasses.replace(config, **SMALL[config.family], **DROPOUT.get(kind, {})),
        OptimConfig(0.01, 0),
        Horizon(steps=8),
        batch_size=16,
        data=DataConfig(seq_len=32, mask_documents=kind == "recurrent, lstm"),
    )
    for kind, config in KINDS.items()
}
SPANS = {"objective": SpanCorruption(), "data": DataConfig(seq_len=32)}
RUNS |= {
    "encoder_decoder, dropout": dataclasses.replace(
        RUNS["recurrent"], model=dataclasses.replace(T5_APART, **SMALL["transformer"], dropout=0.1), **SPANS
    ),
    "encoder_decoder, t5 1.1": dataclasses.replace(
        RUNS["recurrent"], model=dataclasses.replace(T5_1_1, **SMALL["transformer"]), **SPANS
    ),
    "prefix": dataclasses.replace(RUNS["transformer"], **SPANS),
    "prefix, relative": dataclasses.replace(RUNS["transformer, relative, geglu"], **SPANS),
}
MESHES = [
    MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=1, tensor=8), MeshConfig(data=2, fsdp=4),
    MeshConfig(data=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2),
]  # fmt: skip
EVERY_AXIS = MeshConfig(data=2, fsdp=2, tensor=2)
# One of each family on every mesh (the Transformer's table is in test_meshes), the others on one that has all axes.
IN_TABLE = ("transformer, experts", "recurrent, lstm", "encoder_decoder, t5 1.1")
ON_MESHES = [(kind, mesh) for kind in IN_TABLE for mesh in MESHES]
ON_MESHES += [(kind, EVERY_AXIS) for kind in RUNS if kind not in ("transformer", *IN_TABLE)]
WAYS = {
    "scanned, recomputed": ExecutionConfig(scan_layers=True, remat="full"),
    "all but products recomputed": ExecutionConfig(remat="dots"),
    "2 parts": ExecutionConfig(accumulation_steps=2),
}


@functools.lru_cache(maxsize=8)
def compiled(run, execution, num_devices, num_members):
    """(mesh, initialisation, train step), once for tests that follow each other."""
    mesh = sharding.make_mesh(execution.mesh, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        lowered = programs.lower(program_key(run), execution, num_members, mesh)
        return mesh, *(p.compile(compiler_options=QUICK) for p in (lowered.init, lowered.train))


@functools.lru_cache(maxsize=64)
def losses(run, execution, num_devices, seeds=(0,), steps=8):
    """Training losses (steps, K) of a pack of ``seeds`` on the same tokens."""
    mesh, init, train = compiled(run, execution, num_devices, len(seeds))
    rng = np.random.default_rng(0)
    objective = objectives.of(run.objective)
    windows = rng.integers(0, 3, (steps, 1, 16, 33)).cumsum(-1).astype(np.int32) % 60
    with jax.set_mesh(mesh):
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
@pytest.mark.parametrize("kind, mesh", ON_MESHES, ids=str)
def test_losses_do_not_depend_on_the_mesh(kind, mesh):
    run = RUNS[kind]
    one = losses(run, ExecutionConfig(), 1)
    assert one[-1] < one[0] - 0.2  # it learns
    assert np.abs(losses(run, ExecutionConfig(mesh=mesh), 8) - one).max() < 1e-5


COLLECTIVES = re.compile(r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)\(")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, per_loop",
    [(MeshConfig(data=2, fsdp=4), {}), (MeshConfig(data=2, fsdp=2, tensor=2), {"all-gather": 2, "all-reduce": 2})],
    ids=str,
)
def test_devices_do_not_wait_for_each_other_at_every_time_step(mesh, per_loop):
    """Two layers, a loop each way: with tensor h is gathered on the way there, its gradient added up on the way back;
    weights and their gradients travel outside."""
    run, execution = RUNS["recurrent, lstm"], ExecutionConfig(mesh=mesh, scan_layers=False)
    with jax.set_mesh(devices := sharding.make_mesh(mesh, jax.devices())):
        text = programs.lower(program_key(run), execution, 1, devices).train.compile(compiler_options=QUICK).as_text()
    bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)\n\}", text, re.S | re.M))
    loops = re.findall(r"body=%?([\w.\-]+)", text)
    assert len(loops) >= 4  # XLA makes some of its own, of scattered rows
    assert Counter(kind for body in loops for kind in COLLECTIVES.findall(bodies[body])) == per_loop


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_FULL)
@pytest.mark.parametrize("way", WAYS)
def test_execution_changes_rounding_only(kind, way):
    one = losses(RUNS[kind], ExecutionConfig(), 1)
    assert np.abs(losses(RUNS[kind], WAYS[way], 1) - one).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in RUNS if kind != "transformer"])
def test_members_of_a_pack_are_their_lone_runs(kind):
    packed = losses(RUNS[kind], ExecutionConfig(), 1, seeds=(0, 1, 2))
    for k, seed in enumerate((0, 1, 2)):
        assert_allclose(packed[:, k], losses(RUNS[kind], ExecutionConfig(), 1, seeds=(seed,))[:, 0], rtol=1e-5)


# ---- recurrent ------------------------------------------------------------------------------------------------------


def layer_of(config, seed=1):
    """Weights of a layer, biases too away from zero."""
    params, rng = initial(config, 0), np.random.default_rng(seed)
    names = [name for name in ("w_x", "w_h", "bias", "bias_h") if name in params]
    return {n: params[n][0] + 0.1 * rng.normal(size=params[n].shape[1:]).astype(np.float32) for n in names}


def value_and_grads(function, p, x):
    return quick_jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(function(p, x))), argnums=(0, 1)))(p, x)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_and_its_gradient_are_flaxs(cell):
    """Another cell, another loop, another gradient: products with x and h at each time step, under ``nn.RNN``. Flax's
    own new LSTM forgets by σ(0), ours by σ(1): its bias there is ours plus 1."""
    x = np.random.default_rng(2).normal(size=(3, 17, 16)).astype(np.float32)

    def of_flax(p, x):
        return nn.RNN(getattr(nn, FLAX_CELLS[cell])(16)).apply({"params": {"cell": as_flax(cell, p)}}, x)

    p = layer_of(CELLS[cell])
    ours = value_and_grads(functools.partial(recurrent.layer, cell), p, x)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, value_and_grads(of_flax, p, x))


@pytest.mark.parametrize("cell", CELLS)
def test_a_masked_window_and_its_gradient_are_those_of_its_documents(cell):
    """Each document by itself, its state from zero: the LSTM's c too."""
    x = np.random.default_rng(2).normal(size=(1, 12, 16)).astype(np.float32)
    fresh = np.isin(np.arange(12), (0, 5, 6))[None]

    def by_document(p, x):
        parts = (recurrent.layer(cell, p, x[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 12)))
        return jnp.concatenate(list(parts), axis=1)

    p = layer_of(CELLS[cell])
    masked = value_and_grads(lambda p, x: recurrent.layer(cell, p, x, fresh), p, x)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=2e-5, atol=2e-6), masked, value_and_grads(by_document, p, x))


@pytest.mark.parametrize("cell", CELLS)
def test_what_a_layer_keeps_is_what_is_counted(cell):
    """Values per token between the forward and the backward pass of the scan over time, as JAX hands them over."""
    B, T, D = 3, 64, 16
    p = layer_of(CELLS[cell])
    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    pulled_back = jax.eval_shape(lambda x: jax.vjp(functools.partial(recurrent.layer, cell), p, x)[1], x)
    sizes = [leaf.size for leaf in jax.tree.leaves(pulled_back) if leaf.shape[0] in (T, B * T)]
    layer_input = B * T * D  # which the product with w_x keeps, and activation_bytes counts for every family
    assert sum(sizes) - layer_input == B * T * families.of(GRU).kept_values(CELLS[cell])


@pytest.mark.parametrize("cell", CELLS)
def test_each_gate_is_a_matrix_to_optimisers_that_know_matrices(cell):
    """By gate and layer: Muon's step is near orthogonal in each, SOAP keeps the squares that a plan counts."""
    config = CELLS[cell]
    specs, params = models.param_specs(config), initial(config, 0)
    rng = np.random.default_rng(0)
    gradient = {n: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for n, s in specs.items()}

    def transform_of(name):
        run = RunConfig(config, OptimConfig(0.01, 0, name=name), Horizon(steps=10), batch_size=4)
        plan = accounting.plan(run)
        hp = jax.tree.map(jnp.asarray, optimizers.hyperparams(run.optim, plan))
        return optimizers.transform(run.optim, hp, specs), plan

    soap, plan = transform_of("soap")
    kept = jax.tree.leaves((params, jax.eval_shape(soap.init, params)))
    assert plan.state_bytes == 4 * sum(leaf.size for leaf in kept if leaf.ndim)

    muon, _ = transform_of("muon")
    moved, _ = quick_jit(muon.update)(gradient, muon.init(params), params)
    for name in ("w_x", "w_h"):
        singular = np.linalg.svd(np.moveaxis(moved[name], 1, 2), compute_uv=False) / (0.2 * 16**0.5)
        assert np.median(singular) == pytest.approx(0.95, abs=0.2)
        assert singular.max() < 1.3


@pytest.mark.parametrize("cell, gates, biases", [("rnn", 1, 1), ("lstm", 4, 4), ("gru", 3, 3 + 1)])
def test_counts_of_a_cell_by_hand(cell, gates, biases):
    """Each layer: of a gate (16, 16) with the input and with the state, biases of 16; a norm of 16."""
    counts = accounting.param_counts(CELLS[cell])
    assert counts["recurrent"] == 2 * (2 * gates * 256 + biases * 16)
    assert counts["norm"] == 3 * 16
    flops = accounting.flops_per_token(CELLS[cell], 128)
    assert flops["kaplan"] == 6 * 2 * 2 * gates * 256  # no token meets another by a product: the context costs nothing
    assert flops["exact"] == 6 * (2 * 2 * gates * 256 + 16 * 32)
    assert flops["chinchilla"] == flops["exact"] + 6 * 16 * 32
    assert flops["6ND"] == 6 * (2 * (2 * gates * 256 + biases * 16) + 3 * 16)
    assert flops["6ND_total"] == flops["6ND"] + 6 * 2 * 16 * 32


@pytest.mark.parametrize("cell", CELLS)
def test_what_a_recurrent_model_cannot_is_refused_with_its_reason(cell):
    with pytest.raises(ValueError, match="parameterization is 'mup': write standard: how rates transfer"):
        dataclasses.replace(CELLS[cell], parameterization="mup", base_d_model=8)
    with pytest.raises(ValueError, match=r"'masked': write next_token: a recurrent model reads one way"):
        dataclasses.replace(RUNS["recurrent"], objective=Masked())
