"""Bytes of checkpoints: the bound by hand, the order that a small budget forces, and what really lies on the disk."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scaling import grid
from scaling.engine.plan import disk, packing, table, trunks

ROOT = Path(__file__).resolve().parents[2]


def packs_of(seeds=3, steps=(300, 600, 1000), held=()):
    raw = {
        "base": {"model": {"width": 16}, "batch_size": 8, "optim": {"warmup_tokens": 8192}},
        "axes": {"horizon.steps": [*steps, *held]},
        "seeds": list(range(seeds)),
    } | ({"holdout": {"cells": [{"steps": list(held)}]}} if held else {})
    rows = trunks.share(table.rows(grid.expand(raw, name="g").cells))
    later = [row for row in rows if row.cell.holdout]
    return packing.build([row for row in rows if not row.cell.holdout], carried=later), disk.checkpoint_bytes(rows[0])


def test_the_budget_decides_the_order():
    """Three trunks with two branches each, two workers: all six wait, or those of two trunks."""
    packs, one = packs_of()
    plenty = disk.order(packs, 2, 1e12)
    assert plenty.packs == packs
    assert [bool(pack.after) for pack in plenty.packs] == [False] * 3 + [True] * 6  # the longest first
    assert (plenty.waiting, plenty.training) == (6 * one, 4 * one)
    tight = disk.order(packs, 2, 9 * one)
    assert [bool(pack.after) for pack in tight.packs] == [True] * 6 + [False] * 3
    assert (tight.waiting, tight.training) == (4 * one, 4 * one)
    with pytest.raises(ValueError, match=r"^--disk-budget \S+ GB: checkpoints take up to .*; write at least 0.00") as e:
        disk.order(packs, 2, 7 * one)
    least = float(str(e.value).partition("write at least ")[2].partition(",")[0])
    assert disk.order(packs, 2, least * 1e9).packs == tight.packs


def test_branches_of_held_out_cells_wait_until_their_turn():
    """Five trunks, each with two fitted and two held-out branches: all of two trunks, and the held-out ones of all."""
    packs, one = packs_of(seeds=5, held=(800, 2000))
    assert disk.order(packs, 2, 1e12).waiting == 20 * one
    assert disk.order(packs, 2, 23 * one).waiting == (2 * 4 + 5 * 2) * one
    assert disk.order(packs_of(seeds=1)[0], 1, 1e12).total == 4 * one


def test_what_is_kept_counts():
    packs, one = packs_of()
    with pytest.raises(ValueError, match=r"those of other runs, which stay; write at least \S+, .*--remove-orphans$"):
        disk.order(packs, 2, 9 * one, kept=2 * one)
    assert disk.order(packs, 2, 12 * one, kept=2 * one).total == (2 + 6 + 4) * one


GRID = """
base:
  model: {width: 8}
  data: {source: "text:text", seq_len: 32, validation_fraction: 0.2}
  batch_size: 4
  optim: {warmup_tokens: 1280}
  eval: {num_points: 4, curve_tokens: 1024}
axes: {horizon.steps: [200, 300, 400, 600]}
seeds: [0, 1]
fit: {bootstrap: 20}
execution: {checkpoint_seconds: 0.2}
"""


@pytest.mark.slow
def test_what_lies_on_the_disk_stays_within_the_budget(tmp_path, monkeypatch):
    """A real sweep on the least budget that its plan accepts, its work folder measured all the while."""
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text(GRID)
    Path("text").mkdir()
    for i in range(100):
        Path("text", f"{i}.txt").write_text(f"line {i} of a text that is not very long " * 40)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "scaling.sweep", "--grid", "g.yaml", "--workers", "1", "--disk-budget"]
    refused = subprocess.run([*command, "0.0001"], env=env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    least = refused.stderr.partition("write at least ")[2].partition(",")[0]
    largest, over = 0, threading.Event()

    def watch():
        nonlocal largest
        while not over.is_set():
            sizes = []
            for folder, _, files in os.walk(".scaling/g/checkpoints"):
                for name in files:
                    with contextlib.suppress(FileNotFoundError):
                        sizes.append(os.stat(os.path.join(folder, name)).st_size)
            largest = max(largest, sum(sizes))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = subprocess.run([*command, least], env=env, capture_output=True, text=True)
    over.set()
    watcher.join()
    assert done.returncode == 0, done.stderr
    assert "checkpoints: " in done.stdout
    assert 0 < largest <= float(least) * 1e9
