"""A FLOP rule of one's own is one entry of ``RULES``: plans, records, tables, horizons and fits know it."""

import numpy as np
import pytest

from scaling import accounting, fit, grid, records
from scaling.families import counting
from scaling.families.recurrent import CELLS, RecurrentConfig
from tests import synthetic


@pytest.fixture
def with_a_rule(monkeypatch):
    """Attention counted at half of exact's: nothing that a kernel does, and no rule that is here."""

    def half_attention(counts, lengths):
        both = counting.exact(counts, lengths)
        without = 6.0 * (counts.inner_weights + counts.head_weights)
        return without + (both - without) / 2

    monkeypatch.setitem(counting.RULES, "half", half_attention)


def test_plans_horizons_records_and_fits_know_a_new_rule(with_a_rule, tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(
        "recipe: none\nbase: {data: {seq_len: 32}, optim: {peak_lr: 0.01, warmup_tokens: 0}, batch_size: 4}\n"
        "isoflop: {rule: half, budgets: [1e9, 4e9], sizes: [16, 24]}\nfit: {flops: half}\n"
    )
    loaded = grid.load(path)
    for cell in loaded.cells:
        plan = accounting.plan(cell.run)
        assert plan.flops["half"] == pytest.approx(cell.labels["budget_flops"], rel=0.02)
        assert plan.flops["6ND"] < plan.flops["half"] < plan.flops["exact"]
    runs = synthetic.sweep_records()
    assert all("half" in run.flops for run in runs)
    table = records.table(runs)
    assert np.all(table["flops_half"] < table["flops_exact"])
    found = fit.analyse(table, laws=("chinchilla",), flops="half", bootstrap=0).to_json()
    assert found["convention"]["flops"] == "half"


def test_an_unknown_rule_is_one_line(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text("isoflop: {rule: exakt, budgets: [1e9], sizes: [16]}\n")
    with pytest.raises(grid.GridError, match=r"'exakt' is not one of 6ND, .*did you mean 'exact'"):
        grid.load(path)
    path.write_text("base: {model: {width: 16}, horizon: {flops: 1e9, rule: exakt}}\n")
    with pytest.raises(grid.GridError, match=r"base.horizon.rule: 'exakt': write one of 6ND"):
        grid.load(path)


@pytest.mark.parametrize("cell", CELLS)
def test_every_rule_counts_every_cell(cell):
    found = accounting.flops_per_token(RecurrentConfig(d_model=16, num_layers=2, cell=cell), 64)
    assert set(found) == set(counting.RULES)
    assert all(value > 0 for value in found.values())
