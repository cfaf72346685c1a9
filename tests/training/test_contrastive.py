"""The contrastive objective: its pairs by hand, its loss against a loop over rows in float64, its counts against the
compiler, validation and runs on any mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling import accounting, data, fields, grid, parts
from scaling.config import DataConfig, EvalConfig, Horizon, OptimConfig, RunConfig, program_key
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.transformer import TransformerConfig
from scaling.objectives import OBJECTIVES, require_windows
from scaling.objectives.contrastive import Contrastive
from scaling.training import losses, models, programs, sharding
from scaling.training.evaluation import Evaluator, evaluated, keys_of, mean_and_standard_error
from tests.training.lab import QUICK, cell, essence, initial, quick_jit, train, train_and_stop_at

V, T, SPAN = 40, 24, 8
MODEL = TransformerConfig(
    d_model=16, num_layers=1, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=32, vocab_size=V, tied_embeddings=True
)


def run_of(model=MODEL, batch_size=9, seq_len=T, **changes):
    objective = Contrastive(**{"negatives": 5, "span": SPAN, "temperature": 0.5} | changes)
    optim, horizon = OptimConfig(peak_lr=0.01, warmup_tokens=0), Horizon(steps=4)
    return RunConfig(
        model, optim, horizon, batch_size=batch_size, data=DataConfig(seq_len=seq_len), objective=objective
    )


def pairs_of(run, windows, present=None, seed=5):
    keys = keys_of(seed, np.arange(len(windows), dtype=np.uint64))
    return OBJECTIVES["contrastive"].batch(run.objective, V, windows, keys, present)


def windows_of(rows, separators=0.05, distinct=V - 1):
    """Texts of any lengths, of so many distinct tokens: separators fall anywhere."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 1 + distinct, (rows, T + 1), dtype=np.int32)
    return np.where(rng.random(tokens.shape) < separators, 0, tokens).astype(np.int32)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_spans_of_windows_that_leave_no_choice():
    """Of each the longest stretch, the first of equals, and so short that there is one place for its spans, or two."""
    _ = 0
    windows = np.array(
        [
            [9, 1, 2, _, 3, _, 4, 5],  # 1 2 and 4 5: the first; a token each
            [_, _, _, _, 7, _, _, _],  # of one token both spans are that
            [_, _, _, _, _, _, _, _],
            [9, 9, 9, _, 3, _, 9, 9],  # its target ends after the fourth token: the rest is padding
        ],
        np.int32,
    )
    present = np.array([[1] * 7, [1] * 7, [1] * 7, [0, 0, 0, 1, 0, 0, 0]], np.float32)
    run = dataclasses.replace(run_of(span=3, seq_len=7))
    batch = pairs_of(run, windows, present)
    assert_array_equal(batch["length"], [[1], [1], [1], [1]])
    first, second = batch["spans"][:, :3], batch["spans"][:, 3:]
    for span in (first, second):
        assert span[0, 0] in (1, 2)
        assert_array_equal(span[1:, 0], [7, 0, 3])
        assert (span[:, 1:] == 0).all()
    assert_array_equal(batch["weights"], np.ones((4, 1)))
    nothing = pairs_of(run, windows[:1], np.zeros((1, 7), np.float32))
    assert_array_equal(nothing["weights"], [[0]])


def test_spans_are_cut_out_of_the_longest_stretch_and_hold_no_boundary():
    run, windows = run_of(), windows_of(400, separators=0.1)
    present = (np.arange(T) < np.random.default_rng(1).integers(1, T + 1, 400)[:, None]).astype(np.float32)
    batch = pairs_of(run, windows, present)
    lengths = set()
    for row, there, spans, (n,) in zip(windows[:, 1:], present, batch["spans"], batch["length"]):
        text = "".join(chr(64 + t) if here else "@" for t, here in zip(row, there))
        longest = max(text.split("@"), key=len)
        assert n == max(1, min(SPAN, math.ceil(len(longest) / 2)))
        for span in (spans[:SPAN], spans[SPAN:]):
            assert not longest or "".join(chr(64 + t) for t in span[:n]) in longest
            assert (span[n:] == 0).all()
        lengths.add(int(n))
    assert lengths >= set(range(2, SPAN + 1))


