"""Tables → observations: what is fitted and what is not."""

import pandas as pd

from scaling.laws.observations import from_table


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
