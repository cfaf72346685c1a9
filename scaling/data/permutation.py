"""A permutation of any range that is a function: nothing is shuffled, so nothing has to be kept."""

import functools
import hashlib
import math

import numpy as np

_NUM_ROUNDS = 8


@functools.lru_cache(maxsize=256)
def _round_keys(key: str) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * _NUM_ROUNDS), "<u8")


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where the permutation of range(``size``) that ``key`` names sends ``index`` (uint64 in, uint64 out).

    O(1) per element and nothing to keep, unlike a shuffled array, and the same under every version of numpy, unlike
    numpy.random. A Feistel network on pairs (left, right) in Z_a × Z_b, ab ≥ size: each round adds to one half a hash
    of the other, which can be undone, so it is a bijection; what falls on the ab - size < a numbers outside is sent
    through again until it is inside (cycle walking; Black and Rogaway 2002).
    """
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)
    out = _feistel(index, np.uint64(a), np.uint64(b), _round_keys(key))
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], np.uint64(a), np.uint64(b), _round_keys(key))
    return out


def _feistel(x: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(x, b)
    for i in range(0, _NUM_ROUNDS, 2):
        left = (left + _mix(right ^ keys[i]) % a) % a
        right = (right + _mix(left ^ keys[i + 1]) % b) % b
    return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
