"""Runs that start from another: which one a grid means, when they can train, what goes with what."""

import dataclasses
import itertools

import pytest

from scaling import config, fields, grid
from scaling.engine.folder.cells import Cells, deal
from scaling.engine.housekeeping import Keeper
from scaling.engine.plan import costs, lint, packing, table, timetable, trunks
from scaling.engine.plan.costs import Budget
from scaling.engine.plan.hardware import Cost
from scaling.engine.run.tasks import Line, Task
from scaling.training import checkpoint

BASE = {"data": {"seq_len": 32}, "batch_size": 4, "eval": {"num_points": 3}, "optim": {"warmup_tokens": 0}}
STAGES = [
    {"label": "pretrain", "horizon": {"steps": 100}},
    {"label": "tuned", "horizon": {"steps": 40}, "start": {"run": {"stage": "pretrain"}}},
    {"label": "middle", "horizon": {"steps": 30}, "start": {"run": {"stage": "pretrain"}, "step": 50}},
    {"label": "third", "horizon": {"steps": 20}, "start": {"run": {"stage": "tuned"}}},
]


def expand(stages=STAGES, **more):
    axes = {"model.width": [8, 16], "stage": stages} | more.pop("axes", {})
    return grid.expand({"recipe": "default@1", "base": BASE, "axes": axes, **more}, name="g")


