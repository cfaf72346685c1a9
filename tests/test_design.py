"""The command that designs: a grid's cells at the plan's prices, sizes of a table, units, bad input in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import scaling
from scaling import advise, design, grid
from scaling.engine.plan import table, trunks
from tests.laws import data

ROOT = Path(__file__).resolve().parent.parent
GRID = str(ROOT / "sweeps/chinchilla.yaml")
SIZES = ["--sizes", "1e7", "1e8", "1e9", "--budgets", "1e18", "1e19"]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The default sweep's folder without seven of its fitted cells."""
    folder = tmp_path_factory.mktemp("half") / "chinchilla"
    shutil.copytree(ROOT / "results/chinchilla", folder, ignore=shutil.ignore_patterns("figures", "fit.json", "*.html"))
    fitted = [cell.run.run_id for cell in grid.load(GRID).cells if not cell.holdout]
    for run_id in fitted[::3]:
        (folder / "runs" / f"{run_id}.json").unlink()
    return folder, fitted[::3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    data.scattered(30, noise=0.004).to_csv(path, index=False)
    return str(path)


def told(arguments, tmp_path, capsys):
    """(exit code, the JSON it wrote, what it printed)."""
    path = tmp_path / "design.json"
    code = design.main([*arguments, "--bootstrap", "0", "--json", str(path)])
    return code, json.loads(path.read_text()) if path.exists() else None, capsys.readouterr()


def test_cells_without_a_record_are_candidates_at_the_plans_prices(half, tmp_path, capsys):
    """FLOPs together are those of the plan's trunks for the cells alone; held-out cells are no candidates."""
    folder, missing = half
    arguments = [GRID, "--results", str(folder), "--workdir", str(tmp_path / "none"), "--target", "a", "--batch", "9"]
    code, found, _ = told(arguments, tmp_path, capsys)
    assert code == 0
    chosen = [found["candidates"][str(s["candidate"])]["label"].split()[0] for s in found["steps"]]
    assert sorted(chosen) == sorted(missing)
    rows = [row for row in table.rows(grid.load(GRID).cells) if row.run_id in missing]
    assert found["cost"] == pytest.approx(trunks.flops(trunks.share(rows))["spent"])
    assert found["cost"] < trunks.flops(rows)["spent"]
    by_id = {row.run_id: row for row in rows}
    first = by_id[chosen[0]]
    assert (
        found["candidates"][str(found["steps"][0]["candidate"])]["num_params"] == first.plan.num_params["non_embedding"]
    )
    assert found["steps"][0]["cost"] == pytest.approx(table.step_flops(first.cell.run) * first.plan.num_steps)


@pytest.mark.slow
def test_hours_and_dollars_of_a_grid_are_those_of_the_hardware_named(half, tmp_path, capsys):
    folder, _ = half
    arguments = [GRID, "--results", str(folder), "--workdir", str(tmp_path / "none"), "--target", "a", "--hardware",
                 "h100", "--mfu", ".4", "--price", "2"]  # fmt: skip
    _, flops, _ = told([*arguments, "--cost", "FLOPs"], tmp_path, capsys)
    _, hours, _ = told([*arguments, "--budget", "1h"], tmp_path, capsys)
    _, dollars, printed = told([*arguments, "--budget", "5usd"], tmp_path, capsys)
    rate = scaling.advise.Machine("h100", mfu=0.4).profile.peak_flops["float32"] * 0.4
    assert hours["unit"] == "hours"
    assert hours["cost"] == pytest.approx(flops["cost"] / rate / 3600, rel=1e-6)
    assert dollars["cost"] == pytest.approx(2 * hours["cost"], rel=1e-6)
    assert "dollars" in printed.out


def test_the_command_and_python_give_one_answer(runs, tmp_path, capsys):
    code, found, printed = told([runs, "--target", "allocation@1e22", "--batch", "2", "--interval", ".2", *SIZES],
                                tmp_path, capsys)  # fmt: skip
    assert code == 0
    fit = scaling.open(runs).fit("chinchilla", bootstrap=0)
    same = scaling.design(
        fit, target="allocation@1e22", sizes=[1e7, 1e8, 1e9], budgets=[1e18, 1e19], batch=2, asked=0.2
    )
    assert [s["candidate"] for s in found["steps"]] == [s.candidate for s in same.steps]
    assert found["width_after"] == pytest.approx(same.width_after)
    assert found["interval"] == pytest.approx(same.interval)
    assert "in log N" in printed.out
    assert "a width of 0.2" in printed.out


def test_hours_and_dollars_of_sizes_are_those_of_advice(runs):
    found = scaling.open(runs).fit("chinchilla", bootstrap=0).analysis
    machine = advise.Machine("h100")
    flops = design.of_sizes(found, [1e9], [2e10], []).cost([0])
    assert flops == pytest.approx(6 * 1e9 * 2e10)
    hours = design.of_sizes(found, [1e9], [2e10], [], "hours", machine, 8).cost([0])
    assert hours == pytest.approx(flops / float(machine.rate(np.array(1e9))) / 8 / 3600)
    dollars = design.of_sizes(found, [1e9], [2e10], [], "dollars", machine, 8).cost([0])
    assert dollars == pytest.approx(hours * 8 * 3600 * machine.paid())


def test_rows_that_determine_no_law_name_the_run_that_would_mend_them(tmp_path, capsys):
    n = np.geomspace(1e7, 1e9, 9)
    frame = pd.DataFrame({"num_params": n, "num_tokens": 20 * n, "loss": data.chinchilla(n, 20 * n)})
    frame.to_csv(tmp_path / "ray.csv", index=False)
    code, _, printed = told([str(tmp_path / "ray.csv"), "--target", "a", "--sizes", "1e8", "--tokens", "2e9", "2e11"],
                            tmp_path, capsys)  # fmt: skip
    assert code == 2
    assert printed.err.count("\n") == 1
    assert "of 2 candidates 1e+08 on 2e+11 mends it best, for 1.2e+20 FLOPs" in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "b", *SIZES], "--target is b: write one of"),
        (["--target", "multiplier", *SIZES], "--target is multiplier"),
        (["--target", "a"], "--sizes with --tokens or with --budgets"),
        (["--target", "a", "--sizes", "1e8", "--tokens", "1e9", "--budgets", "1e19"], "write two of them"),
        (["--target", "a", "--sizes", "-1", "--tokens", "1e9"], "positive numbers"),
        (["--target", "a", "--batch", "0", *SIZES], "--batch is 0"),
        (["--target", "a", "--exponent", "-1", *SIZES], "--exponent is -1.0"),
        (["--target", "a", "--interval", "0", *SIZES], "--interval is 0.0"),
        (["--target", "a", "--budget", "3h", *SIZES], "add --hardware"),
        (["--target", "a", "--budget", "3h", "--cost", "dollars", *SIZES], "write one unit"),
        (["--target", "a", "--level", "90", *SIZES], "--level is 90.0"),
        (["--target", "a", "--results", "x", *SIZES], "--results and --workdir are a grid's"),
    ],
)
def test_bad_input_is_one_line(arguments, said, runs, tmp_path, capsys):
    code, _, printed = told([runs, *arguments], tmp_path, capsys)
    assert code == 2
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_bad_grids_are_one_line(tmp_path, capsys):
    for arguments, said in (
        ([GRID, "--results", str(tmp_path / "nothing")], "no cell of"),
        ([GRID, *SIZES], "its cells are the candidates"),
        ([str(tmp_path / "none.yaml")], "no such grid file"),
    ):
        code, _, printed = told([*arguments, "--target", "a"], tmp_path, capsys)
        assert code == 2
        assert printed.err.count("\n") == 1
        assert said in printed.err


