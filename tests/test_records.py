"""Records: what is written is what is read, whole or not at all, whatever became of the run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling import accounting, records
from scaling.config import Horizon, OptimConfig, RunConfig
from scaling.families.counting import RULES
from scaling.families.transformer import TransformerConfig
from scaling.fields import to_dict

MODEL = TransformerConfig(d_model=32, num_layers=2, num_heads=2, head_dim=16, num_kv_heads=2, d_ff=128)


def record(*, seed=0, status="completed", loss=1.5, holdout=False, **labels) -> records.RunRecord:
    run = RunConfig(
        model=MODEL,
        optim=OptimConfig(peak_lr=0.01, warmup_tokens=0),
        horizon=Horizon(flops=3e11),
        batch_size=16,
        seed=seed,
    )
    plan = accounting.plan(run)
    curve = {
        "step": [1, plan.num_steps],
        "num_tokens": [plan.batch_tokens, plan.num_tokens],
        "loss": [5.5, loss],
        "standard_error": [0.1, 0.004],
    }
    return records.RunRecord(
        run_id=run.run_id,
        status=status,
        config=to_dict(run),
        sweep={"name": "test", "holdout": holdout, "recipe": "default@1", "labels": {"budget_flops": 3e11, **labels}},
        num_params=plan.num_params,
        num_tokens=plan.num_tokens,
        num_steps=plan.num_steps,
        batch_tokens=plan.batch_tokens,
        unique_tokens=1_000_000,
        epochs=plan.num_tokens / 1_000_000,
        tokens_per_param=plan.tokens_per_param,
        flops=plan.flops,
        loss=loss,
        loss_standard_error=None if loss is None else 0.004,
        bits_per_byte=None if loss is None else loss / np.log(2),
        num_eval_tokens=480_000,
        diverged_at_step=plan.num_steps if status == "diverged" else None,
        curve=curve,
        data={"fingerprint": "0" * 64},
        timing={"seconds": 2.5, "tokens_per_s": 1e5},
    )


def test_what_is_written_is_what_is_read(tmp_path):
    written = record(loss=0.1 + 0.2, lr_scale=1 / 3)  # no digit may be lost
    path = records.save(tmp_path, written)
    assert path == tmp_path / "runs" / f"{written.run_id}.json"
    assert records.read(path) == written
    assert json.loads(path.read_text())["schema"] == records.SCHEMA


def test_saving_twice_gives_the_same_bytes_and_leaves_no_other_file(tmp_path):
    first = records.save(tmp_path, record()).read_bytes()
    assert records.save(tmp_path, record()).read_bytes() == first
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [f"{record().run_id}.json"]


def test_nan_is_never_written(tmp_path):
    good = records.save(tmp_path, record())
    before = good.read_bytes()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            records.save(tmp_path, record(loss=bad))
    assert good.read_bytes() == before  # the old record is still whole
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "schema", "list", "field", "missing"])
def test_a_damaged_record_is_named_with_what_to_do(tmp_path, damage):
    path = records.save(tmp_path, record())
    raw = json.loads(path.read_text())
    damaged = {
        "truncated": path.read_text()[:500],
        "empty": "",
        "schema": json.dumps(raw | {"schema": 99}),
        "list": "[]",
        "field": json.dumps(raw | {"surprise": 1}),
        "missing": json.dumps({"schema": records.SCHEMA}),
    }
    path.write_text(damaged[damage])
    with pytest.raises(ValueError, match=r"not a readable run record .* delete it and run the sweep again") as caught:
        records.load_records(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def edits(raw: dict) -> dict[str, dict]:
    """What an editor, a merge or a tracker's export makes of a record."""
    config = raw["config"]
    return {
        "loss in words": raw | {"loss": "1.5"},
        "no loss": raw | {"loss": None},
        "negative loss": raw | {"loss": -1.5},
        "status of a tracker": raw | {"status": "finished"},
        "null": dict.fromkeys(raw) | {"schema": records.SCHEMA},
        "nested": {"schema": records.SCHEMA, "run": raw},
        "config edited": raw | {"config": config | {"batch_size": 32}},
        "config in part": raw | {"config": {"model": config["model"]}},
        "config null": raw | {"config": None},
        "model a list": raw | {"config": config | {"model": [1]}},
        "another run's id": raw | {"run_id": "0" * 12},
        "counts missing": raw | {"num_params": {}},
        "counts a list": raw | {"num_params": [1, 2]},
        "curve uneven": raw | {"curve": raw["curve"] | {"loss": [1.0]}},
        "sweep null": raw | {"sweep": None},
        "labels null": raw | {"sweep": raw["sweep"] | {"labels": None}},
    }


