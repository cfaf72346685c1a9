"""The page says what the records and fits say, needs no network, and hides no failure."""

import base64
import copy
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from scaling import records
from scaling.fit import analyse, forecast
from scaling.laws.answers import learning_rates, of_runs
from scaling.report import __main__ as report
from scaling.report import page, printed
from scaling.report.figures import of_groups
from scaling.report.page import Results, build, forecast_seal, headlines, warnings, with_sealed_forecast
from scaling.report.words import amount, span
from tests import synthetic


def write_fit(folder, runs, *, sealed=False):
    table = records.table(runs)
    analysis = analyse(table, records.curves(runs), delta=1e-3, bootstrap=50, source=folder.name)
    fit = analysis.to_json()
    records.write_json(folder / "fit.json", fit)
    if sealed:
        held = table[table["holdout"]]
        cells = [
            {"run_id": r.run_id, "num_params": r.num_params, "num_tokens": r.num_tokens, "flops": r.flops_exact}
            for r in held.itertuples()
        ]
        payload = {"schema": 1, "written": "2026-01-02T03:04:05+00:00", "cells": forecast(analysis, cells)}
        records.write_json(folder / "forecast.json", {**payload, "sha256": sha256(payload)})
    return fit


def sha256(payload) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A full sweep: three fitted budgets, a held-out one forecast and sealed, one diverged run. (folder, fit, page)"""
    folder = tmp_path_factory.mktemp("results") / "synthetic"
    runs = synthetic.sweep_records()
    synthetic.write(folder, runs)
    fit = write_fit(folder, runs, sealed=True)
    return folder, fit, build(folder).read_text(encoding="utf-8")


def without_curve(run):
    """A run of which there is nothing to draw: pages about words are made in no time."""
    return dataclasses.replace(run, curve={name: [] for name in run.curve})


class Page(HTMLParser):
    """Resources a page asks for, its text, and every open element closed."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, html):
        super().__init__()
        self.sources, self.links, self.tags, self.words, self.open = [], [], set(), [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.words).replace("\u200a", ""))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.sources += [attrs[k] for k in ("src", "srcset", "data") if k in attrs]
        self.links += [attrs["href"]] if "href" in attrs else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.mark.slow
def test_the_page_is_self_contained(sweep):
    folder, _, html = sweep
    page = Page(html)
    assert len(page.sources) == 11
    assert all(s.startswith("data:image/svg+xml;base64,") for s in page.sources)
    assert not page.links
    assert not page.tags & {"link", "iframe", "object"}
    assert "url(" not in html
    assert "@import" not in html
    for source in page.sources:
        svg = base64.b64decode(source.partition(",")[2]).decode()
        assert not re.search(r'(href|src)="(?!#|data:)', svg), "a figure asks for something outside"
    names = {p.stem for p in (folder / "figures").iterdir()}
    assert {p.name for p in (folder / "figures").iterdir()} == {f"{n}.{e}" for n in names for e in ("svg", "png")}


def test_the_page_opens_with_the_answer(sweep):
    _, fit, html = sweep
    text = Page(html).text
    answer = text[: text.index("Figures")]
    assert f"{fit['isoflop']['a']:.2f}" in answer
    lo, hi = fit["isoflop"]["a_interval"]
    assert f"{lo:.2f}–{hi:.2f}" in answer
    largest = fit["allocation"]["tokens_per_param"]["1.2e+12"]
    assert f"{largest['value']:.3g}" in answer
    assert "24 of 25" in answer
    assert "1 diverged" in answer
    errors = [100 * abs(r["predicted"] / r["actual"] - 1) for r in fit["forecast"]]
    assert f"{sum(errors) / 6:.2g} %" in answer
    assert f"{max(errors):.2g} % at worst" in answer


