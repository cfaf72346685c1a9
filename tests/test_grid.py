"""Grids: what they expand to, against counts made by hand; what they refuse, against the words a person should read."""

import math
from pathlib import Path

import pytest

from scaling import accounting, grid
from scaling.families import transformer
from scaling.grid import sizes, strict
from tests import counting

SWEEPS = sorted((Path(__file__).resolve().parent.parent / "sweeps").glob("*.yaml"))


def expand(text: str) -> grid.Grid:
    return grid.expand(strict.read_yaml(text), name="test", text=text)


def error_of(text: str) -> str:
    with pytest.raises(grid.GridError) as caught:
        expand(text)
    return str(caught.value)


# ---- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e17", 1e17),
        ("3e-3", 3e-3),
        ("3E+8", 3e8),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),  # YAML 1.1: eight
        ("1:30", "1:30"),  # YAML 1.1: ninety
        ("no", "no"),  # YAML 1.1: false
        ("2024-01-01", "2024-01-01"),  # YAML 1.1: a date
        ("true", True),
        ("~", None),
        ("", None),
        ("64x", "64x"),
        ("'1e17'", "1e17"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    found = strict.read_yaml(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_anchors_and_merge_keys_work():
    raw = strict.read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a]\n")
    assert raw["b"] == {"x": 1, "y": 3}
    assert raw["c"] == [{"x": 1, "y": 2}]


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, num_layers, matmul_params",
    [  # the sizes of the feasibility study, and their published 12 L d^2
        (16, 2, 6_144),
        (24, 2, 13_824),
        (32, 2, 24_576),
        (48, 3, 82_944),
        (64, 3, 147_456),
        (96, 4, 442_368),
    ],
)
def test_shape_follows_from_width(width, num_layers, matmul_params):
    run = expand(f"base: {{horizon: {{tokens: 1e6}}, model: {{width: {width}}}}}").cells[0].run
    counts = accounting.param_counts(run.model)
    assert (run.model.d_model, run.model.num_layers) == (width, num_layers)
    assert counts["attention"] + counts["mlp"] == matmul_params


@pytest.mark.parametrize("width", [8, 16, 24, 40, 64, 80, 128, 256, 768, 1024, 2048, 4096, 12288])
def test_rule_keeps_its_word(width):
    shape = transformer.shape(width, {})
    assert shape["num_heads"] * shape["head_dim"] == width
    assert shape["head_dim"] in (8, 16, 32, 64, 128)
    assert shape["head_dim"] ** 2 <= 8 * width
    assert shape["d_ff"] == 4 * width
    assert transformer.shape(width, {})["num_layers"] <= transformer.shape(width + 8, {})["num_layers"]


def test_widths_between_multiples_of_eight_where_the_heads_are_written():
    model = expand("base: {horizon: {tokens: 1e6}, model: {width: 12, num_layers: 3, num_heads: 2}}").cells[0].run.model
    assert (model.d_model, model.num_layers, model.num_heads, model.head_dim, model.d_ff) == (12, 3, 2, 6, 48)


def test_rule_at_the_scale_of_known_models():
    assert transformer.shape(768, {})["num_layers"] == 12  # GPT-2, 12 heads of 64
    assert transformer.shape(768, {})["num_heads"] == 12
    assert transformer.shape(4096, {})["head_dim"] == 128  # 7B models


def test_swiglu_keeps_the_parameters():
    gelu, swiglu = (
        accounting.param_counts(expand(f"base: {{horizon: {{tokens: 1e7}}, model: {m}}}").cells[0].run.model)
        for m in ("{width: 256}", "{width: 256, activation: swiglu}")
    )
    assert swiglu["mlp"] == pytest.approx(gelu["mlp"], rel=0.01)


@pytest.mark.parametrize("target", [2e3, 1e4, 5e4, 1e6, 1.2e8, 7e9])
def test_params_dial_takes_the_nearest_width(target):
    cell = expand(f"base: {{horizon: {{tokens: 1e9}}, model: {{params: {target}}}}}").cells[0]
    assert cell.labels["target_params"] == target

    def off(width):  # brute force with the approximate count 12 L d^2, norms added by hand
        shape = transformer.shape(width, {})
        count = 12 * shape["num_layers"] * width**2 + (2 * shape["num_layers"] + 1) * width
        return abs(math.log(count / target))

    assert cell.run.model.d_model == min(sizes.WIDTHS, key=off)


