"""Each rule on a grid that breaks it and on one that does not; the drift's bias against a fit of the whole law."""

import dataclasses
import re

import numpy as np
import pytest

from scaling import accounting, grid
from scaling.config import DataConfig
from scaling.engine.plan import lint, table
from scaling.engine.plan.lint import Expected

SIZES = [16, 24, 32, 40, 48]


def rows_of(raw):
    return table.rows(grid.expand(raw, name="g").cells)


def isoflop(budgets=(3e11, 6e11, 1.2e12), sizes=SIZES, **more):
    return {"base": {"data": {"seq_len": 128}}, "isoflop": {"budgets": list(budgets), "sizes": list(sizes)}, **more}


def one(optim=None, horizon=None, **more):
    base = {
        "model": {"width": 16},
        "horizon": horizon or {"steps": 1000},
        "batch_size": 8,
        "optim": optim or {},
        **more,
    }
    return {"base": base}


WRITTEN = {"peak_lr": 0.01, "warmup_tokens": 0}


def spans(recipe="default@2", axes=None, **more):
    objective = {"name": "span_corruption"}
    raw = one(model={"width": 16, "family": "encoder_decoder"}, objective=objective, **more)
    return raw | {"recipe": recipe} | ({"axes": axes} if axes else {})


def findings(rule, raw, expected=None):
    return rule(rows_of(raw) if isinstance(raw, dict) else raw, expected or Expected())


def test_groups_of_laws_of_their_own_are_looked_at_apart():
    raw = isoflop(axes={"data.source": ["python-stdlib", "text:a"]})
    rows = rows_of(raw)
    together = lint.check((rows, Expected()))
    assert "several datasets" in {f.rule for f in together}
    groups = grid.expand({**raw, "fit": {"by": "data.source"}}, name="g").groups
    apart = lint.check(*(([row for row in rows if row.run_id in ids], Expected()) for ids in groups.values()))
    assert {f.rule for f in apart} == {f.rule for f in together} - {"several datasets"}
    [decades] = [f for f in apart if f.rule == "few decades"]  # said once, of the cells of both
    assert sorted(decades.cells) == sorted(run_id for ids in groups.values() for run_id in ids)


def schedule(**values):
    return one({"schedule": values})


def sizes_alone(*widths):
    return {"base": {"horizon": {"tokens": 1e7}}, "axes": {"model.width": list(widths)}}


def small(recipe, tokens, **more):
    base = {"model": {"width": 16}, "data": {"seq_len": 128}, "horizon": {"tokens": tokens}, **more}
    return {"recipe": recipe, "base": base}


GOOD_AND_BAD = [
    (lint.long_warmup, one({"warmup_tokens": 102_400}), one({"warmup_tokens": 204_800}), "20%"),
    (lint.few_steps, one(horizon={"steps": 200}), one(horizon={"steps": 199}), "batch_size at most 7"),
    (lint.optimum_outside, isoflop(), isoflop(sizes=[16, 24, 32]), "too small"),
    (lint.optimum_outside, isoflop(), isoflop(sizes=[64, 80, 96], budgets=[1e11, 2e11]), "too large"),
    (lint.few_decades, isoflop(budgets=[1e10, 1e11, 1e12, 1e13]), isoflop(budgets=[1e10, 1e11, 1e12]), "2 decades"),
    (lint.few_decades, isoflop(budgets=[1e11, 2e11]), isoflop(budgets=[1e11, 2e11, 4e11]), "0.6 decades"),
    (lint.few_decades, sizes_alone(16, 128, 1024), sizes_alone(16, 24, 32), "0.6 decades of parameters: an exponent's"),
    (lint.not_annealed, schedule(name="cosine", final_lr_fraction=0.1), schedule(name="constant"), ".57"),
    (lint.not_annealed, schedule(name="linear"), schedule(name="cosine", final_lr_fraction=0.2), "final_lr_fraction"),
    (lint.not_annealed, schedule(name="wsd"), schedule(name="wsd", cooldown_fraction=0.0), "cooldown"),
    (lint.large_head, one(model={"width": 16}), one(model={"width": 8}), "57%"),
    (lint.foreign_recipe, one(), one(model={"width": 16, "family": "recurrent"}), "are of model.family recurrent:"),
    (lint.foreign_recipe, spans(recipe="none", optim=WRITTEN), spans(), "of model.family encoder_decoder under obj"),
    (lint.foreign_recipe, spans(axes={"recipe.lr_scale": [1, 2]}), one(objective={"name": "masked"}), "objective mask"),
    # default@3 asks for 512 (D / 1.6M)^.6 tokens, 89.2 at 87K.
    (lint.rounded_batch, small("default@3", 1.2e5), small("default@3", 8.7e4), "1.43 times the recipe's"),
    (
        lint.rounded_batch,
        small("default@3", 8.7e4, data={"seq_len": 64}),
        small("default@3", 8.7e4),
        "seq_len at most 64",
    ),
    (lint.rounded_batch, small("default@3", 8.7e4, batch_size=7), small("default@3", 3.3e5), "1.29 times"),
    (lint.rounded_batch, small("none", 8.7e4, batch_size=1, optim=WRITTEN), small("default@3", 8.7e4), "(exclude)"),
    (lint.mixed_data, isoflop(), isoflop(axes={"data.source": ["python-stdlib", "text:a"]}), "fit.by data.source"),
    (lint.mixed_data, isoflop(seeds=[0, 1]), isoflop(axes={"data.tokenizer": ["bytes", "bpe:512"]}), "fit.by data.tok"),
]