@pytest.mark.slow
def test_doubts_about_laws_that_answer_nothing_stand_with_those_laws(tmp_path):
    """Before everything stands what is doubtful of the law that answers, and of the runs; nothing is said nowhere."""
    runs = [without_curve(r) for r in synthetic.sweep_records()]
    write_fit(synthetic.write(tmp_path, runs), runs)
    known = json.loads((tmp_path / "fit.json").read_text())
    doubts = ["chinchilla: an end of it", "kaplan_n: a bend of it", "kaplan_n: a run of it", "runs: a doubt of them"]
    records.write_json(tmp_path / "fit.json", known | {"warnings": doubts})
    html = page.write(page.read(tmp_path), tmp_path / "report.html", saved=()).read_text(encoding="utf-8")
    box = html[html.index('<div class="warnings">') :].partition("</ul>")[0]
    assert "chinchilla: an end of it" in box
    assert "runs: a doubt of them" in box
    assert "of it" not in box.replace("chinchilla: an end of it", "")
    own = html[html.index("<h3>kaplan_n</h3>") :].partition("</div>")[0]
    assert "a bend of it" in own
    assert "a run of it" in own


def test_every_run_is_on_the_page_and_failures_are_named(sweep):
    folder, _, html = sweep
    text = Page(html).text
    for run in records.load_records(folder):
        assert run.run_id in text
        if run.status == "diverged":
            assert f"diverged at step {run.diverged_at_step}" in text
        else:
            assert f"{run.loss:.4f} ± {run.loss_standard_error:.4f}" in text
    assert "[3e11, 6e11, 1.2e12]" in text, "the grid's own text"
    assert "0.10.2" in text, "the environment"


def test_the_page_names_no_folder_of_this_machine(sweep):
    folder, _, html = sweep
    assert str(folder.parent) not in html


def test_the_sealed_forecast_is_what_counts(sweep):
    folder, fit, html = sweep
    sealed = json.loads((folder / "forecast.json").read_text())
    assert f"its sha256, {sealed['sha256'][:12]}…, matches" in html
    later = copy.deepcopy(fit)
    for row in later["forecast"]:
        row["predicted"] = row["actual"]  # a fit made with hindsight
    runs = records.load_records(folder)
    rows = with_sealed_forecast(later, sealed, runs)["forecast"]
    assert [r["predicted"] for r in rows] == [c["predicted"] for c in sealed["cells"]]
    assert [r["actual"] for r in rows] == [next(x.loss for x in runs if x.run_id == r["run_id"]) for r in rows]


def test_a_forecast_changed_after_it_was_written_is_called_out(sweep):
    folder, _, _ = sweep
    sealed = json.loads((folder / "forecast.json").read_text())
    sealed["cells"][0]["predicted"] += 1e-9
    assert "does not match" in forecast_seal(sealed)
    assert forecast_seal({}) is None


def test_a_sweep_too_small_for_laws_says_why(tmp_path):
    runs = synthetic.sweep_records(sizes=synthetic.SIZES[:1], budgets=(3e11,), held_out_budget=None)
    runs[1] = dataclasses.replace(synthetic.failed(runs[1]), environment={"failure": "worker killed three times"})
    synthetic.write(tmp_path, [without_curve(run) for run in runs])
    records.write_json(tmp_path / "fit.json", {"schema": 1, "error": "chinchilla has 5 parameters and 1 observations"})
    text = Page(build(tmp_path).read_text(encoding="utf-8")).text
    assert "No laws: chinchilla has 5 parameters and 1 observations" in text
    assert "failed: worker killed three times" in text
    assert "1 of 2" in text


