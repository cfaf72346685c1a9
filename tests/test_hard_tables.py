"""Tables on which a wrong number once looked right: groups that tell nothing apart, units in names, fits in doubt."""

import json
import math

import numpy as np
import pandas as pd
import pytest

import scaling
from scaling import advise as advising
from scaling import design, fit
from scaling.laws.answers.advice import questions
from scaling.laws.answers.advice.budget import Budget
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.at_best import LawAtBest, log_multiplier
from scaling.laws.forms import catalogue
from scaling.laws.tables import units
from scaling.laws.tables.columns import canonical, meaning
from tests.laws import data

FAST = {"laws": "chinchilla", "bootstrap": 60, "combined": False}


def of_law(A, alpha, seed, **options):
    params = data.HOFFMANN | {"A": A, "alpha": alpha}
    return data.isoflop(noise=0.003, seed=seed, params=params, **options)


@pytest.fixture(scope="module")
def crossing():
    """Groups whose exponents differ: the new one is worse at the budgets trained and better two decades beyond."""
    return pd.concat([of_law(406.4, 0.34, 1).assign(group="old"), of_law(1500.0, 0.40, 2).assign(group="new")])


def true_times(C):
    """What the old takes for the loss that the new has for C, by bisection of the laws themselves."""
    new = data.HOFFMANN | {"A": 1500.0, "alpha": 0.40}

    def least(c, params):
        n = np.geomspace(1e6, 1e13, 200_001)
        return data.chinchilla(n, c / (6 * n), params).min()

    want, low, high = least(C, new), C / 100, C * 100
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if least(middle, data.HOFFMANN) > want else (low, middle)
    return low / C


def test_groups_whose_exponents_differ_are_advised_by_their_own_laws(crossing):
    compared = scaling.open(crossing).compare("group", bootstrap=100)
    assert compared.sharing.rejected
    answer = compared.advise("new", "old")
    top = crossing["flops"].max()
    for place, where in ((top, "at the largest fitted"), (100 * top, "2 decades beyond the fit")):
        said = answer.numbers[f"times the FLOPs that old takes, {where}"]
        assert said.interval[0] < true_times(place) < said.interval[1]
    near = answer.numbers["times the FLOPs that old takes, at the largest fitted"]
    assert near.value == pytest.approx(true_times(top), rel=0.1)
    assert "by the groups' own laws" in " ".join(answer.notes)


def test_a_design_by_a_law_that_is_rejected_is_refused(crossing, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    crossing.to_csv(path, index=False)
    asked = [str(path), "--target", "multiplier@1e20", "--compare", "new", "old", "--by", "group", "--sizes", "1e8",
             "--tokens", "1e10", "--bootstrap", "20"]  # fmt: skip
    assert design.main(asked) == 2
    assert "exponents shared by the groups do not fit" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(4))
def test_a_group_along_one_line_of_size_and_data_has_no_multiplier(seed):
    """Near its optimum at every budget A N^-α and B D^-β are proportional: any split of the loss fits."""
    old, new = data.isoflop(noise=0.003, seed=seed), data.isoflop(noise=0.003, seed=100 + seed, sizes=1)
    both = pd.concat([old.assign(group="old"), new.assign(group="new")])
    with pytest.raises(ValueError, match="group=new: its 4 runs do not tell its amplitudes apart"):
        scaling.open(both).compare("group", bootstrap=0)


def test_a_law_at_its_bounds_is_no_base_for_advice():
    """Of losses that do not move."""
    flat = data.isoflop().assign(loss=3.0)
    with pytest.raises(ValueError, match="at a bound: these runs do not determine it"):
        scaling.open(flat).fit(**FAST).advise(flops=1e20)


def test_doubts_of_a_fit_stand_with_its_advice():
    rows = data.isoflop(noise=0.003)
    dear = rows.assign(flops=np.where(np.arange(len(rows)) % 7 == 0, 10, 1) * rows["flops"])
    answer = scaling.open(dear).fit(**FAST).advise(flops=1e20)
    assert any("misses the C of a row by" in note for note in answer.notes)


def test_far_below_the_runs_no_interval_is_worth_it():
    answer = scaling.open(data.isoflop(noise=0.003)).fit(**FAST).advise(num_tokens=1e5)
    assert answer.decades > 2
    assert all(number.interval is None for number in answer.numbers.values())


