"""Grids that are shipped, run whole by the command, on less text and fewer sizes than they name."""

import json
import re
import shutil
from pathlib import Path

import pytest

from scaling import records, sweep
from scaling.data import __main__ as data_command

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_one_epoch_of_a_folder_of_text(tmp_path, monkeypatch, capsys):
    """Refused while the folder is not prepared, then trained on each of its tokens once, fitted and compared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "")  # the worker's: one device
    shutil.copytree(REPO / "scaling" / "laws", "text", ignore=shutil.ignore_patterns("__pycache__"))
    grid = (REPO / "sweeps/one_epoch.yaml").read_text()
    for key, value in {"model.width": "[16, 32, 48]", "recipe.lr_scale": "[2]"}.items():
        grid, found = re.subn(rf"^  {key}: .*$", f"  {key}: {value}", grid, flags=re.MULTILINE)
        assert found == 1, key
    Path("one_epoch.yaml").write_text(grid)

    assert sweep.main(["--grid", "one_epoch.yaml"]) == 2
    assert "give python -m scaling.data prepare --grid with this file first" in capsys.readouterr().err
    assert data_command.main(["prepare", "--grid", "one_epoch.yaml"]) == 0
    assert sweep.main(["--grid", "one_epoch.yaml", "--workers", "1"]) == 0

    table = records.load("results/one_epoch")
    assert set(table["family"]) == {"transformer", "lstm"}
    assert len(table) == 6
    (tokens,) = set(table["num_tokens"])
    described = json.loads(next(Path("cache").glob("*/manifest.json")).read_text())
    # An epoch is whole windows of 128, the run the nearest whole number of batches of 512.
    assert -256 - 128 <= tokens - described["splits"]["train"]["tokens"] <= 256
    fit = json.loads(Path("results/one_epoch/fit.json").read_text())
    assert fit["multiplier"]["axis"] == "num_params"
