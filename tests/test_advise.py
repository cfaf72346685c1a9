"""The command that advises, and the same from Python: units, hardware, money, bad input in one line."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import scaling
from scaling import advise as advising
from scaling import records, study
from scaling.devices import PROFILES, mfu_of
from scaling.engine.plan.hardware import Hardware
from scaling.laws.answers import comparison
from scaling.laws.answers.advice import batches
from scaling.laws.answers.advice.budget import Budget
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.forms import catalogue
from tests import synthetic
from tests.laws import data

FAST = {"laws": "chinchilla", "bootstrap": 60, "combined": False}


@pytest.fixture(scope="module")
def fit():
    return scaling.open(data.isoflop(noise=0.003)).fit(**FAST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("results")
    synthetic.write(path, synthetic.sweep_records())
    return path


def test_money_and_hours_go_to_the_size_of_least_loss_in_them(fit):
    """Against every size tried one by one, with the plan's own dollars for the FLOPs (``Hardware``)."""
    answer = fit.advise(dollars=1000, hardware="h100").numbers
    size, flops = answer["num_params"].value, answer["flops"].value
    hardware, p = Hardware(PROFILES["h100"], 1), fit.params
    assert hardware.cost(flops / (989.4e12 * mfu_of(PROFILES["h100"].mfu, size).mfu)).dollars == pytest.approx(1000)
    sizes = np.exp(np.linspace(np.log(size) - 4, np.log(size) + 4, 8001))
    bought = np.array([1000 / 3.99 * 3600 * 989.4e12 * mfu_of(PROFILES["h100"].mfu, n).mfu for n in sizes])
    loss = p["E"] + p["A"] * sizes ** -p["alpha"] + p["B"] * (bought / 6 / sizes) ** -p["beta"]
    assert size == pytest.approx(sizes[loss.argmin()], rel=2e-3)
    assert abs(size / fit.advise(flops=flops).numbers["num_params"].value - 1) > 0.05  # not the best by compute
    within = sizes[loss <= 1.01 * loss.min()]
    for word, end in (("least", within[0]), ("most", within[-1])):
        assert answer[f"num_params within 1 % of the best loss, {word}"].value == pytest.approx(end, rel=2e-3)
    twice = np.interp(2 * size, sizes, loss)
    assert answer["loss lost by twice the size"].value == pytest.approx(100 * (twice / loss.min() - 1), rel=1e-3)
    by_hours = fit.advise(hours=1000 / 3.99 / 8, devices=8, hardware="h100").numbers
    assert by_hours["num_params"].value == pytest.approx(size, rel=1e-6)


def test_of_two_dips_in_the_loss_the_lower_is_taken():
    """A machine twice as fast beyond a size makes a second dip there: the size is that of the lower one, at either."""
    law = LawAtBest(catalogue.FORMS["chinchilla"], {k: np.array([v]) for k, v in data.HOFFMANN.items()}, Cost())
    alone = Budget.of_time(1e6, lambda n: np.full_like(n, 1e15), "").best_size(law)[0, 0]
    for gain, stays in ((1.05, True), (2.0, False)):
        edge = alone + 1.0

        def rate(n, gain=gain, edge=edge):
            return 1e15 * (1 + (gain - 1) * (1 + np.tanh(25 * (np.log(n) - edge))) / 2)

        budget = Budget.of_time(1e6, rate, "")
        every = np.linspace(alone - 3, alone + 3, 6001)[None]
        best = every[0, budget.loss(law, every).argmin()]
        assert (abs(best - alone) < 0.1) == stays
        assert budget.best_size(law)[0, 0] == pytest.approx(best, abs=2e-3)