def test_bits_are_read_as_bits_and_told_in_them():
    rows = data.isoflop(noise=0.003)
    bits = rows.drop(columns="loss").assign(**{"loss (bits)": rows["loss"] / np.log(2)})
    read = canonical(bits)
    np.testing.assert_allclose(read["loss"], rows["loss"])
    assert "loss (bits) as loss × 0.693" in " ".join(read.attrs["notes"])
    said = scaling.open(bits).fit(**FAST).advise(loss=2.3, unit="bits")
    assert said.asked == "loss 2.3 bits"
    assert said.numbers["E"].value == pytest.approx(data.HOFFMANN["E"] / np.log(2), rel=0.05)
    assert not any("nats" in note for note in said.notes)


@pytest.mark.parametrize(
    ("name", "unit"),
    [("flops (EFLOPs)", 1e18), ("flops (1e18)", 1e18), ("C (1e18 FLOPs)", 1e18), ("compute (PFLOP/s-days)", 8.64e19),
     ("pf_days", 8.64e19), ("compute_eflops", 1e18), ("training_flops (TFLOPs)", 1e12)],
)  # fmt: skip
def test_units_of_flops_in_names(name, unit):
    rows = data.isoflop()
    np.testing.assert_allclose(canonical(rows.drop(columns="flops").assign(**{name: rows["flops"] / unit}))["flops"],
                               rows["flops"])  # fmt: skip


def test_flops_in_a_unit_that_is_not_known_are_refused():
    rows = data.isoflop()
    with pytest.raises(ValueError, match=r"compute \(yottaflops\): training FLOPs in a unit that is not known"):
        canonical(rows.drop(columns="flops").assign(**{"compute (yottaflops)": rows["flops"] / 1e24}), "t.csv")


def test_thousands_have_their_letter():
    """t is trillions: a name that ends in _t would be read so."""
    n = np.geomspace(1e7, 1e9, 9)
    with pytest.raises(ValueError, match=r"is num_tokens in thousands\? .* \(num_tokens_k\)"):
        units.check(n, 5 * n / 1e3, "runs.csv")
    assert meaning("num_tokens_k") == ("num_tokens", 2, 1e3)


@pytest.mark.parametrize("text", ['{"data": 5, "columns": ["a"]}', '{"data": [null], "columns": ["N"]}', "[" * 5000])
def test_json_that_is_no_table_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "runs.json"
    path.write_text(text)
    assert fit.main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fit_json_of_a_table_is_advised_as_it_was_fitted(tmp_path, capsys):
    table = tmp_path / "runs.csv"
    data.isoflop(noise=0.003).to_csv(table, index=False)
    out = tmp_path / "out"
    asked = ["--law", "chinchilla_tied", "--loss", "squared", "--holdout-flops", "1e19", "--bootstrap", "0"]
    assert fit.main([str(table), *asked, "--no-figures", "--out", str(out)]) == 0
    answer = tmp_path / "answer.json"
    assert advising.main([str(out / "fit.json"), "--flops", "1e20", "--json", str(answer)]) == 0
    said = json.loads(answer.read_text())
    assert said["law"] == "chinchilla_tied"
    assert said["decades"] == pytest.approx(np.log10(1e20 / data.isoflop().query("flops <= 1.01e19")["flops"].max()))
    capsys.readouterr()
    table.write_text("\n".join(table.read_text().splitlines()[:-3]))
    assert advising.main([str(out / "fit.json"), "--flops", "1e20"]) == 2
    assert "it is of 28 runs, and" in capsys.readouterr().err


@pytest.mark.slow
def test_one_pair_of_rows_makes_no_clusters():
    """Eight runs on a ray and the one that mends them, at a size that is there: their pair says nothing of a shared
    error, and leaving it out nothing of the law."""
    A0 = data.HOFFMANN["beta"] / (data.HOFFMANN["alpha"] + data.HOFFMANN["beta"])
    held = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n = np.append(np.geomspace(2e7, 2e9, 8), 2e7)
        d = np.append(20 * n[:8], 2.5e7)
        loss = data.chinchilla(n, d) * np.exp(0.003 * rng.normal(size=9))
        table = pd.DataFrame({"num_params": n, "num_tokens": d, "loss": loss})
        low, high = scaling.open(table).fit("chinchilla", bootstrap=100, combined=False).exponent["interval"]
        held += (low or 0) <= A0 <= (1 if high is None else high)
    assert held >= 17  # of a binomial of .95: fewer with probability .02


