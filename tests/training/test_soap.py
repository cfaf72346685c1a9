"""SOAP against its equations in NumPy, and what it keeps: sharded as its parameter is, and counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling import accounting
from scaling.config import Horizon, OptimConfig, RunConfig, program_key
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.transformer import TransformerConfig
from scaling.training import models, optimizers, programs, sharding, soap
from tests.training.lab import initial, quick_jit

MODEL = TransformerConfig(d_model=16, num_layers=2, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=32, vocab_size=32)
CONFIG = OptimConfig(0.01, 0, name="soap", beta1=0.9, beta2=0.95, precondition_every=3)


def by_the_paper(gradients, beta1, beta2, eps, every):
    """Vyas et al. 2024, algorithm 3, as its authors run it: the first gradient sets the bases alone."""
    m, n = gradients[0].shape
    L, R, M, V, moves = np.zeros((m, m)), np.zeros((n, n)), np.zeros((m, n)), np.zeros((m, n)), []
    QL, QR = np.eye(m), np.eye(n)
    for t, G in enumerate(gradients):
        if t:
            M, V = beta1 * M + (1 - beta1) * G, beta2 * V + (1 - beta2) * (QL.T @ G @ QR) ** 2
            m_hat, v_hat = (QL.T @ M @ QR) / (1 - beta1**t), V / (1 - beta2**t)
            moves.append(QL @ (m_hat / (np.sqrt(v_hat) + eps)) @ QR.T)
        else:
            moves.append(np.zeros_like(G))
        L, R = beta2 * L + (1 - beta2) * G @ G.T, beta2 * R + (1 - beta2) * G.T @ G
        if t == 0:
            QL, QR = (np.linalg.eigh(x)[1][:, ::-1] for x in (L, R))
        elif t % every == 0:
            left, right = (np.argsort(-np.diag(Q.T @ x @ Q), kind="stable") for Q, x in ((QL, L), (QR, R)))
            V = V[left][:, right]
            QL, QR = np.linalg.qr(L @ QL[:, left])[0], np.linalg.qr(R @ QR[:, right])[0]
    return moves


def test_moves_are_the_papers():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(10, 5, 5))  # square: of a flat one's null space any basis will do
    expected = by_the_paper(gradients, 0.9, 0.95, 1e-8, every=3)
    with jax.enable_x64(True):
        direction = soap.scale_by_soap(0.9, 0.95, 1e-8, {"w": (1, 3)}, every=3)
        # Two matrices, their rows in axis 1 and columns in axis 3: the second is the first, turned round.
        state = direction.init({"w": jnp.zeros((1, 5, 2, 5))})
        update = jax.jit(direction.update)
        for G, move in zip(gradients, expected):
            moved, state = update({"w": jnp.stack([jnp.asarray(G), -jnp.asarray(G)], axis=1)[None]}, state)
            assert_allclose(moved["w"][0, :, 0], move, atol=1e-6)
            assert_allclose(moved["w"][0, :, 1], -move, atol=1e-6)


def test_a_side_that_is_too_long_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(soap, "MAX_SIDE", 6)
    state = soap.scale_by_soap(0.9, 0.95, 1e-8, {"w": (0, 1)}, every=3).init({"w": jnp.zeros((4, 8))})
    assert state.left["w"].shape == (4, 4)
    assert state.right["w"] is None


@pytest.mark.slow
def test_everything_else_moves_by_adam():
    specs = models.param_specs(MODEL)
    run = RunConfig(MODEL, CONFIG, Horizon(steps=10), batch_size=4)
    hp = jax.tree.map(jnp.asarray, optimizers.hyperparams(CONFIG, accounting.plan(run)))
    start = initial(MODEL, 0)
    rng = np.random.default_rng(0)
    gradient = {n: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for n, s in specs.items()}
    transform = optimizers.transform(CONFIG, hp, specs)
    moved, _ = quick_jit(transform.update)(gradient, transform.init(start), start)
    for name, spec in specs.items():
        expected = 0 if spec.matrix else 1  # the first gradient sets the bases; Adam's first step is the sign
        assert_allclose(np.abs(moved[name]), expected, rtol=1e-3, err_msg=name)


def test_what_it_keeps_is_counted():
    specs = models.param_specs(MODEL)
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, momentum_dtype=dtype)
        run = RunConfig(MODEL, config, Horizon(steps=10), batch_size=4)
        hp = optimizers.hyperparams(config, accounting.plan(run))
        start = jax.eval_shape(lambda: models.init(MODEL, jax.random.key(0)))
        state = jax.eval_shape(lambda p, c=config, h=hp: optimizers.transform(c, h, specs).init(p), start)
        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((start, state)) if x.ndim)
        assert accounting.plan(run).state_bytes == kept
    muon = dataclasses.replace(CONFIG, name="muon", precondition_every=10)
    assert accounting.plan(dataclasses.replace(run, optim=muon)).state_bytes < kept / 1.5


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_squares_are_sharded_as_that_side_of_their_parameter(mesh):
    run = RunConfig(MODEL, CONFIG, Horizon(steps=10), batch_size=8)
    mesh = sharding.make_mesh(mesh, jax.devices())
    with jax.set_mesh(mesh):
        state = programs.lower(program_key(run), ExecutionConfig(), 1, mesh).abstract_state
    squares = state["opt"].inner_states["soap"].inner_state
    for name, rows, columns in (("w_in", "fsdp", "tensor"), ("w_out", "tensor", "fsdp"), ("w_q", "fsdp", "tensor")):
        for field, axis in (("left", rows), ("right", columns)):
            for f in (field, f"{field}_basis"):
                leaf = getattr(squares, f)[name]
                assert tuple(leaf.sharding.spec) == ("run", None, axis, None), (name, f)
                assert leaf.shape[2] == leaf.shape[3]
        assert tuple(squares.mu[name].sharding.spec) == ("run", None, rows, columns)


def test_an_interval_is_soaps_alone():
    with pytest.raises(ValueError, match="precondition_every is 5: write 10"):
        OptimConfig(0.01, 0, name="muon", precondition_every=5)
