"""Laws of their own for groups of a grid's runs (``fit.by``): each group against a sweep of that group alone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from scaling import accounting, fit, grid, records
from scaling.report import figures
from scaling.report.figures import of_groups, of_laws
from scaling.report.page import build, headlines, read
from tests import synthetic
from tests.test_sweep import here, run, trained  # noqa: F401

GRID = """
recipe: default@1
isoflop:
  sizes: [8, 16]
  budgets: [3e8, 6e8, {{flops: 1.2e9, sizes: [16]}}]
axes: {{activation: [{activations}]}}
holdout: {{budgets: [1.2e9]}}
{fit}
"""
RELU, GELU = (f"{{model: {{activation: {name}}}, label: {name}}}" for name in ("relu2", "gelu"))
BY = "fit: {by: activation}"
INLINE = ("--executor", "inline")
QUICK = ("--bootstrap", "0", "--no-figures")


def grouped(folder: Path) -> dict[str, list[records.RunRecord]]:
    """A results folder with two groups of runs, whose laws have other noise."""
    names = {"noise=loud": 0.01, "noise=low": 0.001}
    groups = {}
    for i, (name, noise) in enumerate(names.items()):
        runs = synthetic.sweep_records(noise=noise, seed=i)
        # The same cells in both: told apart by their seed alone.
        renamed = [synthetic.with_seed(r, i) for r in runs]
        groups[name] = sorted(renamed, key=lambda r: r.run_id)
    everything = [r for runs in groups.values() for r in runs]
    synthetic.write(folder, everything)
    manifest = synthetic.manifest(everything) | {"groups": {n: [r.run_id for r in g] for n, g in groups.items()}}
    records.write_json(folder / "sweep.json", manifest)
    return groups


@pytest.mark.slow
def test_a_groups_folder_is_a_results_folder(tmp_path, capsys):
    for name, runs in grouped(tmp_path / "g").items():
        alone = synthetic.write(tmp_path / name, runs)
        together = tmp_path / "g" / name
        assert records.load_records(together) == records.load_records(alone) == runs
        for folder in (alone, together):
            assert fit.main([str(folder), *QUICK]) == 0
        one, other = (json.loads((folder / "fit.json").read_text()) for folder in (alone, together))
        assert one.pop("source") != other.pop("source")
        assert one == other
    capsys.readouterr()
    assert fit.main([str(tmp_path / "g")]) == 2
    assert f"write one of {tmp_path}/g/noise=loud, {tmp_path}/g/noise=low" in capsys.readouterr().err


@pytest.fixture
def one_figure(monkeypatch):
    """Reports draw one figure beside the curves: the others are drawn in test_report."""
    monkeypatch.setattr(figures, "FIGURES", (of_laws.isoflop,))


@pytest.mark.slow
def test_the_report_of_groups_sets_their_answers_side_by_side(tmp_path, one_figure):
    groups = grouped(tmp_path)
    for name in groups:
        assert fit.main([str(tmp_path / name), *QUICK]) == 0
    page = build(tmp_path).read_text()
    assert "there is no fit.json" not in page
    for name, runs in groups.items():
        own = (tmp_path / name / "report.html").read_text()
        assert f'<a href="{name}/report.html">' in page
        assert f"{len(runs) - 1} of {len(runs)}" in own  # one diverged
        assert [r.run_id in own for group in groups.values() for r in group].count(True) == len(runs)
        assert all(r.run_id in page for r in runs)
        for headline in headlines(read(tmp_path / name), []):
            assert headline["value"] in page
        assert (tmp_path / name / "figures" / "isoflop.svg").exists()
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"groups.svg", "groups.png"}
    assert "Groups side by side" in page


@pytest.mark.slow
def test_a_sweep_forecasts_and_fits_each_group_from_its_own_runs(here, capsys):  # noqa: F811
    for name, activations in {"relu2": RELU, "gelu": GELU}.items():
        Path("g.yaml").write_text(GRID.format(activations=activations, fit=""))
        assert run(*INLINE, "--results", name) == 0
    Path("g.yaml").write_text(GRID.format(activations=f"{RELU}, {GELU}", fit=BY))
    capsys.readouterr()
    assert run(*INLINE) == 0
    out = capsys.readouterr().out
    assert out.index("activation=relu2") < out.index("activation=gelu")
    assert out.count("laws of 4 runs") == 2
    assert "report: results/g/report.html" in out
    for name in ("relu2", "gelu"):
        alone, own = Path(name), Path("results/g") / f"activation={name}"
        for file in ("forecast.json", "fit.json"):
            drop = ("written", "sha256", "source", "inputs_sha256")
            one, other = (_without(json.loads((folder / file).read_text()), drop) for folder in (alone, own))
            assert one == other
        assert {r.run_id for r in records.load_records(own)} == {r.run_id for r in records.load_records(alone)}
    assert not Path("results/g/fit.json").exists()
    before = {p: p.read_bytes() for p in Path("results/g").rglob("*") if p.is_file()}
    count = len(trained())
    assert run(*INLINE) == 0
    assert {p: p.read_bytes() for p in Path("results/g").rglob("*") if p.is_file()} == before
    assert len(trained()) == count


@pytest.mark.slow
def test_a_group_of_which_all_diverged_leaves_the_others_their_page(tmp_path, capsys, one_figure):
    loud, low = groups = grouped(tmp_path)
    for one in groups[low]:
        records.save(tmp_path, dataclasses.replace(one, status="diverged", loss=None))
    assert fit.main([str(tmp_path / loud), *QUICK]) == 0
    assert fit.main([str(tmp_path / low), *QUICK]) == 2
    said = capsys.readouterr().err
    count = len(groups[low])
    assert f"nothing to fit: of {count} runs none is completed and fitted ({count} diverged)" in said
    records.write_json(tmp_path / low / "fit.json", {"schema": 1, "error": said.strip()})
    page = build(tmp_path).read_text()
    assert "nothing to fit" in page
    assert f'<a href="{loud}/report.html">' in page


@pytest.mark.slow
def test_the_page_says_of_each_group_what_its_own_says(tmp_path, one_figure):
    groups = grouped(tmp_path)
    loud, low = groups
    assert fit.main([str(tmp_path / loud), *QUICK, "--num-params", "total"]) == 0
    records.write_json(tmp_path / low / "fit.json", {"schema": 1, "error": "3 completed runs: too few"})
    foreign = {"run_id": groups[loud][0].run_id, "flops": 1e12, "predicted": 2.0, "interval": [1.0, 3.0]}
    records.write_json(tmp_path / low / "forecast.json", {"schema": 1, "sha256": "edited", "cells": [foreign]})
    page = build(tmp_path).read_text()
    assert "N counts total parameters" in page
    assert "No laws: 3 completed runs: too few" in page
    assert "does not match: the file was changed" in page
    assert read(tmp_path / low).fit["forecast"] == []  # of another group: labels were swapped since
    manifest = records.manifest(tmp_path)
    records.write_json(
        tmp_path / "sweep.json", {**manifest, "groups": {**manifest["groups"], "noise=none": ["0" * 12]}}
    )
    assert "noise=none has no record yet." in build(tmp_path).read_text()


@pytest.mark.slow
def test_laws_of_another_fit_by_are_named(here, capsys):  # noqa: F811
    text = GRID.format(activations=f"{RELU}, {GELU}", fit="")
    Path("g.yaml").write_text(text)
    assert run(*INLINE) == 0
    Path("g.yaml").write_text(text + BY)
    capsys.readouterr()
    assert run(*INLINE) == 0
    assert "from another fit.by, no longer renewed, delete them: results/g/fit.json\n" in capsys.readouterr().out
    Path("g.yaml").write_text(text)
    assert run(*INLINE) == 0
    old = ", ".join(f"results/g/activation={name}/fit.json" for name in ("gelu", "relu2"))
    assert f"from another fit.by, no longer renewed, delete them: {old}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_forecast_of_another_group_is_not_scored(here):  # noqa: F811
    """The labels of two groups swapped: run_ids stay, and so do the folders' names."""
    Path("g.yaml").write_text(GRID.format(activations=f"{RELU}, {GELU}", fit=BY))
    assert run(*INLINE) == 0
    swapped = [RELU.replace("label: relu2", "label: gelu"), GELU.replace("label: gelu", "label: relu2")]
    Path("g.yaml").write_text(GRID.format(activations=", ".join(swapped), fit=BY))
    assert run(*INLINE) == 0
    for name in ("relu2", "gelu"):
        assert json.loads(Path(f"results/g/activation={name}/fit.json").read_text())["forecast"] == []