def test_what_the_rule_decides_can_be_overridden():
    text = "base: {horizon: {tokens: 1e6}, model: {width: 48, num_layers: 5, num_heads: 6, num_kv_heads: 2, d_ff: 100}}"
    model = expand(text).cells[0].run.model
    assert (model.num_layers, model.num_heads, model.head_dim, model.num_kv_heads, model.d_ff) == (5, 6, 8, 2, 100)


# ---- what a grid expands to -----------------------------------------------------------------------------------------


def test_isoflop_cells_spend_their_budget():
    """Tokens from FLOPs counted by hand: 3 (2 · 12 L d² + 2 L T d + 2 d V) a token, causal attention."""
    found = expand("base: {data: {seq_len: 64}}\nisoflop: {budgets: [1e11, 4e11], sizes: [16, 48]}")
    assert [(c.labels["budget_flops"], c.labels["size"]) for c in found.cells] == [
        (1e11, "16x2"),
        (1e11, "48x3"),
        (4e11, "16x2"),
        (4e11, "48x3"),
    ]
    for cell in found.cells:
        d, L = cell.run.model.d_model, cell.run.model.num_layers
        per_token = 3 * (24 * L * d**2 + 2 * L * 64 * d + 2 * d * 256)
        plan = accounting.plan(cell.run)
        assert plan.requested_tokens == pytest.approx(cell.labels["budget_flops"] / per_token, rel=1e-12)
        assert abs(plan.num_tokens - plan.requested_tokens) <= plan.batch_tokens / 2


def test_budgets_with_sizes_of_their_own():
    found = expand("isoflop: {rule: 6ND, budgets: [1e11, {flops: 4e11, sizes: [{params: 5e4}, 32]}], sizes: [16]}")
    assert [c.labels["size"] for c in found.cells] == ["16x2", "40x3", "32x2"]
    assert {c.run.horizon.rule for c in found.cells} == {"6ND"}


def test_axes_multiply_in_file_order_and_groups_move_together():
    found = expand(
        """
        base: {horizon: {tokens: 1e6}, batch_size: 4}
        axes:
          shape:
            - {model: {width: 16}, batch_size: 8}
            - {model: {width: 24}, label: wide}
          optim.beta1: [0.8, 0.9]
        seeds: [3, 5]
        """
    )
    rows = [(c.run.model.d_model, c.run.batch_size, c.run.optim.beta1, c.run.seed) for c in found.cells]
    assert rows == [(w, b, m, s) for w, b in ((16, 8), (24, 4)) for m in (0.8, 0.9) for s in (3, 5)]
    assert found.cells[0].labels == {"shape": "width=16,batch_size=8", "beta1": 0.8, "size": "16x2"}
    assert found.cells[-1].labels["shape"] == "wide"


def test_the_grid_wins_over_the_recipe():
    text = "base: {{horizon: {{tokens: 1e6}}, model: {{width: 16}}, batch_size: 7, optim: {{{}}}}}"
    written = expand(text.format("peak_lr: 0.5, beta2: 0.5, weight_decay: 0, warmup_tokens: 1")).cells[0].run
    assert (written.optim.peak_lr, written.optim.beta2, written.optim.weight_decay) == (0.5, 0.5, 0.0)
    assert (written.optim.warmup_tokens, written.batch_size) == (1, 7)
    asked = expand(text.format("")).cells[0].run
    assert asked.batch_size == 7
    assert asked.optim.peak_lr == pytest.approx(0.01 * (6224 / 50_000) ** (-1 / 3), rel=1e-5)


