"""A design's cells, bought in rounds: what is chosen, kept, priced and trained; whoever chooses is a stub, but where
the law itself does."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from scaling import grid, records, sweep
from scaling.engine.plan.table import step_flops
from scaling.grid import strict
from scaling.laws.answers import rounds
from scaling.laws.answers.design import orders
from scaling.laws.answers.design.of_groups import NotShared
from scaling.laws.forms import catalogue
from scaling.report import page, plots
from scaling.report.figures import drawing, of_forecasts
from scaling.rounds import Rounds
from tests import adaptive, babble

ENGINE = Path(__file__).parent / "engine"
GRID = """
recipe: default@1
base: {batch_size: 8, optim: {warmup_tokens: 8192}}
isoflop:
  sizes: [8, 16, 24, 32]
  budgets: [2e9, 4e9, 8e9, 1.6e10, {flops: 6.4e10, sizes: [24, 32]}]
holdout: {budgets: [6.4e10]}
fit: {bootstrap: 50}
"""
DESIGN = "design: {target: a, interval: .13, budget_flops: 1.5e11, batch: 2}\n"
INLINE = ("--executor", "inline")


# ---- the grid -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Known:
    """What a chooser proposes."""

    interval: tuple[float, float]
    width: float
    steps: tuple["Step", ...] = ()
    width_after: float = math.inf
    reasons: tuple[str, ...] = ()
    shared_width: float = 0.0


@pytest.mark.parametrize(
    ("design", "says"),
    [
        ("{}", "design: {} never ends; write interval: .08, budget_flops: 1e13, or both"),
        ("{interval: 0}", "design.interval: 0.0: write a positive number"),
        ("{interval: .1, batch: 0}", "design.batch: 0: write a whole number ≥ 1"),
        ("{interval: .1, exponent: 2}", "design.exponent: 2.0: write a number from 0"),
        ("{intervall: 1}", "design.intervall: unknown key; did you mean 'interval'?"),
        (
            "{interval: .1, seed_cells: [{budget_flops: 6.4e10}]}",
            "design.seed_cells[0]: {'budget_flops': 6.4e+10} names",
        ),
        ("{interval: .1, seed_cells: [{width: 9}]}", "design.seed_cells[0]: {'width': 9} matches no cell"),
        ("3", "design: 3 is not a mapping"),
    ],
)
def test_a_bad_design_is_one_line(design, says):
    with pytest.raises(grid.GridError) as caught:
        grid.expand(strict.read_yaml(f"{GRID}design: {design}"), name="g")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_laws_apart_go_with_no_design():
    with pytest.raises(grid.GridError, match=r"design: one law is what rounds narrow; write it without fit\.by"):
        grid.expand(strict.read_yaml(GRID.replace("bootstrap: 50", "by: width") + DESIGN), name="g")


TWO = GRID.replace(
    "fit: {bootstrap: 50}",
    "fit: {bootstrap: 50, compare: model.positions}\naxes: {model.positions: [rotary, relative]}",
)
MULTIPLIER = "design: {target: multiplier@1e10, compare: [relative, rotary], interval: .13, batch: 2}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GRID + MULTIPLIER, "design.compare: the grid compares no groups; write fit: {compare: …}"),
        (TWO.replace("compare: model", "by: model") + MULTIPLIER, "design.compare: the grid compares no groups"),
        (
            TWO + MULTIPLIER.replace("relative", "muon"),
            "design.compare: ['muon', 'rotary']: write two of rotary, relative",
        ),
        (
            TWO + MULTIPLIER.replace("relative", "rotary"),
            "design.compare: ['rotary', 'rotary']: write two of rotary, relative",
        ),
        (TWO + MULTIPLIER.replace("[relative, rotary]", "relative"), "design.compare: 'relative' is not a list"),
    ],
)
def test_groups_of_a_design_are_two_that_the_grid_compares(text, says):
    with pytest.raises(grid.GridError) as caught:
        grid.expand(strict.read_yaml(text), name="g")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- what follows after a fit ---------------------------------------------------------------------------------------


def test_the_cheapest_cells_that_identify_a_law_come_first():
    sizes, budgets = np.meshgrid([1e4, 2e4, 4e4, 8e4], [1e10, 2e10, 4e10], indexing="ij")
    n, c = sizes.ravel(), budgets.ravel()
    columns = {"num_params": n, "num_tokens": c / 6 / n, "flops": c}
    chosen = rounds.begin(columns, c, catalogue.FORMS["chinchilla"])
    assert sorted(c[chosen]) == [1e10] * 4 + [2e10] * 4  # five parameters and three more; one budget would be a line
    one = c == 1e10
    with pytest.raises(ValueError, match=r"4 candidates: write design\.seed_cells, or more cells"):
        rounds.begin({k: x[one] for k, x in columns.items()}, c[one], catalogue.FORMS["chinchilla"])
    ray = {"num_params": n, "num_tokens": 20 * n, "flops": 120 * n**2}
    with pytest.raises(ValueError, match="12 observations of 4 different num_params and num_tokens: 6 or more"):
        rounds.begin(ray, ray["flops"], catalogue.FORMS["chinchilla"])
    n = np.geomspace(1e4, 1e5, 12)
    ray = {"num_params": n, "num_tokens": 20 * n, "flops": 120 * n**2}
    with pytest.raises(ValueError, match="move together"):
        rounds.begin(ray, ray["flops"], catalogue.FORMS["chinchilla"])
    # Seeds of a cell are no cells: nine runs at five places leave six parameters to the noise.
    twice = {k: np.repeat(x, 2) for k, x in columns.items()}
    form = catalogue.FORMS["saturating"]
    begun = rounds.begin(twice, twice["flops"], form)
    assert len({(twice["num_params"][i], twice["num_tokens"][i]) for i in begun}) >= len(form.parameters) + 1


@dataclasses.dataclass(frozen=True)
class Step:
    candidate: int
    cost: float
    gain: float = 0.25


def says(width, *steps):
    """Who proposes these steps, whatever is asked, at an interval of this width."""
    return lambda **asked: Known((0.5 - width / 2, 0.5 + width / 2), width, steps, 0.9 * width, ("so",))


def test_rounds_end_by_width_by_budget_and_by_want_of_candidates():
    by_width = rounds.decide(says(0.08, Step(0, 1.0)), rounds.Goal(interval=0.08), 5.0, 3)
    assert by_width.stop == "the interval is 0.08 wide, and 0.08 was asked"
    assert by_width.chosen == ()
    on = rounds.decide(says(0.0801, Step(2, 1.0), Step(0, 2.0)), rounds.Goal(interval=0.08), 5.0, 3)
    assert (on.chosen, on.cost, on.stop) == ((2, 0), 3.0, None)
    assert on.width_expected == pytest.approx(0.9 * 0.0801)
    assert rounds.decide(says(0.1), rounds.Goal(budget=6.0), 5.0, 3).stop.startswith("none of 3 candidates is worth")
    assert rounds.decide(says(0.1), rounds.Goal(interval=0.05), 5.0, 0).stop == "every candidate is bought"
    few = rounds.decide(says(0.08, Step(0, 1.0)), rounds.Goal(interval=0.08), 5.0, 3, 8)
    assert few.stop is None  # 5.07 is the lower quartile of χ² with 8 degrees of freedom (tables): 1.256 times as wide
    assert rounds.caution(8) == pytest.approx((8 / 5.071) ** 0.5, rel=1e-4)
    assert rounds.decide(says(0.0636, Step(0, 1.0)), rounds.Goal(interval=0.08), 5.0, 3, 8).stop is not None
    share = dataclasses.replace(says(0.1, Step(0, 1.0))(), shared_width=0.09)
    assert rounds.decide(lambda **asked: share, rounds.Goal(interval=0.08), 5.0, 3).stop.startswith(
        "the validation text's"
    )
    assert rounds.decide(lambda **asked: share, rounds.Goal(interval=0.095), 5.0, 3).stop is None
    # The noise may be 1.256 times its estimate (8 degrees of freedom): what all losses share has no part of that.
    share = dataclasses.replace(says(0.1, Step(0, 1.0))(), shared_width=0.0995)
    wide = math.hypot(rounds.caution(8) * math.sqrt(0.1**2 - 0.0995**2), 0.0995)
    for goal, over in ((wide * 1.0001, True), (wide * 0.9999, False)):
        assert (rounds.decide(lambda **asked: share, rounds.Goal(interval=goal), 5.0, 3, 8).stop is not None) == over
    asked = {}
    rounds.decide(lambda **told: asked.update(told) or says(0.1)(), rounds.Goal(budget=6.0, batch=3), 4.5, 3)
    assert asked == {"batch": 3, "exponent": 0.4, "budget": 1.5, "level": 0.9}


def test_where_there_is_no_law_the_cheapest_are_bought():
    prices = [5.0, 1.0, 3.0]
    found = rounds.cheapest(lambda some: sum(prices[i] for i in some), rounds.Goal(budget=10.0), 5.5, 3, "two diverged")
    assert (found.chosen, found.cost, found.reasons) == ((1, 2), 4.0, ("the cheapest: two diverged",))
    none = rounds.cheapest(lambda some: 9.0, rounds.Goal(budget=10.0), 5.5, 3, "two diverged")
    assert none.stop == "no interval, and no candidate within what is left: two diverged"
    assert rounds.cheapest(lambda some: 9.0, rounds.Goal(interval=1.0), 5.5, 0, "two diverged").stop.startswith(
        "no interval, and every candidate is bought"
    )


# ---- in a sweep -----------------------------------------------------------------------------------------------------


# Stands for an analysis of so many runs that their noise is known.
SURE = types.SimpleNamespace(surface="law", fits={"law": types.SimpleNamespace(degrees_of_freedom=10**9)})


def dearest(found, columns, cost, target):
    """Chooses the dearest of the candidates within the budget; the interval is as wide as they are many."""
    n = len(columns["flops"])

    def choose(*, batch, budget, **others):
        chosen = []
        for i in np.argsort(-columns["flops"], kind="stable"):
            if len(chosen) < batch and (budget is None or cost([*chosen, i]) <= budget):
                chosen.append(int(i))
        steps = tuple(Step(i, cost(chosen[: k + 1]) - (cost(chosen[:k]) if k else 0)) for k, i in enumerate(chosen))
        return Known((0.5 - 0.02 * n, 0.5 + 0.02 * n), 0.04 * n, steps, 0.04 * (n - len(steps)), ("dear",))

    return choose


def compared(spread, columns, cost, bought, first, width, shared, member):
    """Stands for ``orders.compare``: tells what it was asked."""
    return {"num_cells": len(columns["flops"]), "bought": len(bought), "first": first, "width": width, "shared": shared,
            "member": member,
            "flops": cost(bought), "flops_of_all": cost(range(len(columns["flops"])))}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a grid of a design, in which the sweep trains hashes and the dearest cells are bought."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ENGINE), str(ENGINE.parents[1])]))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0")
    monkeypatch.syspath_prepend(str(ENGINE))
    import driver

    driver.install(monkeypatch.setitem, lambda *args: monkeypatch.setattr(*args, raising=False))
    monkeypatch.setattr(rounds, "by_proposal", dearest)
    monkeypatch.setattr("scaling.conclusion.Laws.analysis", lambda self: SURE)
    monkeypatch.setattr(orders, "compare", compared)
    monkeypatch.setattr(orders, "spread_of_target", lambda *args: None)
    Path("g.yaml").write_text(GRID + DESIGN)
    return tmp_path


def run(*argv, name="g"):
    folders = ("--results", f"results/{name}", "--workdir", f".scaling/{name}")
    return sweep.main(["--grid", "g.yaml", *INLINE, *folders, *argv], loop="fake_loop")


def manifest(name="g"):
    return json.loads(Path(f"results/{name}/sweep.json").read_text())


def science(name="g"):
    return [dataclasses.replace(r, environment={}, timing={}) for r in records.load_records(f"results/{name}")]


def test_a_study_of_rounds(here, capsys):
    assert run() == 0
    out = capsys.readouterr().out
    found, cells = manifest(), grid.load("g.yaml").cells
    design = found["design"]
    by_flops = sorted((c for c in cells if not c.holdout), key=lambda c: -c.labels["budget_flops"])
    assert [len(one["cells"]) for one in design["rounds"]] == [8, 2, 2, 2]
    assert {*design["rounds"][1]["cells"], *design["rounds"][2]["cells"]} == {c.run.run_id for c in by_flops[:4]}
    assert [one["width"] for one in design["rounds"]] == [None, 0.32, 0.24, 0.16]
    assert [one["width_expected"] for one in design["rounds"]] == [None, 0.24, 0.16, 0.08]
    assert design["stopped"]["reason"] == "the interval is 0.08 wide, and 0.13 was asked"
    spent = [one["spent_flops"] for one in design["rounds"]] + [design["stopped"]["spent_flops"]]
    assert np.allclose(np.diff(spent), [one["cost_flops"] for one in design["rounds"]], rtol=1e-12)
    assert "of the variance for" in design["rounds"][1]["reasons"][0]
    told, spent = design["stopped"]["orders"], design["stopped"]["spent_flops"]
    assert (told["num_cells"], told["bought"], told["first"], told["width"]) == (16, 14, 8, pytest.approx(0.08))
    assert told["flops_of_all"] > told["flops"]
    assert told["flops"] <= spent  # as if all were trained at once: nothing is left of these trunks between rounds
    status = {c["run_id"]: c["status"] for c in found["cells"]}
    bought = {run_id for one in design["rounds"] for run_id in one["cells"]}
    held_out = {c.run.run_id for c in cells if c.holdout}
    assert {run_id for run_id, said in status.items() if said == "completed"} == bought | held_out
    assert sorted(status.values()).count("candidate") == 2
    assert len(status) == len(cells)
    forecast = json.loads(Path("results/g/forecast.json").read_text())
    assert set(forecast["fitted_run_ids"]) == bought
    order = [line.split()[0] for line in Path(".scaling/g/log.txt").read_text().splitlines()]
    assert set(order[-2:]) == held_out
    assert found["plan"]["flops"]["asked"] == pytest.approx(
        sum(c["flops"]["exact"] for c in found["cells"] if c["status"] == "completed")
    )
    told = json.loads(Path("results/g/fit.json").read_text())["design"]
    assert [one["width_after"] for one in told["rounds"]] == [0.32, 0.24, 0.16, 0.08]
    assert "design: round 2: 2 cells for" in out
    assert "few decades" not in out.partition("round 1")[2]  # what is doubtful about the grid is said once
    before = {p: p.read_bytes() for p in Path("results/g").rglob("*") if p.is_file()}
    assert run() == 0
    assert {p: p.read_bytes() for p in Path("results/g").rglob("*") if p.is_file()} == before
    capsys.readouterr()
    assert run("--status") == 0
    assert "design: over after 3 rounds" in capsys.readouterr().out


def test_a_study_of_what_one_group_is_worth_over_another(here, monkeypatch):
    """Each group begins with cells of its own; candidates of both are told by the coordinate that the grid compares."""
    seen = []

    def of_groups(found, columns, cost, target, groups, member):
        seen.append((str(target), groups, member))
        return dearest(found, columns, cost, target)

    both = types.SimpleNamespace(joint=types.SimpleNamespace(degrees_of_freedom=10**9))
    monkeypatch.setattr(rounds, "by_proposal_of_groups", of_groups)
    monkeypatch.setattr("scaling.conclusion.Comparison.analysis", lambda self: both)
    monkeypatch.setattr("scaling.rounds._Laws.spread", lambda *args: (None, 0.0))
    Path("g.yaml").write_text(TWO + MULTIPLIER)
    assert run() == 0
    cells = {c.run.run_id: c.run.model.positions for c in grid.load("g.yaml").cells}
    design = manifest()["design"]
    first = [cells[run_id] for run_id in design["rounds"][0]["cells"]]
    assert (first.count("rotary"), first.count("relative")) == (8, 8)
    assert design["compare"] == ["relative", "rotary"]
    assert seen[0] == ("multiplier@1e+10", ("relative", "rotary"), ["rotary", "relative"] * 8)
    assert [len(member) for *_, member in seen] == [16, 14, 12, 10, 8, 6, 4, 2]
    assert design["stopped"]["reason"] == "the interval is 0.08 wide, and 0.13 was asked"
    told = json.loads(Path("results/g/fit.json").read_text())
    assert told["design"]["compare"] == ["relative", "rotary"]
    assert told["multiplier"]["column"] == "model.positions"
    assert "design" not in json.loads(Path("results/g/model.positions=relative/fit.json").read_text())
    before = manifest()
    assert run() == 0
    assert manifest()["design"] == before["design"]
    assert len(seen) == 8


class KilledError(BaseException):
    """What stands for a kill in this process."""


def kill_when(monkeypatch, moment):
    """Ends the next call at a moment: ``chosen``, a round's choice written and nothing of it trained; ``training`` its
    first cell; ``deciding``, before the second round's choice is known."""
    if moment == "chosen":
        monkeypatch.setattr(Rounds, "tidy", lambda self: raise_it() if len(self._rounds) > 2 else None)
    if moment == "training":
        import fake_loop

        whole = fake_loop.record

        def record(cell, *args):
            if len(records.load_records("results/k")) == 11:
                raise_it()
            return whole(cell, *args)

        monkeypatch.setattr(fake_loop, "record", record)
    if moment == "deciding":
        monkeypatch.setattr(rounds, "by_proposal", lambda found, columns, *args: (
            raise_it() if len(columns["flops"]) == 6 else dearest(found, columns, *args)))  # fmt: skip


