"""Fits held against a known truth: rows, lines in figures, words on the page."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from scaling import records
from scaling.fit import analyse
from scaling.fit import main as fit_command
from scaling.laws.answers import truth
from scaling.report import figures, plots
from scaling.report.page import build
from scaling.report.plots import excess
from tests import synthetic

LEAST = synthetic.LAW["E"]  # by construction what these losses tend to


@pytest.fixture(scope="module")
def runs():
    known = {"entropy_rate": LEAST - 0.02, "best_loss": LEAST - 0.01, "best_validation_loss": LEAST}
    return [dataclasses.replace(r, data=r.data | known) for r in synthetic.sweep_records(noise=1e-4)]


@pytest.fixture(scope="module")
def fit(runs):
    return analyse(records.table(runs), records.curves(runs), delta=1e-3, bootstrap=50, source="synthetic").to_json()


def test_the_truth_is_known_where_all_runs_share_it(runs):
    assert truth.of(runs)["best_validation_loss"] == LEAST
    assert truth.least_loss(records.table(runs)) == LEAST
    stranger = dataclasses.replace(runs[0], data=runs[0].data | {"fingerprint": "other", "best_validation_loss": 9.0})
    assert truth.of([*runs, stranger]) is None
    assert truth.least_loss(records.table([*runs, stranger])) is None


def test_losses_of_another_objective_are_in_its_unit_and_have_no_entropy_beneath_them(tmp_path, runs):
    hidden = [
        dataclasses.replace(r, config=r.config | {"objective": {"name": "masked", "rate": 0.15}}, bits_per_byte=None)
        for r in runs
    ]
    assert truth.of(hidden) is None
    assert "least_loss" not in records.table(hidden)
    assert records.loss_unit(hidden) == "nats per masked token"
    assert records.loss_unit(runs) == "nats per token"
    assert records.loss_unit([*runs, hidden[0]]) == "nats"
    [saved] = figures.write(tmp_path, records.table(hidden[:3]), {"loss_unit": records.loss_unit(hidden)}, hidden[:3])
    assert saved.name == "curves"
    with plots.style():
        [drawn] = figures.draw(records.table(hidden[:3]), {}, hidden[:3])
    figures._name_convention(drawn.figure, {"loss_unit": "nats per masked token"})
    assert any("nats per masked token" in ax.get_ylabel() for ax in drawn.figure.axes)
    assert not any("nats per token" in ax.get_ylabel() for ax in drawn.figure.axes)


def test_without_a_truth_nothing_is_claimed(tmp_path):
    plain = [dataclasses.replace(r, curve={k: [] for k in r.curve}) for r in synthetic.sweep_records()[:3]]
    assert truth.of(plain) is None
    assert "least_loss" not in records.table(plain)
    synthetic.write(tmp_path / "r", plain)
    assert "Irreducible loss" not in build(tmp_path / "r").read_text(encoding="utf-8")


def test_intervals_are_held_against_the_truth():
    law = {
        "params": {"E": 1.5}, "intervals": {"E": [1.4, 1.6]}, "interval_method": "bootstrap by run", "level": 0.9,
        "profile_intervals": {"E": [None, 1.55]},
    }  # fmt: skip
    fit = {"laws": {"chinchilla": law, "kaplan_n": {"params": {"N_c": 1.0}, "intervals": {}}}}
    first, second = truth.irreducible(fit, 1.58)
    assert first == {
        "law": "chinchilla", "value": 1.5, "error": pytest.approx(-0.08), "method": "bootstrap by run", "level": 0.9,
        "interval": [1.4, 1.6], "inside": True,
    }  # fmt: skip
    assert (second["method"], second["interval"], second["inside"]) == ("profile", [None, 1.55], False)
    assert truth.irreducible(fit, 0.2)[1]["inside"], "an end that the data do not set excludes nothing"
    assert truth.irreducible({}, 1.0) == []


def test_the_fit_of_a_known_law_holds_its_own_truth(fit):
    rows = truth.irreducible(fit, LEAST)
    assert {row["law"] for row in rows} >= {"chinchilla"}
    assert abs(rows[0]["error"]) < 0.02
    assert rows[0]["inside"]


def test_the_fit_command_prints_the_truth_beside_the_estimate(runs, tmp_path, capsys):
    synthetic.write(tmp_path, runs)
    command = [str(tmp_path), "--law", "chinchilla", "--bootstrap", "0", "--no-figures"]
    assert fit_command(command) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "fit.json").read_text())
    assert f"the truth is {LEAST:.4f}" in printed
    estimate = written["laws"]["chinchilla"]["params"]["E"]
    assert written["truth"]["least_loss"] == LEAST
    assert {row["value"] for row in written["truth"]["irreducible"] if row["law"] == "chinchilla"} == {estimate}
    line = next(line for line in printed.splitlines() if line.startswith("chinchilla ") and "yes" in line)
    assert line.split()[1:3] == [f"{estimate:.4f}", f"{estimate - LEAST:+.4f}"]


def test_the_fit_command_claims_no_truth_that_it_does_not_know(tmp_path, capsys):
    synthetic.write(tmp_path, synthetic.sweep_records())
    assert fit_command([str(tmp_path), "--law", "chinchilla", "--bootstrap", "0", "--no-figures"]) == 0
    assert "truth" not in capsys.readouterr().out
    assert "truth" not in json.loads((tmp_path / "fit.json").read_text())


def test_figures_of_losses_have_the_line_and_reach_it(runs, fit):
    with plots.style():
        drawn = {d.name: d.figure for d in figures.draw(records.table(runs), fit, runs)}
    for name in ("isoflop", "power_laws", "curves"):
        for ax in [ax for ax in drawn[name].axes if ax.get_xlabel()]:
            assert [LEAST, LEAST] in [list(line.get_ydata()) for line in ax.lines], name
            assert ax.get_ylim()[0] < LEAST, name


def test_excess_is_loss_less_the_truth_a_straight_line_for_a_power_law():
    compute = np.geomspace(1e11, 1e13, 9)
    frontier = [{"flops": c, "loss": 2 + 3e4 * c**-0.4} for c in compute]
    import pandas as pd

    loss = [p["loss"] for p in frontier]
    table = pd.DataFrame({"num_params": np.repeat([1e4, 2e4, 4e4], 3), "flops": compute, "loss": loss})
    with plots.style():
        ax = excess(Figure().subplots(), table, 2.0, [*frontier, {"flops": 1e14, "loss": 1.9}])
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(np.diff(np.log(y)) / np.diff(np.log(x)), -0.4, rtol=1e-6)
    points = np.concatenate([c.get_offsets() for c in ax.collections])
    np.testing.assert_allclose(points, np.column_stack([compute, table["loss"] - 2]))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_the_page_says_whether_the_interval_holds_the_truth(runs, tmp_path):
    plain = [dataclasses.replace(r, curve={k: [] for k in r.curve}) for r in runs[:3]]
    law = {
        "params": {"E": LEAST + 0.05},
        "intervals": {"E": [LEAST + 0.02, LEAST + 0.08]},
        "interval_method": "bootstrap",
    }
    synthetic.write(tmp_path / "r", plain)
    records.write_json(tmp_path / "r" / "fit.json", {"laws": {"chinchilla": law}})
    page = build(tmp_path / "r").read_text(encoding="utf-8")
    assert f"the truth, {LEAST:.3f}, lies outside the 95 % interval" in page
    assert "<h2>Irreducible loss</h2>" in page
    assert f"has {LEAST:.5f}, and that is what these losses tend to" in page
    assert "<td>+0.0500</td>" in page
    assert "Loss beyond the least possible" in page
