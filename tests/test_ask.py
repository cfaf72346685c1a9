"""The page answers as ``scaling.advise`` does, to four digits, at fifty settings drawn at random."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import scaling
from scaling import numbers, records
from scaling.devices import PROFILES
from scaling.laws.answers.advice import carried, questions
from scaling.laws.answers.advice.budget import Budget
from scaling.laws.forms import catalogue
from scaling.laws.payload import finite
from scaling.report import live
from tests import javascript, synthetic
from tests.laws import data

ANSWERS = """(() => {
  const data = Ask.load(given.carried);
  return given.asked.map(([kind, index, ...rest]) => {
    const flops = data.optimum.flops[index];
    if (kind === "budget") return Ask.ofBudget(data, index, true);
    if (kind === "inference") return Ask.ofInference(data, flops, rest[0], true);
    if (kind === "data") return Ask.ofData(data, flops, rest[0], true);
    return Ask.ofDeadline(data, rest[0], rest[1], given.machines[rest[2]], true);
  });
})()"""


@functools.cache
def study(name):
    """An analysis: of a cost with a head's share and several forms; of 6 N D; of powers that join, or stay below a
    ceiling; of tokens that repeat."""
    options = {"bootstrap": 25, "laws": ("chinchilla",)}
    if name == "head":
        return scaling.open(records.table(synthetic.sweep_records())).fit(**options).analysis
    if name in ("joined", "saturating"):
        runs, more = data.isoflop(), {"joined": {"gamma": 0.5}, "saturating": {"L_0": 4.0}}[name]
        loss = catalogue.FORMS[name].predict(
            data.HOFFMANN | more, num_params=runs["num_params"], num_tokens=runs["num_tokens"]
        )
        runs = runs.assign(loss=loss * np.exp(0.002 * np.random.default_rng(0).normal(size=len(loss))))
        return scaling.open(runs).fit(**options | {"laws": (name, "chinchilla")}).analysis
    if name == "plain":
        return scaling.open(data.isoflop(noise=0.003)).fit(**options, combined=False).analysis
    truth = {**data.HOFFMANN, "R_D": 15.0, "R_N": 5.0}
    unique, sizes = np.repeat([3e9, 1e10, 3e10], 12), np.tile(np.repeat([1e8, 3e8, 1e9], 4), 3)
    columns = {"num_params": sizes, "num_tokens": unique * np.tile([1, 3, 9, 27], 9), "unique_tokens": unique}
    loss = catalogue.FORMS["data_constrained"].predict(truth, **columns)
    loss = loss * np.exp(0.002 * np.random.default_rng(0).normal(size=len(loss)))
    options["laws"] = ("chinchilla", "data_constrained")
    return scaling.open(pd.DataFrame({**columns, "loss": loss})).fit(**options, combined=False).analysis


def settings(kinds, ask, num):
    """Settings of the panel's sliders, drawn at random."""
    rng = np.random.default_rng(num)
    budgets = ask["optimum"]["flops"].split()
    often = [kind for kind in kinds if kind != "deadline"]  # which takes Python seconds
    for kind in (*kinds, *rng.choice(often, num - len(kinds))):
        i = int(rng.integers(len(budgets)))
        tokens = float(budgets[i]) ** 0.5
        if kind == "budget":
            yield [kind, i]
        elif kind == "deadline":
            hardware = str(rng.choice(["h100", "a100"]))
            yield [kind, i, float(10 ** rng.uniform(0, 7)), int(rng.integers(1, 2000)), hardware]
        else:
            yield [kind, i, float(tokens * 10 ** rng.uniform(-2, 4))]


def advised(analysis, budget, kind, *rest):
    if kind == "budget":
        return scaling.advise(analysis, flops=budget)
    if kind == "inference":
        return scaling.advise(analysis, flops=budget, inference_tokens=rest[0])
    if kind == "deadline":
        return scaling.advise(analysis, deadline=rest[0], devices=rest[1], hardware=rest[2])
    tokens = questions.of_budget(analysis, Budget.of_flops(budget)).numbers["num_tokens"].value
    return scaling.advise(analysis, num_tokens=tokens, unique_tokens=rest[0])


