r"""Sources whose entropy is known, generated from a seed and without a file: they test the whole instrument.

    data: {source: "synthetic:markov?symbols=127&zipf=1.3", seq_len: 128}

A law's irreducible loss E is an extrapolation; here it can be held against the truth. A window is a separator (id 0)
followed by T = ``seq_len`` symbols (ids from 1), all of them predicted, drawn afresh from the stationary source:
windows are independent, so the least mean loss that any predictor can reach over them is exactly

    best_loss(T) = H(X_1, …, X_T) / T    nats per token,

not the entropy rate h = lim H(X_1, …, X_T) / T, which it exceeds because a window's first symbols lack their context.

All randomness is bytes of SHAKE-256 and all symbol probabilities are multiples of 1/256 in integer tables, so a source
is the same on every machine and its entropy is a finite sum. No window is ever seen twice: unique tokens do not end.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SLOTS = 256  # probabilities are multiples of 1/SLOTS: a byte of noise chooses a slot of a table
PREFIX = "synthetic:"

# Letters in shapes: W windows, T symbols of each, V symbols of the alphabet, C contexts, S T + 1 tokens.


class Process(Protocol):
    """A stationary source of symbols 0 … V - 1 with its entropy. Instances are their parameters."""

    num_symbols: int

    @property
    def entropy_rate(self) -> float:
        """h = lim H(X_1, …, X_T) / T, nats per token."""
        ...

    def best_loss(self, seq_len: int) -> float:
        """H(X_1, …, X_T) / T of a window, nats per token. Raises ValueError if windows cannot be so long."""
        ...

    def sample(self, num_windows: int, seq_len: int, key: str) -> np.ndarray:
        """Independent windows, [W, T], a function of the arguments alone."""
        ...

    def negative_log_probability(self, x_WT: np.ndarray) -> np.ndarray:
        """-ln P(x_1, …, x_T) of each window under the source itself, nats, [W]."""
        ...


def _noise(key: str, *shape: int, dtype: str = "<u1") -> np.ndarray:
    """Uniform integers: SHAKE-256 of ``key``, the same under every version of numpy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(hashlib.shake_256(key.encode()).digest(size), dtype).reshape(shape)


def _zipf_slots(size: int, exponent: float, num_slots: int) -> np.ndarray:
    """``num_slots`` slots shared out over 0 … size - 1 as r^-exponent, largest remainders first, ascending."""
    share = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    share *= num_slots / math.fsum(share)
    counts = np.floor(share).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: num_slots - counts.sum()]] += 1
    return np.repeat(np.arange(size), counts)


def _entropy(probability: np.ndarray) -> float:
    """-Σ p ln p, nats."""
    p = probability[probability > 0]
    return -math.fsum(p * np.log(p))


def _require(ok: bool, name: str, value, want: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}: write {want}")


