"""The mixture of experts against a loop over tokens and experts, its three grouped products against each other."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling import accounting, families
from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.experts import ExpertsConfig
from scaling.families.transformer import TransformerConfig
from scaling.fields import canonical_json
from scaling.grid import expand
from scaling.grid.strict import GridError
from scaling.training import models, sharding
from scaling.training.models import experts, transformer
from tests.training.lab import initial, quick_jit

DENSE = TransformerConfig(
    d_model=16, num_layers=2, num_heads=4, head_dim=4, num_kv_heads=2, d_ff=24, vocab_size=32, activation="swiglu"
)
MLP = ExpertsConfig(experts=6, active=2, shared=1, granularity=2)
MOE = dataclasses.replace(DENSE, mlp=MLP, biases=True)
CAPACITY = dataclasses.replace(MLP, routing="capacity", capacity_factor=0.8)


def layer_of(config, seed=0):
    """One layer's feed-forward: its weights, biases that are not zero."""
    rng = np.random.default_rng(seed)
    specs = transformer.param_specs(config)
    return {
        name: jnp.asarray(rng.normal(size=spec.shape[1:]) * (spec.init_std or 0.3), jnp.float32)
        for name, spec in specs.items()
        if spec.group in ("mlp", "router")
    }


def by_loops(config, p, h_BTD):
    """Each token by each of its experts, one after another; an expert of a window that is full takes none."""
    m, (B, T, _) = config.mlp, h_BTD.shape

    def one(prefix, e, x_D):
        def of(name):
            return p[prefix.format(name)][e], p[prefix.format(name).replace("w_", "b_", 1)][e]

        (w_in, b_in), (w_gate, b_gate), (w_out, b_out) = map(of, ("in", "gate", "out"))
        return (jax.nn.silu(x_D @ w_gate + b_gate) * (x_D @ w_in + b_in)) @ w_out + b_out

    room = math.ceil(m.capacity_factor * m.active * T / m.experts) if m.capacity_factor else T
    out, dropped = [], 0
    for b in range(B):
        taken = [0] * m.experts
        for t in range(T):
            x_D = h_BTD[b, t]
            p_E = jax.nn.softmax(x_D @ p["router"])
            y_D = sum(one("w_shared_{}", s, x_D) for s in range(m.shared))
            for e in sorted(range(m.experts), key=lambda e: -float(jax.lax.stop_gradient(p_E[e])))[: m.active]:
                taken[e] += 1
                if taken[e] <= room:
                    y_D = y_D + p_E[e] * one("w_{}", e, x_D)
                else:
                    dropped += 1
            out.append(y_D)
    return jnp.stack(out).reshape(h_BTD.shape), dropped