@pytest.mark.parametrize("rule, good, bad, says", GOOD_AND_BAD)
def test_a_rule_says_nothing_of_a_good_grid_and_what_to_edit_of_a_bad_one(rule, good, bad, says):
    assert findings(rule, good) == []
    found = findings(rule, bad)
    assert found
    ids = {row.run_id for row in rows_of(bad)}
    for finding in found:
        assert set(finding.cells) <= ids
        assert finding.cells
        assert "\n" not in str(finding)
        assert "Edit: " in finding.text
    assert says in " ".join(map(str, found))


def test_a_heads_share_is_of_the_tokens_that_meet_it():
    """Of an encoder-decoder few tokens are written, so that the head works less than its weights say."""

    def head_share(vocab_size):
        model = {"width": 16, "family": "encoder_decoder", "vocab_size": vocab_size}
        raw = one(model=model, objective={"name": "span_corruption"}, data={"seq_len": 128})
        run = grid.expand(raw, name="g").cells[0].run
        counts, lengths = accounting.trained(run.model, run.objective), run.lengths
        tokens = {"read": lengths.read, "written": lengths.written}
        products = [p.weights * tokens[p.over] for p in counts.products]
        return raw, products[-1] / sum(products), counts.head_weights / (counts.head_weights + counts.inner_weights)

    few, share, of_weights = head_share(1500)
    assert share < 0.5 < of_weights
    assert findings(lint.large_head, few) == []
    many, share, _ = head_share(4000)
    (found,) = findings(lint.large_head, many)
    assert f"up to {share:.0%} of the multiplications" in found.effect


def test_decades_are_counted_among_fitted_cells_only():
    budgets = [1e10, 1e11, 1e12, 1e13]
    assert findings(lint.few_decades, isoflop(budgets)) == []
    assert findings(lint.few_decades, isoflop(budgets[:1])) == []  # one level is no attempt at an exponent
    assert findings(lint.few_decades, isoflop(budgets, holdout={"budgets": [1e13]}))


def test_the_exponents_error_is_that_of_a_straight_line():
    """±10 % on each of four minima: the error of a least-squares slope, by simulation."""
    budgets = np.array([3e11, 6e11, 1.2e12, 2.4e12])
    noise = np.random.default_rng(0).normal(0, 0.1, (20_000, 4))
    slopes = np.polyfit(np.log(budgets), noise.T, 1)[0]
    (finding,) = findings(lint.few_decades, isoflop(budgets))
    assert f"±{1.96 * slopes.std():.2f}," in finding.effect