def close(said, value):
    said = float(said)
    if math.isinf(value):
        return said == value
    return said == pytest.approx(value, rel=1e-4, abs=1e-7)


FREE = ("budget", "budget", "inference", "inference")


@pytest.mark.parametrize("name, kinds, num", [
    ("plain", ("budget", "inference"), 4),
    pytest.param("joined", ("budget", "inference"), 4, marks=pytest.mark.slow),
    pytest.param("saturating", ("budget", "inference"), 4, marks=pytest.mark.slow),
    pytest.param("head", ("deadline", *FREE), 20, marks=pytest.mark.slow),
    pytest.param("plain", ("deadline", *FREE), 15, marks=pytest.mark.slow),
    pytest.param("repeated", ("data", "data", "data", *FREE), 15, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_page_answers_as_advise_does(name, kinds, num):
    analysis = study(name)
    ask = finite(carried.of(analysis))
    asked = list(settings(kinds, ask, num))
    machines = {m["name"]: m for m in live.machines()}
    answers = javascript.value_of(ANSWERS, {"carried": ask, "asked": asked, "machines": machines}, "ask.js")
    intervals = 0
    for setting, answer in zip(asked, answers):
        kind, i, *rest = setting
        expected = advised(analysis, float(ask["optimum"]["flops"].split()[i]), kind, *rest)
        assert answer["decades"] == pytest.approx(expected.decades, abs=1e-4), setting
        for number, said in answer["numbers"].items():
            want = expected.numbers[number]
            assert said["unit"] == want.unit
            assert close(said["value"], want.value), (setting, number, said, want)
            assert (said["interval"] is None) == (want.interval is None), (setting, number, said, want)
            for one, other in zip(said["interval"] or (), want.interval or ()):
                assert close(one, other), (setting, number, said, want)
                intervals += 1
            for form, value in want.by_form.items():
                assert close(said["byForm"][form], value), (setting, number, form)
        if kind != "data":  # which answers more than the panel asks
            assert set(answer["numbers"]) == set(expected.numbers)
    assert intervals >= 10


def test_ends_that_no_data_set_are_unbounded_on_the_page_too():
    ends = [0.0, 1.0, -3.0, 1e39, 9e39, 1e40, 2e40, -2e40, 1e-39, 1e-40, 1e-41, math.pi]
    said = javascript.value_of("given.map(v => Words.write(v, 'FLOPs') === 'unbounded')", ends, "panel.js")
    assert said == [numbers.ended(v) is None for v in ends]


def test_budgets_are_those_a_person_writes():
    assert carried.budgets(3e11, 1e12)[:4].tolist() == [1e11, 1.1e11, 1.2e11, 1.3e11]
    steps = np.diff(np.log10(carried.budgets(1e11, 1e13)))
    assert steps.max() < 0.07
    assert carried.budgets(1e11, 1e13)[-1] == 9.1e16


def test_every_machine_with_a_published_utilisation_is_there():
    known = [name for name, p in PROFILES.items() if p.mfu and p.peak_flops]
    assert [m["name"] for m in live.machines()] == known


def test_a_law_without_an_optimum_carries_nothing():
    table = data.isoflop(noise=0.003)
    alone = scaling.open(table[["num_params", "loss"]].assign(num_tokens=1e9)).fit("kaplan_n", bootstrap=20).analysis
    assert carried.of(alone) == {}
    assert carried.of(SimpleNamespace(observations=alone.observations, surface=None, no_allocation=None)) == {}


def test_without_draws_values_stand_alone():
    analysis = scaling.open(data.isoflop(noise=0.003)).fit("chinchilla", bootstrap=0, combined=False).analysis
    ask = finite(carried.of(analysis))
    assert ask["draws"] is None
    (answer,) = javascript.value_of(ANSWERS, {"carried": ask, "asked": [["budget", 20]], "machines": {}}, "ask.js")
    size = answer["numbers"]["num_params"]
    assert size["interval"] is None
    budget = float(ask["optimum"]["flops"].split()[20])
    assert close(size["value"], scaling.advise(analysis, flops=budget).numbers["num_params"].value)