@functools.cache
def oracle(mlp):
    config = dataclasses.replace(MOE, mlp=mlp)
    p, h_BTD = layer_of(config), jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 16)), jnp.float32)

    def loss(p, h):
        value, dropped = by_loops(config, p, h)
        return jnp.sum(jnp.sin(value)), (value, dropped)

    (_, (value, dropped)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(p, h_BTD)
    return config, p, h_BTD, value, grads, dropped


@pytest.mark.slow
@pytest.mark.parametrize(
    "mlp, platform, most_copied",
    [(MLP, "cpu", 0), (MLP, "cpu", 4096), (MLP, "tpu", 0), (CAPACITY, "cpu", 0)],
    ids=["blocks", "copied", "ragged", "capacity"],
)  # fmt: skip
def test_values_and_gradients_are_those_of_a_loop_over_tokens(mlp, platform, most_copied, monkeypatch):
    monkeypatch.setattr(experts, "MOST_COPIED", most_copied)
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(experts, "BLOCK_ROWS", (4, 4))  # several blocks an expert
    config, p, h_BTD, value, grads, dropped = oracle(mlp)

    def ours(p, h):
        y_BTD, said = transformer._feed_forward(config, p, h)
        return jnp.sum(jnp.sin(y_BTD)), (y_BTD, said)

    (_, (y_BTD, said)), found = quick_jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(p, h_BTD)
    assert_allclose(y_BTD, value, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, grads)
    assert said.dropped_B.sum() == dropped
    assert (dropped > 0) == (mlp is CAPACITY)
    assert said.load_BE.sum() == 2 * 9 * 2

    # A pack's program is its members' programs.
    pack = [jax.tree.map(lambda x, k=k: x * (1 + 0.1 * k), (p, h_BTD)) for k in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *pack)
    gradient = jax.grad(lambda p, h: ours(p, h)[0], argnums=(0, 1))
    together, alone = quick_jit(jax.vmap(gradient))(*stacked), quick_jit(gradient)
    for k in range(3):
        jax.tree.map(lambda a, b, k=k: assert_allclose(a[k], b, rtol=1e-4, atol=1e-5), together, alone(*pack[k]))


@pytest.mark.slow
@pytest.mark.parametrize("mlp, platform", [(MLP, "cpu"), (MLP, "tpu"), (CAPACITY, "cpu")],
                         ids=["blocks", "ragged", "capacity"])  # fmt: skip
def test_experts_on_several_devices_are_those_on_one(mlp, platform, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    config, p, _, _, _, _ = oracle(mlp)
    h_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(8, 9, 16)), jnp.float32)

    def gradient(p, h):
        return jax.value_and_grad(
            lambda p, h: jnp.sum(jnp.sin(transformer._feed_forward(config, p, h)[0])), argnums=(0, 1)
        )(p, h)

    one = quick_jit(gradient)(p, h_BTD)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        many = quick_jit(gradient)(p, h_BTD)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), many, one)


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_counting_gives_the_order_of_a_stable_sort(size):
    rng = np.random.default_rng(size)
    for E in (1, 3, 8):
        expert_P = rng.choice(E + 1, size=size, p=rng.dirichlet(np.full(E + 1, 0.3)))  # some have none; E: another's
        order_P, place_P, count_E = quick_jit(functools.partial(experts._counted, E=E))(expert_P)
        expected = np.argsort(expert_P, kind="stable")
        np.testing.assert_array_equal(order_P, expected)
        np.testing.assert_array_equal(place_P, np.argsort(expected, kind="stable"))
        np.testing.assert_array_equal(count_E, np.bincount(expert_P, minlength=E + 1)[:E])


@pytest.mark.slow
def test_one_expert_is_the_dense_model():
    dense = dataclasses.replace(DENSE, biases=True)
    one = dataclasses.replace(dense, mlp=ExpertsConfig(experts=1, active=1))
    params = initial(dense, 0)
    names = [f"{kind}_{name}" for kind in "wb" for name in ("in", "gate", "out")]
    of_one = params | {n: params[n][:, None] for n in names} | {"router": initial(one, 0)["router"]}
    tokens = np.random.default_rng(0).integers(0, 32, (4, 12))
    logits = [
        quick_jit(lambda p, t, c=c: models.apply(c, ExecutionConfig(), p, t))(p, tokens)
        for c, p in ((dense, params), (one, of_one))
    ]
    assert_allclose(*logits, rtol=1e-5, atol=1e-6)
    assert accounting.flops_per_token(one, 12)["6ND"] == accounting.flops_per_token(dense, 12)["6ND"] + 6 * 2 * 16