def raise_it():
    raise KilledError


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["chosen", "training", "deciding"])
def test_a_study_that_is_killed_goes_on_with_the_same_choices(here, monkeypatch, moment):
    assert run(name="g") == 0
    with monkeypatch.context() as patched:
        kill_when(patched, moment)
        with pytest.raises(KilledError):
            run(name="k")
    after = manifest("k")["design"]
    assert len(after["rounds"]) == (2 if moment == "deciding" else 3)
    assert after["rounds"] == manifest("g")["design"]["rounds"][: len(after["rounds"])]
    asked = []
    monkeypatch.setattr(rounds, "by_proposal", lambda *args: asked.append(len(args[1]["flops"])) or dearest(*args))
    assert run(name="k") == 0
    assert manifest("k")["design"] == manifest("g")["design"]
    assert science("k") == science("g")
    assert asked == ([6, 4, 2] if moment == "deciding" else [4, 2])  # what was chosen is never chosen again


def test_a_plan_says_what_comes_first_and_the_ceiling(here, capsys):
    assert run("--plan") == 0
    out = capsys.readouterr().out
    assert "design: 8 cells to begin with, 1.77e+10 FLOPs; then up to 2 of 8 candidates a round" in out
    assert "FLOPs; all candidates would take" in out
    assert "10 cells, 10 to do" in out
    assert not Path("results").exists()


