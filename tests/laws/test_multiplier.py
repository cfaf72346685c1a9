"""Multipliers against brute-force search, closed forms and the textbook's test of equal slopes; refusals."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

import scaling
from scaling import fit
from scaling.laws.answers.multiplier import compare
from scaling.laws.forms import catalogue
from scaling.laws.intervals import resampling
from scaling.laws.payload import of_comparison
from tests.laws import data

QUICK = {"bootstrap": 0}
OTHER = {"E": 1.69, "A": 300.0, "alpha": 0.34, "B": 380.0, "beta": 0.28}
# FLOPs per token of each group, as a function of N: a head that small models pay for, and a dearer block.
COSTS = {"plain": lambda n: 6 * n * (1 + 2e7 / n), "dear": lambda n: 7.8 * n}


def groups(truths, costs=None, noise=0.0, seed=0, sizes=5):
    """One design under several laws, in a table with the column ``family``."""
    rng = np.random.default_rng(seed)
    parts = []
    for name, truth in truths.items():
        part = data.isoflop(budgets=(1e18, 1e19, 1e20), sizes=sizes)[["num_params", "num_tokens"]]
        c = 6 * part["num_params"] if costs is None else costs[name](part["num_params"])
        loss = data.chinchilla(part["num_params"], part["num_tokens"], truth)
        noisy = loss * np.exp(noise * rng.normal(size=len(part)))
        parts.append(part.assign(flops=c * part["num_tokens"], loss=noisy, family=name))
    return pd.concat(parts, ignore_index=True)


def least_loss(truth, cost, flops):
    """(L*, N*) by search over N."""

    def loss(log_n):
        n = math.exp(log_n)
        return float(data.chinchilla(n, flops / cost(n), truth))

    found = optimize.minimize_scalar(loss, bounds=(10, 32), method="bounded", options={"xatol": 1e-12})
    return found.fun, math.exp(found.x)


def paid(truth, cost, loss, flops):
    """C' with L*(C') = loss, by bisection."""
    middle = math.log(flops)
    return optimize.brentq(lambda c: least_loss(truth, cost, math.exp(c))[0] - loss, middle - 6, middle + 6)


def test_multipliers_are_those_of_a_search():
    """Without noise the laws are the planted ones; each group pays its own FLOPs for a token."""
    truths = {"plain": data.HOFFMANN, "dear": OTHER}
    found = compare(groups(truths, COSTS), "family", **QUICK)
    pair = found.pairs[0]
    assert (pair.group, pair.over) == ("dear", "plain")
    assert found.joint.converged
    for i in (0, 9, 24):
        C = pair.at[i]
        loss, n = least_loss(OTHER, COSTS["dear"], C)
        want = math.exp(paid(data.HOFFMANN, COSTS["plain"], loss, C)) / C
        assert pair.shared.value[i] == pytest.approx(want, rel=1e-5)
        assert pair.apart.value[i] == pytest.approx(want, rel=1e-4)

        def tokens(log_d, n=n, loss=loss):
            return float(data.chinchilla(n, math.exp(log_d), data.HOFFMANN)) - loss

        same = math.exp(optimize.brentq(tokens, 10, 50)) * COSTS["plain"](n) / C
        assert pair.same_size.value[i] == pytest.approx(same, rel=1e-4)
    # With heads that cost alike for both it would be one number: here it moves with compute.
    assert np.ptp(pair.shared.value) > 0.05


@pytest.mark.parametrize("name, more", [("joined", {"gamma": 0.5}), ("saturating", {"L_0": 4.0})])
def test_multipliers_of_powers_that_join_or_saturate(name, more):
    """b takes 1.5 times the parameters and the tokens of a, each 1.5^.5, for any loss: 1.5 times the compute."""
    form, times = catalogue.FORMS[name], 1.5**0.5
    truth = data.HOFFMANN | more
    table = data.isoflop(budgets=(1e18, 1e19, 1e20), sizes=7)[["num_params", "num_tokens"]]
    n, d = table["num_params"], table["num_tokens"]
    a, b = (
        form.predict(truth, num_params=n, num_tokens=d),
        form.predict(truth, num_params=n / times, num_tokens=d / times),
    )
    both = pd.concat([table.assign(loss=a, family="a"), table.assign(loss=b, family="b")], ignore_index=True)
    (pair,) = compare(both, "family", law=name, **QUICK).pairs
    assert {pair.group, pair.over} == {"a", "b"}
    expected = 1.5 if pair.group == "a" else 1 / 1.5
    np.testing.assert_allclose(pair.shared.value, expected, rtol=1e-5)


def test_apart_from_each_other_laws_may_have_other_exponents_and_floors():
    truths = {"one": data.HOFFMANN, "other": {"E": 1.75, "A": 250.0, "alpha": 0.32, "B": 900.0, "beta": 0.33}}
    found = compare(groups(truths), "family", **QUICK)
    assert found.sharing.rejected
    assert found.sharing.p_value < 1e-6
    assert any("do not fit" in w for w in found.warnings)
    pair = found.pairs[0]
    for i in (0, 12):
        loss, _ = least_loss(truths["other"], lambda n: 6 * n, pair.at[i])
        want = math.exp(paid(data.HOFFMANN, lambda n: 6 * n, loss, pair.at[i])) / pair.at[i]
        assert pair.apart.value[i] == pytest.approx(want, rel=1e-4)
    # A loss below the other's floor is never reached: no end, not a large number.
    low = compare(groups({"low": data.HOFFMANN | {"E": 1.0}, "high": OTHER}), "family", **QUICK)
    entry = of_comparison(low, {})["multiplier"]["pairs"][0]["points"][-1]
    assert least_loss(OTHER, lambda n: 6 * n, 1e21)[0] > 1.69
    assert entry["apart_value"] < 1
    turned = compare(groups({"high": OTHER, "low": data.HOFFMANN | {"E": 1.0}}), "family", **QUICK)
    assert of_comparison(turned, {})["multiplier"]["pairs"][0]["points"][-1]["apart_value"] is None
    moved = {(m["group"], i % 2): m["change"] for i, m in enumerate(found.moves)}
    assert len(moved) == 4
    assert max(map(abs, moved.values())) > 1e-3


@pytest.mark.parametrize("law, axis", [("kaplan_c_offset", "flops"), ("kaplan_d_offset", "num_tokens")])
def test_of_one_power_the_speed_up_is_a_ratio_of_excess_losses(law, axis):
    """((L_worse - E) / (L_better - E))^(1/α) at every budget (tables without N: nothing else limits the loss)."""
    rng = np.random.default_rng(0)
    x = np.geomspace(1e17, 1e21, 12)
    parts = [
        pd.DataFrame({axis: x, "loss": (1.5 + (scale / x) ** 0.12) * np.exp(0.003 * rng.normal(size=12)), "by": name})
        for name, scale in {"worse": 3e17, "better": 1e17}.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    found = compare(table, "by", bootstrap=30)
    assert (found.form.name, found.axis) == (law, axis)
    pair, params = found.pairs[0], {name: found.params(name) for name in ("worse", "better")}
    E, alpha = params["worse"]["E"], params["worse"]["alpha"]
    worse, better = (found.form.predict(params[k], **{axis: pair.at}) for k in ("worse", "better"))
    np.testing.assert_allclose(pair.shared.value, ((worse - E) / (better - E)) ** (1 / alpha), rtol=1e-9)
    assert 2.0 < pair.shared.value[0] < 4.5
    assert pair.same_size is None


def test_the_joint_law_is_least_squares_of_all_rows():
    """By SciPy, over the logarithms of the amplitudes as they stand."""
    table = groups({"a": data.HOFFMANN, "b": OTHER}, noise=0.003)
    found = compare(table, "family", loss="squared", **QUICK)
    k = (table["family"] == "b").to_numpy().astype(int)
    n, d = (np.log(table[c].to_numpy()) for c in ("num_params", "num_tokens"))

    def residuals(p):
        E, alpha, beta, *logs = p
        loss = E + np.exp(np.array(logs[:2])[k] - alpha * n) + np.exp(np.array(logs[2:])[k] - beta * d)
        return np.log(loss) - np.log(table["loss"])

    start = [1.6, 0.33, 0.27, 6.0, 5.8, 6.0, 5.9]
    best = optimize.least_squares(residuals, start, xtol=1e-15, ftol=1e-15, gtol=1e-15, x_scale="jac")
    assert found.joint.objective == pytest.approx(best.cost, rel=1e-9)
    params = found.params("b")
    want = [params["E"], params["alpha"], params["beta"], np.log(params["A"]), np.log(params["B"])]
    np.testing.assert_allclose(want, best.x[[0, 1, 2, 4, 6]], rtol=1e-4)


def test_the_test_of_sharing_is_the_analysis_of_covariance():
    """Of a straight line in logs, by least squares, it is the F test of equal slopes."""
    rng = np.random.default_rng(2)
    x = np.tile(np.geomspace(1e17, 1e21, 9), 3)
    k = np.repeat(np.arange(3), 9)
    loss = np.exp(0.3 * k + (2.0 - 0.05 * np.log(x / 1e19)) + 0.01 * rng.normal(size=27))
    table = pd.DataFrame({"flops": x, "loss": loss, "g": np.array(["a", "b", "c"])[k]})
    found = compare(table, "g", law="kaplan_c", loss="squared", **QUICK)
    own = (k[:, None] == np.arange(3)).astype(float)

    def squares(columns):
        return np.linalg.lstsq(columns, np.log(loss), rcond=None)[1][0]

    shared = squares(np.column_stack([own, np.log(x)]))
    apart = squares(np.column_stack([own, own * np.log(x)[:, None]]))
    statistic = (shared - apart) / 2 / (apart / 21)
    assert found.sharing.degrees_of_freedom == (2, 21)
    assert found.sharing.statistic == pytest.approx(statistic, rel=1e-6)
    assert found.sharing.p_value == pytest.approx(stats.f.sf(statistic, 2, 21), rel=1e-6)
    assert [(p.group, p.over) for p in found.pairs] == [("b", "a"), ("c", "a"), ("c", "b")]


def test_cells_are_drawn_whole_and_unpaired_rows_within_their_group():
    counts = resampling.resamples(
        7, 200, clusters=np.array([0, 1, 0, 1, 2, 3, 4]), strata=np.array([0, 0, 0, 0, 1, 1, 2])
    )
    np.testing.assert_array_equal(counts[:, 0], counts[:, 2])
    np.testing.assert_array_equal(counts[:, 1], counts[:, 3])
    assert (counts[:, :2].sum(axis=1) == 2).all()
    assert (counts[:, 4:6].sum(axis=1) == 2).all()
    assert (counts[:, 6] == 1).all()
    assert len(np.unique(counts, axis=0)) > 5


def test_an_error_that_both_runs_of_a_cell_share_cancels():
    """Drawn as pairs, runs that are wrong together leave the multiplier where it is; told apart they would not."""
    table = groups({"a": data.HOFFMANN, "b": data.HOFFMANN | {"B": 400.0}})
    error = np.tile(np.exp(0.01 * np.random.default_rng(4).normal(size=15)), 2)
    table = table.assign(loss=table["loss"] * error).sample(frac=1, random_state=0)
    paired = compare(table, "family", bootstrap=80)
    assert paired.paired.all()
    assert len(np.unique(paired.cells)) == 15
    # Sizes 3 % apart are other cells: nothing is paired any more.
    moved = table.assign(num_params=table["num_params"] * np.where(table["family"] == "b", 1.03, 1.0))
    moved = moved.assign(flops=6 * moved["num_params"] * moved["num_tokens"])
    alone = compare(moved, "family", bootstrap=80)
    assert not alone.paired.any()
    assert any("no cell has runs of every group" in w for w in alone.warnings)
    narrow, wide = (np.diff(np.log(f.pairs[0].shared.interval[8]))[0] for f in (paired, alone))
    assert narrow < 0.25 * wide


def test_the_delta_methods_interval_is_near_the_resamples():
    table = groups({"a": data.HOFFMANN, "b": OTHER}, noise=0.003, seed=5)
    widths = []
    for bootstrap in (0, 300):
        pair = scaling.compare(table, "family", bootstrap=bootstrap).pairs[0]
        lower, upper = pair.shared.interval[8]
        assert lower < pair.shared.value[8] < upper
        widths.append(math.log(upper / lower))
    assert 0.6 < widths[0] / widths[1] < 1.6


def test_held_out_runs_are_not_fitted_and_said():
    table = groups({"a": data.HOFFMANN, "b": OTHER}, sizes=6)
    held = table["flops"] > 5e19
    found = compare(table.assign(holdout=held, loss=table["loss"].where(~held, 9.0)), "family", **QUICK)
    assert len(found.joint.residuals) == 24
    assert found.params("a")["E"] == pytest.approx(1.69, rel=1e-3)
    assert "12 holdout runs are not fitted" in found.warnings


def test_extrapolation_is_marked():
    table = groups({"a": data.HOFFMANN, "b": OTHER})
    pair = compare(table, "family", **QUICK).pairs[0]
    needed = pair.at * pair.shared.value
    inside = (pair.at <= 1e20 * 1.001) & (needed >= 1e18 * 0.999) & (needed <= 1e20 * 1.001)
    np.testing.assert_array_equal(pair.extrapolated, ~inside)
    assert inside.any()
    assert not inside[-1]


RECORDED = {"objective": "next_token", "started": False, "data": "f" * 12, "data_source": "c4", "tokenizer": "bytes"}


def kinds(**of_b):
    """Two groups whose second is told apart by these columns too."""
    table = groups({"a": data.HOFFMANN, "b": OTHER})
    second = table["family"] == "b"
    return table.assign(**{c: np.where(second, of_b.get(c, v), v) for c, v in RECORDED.items()})


@pytest.mark.parametrize(
    "table, options, words",
    [
        (lambda: kinds(), {"column": "nope"}, "compare is 'nope', which is no column"),
        (lambda: kinds(), {"column": "tokenizer"}, "tokenizer is bytes in every row: nothing to compare"),
        (lambda: kinds()[:17], {}, "family=b: 2 fitted runs, too few for its 2 amplitudes: 3 or more are needed"),
        (lambda: kinds().assign(family=lambda t: t["family"].where(t.index > 2)), {}, "row 1 has no family"),
        (lambda: kinds(objective="masked"), {}, "losses of next_token and masked do not measure the same thing"),
        (lambda: kinds(started=True), {}, "whose compute is not in theirs"),
        (lambda: kinds(data_source="pile", data="e"), {}, "losses on c4 and pile are of other text"),
        (lambda: kinds(data="e" * 12), {}, "2 states of c4 (ffffffffffff and eeeeeeeeeeee)"),
        (lambda: kinds(tokenizer="bpe:4096", data="e"), {}, "compare bits per byte, in a column bits_per_byte"),
        (lambda: kinds(), {"law": "kaplan_joint"}, "write --law chinchilla, chinchilla_tied or"),
        (lambda: kinds().assign(flops=1e30), {}, "family=a: no compute multiplier: C/(6ND) is"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_to_do(table, options, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        compare(table(), **{"column": "family", **QUICK, **options})
    assert "\n" not in str(error.value)


def test_losses_are_in_the_unit_that_records_say():
    assert compare(kinds(), "family", **QUICK).unit == "nats per token"
    masked = kinds().assign(loss_unit="nats per masked token")
    assert compare(masked, "family", **QUICK).unit == "nats per masked token"


def test_other_tokenizers_are_compared_by_bits_per_byte():
    table = kinds(tokenizer="bpe:4096", data="e")
    bits = table.assign(bits_per_byte=table["loss"], loss=table["loss"] * np.where(table["family"] == "b", 3.0, 1.0))
    found = compare(bits, "family", **QUICK)
    assert found.unit == "bits per byte"
    want = compare(kinds(), "family", **QUICK).pairs[0]
    np.testing.assert_array_equal(found.pairs[0].shared.value, want.shared.value)


def test_the_command_compares_a_table(tmp_path, capsys):
    table = groups({"adamw": data.HOFFMANN, "muon": OTHER}, noise=0.003, sizes=4)
    table.rename(columns={"family": "optimizer"}).to_csv(tmp_path / "t.csv", index=False)
    assert fit.main([str(tmp_path / "t.csv"), "--compare", "optimizer", "--bootstrap", "20"]) == 0
    shown = capsys.readouterr().out
    payload = json.loads((tmp_path / "fit.json").read_text())["multiplier"]
    assert [(p["group"], p["over"]) for p in payload["pairs"]] == [("muon", "adamw")]
    assert payload["num_cells_paired"] == 12
    assert payload["bootstrap_converged"] == 1.0
    for pair in payload["pairs"]:
        assert f"{pair['group']}, {pair['over']}" in shown
        assert f"{pair['points'][0]['value']:.4g}" in shown
        assert all(
            p["interval"][0] <= p["value"] * 1.2 and p["value"] <= p["interval"][1] * 1.2 for p in pair["points"]
        )
    assert "One set of exponents for all groups" in shown
    assert (tmp_path / "figures" / "multiplier.svg").exists()
    for wrong, words in {"--compare nope": "no column", "--compare optimizer --law all": "one law",
                         "--compare optimizer --convention": "without --compare"}.items():  # fmt: skip
        assert fit.main([str(tmp_path / "t.csv"), *wrong.split()]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
