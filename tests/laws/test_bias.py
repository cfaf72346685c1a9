import numpy as np
import pytest

from scaling.laws.answers import approaches, isoflop_bias
from scaling.laws.answers.allocation import Cost
from scaling.laws.forms import catalogue
from scaling.laws.tables.observations import from_table
from tests.laws import data


@pytest.mark.parametrize("width, error", [(2, -0.33), (4, -1.30), (8, -2.90), (16, -5.10)])
def test_published_bias_of_approach_two(width, error):
    """Noise-free parabolas in log N, 15 sizes evenly spaced in log N about the optimum: per cent error of D*."""
    shift = isoflop_bias.parabola_shift(0.34, 0.28, np.linspace(-1, 1, 15) * np.log(width))
    assert 100 * np.expm1(-shift) == pytest.approx(error, abs=0.005)


@pytest.mark.parametrize("width", [2, 16])
def test_closed_form_is_what_the_fit_does(width):
    observations = from_table(data.isoflop(sizes=15, width=width))
    profiles = approaches.profiles(observations)
    whole = approaches.parabola_minimum
    shift = isoflop_bias.parabola_shift(0.34, 0.28, np.linspace(-1, 1, 15) * np.log(width))
    found = isoflop_bias.profile_bias(catalogue.FORMS["chinchilla"], data.HOFFMANN, profiles, Cost(), whole)
    np.testing.assert_allclose(found["num_params"], np.expm1(shift), rtol=1e-8)
    assert found["a"] == pytest.approx(0.0, abs=1e-9)


def test_equal_exponents_have_no_bias():
    assert isoflop_bias.parabola_shift(0.3, 0.3, np.linspace(-2, 2, 9)) == pytest.approx(0.0, abs=1e-15)


def test_a_grid_that_drifts_biases_the_exponent():
    table = data.isoflop(sizes=15, width=8.0)
    drifted = table.assign(num_params=table["num_params"] * (table["flops"] / 1e18) ** 0.1)
    drifted["num_tokens"] = drifted["flops"] / (6 * drifted["num_params"])
    drifted["loss"] = data.chinchilla(drifted["num_params"], drifted["num_tokens"])
    observations = from_table(drifted)
    law, profiles = (catalogue.FORMS["chinchilla"], data.HOFFMANN), approaches.profiles(observations)
    found = isoflop_bias.profile_bias(*law, profiles, Cost())
    fitted = approaches.isoflop(observations, num_bootstrap=0)
    whole = isoflop_bias.profile_bias(*law, profiles, Cost(), approaches.parabola_minimum)
    assert abs(whole["a"]) > 0.001 > 4 * abs(found["a"]) > 0
    assert fitted["a"] - 0.28 / 0.62 == pytest.approx(found["a"], abs=1e-9)


def test_an_asymmetric_grid_is_refused():
    with pytest.raises(ValueError, match="profile_bias"):
        isoflop_bias.parabola_shift(0.34, 0.28, np.array([-1.0, 0.0, 2.0]))
