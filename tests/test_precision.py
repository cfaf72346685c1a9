"""How precisely validation losses are known: against σ/√n, the standard error of a mean."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from scaling import parts, records
from scaling.laws import analysis
from scaling.laws.answers import precision, truth
from scaling.laws.intervals import shared
from scaling.laws.tables import observations
from scaling.report.page import build
from tests import synthetic

REPO = Path(__file__).parents[1]
SIGMA = 1.4  # nats, of one token's loss


@pytest.fixture(scope="module")
def runs():
    return synthetic.sweep_records()[:3]


def validated(run, num_tokens: int, sigma=SIGMA, **data):
    error = sigma / math.sqrt(num_tokens)
    data = run.data | {"source": "text:notes", **data}
    return dataclasses.replace(run, num_eval_tokens=num_tokens, loss_standard_error=error, data=data)


def test_the_split_that_is_needed_has_the_standard_error_that_is_asked(runs):
    [row] = precision.of([validated(run, 400_000, sigma) for run, sigma in zip(runs, (1.2, SIGMA, 1.3))])
    assert row["standard_error"] == pytest.approx(SIGMA / math.sqrt(400_000), rel=1e-12)  # the least precise of them
    assert not row["enough"]
    assert SIGMA / math.sqrt(row["tokens_needed"]) == pytest.approx(0.002, rel=1e-5)


def test_it_is_said_only_where_it_is_not_enough(runs):
    assert precision.sentences(precision.of([validated(runs[0], 489_999)]))  # at 490,000 it is .002
    assert precision.sentences(precision.of([validated(runs[0], 490_001)])) == []
    assert precision.sentences(precision.of([dataclasses.replace(runs[0], loss_standard_error=None)])) == []


def test_every_source_of_a_mixture_is_judged_by_its_own_split(runs):
    sources = [
        {"source": "text:small", "validation_tokens": 10_000, "standard_error": 0.014},
        {"source": "text:large", "validation_tokens": 10**6, "standard_error": 0.0014},
    ]
    mixture = validated(runs[0], 1_010_000, sources=sources)
    assert [row["enough"] for row in precision.of([mixture])] == [False, True]
    [sentence] = precision.sentences(precision.of([mixture]))
    assert sentence.startswith("validation losses on text:small have a standard error of up to 0.0140 nats")
    assert "from 10K held-out tokens, the same for all runs; it would take about 490K to bring it to 0.002" in sentence


def test_pairs_are_not_called_tokens(runs):
    objective = {"name": "contrastive", "negatives": 7, "temperature": 0.05, "span": 8}
    pairs = dataclasses.replace(validated(runs[0], 8077), config=runs[0].config | {"objective": objective})
    [sentence] = precision.sentences(precision.of([pairs]))
    assert " nats per pair, from 8.08K held-out pairs, the same for all runs" in sentence


def test_axes_of_data_are_kept_apart(runs):
    few, many = validated(runs[0], 10_000, fingerprint="a"), validated(runs[1], 10**6, fingerprint="b")
    assert [row["num_tokens"] for row in precision.of([few, many])] == [10_000, 10**6]


def test_the_page_says_it(runs, tmp_path):
    plain = [dataclasses.replace(validated(r, 490_000 // 4), curve={k: [] for k in r.curve}) for r in runs]
    synthetic.write(tmp_path / "r", plain)
    page = build(tmp_path / "r").read_text(encoding="utf-8")
    assert "Validation losses on text:notes have a standard error of up to 0.0040 nats per token" in page
    assert "from 122K held-out tokens, the same for all runs; it would take about 490K to bring it to 0.002." in page


def test_of_the_committed_sweep_it_is_what_the_readme_says():
    """.06 nats over half a million tokens: by 64 parts .037 were they strangers, but documents lie in several; by means
    of eight parts one after another, which are nearly so, .068. Windows taken as independent say a tenth of it."""
    runs = records.load_records(REPO / "results" / "chinchilla")
    [row] = precision.of(runs)
    assert 5.1e5 < row["num_tokens"] < 5.17e5
    eights = max(np.std(np.reshape(run.loss_by_block["loss"], (8, 8)).mean(axis=1), ddof=1) / 8**0.5 for run in runs)
    assert row["standard_error"] == pytest.approx(eights, rel=0.15)
    assert 0.055 < row["standard_error"] < 0.068
    assert max(run.loss_standard_error for run in runs) < row["standard_error"] / 8
    assert row["tokens_needed"] == pytest.approx(row["num_tokens"] * (row["standard_error"] / 0.002) ** 2, rel=1e-6)


def newey_west(values):
    """Standard error of a mean of equal parts, Newey and West 1987, by the double sum; never less than of strangers."""
    B, u = len(values), values - values.mean()
    reach = round(B ** (1 / 3))
    weight = np.maximum(1 - np.abs(np.subtract.outer(np.arange(B), np.arange(B))) / (reach + 1), 0)
    return math.sqrt(max(u @ weight @ u, u @ u) / (B * (B - 1)))


def test_neighbouring_parts_that_are_alike_say_less():
    """Of a chain x' = ρ x + ε the variance of a mean is (1 + ρ) / (1 - ρ) times that of independent draws."""
    rng, rho, told = np.random.default_rng(0), 0.5, []
    for _ in range(400):
        x = rng.normal(size=264)
        for i in range(1, 264):
            x[i] = rho * x[i - 1] + (1 - rho**2) ** 0.5 * x[i]
        blocks = {"source": [0] * 64, "weight": [1.0] * 64, "num_tokens": [1000] * 64}
        told.append(parts.mean_and_standard_error(blocks, x[200:])[1])
    exact = ((1 + rho) / (1 - rho) / 64) ** 0.5
    assert 0.8 * exact < np.sqrt(np.mean(np.square(told))) < 1.02 * exact  # 64 parts see most of it; alone .58


