"""How precisely validation losses are known: against σ/√n, the standard error of a mean."""

import dataclasses
import math
from pathlib import Path

import pytest

from scaling import records
from scaling.laws.answers import precision
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
    """.008 nats over 516,912 tokens: (.008 / .002)² = 16 times as many are eight million."""
    [row] = precision.of(records.load_records(REPO / "results" / "chinchilla"))
    assert row["num_tokens"] == 516_912
    assert 0.0076 < row["standard_error"] < 0.0082
    assert 7.4e6 < row["tokens_needed"] < 8.7e6