def test_recipe_scales_and_recipes_as_axes():
    found = expand(
        """
        base: {horizon: {tokens: 1e6}, model: {width: 16}}
        axes: {recipe.lr_scale: [0.5, 1, 2], recipe.batch_scale: [1, 2], recipe: [default@1, porian@1]}
        """
    )
    assert len(found.cells) == 12
    by = {(c.recipe, c.labels["lr_scale"], c.labels["batch_scale"]): c.run for c in found.cells}
    for recipe in ("default@1", "porian@1"):
        one = by[recipe, 1.0, 1.0]
        assert by[recipe, 2.0, 1.0].optim.peak_lr == pytest.approx(2 * one.optim.peak_lr, rel=1e-5)
        assert by[recipe, 0.5, 2.0].optim.peak_lr == pytest.approx(one.optim.peak_lr / 2, rel=1e-5)
        assert abs(by[recipe, 1.0, 2.0].batch_size - 2 * one.batch_size) <= 1  # whole sequences


def test_another_optimisers_rate_is_tried_as_multiples_of_the_recipes():
    base = "base: {horizon: {tokens: 1e6}, model: {width: 16}}\n"
    axes = "axes: {optim.name: [adamw, lion], recipe.lr_scale: [0.25, 1]}"
    by = {(c.run.optim.name, c.labels["lr_scale"]): c.run.optim for c in expand(base + axes).cells}
    assert by["lion", 1.0].peak_lr == by["adamw", 1.0].peak_lr
    assert by["lion", 0.25].peak_lr == pytest.approx(by["adamw", 1.0].peak_lr / 4, rel=1e-5)


def test_no_recipe_asks_for_everything():
    run = "horizon: {steps: 10}, model: {width: 16}, batch_size: 4, optim: {peak_lr: 0.1, warmup_tokens: 0}"
    cell = expand(f"recipe: none\nbase: {{{run}}}").cells[0]
    assert cell.recipe is None
    assert accounting.plan(cell.run).num_steps == 10


def test_values_are_of_their_type_so_that_equal_grids_hash_equal():
    one, other = (
        expand(f"base: {{horizon: {{tokens: {tokens}}}, batch_size: {batch}, model: {{width: 16}}}}").cells[0].run
        for tokens, batch in (("1e6", "16"), ("1_000_000", "16.0"))
    )
    assert one == other
    assert one.run_id == other.run_id
    assert type(other.batch_size) is int
    assert type(other.horizon.tokens) is float


def test_holdout_and_exclude_select_by_label_path_and_alternatives():
    base = "isoflop: {budgets: [1e11, 2e11, 4e11], sizes: [16, 24, 32]}\nseeds: [0, 1]\n"
    held = [c for c in expand(base + "holdout: {budgets: [4e11]}").cells if c.holdout]
    assert {c.labels["budget_flops"] for c in held} == {4e11}
    assert len(held) == 6
    held = [c for c in expand(base + "holdout: {cells: [{width: [16, 32], budget_flops: 2e11, seed: 1}]}").cells]
    assert [(c.labels["size"], c.run.seed) for c in held if c.holdout] == [("16x2", 1), ("32x2", 1)]
    left = expand(base + "exclude: [{size: 16x2}, {model.d_ff: 96, seed: 0}]").cells
    assert len(left) == 18 - 6 - 3


def test_execution_and_fit_are_not_part_of_a_run():
    base = "isoflop: {budgets: [1e11], sizes: [16]}\n"
    plain, told = (
        expand(base),
        expand(base + "execution: {mesh: {data: 2}, remat: full}\nfit: {flops: 6ND, delta: null}"),
    )
    assert told.execution.mesh.data == 2
    assert (told.fit.flops, told.fit.delta) == ("6ND", None)
    assert plain.cells == told.cells


@pytest.mark.slow
def test_a_cell_costs_the_same_in_a_thousand():
    """0.6 ms a cell on a machine of 2026: some 1,300 calls, however many cells there are."""

    def wide(num: int) -> grid.Grid:
        lrs, betas = [i / 100 for i in range(1, 1 + num)], [i / 100 for i in range(90, 90 + num)]
        axes = {"model.width": list(range(16, 96, 8)), "optim.peak_lr": lrs, "optim.beta2": betas}
        return grid.expand({"base": {"horizon": {"tokens": 1e7}}, "axes": axes}, name="wide")

    assert len({c.run.run_id for c in wide(10).cells}) == 1000  # and what is found once has been found
    few, many = counting.calls(lambda: wide(1)), counting.calls(lambda: wide(10))
    assert many < 100 * few
    assert many < 2000 * 1000


