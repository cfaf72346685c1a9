"""Replaced-token detection against its definition in float64, its counts against the compiler, and a run on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal, assert_array_less

from scaling import accounting
from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.experts import ExpertsConfig
from scaling.families.transformer import TransformerConfig
from scaling.objectives import OBJECTIVES, replaced_token
from scaling.objectives.replaced_token import ReplacedToken
from scaling.training import losses, models
from scaling.training.evaluation import keys_of
from scaling.training.losses.replaced_token import gumbel as gumbel_noise
from tests.training.lab import QUICK, cell, essence, quick_jit, train, train_and_stop_at

V, T = 40, 24
MODEL = TransformerConfig(
    d_model=32, num_layers=2, num_heads=4, head_dim=8, num_kv_heads=4, d_ff=64, vocab_size=V, tied_embeddings=True
)


def run_of(model=MODEL, **changes):
    optim = OptimConfig(peak_lr=0.01, warmup_tokens=0)
    data = DataConfig(seq_len=T)
    return RunConfig(model, optim, Horizon(steps=4), batch_size=4, data=data, objective=ReplacedToken(**changes))


def batch_of(run, rows, present=None, same=False):
    windows = np.random.default_rng(0).integers(0, V - 1, (rows, T + 1), dtype=np.int32)
    if same:
        windows = np.tile(windows[:1], (rows, 1))
    keys = keys_of(5, np.arange(rows, dtype=np.uint64))
    return OBJECTIVES["replaced_token"].batch(run.objective, V, windows, keys, present)


@pytest.fixture(scope="module")
def params():
    specs = losses.param_specs(run_of())
    drawn = quick_jit(lambda seed: models.drawn(specs, jax.random.key(seed)))(1)
    return drawn | {"discriminator_bias": jnp.array([0.3])}


@pytest.mark.parametrize(
    "model", [MODEL, dataclasses.replace(MODEL, norm="layer", biases=True, positions="learned", num_positions=30)],
    ids=["", "learned positions, biases"],
)  # fmt: skip
def test_counts_are_those_of_the_parameters_group_by_group(model):
    run = run_of(model)
    found = {}
    for spec in losses.param_specs(run).values():
        found[spec.group] = found.get(spec.group, 0) + int(np.prod(spec.shape))
    counts = accounting.trained(model, run.objective)
    assert found == {name: n for name, n in counts.groups.items() if n}
    assert counts.held == sum(found.values())
    alone = accounting.param_counts(model)
    assert counts.num_params["non_embedding"] == alone["non_embedding"]  # the generator is no part of N
    assert counts.num_params["total"] == alone["total"] + model.d_model + 1


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_a_generators_idle_experts_are_none_of_the_models(width):
    """N's ``active`` is the model's own, whatever the generator; the FLOP rules leave out the idle ones of both."""
    mlp = ExpertsConfig(experts=8, active=2)
    model = dataclasses.replace(MODEL, mlp=mlp)
    run = dataclasses.replace(run_of(model), objective=ReplacedToken(generator_width=width))
    alone, both = accounting.param_counts(model), accounting.trained(model, run.objective)
    assert both.num_params["active"] == alone["active"]
    small = replaced_token.generator(run.objective, model)
    idle = [6 * m.num_layers * 2 * m.d_model * m.d_ff for m in (model, small)]  # six of eight experts, up and down
    assert both.inactive == idle[0]
    assert both.held - both.worked_on == sum(idle)


def test_rule_chinchilla_reads_both_tables():
    """Of Hoffmann et al. 2022, appendix F: embeddings as dense products, attention unmasked, softmax, heads; 3 × it."""
    small = replaced_token.generator(ReplacedToken(), MODEL)
    heads = 2 * MODEL.d_model + 2 * 0.15 * small.d_model * MODEL.vocab_size
    embeddings = 2 * MODEL.vocab_size * (MODEL.d_model + small.d_model)
    layers = 0.0
    for m in (MODEL, small):
        width, kv_width = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        products = 2 * m.d_model * (2 * width + 2 * kv_width) + 2 * 2 * m.d_model * m.d_ff
        layers += m.num_layers * (products + 4 * T * width + 3 * m.num_heads * T)
    assert accounting.flops_of(run_of())["chinchilla"] == pytest.approx(3 * (embeddings + layers + heads), rel=1e-12)


def test_hidden_places_are_chosen_evenly_and_only_among_tokens_that_are_there():
    run = run_of(rate=0.25)
    present = (np.arange(T) < np.array([T, 9, 1, 0])[:, None]).astype(np.float32)
    batch = batch_of(run, 4, present)
    assert_array_equal(batch["hidden"].sum(axis=1), [6, 2, 1, 0])
    for places, hidden, there in zip(batch["places"], batch["hidden"], present):
        assert len(set(places.tolist())) == len(places)
        assert (there[places[hidden > 0]] == 1).all()
    many = batch_of(run, 4000)
    share = np.bincount(many["places"].ravel(), minlength=T) / 4000
    assert np.abs(share - 0.25).max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert len(np.unique(many["draw"], axis=0)) == 4000


def gumbel(one, two, number):
    """MurmurHash3's finaliser twice, in Python's own integers."""

    def mixed(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ x >> shift) * factor % 2**32
        return x

    bits = [mixed(mixed((i * 0x9E3779B9 + one) % 2**32) ^ two) for i in range(number)]
    return -np.log(-np.log((np.array(bits) // 2**9 + 0.5) / 2**23))


@pytest.mark.slow
def test_losses_are_their_definition_in_float64(params):
    """The networks' last layers are taken from the networks, which have oracles of their own."""
    run = run_of()
    present = (np.arange(T) < np.array([T, 9, T, T])[:, None]).astype(np.float32)
    batch = batch_of(run, 4, present)
    found = quick_jit(lambda p, b: losses.of_batch(run, ExecutionConfig(), p, b))(params, batch)
    small = replaced_token.generator(run.objective, MODEL)
    assert (small.d_model, small.num_layers, small.num_heads) == (8, 2, 1)
    table = np.asarray(params["embedding"], np.float64) @ np.asarray(params["generator_projection"], np.float64)
    own = {n.removeprefix("generator_"): p for n, p in params.items() if n.startswith("generator_")}
    own |= {"embedding": jnp.asarray(table, jnp.float32)}
    hidden = models.network(MODEL).hidden
    shown, read = batch["tokens"].copy(), batch["tokens"].copy()
    places = [p[h > 0] for p, h in zip(batch["places"], batch["hidden"])]
    for row, at in zip(shown, places):
        row[at] = V - 1
    h = np.asarray(quick_jit(lambda p, x: hidden(small, ExecutionConfig(), p, x, causal=False).h_BTD)(own, shown))
    sums = []
    for b, at in enumerate(places):
        logits = h[b, at].astype(np.float64) @ table.T
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        sums.append(-log_p[np.arange(len(at)), batch["tokens"][b, at]].sum())
        noise = gumbel(*map(int, batch["draw"][b]), batch["places"].shape[1] * V).reshape(-1, V)[: len(at)]
        read[b, at] = (log_p + noise).argmax(axis=1)
    assert (read != batch["tokens"]).any()
    judged = quick_jit(lambda p, x: hidden(MODEL, ExecutionConfig(), p, x, causal=False).h_BTD)(params, read)
    head = np.asarray(params["discriminator"], np.float64)[:, 0]
    chance = 1 / (1 + np.exp(-(np.asarray(judged, np.float64) @ head + 0.3)))  # of "replaced"
    expected = -np.where(read != batch["tokens"], np.log(chance), np.log(1 - chance))
    assert_allclose(found.loss_BT, expected, rtol=2e-5, atol=2e-6)
    assert_array_equal(found.weights_BT, present)
    assert_allclose(found.measures["generator_loss"][0], sums, rtol=2e-5)
    assert_array_equal(found.measures["generator_loss"][1], [len(at) for at in places])
    assert found.scale == 50
    assert found.penalty == pytest.approx(np.sum(sums) / batch["hidden"].size, rel=1e-5)


