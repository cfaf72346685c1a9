import dataclasses

import numpy as np
import pytest

from scaling.laws.fitting.coordinates import Coordinates, Model
from scaling.laws.forms import catalogue

RNG = np.random.default_rng(0)
COLUMNS = {
    "num_params": np.exp(RNG.uniform(np.log(1e7), np.log(1e10), 30)),
    "num_tokens": np.exp(RNG.uniform(np.log(1e9), np.log(1e12), 30)),
}
COLUMNS["flops"] = 6 * COLUMNS["num_params"] * COLUMNS["num_tokens"]
COLUMNS["tokens_per_param"] = COLUMNS["num_tokens"] / COLUMNS["num_params"]
COLUMNS["num_steps"] = COLUMNS["num_tokens"] / 1e6
LOSS = RNG.uniform(2, 4, 30)
OTHERS = np.random.default_rng(1)  # the columns above stay as they were drawn
COLUMNS |= {
    "peak_lr": 10 ** OTHERS.uniform(-4, -2, 30),
    "batch_size": 2.0 ** OTHERS.uniform(4, 12, 30),
    "non_vocab_parameters": COLUMNS["num_params"],
    "vocab_size": 2.0 ** OTHERS.uniform(12, 17, 30),
    "num_characters": 3 * COLUMNS["num_tokens"],
    "parallel_size": 2.0 ** OTHERS.integers(0, 4, 30),
    "unique_tokens": COLUMNS["num_tokens"] / 2.0 ** OTHERS.integers(0, 4, 30),
    "batch_tokens": 2.0 ** OTHERS.uniform(16, 24, 30),
}
POWER_SUMS = [name for name, form in catalogue.FORMS.items() if form.powers is not None]


def model(name, log=True):
    form = catalogue.get(name)
    columns = {c: COLUMNS[c] for c in form.columns}
    return Model(Coordinates(form, columns, LOSS), columns, log)


def theta_of(m, num=3, rng=RNG):
    lower, upper = np.maximum(m.coordinates.lower, -2.0), np.minimum(m.coordinates.upper, 1.0)
    return rng.uniform(lower + 0.1 * (upper - lower), upper, (num, len(lower)))


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("name", POWER_SUMS)
def test_analytic_derivatives_equal_complex_step_of_the_function(name, log):
    # Of their own, whatever tests ran before: elsewhere a law of either sign may be below zero, which has no log.
    m, rng = model(name, log), np.random.default_rng(0)
    theta = theta_of(m, rng=rng)
    c, v = rng.normal(size=(2, 3, 30))
    value, jacobian, second = m._power_derivatives(theta)
    np.testing.assert_allclose(value, m.value(theta), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(jacobian, m._jacobian(theta), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(second(c, v), m._step_derivatives(theta)[2](c, v), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("name", [name for name, form in catalogue.FORMS.items() if form.gradient is not None])
def test_written_gradients_equal_complex_steps_of_the_function(name, log):
    """Around the form's own starts, with as much of each linear term as makes one median loss at the centre."""
    m = model(name, log)
    plain = dataclasses.replace(m.form, gradient=None)
    stepped = Model(
        Coordinates(plain, {c: COLUMNS[c] for c in plain.columns}, LOSS), dict(zip(plain.columns, m.columns)), log
    )
    start = {k: v[0] if v else 1.0 for k, v in m.coordinates.starts.items()}
    theta = m.coordinates.encode(m.coordinates.natural_starts(start)) + RNG.uniform(-0.05, 0.05, (3, len(start)))
    theta[:, [p.linear for p in m.form.parameters.values()]] = RNG.uniform(0.1, 1.0)
    want = stepped._jacobian(theta)
    assert np.isfinite(want).all()
    assert (np.abs(want).max(axis=2) > 1e-12).all()
    np.testing.assert_allclose(m._jacobian(theta), want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


def test_a_form_with_a_value_fixed_keeps_its_gradient():
    fixed = catalogue.FORMS["farseer"].fix(alpha=0.15)
    columns = {c: COLUMNS[c] for c in fixed.columns}
    coordinates = Coordinates(fixed, columns, LOSS)
    plain = Model(Coordinates(dataclasses.replace(fixed, gradient=None), columns, LOSS), columns)
    start = coordinates.natural_starts({k: v[0] for k, v in coordinates.starts.items()})
    theta = coordinates.encode(start)[None]
    np.testing.assert_allclose(
        Model(coordinates, columns)._jacobian(theta), plain._jacobian(theta), rtol=1e-9, atol=1e-12
    )


def test_chinchilla_at_published_constants():
    # 70B parameters and 1.4T tokens, by hand: 1.69 + 406.4 / 70e9^.34 + 410.7 / 1.4e12^.28.
    published = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
    loss = catalogue.FORMS["chinchilla"].predict(published, num_params=70e9, num_tokens=1.4e12)
    assert loss == pytest.approx(1.69 + 0.083444 + 0.163015, abs=1e-3)


def test_kaplan_at_its_critical_size_is_one_nat():
    assert catalogue.FORMS["kaplan_n"].predict({"N_c": 8.8e13, "alpha": 0.076}, num_params=8.8e13) == 1.0


def test_a_users_function_is_a_form():
    def mine(num_params, *, A, alpha):
        """L = A N^-α"""
        return A * num_params**-alpha

    form = catalogue.get(mine)
    assert form.columns == ("num_params",)
    assert list(form.parameters) == ["A", "alpha"]
    assert form.equation == "L = A N^-α"


def test_a_form_by_import_path():
    assert catalogue.get("scaling.laws.forms.catalogue:chinchilla") is catalogue.FORMS["chinchilla"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("chinchila", "write one of"),
        ("no.such.module:f", "cannot be imported"),
        ("scaling.laws.forms.catalogue:nothing", "cannot be imported"),
        (lambda x: x, "keyword-only"),
    ],
)
def test_unknown_forms_say_what_to_write(name, message):
    with pytest.raises(ValueError, match=message):
        catalogue.get(name)


def test_predict_names_what_is_missing():
    with pytest.raises(ValueError, match="num_tokens"):
        catalogue.FORMS["chinchilla"].predict({}, num_params=1e9)
    with pytest.raises(ValueError, match="beta"):
        catalogue.FORMS["chinchilla"].predict({"E": 1, "A": 1, "alpha": 1, "B": 1}, num_params=1e9, num_tokens=1e9)
