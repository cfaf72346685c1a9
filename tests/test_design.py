"""The command that designs: a grid's cells at the plan's prices, sizes of a table, units, bad input in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import scaling
from scaling import advise, design, grid
from scaling.engine.plan import table, trunks
from scaling.laws.answers.design import Target, propose_of_groups
from scaling.laws.answers.design.of_groups import spread_of_groups
from tests.laws import data

ROOT = Path(__file__).resolve().parent.parent
GRID = str(ROOT / "sweeps/chinchilla.yaml")
SIZES = ["--sizes", "1e7", "1e8", "1e9", "--budgets", "1e18", "1e19"]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """(a grid whose cells share trunks, a folder with the records of some of them, the ids of the others): the
    Transformers among the families' runs, and larger budgets."""
    folder = tmp_path_factory.mktemp("half")
    raw = yaml.safe_load((ROOT / "sweeps/families.yaml").read_text(encoding="utf-8"))
    raw = {key: raw[key] for key in ("recipe", "base", "isoflop")}
    raw["isoflop"]["sizes"].remove(64)
    raw["isoflop"]["budgets"] += [1.2e12, 2.4e12]
    path = folder / "half.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    shutil.copytree(ROOT / "results/families/runs", folder / "results/runs")
    there = {file.stem for file in (folder / "results/runs").iterdir()}
    fitted = [cell.run.run_id for cell in grid.load(path).cells if not cell.holdout]
    missing = [run_id for run_id in fitted if run_id not in there]
    assert len(missing) == 8
    return str(path), folder / "results", missing


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
    path, folder, missing = half
    arguments = [path, "--results", str(folder), "--workdir", str(tmp_path / "none"), "--target", "a", "--batch", "20"]
    code, found, _ = told(arguments, tmp_path, capsys)
    assert code == 0
    chosen = [found["candidates"][str(s["candidate"])]["label"].split()[0] for s in found["steps"]]
    assert sorted(chosen) == sorted(missing)
    rows = [row for row in table.rows(grid.load(path).cells) if row.run_id in missing]
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
    path, folder, _ = half
    arguments = [path, "--results", str(folder), "--workdir", str(tmp_path / "none"), "--target", "a", "--hardware",
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


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Two families' runs under one set of exponents, the second dearer a token."""
    rng, parts = np.random.default_rng(0), []
    for name, truth, dearer in (("plain", data.HOFFMANN, 1.0), ("new", data.HOFFMANN | {"A": 300.0, "B": 350.0}, 1.3)):
        part = data.isoflop(budgets=(1e18, 1e19, 1e20), sizes=5)[["num_params", "num_tokens"]]
        n, d = part["num_params"], part["num_tokens"]
        loss = data.chinchilla(n, d, truth) * np.exp(0.003 * rng.normal(size=len(part)))
        parts.append(part.assign(flops=6 * dearer * n * d, loss=loss, family=name))
    path = tmp_path_factory.mktemp("families") / "runs.csv"
    pd.concat(parts).to_csv(path, index=False)
    return str(path)


def test_runs_of_two_groups_narrow_their_multiplier_as_least_squares_has_it(families, tmp_path, capsys):
    """Each width against (Jᵀ J)⁻¹ of E, α, β and both groups' A and B, the multiplier by its closed form: with shared
    exponents and costs in a fixed ratio r, L_new(C) = L_plain(m C) has m = (K_plain / K_new)^((α+β)/(α β)) / r, where
    L* - E ∝ K C^(-αβ/(α+β)) and K = A^(β/(α+β)) B^(α/(α+β))."""
    asked = ["--target", "multiplier@1e20", "--compare", "new", "family=plain", "--batch", "5", *SIZES]
    code, found, printed = told([families, *asked], tmp_path, capsys)
    assert code == 0, printed.err
    rows = pd.read_csv(families)
    compared = scaling.compare(rows, "family", bootstrap=0)
    new = (rows["family"] == "new").to_numpy()
    names = ["E", "alpha", "beta", "A0", "A1", "B0", "B1"]
    first, second = compared.params("plain"), compared.params("new")
    at = np.array([first[k] for k in names[:3]] + [first["A"], second["A"], first["B"], second["B"]])

    def log_loss(p, n, d, new):
        E, alpha, beta, A0, A1, B0, B1 = p
        return np.log(E + np.where(new, A1, A0) * n**-alpha + np.where(new, B1, B0) * d**-beta)

    def log_times(p):
        _, alpha, beta, A0, A1, B0, B1 = p
        return (np.log(A0 / A1) / alpha + np.log(B0 / B1) / beta) - np.log(1.3)

    def slopes(function):
        steps = 1e-6 * np.diag(at)
        return np.array([(function(at + s) - function(at - s)) / (2 * s.sum()) for s in steps])

    def spread(n, d, new):
        J, g = slopes(lambda p: log_loss(p, np.array(n), np.array(d), np.array(new))), slopes(log_times)
        return np.sqrt(g @ np.linalg.solve(J @ J.T, g))

    n, d = rows["num_params"].tolist(), rows["num_tokens"].tolist()
    assert np.log(found["interval"]).mean() == pytest.approx(log_times(at), abs=1e-3)
    before, here = spread(n, d, new), list(new)
    width = np.diff(np.log(found["interval"]))[0]
    assert found["width"] == pytest.approx(width)
    groups = []
    for step in found["steps"]:
        candidate = found["candidates"][str(step["candidate"])]
        groups.append(candidate["label"].split(":")[0])
        n.append(candidate["num_params"])
        d.append(candidate["num_tokens"])
        here.append(groups[-1] == "new")
        assert step["width_after"] == pytest.approx(width * spread(n, d, here) / before, rel=2e-3)
        dearer = 1.3 if here[-1] else 1.0
        assert candidate["flops"] == pytest.approx(6 * dearer * n[-1] * d[-1], rel=1e-6)
    assert set(groups) == {"new", "plain"}
    assert "in log of it" in printed.out
    columns = {c: rows[c].to_numpy() for c in ("num_params", "num_tokens", "flops")}
    left = spread_of_groups(compared, ("new", "plain"), Target.of("multiplier@1e20"), columns, new.astype(int))
    every = np.arange(len(rows))
    for some in (every[::2], every[:22], every[4:]):
        kept = rows.iloc[some]
        exact = spread(kept["num_params"], kept["num_tokens"], new[some]) / before
        assert left(some) / left(every) == pytest.approx(exact, rel=2e-3)


def test_a_grids_cells_without_a_record_narrow_the_multiplier_of_its_groups(tmp_path, capsys):
    """Each candidate is of its own family, at its own cost; what is compared is the grid's own coordinate."""
    path, folder = str(ROOT / "sweeps/families.yaml"), tmp_path / "families"
    shutil.copytree(ROOT / "results/families", folder, ignore=shutil.ignore_patterns("figures", "fit.json", "*.html"))
    cells = [cell for cell in grid.load(path).cells if not cell.holdout]
    gone = {cell.run.run_id: cell for cell in cells[::4]}
    for run_id in gone:
        (folder / "runs" / f"{run_id}.json").unlink()
    arguments = [path, "--results", str(folder), "--workdir", str(tmp_path / "none"), "--batch", "99"]
    code, found, printed = told([*arguments, "--target", "multiplier@1e12", "--compare", "lstm", "transformer"],
                                tmp_path, capsys)  # fmt: skip
    assert code == 0, printed.err
    chosen = [found["candidates"][str(s["candidate"])]["label"].split()[0] for s in found["steps"]]
    assert sorted(chosen) == sorted(gone)
    gain = {run_id: step["gain"] for run_id, step in zip(chosen, found["steps"])}
    of_two = [g for run_id, g in gain.items() if gone[run_id].run.model.family in ("transformer", "recurrent")]
    assert max(of_two) > max([g for g in gain.values() if g not in of_two], default=0.0)
    code, _, printed = told([*arguments, "--target", "a"], tmp_path, capsys)
    assert code == 2
    assert "--target multiplier@C, which is of two" in printed.err
    for cell in cells:
        if cell.labels["family"] == "lstm":
            (folder / "runs" / f"{cell.run.run_id}.json").unlink(missing_ok=True)
    asked = [*arguments, "--target", "multiplier@1e12", "--compare"]
    code, found, printed = told([*asked, "gru", "transformer"], tmp_path, capsys)
    assert code == 0
    assert "12 cells of lstm are no candidates: no run of it is completed" in printed.out
    code, _, printed = told([*asked, "lstm", "transformer"], tmp_path, capsys)
    assert code == 2
    assert "no run of lstm is completed: train some first" in printed.err
    code, _, printed = told([*asked, "x", "y", "--by", "model"], tmp_path, capsys)
    assert code == 2
    assert "--by is model, which is a section" in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--compare", "new", "plain", "--by", "family", "--law", "kaplan_n"],
            "is not of N and D: write --law chinchilla",
        ),
        (["--compare", "family=new", "lr=plain"], "of two columns (family, lr): write two values of one"),
        (["--compare", "family=new", "plain", "--by", "size"], "of two columns (family, size)"),
        (["--compare", "new", "old", "--by", "family"], "--compare is new old: write two of plain, new"),
        (["--compare", "new", "plain", "--by", "family", "--law", "joined", "chinchilla"], "by one law: write one"),
    ],
)
def test_bad_groups_are_one_line(arguments, said, families, tmp_path, capsys):
    code, _, printed = told([families, "--target", "multiplier@1e20", *arguments, *SIZES], tmp_path, capsys)
    assert code == 2
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_python_says_where_a_multipliers_runs_are_designed(families):
    fit = scaling.open(families).fit("chinchilla", bootstrap=0)
    with pytest.raises(ValueError, match="of two groups: --compare GROUP OVER, or propose_of_groups"):
        scaling.design(fit, target="multiplier@1e20", sizes=[1e8], budgets=[1e19])
    compared = scaling.compare(pd.read_csv(families), "family", bootstrap=0)
    some = design.of_sizes(compared.groups[0].cost, [1e8, 1e9], [], [1e19])
    with pytest.raises(ValueError, match=r"write multiplier@C"):
        propose_of_groups(compared, ("new", "plain"), some, [0, 1], Target.of("a"))
    with pytest.raises(ValueError, match=r"member is not the number of a group of each, 0 to 1"):
        propose_of_groups(compared, ("new", "plain"), some, [0, 7], Target.of("multiplier@1e20"))
    assert propose_of_groups(compared, ("new", "plain"), some, [0, 1], Target.of("multiplier@1e20")).steps