def _repeats():
    """Muennighoff et al. 2023's law: every second run reads its data thirty times."""
    sizes, unique = np.repeat(np.geomspace(1e8, 3e9, 6), 8), np.tile(np.repeat(np.geomspace(1e9, 3e10, 4), 2), 6)
    columns = {"num_params": sizes, "num_tokens": unique * np.tile([1.0, 30.0], 24), "unique_tokens": unique}
    loss = catalogue.FORMS["data_constrained"].predict(data.HOFFMANN | {"R_D": 15.0, "R_N": 5.0}, **columns)
    return pd.DataFrame({**columns, "loss": loss * np.exp(0.003 * np.random.default_rng(0).normal(size=len(loss)))})


@pytest.fixture(scope="module")
def repeating():
    return scaling.open(_repeats()).fit(laws=("chinchilla", "data_constrained"), bootstrap=0, combined=False)


@pytest.mark.slow
def test_tokens_that_repeat_are_said_where_a_law_takes_them_for_new(repeating):
    fit = repeating
    said = "24 of 48 runs read their data up to 30 times, and a law of N and D takes every token for new"
    assert any(line.startswith(said) for line in fit.doubts)
    assert any(said in note for note in fit.advise(num_tokens=1e10).notes)
    once = _repeats().query("num_tokens < 1.01 * unique_tokens")
    assert not any(
        "for new" in line for line in scaling.open(once).fit("chinchilla", bootstrap=0, combined=False).doubts
    )


@pytest.mark.slow
def test_epochs_are_those_of_the_tokens_that_were_asked_for(repeating):
    answer = repeating.advise(num_tokens=1e11, unique_tokens=1e9)
    assert answer.numbers["epochs"].value == 100
    assert answer.numbers["epochs, tokens repeated"].value < 100
    assert any("for the same" in note for note in answer.notes)


def test_groups_whose_exponents_differ_are_told_by_their_own_laws():
    truths = {"x": data.HOFFMANN | {"alpha": 0.5, "A": 7000.0}, "y": data.HOFFMANN}
    table = pd.concat(
        [data.isoflop(params=p, noise=0.002, seed=i).assign(group=g) for i, (g, p) in enumerate(truths.items())]
    )
    found = scaling.open(table).compare("group", bootstrap=60)
    assert found.sharing.rejected
    assert set(found.table["by"]) == {"laws apart"}
    rows = found.table.query("not extrapolated")
    assert len(rows) > 1
    form, cost = catalogue.FORMS["chinchilla"], Cost()
    law = {g: LawAtBest(form, {k: np.array([v]) for k, v in p.items()}, cost) for g, p in truths.items()}
    for row in rows.itertuples():
        truth = np.exp(log_multiplier(law[row.first], law[row.second], np.log([[row.flops]])))[0, 0]
        assert row.times == pytest.approx(truth, rel=0.1)


def test_an_optimum_of_a_law_at_a_bound_is_refused_whatever_its_form():
    """Farseer's is found by search: of losses that no size moves it was an optimum all the same."""
    table = data.scattered(60)
    loss = 1.7 + 400 * table["num_tokens"] ** -0.3
    table["loss"] = loss * np.exp(0.002 * np.random.default_rng(1).normal(size=len(table)))
    fit = scaling.open(table).fit(["farseer"], bootstrap=0, combined=False)
    held = fit.analysis.fits["farseer"]
    assert held.undetermined
    with pytest.raises(ValueError, match=r"farseer holds .* at a bound: these runs do not determine it"):
        fit.optimum(1e20)


