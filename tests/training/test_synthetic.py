"""Known entropies against enumeration, against algorithms that assume less, and against what the generators make."""

import itertools
import math
import re

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from scaling.data.synthetic import SLOTS, Hierarchy, Markov, process

MARKOV = Markov(symbols=3, order=2, zipf=0.8, concentration=2.0, backoff=0.3, seed=1)
HIERARCHY = Hierarchy(symbols=3, rules=2, zipf=0.7, branching=2, depth=2, seed=1)


def entropy(p):
    p = np.asarray(p)[np.asarray(p) > 0]
    return -np.sum(p * np.log(p))


# ---- Markov ---------------------------------------------------------------------------------------------------------


def markov_windows(chain, length):
    """Every window of ``length`` symbols with its probability, by the definition of the chain."""
    windows = list(itertools.product(range(chain.symbols), repeat=length))
    states = {c: i for i, c in enumerate(itertools.product(range(chain.symbols), repeat=chain.order))}
    pi = left_eigenvector(chain)
    probabilities = []
    for window in windows:
        p = pi[states[window[: chain.order]]]
        for t in range(chain.order, length):
            p *= chain.transition_CV[states[window[t - chain.order : t]], window[t]]
        probabilities.append(p)
    return np.array(windows), np.array(probabilities)


def left_eigenvector(chain):
    """The stationary distribution by LAPACK, from the matrix over contexts."""
    contexts = list(itertools.product(range(chain.symbols), repeat=chain.order))
    matrix = np.zeros((len(contexts),) * 2)
    for i, context in enumerate(contexts):
        for x in range(chain.symbols):
            matrix[i, contexts.index((*context[1:], x))] += chain.transition_CV[i, x]
    values, vectors = np.linalg.eig(matrix.T)
    one = vectors[:, np.argmin(np.abs(values - 1))].real
    return one / one.sum()


@pytest.mark.parametrize("chain", [MARKOV, Markov(symbols=4, order=1, seed=3), Markov(symbols=2, order=3, backoff=0.1)])
def test_markov_entropy_is_that_of_every_window_enumerated(chain):
    entropies = {T: entropy(markov_windows(chain, T)[1]) for T in (5, 6, 7)}
    for T, h in entropies.items():
        assert_allclose(chain.best_loss(T), h / T, rtol=1e-12)
    assert_allclose(chain.entropy_rate, entropies[7] - entropies[6], rtol=1e-11)
    assert chain.best_loss(5) > chain.best_loss(7) > chain.entropy_rate


def test_markov_probability_of_a_window_is_its_own():
    windows, probabilities = markov_windows(MARKOV, 6)
    assert_allclose(probabilities.sum(), 1, rtol=1e-12)
    with np.errstate(divide="ignore"):
        assert_allclose(MARKOV.negative_log_probability(windows), -np.log(probabilities), rtol=1e-11)


def test_markov_windows_occur_as_often_as_they_should():
    windows, probabilities = markov_windows(MARKOV, 4)
    x = MARKOV.sample(200_000, 9, "chi-square")
    for first in (0, 5):  # the start is stationary, and so is the rest
        code = x[:, first : first + 4] @ MARKOV.symbols ** np.arange(4)
        counts = np.bincount(code, minlength=3**4)[windows @ MARKOV.symbols ** np.arange(4)]
        assert counts[probabilities == 0].sum() == 0
        possible = probabilities > 0
        assert stats.chisquare(counts[possible], len(x) * probabilities[possible]).pvalue > 0.01


def test_the_forward_algorithm_agrees_with_the_entropy():
    """The source as a hidden-Markov model over contexts, of whose structure the forward algorithm knows nothing."""
    chain = Markov(symbols=5, order=2, seed=2)
    V, C = 5, 25
    emit_VCC = np.zeros((V, C, C))  # P(x, next context | context)
    for c in range(C):
        for x in range(V):
            emit_VCC[x, c, c * V % C + x] = chain.transition_CV[c, x]
    x_WT = chain.sample(3000, 40, "forward")
    alpha_WC = np.tile(left_eigenvector(chain), (len(x_WT), 1))
    first = x_WT[:, 0].astype(int) * V + x_WT[:, 1]
    alpha_WC *= np.arange(C) == first[:, None]
    nats_W = -np.log(alpha_WC.sum(axis=1))
    for t in range(2, 40):
        alpha_WC = np.einsum("WC,WCD->WD", alpha_WC / alpha_WC.sum(axis=1, keepdims=True), emit_VCC[x_WT[:, t]])
        nats_W -= np.log(alpha_WC.sum(axis=1))
    mean, error = nats_W.mean() / 40, nats_W.std() / 40 / math.sqrt(len(nats_W))
    assert error < 0.004
    assert abs(mean - chain.best_loss(40)) < 3 * error
    assert_allclose(chain.negative_log_probability(x_WT), nats_W, rtol=1e-10)