def _without(node, keys):
    if isinstance(node, list):
        return [_without(x, keys) for x in node]
    return {k: _without(v, keys) for k, v in node.items() if k not in keys} if isinstance(node, dict) else node


def test_groups_are_named_by_label_or_path(tmp_path):
    (tmp_path / "g.yaml").write_text(GRID.format(activations=f"{RELU}, {GELU}", fit="fit: {by: model.activation}"))
    found = grid.load(tmp_path / "g.yaml")
    assert {k: len(v) for k, v in found.groups.items()} == {"model.activation=relu2": 5, "model.activation=gelu": 5}
    assert [run_id for ids in found.groups.values() for run_id in ids] != [c.run.run_id for c in found.cells]
    assert {run_id for ids in found.groups.values() for run_id in ids} == {c.run.run_id for c in found.cells}


# What a token is worth to lion for one of AdamW's, and a grid of these two over the same cells.
WORTH = 1.5
LION = [(w, 2) for w in (16, 24, 32, 48, 64)]


def compared(folder: Path) -> dict[str, list[records.RunRecord]]:
    """A results folder whose second group makes of each token what the first makes of ``WORTH``."""
    rng = np.random.default_rng(0)
    groups = {}
    for name, worth in {"adamw": 1.0, "lion": WORTH}.items():
        runs = []
        for budget in (3e11, 1.2e12, 4.8e12):
            for size in LION:
                run = synthetic.run_config(size, flops=budget)
                run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, name=name))
                plan = accounting.plan(run)
                loss = synthetic.law(plan.num_params["non_embedding"], worth * plan.num_tokens)
                noisy = float(loss * np.exp(0.001 * rng.normal()))
                labels = {"budget_flops": budget, "optimizer": name}
                record = synthetic.record(run, loss=noisy, labels=labels, rng=rng)
                runs.append(dataclasses.replace(record, curve={column: [] for column in record.curve}))
        groups[f"optim.name={name}"] = runs
    everything = [r for runs in groups.values() for r in runs]
    synthetic.write(folder, everything)
    manifest = synthetic.manifest(everything) | {"groups": {n: [r.run_id for r in g] for n, g in groups.items()}}
    records.write_json(folder / "sweep.json", manifest)
    return groups