@pytest.mark.parametrize("argv", [("--only", "abc"), ("--shard", "1/2"), ("--drop", "--budget-hours", "1")])
def test_rounds_choose_among_all_cells(here, capsys, argv):
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert f"{argv[0]}: the rounds of g.yaml choose among all cells" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("design", "says"),
    [
        ("{target: slope, interval: .1}", "g.yaml: design.target: slope: write one of a"),
        ("{target: multiplier@1e10, interval: .1}", "is of two groups; write design.compare"),
        (
            "{interval: .1, budget_flops: 1e9}",
            "g.yaml: design.budget_flops: 1e+09: the 8 cells to begin with take 1.77e+10",
        ),
    ],
)
def test_a_design_that_cannot_be_is_said_before_anything_trains(here, capsys, design, says):
    Path("g.yaml").write_text(f"{GRID}design: {design}\n")
    assert run() == 2
    assert says in capsys.readouterr().err
    assert not Path(".scaling/g/log.txt").exists()


@pytest.mark.slow
def test_a_cell_that_failed_keeps_the_next_round_waiting(here, capsys, monkeypatch):
    import fake_loop

    whole = fake_loop.record
    bad = grid.load("g.yaml").cells[0].run.run_id
    monkeypatch.setattr(
        fake_loop, "record", lambda cell, *args: whole(cell, *args) if cell.run.run_id != bad else 1 / 0
    )
    assert run() == 3
    assert len(manifest()["design"]["rounds"]) == 1
    assert "held-out cells wait" in capsys.readouterr().out
    monkeypatch.setattr(fake_loop, "record", whole)
    assert run() == 0
    assert len(manifest()["design"]["rounds"]) == 4


