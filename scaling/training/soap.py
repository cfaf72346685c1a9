"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioner.

For a matrix of gradient G (m, n), with the running means L of G Gᵀ and R of Gᵀ G at β2 and their eigenbases Q_L, Q_R:

    M ← β1 M + (1 - β1) G        G' = Q_Lᵀ G Q_R,  M' = Q_Lᵀ M Q_R
    V ← β2 V + (1 - β2) G'²      update = Q_L (M̂' / (√V̂ + ε)) Q_Rᵀ     (hats: Adam's bias corrections)
    L, R, then every ``every`` steps Q ← qr(L Q), its columns in order of the eigenvalues they estimate, V's alike

as in the authors' code: the first gradient only sets the bases (by ``eigh``) and moves nothing. No library that is kept
has it for JAX: optax 0.2.8 has none, and what there is are copies in other people's projects.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# A side longer than this is left as it is, as the authors do: its basis would take its square in memory.
MAX_SIDE = 10_000


class ScaleBySoapState(NamedTuple):
    """``mu`` and ``nu`` have their parameter's shape; ``left``, ``right`` and their bases are (…, m, m) and (…, n, n),
    the axes that are no side of the matrix first; None where a side is too long."""

    count: jax.Array
    mu: dict
    nu: dict
    left: dict
    right: dict
    left_basis: dict
    right_basis: dict


def scale_by_soap(
    beta1, beta2, eps, matrices: Mapping[str, tuple[int, int]], *, every: int, mu_dtype=jnp.float32
) -> optax.GradientTransformation:
    """Returns SOAP's direction for parameters by name; ``matrices``: of each its axes (rows, columns).

    ``every``: steps between two looks for new bases. The rates may be traced.
    """

    def init(params):
        def zeros(name, side):
            x = _as_matrices(params[name], matrices[name])
            size = x.shape[side]
            return None if size > MAX_SIDE else jnp.zeros((*x.shape[:-2], size, size), x.dtype)

        mine = [n for n in matrices if n in params and not isinstance(params[n], optax.MaskedNode)]
        left, right = ({n: zeros(n, side) for n in mine} for side in (-2, -1))
        return ScaleBySoapState(
            count=jnp.zeros((), jnp.int32),
            mu={n: jnp.zeros_like(params[n], mu_dtype) for n in mine},
            nu={n: jnp.zeros_like(params[n]) for n in mine},
            left=left, right=right, left_basis=left, right_basis=right,
        )  # fmt: skip

    def update(updates, state, params=None):
        new = {field: {} for field in ("mu", "nu", "left", "right", "left_basis", "right_basis")}
        out = dict(updates)
        for n in state.mu:
            one = {field: getattr(state, field)[n] for field in new}
            direction, one = _step(updates[n], one, state.count, beta1, beta2, eps, matrices[n], every)
            out[n] = direction
            for field, value in one.items():
                new[field][n] = value
        return out, ScaleBySoapState(state.count + 1, **new)

    return optax.GradientTransformation(init, update)


def _step(gradient, s: dict, count, beta1, beta2, eps, axes: tuple[int, int], every: int):
    """One matrix (or stack of them): the direction, and its state after it."""
    G = _as_matrices(gradient, axes)
    M, V = (_as_matrices(s[field], axes) for field in ("mu", "nu"))
    L = _ema(s["left"], G @ G.mT, beta2)
    R = _ema(s["right"], G.mT @ G, beta2)
    bases = (s["left_basis"], s["right_basis"])

    def begin(_):
        return jnp.zeros_like(G), M, V, *(None if x is None else _eigenbasis(x) for x in (L, R))

    def go_on(_):
        m = beta1 * M.astype(G.dtype) + (1 - beta1) * G
        v = beta2 * V + (1 - beta2) * jnp.square(_rotated(G, *bases))
        m_hat, v_hat = m / (1 - beta1**count), v / (1 - beta2**count)
        direction = _back(_rotated(m_hat, *bases) / (jnp.sqrt(v_hat) + eps), *bases)
        new = jax.lax.cond(count % every == 0, lambda: _refreshed(v, (L, R), bases), lambda: (v, *bases))
        return direction, m.astype(M.dtype), *new

    direction, m, v, left_basis, right_basis = jax.lax.cond(count == 0, begin, go_on, None)
    back = {"mu": _as_given(m, axes), "nu": _as_given(v, axes), "left": L, "right": R}
    return _as_given(direction, axes), {**back, "left_basis": left_basis, "right_basis": right_basis}


def _refreshed(V, grams, bases):
    """V and the bases after one step of orthogonal iteration, columns in order of their estimated eigenvalues."""
    new = []
    for side, (gram, Q) in enumerate(zip(grams, bases)):
        if Q is None:
            new.append(None)
            continue
        order = jnp.argsort(-jnp.einsum("...ij,...ik,...kj->...j", Q, gram, Q), axis=-1)
        along = order[..., :, None] if side == 0 else order[..., None, :]
        V = jnp.take_along_axis(V, along, axis=side - 2)
        Q = jnp.take_along_axis(Q, order[..., None, :], axis=-1)
        new.append(jnp.linalg.qr(gram @ Q)[0])
    return V, *new


def _eigenbasis(gram):
    """Eigenvectors as columns, the largest eigenvalue first."""
    return jnp.linalg.eigh(gram)[1][..., ::-1]


def _ema(mean, value, beta):
    return None if mean is None else beta * mean + (1 - beta) * value


def _rotated(x, left, right):
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def _back(x, left, right):
    x = x if left is None else left @ x
    return x if right is None else x @ right.mT


def _as_matrices(x, axes: tuple[int, int]):
    return jnp.moveaxis(x, axes, (-2, -1))


def _as_given(x, axes: tuple[int, int]):
    return jnp.moveaxis(x, (-2, -1), axes)