@pytest.mark.slow
def test_the_discriminators_loss_trains_no_generator_and_every_parameter_is_trained(params):
    run = run_of()
    batch = jax.tree.map(jnp.asarray, batch_of(run, 4))

    def parts(p):
        found = losses.of_batch(run, ExecutionConfig(), p, batch)
        return jnp.mean(found.loss_BT), found.penalty

    judging = quick_jit(jax.grad(lambda p: parts(p)[0]))(params)
    guessing = quick_jit(jax.grad(lambda p: parts(p)[1]))(params)
    for name in params:
        of_generator = name.startswith("generator_")
        assert bool((judging[name] != 0).any()) is not of_generator, name
        assert bool((guessing[name] != 0).any()) is (of_generator or name == "embedding"), name


@pytest.mark.slow
def test_draws_are_as_likely_as_the_generators_softmax_says(params):
    """Over 4,000 rows of one window, hidden at the same places: the share that is drawn as it was is its chance."""
    run = run_of()
    batch = batch_of(run, 4000, same=True)
    batch["places"] = np.tile(batch["places"][:1], (4000, 1))
    # A discriminator of bias -100 alone loses 100 on each replaced token, 0 on others: its loss counts them.
    counting = params | {"discriminator": 0 * params["discriminator"], "discriminator_bias": jnp.array([-100.0])}
    found = quick_jit(lambda p, b: losses.of_batch(run, ExecutionConfig(), p, b))(counting, batch)
    replaced = np.asarray(found.loss_BT).sum(axis=0) / 100 / 4000
    at = batch["places"][0]
    assert (np.delete(replaced, at) < 1e-6).all()
    small = replaced_token.generator(run.objective, MODEL)
    own = {n.removeprefix("generator_"): p for n, p in params.items() if n.startswith("generator_")}
    own["embedding"] = params["embedding"] @ params["generator_projection"]
    shown = batch["tokens"][:1].copy()
    shown[0, at] = V - 1
    logits = quick_jit(lambda p, x: models.apply(small, ExecutionConfig(), p, x, causal=False))(own, shown)
    chances = np.asarray(jax.nn.softmax(logits))[0, at, batch["tokens"][0, at]]
    assert_array_less(np.abs(1 - replaced[at] - chances), 4 * (chances * (1 - chances) / 4000) ** 0.5)


