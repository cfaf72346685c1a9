"""Prices of parts of a grid against the plan's own costs, and the closed form of a family of trunks."""

import itertools

import pytest

from scaling import grid
from scaling.devices import PROFILES
from scaling.engine.plan import plan, prices, table, timings, trunks
from scaling.engine.plan.hardware import Hardware
from scaling.engine.plan.plan import Means

GRID = {
    "base": {
        "data": {"seq_len": 64}, "batch_size": 8,
        "optim": {"peak_lr": 0.01, "warmup_tokens": 4096, "schedule": {"name": "wsd", "cooldown_fraction": 0.2}},
    },
    "axes": {
        "model.width": [16, 32], "horizon": [{"horizon": {"tokens": t}} for t in (65536, 131072, 262144)],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return table.rows(grid.expand(GRID, name="g").cells)


def means(hardware=None, known=None, **options):
    return Means(
        hardware=hardware or Hardware(PROFILES["cpu"]), known=known or {}, trunks=True, workers=lambda n: 2,
        pack_sizes=1, disk_bytes=1e15, kept_bytes=lambda rows: 0, **options,
    )  # fmt: skip


def subsets(rows):
    return [c for k in range(1, len(rows) + 1) for c in itertools.combinations(range(len(rows)), k)]


def of_plan(rows, chosen, means, steps=None):
    """The bill of the plan of these cells alone."""
    some = [rows[i] for i in chosen]
    return plan.make(some, [row.run_id for row in some], (), means, steps=steps).bill


def test_flops_are_those_of_the_plan_for_every_part(rows):
    priced = prices.Prices(rows, means())
    for chosen in subsets(rows):
        assert priced(chosen) == pytest.approx(of_plan(rows, chosen, means()).to_json()["total"]["spent_flops"])


def test_a_family_costs_its_longest_trunk_and_every_cooldown(rows):
    """(1 - c) D_max + c ΣD, up to the whole steps of a schedule."""
    family = [i for i, row in enumerate(rows) if row.cell.run.model.d_model == 16]
    tokens = [rows[i].plan.num_tokens for i in family]
    a_token = table.step_flops(rows[family[0]].cell.run) / rows[family[0]].cell.run.batch_tokens
    exact = a_token * (0.8 * max(tokens) + 0.2 * sum(tokens))
    priced = prices.Prices(rows, means())
    assert priced(family) == pytest.approx(exact, rel=0.01)
    assert priced(family) < 0.75 * sum(priced([i]) for i in family)


def test_a_checkpoint_leaves_the_extension_and_the_cooldown(rows):
    """A cell whose trunk left it its state where it branches off pays the rest, as the plan has it from there."""
    long = max(range(len(rows)), key=lambda i: rows[i].plan.num_tokens)
    same = [i for i, r in enumerate(rows) if r.cell.run.model == rows[long].cell.run.model and i != long]
    branch = min(trunks.flat_steps(rows[i]) for i in same)
    steps = {rows[long].run_id: branch}
    priced = prices.Prices(rows, means(), steps=steps)
    step = table.step_flops(rows[long].cell.run)
    assert priced([long]) == pytest.approx(step * (rows[long].plan.num_steps - branch))
    assert priced([long]) == pytest.approx(of_plan(rows, [long], means(), steps).to_json()["total"]["spent_flops"])


@pytest.mark.parametrize("unit", ["hours", "dollars"])
def test_time_and_money_are_the_shares_of_the_plan(rows, unit):
    hardware = Hardware(PROFILES["h100"], devices=2, mfu=0.4, is_here=False)
    priced = prices.Prices(rows, means(hardware), unit)
    for chosen in subsets(rows)[::7]:
        cells = of_plan(rows, chosen, means(hardware)).to_json()["cells"]
        whole = sum(c["dollars"] if unit == "dollars" else c["device_hours"] / 2 for c in cells)
        assert priced(chosen) == pytest.approx(whole)


def test_here_times_are_the_machines_own_also_of_shapes_that_were_not_timed(rows):
    known = {timings.shape_key(rows[0].cell.run): timings.Timing(1.0, 0.01, 0.002, 0.003)}
    priced = prices.Prices(rows, means(known=known), "hours")
    whole = plan.make(rows, [r.run_id for r in rows], (), means(known=known))
    assert priced(range(len(rows))) == pytest.approx(sum(row.seconds for row in whole.rows) / 2 / 3600)
    with pytest.raises(ValueError, match="no time is known of"):
        prices.Prices(rows, means(), "hours")([0])