def test_contexts_are_heavy_tailed():
    """Three times as many contexts known leave a third to four fifths of the text in unknown ones, again and again."""
    weight = np.sort(Markov().stationary_C)[::-1]
    left = np.array([weight[k:].sum() for k in (10, 30, 100, 300, 1000)])
    assert left[0] > 0.5
    assert ((left[1:] / left[:-1] > 0.3) & (left[1:] / left[:-1] < 0.8)).all()


# ---- Hierarchy ------------------------------------------------------------------------------------------------------


def derivations(grammar):
    """Every string with its probability, by expanding the root in every way; one entry a derivation."""
    p_rule = np.bincount(grammar._rule_slots, minlength=grammar.rules) / SLOTS
    p_root = np.bincount(grammar._root_slots, minlength=grammar.symbols) / SLOTS
    strings = [((root,), p) for root, p in enumerate(p_root)]
    for into in grammar.rewritings:
        longer = []
        for string, p in strings:
            for choice in itertools.product(range(grammar.rules), repeat=len(string)):
                leaves = tuple(int(y) for x, r in zip(string, choice) for y in into[x, r])
                longer.append((leaves, p * math.prod(p_rule[r] for r in choice)))
        strings = longer
    return [((leaves[0] + grammar.symbols, *leaves[1:]), p) for leaves, p in strings]  # capital first


@pytest.mark.parametrize(
    "grammar", [HIERARCHY, Hierarchy(symbols=4, rules=4, branching=2, depth=2), Hierarchy(5, 3, 1.0, 3, 1)]
)
def test_hierarchy_entropy_is_that_of_every_string_enumerated(grammar):
    strings = derivations(grammar)
    assert len({s for s, _ in strings}) == len(strings), "a string has two derivations"
    probabilities = np.array([p for _, p in strings])
    assert_allclose(probabilities.sum(), 1, rtol=1e-12)
    assert_allclose(grammar.best_loss(grammar.length), entropy(probabilities) / grammar.length, rtol=1e-12)
    found = grammar.negative_log_probability(np.array([s for s, _ in strings]))
    assert_allclose(found, -np.log(probabilities), rtol=1e-11)


def test_hierarchy_strings_occur_as_often_as_they_should():
    strings = derivations(HIERARCHY)
    place = HIERARCHY.num_symbols ** np.arange(HIERARCHY.length)
    x = HIERARCHY.sample(100_000, 2 * HIERARCHY.length, "chi-square").reshape(-1, HIERARCHY.length)
    counts = np.bincount(x @ place, minlength=HIERARCHY.num_symbols**HIERARCHY.length)
    expected = np.array([p for _, p in strings]) * len(x)
    counts = counts[np.array([s for s, _ in strings]) @ place]
    assert counts.sum() == len(x)  # and nothing else occurs
    assert stats.chisquare(counts, expected).pvalue > 0.01


def test_the_inside_algorithm_agrees_with_the_entropy():
    """Sums over all derivations of a string, without supposing that there is only one."""
    grammar = Hierarchy(symbols=6, rules=4, zipf=1.0, depth=3, seed=5)
    x = grammar.sample(4000, grammar.length, "inside")
    p_rule = np.bincount(grammar._rule_slots, minlength=grammar.rules) / SLOTS
    leaves = np.eye(grammar.num_symbols)[x]  # strings, places, symbols
    inside = leaves[..., : grammar.symbols].copy()
    inside[:, 0] = leaves[:, 0, grammar.symbols :]
    for into in reversed(grammar.rewritings):
        left, right = inside[:, 0::2], inside[:, 1::2]
        inside = np.einsum("SPVR,SPVR,R->SPV", left[:, :, into[..., 0]], right[:, :, into[..., 1]], p_rule)
    p_root = np.bincount(grammar._root_slots, minlength=grammar.symbols) / SLOTS
    nats = -np.log(inside[:, 0] @ p_root)
    assert_allclose(grammar.negative_log_probability(x), nats, rtol=1e-10)
    error = nats.std() / grammar.length / math.sqrt(len(nats))
    assert error < 0.007
    assert abs(nats.mean() / grammar.length - grammar.entropy_rate) < 3 * error


