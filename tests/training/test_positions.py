"""Validation loss by place in the window: against sums kept whole, and against a model's own log-likelihoods."""

import dataclasses

import jax
import numpy as np
import pytest

from scaling import data, objectives
from scaling.execution import ExecutionConfig
from scaling.training import evaluation, models
from scaling.training.evaluation import ByPosition, mean_and_standard_error
from scaling.training.step import position_bins
from tests.training.lab import EXECUTION, cell, train


@pytest.mark.parametrize("seq_len", [1, 7, 64, 100, 128, 1000])
def test_bins_are_about_equal_and_hold_every_place_once(seq_len):
    bins_TP = position_bins(seq_len)
    assert bins_TP.shape == (seq_len, min(64, seq_len))
    assert (bins_TP.sum(axis=1) == 1).all()
    sizes = bins_TP.sum(axis=0)
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(bins_TP.argmax(axis=1)) >= 0).all()


def test_added_up_batch_by_batch_it_is_what_whole_arrays_give():
    """Two sources, weights of 0 and 1, batches that do not divide them, rows of padding: bin by bin the estimator of
    the whole split, and Σ w L of the sources."""
    rng = np.random.default_rng(0)
    K, W, T = 2, 37, 10
    losses_KWT = rng.gamma(2.0, 1.0, (K, W, T))
    weights_WT = (rng.random((W, T)) < 0.7).astype(np.float32)
    shares = [("a", 0.7, slice(0, 21)), ("b", 0.3, slice(21, 37))]
    places = ByPosition(T, shares, W)
    for start in range(0, W, 8):
        rows = slice(start, min(start + 8, W))
        sums_KWP = np.zeros((K, 8, T))  # the program's rows, those that are missing filled up
        sums_KWP[:, : rows.stop - start] = (losses_KWT * weights_WT)[:, rows]
        places.add(sums_KWP, weights_WT[rows])
    for k in range(K):
        found = places.of(k)
        assert found["until"] == list(range(1, T + 1))
        for t in range(T):
            each = [
                (w, *mean_and_standard_error((losses_KWT[k] * weights_WT)[s, t], weights_WT[s, t]))
                for _, w, s in shares
            ]
            assert found["loss"][t] == pytest.approx(sum(w * loss for w, loss, _ in each), rel=1e-12)
            error = np.sqrt(sum((w * e) ** 2 for w, _, e in each))
            assert found["standard_error"][t] == pytest.approx(error, rel=1e-9)


def test_a_place_that_no_window_reaches_is_none():
    places = ByPosition(3, [("a", 1.0, slice(None))], 2)
    places.add(np.array([[[2.0, 1.0, 0.0], [4.0, 0.0, 0.0]]]), np.array([[1, 1, 0], [1, 0, 0]], np.float32))
    found = places.of(0)
    assert found["loss"] == [3.0, 1.0, None]
    assert found["standard_error"] == [pytest.approx(1.0), None, None]


@pytest.mark.slow
def test_a_record_has_the_loss_of_every_place(corpus, tmp_path):
    """Its last weights' log-likelihoods over the whole split, place by place, without the run's own programs."""
    import orbax.checkpoint as ocp

    kept = dataclasses.replace(EXECUTION, keep_final_checkpoint=True)
    c = cell(corpus[0], steps=8)
    (record,) = train([c], corpus, tmp_path, kept)
    folder = tmp_path / "work" / "checkpoints" / c.run.run_id / "8" / "state"
    params = jax.tree.map(lambda x: np.asarray(x)[0], ocp.StandardCheckpointer().restore(folder)["params"])
    split = data.open(c.run.data, corpus[1])
    windows_WS, weights_WT = split.validation_windows(0, len(split.validation_counts(None)), None)
    with jax.set_mesh(evaluation.sharding.make_mesh(ExecutionConfig().mesh, jax.devices()[:1])):
        logits = models.apply(c.run.model, ExecutionConfig(), params, windows_WS[:, :-1])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    losses_WT = -np.take_along_axis(log_p, windows_WS[:, 1:, None], axis=-1)[..., 0]
    by_place = (losses_WT * weights_WT).sum(axis=0) / weights_WT.sum(axis=0)
    np.testing.assert_allclose(record.loss_by_position["loss"], by_place, rtol=2e-5)
    assert record.loss_by_position["until"] == list(range(1, 17))
    assert record.num_predicted_tokens == record.num_tokens


@pytest.mark.slow
def test_an_objective_without_an_order_has_none_and_counts_what_carries_loss(corpus, tmp_path):
    c = cell(corpus[0], steps=4)
    masked = objectives.OBJECTIVES["masked"].Config(rate=0.25)
    model = dataclasses.replace(c.run.model, vocab_size=257)
    run = dataclasses.replace(c.run, objective=masked, model=model)
    (record,) = train([dataclasses.replace(c, run=run)], corpus, tmp_path)
    assert record.loss_by_position is None
    assert record.num_predicted_tokens == record.num_tokens // 4