@pytest.mark.slow
def test_a_later_wish_takes_the_rounds_up_again(here):
    assert run() == 0
    first = manifest()["design"]
    Path("g.yaml").write_text(GRID + DESIGN.replace(".13", ".01"))
    assert run() == 0
    again = manifest()["design"]
    assert again["rounds"][:4] == first["rounds"]
    assert len(again["rounds"]) == 5
    assert again["stopped"]["reason"] == "the interval is 0 wide, and 0.01 was asked"


@pytest.mark.slow
def test_cells_that_were_there_before_the_design_are_of_the_first_round(here):
    Path("g.yaml").write_text(GRID)
    assert run() == 0
    Path("g.yaml").write_text(GRID + DESIGN)
    assert run() == 0
    (only,) = manifest()["design"]["rounds"]
    assert len(only["cells"]) == 16
    assert only["cost_flops"] == 0
    assert only["reasons"][-1] == "8 more had a record already"


@pytest.mark.slow
def test_workers_killed_for_good_go_on_with_the_same_choices(here):
    """Worker processes, and SIGKILL to whoever decides, once for each round."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ENGINE)!r}); sys.path.insert(0, {str(ENGINE.parents[1])!r})
import driver; driver.install()
from scaling import conclusion, sweep
from scaling.laws.answers import rounds
from scaling.laws.answers.design import orders
from scaling.rounds import Rounds
from tests import adaptive, babble
from tests import test_rounds
rounds.by_proposal, orders.compare = test_rounds.dearest, test_rounds.compared
orders.spread_of_target = lambda *args: None
conclusion.Laws.analysis = lambda self: test_rounds.SURE
at = int(sys.argv.pop(1))
if at:
    Rounds.tidy = lambda self: os.kill(os.getpid(), signal.SIGKILL) if len(self._rounds) == at else None
sys.exit(sweep.main(loop="fake_loop"))
"""
    argv = ["--grid", "g.yaml", "--workers", "1", "--results", "results/k", "--workdir", ".scaling/k"]
    for at, code in ((2, -9), (3, -9), (0, 0)):
        done = subprocess.run(
            [sys.executable, "-c", script, str(at), *argv], check=False, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
    assert run() == 0
    assert manifest("k")["design"] == manifest()["design"]
    assert science("k") == science()


# ---- trunks ---------------------------------------------------------------------------------------------------------

HORIZONS = """
recipe: none
base:
  model: {width: 8}
  data: {source: "text:docs", seq_len: 32}
  batch_size: 8
  optim: {peak_lr: 1.0e-3, warmup_tokens: 256, beta2: .95, weight_decay: .1}
  eval: {num_points: 2, curve_tokens: 512}
axes: {horizon.steps: [20, 40, 60, 80]}
"""


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A folder with four horizons of one size, which really train; laws and report are stood for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCALING_CACHE", raising=False)
    babble.write("docs")
    monkeypatch.setattr(page, "build", lambda results: Path(results) / "report.html")
    wanted = [[60, 20], [80]]

    def by_horizon(found, columns, cost, target):
        steps = [round(tokens / 256) for tokens in columns["num_tokens"]]
        mine = [steps.index(s) for s in (wanted.pop(0) if wanted else [])]
        return lambda **asked: Known((0.0, 1.0), 1.0, tuple(Step(i, cost([i])) for i in mine), 1.0)

    monkeypatch.setattr(rounds, "by_proposal", by_horizon)
    monkeypatch.setattr("scaling.conclusion.Laws.analysis", lambda self: SURE)
    monkeypatch.setattr(orders, "compare", compared)
    monkeypatch.setattr(orders, "spread_of_target", lambda *args: None)
    return tmp_path


@pytest.mark.slow
def test_a_later_round_pays_extension_and_cooldown_alone(real):
    """Flat until .8 of it: 40 steps carry 20 to step 16 and 60, 80 to 32; 60 carries 80 on to 48."""
    Path("g.yaml").write_text(HORIZONS + "design: {interval: .01, batch: 2, seed_cells: [{steps: 40}]}\n")
    assert sweep.main(["--grid", "g.yaml", *INLINE]) == 0
    Path("plain.yaml").write_text(HORIZONS)
    assert sweep.main(["--grid", "plain.yaml", *INLINE]) == 0
    by_steps = {r.num_steps: r for r in records.load_records("results/g")}
    own = {20: 4, 40: 40, 60: 28, 80: 32}
    assert {s: s - r.timing["branch_step"] for s, r in by_steps.items()} == own
    a_step = step_flops(grid.load("plain.yaml").cells[0].run)
    cost = [one["cost_flops"] / a_step for one in manifest()["design"]["rounds"]]
    assert cost[0] == pytest.approx(40)
    assert cost[2] == pytest.approx(32)
    plain = {r.num_steps: r for r in records.load_records("results/plain")}
    assert {s: r.loss for s, r in by_steps.items()} == {s: r.loss for s, r in plain.items()}
    assert not list(Path(".scaling/g/checkpoints").glob("*/*"))


def test_without_room_on_the_disk_no_candidate_is_carried(here):
    flat = GRID + DESIGN
    for text, carried in ((flat, True), (flat + "execution: {disk_budget_gb: .004}\n", False)):
        Path("g.yaml").write_text(text)
        found = sweep.Sweep(sweep.parse(["--grid", "g.yaml", *INLINE]), sweep.terminal.console(sys.stdout), "fake_loop")
        fitted = [row for row in found.cells.rows if not row.cell.holdout]
        kept = found.rounds.carried(fitted, [], 1)
        assert bool(kept) == carried
        assert all(row.cell.holdout for row in kept)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_figure_shows_every_width_against_what_was_spent(tmp_path):
    entry = {"cells": ["a"], "width": None, "width_expected": None, "reasons": [], "spent_flops": 0.0}
    first = {**entry, "width_after": 0.4, "cost_flops": 1e12}
    second = {
        **entry,
        "width": 0.4,
        "width_expected": 0.2,
        "width_after": 0.25,
        "cost_flops": 3e12,
        "spent_flops": 1e12,
    }
    fit = {"design": {"target": "a", "level": 0.9, "interval": 0.3, "rounds": [first, second]}}
    with plots.style():
        drawn = of_forecasts.rounds(drawing.Seen(None, fit))
        found, expected = drawn.figure.axes[0].lines[1], drawn.figure.axes[0].lines[0]
        assert list(zip(*found.get_data())) == [(1e12, 0.4), (4e12, 0.25)]
        assert list(zip(*expected.get_data())) == [(4e12, 0.2)]
        assert of_forecasts.rounds(drawing.Seen(None, {})) is None
        # Other orders, of which the first runs may set no limit, and a width asked that none of them reaches.
        course = {"flops": [1e12, 2e12, 4e12], "width": [None, 0.3, 0.25]}
        random = {**course, "narrow": [None, 0.26, 0.24], "wide": [None, None, 0.25], "orders": 40}
        reached = dict.fromkeys(("designed", "by_budget", "random", "random_low", "random_high"), 4e12)
        fit["design"] |= {
            "interval": 0.02,
            "orders": {"designed": course, "by_budget": course, "random": random, "reached_flops": reached},
        }
        drawn = of_forecasts.rounds(drawing.Seen(None, fit))
        (ax,) = drawn.figure.axes
        assert [line.get_label() for line in ax.lines][:3] == ["at random (80 %: shaded)", "by budget", "as bought"]
        low, high = ax.get_ylim()
        assert low < 0.02 < 0.4 < high < 1
        assert "the order as bought takes 4e12 FLOPs, budget by budget takes 4e12" in drawn.caption


# ---- whether intervals stay honest ----------------------------------------------------------------------------------


def test_a_simulated_study_ends_as_it_was_asked_to():
    truth, design = adaptive.WORLDS["the default study"]
    found = adaptive.simulate(
        design, catalogue.FORMS["chinchilla"], truth, adaptive.Target.of("a"), rounds.Goal(interval=0.1),
        noise=0.005, combined=False,
    )  # fmt: skip
    assert found.widths[-1] <= 0.1 < found.widths[-2]
    assert found.interval[1] - found.interval[0] == pytest.approx(found.widths[-1])


def test_groups_that_clearly_share_no_exponents_end_the_rounds(here, monkeypatch):
    """By chance they seem not to, and the cheapest are bought; where no run would change it nothing more is."""
    Path("g.yaml").write_text(TWO + MULTIPLIER)
    for clear, stop in ((True, "no shared exponents"), (False, None)):
        refusal = NotShared("no shared exponents", is_for_good=clear)
        monkeypatch.setattr("scaling.rounds._Laws.chooser", raises(refusal))
        found = sweep.Sweep(sweep.parse(["--grid", "g.yaml", *INLINE]), sweep.terminal.console(sys.stdout), "fake_loop")
        said = found.rounds._decision()
        assert said.stop == stop
        assert bool(said.chosen) != clear


def raises(error):
    def refuse(*args):
        raise error

    return refuse


@pytest.mark.parametrize("laws", ["[product]", "[farseer]", "[kaplan_n, chinchilla]"])
def test_groups_are_designed_by_a_law_that_compares_them(here, capsys, laws):
    Path("g.yaml").write_text(TWO.replace("bootstrap: 50", f"bootstrap: 50, laws: {laws}") + MULTIPLIER)
    assert run() == 2
    err = capsys.readouterr().err
    assert "fit.laws: groups are compared by the first" in err
    assert err.count("\n") == 1


def test_a_simulated_study_of_two_groups_ends_as_it_was_asked_to():
    """At the planted multiplier, give or take; of both groups more than the first cells are bought."""
    truth, design = adaptive.WORLDS["the default study"]
    target = adaptive.Target.of("multiplier@1e12")
    found = adaptive.simulate_groups(design, truth, 1.5, target, rounds.Goal(interval=0.08), noise=0.005)
    assert found.widths[-1] <= 0.08 < found.widths[0]
    assert target.width(found.interval) == pytest.approx(found.widths[-1])
    assert np.log(found.interval).mean() == pytest.approx(np.log(1.5), abs=0.08)
    assert found.num_cells > 2 * len(
        rounds.begin(design.columns, design.columns["flops"], catalogue.FORMS["chinchilla"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("goal", [rounds.Goal(interval=0.06), rounds.Goal(budget=3e13)], ids=["width", "budget"])
def test_intervals_hold_the_truth_although_the_data_chose_the_design(goal):
    """60 studies of those 500 that were counted: .9 within three standard errors of a share of 60."""
    found = adaptive.coverage("the default study", goal, num_studies=60, combined=False)
    assert found["coverage"] >= 0.9 - 3 * (0.9 * 0.1 / 60) ** 0.5


def test_cells_that_no_law_of_both_can_be_fitted_to_are_followed_by_the_cheapest(here, monkeypatch):
    """One-column laws may have been fitted all the same: the analysis is there, and has no surface."""
    without = types.SimpleNamespace(surface=None, fits={})
    monkeypatch.setattr("scaling.conclusion.Laws.analysis", lambda self: without)
    Path("g.yaml").write_text(GRID + DESIGN)
    found = sweep.Sweep(sweep.parse(["--grid", "g.yaml", *INLINE]), sweep.terminal.console(sys.stdout), "fake_loop")
    said = found.rounds._decision()
    assert said.chosen
    assert "no law of N and D can be fitted" in said.reasons[0]