def test_what_a_grammar_cannot_have_made_has_no_probability():
    possible = {s for s, _ in derivations(HIERARCHY)}
    others = [s for s in itertools.product(range(6), repeat=4) if s not in possible]
    assert any(s[0] >= 3 > max(s[1:]) for s in others), "wrong although it is capitalised as it should be"
    assert np.isinf(HIERARCHY.negative_log_probability(np.array(others))).all()


def test_wrong_lengths_of_windows_are_refused():
    with pytest.raises(ValueError, match=r"data.seq_len is 6: write a multiple of 4, a string's length"):
        HIERARCHY.best_loss(6)
    with pytest.raises(ValueError, match=r"data.seq_len is 1: write 2, the source's order, or more"):
        MARKOV.best_loss(1)


# ---- Both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Markov(), Hierarchy()])
def test_the_loss_of_the_true_model_on_a_long_sample_is_the_entropy(source):
    nats = np.concatenate([source.negative_log_probability(source.sample(2048, 128, f"part {i}")) for i in range(8)])
    error = nats.std() / 128 / math.sqrt(len(nats))
    assert error < 0.0015
    assert abs(nats.mean() / 128 - source.best_loss(128)) < 3 * error


@pytest.mark.parametrize("source", [MARKOV, HIERARCHY])
def test_a_sample_is_a_function_of_parameters_and_key(source):
    x = source.sample(64, 8, "key")
    again = type(source)(**vars_of(source)).sample(64, 8, "key")
    assert (x == again).all()
    assert (x != source.sample(64, 8, "other")).any()
    assert (x != type(source)(**{**vars_of(source), "seed": 9}).sample(64, 8, "key")).any()
    assert x.shape == (64, 8)
    assert set(np.unique(x)) <= set(range(source.num_symbols))


def vars_of(source):
    return {name: getattr(source, name) for name in source.__dataclass_fields__}


def test_a_spelling_names_a_process():
    assert process("synthetic:markov") == Markov()
    assert process("synthetic:markov?symbols=5&backoff=.5") == Markov(symbols=5, backoff=0.5)
    assert process("synthetic:hierarchy?depth=3&seed=4") == Hierarchy(depth=3, seed=4)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("synthetic:markof", "there is no process 'markof': write one of markov, hierarchy"),
        ("synthetic:markov?zip=1", "'zip' is not a parameter: write any of symbols, order, zipf"),
        ("synthetic:markov?zipf=1&zipf=2", "'zipf' is given twice: write any of symbols"),
        ("synthetic:markov?zipf=steep", "zipf is 'steep': write a number"),
        ("synthetic:markov?zipf=nan", "zipf is 'nan': write a number"),
        ("synthetic:markov?order=1.5", "order is '1.5': write an integer"),
        ("synthetic:markov?order=4", "order is 4: write less: 127 symbols to that power are more than 65,536 contexts"),
        ("synthetic:markov?symbols=300", "symbols is 300: write an integer from 2 to 256"),
        ("synthetic:markov?backoff=2", "backoff is 2.0: write a number in [0, 1]"),
        ("synthetic:markov?concentration=0", "concentration is 0.0: write a number > 0"),
        ("synthetic:hierarchy?rules=40", "rules is 40: write an integer from 1 to 16"),
        ("synthetic:hierarchy?depth=20", "depth is 20: write less: a string has 1048576 leaves"),
        ("synthetic:hierarchy?branching=9", "branching is 9: write less"),
    ],
)
def test_a_misspelt_source_is_refused_in_one_line(source, says):
    with pytest.raises(ValueError, match=re.escape(f"data.source is {source!r}: {says}")) as e:
        process(source)
    assert "\n" not in str(e.value)
