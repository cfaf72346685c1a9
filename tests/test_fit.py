import json

import numpy as np
import pytest

import scaling
from scaling import fit, records
from scaling.laws.forms import catalogue
from scaling.laws.intervals import resampling
from tests import published, synthetic
from tests.laws import data


@pytest.fixture(scope="module")
def sweep():
    return synthetic.sweep_records()


@pytest.fixture(scope="module")
def analysis(sweep):
    return fit.analyse(records.table(sweep), records.curves(sweep), bootstrap=300)


@pytest.fixture(scope="module")
def payload(analysis):
    return json.loads(json.dumps(analysis.to_json(), allow_nan=False))


def test_a_sweep_gives_laws_near_the_truth(payload):
    law = payload["laws"]["chinchilla"]
    assert payload["num_observations"] == 18
    assert law["converged"]
    for name, value in synthetic.LAW.items():
        lo, hi = law["intervals"][name]
        assert lo - 0.5 * (hi - lo) <= value <= hi + 0.5 * (hi - lo), name
    assert payload["convention"] == {"num_params": "non_embedding", "flops": "exact"}


def test_nothing_is_dropped_in_silence(payload):
    reasons = [row["reason"] for row in payload["excluded"]]
    assert (reasons.count("holdout"), reasons.count("diverged")) == (6, 1)
    assert "1 diverged run is not fitted" in payload["warnings"]


def test_held_out_cells_are_forecast(payload):
    assert len(payload["forecast"]) == 6
    for row in payload["forecast"]:
        assert abs(row["predicted"] / row["actual"] - 1) < 0.012
        assert row["interval"][0] < row["predicted"] < row["interval"][1]


def test_three_approaches_stand_side_by_side(payload):
    assert payload["isoflop"]["num_bracketed"] == 3
    assert payload["envelope"]["num_runs"] > 3
    assert payload["allocation"]["a_local"] != payload["allocation"]["a"]
    assert payload["allocation"]["cost_max_error"] < 0.01


def test_frontier_minimises_the_law_under_the_records_own_cost(analysis, payload):
    fitted, cost = analysis.fits["chinchilla"], analysis.cost
    for point in payload["frontier"]:
        assert point["num_params_interval"][0] <= point["num_params"] <= point["num_params_interval"][1]
        at, *beside = (
            fitted.predict(num_params=n, num_tokens=point["flops"] / cost.flops_per_token(n))
            for n in point["num_params"] * np.array([1.0, 0.98, 1.02])
        )
        assert min(beside) > at


def test_forecast_widens_away_from_the_data(analysis):
    def width(scale):
        (row,) = fit.forecast(analysis, [dict(run_id="x", num_params=5e4 * scale, num_tokens=1e7 * scale, flops=1e12)])
        return np.log(row["interval"][1] / row["interval"][0])

    assert width(1e3) > width(10) > width(1) > 0


@pytest.mark.parametrize(
    "rows",
    [pytest.param(slice(7), marks=pytest.mark.slow), slice(0, 18, 3)],
    ids=["one budget and a run", "two sizes at every budget"],
)
def test_tiny_sweep_does_not_crash(sweep, rows):
    """What seven runs leave open is walked along for seconds; six that are spread out leave less open."""
    few = [r for r in sweep if r.status == "completed"][rows]
    made = fit.analyse(records.table(few), records.curves(few), bootstrap=50)
    json.dumps(made.to_json(), allow_nan=False)


DAMAGE = {
    "as it is": lambda t, rng: t,
    "noise of 20 %": lambda t, rng: t.assign(loss=t["loss"] * np.exp(0.2 * rng.normal(size=len(t)))),
    "constant loss": lambda t, rng: t.assign(loss=2.0),
    "few sizes": lambda t, rng: t[t["num_layers"] == 2],
    "loss rises with size": lambda t, rng: t.assign(loss=1 + 1e-9 * t["num_params"]),
    "nonsense": lambda t, rng: t.assign(loss=rng.uniform(0.5, 9, len(t))),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_any_table_is_fitted_or_refused_in_words(damage, sweep):
    """Warnings are errors here: whatever the table, an analysis that JSON can hold, or a ValueError. Five choices of
    rows, with curves and without, with draws and without."""
    whole, curves = records.table(sweep), records.curves(sweep)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(len(whole), rng.integers(3, len(whole)), replace=False))
        table = DAMAGE[damage](whole.iloc[rows], rng)
        options = {"curves": curves if seed % 2 else None, "bootstrap": 30 if seed % 3 else 0}
        if (~table["holdout"] & (table["status"] == "completed")).sum() < 6:
            with pytest.raises(ValueError, match=r"observations|no rows|nothing to fit"):
                fit.analyse(table, laws=("chinchilla",), **options)
            continue
        made = fit.analyse(table, **options)
        payload = json.loads(json.dumps(made.to_json(), allow_nan=False))
        if damage in ("constant loss", "nonsense", "loss rises with size"):
            assert payload["warnings"]