def test_of_a_mixture_each_source_is_by_its_own_parts(runs):
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 0.1, 20), rng.normal(3, 0.4, 30)
    run = by_block(validated(runs[0], 50_000), [*x, *y], source=[0] * 20 + [1] * 30, weight=[0.7] * 20 + [0.3] * 30)
    sources = [{"source": name, "validation_tokens": 1000 * n} for name, n in (("text:a", 20), ("text:b", 30))]
    rows = precision.of([dataclasses.replace(run, data=run.data | {"sources": sources})])
    assert [row["standard_error"] for row in rows] == pytest.approx([newey_west(x), newey_west(y)], rel=1e-9)
    assert newey_west(x) > x.std(ddof=1) / 20**0.5  # of these draws what neighbours share is more than nothing


def by_block(run, loss, num_tokens=None, source=None, weight=None):
    B = len(loss)
    blocks = {"source": source or [0] * B, "block": list(range(B)), "weight": weight or [1.0] * B}
    blocks |= {"num_tokens": num_tokens or [1000] * B, "loss": list(loss)}
    told = np.array(blocks["num_tokens"]) * np.array(blocks["weight"])
    return dataclasses.replace(run, loss=float(np.average(loss, weights=told)), loss_by_block=blocks)


def test_a_difference_of_two_runs_is_the_paired_test_s(runs):
    """Of equal parts: SciPy's paired t, whose standard error is the mean over t; ten times below either run's own."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 0.08, 64)
    a, b = 2.0 + hard + rng.normal(0, 0.004, 64), 2.01 + hard + rng.normal(0, 0.004, 64)
    # The large differences beside the small ones: such neighbours share nothing, and parts are strangers to both.
    ranks = np.argsort(a - b)
    order = np.stack([ranks[:32], ranks[:31:-1]], axis=1).ravel()
    a, b = a[order], b[order]
    one, other = (by_block(validated(run, 64_000), x) for run, x in zip(runs, (a, b)))
    value, error = precision.difference(one, other)
    assert value == pytest.approx((a - b).mean(), rel=1e-9)
    assert value / error == pytest.approx(stats.ttest_rel(a, b).statistic, rel=1e-9)
    assert one.standard_error == pytest.approx(newey_west(a), rel=1e-9)
    assert error < one.standard_error / 8
    [row] = precision.of([one, other])
    assert row["difference"] == pytest.approx(error)
    [sentence] = precision.sentences([row])
    assert sentence.endswith(
        f"a difference of two runs, part by part of the same text, is known to {error:.4f} or better"
    )


def test_parts_of_a_mixture_are_of_their_sources(runs):
    """Σ w D and Σ w² SE² over sources, parts weighted by their tokens: against the estimator of each alone."""
    rng = np.random.default_rng(1)
    n, d = rng.integers(500, 1500, 20).tolist(), rng.normal(0.01, 0.002, 20)
    source, weight = [0] * 12 + [1] * 8, [0.7] * 12 + [0.3] * 8
    one, other = (by_block(runs[0], x, n, source, weight) for x in (2 + d, np.full(20, 2.0)))
    expected, variance = 0.0, 0.0
    for w, here in ((0.7, slice(0, 12)), (0.3, slice(12, 20))):
        mean = np.average(d[here], weights=n[here])
        B = len(d[here])
        variance += w**2 * B / (B - 1) * sum((np.array(n[here]) * (d[here] - mean)) ** 2) / sum(n[here]) ** 2
        expected += w * mean
    assert precision.difference(one, other) == pytest.approx((expected, math.sqrt(variance)), rel=1e-9)


def test_other_text_or_other_parts_have_no_paired_difference(runs):
    one, other = by_block(runs[0], [1.0, 2.0]), by_block(runs[1], [1.5, 2.0])
    assert precision.difference(one, dataclasses.replace(other, data=other.data | {"fingerprint": "x"})) is None
    assert precision.difference(one, by_block(runs[1], [1.0, 2.0, 3.0])) is None
    assert precision.difference(one, runs[1]) is None  # an older record


def test_the_interval_of_E_carries_what_all_losses_share(runs):
    """√(half² + (1.96 SE)²) on either side, an end that is none stays none; the source's truth on this very split is
    held against the interval without it."""
    law = {"params": {"E": 1.5, "L_0": 3.0, "A": 2.0}, "level": 0.95, "interval_method": "profile"}
    law |= {
        "intervals": {"E": [1.46, None], "L_0": [2.9, 3.2], "A": [1.0, 3.0]},
        "profile_intervals": {"E": [1.46, None]},
    }
    told = shared.in_law(law, 0.008)
    low, high = told["intervals"]["E"]
    assert low == pytest.approx(1.5 - math.sqrt(0.04**2 + (1.959964 * 0.008) ** 2), rel=1e-6)
    assert high is None
    assert (
        shared.in_law(law | {"intervals": {**law["intervals"], "E": [-math.inf, 1.6]}}, 0.1)["intervals"]["E"][0]
        == -math.inf
    )
    reach = [math.hypot(half, 1.959964 * 0.008) for half in (0.1, 0.2)]  # a ceiling goes with the floor
    assert told["intervals"]["L_0"] == pytest.approx([3.0 - reach[0], 3.0 + reach[1]], rel=1e-6)
    assert told["intervals"]["A"] == [1.0, 3.0]
    assert told["evaluation"] == {"standard_error": 0.008, "E_on_this_split": [1.46, None]}
    assert law["intervals"]["E"] == [1.46, None]
    other = {"params": {"alpha": 0.1}, "intervals": {"alpha": [0.0, 0.2]}, "level": 0.95}
    assert shared.in_law(other, 0.008) == other
    fits = [{"laws": {"chinchilla": entry}} for entry in (law, told)]
    [row] = truth.irreducible(fits[0], 1.45)
    assert not row["inside"]
    assert truth.irreducible(fits[1], 1.45) == [row]


def test_the_error_that_a_fit_carries_is_that_of_the_least_loss():
    """Of records, and of a table that says it; the exponents' intervals are the same without it."""
    table = records.table(records.load_records(REPO / "results" / "chinchilla"))
    laws = {"laws": ["chinchilla"], "bootstrap": 0}
    found = analysis.analyse(table, **laws)
    fitted = table[~table["holdout"]]
    error = fitted.loc[fitted["loss"].idxmin(), "loss_standard_error"]
    assert found.observations.shared_error == error
    assert 0.055 < error < 0.068
    law = found.to_json()["laws"]["chinchilla"]
    alone = analysis.analyse(table.drop(columns="loss_standard_error"), **laws).to_json()["laws"]["chinchilla"]
    assert "evaluation" not in alone
    assert law["evaluation"]["E_on_this_split"] == alone["intervals"]["E"]
    half = [math.hypot(end - law["params"]["E"], 1.959964 * error) for end in alone["intervals"]["E"]]
    assert law["intervals"]["E"] == pytest.approx([max(law["params"]["E"] - half[0], 0), law["params"]["E"] + half[1]])
    assert all(law["intervals"][k] == alone["intervals"][k] for k in ("A", "alpha", "B", "beta"))
    # A run without an error takes it from none; one that is no record's, of losses on nobody knows what, is not shared.
    least, worst = fitted["loss"].idxmin(), fitted["loss"].idxmax()
    for gone, left in ((worst, error), (least, fitted.drop(least).sort_values("loss")["loss_standard_error"].iloc[0])):
        some = table.assign(loss_standard_error=table["loss_standard_error"].mask(table.index == gone))
        assert observations.from_table(some).shared_error == left
    assert observations.from_table(table.drop(columns="data")).shared_error is None
    columns = ["num_params", "num_tokens", "flops_exact", "data", "loss", "loss_standard_error"]
    bits = table.loc[~table["holdout"], columns].rename(columns={"loss": "loss_bits", "flops_exact": "flops"})
    bits = bits.assign(**{c: bits[c] / math.log(2) for c in ("loss_bits", "loss_standard_error")})
    assert observations.from_table(bits, units_known=True).shared_error == pytest.approx(error, rel=1e-9)