def test_every_place_is_as_likely_and_the_two_spans_know_nothing_of_each_other():
    rows = 4000
    windows = np.tile(np.arange(T + 1, dtype=np.int32), (rows, 1))  # a token says where it is
    batch = pairs_of(run_of(), windows)
    assert (batch["length"] == SPAN).all()
    at, other = batch["spans"][:, 0] - 1, batch["spans"][:, SPAN] - 1
    places = T - SPAN + 1
    joint = np.histogram2d(at, other, bins=places, range=[[0, places], [0, places]])[0]
    expected = rows / places**2
    chi_squared = ((joint - expected) ** 2 / expected).sum()
    degrees = places**2 - 1
    assert abs(chi_squared - degrees) < 4 * math.sqrt(2 * degrees)
    assert not (pairs_of(run_of(), windows, seed=6)["spans"] == batch["spans"]).all()


# ---- the loss -------------------------------------------------------------------------------------------------------


@functools.partial(quick_jit, static_argnums=0)
def unpadded(model, params, tokens):
    return models.network(model).hidden(model, ExecutionConfig(), params, tokens, causal=False).h_BTD


def alone(run, params, spans, lengths):
    """Each span at unit length, read without padding: float64 of the network's last layer."""
    found = np.empty((len(spans), run.model.d_model))
    for n in np.unique(lengths):
        here = np.flatnonzero(lengths == n)
        mean = np.asarray(unpadded(run.model, params, spans[:, :n]), np.float64)[here].mean(axis=1)
        found[here] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return found


def by_row(run, params, batch, candidates):
    """(losses, whether the own pair is the most alike) by definition: a loop over rows; ``candidates(i)``: their rows
    beside i."""
    objective, length = run.objective, batch["length"][:, 0]
    C = objective.span
    a, p = (alone(run, params, batch["spans"][:, part], length) for part in (slice(0, C), slice(C, 2 * C)))
    nats, right = [], []
    for i in range(len(a)):
        own, *others = (a[i] @ p[j] / objective.temperature for j in (i, *candidates(i)))
        nats.append(-math.log(math.exp(own) / (math.exp(own) + sum(map(math.exp, others)))))
        right.append(all(own > other for other in others))
    return np.array(nats), np.array(right)


@pytest.fixture(scope="module")
def params():
    return initial(MODEL, 1)


@functools.partial(quick_jit, static_argnums=0)
def found_of(run, params, batch):
    found = losses.of_batch(run, ExecutionConfig(), params, batch)
    return found.loss_BT, found.weights_BT, found.measures


@pytest.mark.parametrize("positions", ["rotary", pytest.param("learned", marks=pytest.mark.slow)])
def test_a_loss_is_its_definition_in_float64_row_by_row(positions):
    model = dataclasses.replace(MODEL, positions=positions, num_positions=SPAN if positions == "learned" else None)
    run, params = run_of(model), initial(model, 1)
    batch = pairs_of(run, windows_of(9, separators=0.15, distinct=3))
    assert len(np.unique(batch["length"])) > 2  # padding of several lengths
    found, weights, measures = found_of(run, params, batch)
    expected, right = by_row(run, params, batch, lambda i: [(i + k) % 9 for k in range(1, 6)])
    assert_allclose(found[:, 0], expected, rtol=2e-5)
    assert_array_equal(weights, np.ones((9, 1)))
    assert_array_equal(measures["accuracy"][0], right)
    assert 0 < right.sum() < 9