@dataclass(frozen=True)
class Markov:
    r"""A Markov chain of order k whose contexts are Zipf-weighted, like words: a few make up most of a text, and there
    are always more of them to be learned.

    With context c = (x_{t-k}, …, x_{t-1}) and w(x) ∝ (x + 1)^-zipf,

        P(x | c) = (1 - backoff) Q(x | c) + backoff w(x),        Q(· | c) ~ DP(concentration, w),

    where each context's Q is a draw of its own, by 256 steps of a Pólya urn (Blackwell and MacQueen 1973): nothing
    learned about one context helps with another, so that the loss of a model which knows the K most frequent contexts
    alone falls with K as the tail of their frequencies does (Hutter 2021, Michaud et al. 2023).
    With π the stationary distribution over the V^k contexts (the fixed point of π P, by power iteration) and
    H_c = -Σ_x P(x|c) ln P(x|c),

        h = Σ_c π(c) H_c.

    A stationary window of T symbols has, by the chain rule and because given k symbols the past does not matter,

        H(X_1, …, X_T) = H(X_1, …, X_k) + Σ_{t>k} H(X_t | X_{t-k}, …, X_{t-1}) = H(π) + (T - k) h.

    ``backoff`` is rounded to multiples of 1/256, w to multiples of 1/65,536.
    """

    symbols: int = 127
    order: int = 2
    zipf: float = 1.3
    concentration: float = 1.0
    backoff: float = 0.25
    seed: int = 0

    def __post_init__(self):
        _require(2 <= self.symbols <= 256, "symbols", self.symbols, "an integer from 2 to 256")
        _require(self.order >= 1, "order", self.order, "an integer ≥ 1")
        want = f"less: {self.symbols} symbols to that power are more than 65,536 contexts"
        _require(self.symbols**self.order <= 2**16, "order", self.order, want)
        for name in ("zipf", "concentration"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number > 0")
        _require(0 <= self.backoff <= 1, "backoff", self.backoff, "a number in [0, 1]")

    @property
    def num_symbols(self) -> int:
        return self.symbols

    @functools.cached_property
    def _base_slots(self) -> np.ndarray:
        return _zipf_slots(self.symbols, self.zipf, 2**16).astype(np.uint8)

    @property
    def _num_backoff(self) -> int:
        """Of the slots of a context, the first so many stand for w."""
        return round(self.backoff * SLOTS)

    @functools.cached_property
    def table_CK(self) -> np.ndarray:
        """The symbol in each of the K = 256 equally likely slots of Q(· | c); the newest symbol of a context is its
        lowest digit. Slot i copies one of the i before it, or with probability θ / (θ + i) is drawn from w."""
        context_C = np.arange(self.symbols**self.order)
        table_KC = np.empty((SLOTS, len(context_C)), np.uint8)
        for i in range(SLOTS):
            new_C, which_C = _noise(f"{self} slot {i}", 2, len(context_C), dtype="<u4")
            fresh_C = new_C < self.concentration / (self.concentration + i) * 2**32
            drawn_C = self._base_slots[which_C % len(self._base_slots)]
            table_KC[i] = np.where(fresh_C, drawn_C, table_KC[which_C % max(i, 1), context_C])
        return np.ascontiguousarray(table_KC.T)

    @functools.cached_property
    def transition_CV(self) -> np.ndarray:
        """P(x | c)."""
        C, V, E = self.symbols**self.order, self.symbols, self._num_backoff
        flat = (np.arange(C)[:, None] * V + self.table_CK[:, E:]).ravel()
        w_V = np.bincount(self._base_slots, minlength=V) / len(self._base_slots)
        return np.bincount(flat, minlength=C * V).reshape(C, V) / SLOTS + E / SLOTS * w_V

    @functools.cached_property
    def stationary_C(self) -> np.ndarray:
        """π over contexts: the limit from all contexts alike."""
        V = self.symbols
        pi_C = np.full(V**self.order, float(V) ** -self.order)
        for _ in range(10_000):
            joint_CV = pi_C[:, None] * self.transition_CV
            new_C = joint_CV.reshape(V, -1).sum(axis=0)  # over the oldest symbol
            if np.abs(new_C - pi_C).sum() < 1e-13:
                return new_C / new_C.sum()
            pi_C = new_C
        raise ValueError("its chain does not settle: write another seed")

    @functools.cached_property
    def entropy_rate(self) -> float:
        p = self.transition_CV
        entropy_C = -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), axis=1)
        return math.fsum(self.stationary_C * entropy_C)

    def best_loss(self, seq_len: int) -> float:
        _require(seq_len >= self.order, "data.seq_len", seq_len, f"{self.order}, the source's order, or more")
        return (_entropy(self.stationary_C) + (seq_len - self.order) * self.entropy_rate) / seq_len

    def sample(self, num_windows: int, seq_len: int, key: str) -> np.ndarray:
        k, V, C = self.order, self.symbols, self.symbols**self.order
        start_W = _noise(f"{key} start", num_windows, dtype="<u8") / 2**64
        state_W = np.minimum(np.searchsorted(np.cumsum(self.stationary_C), start_W, side="right"), C - 1)
        slot_TW = _noise(key, seq_len, num_windows)
        base_TW = self._base_slots[_noise(f"{key} base", seq_len, num_windows, dtype="<u2")]
        from_base_TW = slot_TW < self._num_backoff
        out_TW = np.empty((seq_len, num_windows), np.uint8)
        for t in range(k):
            out_TW[t] = state_W // V ** (k - 1 - t) % V
        slots = self.table_CK.ravel()
        for t in range(k, seq_len):
            out_TW[t] = np.where(from_base_TW[t], base_TW[t], slots[state_W * SLOTS + slot_TW[t]])
            state_W = (state_W * V + out_TW[t]) % C
        return out_TW.T

    def negative_log_probability(self, x_WT: np.ndarray) -> np.ndarray:
        k, V = self.order, self.symbols
        windows_WTk = np.lib.stride_tricks.sliding_window_view(x_WT.astype(np.int64), k, axis=1)
        context_WT = windows_WTk @ V ** np.arange(k - 1, -1, -1)
        following_WT = self.transition_CV[context_WT[:, :-1], x_WT[:, k:]]
        return -np.log(self.stationary_C[context_WT[:, 0]]) - np.log(following_WT).sum(axis=1)