def test_a_fit_of_the_sweep_replaces_the_rule_of_thumb():
    fit = {
        "convention": {"num_params": "non_embedding"},
        "allocation": {"a": 0.6, "tokens_per_param": {"1e11": {"value": 400.0}, "2e11": {"value": 900.0}}},
    }
    expected = Expected.from_fit(fit)
    assert expected.tokens_per_param == pytest.approx(600.0)
    assert expected.exponent == 0.6
    large = isoflop(sizes=[48, 64, 80])
    assert findings(lint.optimum_outside, large, expected)
    assert "this sweep's own fit" in findings(lint.optimum_outside, large, expected)[0].effect
    assert Expected.from_fit({}) == Expected() == Expected.from_fit({"error": "too few", "allocation": None})


def drifting(shift):
    """Five sizes a factor of four about 20 tokens a parameter, the centre leaving that by ``shift`` (ln N per ln C)."""
    rows, shapes = [], rows_of(isoflop(budgets=[1e12]))
    for budget in 1e15 * 10.0 ** np.arange(4):
        for x in np.linspace(-np.log(4), np.log(4), 5):
            num_params = np.exp(0.5 * np.log(budget / 120) + shift * np.log(budget / 1e15) + x)
            row = shapes[0]
            head = row.cell.run.model.d_model * row.cell.run.model.vocab_size
            counts = {**row.plan.num_params, "non_embedding": num_params - head}
            rows.append(
                table.Row(
                    dataclasses.replace(row.cell, labels={"budget_flops": budget}),
                    dataclasses.replace(row.plan, num_params=counts, num_tokens=budget / 6 / num_params),
                )
            )
    return rows


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_drift_is_what_it_does_to_the_exponent_of_a_noise_free_law(shift):
    """An IsoFLOP fit of the Chinchilla law itself, sizes drifting, against its own exponent."""
    rows = drifting(shift)
    alpha, beta, A, B = lint.ALPHA, lint.BETA, 406.4, 410.7
    a_true = beta / (alpha + beta)
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    minima, budgets = [], sorted({row.cell.labels["budget_flops"] for row in rows})
    middle = np.exp(np.log(budgets).mean())
    for budget in budgets:
        cells = [row for row in rows if row.cell.labels["budget_flops"] == budget]
        log_n = np.log([lint._num_params(row, Expected()) for row in cells])
        optimum = np.log(G * (budget / 6) ** a_true)
        # the law's own optimum lies elsewhere: keep the offsets that the sizes have from the one expected
        expected = 0.5 * np.log(middle / 120) + a_true * np.log(budget / middle)
        x = optimum + log_n - expected
        loss = A * np.exp(-alpha * x) + B * (budget / 6 / np.exp(x)) ** -beta
        curvature, slope, _ = np.polyfit(x - optimum, loss, 2)
        minima.append(-slope / (2 * curvature))
    bias = np.polyfit(np.log(budgets), minima, 1)[0]
    (finding,) = findings(lint.drifting_centres, rows, Expected(exponent=a_true))
    assert f"{bias:+.3f}" in finding.effect


def test_no_drift_is_no_finding():
    assert findings(lint.drifting_centres, drifting(0.0)) == []
    offset = dataclasses.replace(Expected(), tokens_per_param=100.0)
    assert findings(lint.drifting_centres, drifting(0.0), offset) == []


def test_one_cosine_a_shape_cannot_stand_for_shorter_runs():
    def grid_of(**schedule):
        base = {"horizon": {"tokens": 1e6}, "optim": {"schedule": schedule}}
        return {"base": base, "axes": {"model.width": [16, 24, 32]}}

    assert findings(lint.unmatched_cosine, grid_of(name="wsd")) == []
    assert "figure A1" in findings(lint.unmatched_cosine, grid_of(name="cosine"))[0].effect
    several = {"base": {"optim": {"schedule": {"name": "cosine"}}}}
    several["axes"] = {"model.width": [16, 24, 32], "horizon.tokens": [1e6, 2e6]}
    assert findings(lint.unmatched_cosine, several) == []


def test_no_batch_is_proposed_that_an_objective_refuses():
    told = {
        "base": {"model": {"width": 16, "tied_embeddings": True}, "objective": {"name": "contrastive", "negatives": 7}}
    }
    told["base"] |= {"horizon": {"steps": 100}, "batch_size": 8}
    (finding,) = findings(lint.few_steps, told)
    assert finding.edit.startswith("longer horizons")