@pytest.mark.slow
def test_penalty_and_measures_by_their_equations(monkeypatch):
    config = dataclasses.replace(MOE, num_layers=1, mlp=dataclasses.replace(CAPACITY, balance_loss=0.3))
    params, tokens = initial(config, 0), np.random.default_rng(0).integers(0, 32, (3, 12))
    original = experts._routed

    @quick_jit
    def found_and_routed(params):
        seen = []
        monkeypatch.setattr(experts, "_routed", lambda *args: seen.append(args[1:]) or original(*args))
        found = models.network(config).hidden(config, ExecutionConfig(), params, tokens)
        return found.penalty, found.measures, seen[0]

    penalty, measures, routed = found_and_routed(params)
    router, h = (np.asarray(x, np.float64) for x in routed)
    logits = h @ router
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1)[..., :2]
    load = np.array([[(chosen[b] == e).sum() for e in range(6)] for b in range(3)])
    balance = np.mean([6 * (load[b] / 24 * p[b].mean(0)).sum() for b in range(3)])
    square = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    assert float(penalty) == pytest.approx(0.3 * balance + 0.001 * square, rel=1e-5)
    sums, weights = measures["expert_load"]
    assert_allclose(sums.sum(0) / weights.sum(), load.sum(0)[None] / 72)
    dropped, weights = measures["dropped_tokens"]
    room = math.ceil(0.8 * 2 * 12 / 6)
    assert float(dropped.sum() / weights.sum()) == pytest.approx(np.maximum(load - room, 0).sum() / 72)
    assert dropped.sum() > 0


def test_counts_by_hand():
    """Each layer: 6 experts and a shared one of width 12, three matrices each; a router (16, 6)."""
    config = dataclasses.replace(MOE, biases=False)
    counts = accounting.param_counts(config)
    one = 3 * 16 * 12
    assert counts["mlp"] == 2 * 7 * one
    assert counts["router"] == 2 * 16 * 6
    assert counts["active"] == counts["non_embedding"] - 2 * 4 * one
    dense = dataclasses.replace(DENSE, d_ff=36)  # three of the narrow experts
    for rule in ("6ND", "kaplan", "exact", "chinchilla"):
        ours, theirs = (accounting.flops_per_token(c, 12)[rule] for c in (config, dense))
        assert ours == pytest.approx(theirs + 6 * 2 * 16 * 6, rel=1e-12)
    soap = accounting.optimizer_values("soap", families.of(config).counts(config))
    attention = 2 * (2 * (256 + 256) + 2 * (256 + 64))
    assert soap == 2 * counts["total"] + 2 * (2 * 7 * 3 * (256 + 144) + attention)


@pytest.mark.slow
def test_every_experts_matrix_is_orthogonalised_by_itself():
    from scaling.training import optimizers

    config = dataclasses.replace(MOE, biases=False)
    specs = transformer.param_specs(config)
    rng = np.random.default_rng(0)
    grads = {n: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for n, s in specs.items()}
    hp = {"beta1": jnp.float32(0.9), "beta2": jnp.float32(0.98), "eps": jnp.float32(1e-8)}
    muon = optimizers.transform(OptimConfig(0.1, 0, name="muon"), hp, specs)
    update = quick_jit(lambda g: muon.update(g, muon.init(g), g)[0])
    first = update(grads)
    changed = {**grads, "w_in": grads["w_in"].at[:, 3].multiply(-2.0)}
    second = update(changed)
    assert_allclose(second["w_in"][:, :3], first["w_in"][:, :3], atol=1e-6)
    assert_allclose(second["w_in"][:, 3], -first["w_in"][:, 3], atol=1e-3)


def test_no_experts_leave_no_trace():
    assert '"mlp"' not in canonical_json(DENSE)
    assert "active" not in accounting.param_counts(DENSE)


def cells(model, axes=None):
    base = {"model": model, "optim": {"peak_lr": 0.01, "warmup_tokens": 0}, "horizon": {"steps": 9}, "batch_size": 4}
    return expand({"recipe": None, "base": base, **({"axes": axes} if axes else {})}, name="t").cells


def test_a_grid_writes_experts_and_sweeps_over_them():
    found = cells({"width": 64, "mlp": {"experts": 8, "active": 2}}, {"model.mlp.experts": [4, 8]})
    assert [cell.run.model.mlp for cell in found] == [ExpertsConfig(experts=n, active=2) for n in (4, 8)]
    assert [cell.labels["experts"] for cell in found] == [4, 8]
    (sized,) = cells({"params": 1e6, "mlp": {"experts": 8, "active": 2}})
    assert accounting.param_counts(sized.run.model)["non_embedding"] == pytest.approx(1e6, rel=0.5)


