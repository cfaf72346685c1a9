"""Designs that identify no exponent are refused with the run that would mend them, and that run does mend them.

The oracle is the law itself: losses are drawn from it, those of the run that is named too, and the interval of a must
then be finite and hold the true β/(α+β).
"""

import json

import numpy as np
import pandas as pd
import pytest

import scaling
from scaling.fit import analyse, main
from scaling.laws.fitting import identify
from scaling.laws.tables.observations import from_table
from tests import published
from tests.laws import data

TRUE_A = data.HOFFMANN["beta"] / (data.HOFFMANN["alpha"] + data.HOFFMANN["beta"])
EXACT = 0.5  # a head's share of the FLOPs: a budget's rows then lie on a curve in (log N, log D), and on no line


def flops_per_token(num_params, head):
    return 6 * num_params * (1 + head * (2e7 / num_params) ** 0.6)


def runs(num_params, num_tokens, head=0.0, noise=0.002, seed=0):
    n, d = np.atleast_1d(num_params).astype(float), np.atleast_1d(num_tokens).astype(float)
    loss = data.chinchilla(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))
    return pd.DataFrame({"num_params": n, "num_tokens": d, "flops": flops_per_token(n, head) * d, "loss": loss})


def budgets(compute, least, most, num=6, head=0.0):
    """Sizes from ``least`` to ``most`` times each budget's best; steps are whole, so that a budget is met to 1 %."""
    n = np.concatenate([data.optimum(C) * np.geomspace(least, most, num) for C in compute])
    d = np.repeat(compute, num) / flops_per_token(n, head)
    off = 1 + 0.01 * np.random.default_rng(1).uniform(-1, 1, len(d)) if head else 1.0
    return runs(n, d * off, head).assign(budget_flops=np.repeat(compute, num))


def ray(jitter):
    n = np.geomspace(1e7, 1e10, 12)
    return runs(n, 20 * n * (1 + jitter * np.random.default_rng(0).uniform(-1, 1, 12)))


def with_run(table, run, head):
    more = runs(run["num_params"], run["num_tokens"], head, seed=9)
    if "budget_flops" in table:
        near = table["budget_flops"].iloc[(np.log(table["budget_flops"] / more["flops"].iloc[0])).abs().argmin()]
        own = abs(np.log(near / more["flops"].iloc[0])) < 0.05
        more = more.assign(budget_flops=near if own else more["flops"])
    return pd.concat([table, more], ignore_index=True)


def holds_the_truth(entry):
    """Whether a has an interval, and the true one lies in twice that: one draw in twenty is outside the 95 % itself."""
    low, high = entry["a_interval"]
    return np.isfinite([low, high]).all() and abs(entry["a"] - TRUE_A) < high - low


