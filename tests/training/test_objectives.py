"""What every objective must pass, over ``OBJECTIVES``; and masked tokens, by their definition."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling import accounting, grid, objectives, records
from scaling.config import DataConfig, Horizon, RunConfig, program_key
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.counting import Lengths
from scaling.fields import canonical_json, from_dict, to_dict
from scaling.objectives import OBJECTIVES
from scaling.objectives.masked import Masked
from scaling.training import loop, optimizers, step
from scaling.training.evaluation import keys_of
from scaling.training.losses import of_batch
from tests.training.lab import cell, make_corpus

T, V = 64, 257


def windows(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, T + 1), dtype=np.int32)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_a_function_of_windows_and_keys_whatever_rows_are_made_together(name):
    objective, config = OBJECTIVES[name], OBJECTIVES[name].Config()
    x, keys = windows(12), keys_of(3, np.arange(12, dtype=np.uint64))
    whole = objective.batch(config, V, x, keys)
    assert {n: (a.shape[1], a.dtype.name) for n, a in whole.items()} == objective.batch_spec(config, T)
    for rows in (slice(0, 5), slice(5, 12), slice(1, 12, 3)):
        part = objective.batch(config, V, x[rows], keys[rows])
        for n, a in whole.items():
            assert_array_equal(part[n], a[rows])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_as_many_tokens_carry_loss_as_it_says(name):
    objective, config = OBJECTIVES[name], OBJECTIVES[name].Config()
    present = (np.arange(T) < np.array([T, 7, 1, 0, T])[:, None]).astype(np.float32)
    batch = objective.batch(config, V, windows(5), keys_of(0, np.arange(5, dtype=np.uint64)), present)
    assert_array_equal(batch["weights"].sum(axis=1), objective.predicted(config, present.sum(axis=1)))
    lengths = objective.lengths(config, T)
    assert lengths.predicted == int(objective.predicted(config, np.array([T]))[0])
    if lengths.passes > 1:  # a loss of sequences, not of their tokens
        assert batch["weights"].shape == (5, 1)
        return
    assert batch["weights"].shape == (5, lengths.written)
    if objective.sees != "prefix":
        assert (batch["weights"] <= present).all()
        assert lengths == Lengths(0, T, lengths.predicted)


def test_the_usual_objective_leaves_ids_as_they_were():
    run = cell(make_data(), steps=24).run
    assert "objective" not in json.loads(canonical_json(run))
    again = from_dict(RunConfig, json.loads(json.dumps(to_dict(run))))
    assert again == run
    old = {k: v for k, v in to_dict(run).items() if k != "objective"}
    assert from_dict(RunConfig, old).run_id == run.run_id
    other = dataclasses.replace(run, objective=Masked())
    assert other.run_id != run.run_id
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(other)))) == other
    assert dataclasses.replace(run, objective=Masked(rate=0.3)).run_id != other.run_id


def make_data():
    return DataConfig(seq_len=16)


def test_masked_tokens_are_chosen_hidden_and_replaced_as_bert_does():
    rows = 4000
    x, keys = windows(rows), keys_of(1, np.arange(rows, dtype=np.uint64))
    batch = OBJECTIVES["masked"].batch(Masked(), V, x, keys)
    assert_array_equal(batch["targets"], x[:, 1:])
    chosen = batch["weights"] > 0
    assert (chosen.sum(axis=1) == round(0.15 * T)).all()
    assert_array_equal(batch["inputs"][~chosen], x[:, 1:][~chosen])
    shown, true = batch["inputs"][chosen], x[:, 1:][chosen]
    n = chosen.sum()
    assert np.mean(shown == V - 1) == pytest.approx(0.8, abs=4 * (0.16 / n) ** 0.5)
    assert np.mean(shown == true) == pytest.approx(0.1 + 0.1 / 256, abs=4 * (0.09 / n) ** 0.5)
    other = shown[(shown != V - 1) & (shown != true)]
    assert (
        np.bincount(other, minlength=256).std() / np.bincount(other, minlength=256).mean() < 0.4
    )  # evenly drawn: .32 by chance
    per_place = chosen.mean(axis=0)
    assert np.abs(per_place - 0.15).max() < 4 * (0.15 * 0.85 / rows) ** 0.5  # no place is preferred
    assert not (OBJECTIVES["masked"].batch(Masked(), V, x, keys + np.uint64(rows))["weights"] == batch["weights"]).all()


def test_a_masked_model_costs_attention_both_ways():
    run = cell(make_data()).run
    both = accounting.flops_of(dataclasses.replace(run, objective=Masked()))
    assert both == accounting.flops_per_token(run.model, 16, causal=False)
    assert both["exact"] > accounting.flops_of(run)["exact"]


def masked_cell(data_config, steps=24, **changes):
    one = cell(data_config, steps=steps)
    model = dataclasses.replace(one.run.model, vocab_size=264)  # which a mesh divides
    run = dataclasses.replace(one.run, objective=Masked(), model=model, **changes)
    return dataclasses.replace(one, run=run)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return make_corpus(folder, tmp_path_factory.mktemp("cache"))


def train(corpus, folder, cells, execution=None):
    return loop.train(
        cells, execution=execution or ExecutionConfig(mesh=MeshConfig(data=1, fsdp=8), eval_batch_size=8),
        workdir=folder / "work", results=folder / "results", cache_dir=corpus[1], sweep_name="t",
    )  # fmt: skip


@pytest.mark.slow
def test_a_masked_run_trains_is_validated_on_what_is_masked_and_is_the_same_on_any_mesh(corpus, tmp_path):
    (one,) = train(corpus, tmp_path / "a", [masked_cell(corpus[0], steps=60)])
    assert one.status == "completed"
    assert one.loss < np.log(257) - 1
    assert one.bits_per_byte is None  # of a masked token no text is written
    assert 0.1 < one.num_eval_tokens / one.data["validation_tokens"] < 0.2
    other = ExecutionConfig(mesh=MeshConfig(data=2, fsdp=2, tensor=2), accumulation_steps=2, eval_batch_size=8)
    (same,) = train(corpus, tmp_path / "b", [masked_cell(corpus[0], steps=60)], other)
    assert same.num_eval_tokens == one.num_eval_tokens
    assert_allclose(same.curve["loss"], one.curve["loss"], rtol=2e-4)
    assert records.read(records.path_of(tmp_path / "a" / "results", one.run_id)).config["objective"]["rate"] == 0.15


@pytest.mark.slow
def test_weights_of_a_batch_in_parts_are_those_of_the_whole():
    """The mean of parts' means is the weighted mean of the batch, however unevenly its weights fall."""
    run = dataclasses.replace(
        cell(make_data(), weight_decay=0.0).run, objective=Masked(), horizon=Horizon(steps=4),
    )  # fmt: skip
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=257))
    x = np.random.default_rng(0).integers(0, 200, (8, 17), dtype=np.int32)
    batch = objectives.of(run.objective).batch(run.objective, 257, x, keys_of(0, np.arange(8, dtype=np.uint64)))
    uneven = batch["weights"] * np.linspace(0.2, 3, 8)[:, None].astype(np.float32)
    batch = {**batch, "weights": uneven}
    hp = optimizers.hyperparams(run.optim, accounting.plan(run))
    state = jax.jit(lambda: step.init_state(program_key(run), 0, hp))()

    def one_step(parts):
        execution = ExecutionConfig(accumulation_steps=parts)
        return jax.jit(lambda s, b: step.train_step(run, execution, s, b))(state, batch)

    (whole, m1), (parts, m4) = one_step(1), one_step(4)
    losses, weights = jax.jit(lambda p: of_batch(run, ExecutionConfig(), p, batch)[:2])(state["params"])
    assert m1["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)
    assert m4["loss"] == pytest.approx(float(m1["loss"]), rel=1e-5)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=2e-5), whole["params"], parts["params"])


