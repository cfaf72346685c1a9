"""Designs that cannot tell columns apart are refused by what the losses can show, and others are not."""

import numpy as np
import pandas as pd
import pytest

import scaling
from scaling.fit import analyse
from scaling.laws.fitting.estimate import fit
from scaling.laws.intervals import resampling
from scaling.laws.tables.observations import from_table
from tests.laws import data


def ray(jitter, noise, num=30, seed=0, ratio=20.0, power=1.0):
    rng = np.random.default_rng(seed)
    n = np.geomspace(1e7, 1e10, num)
    d = ratio * n**power * (1 + jitter * rng.uniform(-1, 1, num))
    return pd.DataFrame(
        {"num_params": n, "num_tokens": d, "loss": data.chinchilla(n, d) * np.exp(noise * rng.normal(size=num))}
    )


@pytest.mark.parametrize("law", ["chinchilla", "chinchilla_tied", "product", "overtraining", "kaplan_joint"])
@pytest.mark.parametrize("noise", [0.0, 0.003])
@pytest.mark.parametrize("jitter", [0.0, 0.01])
def test_a_ray_is_refused_in_every_form_that_cannot_tell(law, noise, jitter):
    """At 20 tokens a parameter, to the percent, the loss is a law of N alone as well as of D alone."""
    with pytest.raises(ValueError, match=r"move together in every row|tokens_per_param takes one value"):
        fit(from_table(ray(jitter, noise)), law, loss="squared")
    assert fit(from_table(ray(jitter, noise)), "kaplan_n_offset").params["alpha"] > 0


def test_another_power_is_a_ray_too():
    with pytest.raises(ValueError, match=r"move together in every row but for 0\.\d%"):
        fit(from_table(ray(0.01, 0.003, ratio=1e5, power=0.6)), "chinchilla")


@pytest.mark.slow
def test_what_is_refused_scatters_and_what_is_not_does_not():
    """The rule against the scatter of estimates on redrawn losses: refused where α is anybody's guess."""
    from scaling.laws.fitting import identify

    def spread(jitter, monkey):
        with pytest.MonkeyPatch.context() as patch:
            if monkey:
                patch.setattr(identify, "KNOWN_TO", np.inf)
            found = [fit(from_table(ray(jitter, 0.003, seed=s)), "chinchilla").params for s in range(12)]
        a = [p["beta"] / (p["alpha"] + p["beta"]) for p in found]
        return np.std(a)

    assert spread(0.01, monkey=True) > 0.12
    assert spread(0.3, monkey=False) < 0.08


@pytest.mark.parametrize("digits", [5, 6, 9])
def test_losses_without_noise_raise_no_alarm(digits):
    """To five digits or nine the residuals are rounding: their angle with a gradient says nothing."""
    table = data.scattered(24)
    fitted = fit(from_table(table.assign(loss=table["loss"].round(digits))), "chinchilla")
    assert fitted.converged
    assert fitted.params["alpha"] == pytest.approx(data.HOFFMANN["alpha"], rel=1e-3)
    assert resampling.bootstrap(fitted, 200).converged == 1.0


def test_noise_is_still_seen_to_converge_or_not():
    """A start that is nowhere near the optimum and takes no step is not converged, however small the residuals."""
    from scaling.laws.fitting.solver import solve

    table = data.scattered(24)
    fitted = fit(from_table(table.assign(loss=table["loss"].round(6))), "chinchilla")
    away = solve(fitted.problem, fitted.theta[None] + 1e-4, fitted.observations.weight, max_iterations=0)
    assert not away.converged.any()


@pytest.mark.parametrize("law", ["kaplan_n", "kaplan_d", "kaplan_c", "chinchilla"])
def test_one_law_alone_is_the_one_among_several(law):
    """Same name, same rows, same numbers: from Python and by the command's analysis."""
    table = data.isoflop(noise=0.003)
    top = 1.1e19
    made = analyse(table, laws=(law,), bootstrap=50, holdout_flops=top, combined=False)
    alone = scaling.fit_law(table, law, holdout_flops=top, bootstrap=50)
    assert alone.num_observations == made.fits[law].num_observations
    assert alone.params == made.fits[law].params
    for name, values in alone.draws.params.items():
        np.testing.assert_array_equal(values, made.draws[law].params[name])
    assert scaling.fit_law(table, law).draws is None


def test_on_a_ray_the_envelope_has_no_exponent():
    """The grid's own C^.5 was printed for it."""
    made = analyse(ray(0.01, 0.003), laws=("kaplan_n",), bootstrap=0)
    assert made.envelope["a"] is None
    assert "the design's" in made.envelope["note"]
    free = analyse(data.scattered(30, noise=0.003), laws=("kaplan_n",), bootstrap=0)
    assert 0.2 < free.envelope["a"] < 0.8