def test_records_alone_make_a_page(tmp_path):
    [run, *_] = synthetic.sweep_records()
    records.save(tmp_path, run)
    text = Page(build(tmp_path, tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8")).text
    assert "there is no fit.json" in text
    assert (tmp_path / "elsewhere" / "figures" / "curves.svg").exists()


def test_cells_without_a_record_and_records_without_a_cell_are_named(tmp_path):
    runs = synthetic.sweep_records(
        sizes=synthetic.SIZES[:1], budgets=(3e11, 6e11), held_out_budget=None, diverged=False
    )
    [stranger, *_] = synthetic.sweep_records(sizes=synthetic.SIZES[1:2])
    records.save(tmp_path, without_curve(runs[0]))
    records.save(tmp_path, without_curve(stranger))
    records.write_json(tmp_path / "sweep.json", synthetic.manifest(runs))
    text = Page(build(tmp_path).read_text(encoding="utf-8")).text
    assert "1 of 2 runs completed" in text
    assert "1 cells are not run yet" in text
    assert runs[1].run_id in text
    assert "1 records in this folder belong to no cell" in text
    assert stranger.run_id not in text


def test_text_from_records_is_text_on_the_page(tmp_path):
    [run, *_] = synthetic.sweep_records()
    labels = {"size": "<script>alert(1)</script>"}
    records.save(
        tmp_path, dataclasses.replace(without_curve(run), sweep={**run.sweep, "name": "<b>", "labels": labels})
    )
    html = build(tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;" in html
    assert Page(html).text.count("alert(1)") == 1, "in the table of runs, as text"


def test_learning_rate_cells_find_the_truth(tmp_path):
    runs = synthetic.learning_rate_records()
    cells = learning_rates.cells(runs)
    assert len(cells) == 6
    for cell in cells:
        assert cell["best"] == cell["rates"][2] == pytest.approx(0.01 * (cell["num_params"] / 5e4) ** (-1 / 3))
        assert cell["interior"]
    assert [c["num_params"] for c in cells] == sorted(c["num_params"] for c in cells)
    synthetic.write(tmp_path, [without_curve(run) for run in runs])
    text = Page(build(tmp_path).read_text(encoding="utf-8")).text
    assert "6 of 6 cells of the learning-rate sweep whose best rate lies inside the range tried" in text
    assert (tmp_path / "figures" / "learning_rate.png").exists()


def test_a_sweep_about_rates_claims_no_exponent(sweep):
    _, fit, _ = sweep
    runs = synthetic.learning_rate_records()
    cells = learning_rates.cells(runs)
    results = Results(sweep[0], runs, of_runs.complete(fit, runs), {}, {})
    [best, completed] = headlines(results, cells)
    assert best["value"] == "6 of 6"
    assert completed["value"] == "30 of 30"
    assert "no law through them is meant" in warnings(results, cells)[0]


def test_a_best_rate_at_the_edge_is_called_so():
    runs = synthetic.learning_rate_records(sizes=synthetic.SIZES[:1], tokens=(5e5,), factors=(1, 2, 4))
    [cell] = learning_rates.cells(runs)
    assert cell["best"] == cell["rates"][0]
    assert not cell["interior"]


def test_a_higher_rate_that_diverged_counts_as_tried_and_seeds_are_averaged():
    runs = synthetic.learning_rate_records(sizes=synthetic.SIZES[:1], tokens=(5e5,), factors=(0.5, 1, 2))
    runs[-1] = dataclasses.replace(runs[-1], status="diverged", loss=None, num_tokens=4096)
    other_seed = {**runs[0].config, "seed": 7}
    runs.append(dataclasses.replace(runs[0], run_id="0" * 12, config=other_seed, loss=runs[0].loss + 0.5))
    [cell] = learning_rates.cells(runs)
    assert cell["losses"] == [pytest.approx(runs[0].loss + 0.25), runs[1].loss, None]
    assert cell["interior"]
    assert cell["num_tokens"] == runs[0].num_tokens


def test_two_rates_are_no_sweep():
    assert learning_rates.cells(synthetic.sweep_records()) == []


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda f: f.rmdir(), "no such folder"),
        (lambda f: None, "no records: run the sweep first"),
        (lambda f: (f / "fit.json").write_text("{"), "fit.json: not readable as JSON"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, prepare, says):
    folder = tmp_path / "results"
    folder.mkdir()
    if "JSON" in says:
        records.save(folder, synthetic.sweep_records()[0])
    prepare(folder)
    assert report.main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert str(folder) in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    "value, unit, text",
    [(None, "s", "–"), (751.2, "s", "751 s"), (3.6e8, "bytes", "360 MB"), (1.2e10, "bytes", "12 GB"),
     (4.2, "$", "$4.2"), (0.0998, "", "10 %"), (0.5, "kWh", "0.5 kWh")],
)  # fmt: skip
def test_amounts_have_their_unit(value, unit, text):
    assert amount(value, unit) == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ([31.9, 1.7e285], "31.9 … unbounded"),
        ([8.4e-294, None], "unbounded … unbounded"),
        ([0.0, 2e12], "0 … 2.000e+12"),
        ([-1.5, 0.5], "-1.5 … 0.5"),
    ],
)
def test_an_end_that_no_data_set_is_called_unbounded(interval, text):
    assert printed._range(interval) == text
    assert span(interval).count("unbounded") == text.count("unbounded")