def test_where_utilisation_is_one_number_time_is_compute(fit):
    timed = fit.advise(hours=100, devices=8, hardware="h100", mfu=0.4)
    flops = 100 * 8 * 3600 * 0.4 * 989.4e12
    assert timed.numbers["flops"].value == pytest.approx(flops, rel=1e-12)
    for name, number in fit.advise(flops=flops).numbers.items():
        # Far from flat only: a lowest point found by comparing values is good to the root of rounding.
        assert timed.numbers[name].value == pytest.approx(number.value, rel=1e-6), name
        assert timed.numbers[name].interval == pytest.approx(number.interval, rel=1e-6), name
    # An end that the profile at the largest compute does not have is none of the answer in time either.
    open_ended = {"num_params": SimpleNamespace(interval=np.array([1.0, np.inf]))}
    doubtful = dataclasses.replace(fit.analysis, derived=fit.analysis.derived | open_ended)
    for question in ({"flops": flops}, {"hours": 100, "devices": 8, "hardware": "h100", "mfu": 0.4}):
        low, high = scaling.advise(doubtful, **question).numbers["num_params"].interval
        assert (math.isfinite(low), high) == (True, math.inf)


def test_decoding_is_bound_by_reading_the_weights(fit):
    """At batch b and w bytes a weight 2 b bandwidth / w FLOP/s, until that is more than the prefill's."""
    machine, n = advising.Machine("h100", mfu=0.4), np.array([1e9])
    slow = machine.prices({"decode_batch": 8, "bytes_per_weight": 2.0})
    assert slow.decoding(n)[0] == pytest.approx(3.99 / 3600 / (2 * 8 * 3.35e12 / 2), rel=1e-12)
    light = machine.prices({"decode_batch": 8, "bytes_per_weight": 1.0})
    assert light.decoding(n)[0] == pytest.approx(slow.decoding(n)[0] / 2, rel=1e-12)
    full = machine.prices({"decode_batch": 1e6, "bytes_per_weight": 2.0})
    assert full.decoding(n)[0] == pytest.approx(full.prefill(n)[0], rel=1e-12)
    assert full.training(n)[0] == pytest.approx(3.99 / 3600 / (0.4 * 989.4e12), rel=1e-12)


def test_units_of_the_loss(folder):
    fitted = scaling.open(folder).fit(**FAST)
    nats, bits = (fitted.advise(value=True, unit=u).numbers["loss less by twice C"] for u in ("nats", "bits"))
    assert bits.value == pytest.approx(nats.value / math.log(2), rel=1e-12)
    loss = fitted.optimum(1e12)["loss"] / math.log(2)
    asked = fitted.advise(loss=loss, unit="bits").numbers
    assert asked["flops"].value == pytest.approx(
        fitted.advise(loss=loss * math.log(2)).numbers["flops"].value, rel=1e-9
    )


@pytest.mark.slow
def test_the_command_and_python_give_one_answer(folder, tmp_path, capsys):
    options = ["--law", "chinchilla", "--bootstrap", "60", "--json", str(tmp_path / "answer.json")]
    assert advising.main([str(folder), "--flops", "1e12", *options]) == 0
    told = json.loads((tmp_path / "answer.json").read_text())
    answer = scaling.advise(scaling.open(folder).fit(laws="chinchilla", bootstrap=60), flops=1e12)
    for name, number in answer.numbers.items():
        assert told["numbers"][name]["value"] == number.value
        assert told["numbers"][name]["interval"] == list(number.interval)
    assert "tokens_per_param" in capsys.readouterr().out


def test_a_fit_json_stands_for_the_runs_beside_it(folder, tmp_path, capsys):
    (folder / "fit.json").write_text("{}")
    options = ["--law", "chinchilla", "--bootstrap", "0"]
    assert advising.main([str(folder / "fit.json"), "--num-params", "50K", *options]) == 0
    (tmp_path / "fit.json").write_text('{"source": "gone.csv"}')
    assert advising.main([str(tmp_path / "fit.json"), "--num-params", "50K"]) == 2
    assert "its runs are not beside it" in capsys.readouterr().err


