"""The bench: its shapes and its sums, on timings that are given."""

import json
import time
from typing import ClassVar

import pytest

from scaling import accounting, families, grid
from scaling.bench import __main__ as bench
from scaling.bench import steps
from scaling.bench.families import FAMILIES, compare
from scaling.engine.plan import table, timings
from scaling.execution import ExecutionConfig
from scaling.families.recurrent import RecurrentConfig
from scaling.training.models import recurrent


class FakeExecutor:
    """Answers every task at half a second a step for the first worker, a quarter for the second."""

    def __init__(self, workers, log_dir):
        pass

    asked: ClassVar[list] = []

    def run(self, tasks):
        from scaling.engine.run.tasks import Answer

        self.asked += [task.payload for task in tasks]

        def answer(i):
            return Answer(
                {
                    "compile_seconds": 1.0 + i,
                    "first_step_seconds": 3.0 + i,
                    "step_seconds": 0.5 / (i + 1),
                    "curve_eval_seconds": 1.0,
                    "eval_seconds": 2.0,
                }
            )

        return {task.key: answer(i) for i, task in enumerate(tasks)}

    def close(self):
        pass


@pytest.fixture
def two_workers(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "Local", FakeExecutor)
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path))


def test_default_shapes_are_the_published_ones():
    counts = [accounting.param_counts(run.model) for run in FAMILIES["transformer"].runs]
    assert [c["attention"] + c["mlp"] for c in counts] == [49_152, 294_912, 983_040]


def test_throughput_is_the_sum_over_workers(two_workers, tmp_path):
    (row,) = steps.measure(
        FAMILIES["transformer"].runs[:1], ExecutionConfig(), workers=2, cache_dir=tmp_path, seconds=0.1
    )
    assert row["tokens_per_s"] == 16 * 256 * (2 + 4)
    per_token = accounting.flops_per_token(FAMILIES["transformer"].runs[0].model, 256)["exact"]
    assert row["flops_per_s"] == pytest.approx(row["tokens_per_s"] * per_token)
    assert row["compile_seconds"] == 2.0


def test_a_grids_timings_are_what_its_plan_predicts_from(two_workers, tmp_path):
    grid_file = tmp_path / "tiny.yaml"
    grid_file.write_text(
        "recipe: default@1\nisoflop: {rule: exact, budgets: [1e10], sizes: [8, 16]}\nexecution: {remat: full}\n"
    )
    assert bench.main(["--grid", str(grid_file), "--seconds", "0.1"]) == 0
    cells = grid.load(grid_file).cells
    execution = grid.load(grid_file).execution
    rows = timings.predict(table.rows(cells), timings.TimingCache(tmp_path, "auto", execution).load())
    mean_step = (0.5 + 0.25) / 2
    for row in rows:
        assert row.seconds == pytest.approx(
            timings.START_SECONDS + row.plan.num_steps * mean_step + 20 * 1.0 + 2.0
        )  # fmt: skip
    assert timings.TimingCache(tmp_path, "auto", ExecutionConfig()).load() == {}  # another execution, other times