@pytest.mark.slow
def test_its_gradient_is_that_of_the_naive_form(params):
    """Spans read one by one, without padding, and a softmax over what each row has as candidates."""
    run = run_of(batch_size=6, negatives=3)
    batch = pairs_of(run, windows_of(6, separators=0.15))
    hidden = models.network(MODEL).hidden

    def vector(params, span, n):
        mean = hidden(MODEL, ExecutionConfig(), params, jnp.asarray(span[None, :n]), causal=False).h_BTD[0].mean(axis=0)
        return mean / jnp.linalg.norm(mean)

    def naive(params):
        pairs = [
            [vector(params, spans[part], n) for part in (slice(0, SPAN), slice(SPAN, None))]
            for spans, (n,) in zip(batch["spans"], batch["length"])
        ]
        each = []
        for i, (a, _) in enumerate(pairs):
            alike = jnp.stack([a @ pairs[(i + k) % 6][1] for k in range(4)]) / run.objective.temperature
            each.append(-jax.nn.log_softmax(alike)[0])
        return jnp.mean(jnp.stack(each))

    def ours(params):
        return jnp.mean(losses.of_batch(run, ExecutionConfig(), params, jax.tree.map(jnp.asarray, batch)).loss_BT)

    got, expected = quick_jit(jax.grad(ours))(params), quick_jit(jax.grad(naive))(params)
    assert set(got) == set(expected)
    for name, g in expected.items():
        assert float(jnp.abs(g).max()) > 0, name  # every parameter learns
        assert_allclose(got[name], g, atol=2e-5 * float(jnp.abs(g).max()) + 1e-7, err_msg=name)


def test_a_batch_twice_over_has_the_same_losses(params):
    """What a row is told from is the rows after it, however many the batch has."""
    run = run_of()
    batch = pairs_of(run, windows_of(9))
    twice = {name: np.concatenate([x, x]) for name, x in batch.items()}
    once = found_of(run, params, batch)[0]
    assert_allclose(found_of(run, params, twice)[0], np.concatenate([once, once]), rtol=1e-6)


def test_without_knowledge_a_loss_is_that_of_a_guess(params):
    run = run_of(temperature=1000.0)
    batch = pairs_of(run, windows_of(9))
    assert_allclose(found_of(run, params, batch)[0], math.log(6), rtol=1e-3)
    assert OBJECTIVES["contrastive"].guess(run.objective, V) == pytest.approx(math.log(6))
    # A collapsed network tells nothing, and gets none right.
    same = dict.fromkeys(("w_o", "w_out"), 0.0)
    dead = {n: x * same.get(n, 1.0) for n, x in params.items()} | {"embedding": jnp.ones_like(params["embedding"])}
    loss, _, measures = found_of(run, dead, batch)
    assert_allclose(loss, math.log(6), rtol=1e-5)
    assert float(measures["accuracy"][0].sum()) == 0


EACH_AXIS = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "mesh", [EACH_AXIS, *(pytest.param(m, marks=pytest.mark.slow) for m in (MeshConfig(data=8), MeshConfig(1, 1, 8)))]
)
def test_losses_are_the_same_on_every_mesh(params, mesh):
    run = run_of(batch_size=16)
    batch = pairs_of(run, windows_of(16))
    expected = found_of(run, params, batch)[0]
    on = sharding.make_mesh(mesh)
    with jax.set_mesh(on):
        key = program_key(run)
        lowered = programs.lower(key, ExecutionConfig(), 1, on)
        state = lowered.abstract_state["params"]
        here = {n: jax.device_put(params[n][None], a.sharding) for n, a in state.items()}
        rows = jax.sharding.NamedSharding(on, jax.sharding.PartitionSpec(("data", "fsdp")))
        sharded = {n: jax.device_put(x, rows) for n, x in batch.items()}
        one = programs.lift(
            programs._under_rules(lambda p, b: losses.of_batch(run, ExecutionConfig(), p, b).loss_BT), 1, (0, None)
        )
        found = quick_jit(one)(here, sharded)[0]
    assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_parameters_group_by_group():
    run = run_of()
    shapes = jax.eval_shape(lambda: models.drawn(losses.param_specs(run), jax.random.key(0)))
    specs = losses.param_specs(run)
    found = {}
    for name, leaf in shapes.items():
        found[specs[name].group] = found.get(specs[name].group, 0) + leaf.size
    counts = accounting.trained(MODEL, run.objective)
    assert found == {name: n for name, n in counts.groups.items() if n}
    assert counts.num_params == accounting.param_counts(MODEL)