MIX = {"experts": 8, "active": 2}


@pytest.mark.parametrize(
    "model, message",
    [
        ({"width": 64, "mlp": {"experts": 8, "actives": 2}}, r"base.model.mlp.actives: unknown key; did you mean"),
        ({"width": 64, "mlp": {"experts": 8}}, r"base.model.mlp.active: missing"),
        ({"params": 1e6, "mlp": {"experts": 8}}, r"base.model.mlp.active: missing"),
        ({"width": 64, "mlp": {"experts": 8, "active": 9}}, r"base.model.mlp.active: 9: write at most experts"),
        ({"width": 64, "mlp": MIX | {"granularity": 3}}, "granularity: 3: write a divisor of d_ff"),
        ({"width": 64, "mlp": MIX | {"capacity_factor": 1.5}}, "write null, or routing: capacity"),
        ({"width": 64, "mlp": MIX | {"routing": "capacity"}}, "capacity_factor: None: write a pos"),
        ({"width": 64, "family": "recurrent", "mlp": MIX}, "family recurrent has no mlp"),
        (
            {"width": 64, "parameterization": "mup", "base_d_model": 32, "base_head_dim": 8, "mlp": MIX},
            "write standard: that rates transfer",
        ),
    ],
)  # fmt: skip
def test_what_experts_cannot_be_is_said_in_a_line(model, message):
    with pytest.raises(GridError, match=message) as caught:
        cells(model)
    assert "\n" not in str(caught.value)


def test_a_mesh_must_divide_the_experts():
    mesh = sharding.make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])
    config = dataclasses.replace(DENSE, num_kv_heads=4, mlp=ExpertsConfig(experts=6, active=2))
    with pytest.raises(ValueError, match=r"model.mlp.experts is 6, which the mesh's tensor = 4 does not divide"):
        sharding.check_divides(config, 8, 1, mesh)


def test_a_capacity_is_refused_where_documents_are_masked():
    """A document's tokens would fill the room of the next one's: it would know of them."""
    routing = ExpertsConfig(experts=8, active=2, routing="capacity", capacity_factor=1.0)
    run = RunConfig(DENSE, OptimConfig(0.01, 0), Horizon(steps=1), 8, data=DataConfig(mask_documents=True))
    with pytest.raises(
        ValueError, match=r"data.mask_documents is True: write false: by model.mlp.routing a document's"
    ):
        dataclasses.replace(run, model=dataclasses.replace(DENSE, mlp=routing))
    dataclasses.replace(
        run,
        model=dataclasses.replace(DENSE, mlp=dataclasses.replace(routing, routing="dropless", capacity_factor=None)),
    )


@pytest.mark.slow
def test_a_record_says_how_experts_were_used_and_a_resumed_run_is_the_same(tmp_path_factory):
    from scaling import records
    from tests.training.lab import cell, essence, make_corpus, train, train_and_stop_at

    corpus = make_corpus(tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache"))
    dense = cell(corpus[0], steps=8)
    mlp = ExpertsConfig(experts=4, active=2, routing="capacity", capacity_factor=1.0)
    run = dataclasses.replace(dense.run, model=dataclasses.replace(dense.run.model, mlp=mlp))
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "cut")]
    (whole,) = train([dataclasses.replace(dense, run=run)], corpus, folders[0])
    train_and_stop_at(5, [dataclasses.replace(dense, run=run)], corpus, folders[1])
    (cut,) = train([dataclasses.replace(dense, run=run)], corpus, folders[1])
    assert essence(cut) == essence(whole)
    (load_E,) = whole.measures["expert_load"]["value"]
    assert sum(load_E) == pytest.approx(1)
    assert len(load_E) == 4
    assert 0 < whole.measures["dropped_tokens"]["value"] < 1
    row = records.table([whole]).iloc[0]
    assert row["num_params_active"] == whole.num_params["active"] < row["num_params"]
    assert row["measures.dropped_tokens"] == whole.measures["dropped_tokens"]["value"]