def error_of(stages, **more):
    with pytest.raises(grid.GridError) as caught:
        expand(stages, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_stage(rows, width):
    return {r.cell.labels["stage"]: r for r in rows if r.cell.labels["width"] == width}


# ---- the grid -------------------------------------------------------------------------------------------------------


def test_a_selector_means_the_cell_that_agrees_in_all_else():
    cells = expand(seeds=[0, 1]).cells
    at = {(c.labels["width"], c.labels["stage"], c.run.seed): c.run for c in cells}
    for (width, stage, seed), run in at.items():
        parent = {"pretrain": None, "third": "tuned"}.get(stage, "pretrain")
        step = 50 if stage == "middle" else None
        assert run.start == (parent and config.StartConfig(at[width, parent, seed].run_id, step))
    assert len({run.run_id for run in at.values()}) == len(cells) == 16


def test_one_parent_may_start_cells_of_every_other_coordinate():
    stages = [STAGES[0] | {"optim": {"peak_lr": 0.01}}, *({"label": f"t{lr}", "horizon": {"steps": 9}, "optim": {
        "peak_lr": lr}, "start": {"run": {"stage": "pretrain", "width": 8}}} for lr in (0.1, 0.2))]  # fmt: skip
    cells = expand(stages, exclude=[{"width": 16}]).cells
    assert {c.run.start and c.run.start.run for c in cells} == {None, cells[0].run.run_id}


def test_run_ids_without_a_start_are_what_they_were():
    (run, *_) = (c.run for c in expand().cells)
    assert "start" not in fields.canonical_json(run)
    again = fields.from_dict(config.RunConfig, fields.to_dict(expand().cells[1].run))
    assert again == expand().cells[1].run
    assert again.start.run == run.run_id


@pytest.mark.parametrize(
    "stage, words",
    [
        ({"start": {"run": {"stage": "pre"}}}, "axes.stage[1].start.run: {'stage': 'pre'} matches no cell; write from"),
        ({"start": {"run": {"stage": "x"}}}, "starts from itself"),
        ({"start": {"run": {"batch_size": 4}}}, "starts from itself"),
        ({"start": {"run": {"stage": "pretrain"}}, "model": {"num_layers": 1}}, "names 2 cells, and 0 of them agree"),
        ({"start": {"run": 4}}, "axes.stage[1].start.run: 4 is not a mapping of coordinates; write e.g."),
        ({"start": {"step": 4}}, "axes.stage[1].start.step: start.run is missing"),
        ({"start": {"run": {"stage": "pretrain"}, "step": 101}}, "start.step: 101 is past the 100 steps of"),
        ({"start": {"run": {"stage": "pretrain"}, "step": 0}}, "start.step: 0"),
        ({"start": {"run": {"stage": "pretrain"}, "take": "all"}}, "is not one of params, params+optimizer"),
        ({"start": {"run": {"stage": "pretrain"}}, "data": {"tokenizer": "bpe:300"}}, "model.vocab_size of cell"),
        (
            {"start": {"run": {"stage": "pretrain"}}, "model": {"activation": "relu2"}},
            "model.activation of cell width=8, stage=x, size=8x2 is 'relu2', and 'gelu' in the run",
        ),
        (
            {"start": {"run": {"stage": "pretrain"}, "take": "params+optimizer"},
             "optim": {"name": "muon", "peak_lr": 0.01}},
            "write the same optim.name",
        ),
    ],
)  # fmt: skip
def test_what_cannot_start_is_refused_with_its_place(stage, words):
    assert words in error_of([STAGES[0], {"label": "x", "horizon": {"steps": 5}} | stage])


def test_two_sources_with_a_tokenizer_trained_on_each_are_refused():
    bpe = {"tokenizer": "bpe:300"}
    stages = [STAGES[0] | {"data": bpe}, STAGES[1] | {"data": bpe | {"source": "text:notes"}}]
    assert "bpe:300' is trained on the text of its own source" in error_of(stages)


def test_a_fitted_cell_cannot_start_from_a_held_out_one():
    assert "hold this one out too" in error_of(STAGES, holdout={"cells": [{"stage": "pretrain"}]})
    held = expand(holdout={"cells": [{"stage": ["tuned", "third"]}]})
    assert sum(c.holdout for c in held.cells) == 4


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_whoever_waits_is_released_in_every_order_of_packs():
    """However packs are handed out, each starts after those that it needs, and none waits for ever."""
    rows = table.rows(expand(seeds=[0, 1]).cells)
    for members, shared in itertools.product((1, 2, 8), (rows, trunks.share(rows))):
        packs = packing.build(shared, members)
        for order in (packs, packs[::-1]):
            line = Line([Task(p.key, "train", {}, p.after, p.carried) for p in order])
            trained = set()
            while line:
                task = line.next()
                assert task is not None, "waits for ever"
                pack = next(p for p in packs if p.key == task.key)
                assert all(need.run_id in trained for row in pack.rows for need in row.needs)
                trained |= set(pack.run_ids)
                line.release(*task.releases)
            assert trained == {row.run_id for row in rows}


def test_wall_time_waits_for_the_step_that_a_run_starts_from():
    """By hand: 100 s; a run of 40 s from its end, of 30 s from its middle, one of 20 s after the former."""
    rows = by_stage(table.rows(expand().cells), 8)
    timed = [dataclasses.replace(row, seconds=float(row.plan.num_steps)) for row in rows.values()]
    assert table.schedule(timed, 1) == 100 + 40 + 30 + 20
    assert table.schedule(timed, 2) == 100 + 40 + 20
    assert table.schedule([r for r in timed if r.cell.labels["stage"] == "middle"], 1) == 30
    assert timetable.wall([], 1) == 0


def test_what_is_carried_is_no_more_than_what_nobody_starts_from():
    """Horizons of 100, 60 and 50 under one flat rate; one starts from step 30 of the 60: that one trains by itself."""
    longer = [{"label": f"p{n}", "horizon": {"steps": n}} for n in (100, 60, 50)]
    started = {"label": "s", "horizon": {"steps": 10}, "start": {"run": {"stage": "p60"}, "step": 30}}
    rows = by_stage(trunks.share(table.rows(expand([*longer, started]).cells)), 8)
    assert rows["p50"].first_step == 40
    assert rows["p60"].first_step == 0
    assert rows["s"].needs == (table.Need(rows["p60"].run_id, 30),)
    started["start"] = {"run": {"stage": "p60"}}  # from its end
    assert by_stage(trunks.share(table.rows(expand([*longer, started]).cells)), 8)["p60"].first_step == 48


def test_runs_that_start_alike_are_a_family_and_wait_once():
    two = [STAGES[1] | {"label": f"t{n}", "horizon": {"steps": n}} for n in (40, 30)]
    rows = by_stage(trunks.share(table.rows(expand([STAGES[0], *two]).cells)), 8)
    assert rows["t40"].needs == (table.Need(rows["pretrain"].run_id, 100),)
    assert rows["t30"].needs == (table.Need(rows["t40"].run_id, 24),)
    alone = by_stage(table.rows(expand([STAGES[0], *two]).cells), 8)
    assert alone["t30"].needs == (table.Need(alone["pretrain"].run_id, 100),)
    # Shared again without its trunk, as after a budget, it starts from its parent as it did.
    again = trunks.share([rows["pretrain"], rows["t30"]])
    assert again[1].needs == alone["t30"].needs
    assert trunks.share(list(rows.values()), {rows["t40"].run_id: 5})[1].needs == ()


def test_one_machine_trains_a_run_and_what_starts_from_it():
    rows = table.rows(expand(seeds=[0, 1]).cells)
    for together in (True, False):
        shares = [{r.run_id for r in deal(rows, i, 3, together=together)} for i in (1, 2, 3)]
        assert sum(map(len, shares)) == 16
        for share in shares:
            assert all(row.start is None or row.start.run_id in share for row in rows if row.run_id in share)


def test_what_starts_from_a_dropped_cell_is_dropped_with_it():
    rows = table.rows(expand().cells)
    wide = by_stage(rows, 16)

    def cost_of(kept):
        return Cost(float(sum(r.plan.flops["exact"] for r in kept)), None, None, None)

    budget = Budget(hours=(cost_of(rows).seconds - 1) / 3600)
    kept, dropped = costs.within(budget, rows, cost_of, drop=True)
    assert {r.run_id for r in dropped} == {r.run_id for r in wide.values()}
    assert {r.run_id for r in kept} == {r.run_id for r in by_stage(rows, 8).values()}


def test_mixed_kinds_of_losses_are_said():
    found = lint.check((table.rows(expand().cells), lint.Expected()))
    assert "some start from others" in {f.rule for f in found}
    children = [r for r in table.rows(expand().cells) if r.start is not None]
    assert "some start from others" not in {f.rule for f in lint.check((children, lint.Expected()))}


# ---- what is left of earlier calls ----------------------------------------------------------------------------------


def keeper_of(tmp_path, found=()):
    cells = Cells(expand(), tmp_path / "results")
    cells.found = dict(found)
    return Keeper(tmp_path / "work", cells, print, keeps_final=False), by_stage(cells.rows, 8)


def leave(tmp_path, run_id, step):
    (checkpoint.folder_of(tmp_path / "work", run_id) / str(step)).mkdir(parents=True)


def test_a_start_that_is_gone_is_said_before_anything_trains(tmp_path):
    keeper, rows = keeper_of(tmp_path)
    parent, tuned, middle, third = (rows[s["label"]] for s in STAGES)
    keeper.require_starts([parent, tuned, middle, third])
    with pytest.raises(ValueError, match=f"{tuned.run_id} starts from {parent.run_id} at step 100, which is not of th"):
        keeper.require_starts([tuned])
    leave(tmp_path, parent.run_id, 60)
    with pytest.raises(ValueError, match=f"{middle.run_id} .* step 50, and that is past it; remove .*{parent.run_id}"):
        keeper.require_starts([parent, tuned, middle])
    leave(tmp_path, middle.run_id, 0)  # it has what it needs
    keeper.require_starts([parent, tuned, middle])
    keeper._cells.found = {parent.run_id: "completed"}
    with pytest.raises(ValueError, match=f"weights are gone: it is done.* move .*{parent.run_id}.json away"):
        keeper.require_starts([tuned, middle])
    leave(tmp_path, parent.run_id, 100)
    keeper.require_starts([tuned, middle])
    keeper, rows = keeper_of(tmp_path / "b", {parent.run_id: "diverged"})
    keeper.require_starts([tuned])