def test_hours_and_dollars_of_sizes_are_those_of_advice(runs):
    found = scaling.open(runs).fit("chinchilla", bootstrap=0).analysis
    machine = advise.Machine("h100")
    flops = design.of_sizes(found.cost, [1e9], [2e10], []).cost([0])
    assert flops == pytest.approx(6 * 1e9 * 2e10)
    hours = design.of_sizes(found.cost, [1e9], [2e10], [], "hours", machine, 8).cost([0])
    assert hours == pytest.approx(flops / float(machine.rate(np.array(1e9))) / 8 / 3600)
    dollars = design.of_sizes(found.cost, [1e9], [2e10], [], "dollars", machine, 8).cost([0])
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
        (["--target", "multiplier", *SIZES], "--target is multiplier: write multiplier@C"),
        (["--target", "multiplier@1e19", *SIZES], "add --compare GROUP OVER"),
        (["--target", "a", "--compare", "x", "y", *SIZES], "--compare and --by are of --target multiplier@C"),
        (["--target", "multiplier@1e19", "--compare", "x", "y", *SIZES], "add --by, the column whose values"),
        (["--target", "multiplier@1e19", "--compare", "x", "y", "--by", "z", *SIZES], "'z', which is no column"),
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
    path, folder, _ = half
    own = [path, "--results", str(folder), "--workdir", str(tmp_path / "none"), "--target", "a"]
    code, _, printed = told([*own, "--law", "nonsense"], tmp_path, capsys)
    assert code == 2
    assert "nonsense" in printed.err
    code, _, printed = told([*own, "--devices", "2.5", "--hardware", "h100"], tmp_path, capsys)
    assert (code, printed.err) == (2, "--devices is 2.5: write a whole number\n")
    assert design.main([*own, "--bootstrap", "-1"]) == 2
    assert capsys.readouterr().err == "--bootstrap is -1: write 20 or more, or 0 for the delta method\n"


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