def test_budgets_are_read_in_three_units():
    assert design.spending("2T") == (2e12, "FLOPs")
    assert design.spending("1e15") == (1e15, "FLOPs")
    assert design.spending("2d") == (48.0, "hours")
    assert design.spending("500usd") == (500.0, "dollars")
    assert design.spending("1e3 dollars") == (1000.0, "dollars")


@pytest.mark.parametrize("option, value", [("--devices", "-2"), ("--devices", "0"), ("--mfu", "-1"), ("--price", "-3")])
def test_a_number_out_of_its_range_prices_nothing(runs, tmp_path, capsys, option, value):
    arguments = [runs, "--target", "a", *SIZES, "--hardware", "h100", "--cost", "hours", option, value]
    code, found, printed = told(arguments, tmp_path, capsys)
    assert (code, found) == (2, None)
    assert printed.err.startswith(f"{option} is {float(value)}: write a ")


def test_options_of_the_fit_are_a_grids_too(half, tmp_path, capsys):
    folder, _ = half
    own = [GRID, "--results", str(folder), "--workdir", str(tmp_path / "none"), "--target", "a"]
    code, _, printed = told([*own, "--law", "nonsense"], tmp_path, capsys)
    assert code == 2
    assert "nonsense" in printed.err
    code, _, printed = told([*own, "--devices", "2.5", "--hardware", "h100"], tmp_path, capsys)
    assert (code, printed.err) == (2, "--devices is 2.5: write a whole number\n")
    assert design.main([*own, "--bootstrap", "-1"]) == 2
    assert capsys.readouterr().err == "--bootstrap is -1: write 0 or more\n"


def test_a_law_of_more_than_candidates_say_is_refused_in_one_line(tmp_path, capsys):
    path, n = tmp_path / "ray.csv", np.geomspace(1e6, 1e9, 9)
    loss = 1.7 + 400 / n**0.34
    pd.DataFrame({"num_params": n, "num_tokens": 20 * n, "unique_tokens": 20 * n, "loss": loss}).to_csv(path)
    code, _, printed = told([str(path), "--law", "data_constrained", "--target", "a", *SIZES], tmp_path, capsys)
    assert code == 2
    assert len(printed.err.splitlines()) == 1


def test_rows_on_one_side_of_every_minimum_have_no_exponent_to_narrow(tmp_path, capsys):
    """The largest size is best at all three budgets: what a law says of a there is the law's own."""
    c, n = (x.ravel() for x in np.meshgrid([1e19, 3e19, 1e20], [1e7, 2e7, 4e7, 8e7], indexing="ij"))
    path, d = tmp_path / "side.csv", c / (6 * n)
    loss = (1.69 + 406.4 / n**0.34 + 410.7 / d**0.28) * np.exp(0.002 * np.random.default_rng(0).normal(size=len(n)))
    pd.DataFrame({"num_params": n, "num_tokens": d, "flops": c, "loss": loss}).to_csv(path, index=False)
    arguments = [str(path), "--law", "chinchilla", "--sizes", "1e9", "--budgets", "1e20"]
    code, _, printed = told([*arguments, "--target", "a"], tmp_path, capsys)
    assert code == 2
    assert "all runs lie on one side of every minimum" in printed.err
    assert told([*arguments, "--target", "loss@1e9,1e10"], tmp_path, capsys)[0] == 0