def test_the_command_writes_its_rows(two_workers, tmp_path, capsys):
    assert bench.main(["--workers", "2", "--out", str(tmp_path / "bench.json")]) == 0
    assert [row["num_layers"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == [4, 6, 5]
    assert "tokens/s" in capsys.readouterr().out


def test_the_gain_of_a_pack_is_over_lone_runs_in_one_process(two_workers, tmp_path, capsys):
    """As fast a step whatever is in it: four members do four times as much, the second worker twice the first's."""
    assert bench.main(["--packs", "4", "--workers", "2", "--out", str(tmp_path / "packs.json")]) == 0
    rows = json.loads((tmp_path / "packs.json").read_text())["rows"]
    gains = {(row["workers"], row["num_members"]): row["gain"] for row in rows if row["num_layers"] == 5}
    assert gains == {(1, 1): 1, (1, 4): 4, (2, 1): 3, (2, 4): 12}
    printed = capsys.readouterr().out
    assert "12.00×" in printed
    told = [line for line in printed.splitlines() if "runs a pack: 4, processes: 2" in line]
    assert len(told) == 3
    assert told[0].startswith("32×4,")  # as it goes, shape by shape
    assert printed.index(told[0]) < printed.index("64×6, runs a pack: 1")

    cache = timings.TimingCache(tmp_path, 2, ExecutionConfig())  # what a plan expects of a pack
    assert cache.pack_gain("transformer", 1_000, 3, 2) == 4
    assert cache.pack_gain("transformer", 1_000, 3, 5) is None
    assert cache.pack_gain("recurrent", 1_000, 3, 2) is None
    rows = [(1e4, 1, 10.0), (1e4, 2, 11.0), (1e4, 8, 15.0), (1e6, 1, 2.0), (1e6, 2, 5.0)]
    same = {"workers": 1, "family": "recurrent"}
    cache.save_packs([dict(zip(("num_params", "num_members", "tokens_per_s"), row)) | same for row in rows])
    asked = ((2e4, 2), (2e4, 6), (3e5, 8))
    assert [cache.pack_gain("recurrent", *one, 1) for one in asked] == [1.1, 1.5, 2.5]
    assert cache.pack_gain("transformer", 1_000, 3, 2) == 4  # what was timed before stays
    cache.save_packs([{**same, "num_params": 1e6, "num_members": k, "tokens_per_s": k} for k in (1, 2)])
    assert [cache.pack_gain("recurrent", *one, 1) for one in asked] == [1.1, 1.5, 2.0]  # and so do other sizes


def test_widths_choose_among_the_shapes(two_workers, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench.main(["--widths", "64", "--packs", "2", "--workers", "1", "--out", str(out)]) == 0
    assert {row["d_model"] for row in json.loads(out.read_text())["rows"]} == {64}
    capsys.readouterr()
    assert bench.main(["--packs", "2", "0"]) == 2
    assert "--packs is 0: write sizes of 1 or more" in capsys.readouterr().err
    assert bench.main(["--widths", "64", "65"]) == 2
    assert capsys.readouterr().err == "error: --widths is 65: write some of 32, 64, 128\n"


def test_startup_is_that_of_the_slowest_of_fresh_processes(two_workers, capsys, monkeypatch):
    monkeypatch.setattr("scaling.data.prepare", lambda config, cache_dir: None)
    FakeExecutor.asked.clear()
    before = time.time()
    assert bench.main(["--startup", "--workers", "2"]) == 0
    assert capsys.readouterr().out.count("4.00") == 3 * 3
    asked = FakeExecutor.asked
    assert len(asked) == 3 * 2 * 2 * 2  # sizes, processes cold and warm, a cell and the next one, workers
    assert all(before <= payload["since"] <= time.time() for payload in asked)
    first, following = asked[0], asked[2]
    assert following["since"] >= first["since"]
    assert following["run"] == first["run"] | {"seed": first["run"]["seed"] + 1}


def test_every_family_has_its_sizes_and_its_layers_beside_anothers(two_workers, tmp_path, capsys, monkeypatch):
    assert set(FAMILIES) == {*families.FAMILIES, "experts"}
    for benched in FAMILIES.values():
        assert [accounting.plan(run).num_steps for run in benched.runs] == [100] * len(benched.models)
    dense, experts = (accounting.flops_of(run)["exact"] for run in FAMILIES["experts"].runs[-2:])
    assert experts == pytest.approx(dense, rel=0.02)  # but for the router
    assert {run.model.family for run in FAMILIES["recurrent"].runs} == {"recurrent"}
    row = {"model": "lstm", "d_model": 64, "ours_seconds": 0.02, "other_seconds": 0.03, "ratio": 1.5}
    monkeypatch.setattr("scaling.bench.families.compare", lambda family, seconds, compared: [row])
    out = tmp_path / "bench.json"
    assert bench.main(["--family", "recurrent", "--workers", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(r["d_model"], r["num_layers"]) for r in found["rows"]] == [(64, 2), (128, 2), (256, 2)]
    assert found["compared"] == [row]
    printed = capsys.readouterr().out
    assert "1.50×" in printed
    assert "Flax ms" in printed
    assert bench.main(["--family", "transformer", "--grid", "g.yaml"]) == 2
    assert "write one of them" in capsys.readouterr().err


@pytest.mark.slow
def test_layers_that_are_not_the_same_function_are_not_compared(monkeypatch):
    lstm = RecurrentConfig(d_model=8, num_layers=1, cell="lstm")
    [row] = compare("recurrent", seconds=0, compared=[lstm])
    assert (row["model"], row["d_model"]) == ("lstm", 8)
    assert 0 < row["ratio"] == pytest.approx(row["other_seconds"] / row["ours_seconds"], rel=0.9)
    ours = recurrent.MOVES["lstm"]
    monkeypatch.setitem(recurrent.MOVES, "lstm", lambda state, i, f, g, o: ours(state, i, f - 1, g, o))
    with pytest.raises(ValueError, match=r"lstm at width 8: gradients differ by .* of the largest"):
        compare("recurrent", seconds=0, compared=[lstm])


def test_a_bad_grid_is_one_line(two_workers, tmp_path, capsys):
    assert bench.main(["--grid", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_data_is_timed_by_tokenizer():
    from scaling.bench import data

    rows = data.measure(("bytes", "bpe:300"), text_bytes=200_000)
    assert [row["tokenizer"] for row in rows] == ["bytes", "bpe:300"]
    assert rows[0]["train_seconds"] is None
    assert rows[1]["train_seconds"] > 0
    assert rows[0]["bytes_per_token"] == pytest.approx(1, rel=0.001)
    assert rows[1]["bytes_per_token"] > 1.2
    assert all(row["mb_per_s"] > 0 and row["batch_us"] > 0 for row in rows)


def test_synthetic_sources_are_timed_block_by_block():
    from scaling.bench import data

    [row] = data.measure_synthetic(("synthetic:hierarchy?depth=3",), blocks=2)
    assert row["source"] == "synthetic:hierarchy?depth=3"
    assert row["tokens_per_s"] == pytest.approx(16 * 128 / (row["batch_us"] / 1e6))
    assert row["slowest_batch_us"] > row["batch_us"]  # two batches of 128 wait for a block, the others find it made


def test_every_kind_of_source_with_a_known_entropy_is_timed():
    from scaling.bench import data
    from scaling.data import synthetic

    assert [synthetic.process(source).__class__ for source in data.SYNTHETIC] == list(synthetic.PROCESSES.values())