BAD = {
    "no question": ([], "no question: write one of"),
    "two": (["--flops", "1e12", "--loss", "2"], "are 2 questions"),
    "negative": (["--flops", "-1"], "write a positive number"),
    "no hardware": (["--dollars", "5"], "add --hardware"),
    "unknown hardware": (["--dollars", "5", "--hardware", "abacus"], "write one of cpu, h100"),
    "a cpu's peak": (["--hours", "5", "--hardware", "cpu"], "no published peak"),
    "no utilisation": (["--hours", "5", "--hardware", "b200"], "add --mfu"),
    "no price": (["--dollars", "5", "--hardware", "tpu-v6e"], "add --price"),
    "two budgets": (["--flops", "1e12", "--hours", "2", "--hardware", "h100"], "are one budget"),
    "no quality": (["--inference-tokens", "1B"], "write one of --flops, --loss, --num-params"),
    "no decoding": (["--inference-tokens", "1B", "--flops", "1e12", "--hardware", "h100"], "--decoding-mfu"),
    "part of nothing": (["--unique-tokens", "1M"], "write --tokens with it"),
    "percent": (["--hours", "5", "--hardware", "h100", "--mfu", "40"], "--mfu is 40.0: write a share"),
    "share of more": (["--inference-tokens", "1B", "--flops", "1e12", "--share-read", "2"], "write a share"),
    "option of another": (["--flops", "1e12", "--critical-batch", "1K"], "--critical-batch: only --deadline takes it"),
    "deadline and loss": (["--deadline", "1h", "--hardware", "h100", "--loss", "2"], "--loss: --deadline does not"),
    "serving and data": (["--inference-tokens", "1B", "--tokens", "1B"], "--tokens: --inference-tokens does not"),
    "value of a loss": (["--value", "--loss", "2"], "--loss: --value does not take it"),
    "value by a deadline": (["--value", "--deadline", "1h"], "--deadline and --value are two questions"),
    "no error": (["--value", "--downstream", "num_tokens"], "is no error: write a column of shares above 0"),
    "two of time": (["--deadline", "1h", "--inference-tokens", "1B"], "are two questions"),
    "no form": (["--flops", "1e12", "--law", "kaplan_n"], "write --law chinchilla"),
    "unvaried batches": (
        ["--deadline", "1h", "--hardware", "h100", "--critical-batch", "runs"],
        "no column batch_tokens: add it",
    ),
    "no downstream column": (["--value", "--downstream", "mmlu"], "--downstream is mmlu, which is no column"),
    "downstream of a size": (["--num-params", "1M", "--downstream", "x"], "--downstream: only --value takes it"),
    "no column": (["--compare", "a", "b"], "add --by"),
}


def test_a_misspelt_argument_is_no_question_of_another():
    with pytest.raises(TypeError, match=r"no argument 'share_raed': write one of flops, .* share_read"):
        scaling.advise(None, flops=1e12, share_raed=0.5)


