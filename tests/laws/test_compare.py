import numpy as np
import pytest

from scaling import fit_law, records
from scaling.laws.answers import comparison
from scaling.laws.tables.observations import from_table
from tests import synthetic
from tests.laws import data

LAWS = ("chinchilla", "chinchilla_tied", "product", "kaplan_n_offset")


def test_the_true_law_ranks_first():
    observations = from_table(data.isoflop(budgets=(1e18, 1e19, 1e20, 1e21), sizes=9, noise=0.003))
    rows = comparison.laws(observations, LAWS)
    assert rows[0]["law"] == "chinchilla"
    assert rows[0]["delta_aicc"] == 0.0
    assert rows[-1]["delta_aicc"] > 50
    assert rows[0]["held_out"]["mean_error"] < 0.01


def test_one_exponent_wins_where_the_truth_has_one():
    truth = data.HOFFMANN | {"beta": 0.34}
    observations = from_table(data.isoflop(budgets=(1e18, 1e19, 1e20), sizes=9, noise=0.01, params=truth))
    assert comparison.laws(observations, LAWS)[0]["law"] == "chinchilla_tied"


def test_aicc_is_the_textbook_one_for_squared_loss():
    observations = from_table(data.isoflop(sizes=9, noise=0.01))
    rows = {r["law"]: r for r in comparison.laws(observations, ("chinchilla", "chinchilla_tied"), loss="squared")}
    n = len(observations)
    best = min(rows.values(), key=lambda r: r["residual_rmse"])
    variance = n * best["residual_rmse"] ** 2 / (n - best["num_parameters"])
    for row in rows.values():
        P = row["num_parameters"]
        want = n * row["residual_rmse"] ** 2 / variance + 2 * P + 2 * P * (P + 1) / (n - P - 1)
        assert row["aicc"] == pytest.approx(want, rel=1e-6)


def test_growth_of_the_fitted_range():
    observations = from_table(data.isoflop(budgets=np.geomspace(1e17, 1e21, 9), sizes=7, noise=0.003))
    found = comparison.growth(observations, comparison.catalogue.get("chinchilla"))
    assert [g["num_fitted"] for g in found] == sorted(g["num_fitted"] for g in found)
    assert found[-1]["mean_error"] < 0.01


def test_conventions_move_the_exponent_of_a_sweep():
    runs = [r for r in synthetic.sweep_records() if r.status == "completed"]
    rows = comparison.conventions(records.table(runs), bootstrap=20)
    assert len(rows) == 10
    by_rule = {(r["num_params"], r["flops"]): r for r in rows}
    # 6 N D leaves out the head, which is most of a small model's compute (Porian et al. 2024): a moves.
    exact, simple = by_rule["non_embedding", "exact"], by_rule["non_embedding", "6ND"]
    assert exact["params"] == simple["params"]
    assert exact["a"] == simple["a"]
    assert abs(exact["a_local"] - simple["a_local"]) > 0.01
    lo, hi = exact["a_local_interval"]
    assert lo < exact["a_local"] < hi


def test_laws_that_do_not_apply_are_listed():
    observations = from_table(data.scattered(num=6))
    rows = comparison.laws(observations, ("chinchilla", "farseer"))
    assert rows[-1]["law"] == "farseer"
    assert "observations" in rows[-1]["problem"]


def test_rows_that_a_rule_holds_out_are_not_in_that_rules_fit():
    """Each rule with a holdout is a fit of its own rows, as the fit of that convention alone is."""
    table = data.isoflop(noise=0.003)
    n, d = (table[c].to_numpy() for c in ("num_params", "num_tokens"))
    per_token = 6 * n * (1 + 3e8 / n)
    table = table.drop(columns="flops", errors="ignore").assign(flops_6ND=6 * n * d, flops_exact=per_token * d)
    limit = float(np.quantile(table["flops_exact"], 0.7))
    for row in comparison.conventions(table, bootstrap=0, holdout_flops=limit):
        own = table.rename(columns={f"flops_{row['flops']}": "flops"}).drop(columns=table.filter(like="flops_").columns,
                                                                          errors="ignore")  # fmt: skip
        alone = fit_law(own, "chinchilla", holdout_flops=limit, bootstrap=0)
        assert row["params"]["alpha"] == pytest.approx(alone.params["alpha"], rel=1e-6)
