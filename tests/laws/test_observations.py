"""Tables → observations: what is fitted and what is not."""

import pandas as pd
import pytest

from scaling.laws.tables.observations import from_table


def test_a_rate_sweep_is_fitted_at_each_cells_best_setting_over_its_seeds():
    table = pd.DataFrame(
        [
            # cell, setting, loss: b wins on the mean though a has the luckiest seed; cell 2 has one setting
            ("1", "a", 1.90), ("1", "a", 2.30), ("1", "b", 2.00), ("1", "b", 2.02), ("2", "a", 2.50), ("3", "b", 2.10),
            ("3", "c", 2.05),
        ],
        columns=["cell", "setting", "loss"],
    ).assign(num_params=1e6, num_tokens=1e8)  # fmt: skip
    observations = from_table(table)
    assert sorted(observations.loss) == [2.00, 2.02, 2.05, 2.50]
    assert [row["reason"] for row in observations.excluded] == ["untuned"] * 3


def test_runs_on_different_data_are_not_fitted_together():
    table = pd.DataFrame(
        {"num_params": [1e6, 2e6], "num_tokens": 1e8, "loss": [2.0, 1.9], "data": ["a" * 64, "b" * 64]}
    )
    with pytest.raises(ValueError, match=r"2 different datasets .aaaaaaaaaaaa: 1 runs; bbbbbbbbbbbb: 1 runs"):
        from_table(table)
    assert len(from_table(table.assign(status=["completed", "failed"]))) == 1