def test_an_edited_record_is_refused_in_one_line(tmp_path):
    path = records.save(tmp_path, record())
    for what, edited in edits(json.loads(path.read_text())).items():
        path.write_text(json.dumps(edited))
        with pytest.raises(ValueError, match="not a readable run record") as caught:
            records.read(path)
        assert "\n" not in str(caught.value), what
        assert len(str(caught.value)) < 500 + len(str(path)), what


def test_a_record_under_another_name_is_refused(tmp_path):
    path = records.save(tmp_path, record())
    copy = path.with_name("0123456789ab.json")
    path.rename(copy)
    with pytest.raises(ValueError, match="by its file '0123456789ab': it was edited or renamed"):
        records.load(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_record_is_read_as_written_or_refused_in_one_line(tmp_path, data):
    """One value anywhere in a record replaced by anything: no other exception, and what is read can be tabled."""
    path = records.save(tmp_path, record())
    raw = json.loads(path.read_text())
    where = raw
    keys = data.draw(st.sampled_from(sorted(raw)))
    while isinstance(where[keys], dict) and where[keys] and data.draw(st.booleans()):
        where = where[keys]
        keys = data.draw(st.sampled_from(sorted(where)))
    where[keys] = data.draw(JSON)
    path.write_text(json.dumps(raw))
    refusal = ""
    try:
        read = records.load_records(tmp_path)
    except ValueError as e:
        refusal = str(e)
    else:
        assert len(records.table(read)) == 1
        records.curves(read)
    assert not refusal or refusal.startswith(f"{path}: not a readable run record (")
    assert len(refusal.splitlines()) <= 1


def test_done_is_completed_or_diverged_but_not_failed(tmp_path):
    run_id = record().run_id
    assert not records.is_done(tmp_path, run_id)
    for status, done in (("completed", True), ("diverged", True), ("failed", False)):
        records.save(tmp_path, dataclasses.replace(record(), status=status))
        assert records.is_done(tmp_path, run_id) is done


def test_the_table_has_every_run_and_every_convention(tmp_path):
    runs = [
        record(seed=0, lr_scale=0.5),
        record(seed=1, holdout=True, lr_scale=1.0),
        record(seed=2, status="diverged", loss=None),
        record(seed=3, status="failed", loss=None),
    ]
    for r in runs:
        records.save(tmp_path, r)
    table = records.load(tmp_path).set_index("run_id")
    assert set(table.index) == {r.run_id for r in runs}
    for r in runs:
        row = table.loc[r.run_id]
        assert row["status"] == r.status
        assert row["num_params"] == r.num_params["non_embedding"]
        for rule in RULES:
            assert row[f"flops_{rule}"] == r.flops[rule]
        for group in r.num_params:
            assert row[f"num_params_{group}"] == r.num_params[group]
        assert (row["loss"] == r.loss) if r.loss is not None else pd.isna(row["loss"])
        assert row["holdout"] == r.sweep["holdout"]
        assert row["budget_flops"] == 3e11
    assert table.loc[runs[0].run_id, "lr_scale"] == 0.5
    assert pd.isna(table.loc[runs[2].run_id, "lr_scale"])


def test_labels_never_shadow_a_measurement():
    row = records.table([record(loss=1.5, **{"num_tokens": "a label"})]).iloc[0]
    assert row["num_tokens"] == record().num_tokens
    assert row["loss"] == 1.5


def test_curves_are_long_and_spend_the_flops_in_step_with_the_tokens():
    runs = [record(seed=0), record(seed=1)]
    curves = records.curves(runs)
    assert len(curves) == 4
    for r in runs:
        mine = curves[curves["run_id"] == r.run_id]
        np.testing.assert_allclose(mine["flops_exact"].iloc[-1], r.flops["exact"], rtol=1e-15)
        np.testing.assert_allclose(mine["flops_exact"].iloc[0] * r.num_steps, r.flops["exact"], rtol=1e-12)
    assert records.curves([]).empty


def test_curves_of_a_run_that_never_began():
    empty = {name: [] for name in record().curve}
    failed = dataclasses.replace(record(seed=1), status="failed", loss=None, num_tokens=0, curve=empty)
    curves = records.curves([record(), failed])
    assert set(curves["run_id"]) == {record().run_id}
    assert curves["loss"].dtype == np.float64


def test_an_empty_folder_is_an_empty_table(tmp_path):
    assert records.load_records(tmp_path) == []
    assert records.load(tmp_path).empty


def test_a_reader_never_sees_half_a_record_though_the_writer_is_killed(tmp_path):
    """A writer replaces one record as fast as it can until it is killed; every read in between is of a whole one."""
    path = tmp_path / "x.json"
    script = (
        "import sys\nfrom pathlib import Path\nfrom scaling import records\n"
        "payloads = [{'value': n, 'padding': [n] * 20_000} for n in (0, 1)]\n"
        "while True:\n    for p in payloads: records.write_json(Path(sys.argv[1]), p)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen = set()
        for _ in range(40):
            payload = json.loads(path.read_text())
            assert payload["padding"] == [payload["value"]] * 20_000
            seen.add(payload["value"])
            time.sleep(0.003)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert json.loads(path.read_text())["padding"][-1] in seen | {0, 1}


def manifest_of(runs, **changes) -> dict:
    cells = [{"run_id": r.run_id, "status": r.status, "predicted_seconds": 2.0} for r in runs]
    plan = {"predicted_seconds": 100.0, "predicted_training_seconds": 80.0, "memory_bytes": 10**9, "kwh": 2.0}
    actual = {"wall_seconds": 110.0, "training_seconds": 60.0, "kwh": 2.2, "fraction_not_in_steps": 0.1}
    return {"cells": cells, "plan": plan, "actual": {**actual, "peak_device_bytes": None}, **changes}


def test_the_plan_against_what_happened():
    runs = [record(seed=i) for i in range(3)]
    took = (1.0, 3.0, 2.2)
    runs = [dataclasses.replace(r, timing={"seconds": s}) for r, s in zip(runs, took)]
    rows = {row["key"]: row for row in records.plan_against_actual(manifest_of(runs), runs)}
    assert [rows[key]["ratio"] for key in ("wall", "training", "kwh")] == pytest.approx([1.1, 0.75, 1.1])
    assert (rows["cells"]["low"], rows["cells"]["ratio"], rows["cells"]["high"]) == (0.5, 1.1, 1.5)
    assert (rows["memory"]["planned"], rows["memory"]["actual"], rows["memory"]["ratio"]) == (10**9, None, None)
    assert rows["idle"]["actual"] == 0.1
    assert "dollars" not in rows  # nothing is known of it
    waiting = manifest_of(runs)
    waiting["cells"][0]["status"] = "waiting"
    assert records.plan_against_actual(waiting, runs) == records.plan_against_actual({}, runs) == []


@pytest.mark.parametrize("side", [[], "true", 1, None])
def test_a_side_that_is_neither_true_nor_false_is_refused(tmp_path, side):
    found = record()
    path = records.save(tmp_path, dataclasses.replace(found, sweep={**found.sweep, "holdout": side}))
    with pytest.raises(ValueError, match=r"sweep\.holdout is .*, not true or false"):
        records.read(path)