@pytest.mark.parametrize("what", ["one side", "no size"])
def test_an_optimum_is_refused_where_advice_is(what):
    if what == "one side":
        table = data.isoflop(sizes=15, noise=0.002)
        table = table[table["num_params"] < 0.5 * data.optimum(table["flops"])]
    else:
        table = data.scattered(40)
        loss = 1.7 + 400 * table["num_tokens"] ** -0.3
        table["loss"] = loss * np.exp(0.002 * np.random.default_rng(1).normal(size=len(table)))
    fit = scaling.open(table).fit("chinchilla", bootstrap=60, combined=False)
    why = "one side" if what == "one side" else "at a bound"
    with pytest.raises(ValueError, match=why) as advised:
        fit.advise(flops=1e20)
    with pytest.raises(ValueError, match=why) as optimum:
        fit.optimum(1e20)
    assert str(optimum.value) == str(advised.value)
    if what == "no size":
        assert fit.analysis.fits["chinchilla"].undetermined
        assert fit.payload["allocation"]["a_interval"] == [None, None]
        assert fit.payload["frontier"] == []
        assert not fit.payload["allocation"]["tokens_per_param"]


@pytest.mark.parametrize(
    "n, d, level, said",
    [
        (1e9, 0.0, 0.9, "num_tokens is 0.0"),
        (-1e9, 1e9, 0.9, "num_params is -1"),
        (math.nan, 1e9, 0.9, "num_params is nan"),
        (1e9, 1e10, 90, "level is 90"),
    ],
)
def test_a_run_that_cannot_be_has_no_loss(n, d, level, said):
    fit = scaling.open(data.isoflop(noise=0.002)).fit("chinchilla", bootstrap=0, combined=False)
    with pytest.raises(ValueError, match=said), np.errstate(all="ignore"):
        fit.predict(n, d, interval=level)


@pytest.mark.parametrize("given", [1, 19, -1, True, "x", 2.5])
def test_too_few_resamples_are_refused(given):
    groups = pd.concat([data.isoflop(noise=0.002).assign(group=g) for g in "ab"])
    with pytest.raises(ValueError, match="write 20 or more, or 0"):
        scaling.open(groups).compare("group", bootstrap=given)
    with pytest.raises(ValueError, match="write 20 or more, or 0"):
        scaling.open(data.isoflop(noise=0.002)).fit("chinchilla", bootstrap=given)


def test_a_flat_region_ends_at_its_outermost_size():
    """A machine twice as fast beyond a size: sizes there are as good again, past some that are not."""
    law = LawAtBest(catalogue.FORMS["chinchilla"], {k: np.array([v]) for k, v in data.HOFFMANN.items()}, Cost())
    alone = Budget.of_time(1e6, lambda n: np.full_like(n, 1e15), "").best_size(law)[0, 0]
    budget = Budget.of_time(1e6, lambda n: 1e15 * (1 + 0.16 * (1 + np.tanh(25 * (np.log(n) - alone - 1.2)))), "")
    every = np.linspace(alone - 6, alone + 6, 60001)[None]
    loss = budget.loss(law, every)[0]
    for share in (0.001, 0.005, 0.01):
        within = np.exp(every[0][loss <= loss.min() * (1 + share)])
        assert questions._flat(budget, share, -1, law)[0] == pytest.approx(within[0], rel=1e-3)
        assert questions._flat(budget, share, 1, law)[0] == pytest.approx(within[-1], rel=1e-3)


@pytest.mark.parametrize("question", [{"flops": "1e21"}, {"deadline": "30d"}, {"num_tokens": "10B"}])
def test_a_number_written_as_text_is_refused_in_words(question):
    fit = scaling.open(data.isoflop(noise=0.002)).fit("chinchilla", bootstrap=0, combined=False)
    with pytest.raises(ValueError, match="write a number"):
        fit.advise(**question, hardware="h100")


def test_what_is_no_table_of_runs_is_said():
    runs = data.isoflop()
    with pytest.raises(ValueError, match="column loss is there twice"):
        scaling.open(pd.concat([runs, runs[["loss"]] + 1], axis=1)).fit("chinchilla", bootstrap=0)
    levels = runs.set_axis(pd.MultiIndex.from_product([["run"], runs.columns]), axis=1)
    with pytest.raises(ValueError, match="2 levels"):
        scaling.open(levels).fit("chinchilla", bootstrap=0)
    with pytest.raises(ValueError, match="dict is no table"):
        scaling.open(runs.to_dict("list"))