def test_plan_and_actual_stand_side_by_side(tmp_path):
    runs = synthetic.sweep_records(
        sizes=synthetic.SIZES[:1], budgets=(3e11, 6e11), held_out_budget=None, diverged=False
    )
    manifest = synthetic.manifest(runs)
    manifest |= {
        "plan": {"predicted_seconds": 400.0, "dollars": 2.5, "memory_bytes": 3.6e8},
        "actual": {"wall_seconds": 500.0, "dollars": 3.125, "fraction_not_in_steps": 0.12},
        "hardware": {"title": "NVIDIA H100", "devices": 8, "price_per_device_hour": 3.99, "power_watts": None},
        "warnings": ["few decades, said the plan"],
    }
    records.save(tmp_path, without_curve(runs[0]))
    manifest["cells"] = [{**c, "status": s} for c, s in zip(manifest["cells"], ("completed", "dropped"))]
    records.write_json(tmp_path / "sweep.json", manifest)
    text = Page(build(tmp_path).read_text(encoding="utf-8")).text
    assert "Plan against actual" in text
    for words in ("8 × NVIDIA H100", "$3.99 per device-hour", "400 s", "500 s", "1.25", "$2.5", "360 MB", "12 %"):
        assert words in text
    assert "few decades, said the plan" in text
    assert "1 cells were left out to stay within the budget" in text
    assert "not run yet" not in text


def test_the_share_of_time_spent_waiting_for_data_is_said(tmp_path):
    runs = [without_curve(r) for r in synthetic.sweep_records()[:2]]
    timings = ({"data_seconds": 0.25, "step_seconds": 9.75}, {"data_seconds": 0.15, "step_seconds": 9.85})
    known = [dataclasses.replace(r, timing=r.timing | t) for r, t in zip(runs, timings)]
    synthetic.write(tmp_path / "known", known)
    assert "2 % was spent waiting for data" in Page(build(tmp_path / "known").read_text(encoding="utf-8")).text
    synthetic.write(tmp_path / "unknown", runs)
    assert "waiting for data" not in build(tmp_path / "unknown").read_text(encoding="utf-8")


def test_groups_stand_side_by_side_and_a_pair_told_the_other_way_is_turned_round():
    point = {"flops": 1e12, "extrapolated": False, "value": 2.0, "interval": [1.6, 2.5], "apart_value": 4.0}
    beyond = {**point, "extrapolated": True, "value": 9.0}
    pairs = [
        {"group": "gru", "over": "lstm", "points": [point, beyond]},
        {"group": "lstm", "over": "rnn", "points": [point | {"interval": [1.6, None]}]},
    ]
    law = {
        "allocation": {"law": "chinchilla", "a_local": 0.6, "a_local_interval": [0.5, 0.7], "fitted_flops": [1, 2e12],
                       "tokens_per_param": {"1e12": {"value": 20.0, "interval": [10, 30]}, "9e13": {"value": 5.0}}},
        "laws": {"chinchilla": {"params": {"E": 1.1}, "intervals": {"E": [1.0, 1.2]}}},
    }  # fmt: skip
    rows = of_groups.group_rows({"cell=lstm": law, "cell=gru": {}, "cell=rnn": law}, {"axis": "flops", "pairs": pairs})
    lstm, gru, rnn = rows
    assert (lstm["a"], lstm["ratio"], lstm["E_interval"], lstm["times"]) == (0.6, 20.0, [1.0, 1.2], None)
    assert (gru["a"], gru["times"], gru["times_interval"]) == (None, 2.0, [1.6, 2.5])
    assert rnn["times"] == 0.5
    assert rnn["times_interval"] == [None, 1 / 1.6]
    rejected = {"axis": "flops", "pairs": pairs, "sharing": {"rejected": True}}
    assert of_groups.group_rows({"cell=lstm": law, "cell=gru": {}}, rejected)[1]["times"] == 4.0