DESIGNS = {
    "ray": (ray(0.0), 0.0, "move together in every row"),
    "ray to a percent": (ray(0.01), 0.0, "move together in every row but for"),
    "one budget of 6ND": (budgets([1e19], 1 / 4, 4, 7), 0.0, "one budget"),
    "one budget, exact": (budgets([1e19], 1 / 4, 4, 7, EXACT), EXACT, "one budget"),
    "one budget, exact, wide": (budgets([1e19], 1 / 32, 32, 12, EXACT), EXACT, "one budget"),
    "too small": (budgets([1e18, 1e19], 1 / 16, 0.6), 0.0, "the largest size is best"),
    "too large": (budgets([1e18, 1e19], 1.7, 16), 0.0, "the smallest size is best"),
    "too small, exact": (budgets([1e18, 1e19], 1 / 16, 0.6, head=EXACT), EXACT, "the largest size is best"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DESIGNS)
def test_the_run_that_a_refusal_names_mends_it(name):
    table, head, why = DESIGNS[name]
    asked = {"laws": ("chinchilla", "kaplan_n_offset"), "bootstrap": 0, "combined": False}
    if "one budget" in name:
        with pytest.raises(identify.NotIdentified, match=why) as refused:
            analyse(table, **asked)
        told = refused.value.told.to_json()
    else:
        found = analyse(table, **asked).to_json()
        assert found["laws"], "other laws are still reported"
        told = found["refused"]["allocation"]
        assert why in told["reason"]
        for name in ("a", "a_interval", "b", "a_local"):
            assert found["allocation"][name] is None
        assert told["reason"] in found["allocation"]["reasons"][0]
        assert any(told["reason"] in line for line in found["warnings"])
        assert found["frontier"] == []
        with pytest.raises(ValueError, match="no allocation") as asked_of_it:
            scaling.advise(analyse(table, **asked), flops=1e19)
        assert told["reason"] in str(asked_of_it.value)
    run = told["run"]
    assert f"N = {run['num_params']:.2g} on D = {run['num_tokens']:.3g} tokens" in told["reason"]
    assert run["flops"] == pytest.approx(flops_per_token(run["num_params"], head) * run["num_tokens"], rel=0.3)
    mended = analyse(with_run(table, run, head), **asked).to_json()
    assert "allocation" not in mended["refused"]
    assert holds_the_truth(mended["allocation"])


@pytest.mark.parametrize("head", [0.0, EXACT])
def test_one_budget_identifies_none_of_the_usual_laws(head, tmp_path, capsys):
    """Its two arms are N's and D's together; C differs by the rounding of steps alone."""
    path = tmp_path / "one.csv"
    budgets([1e19], 1 / 4, 4, 7, head).to_csv(path, index=False)
    assert main([str(path), "--bootstrap", "0", "--no-figures"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "one budget" in said
    assert "one would do, N = " in said
    assert not (tmp_path / "fit.json").exists()


def test_a_refused_exponent_is_one_line_in_the_terminal_and_null_in_the_file(tmp_path, capsys):
    path = tmp_path / "small.csv"
    DESIGNS["too small"][0].to_csv(path, index=False)
    assert main([str(path), "--bootstrap", "0", "--no-figures", "--law", "chinchilla", "chinchilla_tied"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "one side of every minimum" in line]
    assert len(printed) == 1
    written = json.loads((tmp_path / "fit.json").read_text())
    assert written["allocation"]["a"] is None
    assert written["isoflop"]["a"] is None
    assert set(written["laws"]) == {"chinchilla", "chinchilla_tied"}


def test_two_minima_of_which_one_is_inside_are_mended_by_a_size_beyond_the_other():
    table = pd.concat([budgets([1e18], 1 / 4, 4), budgets([1e19], 1 / 8, 0.7)], ignore_index=True)
    found = analyse(table, laws=("chinchilla",), bootstrap=200, combined=False).to_json()
    told = found["isoflop"]["unidentified"]
    assert found["isoflop"]["a"] is None
    assert found["isoflop"]["num_bracketed"] == 1
    assert found["allocation"]["a"] is not None, "the law has runs on both sides"
    assert told["run"]["num_params"] > data.optimum(1e19)
    mended = analyse(with_run(table, told["run"], 0.0), laws=("chinchilla",), bootstrap=200, combined=False).isoflop
    assert mended["unidentified"] is None
    assert np.isfinite(mended["a_interval"]).all()


def test_minima_beyond_every_size_take_more_than_one_run():
    told = analyse(DESIGNS["too large"][0], laws=("chinchilla",), bootstrap=0, combined=False).isoflop["unidentified"]
    assert told["run"] is None
    assert "0 of 2 minima lie inside their sizes: the smallest size is best at" in told["reason"]


def test_final_points_of_one_budget_have_no_exponent():
    """Runs of one budget may miss it by some percent, and N against that C is nothing."""
    from scaling.laws.answers import approaches

    n, c = np.array([1e8, 2e8, 4e8]), 1e19 * np.array([0.92, 1.0, 1.08])
    table = pd.DataFrame({"num_params": n, "num_tokens": c / (6 * n), "flops": c, "loss": [3.0, 2.9, 2.8]})
    found = approaches.envelope(from_table(table))
    assert found["num_runs"] == 3
    assert found["a"] is None
    assert "one budget" in found["note"]


@pytest.mark.parametrize("head", [0.0, EXACT])
@pytest.mark.parametrize("compute", [(1e18, 1e19), tuple(np.geomspace(1e18, 1e20, 4))])
def test_budgets_about_their_minima_are_not_refused(compute, head):
    found = analyse(budgets(compute, 1 / 4, 4, head=head), laws=("chinchilla",), bootstrap=200, combined=False)
    assert found.refused == {}
    assert found.isoflop["unidentified"] is None
    assert holds_the_truth(found.to_json()["allocation"])


def test_grids_without_budgets_are_not_refused_however_long_they_train():
    """A ladder of 100 to 3,000 tokens a parameter lies on one side of every optimum, and crosses N with D."""
    n, ratio = map(np.ravel, np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(100, 3000, 5)))
    found = analyse(runs(n, n * ratio), laws=("chinchilla",), bootstrap=0, combined=False)
    assert found.refused == {}
    assert holds_the_truth(found.to_json()["allocation"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["epoch_chinchilla.csv", "gadre_overtraining.csv", "gemstones.csv"])
def test_published_tables_are_not_refused(name):
    table = data.epoch() if name.startswith("epoch") else published.table(name)
    if name.startswith("gadre"):
        table = table.assign(loss=table["loss_c4_val"]).filter(["N", "D", "loss"])
    found = from_table(table, source=name)
    from scaling.laws.forms import catalogue

    form = catalogue.FORMS["chinchilla"]
    assert identify.unidentified(found, form) is None
    assert not identify.one_budget(found)
    fitted = scaling.fit_law(table, "chinchilla")  # refused, it raises
    assert identify.unidentified(found, form, fitted.params) is None


def test_the_shipped_studies_own_exponents_stand():
    """The default study's by every approach; a study whose best size is its smallest at every budget has none."""
    from scaling import study

    found = study.open(published.ROOT / "results" / "chinchilla").fit(bootstrap=0, combined=False)
    assert found.analysis.refused == {}
    assert found.payload["isoflop"]["unidentified"] is None
    assert found.exponent["interval"] is not None
