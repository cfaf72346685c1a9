"""Chunked losses and accumulated gradients against the whole batch at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling import accounting
from scaling.config import Horizon, OptimConfig, RunConfig
from scaling.execution import ExecutionConfig
from scaling.families.transformer import TransformerConfig
from scaling.training import models, optimizers, sharding, step
from scaling.training.losses import likelihood
from scaling.training.models import transformer
from tests.training.lab import initial, quick_jit

MODEL = TransformerConfig(
    d_model=16, num_layers=2, num_heads=4, head_dim=4, num_kv_heads=2, d_ff=32, vocab_size=48, activation="swiglu"
)
RUN = RunConfig(MODEL, OptimConfig(0.01, 0, z_loss=1e-2), Horizon(steps=20), batch_size=8)


def tokens(rows=8, length=13, vocab=48):
    return np.random.default_rng(0).integers(0, vocab, (rows, length), dtype=np.int32)


def reference_losses(params, tokens_BS):
    """From the definition, in float64, with logits the model's own."""
    logits = np.asarray(models.apply(MODEL, ExecutionConfig(), params, tokens_BS[:, :-1]), np.float64)
    normalizer = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
    return normalizer - np.take_along_axis(logits, tokens_BS[:, 1:, None], -1)[..., 0], normalizer


# 12 tokens in each of 8 rows: one token a row at a time, a divisor, one that leaves a rest, all.
@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 40])
def test_chunked_losses_are_the_definition(chunk):
    params, execution = initial(MODEL, 0), ExecutionConfig(loss_chunk_tokens=chunk)
    found = quick_jit(lambda p, t: likelihood.losses(RUN, execution, p, {"tokens": t}))(params, tokens())
    for ours, want in zip((found.loss_BT, found.log_normalizer_BT), reference_losses(params, tokens())):
        assert_allclose(ours, want, rtol=1e-5, atol=2e-6)


@functools.cache
def loss_and_update(execution, num_layers):
    """The loss and the gradient of one train step without chunks, without parts, or with."""
    model = dataclasses.replace(MODEL, num_layers=num_layers)
    optim = OptimConfig(1.0, 0, name="sgd", weight_decay=0.0, clip_norm=None)
    plain = dataclasses.replace(RUN, model=model, optim=optim)
    hp = {k: jnp.asarray(v) for k, v in optimizers.hyperparams(optim, accounting.plan(plain)).items()}
    hp |= {"z_loss": jnp.float32(1e-2)}
    start = initial(model, 0)
    state = {"step": jnp.int32(0), "hparams": hp, "params": start, "opt": optimizers.transform(
        optim, hp, transformer.param_specs(model)).init(start)}  # fmt: skip
    state, metrics = quick_jit(lambda s, t: step.train_step(plain, execution, s, {"tokens": t}))(state, tokens())
    return metrics["loss"], {n: start[n] - state["params"][n] for n in start}


BOTH = ExecutionConfig(accumulation_steps=2, loss_chunk_tokens=16, remat="full")


@pytest.mark.slow
@pytest.mark.parametrize(
    "execution, num_layers",
    [(ExecutionConfig(loss_chunk_tokens=40), 2), (ExecutionConfig(accumulation_steps=4), 2), (BOTH, 2), (BOTH, 1)],
    ids=["chunks", "parts", "both", "both, one layer"],
)  # fmt: skip
def test_chunks_and_parts_change_rounding_only(execution, num_layers):
    whole, gradient = loss_and_update(ExecutionConfig(), num_layers)
    loss_, other = loss_and_update(execution, num_layers)
    assert_allclose(loss_, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, other)


@pytest.mark.parametrize(
    "batch_size, seq_len, num_parts",
    [(16, 256, 4), (16, 128, 2), (8, 128, 1), (6, 1024, 6), (14, 256, 2), (1, 4096, 1)],
)
def test_what_is_split_by_itself(batch_size, seq_len, num_parts):
    """On a CPU that computes alone, in the most equal parts of 1,024 tokens or more; else as it is written."""
    run = dataclasses.replace(RUN, batch_size=batch_size, data=dataclasses.replace(RUN.data, seq_len=seq_len))
    assert step._num_parts(run, None) == num_parts
    assert step._num_parts(run, 1) == 1
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))):
        assert step._num_parts(run, None) == 1


def test_what_is_chunked_by_itself():
    """16 rows of 128 bytes stay whole; 8 of 2,048 tokens of a vocabulary of 32,000 are 2 GB, in parts of 128 MiB."""
    assert likelihood._chunk_length(None, rows=16, length=128, vocab_size=256) == 128
    C = likelihood._chunk_length(None, rows=8, length=2048, vocab_size=32_000)
    assert abs(2048 / C - 8 * 2048 * 32_000 * 4 / 2**27) < 1
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))):
        assert likelihood._chunk_length(None, rows=8, length=2048, vocab_size=32_000) == pytest.approx(8 * C, rel=0.02)


@pytest.mark.slow
def test_logits_of_a_large_vocabulary_are_never_whole():
    """2 rows of 1,024 tokens, 32,000 words: 262 MB of logits in float32, which the step without chunks has at least
    once; chunks of a sixteenth, in the few copies that a softmax and its gradient need, stay below a third of that."""
    model = dataclasses.replace(MODEL, num_layers=1, vocab_size=32_000)
    params = jax.eval_shape(lambda: models.init(model, jax.random.key(0)))
    batch = jax.ShapeDtypeStruct((2, 1025), jnp.int32)
    run = dataclasses.replace(RUN, model=model, data=dataclasses.replace(RUN.data, seq_len=1024), batch_size=2)

    def temporaries(chunk):
        def objective(p, t):
            return jnp.mean(likelihood.losses(run, ExecutionConfig(loss_chunk_tokens=chunk), p, {"tokens": t}).loss_BT)

        compiled = quick_jit(jax.grad(objective)).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 2 * 1024 * 32_000 * 4
    assert temporaries(2048) > whole
    assert temporaries(128) < whole / 3