# ---- the sweeps of this repository ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_expands_and_keeps_the_rules(path):
    found = grid.load(path, epoch_tokens=lambda data: 1_000_000)
    assert found.name == path.stem
    assert found.text == path.read_text(encoding="utf-8")
    for cell in found.cells:
        plan = accounting.plan(cell.run)
        assert plan.warmup_steps <= plan.num_steps / 10
        assert cell.run.optim.schedule.name == "wsd"
        assert plan.num_steps >= 100


def test_default_grid_is_what_the_readme_promises():
    found = grid.load(next(p for p in SWEEPS if p.stem == "chinchilla"))
    fitted = {}
    for cell in found.cells:
        if not cell.holdout:
            fitted.setdefault(cell.labels["budget_flops"], []).append(accounting.plan(cell.run))
    held = {c.labels["budget_flops"] for c in found.cells if c.holdout}
    assert len(fitted) == 7
    assert max(fitted) / min(fitted) == pytest.approx(10**2.3, rel=0.01)
    assert [len({plan.num_params["non_embedding"] for plan in plans}) for plans in fitted.values()] == [
        3,
        *[4] * 4,
        5,
        5,
    ]
    assert min(held) == pytest.approx(4 * max(fitted))
    assert min(plan.num_steps for plans in fitted.values() for plan in plans) >= 600


# ---- what a grid refuses: (text, what the one line must say) --------------------------------------------------------

