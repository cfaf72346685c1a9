"""Tables on which a wrong number once looked right: groups that tell nothing apart, units in names, fits in doubt."""

import json

import numpy as np
import pandas as pd
import pytest

import scaling
from scaling import advise as advising
from scaling import design, fit
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
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = np.append(np.geomspace(2e7, 2e9, 8), 2e7)
        d = np.append(20 * n[:8], 2.5e7)
        loss = data.chinchilla(n, d) * np.exp(0.003 * rng.normal(size=9))
        table = pd.DataFrame({"num_params": n, "num_tokens": d, "loss": loss})
        low, high = scaling.open(table).fit("chinchilla", bootstrap=100, combined=False).exponent["interval"]
        held += (low or 0) <= A0 <= (1 if high is None else high)
    assert held >= 26  # of a binomial of .95: fewer with probability .02