@pytest.mark.slow
def test_exact_flops_are_within_2_percent_of_the_compilers(monkeypatch):
    """The generator's table, a product whatever the tokens, is no part of ours: it is added here."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    model = dataclasses.replace(MODEL, d_model=256, head_dim=64, d_ff=1024, vocab_size=512)
    run = dataclasses.replace(run_of(model), data=DataConfig(seq_len=40))
    rows, length = 8, 40
    specs = losses.param_specs(run)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    spec = OBJECTIVES["replaced_token"].batch_spec(run.objective, length)
    batch = {name: jax.ShapeDtypeStruct((rows, n), dtype) for name, (n, dtype) in spec.items()}

    def loss(params, batch):
        found = losses.of_batch(run, ExecutionConfig(attention="einsum", scan_layers=False), params, batch)
        return 50 * jnp.mean(found.loss_BT) + found.penalty

    def counted(function, *args):
        return jax.jit(function).lower(*args).compile(compiler_options=QUICK).cost_analysis()["flops"]

    small = replaced_token.generator(run.objective, model)
    # Of the noise, whose rounds the compiler counts as it does products.
    draw = jax.ShapeDtypeStruct((rows, 2), jnp.uint32)
    hidden = spec["places"][0]

    table = 3 * 2 * 512 * model.d_model * small.d_model
    ours = accounting.flops_of(run)["exact"] * rows * length + table
    theirs = counted(jax.grad(loss), params, batch) - counted(lambda draw: gumbel_noise(draw, hidden, 512), draw)
    print(f"the compiler counts {theirs / ours:.4f} of ours")
    assert theirs == pytest.approx(ours, rel=0.02)
    both = accounting.flops_of(run)["exact"]
    assert both > accounting.flops_per_token(model, length, causal=False)["exact"] - 6 * 512 * model.d_model


def replaced_cell(data_config, steps=24):
    one = cell(data_config, steps=steps)
    model = dataclasses.replace(one.run.model, vocab_size=264, tied_embeddings=True)
    return dataclasses.replace(one, run=dataclasses.replace(one.run, objective=ReplacedToken(), model=model))


@pytest.mark.slow
def test_a_run_is_the_same_on_any_mesh_in_parts_and_when_it_is_resumed(corpus, tmp_path):
    of = functools.partial(replaced_cell, corpus[0], steps=60)
    (one,) = train([of()], corpus, tmp_path / "a")
    assert one.status == "completed"
    assert one.loss < np.log(2) - 0.1
    assert one.bits_per_byte is None
    assert one.num_predicted_tokens == one.num_tokens
    assert one.measures["generator_loss"]["value"] < np.log(257) - 1
    assert train_and_stop_at(31, [of()], corpus, tmp_path / "b") is None
    (again,) = train([of()], corpus, tmp_path / "b")
    assert essence(again) == essence(one)
    other = ExecutionConfig(mesh=MeshConfig(data=2, fsdp=2, tensor=2), accumulation_steps=2, eval_batch_size=8)
    (same,) = train([of()], corpus, tmp_path / "c", other)
    assert_allclose(same.curve["loss"][0], one.curve["loss"][0], rtol=2e-4)
    assert_allclose(same.curve["loss"], one.curve["loss"], rtol=2e-2)  # a draw may fall otherwise by rounding
    assert same.measures["generator_loss"]["value"] == pytest.approx(one.measures["generator_loss"]["value"], rel=2e-2)
