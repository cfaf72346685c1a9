"""Who carries whom, what it saves against the closed form, when it can start; on grids as a person writes them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from scaling import grid
from scaling.engine.folder.cells import deal
from scaling.engine.plan import packing, table, timings, trunks
from scaling.engine.run.tasks import Line, Task

BASE = {
    "model": {"width": 16},
    "data": {"seq_len": 128},
    "batch_size": 8,
    "optim": {"warmup_tokens": 8192},
}


def rows_of(axes, holdout=None, recipe="default@1", **base):
    raw = {"recipe": recipe, "base": {**BASE, **base}, "axes": axes} | ({"holdout": holdout} if holdout else {})
    return table.rows(grid.expand(raw, name="g").cells)


def horizons(steps):
    return {"horizon.steps": [round(s) for s in steps]}


def closed_form(steps, c):
    """((1 - c) D_max + c ΣD) / ΣD, of the issue."""
    return ((1 - c) * max(steps) + c * sum(steps)) / sum(steps)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (np.linspace(1000, 10_000, 10), 0.345),
        (np.geomspace(2500, 10_000, 10), 0.345),
        (np.geomspace(1000, 10_000, 10), 0.396),
    ],
    ids=["even", "within 4", "within 10"],
)
def test_flops_spent_are_the_closed_form(steps, expected):
    rows = trunks.share(rows_of(horizons(steps)))
    total = trunks.flops(rows)
    assert total["ratio"] == pytest.approx(closed_form(steps, 0.2), rel=1e-3)  # steps are whole
    assert round(total["ratio"], 3) == pytest.approx(expected, abs=0.0015)
    assert total["asked"] == pytest.approx(sum(row.plan.flops["exact"] for row in rows))
    trunk = max(rows, key=lambda row: row.plan.num_steps)
    assert trunk.carriers == ()
    for row in rows:
        if row is not trunk:
            assert row.carriers == (trunk.run_id,)
            assert row.first_step == row.plan.num_steps - row.plan.cooldown_steps


def test_a_trunk_saved_exactly_where_a_branch_leaves_carries_it_still():
    rows = rows_of(horizons([300, 600, 1000]))
    trunk = max(rows, key=lambda row: row.plan.num_steps).run_id
    for saved, carried in ((239, [300, 600]), (240, [300, 600]), (241, [600]), (480, [600]), (481, [])):
        found = trunks.share(rows, {trunk: saved})
        assert [row.plan.num_steps for row in found if trunk in row.carriers] == carried, saved


def test_the_shipped_grid_saves_what_it_says():
    cells = grid.load(Path(__file__).parents[2] / "sweeps" / "ten_horizons.yaml").cells
    rows = trunks.share(table.rows(cells))
    assert trunks.flops(rows)["ratio"] == pytest.approx(0.396, abs=0.001)
    (line,) = trunks.describe(rows)
    assert line.startswith("trunks: 9 of 10 cells branch off another; ")
    assert line.endswith("ratio 0.396")


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"batch_size": 16}, {"optim": {"warmup_tokens": 16384}}, {"optim": {"beta2": 0.9}}],
    ids=str,
)
def test_only_what_is_equal_up_to_the_cooldown_shares(change):
    short, long = rows_of(horizons([500])), rows_of(horizons([1000]), **change)
    assert trunks.families([*short, *long]) == [short, long]


def test_cooldowns_of_any_length_and_depth_share_one_trunk():
    schedules = [{"cooldown_fraction": c, "final_lr_fraction": f} for c, f in ((0.2, 0.0), (0.5, 0.0), (0.2, 0.1))]
    axes = {"cooldown": [{"optim": {"schedule": schedule}} for schedule in schedules]}
    rows = trunks.share(rows_of(axes | horizons([1000])))
    assert sorted(row.first_step for row in rows) == [0, 500, 800]  # the longest flat part is the trunk


def test_a_schedule_that_knows_its_end_shares_nothing_and_says_so():
    rows = trunks.share(rows_of(horizons([500, 1000]), optim={**BASE["optim"], "schedule": {"name": "cosine"}}))
    assert not any(row.carriers for row in rows)
    assert trunks.describe(rows) == [
        "trunks: 2 cells that differ in horizon share nothing: schedule cosine knows its end from the start; "
        "write wsd to share"
    ]


@pytest.mark.parametrize(
    "base",
    [
        {"optim": {"name": "adam", "weight_decay": 0.0, "peak_lr": 0.01}},
        {"objective": {"name": "contrastive", "negatives": 7}, "batch_size": 8, "eval": {"curve_tokens": 1024}},
    ],
    ids=["no decay", "no smaller batch"],
)
def test_why_nothing_is_shared_is_said_of_runs_that_cannot_be_otherwise(base):
    model = {"width": 16, "tied_embeddings": True}
    optim = {"schedule": {"name": "cosine"}, **base.pop("optim", {})}
    (line,) = trunks.describe(rows_of(horizons([10, 20]), model=model, optim=optim, **{"batch_size": 4, **base}))
    assert "schedule cosine knows its end" in line


def test_what_the_recipe_makes_of_the_horizon_is_said_once():
    base = {"model": {"width": 16}, "data": {"seq_len": 128}}
    raw = {"base": base, "axes": {"horizon.tokens": [3e5, 6e5, 3e6]}}
    lines = trunks.describe(trunks.share(table.rows(grid.expand(raw, name="g").cells)))
    assert lines == [
        "trunks: 3 cells that differ in horizon share nothing: batch_size, optim.warmup_tokens differ with it, by the "
        "recipe; write them under base to share"
    ]
    assert trunks.describe(trunks.share(rows_of({"optim.peak_lr": [0.1, 0.2]}, horizon={"steps": 300}))) == []


def test_held_out_cells_ride_fitted_trunks_and_then_each_other():
    """Fitted: flat to 240 and 800. Held out: 480 (rides to 480), 1,200 and 1,600 (both ride to 800, then together)."""
    held = {"cells": [{"steps": [600, 1500, 2000]}]}
    by_steps = {r.plan.num_steps: r for r in trunks.share(rows_of(horizons([300, 600, 1000, 1500, 2000]), held))}
    fitted, longest = by_steps[1000].run_id, by_steps[2000].run_id
    assert {s: r.first_step for s, r in by_steps.items()} == {300: 240, 600: 480, 1000: 0, 1500: 1200, 2000: 800}
    assert by_steps[600].carriers == (fitted,)
    assert by_steps[2000].carriers == (fitted,)
    assert by_steps[1500].carriers == (fitted, longest)
    (pack, rider) = packing.build([by_steps[300], by_steps[1000]], carried=[by_steps[s] for s in (600, 1500, 2000)])
    assert set(pack.carried) == {by_steps[s].run_id for s in (300, 600, 1500, 2000)}
    assert rider.after == (by_steps[300].run_id,)
    later = packing.build([by_steps[s] for s in (600, 1500, 2000)])
    assert {p.key: p.after for p in later} == {
        by_steps[600].run_id: (), longest: (), by_steps[1500].run_id: (by_steps[1500].run_id,)
    }  # fmt: skip


def test_what_is_past_its_branch_goes_on_by_itself():
    rows = rows_of(horizons([300, 600, 1000]))
    short, middle, long = (row.run_id for row in rows)
    by_id = {row.run_id: row for row in trunks.share(rows, {short: 250, long: 300})}
    assert {i: (r.first_step, r.carriers) for i, r in by_id.items()} == {
        short: (250, ()), middle: (480, (long,)), long: (300, ())
    }  # fmt: skip
    by_id = {row.run_id: row for row in trunks.share(rows, {long: 700})}  # and the others' branches are lost
    assert by_id[short].carriers == (middle,)
    assert by_id[middle].carriers == ()


def test_a_branch_starts_when_its_trunk_gets_there():
    """By hand. Trunk 100 s, branches at .24 and .48 of it, 60 s and 10 s long; two workers."""
    rows = trunks.share(rows_of(horizons([300, 600, 1000])))
    seconds = {300: 60.0, 600: 10.0, 1000: 100.0}
    rows = [dataclasses.replace(row, seconds=seconds[row.plan.num_steps]) for row in rows]
    assert table.schedule(rows, 2) == 100  # 24 … 84 and 84 … 94 beside the trunk
    assert table.schedule(rows, 3) == 100
    assert table.schedule(rows, 1) == 170
    late = [dataclasses.replace(r, seconds=90.0) if r.plan.num_steps == 300 else r for r in rows]
    assert table.schedule(late, 2) == 114
    assert table.schedule(late[:2], 2) == 90  # the trunk is done already: nothing to wait for


def test_seconds_of_a_branch_are_its_own():
    rows = trunks.share(rows_of(horizons([500, 1000])))
    timing = timings.Timing(start=2.0, step=0.01, curve_eval=0.1, eval=3.0)
    short, long = timings.predict(rows, {timings.shape_key(rows[0].cell.run): timing})
    from scaling import accounting

    points = accounting.eval_steps(500, 20)
    after = sum(s > 400 for s in points)
    assert short.seconds == pytest.approx(2 + 100 * 0.01 + after * 0.1 + 3)
    # the trunk evaluates the rider's curve up to there
    assert long.seconds == pytest.approx(2 + 1000 * 0.01 + (20 + len(points) - after) * 0.1 + 3)


def test_packs_of_trunks_and_packs_of_branches():
    rows = trunks.share(rows_of(horizons([300, 600, 1000]) | {"seed": [0, 1, 2]}))
    packs = packing.build(rows, members=8)
    assert [len(pack.rows) for pack in packs] == [3, 6]
    assert all(row.plan.num_steps == 1000 for row in packs[0].rows)
    assert set(packs[0].carried) == set(packs[1].after) == {row.run_id for row in packs[1].rows}


def test_families_fall_to_one_machine():
    rows = rows_of(horizons([300, 600, 1000]) | {"seed": [0, 1, 2]})
    for i in (1, 2, 3):
        dealt = deal(rows, i, 3, together=True)
        assert len(dealt) == 3
        assert len({row.cell.run.seed for row in dealt}) == 1


def test_a_worker_takes_what_it_has_compiled_near_the_head_of_the_line():
    a, b, c, d, e = (Task(name, "train", {}, program=name) for name in "abcde")
    line = Line([a, b, c, d, e])
    assert line.next({"d", "e"}) is a  # those are further back
    assert line.next({"d", "e"}) is d
    assert line.next() is b
    assert [line.next({"e"}), line.next({"e"}), line.next({"e"})] == [e, c, None]


def test_a_line_passes_over_what_is_held():
    trunk = Task("t", "train", {}, releases=("a", "b"))
    a, b, other = Task("a", "train", {}, after=("a",)), Task("b", "train", {}, after=("b",)), Task("o", "train", {})
    free = Task("f", "train", {}, after=("nobody holds this",))
    line = Line([a, trunk, b, other, free])
    assert [line.next(), line.next(), line.next(), line.next()] == [trunk, other, free, None]
    line.release("b")
    assert line.next() is b
    line.put_first(trunk)
    line.release("a", "b")
    assert [line.next(), line.next()] == [trunk, a]
    assert not line
