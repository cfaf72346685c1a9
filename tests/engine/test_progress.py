"""What a person reads while a sweep runs."""

import dataclasses
import io

import pytest
from rich.console import Console

from scaling import numbers
from scaling.config import Horizon, OptimConfig, RunConfig
from scaling.engine.folder.cells import failed_record
from scaling.engine.plan import packing, table, trunks
from scaling.engine.run import progress
from scaling.families.transformer import TransformerConfig
from scaling.grid import Cell

MODEL = TransformerConfig(d_model=16, num_layers=2, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=64)


def rows_of(seconds):
    cells = [
        Cell(RunConfig(MODEL, OptimConfig(1e-2, 100), Horizon(steps=100), batch_size=4, seed=i))
        for i in range(len(seconds))
    ]
    return [dataclasses.replace(row, seconds=s) for row, s in zip(table.rows(cells), seconds)]


def follow(seconds, workers=2, terminal=False):
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)
    packs = packing.build(rows_of(seconds))
    return progress.Progress(console, packs, workers=workers, done=0, total=len(packs)), packs, console.file


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (950, "950"), (6144, "6.14K"), (999_600, "1M"), (1.234e6, "1.23M"), (2e12, "2T")]
)
def test_counts_are_short(value, text):
    assert numbers.compact(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (None, "–"),
        (0.04, "<0.1 s"),
        (0.0, "0.0 s"),
        (8.44, "8.4 s"),
        (99.4, "99 s"),
        (100, "1:40"),
        (3599.6, "1:00:00"),
        (7500, "2:05:00"),
    ],
)
def test_durations_read_as_a_clock(seconds, text):
    assert numbers.duration(seconds) == text


def test_time_left_is_the_schedule_of_what_is_left_at_the_pace_so_far(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display, packs, _ = follow([40.0, 30.0, 20.0])
    assert display.seconds_left() == 50.0  # 40 beside 30 + 20
    for worker, pack in enumerate(packs[:2]):
        display.on_event({"event": "start", "key": pack.key, "worker": worker})
    at = {"event": "progress", "num_steps": 100, "loss": 2.0}
    display.on_event({**at, "key": packs[0].key, "worker": 0, "step": 0})
    display.on_event({**at, "key": packs[0].key, "worker": 0, "step": 50})
    assert display.seconds_left() == 40.0  # 30 + nothing beside 20 + 20
    clock[0] = 60.0
    display.on_event({**at, "key": packs[1].key, "worker": 1, "step": 0})
    display.on_event({**at, "key": packs[1].key, "worker": 1, "step": 100})
    display.on_event({"event": "done", "key": packs[1].key, "worker": 1})
    assert display.seconds_left() == 2.0 * 20  # it took 60 where 30 were foreseen; 20 beside 20 are left


def test_time_left_counts_a_branch_from_where_it_leaves_its_trunk(monkeypatch):
    """Trunk of 1,000 steps in 100 s; branches of 600 (at 480, 40 s by itself) and 300 (at 240, 200 s) steps."""
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    optim = OptimConfig(1e-2, 100)
    cells = [Cell(RunConfig(MODEL, optim, Horizon(steps=steps), batch_size=4)) for steps in (1000, 600, 300)]
    rows = [
        dataclasses.replace(row, seconds=seconds)
        for row, seconds in zip(trunks.share(table.rows(cells)), (100.0, 40.0, 200.0))
    ]
    packs = packing.build(rows)
    trunk, middle, short = (next(p for p in packs if p.key == row.run_id) for row in rows)
    display = progress.Progress(Console(file=io.StringIO()), packs, workers=2, done=0, total=3)
    assert display.seconds_left() == 224.0  # the short one from 24 on; the middle one is done beside it
    display.on_event({"event": "start", "key": trunk.key, "worker": 0})
    at = {"event": "progress", "num_steps": 1000, "loss": 2.0, "key": trunk.key, "worker": 0}
    display.on_event({**at, "step": 0})
    assert display.seconds_left() == 224.0
    display.on_event({**at, "step": 140})
    assert display.seconds_left() == 210.0  # in 100 more steps of .1 s
    display.on_event({**at, "step": 500})  # past both
    assert display.seconds_left() == 200.0
    display.on_event({"event": "start", "key": short.key, "worker": 1})
    display.on_event({**at, "key": short.key, "worker": 1, "step": 270, "num_steps": 300})
    assert display.seconds_left() == 100.0  # half of its 60 own steps; 50 + 40 beside it
    display.on_event({"event": "done", "key": trunk.key, "worker": 0})
    display.on_event({"event": "done", "key": short.key, "worker": 1})
    assert set(display._waiting) == {middle.key}


def test_without_a_prediction_no_time_is_promised():
    display, _, _ = follow([None, 3.0])
    assert display.seconds_left() is None


def test_every_way_to_end_has_its_line():
    display, packs, out = follow([4.0, 3.0])
    for pack in packs:
        display.on_event({"event": "start", "key": pack.key, "worker": 0})
        display.on_event({"event": "retry", "key": pack.key, "worker": 0, "reason": "worker killed by signal 9"})
        display.on_event({"event": "start", "key": pack.key, "worker": 0})
        display.on_event({"event": "failed", "key": pack.key, "worker": 0, "reason": "x"})
    row = packs[0].rows[0]
    failed = failed_record(row, "g", "[out of] memory")
    display.cell_ended(row, failed)
    ended = {"num_tokens": 51_200, "timing": {"seconds": 5.0}}
    display.cell_ended(row, dataclasses.replace(failed, status="diverged", diverged_at_step=7, **ended))
    done = {"status": "completed", "loss": 1.23456, "loss_standard_error": 0.00123}
    display.cell_ended(row, dataclasses.replace(failed, **done, **ended))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("worker killed by signal 9; goes on from its last checkpoint")
    assert "failed: [out of] memory" in lines[2]
    assert "diverged at step 7" in lines[3]
    assert "loss 1.2346 ± 0.0012  5.0 s (predicted 4.0 s)" in lines[4]


def test_a_terminal_shows_each_worker_and_the_sum(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display, packs, out = follow([40.0, 40.0], terminal=True)
    with display:
        for worker, pack in enumerate(packs):
            display.on_event({"event": "start", "key": pack.key, "worker": worker})
        clock[0] = 1.0
        display.on_event(
            {"event": "progress", "key": packs[0].key, "worker": 0, "step": 25, "num_steps": 100, "loss": 2.5}
        )
    text = out.getvalue()
    assert "step 25 of 100" in text
    assert "loss 2.5000" in text
    assert "starting" in text
    assert "0/2 cells  1.0 s gone, 40 s left" in text


def test_elsewhere_a_line_a_minute(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display, packs, out = follow([400.0])
    display.on_event({"event": "start", "key": packs[0].key, "worker": 0})
    for clock[0] in (30.0, 61.0, 62.0, 122.0):
        display.on_event({"event": "tick"})
    assert out.getvalue().splitlines() == ["… 0/1 cells  61 s gone, 6:40 left", "… 0/1 cells  2:02 gone, 6:40 left"]