GRID = """
recipe: none
base: {{model: {model}, optim: {{peak_lr: 0.01, warmup_tokens: 0}}, horizon: {{steps: 9}}, batch_size: 4{more}}}
"""


REPLACED = ", objective: {name: replaced_token}"


def refused(tmp_path, model, more=""):
    path = tmp_path / "g.yaml"
    path.write_text(GRID.format(model=model, more=more))
    with pytest.raises(grid.GridError) as e:
        grid.load(path)
    return str(e.value)


@pytest.mark.parametrize(
    "model, more, words",
    [
        ("{width: 16, family: recurrent, d_ff: 8}", "", "base.model.d_ff: family recurrent has no d_ff; write one of"),
        ("{width: 16, family: recurrent, qk_norm: true}", "", "base.model.qk_norm: family recurrent has no qk_norm"),
        ("{width: 16, family: recurrent, cell: foo}", "", "base.model.cell: 'foo' is not one of rnn, lstm, gru"),
        ("{width: 16, cell: gru}", "", "base.model.cell: family transformer has no cell"),
        ("{width: 16, family: lstm}", "", "is not one of transformer, recurrent, encoder_decoder"),
        ("{width: 16}", ", objective: {rate: 0.3}", "base.objective.rate: objective next_token has no rate"),
        ("{width: 16}", ", objective: {name: masked, rate: 2}", "base.objective.rate: 2.0: write a share"),
        (
            "{width: 16}",
            ", objective: {name: bert}",
            "is not one of next_token, masked, replaced_token, span_corruption, contrastive",
        ),
        ("{width: 16, family: recurrent}", ", objective: {name: masked}", "a recurrent model reads one way"),
        ("{width: 16}", ", objective: {name: masked}, data: {mask_documents: true}", "write false"),
        ("{width: 16, num_encoder_layers: 2}", "", "base.model.num_encoder_layers: family transformer has no"),
        ("{width: 16, family: encoder_decoder}", "", "write span_corruption: of family encoder_decoder are models"),
        (
            "{width: 16}",
            ", objective: {name: span_corruption, mean_span: 500}",
            "base.objective.mean_span: 500.0: write less than",
        ),
        ("{width: 16}", REPLACED, "base.model.tied_embeddings: False: write true: the disc"),
        ("{width: 16, tied_embeddings: true, family: recurrent}", REPLACED, "a recurrent model reads one way"),
        (
            "{width: 16, tied_embeddings: true, parameterization: mup, base_d_model: 8, base_head_dim: 8}",
            REPLACED,
            "write standard",
        ),
        (
            "{width: 16, tied_embeddings: true}",
            ", objective: {name: replaced_token, generator_width: 2}",
            "base.objective.generator_width: 2.0: write a share",
        ),
        ("{width: 16, family: recurrent, parameterization: mup, base_d_model: 8}", "", "write standard"),
    ],
)
def test_bad_settings_are_one_line_with_what_to_write(tmp_path, model, more, words):
    assert words in refused(tmp_path, model, more)


def test_a_grid_of_both_families_and_objectives_expands(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(
        "base: {optim: {peak_lr: 0.01}, horizon: {tokens: 1e5}, data: {seq_len: 32}}\n"
        "axes: {kind: [{model: {width: 16}}, {model: {params: 5e3, family: recurrent}, label: gru},\n"
        "  {model: {width: 16, family: recurrent, cell: lstm}, label: lstm},\n"
        "  {model: {width: 16}, objective: {name: masked}, label: bert},\n"
        "  {model: {width: 16, family: encoder_decoder}, objective: {name: span_corruption}, label: t5}]}\n"
    )
    a, b, lstm, c, d = (one.run for one in grid.load(path).cells)
    assert (a.model.family, b.model.family) == ("transformer", "recurrent")
    assert (b.model.cell, lstm.model.cell) == ("gru", "lstm")
    assert accounting.param_counts(b.model)["non_embedding"] == pytest.approx(5e3, rel=0.5)
    assert c.model.vocab_size == 257  # its own id for the mask
    assert isinstance(c.objective, Masked)
    assert (d.model.num_encoder_layers, d.model.vocab_size) == (2, 256 + 3)  # 5 of 32 tokens in 2 spans, and a last one
