"""The bill against sums by hand, and budgets against every set of levels that could have stayed."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling import grid
from scaling.engine.plan import costs, packing, trunks
from scaling.engine.plan import table as plan
from scaling.engine.plan.costs import Bill, Budget
from scaling.engine.plan.hardware import Hardware
from scaling.execution import HardwareConfig

GRID = {
    "isoflop": {"budgets": [1e9, 2e9, 4e9, 8e9], "sizes": [8, 16, 24]},
    "holdout": {"budgets": [8e9]},
    "base": {"data": {"seq_len": 32}},
}


def rows_of(raw=GRID, seconds=lambda row: row.plan.flops["exact"] / 1e9):
    table = plan.rows(grid.expand(raw, name="g").cells)
    return [plan.Row(row.cell, row.plan, seconds(row), 1000 + i) for i, row in enumerate(table)]


def hardware_of(**given):
    return Hardware.of(HardwareConfig(**given), has_accelerator=False)


CHEAP = hardware_of(price_per_device_hour=36.0, power_watts=3600, devices=2)  # 2 cents and 2 Wh a second


def test_a_bill_is_the_sum_of_what_its_cells_hold():
    rows = rows_of()
    bill = Bill(rows, CHEAP, workers=2, seconds=100.0)
    assert bill.total.dollars == pytest.approx(2.0)
    assert bill.total.kwh == pytest.approx(0.2)
    assert bill.memory_bytes == 1000 + len(rows) - 1
    assert bill.share(rows[0]).dollars == pytest.approx(rows[0].seconds / 2 * 0.02)
    assert Bill([*rows, plan.Row(rows[0].cell, rows[0].plan)], CHEAP, 1, None).memory_bytes is None


def test_its_json_holds_cells_packs_and_totals_under_every_rule():
    rows = rows_of({**GRID, "seeds": [0, 1]})
    packs = packing.build(rows, 2)
    written = Bill(rows, CHEAP, 2, 60.0).to_json(packs)
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert {c["run_id"] for c in written["cells"]} == {i for p in written["packs"] for i in p["run_ids"]}
    for rule, total in written["total"]["flops"].items():
        assert total == pytest.approx(sum(c["flops"][rule] for c in written["cells"]))
        assert total == pytest.approx(sum(p["flops"][rule] for p in written["packs"]))
    assert written["total"]["num_tokens"] == sum(c["num_tokens"] for c in written["cells"])
    for column in ("seconds", "dollars", "kwh", "checkpoint_bytes"):
        cells, packed = (sum(entry[column] for entry in written[kind]) for kind in ("cells", "packs"))
        assert cells == pytest.approx(packed)


def test_elsewhere_seconds_are_flops_over_peak():
    h100 = hardware_of(name="h100", mfu=0.5)
    rows = costs.predict_elsewhere(rows_of(), h100)
    assert rows[0].seconds == pytest.approx(rows[0].plan.flops["exact"] / (494.7e12 * 0.5))
    assert costs.predict_elsewhere(rows, hardware_of())[0].seconds is None


def wall(rows):
    return CHEAP.cost(sum(row.seconds for row in rows))


def test_over_the_budget_is_refused_with_by_how_much_and_what_would_go():
    rows = rows_of()
    total = 0.02 * sum(row.seconds for row in rows)
    with pytest.raises(ValueError, match="--drop") as e:
        costs.within(Budget(dollars=total / 3), rows, wall, drop=False)
    message = str(e.value)
    assert "\n" not in message
    assert f"the plan takes {total:.3g} $, {total * 2 / 3:.3g} too much" in message
    assert "6 cells of budgets 4e+09, 8e+09" in message
    assert costs.within(Budget(dollars=10), rows, wall, drop=False) == (rows, [])


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 2.0))
def test_what_stays_is_the_most_whole_levels_that_fit_from_below(limit):
    rows = rows_of()
    levels = [list(g) for _, g in itertools.groupby(rows, key=lambda r: r.cell.labels["budget_flops"])]
    below = [list(itertools.chain(*levels[:k])) for k in range(5)]
    fits = [k for k in range(5) if wall(below[k]).dollars <= limit]
    budget = Budget(dollars=limit)
    if max(fits) == 0:
        with pytest.raises(ValueError, match="no level of cells fits"):
            costs.within(budget, rows, wall, drop=True)
        return
    kept, dropped = costs.within(budget, rows, wall, drop=True)
    assert kept == below[max(fits)]
    assert kept + dropped == rows


def test_only_held_out_cells_left_is_nothing_left():
    rows = [row for row in rows_of() if row.cell.holdout]
    with pytest.raises(ValueError, match="no level of cells fits"):
        costs.within(Budget(hours=1e-9), rows, wall, drop=True)


def test_cells_of_no_budget_go_one_by_one_and_seeds_together():
    raw = {"base": {"model": {"width": 8}, "data": {"seq_len": 32}}, "seeds": [0, 1]}
    rows = rows_of({**raw, "axes": {"horizon.tokens": [3e4, 6e4, 9e4]}})
    assert [[row.cell.run.seed for row in level] for level in costs.levels(rows)] == [[0, 1]] * 3


@pytest.mark.parametrize(
    "budget, says",
    [(Budget(dollars=1), "--price"), (Budget(kwh=1), "--power"), (Budget(hours=1), "no time is known")],
)
def test_a_budget_on_what_is_not_known_says_what_to_give(budget, says):
    unknown = hardware_of().cost(None if budget.hours else 60)
    with pytest.raises(ValueError, match=says):
        budget.excess(unknown)


def test_a_branch_costs_its_own_steps_and_its_trunk_the_rest():
    base = {"model": {"width": 8}, "data": {"seq_len": 32}, "batch_size": 4, "optim": {"warmup_tokens": 0}}
    raw = {"recipe": "none", "base": base, "axes": {"horizon.steps": [100, 200]}}
    base["optim"] |= {"peak_lr": 0.01, "weight_decay": 0.1, "beta2": 0.98}
    table = trunks.share(plan.rows(grid.expand(raw, name="g").cells))
    h100 = hardware_of(name="h100", mfu=0.5)
    short, long = costs.predict_elsewhere(table, h100)
    step = plan.step_flops(short.cell.run)
    assert short.carriers == (long.run_id,)
    assert short.seconds == pytest.approx(20 * step / (494.7e12 * 0.5))  # the cooldown, a fifth of 100 steps
    assert long.seconds == pytest.approx(200 * step / (494.7e12 * 0.5))
    written = Bill([short, long], h100, 1, 1.0).to_json()
    assert written["total"]["spent_flops"] == pytest.approx(220 * step)
    assert written["total"]["flops"]["exact"] == pytest.approx(300 * step)