def test_exact_flops_are_within_2_percent_of_the_compilers(monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    model = dataclasses.replace(MODEL, d_model=256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=1024)
    run = run_of(model, batch_size=12, negatives=11, span=16, seq_len=64)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in losses.param_specs(run).items()}
    spec = OBJECTIVES["contrastive"].batch_spec(run.objective, 64)
    batch = {name: jax.ShapeDtypeStruct((12, n), dtype) for name, (n, dtype) in spec.items()}

    def loss(params, batch):
        execution = ExecutionConfig(attention="einsum", scan_layers=False)
        return jnp.mean(losses.of_batch(run, execution, params, batch).loss_BT)

    lowered = jax.jit(jax.grad(loss)).lower(params, batch)
    counted = lowered.compile(compiler_options=QUICK).cost_analysis()["flops"]
    ours = accounting.flops_of(run)["exact"] * 12 * 2 * 16
    print(f"the compiler counts {counted / ours:.4f} of ours")
    assert counted == pytest.approx(ours, rel=0.02)


def test_rules_by_hand():
    """Of a token read, with matrices of 2 · (4 D² + 2 D F) / 2 weights and a pair's 6 products for its 16 tokens."""
    run, D, F = run_of(), 16, 32
    inner, pair, square = 4 * D * D + 2 * D * F, 6 * D / (2 * SPAN), SPAN * D
    flops = accounting.flops_of(run)
    assert flops["exact"] == pytest.approx(3 * (2 * inner + 2 * 2 * square + 2 * pair))
    assert flops["kaplan"] == pytest.approx(3 * (2 * inner + 2 * square))
    chinchilla = 2 * V * D + 2 * inner + 2 * 2 * square + 3 * 2 * SPAN + 2 * pair
    assert flops["chinchilla"] == pytest.approx(3 * chinchilla)
    assert flops["6ND"] == 6 * accounting.param_counts(MODEL)["non_embedding"]


def test_tokens_are_those_that_are_read():
    run = run_of()
    assert run.batch_tokens == 9 * 2 * SPAN
    plan = accounting.plan(run)
    assert plan.num_tokens == 4 * 9 * 2 * SPAN
    asked = dataclasses.replace(run, horizon=Horizon(flops=plan.flops["exact"]))
    assert accounting.plan(asked).num_tokens == plan.num_tokens
    # No logits over the vocabulary, which would be most of what a large one keeps.
    large = dataclasses.replace(run, model=dataclasses.replace(MODEL, vocab_size=50_000))
    more = accounting.plan(large).memory_bytes - accounting.plan(run).memory_bytes
    assert more == 4 * 4 * 16 * (50_000 - V)


# ---- validation -----------------------------------------------------------------------------------------------------


def contrastive_cell(data_config, steps=24, seed=0):
    one = cell(data_config, steps=steps, seed=seed)
    model = dataclasses.replace(one.run.model, tied_embeddings=True)
    objective = Contrastive(negatives=11, span=8, temperature=0.2)
    run = dataclasses.replace(
        one.run, objective=objective, model=model, batch_size=16, eval=EvalConfig(num_points=4, curve_tokens=320)
    )  # fmt: skip
    return dataclasses.replace(one, run=run)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, rows", [(EACH_AXIS, 8), (MeshConfig(1, 1, 8), 40)])