def test_command_on_a_folder(sweep, tmp_path, capsys):
    synthetic.write(tmp_path, sweep)
    assert fit.main([str(tmp_path), "--bootstrap", "20", "--law", "chinchilla", "--no-figures", "--convention"]) == 0
    assert json.loads((tmp_path / "fit.json").read_text())["laws"]["chinchilla"]["num_bootstrap"] == 20
    out = capsys.readouterr().out
    assert "alpha" in out
    assert "under every counting rule" in out
    assert len(json.loads((tmp_path / "fit.json").read_text())["conventions"]) == 10


@pytest.mark.slow
def test_command_ranks_every_law_and_draws(sweep, tmp_path, capsys):
    synthetic.write(tmp_path, sweep)
    assert fit.main([str(tmp_path), "--bootstrap", "20", "--law", "all"]) == 0
    rows = json.loads((tmp_path / "fit.json").read_text())["comparison"]
    assert {"chinchilla", "chinchilla_tied", "product", "data_constrained"} <= {row["law"] for row in rows}
    assert "ΔAICc" in capsys.readouterr().out
    assert list((tmp_path / "figures").glob("*.svg"))


def mine(num_params, num_tokens, *, K, a, b):
    """L = K N^-a D^-b"""
    return K * num_params**-a * num_tokens**-b


def test_a_users_law_by_import_path(sweep, tmp_path, capsys):
    synthetic.write(tmp_path, sweep)
    arguments = ["--law", "tests.test_fit:mine", "--bootstrap", "20", "--no-figures", "--loss", "squared"]
    assert fit.main([str(tmp_path), *arguments]) == 0
    payload = json.loads((tmp_path / "fit.json").read_text())
    params = payload["laws"]["mine"]["params"]
    # The product law is linear in logs: ordinary least squares is the oracle.
    rows = [r for r in sweep if r.status == "completed" and not r.sweep["holdout"]]
    n, d = np.log([r.num_params["non_embedding"] for r in rows]), np.log([r.num_tokens for r in rows])
    want = np.linalg.lstsq(np.stack([np.ones_like(n), -n, -d], 1), np.log([r.loss for r in rows]), rcond=None)[0]
    np.testing.assert_allclose([np.log(params["K"]), params["a"], params["b"]], want, rtol=1e-7)
    assert payload["frontier"]
    capsys.readouterr()


@pytest.mark.slow
def test_command_on_epochs_points(tmp_path, capsys):
    source = tmp_path / "epoch.csv"
    data.epoch().to_csv(source, index=False)
    assert fit.main([str(source), "--delta", "1e-3", "--bootstrap", "0", "--law", "chinchilla", "--no-figures"]) == 0
    law = json.loads((tmp_path / "fit.json").read_text())["laws"]["chinchilla"]
    assert law["objective"] <= 1.0182740178e-3
    assert law["params"]["A"] == pytest.approx(477.83, abs=0.005)
    capsys.readouterr()


@pytest.mark.slow
def test_rows_of_one_run_are_resampled_together():
    """Gemstones: many rows a run, so intervals by row are too narrow (McLeish et al. 2025)."""
    table = published.table("gemstones.csv").query("subset == 'hot'")
    options = {"laws": ("chinchilla",), "delta": 1e-3, "bootstrap": 200}
    by_run = fit.analyse(table, **options)
    unnamed = fit.analyse(table.drop(columns="run_name"), **options)
    assert by_run.to_json()["laws"]["chinchilla"]["interval_method"] == "bootstrap by run"
    by_row = resampling.bootstrap(by_run.fits["chinchilla"], 200)
    assert np.std(by_run.draws["chinchilla"].params["alpha"]) > 1.5 * np.std(by_row.params["alpha"])
    # Nobody has to say so: the residuals of one size go together.
    assert unnamed.to_json()["laws"]["chinchilla"]["interval_method"] == "bootstrap by num_params"