@pytest.mark.slow
def test_groups_of_a_results_folder_are_compared_by_a_path_into_their_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", (of_groups.multiplier,))
    compared(tmp_path)
    assert fit.main([str(tmp_path), "--compare", "optim.name", "--bootstrap", "20"]) == 0
    assert "lion, adamw" in capsys.readouterr().out
    found = json.loads((tmp_path / "fit.json").read_text())
    pair = found["multiplier"]["pairs"][0]
    assert (pair["group"], pair["over"]) == ("lion", "adamw")  # as in the grid, not by run_id
    assert found["multiplier"]["num_cells_paired"] == 15
    # In tokens it is planted; in compute, where small models pay for their head, it differs a little from that.
    assert all(WORTH / 1.15 < p["value"] < WORTH * 1.15 for p in pair["points"] if not p["extrapolated"])
    page = build(tmp_path).read_text()
    inside = [p for p in pair["points"] if not p["extrapolated"]]
    assert f"{inside[-1]['value']:.2f}×" in page
    assert "How much better, by optim.name" in page
    assert "One set of exponents for all groups" in page
    assert "times, fitted apart" not in page
    found["multiplier"]["sharing"]["rejected"] = True  # then the groups' own laws lead
    records.write_json(tmp_path / "fit.json", found)
    own = build(tmp_path).read_text()
    assert own.index("times, fitted apart") < own.index("shared, rejected")
    assert "exponents shared by all are rejected" in own
    assert f"{inside[-1]['apart_value']:.2f}×" in own
    assert (tmp_path / "figures" / "multiplier.svg").exists()
    error = {"schema": 1, "error": "too few runs", "multiplier": {"column": "optim.name"}}
    records.write_json(tmp_path / "fit.json", error)
    assert "No comparison: too few runs" in build(tmp_path).read_text()
    # Of another coordinate than the groups' own, it is not this page's.
    assert fit.main([str(tmp_path), "--compare", "optimizer", "--bootstrap", "0", "--no-figures"]) == 0
    assert "multiplier" not in read(tmp_path).fit
    capsys.readouterr()
    assert fit.main([str(tmp_path), "--compare", "optim.nam"]) == 2
    assert "'optim.nam', which is no coordinate of these runs: write one of" in capsys.readouterr().err


def test_a_sweep_compares_its_groups(here, capsys):  # noqa: F811
    """``fit.compare`` does as ``fit.by`` does, and compares; where it cannot, it says why and the laws stand."""
    both = f"{RELU}, {GELU}"
    Path("g.yaml").write_text(GRID.format(activations=both, fit="fit: {compare: activation, laws: [kaplan_c]}"))
    assert run(*INLINE) == 0
    out, path = capsys.readouterr().out, Path("results/g/fit.json")
    assert "compared by activation" in out
    assert "delete them" not in out
    assert all(Path(f"results/g/activation={name}/fit.json").exists() for name in ("gelu", "relu2"))
    found = json.loads(path.read_text())["multiplier"]
    assert (found["column"], found["law"], [g["name"] for g in found["groups"]]) == (
        "activation", "kaplan_c", ["relu2", "gelu"],
    )  # fmt: skip
    assert found["pairs"][0]["points"][0]["interval"]
    written, count = path.read_bytes(), len(trained())
    assert run(*INLINE) == 0
    assert path.read_bytes() == written
    Path("g.yaml").write_text(GRID.format(activations=both, fit="fit: {compare: activation}"))
    capsys.readouterr()
    assert run(*INLINE) == 0
    assert "no comparison: results/g: num_params takes 2 values only" in capsys.readouterr().out
    assert json.loads(path.read_text())["error"].startswith("results/g: num_params takes 2 values only")
    assert len(trained()) == count