def test_data_that_repeats_or_validates_too_little_is_said_where_it_is_known():
    rows = rows_of(one(horizon={"tokens": 1e6}))
    data = rows[0].cell.run.data
    assert lint.repeated_data(rows, Expected(train_tokens={data: 2_000_000})) == []
    one_epoch = rows[0].plan.num_tokens - rows[0].plan.batch_tokens // 2  # whose last batch is half of the second
    assert lint.repeated_data(rows[:1], Expected(train_tokens={data: one_epoch})) == []
    (finding,) = lint.repeated_data(rows, Expected(train_tokens={data: 400_000}))
    assert "2.5 epochs" in finding.effect
    assert lint.repeated_data(rows, Expected(train_tokens={DataConfig(source="text:x"): 10})) == []
    assert lint.small_validation(rows, Expected(validation_tokens={data: 517_000})) == []
    part = rows_of(one(horizon={"tokens": 1e6}, eval={"final_tokens": 50_000}))
    (finding,) = lint.small_validation(part, Expected(validation_tokens={data: 517_000}))
    assert finding.effect.startswith("50,000 validation tokens")
    advised = int(re.search(r"eval.final_tokens (\d+)", finding.edit)[1])
    mended = rows_of(one(horizon={"tokens": 1e6}, eval={"final_tokens": advised}))
    assert lint.small_validation(mended, Expected(validation_tokens={data: 517_000})) == []
    (finding,) = lint.small_validation(rows, Expected(validation_tokens={data: 50_000}))
    assert f"{lint.LOSS_NOISE / 50_000**0.5:.3f} nats" in finding.effect
    # What is advised can be written: the fraction named is one that a grid takes and that suffices, or none is named.
    advised = float(re.search(r"validation_fraction ([\d.]+)", finding.edit)[1])
    enough = dataclasses.replace(data, validation_fraction=advised)
    got = round(50_000 * advised / data.validation_fraction)
    assert (
        lint.small_validation(
            rows_of(one(horizon={"tokens": 1e6}, data={"validation_fraction": advised})),
            Expected(validation_tokens={enough: got + 5_000}),
        )
        == []
    )
    (finding,) = lint.small_validation(rows, Expected(validation_tokens={data: 9_000}))
    assert "validation_fraction" not in finding.edit
    assert "291,600 tokens" in finding.edit


def test_decay_under_mup_is_said():
    mup = {"width": 32, "parameterization": "mup", "base_d_model": 16, "base_head_dim": 16}
    (finding,) = findings(lint.mup_decay, one(model=mup, optim={"weight_decay": 0.1, "peak_lr": 0.01}))
    assert "m up to 2 here" in finding.effect
    assert findings(lint.mup_decay, one(model=mup, optim={"weight_decay": 0.0, "peak_lr": 0.01})) == []
    assert findings(lint.mup_decay, one(model={**mup, "width": 16}, optim={"weight_decay": 0.1, "peak_lr": 0.01})) == []
    assert findings(lint.mup_decay, one(optim={"weight_decay": 0.1, "peak_lr": 0.01})) == []


def test_what_cannot_fit_its_devices_is_said():
    rows = rows_of(one())
    least = rows[0].plan.state_bytes + 4 * rows[0].plan.num_params["total"]
    assert lint.too_large(rows, Expected(device_memory=least)) == []
    assert "will not run" in lint.too_large(rows, Expected(device_memory=least - 1))[0].effect
    compiled = [dataclasses.replace(row, memory_bytes=10**12) for row in rows]
    assert "1e+03 GB" in lint.too_large(compiled, Expected(device_memory=9e11))[0].effect


def test_the_grids_of_this_project_raise_what_is_known_of_them():
    found = {}
    for name in ("chinchilla", "smoke", "learning_rate"):
        rows = table.rows(grid.load(f"{grid.__file__.rpartition('scaling')[0]}sweeps/{name}.yaml").cells)
        found[name] = [finding.rule for finding in lint.check((rows, Expected()))]
    assert found == {
        "chinchilla": ["few decades"],
        "smoke": ["few steps", "few decades", "large head"],
        "learning_rate": [],
    }