RUN = "horizon: {tokens: 1e6}, model: {width: 16}"
ISO = "isoflop: {budgets: [3e11], sizes: [16, 24]}\n"
BAD = {
    "bsae: {}": "bsae: unknown key; did you mean 'base'?",
    "- 1": "grid: [1] is not a mapping; write `key: value` lines",
    "": "grid: None is not a mapping; write `key: value` lines",
    "base: {1: 2}": "base.1: the key is not text; write it in quotes",
    "base: {width: 64}\n" + ISO: "base.width: unknown key; did you mean 'model.width'?",
    "base: {horizon: {tokens: 1e6}}\naxes: {size: [{model: {width: 8}}, {model: {d_modle: 64}}]}": (
        "axes.size[1].model.d_modle: unknown key; did you mean 'd_model'?"
    ),
    "base: {horizon: {tokens: 1e6}}\naxes: {size: [{model: {width: 8}}, {model: {d_model: 64x}}]}": (
        "axes.size[1].model.d_model: '64x' is not an integer; write e.g. 64"
    ),
    "base: {horizon: {tokens: '1e17'}}": "base.horizon.tokens: '1e17' is text, not a number; write 1e17 without quotes",
    "base: {batch_size: '64'}": "base.batch_size: '64' is text, not an integer; write 64 without quotes",
    "base: {horizon: {tokens: true}}": "base.horizon.tokens: True is not a number; write e.g. 0.01",
    "base: {batch_size: 2.5}": "base.batch_size: 2.5 is not an integer; write e.g. 2",
    "base: {horizon: {tokens: .nan}}": "base.horizon.tokens: '.nan' is not a number; write e.g. 0.01",
    "base: {horizon: {tokens: 1e400}}": "base.horizon.tokens: inf is out of range",
    "base: {model: {qk_norm: 1}}": "base.model.qk_norm: 1 is not true or false; write one of the two",
    "base: {data: {source: 3}}": "base.data.source: 3 is not text; write it in quotes",
    "base: {model: {activation: gelo}}": "base.model.activation: 'gelo' is not one of gelu, swiglu, relu2, relu, geglu",
    "base: {horizon: {tokens: 1e6, flops: 1e12}, model: {width: 16}}": (
        "base.horizon.flops: 1e+12: flops is a second horizon beside tokens, 1e+06 at base.horizon.tokens; write one"
    ),
    f"base: {{{RUN}}}\n{ISO}": "isoflop.budgets[0]: 3e+11: flops is a second horizon beside tokens",
    "base: {model: {d_model: 16}}\n" + ISO: "base.model.d_model: 16: d_model is a second model beside width, 16 at",
    "base: {model: {width: 16}}": "base: horizon is missing; write one of horizon.tokens, horizon.flops",
    "base: {horizon: {tokens: 1e6}}": "base: model is missing; write one of model.width, model.params, model.d_model",
    "base: {horizon: {tokens: 1e6}, model: {d_model: 64, num_layers: 2}}": "base.model.num_heads: missing; write",
    f"recipe: none\nbase: {{{RUN}, optim: {{beta2: 0.5}}}}": "base.optim.peak_lr: missing; write a value",
    f"base: {{{RUN}, optim: {{beta2: 1.5}}}}": "base.optim.beta2: 1.5: write a number in [0, 1)",
    f"base: {{{RUN}, batch_size: 0}}": "base.batch_size: 0: write a positive number",
    f"base: {{{RUN}, data: {{seq_len: 0}}}}": "base.data.seq_len: 0: write a positive number",
    f"base: {{{RUN}, data: {{tokenizer: 'bpe:9'}}}}": "base.data.tokenizer: 'bpe:9'",
    f"base: {{{RUN}, optim: {{name: sgd}}}}": (
        "default@2 cannot give sgd's rate: it is AdamW's; write recipe.lr_scale, the multiples of it to try, or optim"
    ),
    f"base: {{{RUN.replace('16', '16, parameterization: mup, base_d_model: 16, base_head_dim: 8')}}}": (
        "default@2 cannot give μP's rate: it falls with size, and μP's does so by itself; write optim.peak_lr"
    ),
    f"base: {{{RUN.replace('16', '16, base_d_model: 8')}}}": "base.model.base_d_model: 8: write null, or set param",
    "base: {horizon: {tokens: 1e6}, model: {width: 16, head_dim: 4, num_heads: 3, num_kv_heads: 2}}": (
        "base.model.num_kv_heads: 2: write a divisor of num_heads (3)"
    ),
    "base: {horizon: {tokens: 1e6}, model: {width: 20}}": "base.model.width: 20 is not a width on the rule; write a",
    "base: {horizon: {tokens: 1e6}, model: {width: 18, num_heads: 2}}": "18 is not a width on the rule; write a mul",
    "base: {horizon: {tokens: 1e6}, model: {params: 20}}": "base.model.params: 20 is no size on the rule (the nearest",
    "base: {horizon: {tokens: -1}, model: {width: 16}}": "base.horizon.tokens: -1.0: write a positive number",
    "base: {horizon: {tokens: 10}, model: {width: 16}}": "base.horizon.tokens: horizon asks for 10 tokens, less than",
    "base: {horizon: {tokens: 1e299}, model: {width: 16}}": "base.horizon.tokens: 4.88e+295 steps do not fit",
    "base: {horizon: {steps: 100}, model: {width: 16}}": "base.horizon.steps: steps need batch_size too",
    f"recipe: defualt@1\nbase: {{{RUN}}}": "recipe: 'defualt@1' is not one of default@1, default@2, default@3",
    f"recipe: {{lr_scale: -1}}\nbase: {{{RUN}}}": "recipe.lr_scale: -1.0 is not positive; write e.g. 0.5",
    f"recipe: {{lr_scale: 2}}\nbase: {{{RUN}, optim: {{peak_lr: 1}}}}": (
        "recipe.lr_scale: 2.0 has no effect beside base.optim.peak_lr; write one of them"
    ),
    "isoflop: {sizes: [16]}": "isoflop.budgets: None is not a list with at least one entry",
    "isoflop: {budgets: [1e12, 2e12x], sizes: [16]}": "isoflop.budgets[1]: '2e12x' is not a number",
    "isoflop: {budgets: [1e12]}": "isoflop.sizes: None is not a list with at least one entry",
    "isoflop: {budgets: [{flops: 1e12, sizes: [16, {wdth: 2}]}]}": (
        "isoflop.budgets[0].sizes[1].wdth: unknown key; did you mean 'width'?"
    ),
    "isoflop: {budgets: [1e12], sizes: [16], rule: exakt}": "isoflop.rule: 'exakt' is not one of 6ND, 6ND_total",
    f"base: {{{RUN}}}\naxes: {{model.mlp: [null, {{experts: 4, active: 1}}]}}": (
        "axes.model.mlp: model.mlp is a group of fields, no value; write one of them (model.mlp.experts), or under a"
    ),
    f"base: {{{RUN}}}\naxes: {{kind: [{{label: dense, model: {{mlp: null}}}}]}}": (
        "axes.kind[0].model.mlp: null: a group of fields is not set to nothing; leave mlp out here, and, where other"
    ),
    "base: {horizon: {tokens: 1e6}}\naxes: {widht: [16]}": "axes.widht: not a path into a run; write one, as plain",
    "base: {horizon: {tokens: 1e6}}\naxes: {model.width: []}": "axes.model.width: [] is not a list with at least one",
    f"base: {{{RUN}}}\naxes: {{status: [{{seed: 1}}]}}": "axes.status: no axis can be called that; write another name",
    f"base: {{{RUN}}}\naxes: {{a: [{{seed: 1}}], seed: [2]}}": "axes.seed[0]: seed is set by axes.a[0].seed too",
    "base: {horizon: {tokens: 1e6}}\naxes: {model.width: [16, 24, 16]}": "cells 0 and 2 are the same run",
    f"{ISO}seeds: 3": "seeds: 3 is not a list with at least one entry",
    f"{ISO}seeds: [-1]": "seeds[0]: -1: write an integer in [0, 2^31)",
    f"{ISO}holdout: {{budgets: [6e11]}}": "holdout.budgets[0]: {'budget_flops': 6e+11} matches no cell; write from",
    f"{ISO}holdout: {{budgets: [3e11]}}": "holdout: keeps every cell out; leave some to fit",
    f"{ISO}holdout: {{cells: [{{siez: 16x2}}]}}": "holdout.cells[0].siez: no cell has that; write one of budget_flops",
    f"{ISO}exclude: [{{budget_flops: 3e11}}]": "exclude: leaves no cell; remove an entry",
    f"{ISO}execution: {{mesh: {{dta: 2}}}}": "execution.mesh.dta: unknown key; did you mean 'data'?",
    f"{ISO}execution: {{mesh: {{run: 0}}}}": "execution.mesh.run: 0: write an integer ≥ 1",
    f"{ISO}fit: {{delta: -1}}": "fit.delta: -1.0: write a positive number",
    f"{ISO}fit: {{loss: hubert}}": "fit.loss: 'hubert' is not one of huber, lad, squared, tukey; did you mean 'huber'?",
    f"{ISO}fit: {{by: siez}}": "fit.by: 'siez': no cell has that; write one of budget_flops, size, width, recipe",
    f"{ISO}fit: {{by: model}}": "fit.by: 'model': cell budget_flops=3e+11, size=16x2 has no value there",
    f"{ISO}fit: {{by: size}}\nholdout: {{cells: [{{size: 24x2}}]}}": "holdout: keeps every cell of size=24x2 out",
    f"{ISO}axes: {{'a/b': [{{seed: 1, label: A}}, {{seed: 2, label: a}}]}}\nfit: {{by: a/b}}": (
        "fit.by: 'a/b': 'A' and 'a' would share the folder a-b=a; write an axis"
    ),
    f"{ISO}axes: {{data.source: ['text:a/b', 'text:a-b']}}\nfit: {{by: data.source}}": (
        "fit.by: 'data.source': 'text:a/b' and 'text:a-b' would share the folder data.source=text-a-b; write an axis"
    ),
    f"{ISO}fit: {{compare: siez}}": "fit.compare: 'siez': no cell has that; write one of budget_flops, size, width",
    f"{ISO}fit: {{compare: seed}}": "fit.compare: 'seed': every cell is of seed=0; write what cells differ in",
    f"{ISO}fit: {{compare: size, by: seed}}": "fit.compare: 'size' beside by 'seed': write one, or the same for both",
    f"{ISO}axes: {{objective.name: [next_token, masked]}}\nfit: {{compare: objective.name}}": (
        "fit.compare: 'objective.name': losses of masked and next_token do not measure the same thing; write fit.by"
    ),
    f"{ISO}axes: {{data.source: ['text:a', 'text:b']}}\nfit: {{compare: data.source}}": (
        "fit.compare: 'data.source': losses on text:a and text:b are of other text; write fit.by"
    ),
    "base: {}\nbase: {}": "line 2, column 1: not valid YAML: 'base' is here twice",
    "base: {a: 1": "line 1, column 12: not valid YAML: expected ',' or '}'",
    "base: !!python/object:os.system {}": "not valid YAML: could not determine a constructor for the tag",
    "base: &a {model: *a}": "base.model.model: unknown key",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_a_bad_grid_is_one_line_with_path_value_and_remedy(text):
    message = error_of(text)
    assert BAD[text] in message
    assert "\n" not in message


def test_duplicates_are_named_both():
    message = error_of("base: {horizon: {tokens: 1e6}}\naxes: {optim.beta1: [0.9, 0.8, 0.9], model.width: [16]}")
    assert "cells 0 and 2 are the same run" in message
    assert message.count("beta1=0.9") == 2


def test_load_names_the_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("bsae: {}\n")
    with pytest.raises(grid.GridError, match=r"x\.yaml: bsae: unknown key"):
        grid.load(path)
    with pytest.raises(grid.GridError, match=r"no such grid file; did you mean '.*x\.yaml'"):
        grid.load(tmp_path / "x.yml")
    with pytest.raises(grid.GridError, match="not a readable text file"):
        grid.load(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(grid.GridError, match="not a readable text file"):
        grid.load(path)


def test_a_grid_too_large_to_mean_it_is_refused():
    axes = "{optim.beta1: [%s], optim.eps: [%s], seed: [%s]}" % ((", ".join(f"0.{i}" for i in range(10, 99)),) * 3)
    assert "cells; write at most" in error_of(f"base: {{{RUN}}}\naxes: {axes.replace('seed', 'optim.z_loss')}")


def test_a_tree_that_doubles_at_every_level_is_shown_short():
    text = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    assert len(error_of(text + "base: *a59\n")) < 500
    assert len(error_of(f"base:\n  model:\n    width: &b\n{text and ''}      [1, 2]\n")) < 500


# ---- epochs ---------------------------------------------------------------------------------------------------------

EPOCHS = {
    "recipe": "default@2",
    "base": {"model": {"width": 16}, "data": {"seq_len": 32, "source": "text:notes"}},
    "axes": {"horizon.epochs": [1, 2.5]},
}


def test_epochs_are_the_tokens_that_they_have():
    once, more = grid.expand(EPOCHS, name="g", epoch_tokens=lambda data: 400_000 if data.seq_len == 32 else None).cells
    assert (once.run.horizon.tokens, more.run.horizon.tokens) == (4e5, 1e6)
    assert [c.labels["epochs"] for c in (once, more)] == [1, 2.5]
    plain = {**EPOCHS, "axes": {"horizon.tokens": [4e5, 1e6]}}
    assert [c.run for c in grid.expand(plain, name="g").cells] == [once.run, more.run]


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {},
            "horizon.epochs[0]: 1: how many tokens an epoch of text:notes has is known when it is prepared; give ",
        ),
        ({"axes": {"horizon.epochs": [0]}}, "horizon.epochs[0]: 0 is not positive; write e.g. 1"),
        ({"axes": {"horizon.epochs": ["all"]}}, "horizon.epochs[0]: 'all' is not a number"),
        ({"base": {"model": {"width": 16}, "data": {"source": "synthetic:markov"}}}, "has no end to come back from"),
        ({"base": {**EPOCHS["base"], "horizon": {"steps": 5}}}, "is a second horizon beside"),
    ],
)  # fmt: skip
def test_epochs_that_nobody_knows_are_refused(change, words):
    with pytest.raises(grid.GridError) as caught:
        grid.expand(EPOCHS | change, name="g")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