def test_validation_is_in_fixed_groups_whatever_the_mesh_and_its_batch(corpus, mesh, rows):
    run = contrastive_cell(corpus[0]).run
    opened, on = data.open(corpus[0], corpus[1]), sharding.make_mesh(mesh)
    windows, present = opened.validation()
    W = len(windows)
    assert W > 24
    assert W % 12  # so that the last group is filled
    batch = OBJECTIVES["contrastive"].batch(
        run.objective, 256, windows, keys_of(0, np.arange(W, dtype=np.uint64)), present
    )
    params = initial(run.model, 3)

    def candidates(i):
        group = range(i // 12 * 12, i // 12 * 12 + 12)
        return [j % W for j in group if j != i]

    nats, right = by_row(run, params, batch, candidates)
    with jax.set_mesh(on):
        made = programs.for_pack(program_key(run), ExecutionConfig(eval_batch_size=rows), 1, on)
        here = {n: jax.device_put(params[n][None], a.sharding) for n, a in made.abstract_state["params"].items()}
        (found,) = Evaluator(opened, run, None, made)(here, final=True)
    assert found.loss == pytest.approx(nats.mean(), rel=1e-5)
    assert found.measures["accuracy"]["value"] == pytest.approx(right.mean(), abs=1e-6)
    groups = [(nats[i : i + 12].sum(), len(nats[i : i + 12])) for i in range(0, W, 12)]
    by_group = mean_and_standard_error(*map(np.array, zip(*groups)))[1]
    by_part = parts.mean_and_standard_error(found.by_block)[1]  # of a text of few documents, more
    assert found.standard_error == pytest.approx(max(by_group, by_part), rel=1e-4)
    assert found.by_position is None


def test_clusters_are_groups_of_windows_cut_where_a_source_ends():
    sums, tokens = np.array([1.0, 2, 4, 8, 16, 32, 64]), np.ones(7)
    shares = [("a", 0.5, slice(0, 4)), ("b", 0.5, slice(4, None))]
    found = evaluated(sums, tokens, shares, 3)
    a = mean_and_standard_error(np.array([7.0, 8]), np.array([3.0, 1]))
    b = mean_and_standard_error(np.array([48.0, 64]), np.array([2.0, 1]))
    assert found.loss == pytest.approx((a[0] + b[0]) / 2)
    assert found.standard_error == pytest.approx(math.hypot(a[1], b[1]) / 2)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_learns_and_is_the_same_on_any_mesh_in_a_pack_and_when_it_is_resumed(corpus, tmp_path):
    of = functools.partial(contrastive_cell, corpus[0], steps=60)
    (one,) = train([of()], corpus, tmp_path / "a")
    assert one.status == "completed"
    assert one.loss < math.log(12) - 0.1
    assert one.bits_per_byte is None
    assert one.loss_by_position is None
    assert one.num_tokens == 60 * 16 * 2 * 8
    assert one.num_predicted_tokens == 60 * 16  # pairs
    assert one.num_eval_tokens == len(data.open(*corpus).validation_counts())
    assert one.measures["accuracy"]["value"] > 2 / 12
    assert train_and_stop_at(31, [of()], corpus, tmp_path / "b") is None
    (again,) = train([of()], corpus, tmp_path / "b")
    assert essence(again) == essence(one)
    other = ExecutionConfig(mesh=MeshConfig(data=2, fsdp=2, tensor=2), eval_batch_size=40)
    (same,) = train([of()], corpus, tmp_path / "c", other)
    assert_allclose(same.curve["loss"], one.curve["loss"], rtol=2e-4)
    packed = train([of(), of(seed=1), of(seed=2)], corpus, tmp_path / "d")
    assert_allclose(next(r for r in packed if r.run_id == one.run_id).curve["loss"], one.curve["loss"], rtol=2e-4)


# ---- refusals -------------------------------------------------------------------------------------------------------


GRID = """
recipe: none
base:
  model: {{width: 16, {model}}}
  optim: {{peak_lr: 0.01, warmup_tokens: 0, z_loss: {z_loss}}}
  horizon: {{steps: 9}}
  batch_size: {batch_size}
  data: {{seq_len: 32, mask_documents: {mask_documents}}}
  eval: {{curve_tokens: {curve_tokens}}}
  objective: {{name: contrastive, negatives: {negatives}, span: {span}, temperature: {temperature}}}
execution: {{accumulation_steps: {parts}}}
"""
USUAL = {
    "model": "tied_embeddings: true", "z_loss": 0, "batch_size": 8, "mask_documents": "false", "curve_tokens": 256,
    "negatives": 7, "span": 16, "temperature": 0.05, "parts": "null",
}  # fmt: skip


def expanded(tmp_path, **changes):
    path = tmp_path / "g.yaml"
    path.write_text(GRID.format(**USUAL | changes))
    return grid.load(path)


def test_a_grid_of_it_expands_and_its_ids_follow_from_all_of_it(tmp_path):
    (one,) = expanded(tmp_path).cells
    assert one.run.objective == Contrastive(negatives=7, span=16)
    assert one.run.model.vocab_size == 256  # no ids of its own
    assert fields.from_dict(RunConfig, fields.to_dict(one.run)) == one.run
    (other,) = expanded(tmp_path, temperature=0.1).cells
    assert other.run.run_id != one.run.run_id


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 7}, "base.batch_size: 7: write 8 or more, or fewer objective.negatives, which is 7"),
        ({"span": 17}, "base.objective.span: 17: write half of data.seq_len or less, which is 32"),
        ({"temperature": 0}, "base.objective.temperature: 0.0: write a positive number"),
        ({"span": 0}, "base.objective.span: 0: write an integer"),
        ({"negatives": 0}, "base.objective.negatives: 0: write an integer"),
        ({"curve_tokens": 224}, "base.eval.curve_tokens: 224: write 256 or more, or null, or fewer"),
        ({"model": "num_layers: 1"}, "base.model.tied_embeddings: False: write true: contrastive has no head"),
        ({"model": "tied_embeddings: true, logit_softcap: 5"}, "base.model.logit_softcap: 5.0: write null"),
        ({"model": "tied_embeddings: true, mlp: {experts: 4, active: 1}"}, "base.model.mlp.experts: 4: write no"),
        (
            {"model": "tied_embeddings: true, parameterization: mup, base_d_model: 8, base_head_dim: 8"},
            "base.model.parameterization: 'mup': write standard",
        ),
        ({"model": "family: recurrent, tied_embeddings: true"}, "a recurrent model reads one way"),
        ({"model": "family: encoder_decoder, tied_embeddings: true"}, "write span_corruption"),
        ({"mask_documents": "true"}, "base.data.mask_documents: True: write false: what contrastive reads"),
        ({"z_loss": 1e-4}, "base.optim.z_loss: 0.0001: write 0: similarities are bounded"),
        ({"parts": 2}, "execution.accumulation_steps: 2: write 1, or leave it out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(grid.GridError) as e:
        expanded(tmp_path, **changes)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("horizon", ["tokens: 1e6", "flops: 1e10"])
def test_a_recipe_counts_what_is_read_and_says_where_spans_are_too_long(tmp_path, horizon):
    text = (
        f"base: {{model: {{width: 16, tied_embeddings: true}}, horizon: {{{horizon}}}, data: {{seq_len: 32}},\n"
        "  eval: {curve_tokens: 256}, objective: {name: contrastive, negatives: 7, span: 8}}\n"
    )
    path = tmp_path / "g.yaml"
    path.write_text(text)
    (one,) = grid.load(path).cells
    assert one.run.batch_tokens in (512, 1024, 2048)  # the recipe's own sizes, in tokens read: rows of 16
    assert one.run.batch_size == one.run.batch_tokens // 16
    path.write_text(text.replace("span: 8", "span: 17"))
    with pytest.raises(grid.GridError, match=r"base.objective.span: 17: write half of data.seq_len or less"):
        grid.load(path)


def test_too_little_validation_and_parts_are_refused_where_there_is_no_grid():
    stream = data.open(DataConfig(source="synthetic:markov", seq_len=T), None)
    with pytest.raises(ValueError, match=r"^data.validation_fraction: validation has 5 windows, .* is of 6: write a"):
        require_windows(run_of().objective, stream, 5 * T)
    require_windows(run_of().objective, stream, 6 * T)
    on = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(on), pytest.raises(ValueError, match=r"^execution.accumulation_steps is 2: write 1"):
        programs.lower(program_key(run_of(batch_size=16)), ExecutionConfig(accumulation_steps=2), 1, on)