def test_no_is_no_question(folder):
    fitted = scaling.open(folder).fit(**FAST)
    assert fitted.advise(flops=1e12, value=np.False_) == fitted.advise(flops=1e12)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, folder, tmp_path, capsys):
    options, words = BAD[case]
    table = tmp_path / "runs.csv"
    data.isoflop(noise=0.003).to_csv(table, index=False)
    assert advising.main([str(table), "--bootstrap", "0", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


def with_batches(noise=0.0, seed=0, b=3e3, gamma=0.4, batches=(0.1, 0.3, 1, 3, 9), horizons=None):
    """Runs of five sizes at three horizons, batches about a known B_crit = b D^γ, three rates each."""
    rng, rows = np.random.default_rng(seed), []
    for n in np.geomspace(1e7, 3e8, 5):
        for d, times in itertools.product(n * np.array([5, 15, 45]) if horizons is None else horizons, batches):
            batch = b * d**gamma * times
            loss = data.chinchilla(n, d / (1 + times))
            for rate in (0.5, 1, 2):
                off = (1 + 0.02 * np.log(rate) ** 2) * np.exp(noise * rng.normal())
                rows.append(dict(num_params=n, num_tokens=d, batch_tokens=batch, lr=rate * 1e-3, loss=loss * off))
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_a_deadline_by_the_critical_batch_of_these_runs():
    """Against the planted B_crit = 3000 D^.4, and S(B) = S_min (1 + B_crit / B) of it."""
    fit = scaling.open(with_batches()).fit(**FAST | {"bootstrap": 0})
    asked = {"deadline": 600, "devices": 8, "hardware": "h100", "device_batch": 1e6}
    answer = fit.advise(**asked, critical_batch="runs")
    read, worth, batch = (answer.numbers[k].value for k in ("num_tokens", "tokens they are worth", "batch"))
    crit = answer.numbers["critical batch"]
    assert crit.value == pytest.approx(3e3 * read**0.4, rel=1e-5)
    # The best batch tried, which is fitted, is a tenth of B_crit; the loss is the truth's at the batch asked for.
    assert read / worth == pytest.approx((1 + batch / crit.value) / 1.1, rel=1e-5)
    truth = data.chinchilla(answer.numbers["num_params"].value, read / (1 + batch / crit.value))
    assert answer.numbers["loss"].value == pytest.approx(truth, rel=1e-6)
    assert "B_crit is of 75 runs whose batches differ" in " ".join(answer.notes)
    with pytest.raises(ValueError, match="advise a fit of runs"):
        scaling.advise(fit.analysis, **asked, critical_batch="runs")
    few = scaling.open(with_batches(batches=(0.3, 1))).fit(**FAST | {"bootstrap": 0})
    with pytest.raises(ValueError, match=r"0 have .the most: 2, .*add axes {recipe.batch_scale"):
        few.advise(**asked, critical_batch="runs")
    one_rate = with_batches(noise=0.002).query("lr == .001")
    doubted = scaling.open(one_rate).fit(**FAST | {"bootstrap": 0}).advise(**asked, critical_batch="runs")
    assert any("75 of 75 batches have one rate" in note for note in doubted.notes)


@pytest.mark.slow
def test_the_interval_of_a_critical_batch_holds_the_planted_one():
    """90 % nominal, noise .3 %, one rate: 20 hits of 30 or fewer would have a probability of 5e-4."""
    hits = 0
    for seed in range(30):
        runs = scaling.open(with_batches(0.003, seed).query("lr == .001")).fit(**FAST | {"bootstrap": 0})
        found = dataclasses.replace(runs.analysis, level=0.9)
        answer = scaling.advise(dataclasses.replace(runs, analysis=found), deadline=30, devices=8, hardware="h100",
                                device_batch=1e6, critical_batch="runs")  # fmt: skip
        low, high = answer.numbers["critical batch"].interval
        hits += low < 3e3 * answer.numbers["num_tokens"].value ** 0.4 < high
    assert hits >= 21


def test_what_a_doubling_takes_off_an_error():
    """Err = .85 - 2.08 exp(-.756 L), Gadre et al. 2024's of the C4 models, at the losses that the law itself has."""
    table = data.isoflop(noise=0.001)
    table = table.assign(mistakes=0.85 - 2.08 * np.exp(-0.756 * table["loss"]))
    fit = scaling.open(table).fit(**FAST)
    answer = fit.advise(value=True, flops=1e19, downstream="mistakes")
    losses = [fit.optimum(c)["loss"] for c in (1e19, 2e19)]
    before, after = 0.85 - 2.08 * np.exp(-0.756 * np.array(losses))
    told = answer.numbers["error less by twice C"]
    assert told.value == pytest.approx(before - after, rel=1e-6)
    assert told.interval[0] < told.value < told.interval[1]
    assert fit.advise(value=True, flops=1e19).numbers["loss less by twice C"] == answer.numbers["loss less by twice C"]
    some = table.assign(mistakes=table["mistakes"].where(np.arange(len(table)) % 2 == 0))  # measured of every other run
    told = scaling.open(some).fit(**FAST).advise(value=True, flops=1e19, downstream="mistakes")
    assert told.numbers["error less by twice C"].value == pytest.approx(before - after, rel=1e-5)
    assert any(f"mistakes is of {len(table) // 2} runs" in note for note in told.notes)


@pytest.mark.parametrize(
    "column, words",
    [(lambda t: 1 - t, "of an accuracy write a column of 1 less it"), (lambda t: 100 * t, "is no error"),
     (lambda t: 0 * t + 0.5, "does not rise with the loss"), (lambda t: t.astype(str) + "%", "is no error")],
)  # fmt: skip
def test_what_is_no_error_is_refused(column, words):
    table = data.isoflop(noise=0.001)
    fit = scaling.open(table.assign(mistakes=column(0.85 - 2.08 * np.exp(-0.756 * table["loss"])))).fit(**FAST)
    with pytest.raises(ValueError, match=words):
        fit.advise(value=True, downstream="mistakes")


def test_a_law_of_batches_moves_no_other_law():
    """Its rows are all that were tried; those of the others stay each cell's best."""
    table = with_batches(noise=0.002)
    alone = scaling.open(table).fit(**FAST | {"laws": ("chinchilla",), "bootstrap": 0}).analysis
    both = scaling.open(table).fit(**FAST | {"laws": ("chinchilla", "finite_batch"), "bootstrap": 0}).analysis
    assert both.fits["chinchilla"].params == alone.fits["chinchilla"].params
    assert len(both.fits["finite_batch"].observations) == 5 * 3 * 5
    assert any("untuned" in line for line in both.warnings)
    assert "finite_batch" not in comparison.surfaces(alone.observations)


def test_counts_under_any_name_have_their_batches():
    """A table with two counts and no plain one; batches of one horizon say nothing of how B_crit moves."""
    table = with_batches().rename(columns={"num_params": "num_params_non_embedding"})
    table = table.assign(num_params_total=1.1 * table["num_params_non_embedding"])
    found = scaling.open(table).fit(**FAST | {"bootstrap": 0}).analysis.observations
    law, doubts = batches.fitted(table, found)
    assert law.params["gamma"] == pytest.approx(0.4, rel=1e-5)
    assert doubts == ()
    varied, rest = with_batches(horizons=[1e9]), with_batches(batches=(1.0,))
    one = pd.concat([varied, rest], ignore_index=True)
    assert any("at one horizon" in line for line in batches.fitted(one, found)[1])


def test_groups_are_compared_with_the_probability_of_a_known_multiplier():
    """b takes 1.5 times the compute of a at equal loss by construction: a is better, in all draws."""
    table = data.scattered(30, noise=0.002)
    worse = table.assign(loss=data.chinchilla(table["num_params"] / 1.5, table["num_tokens"]), group="b")
    both = pd.concat([table.assign(group="a"), worse])
    answer = scaling.open(both).compare("group", bootstrap=100).advise("a", "b")
    chances = [n.value for name, n in answer.numbers.items() if name.startswith("probability that a")]
    assert chances == pytest.approx([100.5 / 101] * 3)  # of a hundred draws that agree
    assert "a is better at every compute" in answer.notes[0]
    other = scaling.open(both).compare("group", bootstrap=100).advise("b", "a")
    chances = [n.value for name, n in other.numbers.items() if name.startswith("probability that b")]
    assert chances == pytest.approx([0.5 / 101] * 3)
    with pytest.raises(ValueError, match="write two of a, b"):
        scaling.open(both).compare("group", bootstrap=20).advise("a", "c")


# ---- scaling.open ---------------------------------------------------------------------------------------------------


def test_a_study_is_what_the_modules_below_give(folder):
    opened = scaling.open(folder)
    assert opened.table.equals(records.load(folder))
    fitted = opened.fit(**FAST)
    assert fitted.params == fitted.analysis.fits["chinchilla"].params
    best = fitted.optimum(flops=1e12)
    said = fitted.predict(best["num_params"], best["num_tokens"], interval=0.95)
    assert said["loss"][0] == pytest.approx(best["loss"], rel=1e-12)
    assert said["lower"][0] < said["loss"][0] < said["upper"][0]
    assert said["flops"][0] == pytest.approx(1e12, rel=1e-9)
    assert list(fitted.held_out["predicted"]) == [row["predicted"] for row in fitted.payload["forecast"]]
    cells = opened.table[opened.table["holdout"]]
    told = fitted.forecast(cells)
    assert list(told["run_id"]) == list(cells["run_id"])
    by_run = {row["run_id"]: row["predicted"] for row in fitted.payload["forecast"]}
    assert list(told["predicted"]) == pytest.approx([by_run[i] for i in told["run_id"]], rel=1e-12)
    size, tokens = best["num_params"], best["num_tokens"]
    alone = fitted.forecast([{"num_params": size, "num_tokens": tokens}], level=0.95)
    assert alone["predicted"][0] == pytest.approx(said["loss"][0], rel=1e-12)
    assert alone["flops"][0] == pytest.approx(1e12, rel=1e-9)
    cell = {"num_params": size, "num_tokens": tokens}
    given = fitted.forecast([cell, {**cell, "flops": 3e12}])
    assert list(given["flops"]) == pytest.approx([1e12, 3e12])
    assert fitted.forecast([]).empty
    with pytest.raises(ValueError, match=r"num_tokens.* is missing"):
        fitted.forecast([{"num_params": size}])
    assert "asymptotic" in fitted._repr_html_()
    assert set(fitted.parameters().index) == set(fitted.params)


def test_what_is_doubtful_is_escaped(fit):
    import dataclasses

    doubtful = dataclasses.replace(fit, analysis=dataclasses.replace(fit.analysis, warnings=("<script>1</script>",)))
    assert "<script>" not in doubtful._repr_html_()


@pytest.mark.parametrize(
    "name", ["isoflop", "surface", "allocation", "residuals", "forecast", "exponents", "power_law", "curves"]
)
def test_every_figure_returns_the_axes_it_is_given(name, folder):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert getattr(_fitted(folder).plot, name)(ax=ax) is ax
    assert ax.has_data()


_KNOWN: dict = {}


def _fitted(folder):
    return _KNOWN.setdefault(folder, scaling.open(folder).fit(**FAST))


@pytest.mark.slow
def test_importing_it_loads_no_accelerator_and_little_else():
    code = (
        "import sys, scaling; scaling.open; before = len(sys.modules); light = {'scipy', 'pandas'} & set(sys.modules); "
        "scaling.advise; "
        "print(before, *light, *{'jax', 'flax', 'orbax', 'tensorflow', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    count, *heavy = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not heavy
    assert int(count) < 600


def test_every_name_of_the_front_door_is_there():
    assert callable(scaling.open)
    assert callable(scaling.advise)
    assert scaling.open is study.open
    assert {"open", "advise", "fit_law", "compare"} <= set(dir(scaling))


@pytest.mark.slow
def test_a_folder_is_refitted_as_its_own_fit_was_asked(folder, tmp_path, capsys, monkeypatch):
    """Laws, objective and δ: of the folder's fit.json, not the command's defaults; what is asked here goes first."""
    from scaling import fit

    path = tmp_path / "results"
    shutil.copytree(folder, path)
    options = [
        "--law",
        "chinchilla_tied",
        "kaplan_d",
        "--delta",
        "1e-3",
        "--bootstrap",
        "0",
        "--no-figures",
        "--one-law",
    ]
    assert fit.main([str(path), *options]) == 0
    written = json.loads((path / "fit.json").read_text())
    known = fit.asked(path)
    assert known["laws"] == ["chinchilla_tied", "kaplan_d"]
    assert known["delta"] == 1e-3
    assert known["bootstrap"] == 0
    again = scaling.open(path).fit(combined=False)
    assert not again.analysis.draws
    assert {name: f.params for name, f in again.analysis.fits.items()} == {
        name: law["params"] for name, law in written["laws"].items()
    }
    analyse = advising.analyse
    resamples = []

    def faster(*table, **asked):
        resamples.append(asked.get("bootstrap"))
        return analyse(*table, **asked, combined=False)

    monkeypatch.setattr(advising, "analyse", faster)
    for more, law in (([], "chinchilla_tied"), (["--law", "chinchilla"], "chinchilla")):
        out = tmp_path / "answer.json"
        asked = [str(path), "--flops", "1e12", "--json", str(out), *more]
        assert advising.main(asked) == 0
        assert json.loads(out.read_text())["law"] == law
    assert advising.main([str(path), "--flops", "1e12", "--bootstrap", "20"]) == 0
    assert resamples == [0, 0, 20]
    capsys.readouterr()


def test_a_fit_json_from_before_it_held_the_question_says_its_laws_and_objective(tmp_path):
    from scaling import fit

    laws = {"chinchilla_tied": {"loss": {"name": "squared", "delta": None}, "num_bootstrap": 300}}
    records.write_json(tmp_path / "fit.json", {"laws": laws, "convention": {"num_params": "total", "unit": "x"}})
    known = {"num_params": "total", "laws": ["chinchilla_tied"], "loss": "squared", "bootstrap": 300}
    assert fit.asked(tmp_path) == known
    records.write_json(tmp_path / "fit.json", {"error": "none"})
    assert fit.asked(tmp_path) == {}
