"""Validation loss by part of the text: the parts are the text's own, the same for every run, and add up to the loss."""

import numpy as np
import pytest

from scaling import data
from scaling.data.validation import NUM_BLOCKS, Validation
from scaling.training.evaluation import by_block, evaluated, with_parts
from tests.training.lab import cell, train


def newey_west(n, loss):
    """Standard error of Σ n loss / Σ n, by the double sum over parts; never less than that of strangers."""
    B, u = len(n), n * (loss - np.average(loss, weights=n))
    apart = np.abs(np.subtract.outer(np.arange(B), np.arange(B)))
    weight = np.maximum(1 - apart / (round(B ** (1 / 3)) + 1), 0)
    return np.sqrt(B / (B - 1) * max(u @ weight @ u, u @ u)) / n.sum()


class Tokens:
    """A split that counts its tokens alone."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


@pytest.mark.parametrize("size, seq_len", [(6401, 10), (100_003, 128), (300, 16)])
def test_parts_are_equal_stretches_of_the_text(size, seq_len):
    split = Validation(Tokens(size), seq_len, 0)
    block_W, window_W = split.blocks(None), split._order(0, split.num_windows)
    assert sorted(window_W) == list(range(split.num_windows))
    # In the text's own order parts never go back, and each begins where 1/64 of the text is over.
    in_order = block_W[np.argsort(window_W)]
    assert (np.diff(in_order) >= 0).all()
    assert in_order[0] == 0
    assert all(b == int(w * seq_len * NUM_BLOCKS / (size - 1) + 1e-9) for w, b in enumerate(in_order))
    # Fewer windows, of the fixed order, are in the same parts.
    some = split.blocks(10 * seq_len)
    np.testing.assert_array_equal(some, block_W[: len(some)])


def test_by_part_adds_up_to_the_loss_of_a_mixture():
    rng = np.random.default_rng(0)
    W, shares = 200, [("a", 0.7, slice(0, 120)), ("b", 0.3, slice(120, 200))]
    tokens_W = rng.integers(0, 17, W).astype(np.float32)
    sums_W = (tokens_W * rng.gamma(2.0, 1.0, W)).astype(np.float32)
    block_W = np.concatenate([rng.integers(0, 64, 120), 64 + rng.integers(0, 64, 80)])
    found = {k: np.array(v) for k, v in by_block(sums_W, tokens_W, block_W, shares).items()}
    total = 0.0
    for s, (_, weight, windows) in enumerate(shares):
        here = found["source"] == s
        assert (found["weight"][here] == weight).all()
        assert found["num_tokens"][here].sum() == tokens_W[windows].sum()
        total += weight * np.average(found["loss"][here], weights=found["num_tokens"][here])
        b = found["block"][here][0]
        mine = (block_W == b + 64 * s) & (np.arange(W) >= windows.start) & (np.arange(W) < windows.stop)
        assert found["loss"][here][0] == pytest.approx(sums_W[mine].sum() / tokens_W[mine].sum(), rel=1e-6)
    whole = evaluated(sums_W, tokens_W, shares)
    assert total == pytest.approx(whole.loss, rel=1e-9)
    told = with_parts(whole, by_block(sums_W, tokens_W, block_W, shares), shares)
    errors = [newey_west(*(found[k][found["source"] == s] for k in ("num_tokens", "loss"))) for s in (0, 1)]
    assert [told.by_source[name]["standard_error"] for name, *_ in shares] == pytest.approx(errors, rel=1e-9)
    exact = np.hypot(*(weight * error for (_, weight, _), error in zip(shares, errors)))
    assert told.standard_error == pytest.approx(exact, rel=1e-9)
    assert (told.loss, whole.by_block) == (whole.loss, None)
    wide = with_parts(whole._replace(standard_error=9.0), told.by_block, shares)  # of rows that are no strangers
    assert wide.standard_error == 9.0


@pytest.mark.slow
def test_records_of_two_runs_have_the_same_parts(corpus, tmp_path):
    """A pack's members, by the same blocks, whose mean is the loss that they always had."""
    cells = [cell(corpus[0], steps=4, seed=seed) for seed in (0, 1)]
    one, other = train(cells, corpus, tmp_path)
    split = data.open(cells[0].run.data, corpus[1])
    assert max(one.loss_by_block["block"]) <= NUM_BLOCKS - 1
    assert sum(one.loss_by_block["num_tokens"]) == one.num_eval_tokens == split.validation_counts(None).sum()
    for record in (one, other):
        n, loss = (np.array(record.loss_by_block[k]) for k in ("num_tokens", "loss"))
        assert np.average(loss, weights=n) == pytest.approx(record.loss, rel=1e-6)
        assert record.loss_standard_error == record.standard_error == pytest.approx(newey_west(n, loss), rel=1e-9)
    for name in ("source", "block", "weight", "num_tokens"):
        assert one.loss_by_block[name] == other.loss_by_block[name]