@pytest.mark.parametrize(
    "text, message",
    [
        ("N,D\n1,2\n", "column loss is missing"),
        ("N,D,loss\n1e9,1e9,x\n", "loss is 'x'"),
        ("", "not a readable CSV"),
        ("N,D,loss\n" + "1e9,1e9,2\n" * 8, "one value only"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(text, message, tmp_path, capsys):
    source = tmp_path / "bad.csv"
    source.write_text(text)
    assert fit.main([str(source), "--bootstrap", "0"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_law_of_something_else_is_refused_by_the_command(sweep, tmp_path, capsys):
    synthetic.write(tmp_path, sweep)
    assert fit.main([str(tmp_path), "--law", "peak_lr"]) == 2
    assert "not of the loss" in capsys.readouterr().err


def test_unknown_law_names_those_there_are(sweep, tmp_path, capsys):
    synthetic.write(tmp_path, sweep)
    assert fit.main([str(tmp_path), "--law", "chincilla"]) == 2
    assert "write one of" in capsys.readouterr().err


def test_missing_source(tmp_path, capsys):
    assert fit.main([str(tmp_path / "none.csv")]) == 2
    assert fit.main([str(tmp_path)]) == 2
    assert "runs/*.json" in capsys.readouterr().err


def test_source_may_stand_before_or_after_the_laws(tmp_path, capsys):
    source = tmp_path / "runs.csv"
    data.scattered(noise=0.01).to_csv(source, index=False)
    rest = ["--bootstrap", "0", "--no-figures", "--one-law"]
    for order in (
        [str(source), "--law", "chinchilla", "product"],
        ["--law", "chinchilla", "product", str(source)],
        ["--law", "chinchilla,product", str(source)],
        ["--law", "chinchilla", "--law", "product", "--loss", "huber", str(source)],
    ):
        assert fit.main([*order, *rest]) == 0
        assert list(json.loads((tmp_path / "fit.json").read_text())["laws"]) == ["chinchilla", "product"]
    with pytest.raises(SystemExit):
        fit.main(["--law", "chinchilla", "product"])
    assert "SOURCE is missing" in capsys.readouterr().err


def test_quantile_of_the_asymmetric_loss(tmp_path, capsys):
    source = tmp_path / "runs.csv"
    data.scattered(num=200, noise=0.01).to_csv(source, index=False)
    quick = ["--bootstrap", "0", "--no-figures", "--one-law", "--law", "chinchilla"]
    assert fit.main([str(source), "--loss", "asymmetric", "--tau", "0.1", "--delta", "1e-5", *quick]) == 0
    params = json.loads((tmp_path / "fit.json").read_text())["laws"]["chinchilla"]["params"]
    table = data.scattered(num=200, noise=0.01)
    above = catalogue.FORMS["chinchilla"].predict(
        params, num_params=table["num_params"], num_tokens=table["num_tokens"]
    )
    assert np.mean(above > table["loss"]) == pytest.approx(0.1, abs=0.02)
    assert fit.main([str(source), "--tau", "0.1", *quick]) == 2
    assert "--loss asymmetric" in capsys.readouterr().err


def test_one_law_from_python():
    fitted = scaling.fit_law(data.scattered(noise=0.001), "chinchilla")
    assert fitted.converged
    assert fitted.params["alpha"] == pytest.approx(0.34, abs=0.03)
    assert published.ROOT.exists()


@pytest.mark.slow
def test_a_table_without_tokens_is_drawn_as_it_was_fitted(tmp_path, capsys):
    """D = C / (6 N) for the figures too: the fit had it, and the drawing ended in a KeyError."""
    table = data.scattered(30, noise=0.01)
    table["flops"] = 6 * table["num_params"] * table["num_tokens"]
    table.drop(columns="num_tokens").to_csv(tmp_path / "runs.csv", index=False)
    assert fit.main([str(tmp_path / "runs.csv"), "--law", "chinchilla", "--one-law", "--bootstrap", "0"]) == 0
    assert (tmp_path / "figures" / "surface.svg").exists()
