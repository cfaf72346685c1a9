"""What a grid says after its runs have trained: what is held out, what labels are called, which cells there are."""

import dataclasses
import json
from pathlib import Path

import pytest

from scaling import fit, records
from scaling.report.page import build
from tests import synthetic
from tests.test_sweep import GRID, INLINE, here, run, trained  # noqa: F401

QUICK = ("--law", "chinchilla", "--one-law", "--bootstrap", "0", "--no-figures")


def told(name="fit.json"):
    return json.loads(Path("results/g", name).read_text())


def change_sides(folder, count=2):
    """Two cells of each side of a folder's sweep.json go over: the run_ids of those now held out, and now fitted."""
    whole = records.read_json(Path(folder) / "sweep.json")
    done = [cell for cell in whole["cells"] if cell["status"] == "completed"]
    moved = {now: [cell for cell in done if cell["holdout"] != now][:count] for now in (True, False)}
    for now, cells in moved.items():
        for cell in cells:
            cell["holdout"] = now
    records.write_json(Path(folder) / "sweep.json", whole)
    return [{cell["run_id"] for cell in cells} for cells in moved.values()]


def test_what_is_held_out_afterwards_is_not_fitted_and_no_forecast(here, capsys):  # noqa: F811
    assert run(*INLINE) == 0
    begun, sealed = len(trained()), Path("results/g/forecast.json").read_bytes()
    (forecast,) = told()["forecast"]
    Path("g.yaml").write_text(GRID.replace("[1.2e9]", "[6e8]"))
    capsys.readouterr()
    assert run(*INLINE) == 0
    out = capsys.readouterr().out
    assert len(trained()) == begun  # nothing trains again
    assert Path("results/g/forecast.json").read_bytes() == sealed
    assert told()["num_observations"] == 3
    assert told()["forecast"] == []  # the one that was forecast is fitted now
    assert "2 runs" in out
    assert "are held out now, not when they trained: what is said of them is no forecast" in out
    assert f"1 runs ({forecast['run_id']}) are fitted now, held out then" in out
    assert {c["run_id"] for c in told("sweep.json")["cells"] if c["holdout"]} == {
        r.run_id for r in records.load_records("results/g") if r.sweep["holdout"]
    }
    Path("g.yaml").write_text(GRID)  # back again: as it was
    assert run(*INLINE) == 0
    assert told()["forecast"] == [forecast]
    assert "changed sides" not in capsys.readouterr().out


def test_a_label_that_is_renamed_is_renamed_in_the_laws(here):  # noqa: F811
    grid = "recipe: default@1\naxes:\n  flavour:\n    - {seed: 0, label: old}\n    - {seed: 1, label: fine}\n"
    grid += "base: {model: {width: 8}, horizon: {tokens: 3000}}\n"
    Path("g.yaml").write_text(grid)
    run(*INLINE)
    Path("g.yaml").write_text(grid.replace("old", "new"))
    run(*INLINE)
    assert set(records.load("results/g")["flavour"]) == {"new", "fine"}
    assert len(trained()) == 2


@pytest.mark.slow
def test_the_fit_command_takes_the_grids_word(tmp_path, capsys):
    runs = synthetic.sweep_records()
    folder = synthetic.write(tmp_path / "s", runs)
    held, fitted = change_sides(folder)
    assert fit.main([str(folder), *QUICK]) == 0
    out = capsys.readouterr().out
    payload = records.read_json(folder / "fit.json")
    assert {row["run_id"] for row in payload["left_out"]} == held
    assert {row["run_id"] for row in payload["forecast"]} == {
        r.run_id for r in runs if r.sweep["holdout"] and r.run_id not in fitted
    }
    excluded = {row["run"] for row in payload["excluded"]}
    assert held < excluded
    assert not fitted & excluded
    assert "Runs left out after they had trained: their losses were known, this is no forecast" in out
    assert out.index("are held out now") < out.index("chinchilla")
    page = build(folder).read_text()
    assert "Left out after they had trained: no forecast" in page
    sides = {r.run_id: r.run_id in held or (r.sweep["holdout"] and r.run_id not in fitted) for r in runs}
    by_hand = [dataclasses.replace(r, sweep={**r.sweep, "holdout": sides[r.run_id]}) for r in runs]
    again = fit.analyse(records.table(by_hand), laws=("chinchilla",), bootstrap=0, combined=False)
    assert payload["laws"]["chinchilla"]["params"] == pytest.approx(again.fits["chinchilla"].params)


def test_the_fit_command_reads_the_cells_of_the_grid_and_says_what_is_extra(tmp_path, capsys):
    runs = synthetic.sweep_records()
    folder = synthetic.write(tmp_path / "s", runs)
    assert fit.main([str(folder), *QUICK]) == 0
    before = records.read_json(folder / "fit.json")
    capsys.readouterr()
    strange = [dataclasses.replace(synthetic.with_seed(r, 77), loss=9.0) for r in runs[:3] if r.loss]
    for one in strange:
        records.save(folder, one)
    assert fit.main([str(folder), *QUICK]) == 0
    assert "3 records of no cell of its grid" in capsys.readouterr().out
    payload = records.read_json(folder / "fit.json")
    assert payload["laws"] == before["laws"]
    assert records.strangers(folder) == sorted(r.run_id for r in strange)
    (folder / "sweep.json").unlink()  # records alone: all of them
    assert len(records.load_records(folder)) == len(runs) + 3


def test_the_fit_command_does_not_replace_what_the_sweep_wrote(tmp_path, capsys):
    folder = synthetic.write(tmp_path / "s", synthetic.sweep_records())
    own = {"schema": 1, "laws": {}, "inputs_sha256": "of the sweep's inputs"}
    records.write_json(folder / "fit.json", own)
    assert fit.main([str(folder), *QUICK]) == 0
    assert records.read_json(folder / "fit.json") == own
    assert records.read_json(folder / "fit" / "fit.json")["laws"]
    assert f"written: {folder / 'fit' / 'fit.json'}" in capsys.readouterr().out
    assert fit.main([str(folder), *QUICK, "--out", str(folder)]) == 0  # asked for
    assert records.read_json(folder / "fit.json") != own


def test_another_grid_of_the_same_name_takes_no_folder_over(here, capsys):  # noqa: F811
    assert run(*INLINE) == 0
    before = {p: p.read_bytes() for p in Path("results/g").rglob("*") if p.is_file()}
    Path("elsewhere").mkdir()
    Path("elsewhere/g.yaml").write_text(GRID.replace("[8, 16]", "[24, 32]").replace("[16]", "[32]"))
    capsys.readouterr()
    for option in ((), ("--plan",)):
        assert run("--grid", "elsewhere/g.yaml", *INLINE, *option) == 2
        err = capsys.readouterr().err
        assert "results/g has the sweep of another grid, g.yaml" in err
        assert "write another --results" in err
        assert err.count("\n") == 1
    assert {p: p.read_bytes() for p in Path("results/g").rglob("*") if p.is_file()} == before
    assert run("--grid", "elsewhere/g.yaml", "--results", "results/other", *INLINE) == 0
    # Changed where it lies, it is the same grid: what is of no cell any more is said.
    Path("g.yaml").write_text(GRID.replace("[8, 16]", "[8, 16, 24]").replace("3e8, ", ""))
    capsys.readouterr()
    assert run(*INLINE) == 0
    assert (
        "results/g: 2 records are of no cell of this grid: they stay, in no law and no report"
        in capsys.readouterr().out
    )