@dataclass(frozen=True)
class Hierarchy:
    r"""The random hierarchy model (Cagnetta et al. 2024) with Zipf-weighted rules: a context-free grammar whose symbols
    of each level rewrite into ``branching`` symbols of the next, down to strings of branching^depth leaves.

    Every level has V symbols of its own, and every symbol ``rules`` rewritings, taken with probabilities
    p_r ∝ r^-zipf; the root is uniform (both in multiples of 1/256). No two rewritings of a level are equal, so leaves
    can be read back to the root in one way only: strings and derivations correspond one to one, and a string has the
    entropy of the choices that made it, one rewriting for each symbol above the leaves:

        H(string) = H(root) + Σ_{l<depth} branching^l H(p) = H(root) + (branching^depth - 1) / (branching - 1) H(p).

    A window is a whole number of independent strings, and the first leaf of each is a capital (V + its symbol): where
    strings begin can be seen anywhere in a window, as words' beginnings can, and costs no entropy. So best_loss = h =
    H(string) / branching^depth: there is no correction for finite windows.

    A model that has learned the lowest l levels alone takes the symbols of level depth - l for independent: it loses
    about branching^-l (ln V - H(p)) more than h. Each level takes more data than the one below by a factor.
    """

    symbols: int = 16
    rules: int = 2
    zipf: float = 1.0
    branching: int = 2
    depth: int = 5
    seed: int = 0

    def __post_init__(self):
        _require(2 <= self.symbols <= 128, "symbols", self.symbols, "an integer from 2 to 128")
        _require(self.branching >= 2, "branching", self.branching, "an integer ≥ 2")
        _require(self.depth >= 1, "depth", self.depth, "an integer ≥ 1")
        num_tuples = self.symbols**self.branching
        _require(num_tuples <= 2**20, "branching", self.branching, "less: the tuples of symbols are over 2^20")
        most = min(num_tuples // self.symbols, SLOTS)
        _require(1 <= self.rules <= most, "rules", self.rules, f"an integer from 1 to {most}")
        _require(self.zipf >= 0, "zipf", self.zipf, "a number ≥ 0")
        _require(self.length <= 2**16, "depth", self.depth, f"less: a string has {self.length} leaves")

    @property
    def num_symbols(self) -> int:
        return 2 * self.symbols  # small and capital

    @property
    def length(self) -> int:
        """Leaves of a string."""
        return self.branching**self.depth

    @functools.cached_property
    def _rule_slots(self) -> np.ndarray:
        return _zipf_slots(self.rules, self.zipf, SLOTS)

    @functools.cached_property
    def _root_slots(self) -> np.ndarray:
        return _zipf_slots(self.symbols, 0.0, SLOTS)

    @functools.cached_property
    def rewritings(self) -> list[np.ndarray]:
        """For each level, [V, rules, branching]: what symbol and rule are rewritten into."""
        tuples = np.array(list(itertools.product(range(self.symbols), repeat=self.branching)), np.uint8)
        count = self.symbols * self.rules
        chosen = (np.argsort(_noise(f"{self} level {level}", len(tuples), dtype="<u8")) for level in range(self.depth))
        return [tuples[order[:count]].reshape(self.symbols, self.rules, self.branching) for order in chosen]

    @property
    def entropy_rate(self) -> float:
        rule = _entropy(np.bincount(self._rule_slots) / SLOTS)
        root = _entropy(np.bincount(self._root_slots) / SLOTS)
        return (root + (self.length - 1) / (self.branching - 1) * rule) / self.length

    def best_loss(self, seq_len: int) -> float:
        _require(seq_len % self.length == 0, "data.seq_len", seq_len, f"a multiple of {self.length}, a string's length")
        return self.entropy_rate

    def sample(self, num_windows: int, seq_len: int, key: str) -> np.ndarray:
        num_strings = num_windows * (seq_len // self.length)
        x = self._root_slots[_noise(f"{key} root", num_strings)][:, None]
        for level, into in enumerate(self.rewritings):
            x = into[x, self._rule_slots[_noise(f"{key} level {level}", *x.shape)]].reshape(num_strings, -1)
        x[:, 0] += np.uint8(self.symbols)
        return x.reshape(num_windows, seq_len)

    def negative_log_probability(self, x_WT: np.ndarray) -> np.ndarray:
        """Reads the leaves back, level by level; infinite for what the grammar cannot have made."""
        place = self.symbols ** np.arange(self.branching)[::-1]
        log_rule = np.log(np.bincount(self._rule_slots, minlength=self.rules) / SLOTS)
        x = x_WT.reshape(-1, self.length).astype(np.int64)
        capital = x >= self.symbols
        misplaced = (capital != (np.arange(self.length) == 0)).any(axis=1)
        total = np.where(misplaced, np.inf, 0.0)
        x -= self.symbols * capital
        for into in reversed(self.rewritings):
            of = np.full(self.symbols**self.branching, -1)
            of[(into @ place).ravel()] = np.arange(self.symbols * self.rules)
            made = of[x.reshape(len(x), -1, self.branching) @ place]
            total += np.where(made >= 0, -log_rule[made % self.rules], np.inf).sum(axis=1)
            x = np.maximum(made, 0) // self.rules
        total -= np.log(np.bincount(self._root_slots, minlength=self.symbols) / SLOTS)[x[:, 0]]
        return total.reshape(len(x_WT), -1).sum(axis=1)


PROCESSES: dict[str, Any] = {"markov": Markov, "hierarchy": Hierarchy}


def is_synthetic(source: str) -> bool:
    return source.startswith(PREFIX)


@functools.lru_cache(maxsize=4)  # a process with its tables, kept between the calls that prepare, open and time
def process(source: str) -> Process:
    """The process that ``synthetic:<name>[?key=value&…]`` names.

    Raises ValueError in one line: what is wrong and what to write instead.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    try:
        if name not in PROCESSES:
            raise ValueError(f"there is no process {name!r}: write one of {', '.join(PROCESSES)}")
        fields = {f.name: f for f in dataclasses.fields(PROCESSES[name])}
        given: dict[str, Any] = {}
        for item in filter(None, query.split("&")):
            key, _, text = item.partition("=")
            if key not in fields or key in given:
                wrong = "given twice" if key in given else "not a parameter"
                raise ValueError(f"{key!r} is {wrong}: write any of {', '.join(fields)}")
            given[key] = _number(key, text, fields[key].type)  # type: ignore[arg-type]  # int or float, not their names
        return PROCESSES[name](**given)
    except ValueError as e:
        raise ValueError(f"data.source is {source!r}: {e}") from None


def _number(key: str, text: str, kind: type) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    _require(math.isfinite(value), key, text, "an integer" if kind is int else "a number")
    return value
