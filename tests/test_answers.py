"""What the command answers where there is no answer: no optimum, no end, no compute in FLOPs."""

import dataclasses
import json

import numpy as np
import pytest

from scaling.fit import analyse, main
from tests.laws import data


def fitted_json(tmp_path, table, *options):
    table.to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv"), "--no-figures", "--bootstrap", "60", "--one-law", *options]) == 0
    return json.loads((tmp_path / "fit.json").read_text())


def test_compute_in_another_unit_leaves_the_exponents_and_no_allocation(tmp_path, capsys):
    table = data.scattered(30, noise=0.003)
    usual = fitted_json(tmp_path, table, "--law", "chinchilla")["allocation"]
    days = table.assign(flops=6 * table["num_params"] * table["num_tokens"] / 8.64e19)  # PF-days
    capsys.readouterr()
    found = fitted_json(tmp_path, days, "--law", "chinchilla")
    assert found["allocation"]["a"] == usual["a"]
    assert found["allocation"]["a_interval"] == usual["a_interval"]
    assert found["allocation"]["tokens_per_param"] == {} == found["isoflop"].get("bias", {})
    assert found["frontier"] == []
    assert "a_local" not in found["allocation"]
    out = capsys.readouterr().out
    assert "C/(6ND) is 1.2e-20" in out
    assert "Tokens per parameter" not in out
    assert "fitted range" not in out


@pytest.mark.parametrize("law", ["chinchilla", "chinchilla_tied", pytest.param("kaplan_joint", marks=pytest.mark.slow)])
def test_other_units_of_size_and_tokens_change_no_answer(law):
    """N in thousandths, D in ten-thousandths, C in what follows: ratios and exponents are the same fit's. (In millions
    and billions the same table is refused: see ``units.check``.)"""
    table = data.scattered(30, noise=0.003)
    table = table.assign(flops=6 * table["num_params"] * table["num_tokens"] * (1 + (2e7 / table["num_params"]) ** 0.7))
    moved = table.assign(num_params=table["num_params"] * 1e3, num_tokens=table["num_tokens"] * 1e4)
    moved = moved.assign(flops=moved["flops"] * 1e7)
    usual = analyse(table, laws=(law,), bootstrap=40, combined=False).to_json()["allocation"]
    other = analyse(moved, laws=(law,), bootstrap=40, combined=False).to_json()["allocation"]
    for key in ("a", "b", "a_local"):
        assert other[key] == pytest.approx(usual[key], rel=1e-5)
    for (C, u), (scaled, o) in zip(usual["tokens_per_param"].items(), other["tokens_per_param"].items()):
        assert float(scaled) / 1e7 == pytest.approx(float(C), rel=1e-3)
        assert o["value"] / 10 == pytest.approx(u["value"], rel=1e-4)
        assert np.array(o["interval"]) / 10 == pytest.approx(np.array(u["interval"]), rel=1e-3)


def test_equal_exponents_are_by_construction_and_product_has_no_optimum(tmp_path, capsys):
    table = data.scattered(30, noise=0.003)
    tied = fitted_json(tmp_path, table, "--law", "chinchilla_tied")["allocation"]
    assert (tied["a"], tied["a_interval"], tied["by_construction"]) == (0.5, None, ["a", "b", "a_local"])
    assert "by construction" in capsys.readouterr().out
    product = fitted_json(tmp_path, table, "--law", "product")
    assert product["frontier"] == []
    assert product["allocation"]["tokens_per_param"] == {}
    assert not {"a", "a_local"} & set(product["allocation"])
    assert "product has no interior optimum" in capsys.readouterr().out


def test_draws_without_an_optimum_are_counted_and_open_the_interval():
    """A third of the draws of this law fall towards more parameters for ever: its upper end is not a percentile."""
    found = analyse(data.scattered(30, noise=0.003), laws=("chinchilla",), bootstrap=60, combined=False)
    draws = found.draws["chinchilla"]
    params = dict(draws.params) | {"B": np.where(np.arange(60) % 3 == 0, 0.0, draws.params["B"])}
    broken = dataclasses.replace(found, draws={"chinchilla": dataclasses.replace(draws, params=params)}, derived={})
    allocation = broken.to_json()["allocation"]
    assert "33.3% of the draws have no interior optimum" in allocation["reasons"][0]
    for entry in allocation["tokens_per_param"].values():
        assert entry["interval"][0] is None
        assert entry["interval"][1] > entry["value"]


def open_ends(found):
    """(interval shown, profile's interval) of every parameter and derived quantity of fit.json."""
    payload = json.loads(json.dumps(found.to_json(), allow_nan=False))
    law, split = payload["laws"]["chinchilla"], payload["allocation"]
    pairs = [(law["intervals"][k], ends) for k, ends in law["profile_intervals"].items()]
    pairs += [(split[f"{k}_interval"], split["profiles"][k]["interval"]) for k in ("a", "b", "a_local")]
    top = max(split["tokens_per_param"].items(), key=lambda pair: float(pair[0]))[1]
    return [*pairs, (top["interval"], split["profiles"]["tokens_per_param"]["interval"])]


def methods(found):
    """The same analysis with intervals by profile, by resampled runs and by the delta method."""
    return found, dataclasses.replace(found, resampled="run"), dataclasses.replace(found, draws={})


def test_an_end_that_the_profile_lacks_is_in_no_interval():
    """Each profile in turn loses an end; whatever the method, so does what is shown, and nothing else."""
    found = analyse(data.scattered(30, noise=0.003), laws=("chinchilla",), bootstrap=60, combined=False)
    for made in methods(found):
        assert not any(None in shown for shown, _ in open_ends(made))
    lower = {k: dataclasses.replace(p, lower=-np.inf) for k, p in found.profiles["chinchilla"].items()}
    upper = {k: dataclasses.replace(p, upper=np.inf) for k, p in found.derived.items()}
    for made in methods(dataclasses.replace(found, profiles={"chinchilla": lower}, derived=upper)):
        for shown, ends in open_ends(made):
            assert [end is None for end in shown] == [end is None for end in ends]
            assert None in shown


@pytest.mark.slow
def test_real_profiles_without_an_end_leave_none():
    """Noise of 10 % on fourteen runs: percentiles of α lie in .1 to 3, which is where the refits may go."""
    found = analyse(data.scattered(14, noise=0.1, seed=2), laws=("chinchilla",), bootstrap=60, combined=False)
    for made in methods(found):
        pairs = open_ends(made)
        assert sum(None in ends for _, ends in pairs) >= 4
        for shown, ends in pairs:
            assert [end is None for end in shown] == [end is None for end in ends]


def test_a_parameter_held_by_a_bound_has_no_width_to_show():
    """Held at 3, an exponent has a standard error of zero, which is no interval; E ≥ 0 is a limit of its own."""
    table = data.scattered(30, params=data.HOFFMANN | {"E": 0.0, "B": 1e3}, noise=0.003)
    found = analyse(table, laws=("chinchilla",), bootstrap=0, combined=False)
    fitted = found.fits["chinchilla"]
    held = dataclasses.replace(fitted, at_bound=("E", "alpha"), theta=np.where(
        [n == "alpha" for n in fitted.coordinates.names], fitted.problem.upper, np.where(
            [n == "E" for n in fitted.coordinates.names], 0.0, fitted.theta)))  # fmt: skip
    found = dataclasses.replace(found, fits={"chinchilla": held}, profiles={}, derived={})
    shown = found.to_json()["laws"]["chinchilla"]["intervals"]
    assert shown["E"][1] is None
    assert shown["alpha"] == [None, None]
