"""Predicted seconds against the formula by hand, schedules against brute force, packs against the program's key."""

import dataclasses
import io

import pytest
from rich.console import Console

from scaling import grid
from scaling.config import EvalConfig, Horizon, OptimConfig, RunConfig, program_key
from scaling.engine.folder.cells import deal, select
from scaling.engine.plan import packing, printed, timings
from scaling.engine.plan.table import predicted_wall, rows, step_flops
from scaling.engine.plan.timings import Timing
from scaling.execution import ExecutionConfig
from scaling.families.transformer import TransformerConfig
from scaling.grid import Cell


def run_of(width=16, *, batch_size=4, num_steps=100, seed=0, peak_lr=1e-2, num_points=10):
    model = TransformerConfig(
        d_model=width, num_layers=2, num_heads=2, head_dim=width // 2, num_kv_heads=2, d_ff=4 * width
    )
    return RunConfig(
        model,
        OptimConfig(peak_lr, 100),
        Horizon(steps=num_steps),
        batch_size=batch_size,
        seed=seed,
        eval=EvalConfig(num_points=num_points),
    )


def rows_of(*runs):
    return rows([Cell(run) for run in runs])


def test_seconds_are_start_steps_and_evaluations():
    short, long = run_of(num_steps=6), run_of(num_steps=1000, seed=3, peak_lr=0.5)
    timing = Timing(start=2.0, step=0.01, curve_eval=0.1, eval=3.0)
    predicted = timings.predict(rows_of(short, long), {timings.shape_key(short): timing})
    # ten points a curve, of which six steps can tell four apart; seed and rate do not change a shape
    assert [row.seconds for row in predicted] == pytest.approx([2 + 6 * 0.01 + 4 * 0.1 + 3, 2 + 10 + 10 * 0.1 + 3])


@pytest.mark.parametrize("change", [{"width": 32}, {"batch_size": 8}, {"num_points": 0}])
def test_other_shapes_have_other_keys(change):
    assert timings.shape_key(run_of()) != timings.shape_key(run_of(**change))


def test_an_untimed_shape_runs_at_the_rate_of_the_nearest():
    small, large = run_of(16, batch_size=4), run_of(64, batch_size=8)
    timing = Timing(start=0.0, step=0.01, curve_eval=0.0, eval=0.0)
    table = timings.predict(rows_of(small, large), {timings.shape_key(small): timing})
    ratio = step_flops(large) / step_flops(small)
    assert table[1].seconds == pytest.approx(100 * 0.01 * ratio, rel=1e-12)
    assert [row.seconds for row in timings.predict(rows_of(large), {})] == [None]
    assert predicted_wall(timings.predict(rows_of(large), {}), 2) is None


def test_evaluation_of_an_untimed_shape_scales_with_flops_per_token_alone():
    small, doubled = run_of(batch_size=4), run_of(batch_size=8)
    known = {timings.shape_key(small): Timing(start=0.0, step=0.0, curve_eval=0.5, eval=1.0)}
    assert timings.predict(rows_of(small, doubled), known)[1].seconds == pytest.approx(10 * 0.5 + 1.0)


def test_each_shape_is_timed_once_and_large_steps_never():
    table = rows_of(run_of(), run_of(seed=1), run_of(32), run_of(64))
    limit = step_flops(run_of(32))
    assert list(timings.to_calibrate(table, {}, limit=limit).values()) == [run_of(32), run_of()]
    assert len(timings.to_calibrate(table, {}, limit=None)) == 3
    known = {timings.shape_key(run_of()): Timing(0, 0, 0, 0)}
    assert list(timings.to_calibrate(table, known, limit=limit).values()) == [run_of(32)]


def test_held_out_cells_come_after_the_others():
    cells = [Cell(run_of(num_steps=100)), Cell(run_of(num_steps=300), holdout=True)]
    known = {timings.shape_key(run_of()): Timing(0.0, 0.01, 0.0, 0.0)}
    assert predicted_wall(timings.predict(rows(cells), known), 2) == pytest.approx(1 + 3)


def test_timings_survive_on_disk_and_damage_means_measuring_again(tmp_path):
    known = {"a": Timing(1.0, 0.25, 0.5, 2.0)}
    timings.TimingCache(tmp_path, "auto", ExecutionConfig()).save(known)
    cache = timings.TimingCache(tmp_path, "auto", ExecutionConfig())
    assert cache.load() == known
    assert timings.TimingCache(tmp_path, 3, ExecutionConfig()).load() == {}
    cache.path.write_text(cache.path.read_text()[:20])
    assert cache.load() == {}


def test_packs_hold_what_one_program_can_train_and_the_longest_comes_first():
    runs = [run_of(seed=s, peak_lr=lr) for s in range(2) for lr in (1e-3, 1e-2)]
    others = [run_of(num_steps=400), run_of(32), run_of(batch_size=8)]
    table = rows_of(*runs, *others)
    packs = packing.build(table, members=3)
    assert sorted(len(pack.rows) for pack in packs) == [1, 1, 2, 3]
    assert sorted(row.run_id for pack in packs for row in pack.rows) == sorted(r.run_id for r in table)
    for pack in packs:
        assert len({program_key(row.cell.run) for row in pack.rows}) == 1
    assert [row.plan.num_steps for row in packs[0].rows] == [400, 100, 100]  # horizons are free, but sorted
    flops = [sum(row.plan.flops["exact"] for row in pack.rows) for pack in packs]
    assert flops == sorted(flops, reverse=True)
    assert [len(pack.rows) for pack in packing.build(table)] == [1] * 7


def test_shares_are_all_of_the_grid_once_and_about_equal():
    table = rows_of(*(run_of(seed=s, num_steps=10 * (s + 1)) for s in range(10)))
    shares = [deal(table, i, 3) for i in (1, 2, 3)]
    assert sorted(row.run_id for share in shares for row in share) == sorted(row.run_id for row in table)
    steps = [sum(row.plan.num_steps for row in share) for share in shares]
    assert max(steps) - min(steps) <= 100  # the longest run
    assert deal(table[::-1], 2, 3) == shares[1]


def test_select_takes_first_digits_and_nothing_vague():
    table = rows_of(*(run_of(seed=s) for s in range(40)))
    a, b = table[3].run_id, table[7].run_id
    assert [row.run_id for row in select(table, [b[:10], a, b])] == [b, a]
    assert select(table, []) == table
    with pytest.raises(ValueError, match="--only : 40 cells"):
        select(table, [""])
    with pytest.raises(ValueError, match="--only zz: no cell of this grid"):
        select(table, ["zz"])


def test_packs_do_not_mix_phases():
    cell = Cell(run_of())
    table = rows([cell, dataclasses.replace(cell, run=run_of(seed=1), holdout=True)])
    assert len(packing.build(table, members=2)) == 2


@pytest.mark.parametrize("more, says", [(0, None), (100, "100 tokens left out"), (-100, "100 tokens once more")])
def test_the_plan_says_what_whole_steps_leave_of_an_epoch(more, says):
    """195 batches of 512 tokens and a part of one, which is rounded to the nearest."""
    raw = {
        "base": {
            "model": {"width": 16}, "data": {"seq_len": 32, "source": "text:notes"}, "batch_size": 16,
            "horizon": {"epochs": 1},
        }
    }  # fmt: skip
    cells = grid.expand(raw, name="g", epoch_tokens=lambda data: 195 * 512 + more).cells
    (row,) = rows(cells)
    assert row.plan.num_steps == 195
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(printed.plan_table([row], {}, "plan"))
    text = console.export_text()
    assert (says in text) if says else ("tokens" not in text.partition("FLOPs")[2])
