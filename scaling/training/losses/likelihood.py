"""Negative log likelihood of the tokens that an objective asks for, with as many logits at once as there is room for.

Shapes: B rows, T tokens, D d_model, V vocabulary; N chunks of C tokens a row.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling import objectives
from scaling.config import RunConfig
from scaling.execution import ExecutionConfig
from scaling.families import ModelConfig
from scaling.training import models, sharding
from scaling.training.losses import Losses
from scaling.training.models.parameters import ParamSpec

# Logits of a device that may be there at once: with a large vocabulary they would be the step's largest array.
MAX_LOGIT_BYTES = 128 * 2**20


def param_specs(run: RunConfig) -> dict[str, ParamSpec]:
    return {}


def losses(run: RunConfig, execution: ExecutionConfig, params, batch) -> Losses:
    """Negative log likelihood in nats of each target, and logsumexp of the logits for the z-loss.

    ``batch`` is the objective's, its leading axis B. Where ``execution.loss_chunk_tokens`` asks for it, or by itself
    above ``MAX_LOGIT_BYTES`` of float32 logits a device, the tokens of each row are taken in chunks, whose logits the
    backward pass computes again: one more product with the head than without.
    """
    objective = objectives.of(run.objective)
    inputs_BT, targets_BT, weights_BT = objective.read(batch)
    sees: dict[str, Any] = {"mask_documents": run.data.mask_documents}
    if objective.sees == "prefix":
        sees["read_BR"] = batch["read"]
    else:
        sees["causal"] = objective.sees == "causal"
    if "keys" in batch:  # in training, of what draws random numbers
        sees["keys_B"] = batch["keys"]
    hidden = models.network(run.model).hidden(run.model, execution, params, inputs_BT, **sees)
    at_targets = from_hidden(run.model, execution, params, hidden.h_BTD, targets_BT)
    return Losses(at_targets[0], weights_BT, at_targets[1], penalty=hidden.penalty, measures=hidden.measures)


def from_hidden(model: ModelConfig, execution: ExecutionConfig, params, h_BTD, targets_BT):
    """Returns the negative log likelihood of each target, (B, T), and logsumexp of the logits, (B, T), for what
    ``hidden`` gave; in chunks as ``losses`` says."""
    head_DV = models.head(model, params)
    B, T = h_BTD.shape[:2]
    C = _chunk_length(execution.loss_chunk_tokens, B, T, model.vocab_size)
    if C >= T:
        return _from_logits(models.logits(model, head_DV, h_BTD), targets_BT)

    # Gathered once, not by each chunk. Float32, so that the chunks' gradients are added up in float32.
    head_DV = nn.with_logical_constraint(head_DV, (None, "vocab"))

    @jax.checkpoint
    def chunk_losses(head_DV, h_BCD, target_BC):
        return _from_logits(models.logits(model, head_DV, h_BCD), target_BC)

    def one_chunk(_, chunk):
        return None, chunk_losses(head_DV, *chunk)

    _, chunks = jax.lax.scan(one_chunk, None, (_chunked(h_BTD, C), _chunked(targets_BT, C)))
    return tuple(x_NBC.swapaxes(0, 1).reshape(B, -1)[:, :T] for x_NBC in chunks)


def _from_logits(logits_BTV, target_BT):
    log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    at_target_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return log_normalizer_BT - at_target_BT, log_normalizer_BT


def _chunk_length(asked: int | None, rows: int, length: int, vocab_size: int) -> int:
    """Tokens of each row in a chunk, all chunks but the last alike; ``length`` for all of them at once."""
    mesh = sharding.mesh_sizes()
    rows_here = -(-rows // (mesh["data"] * mesh["fsdp"]))
    tokens = asked or MAX_LOGIT_BYTES // (4 * -(-vocab_size // mesh["tensor"]))
    num_chunks = math.ceil(length / max(1, tokens // rows_here))
    return math.ceil(length / num_chunks)


def _chunked(x_BT, C: int):
    """(B, T, …) → (N, B, C, …), the last chunk filled up with zeros."""
    B, T = x_BT.shape[:2]
    N = -(-T // C)
    padded = jnp.pad(x_BT, [(0, 0), (0, N * C - T), *[(0, 0)] * (x_BT.ndim - 2)])
    x_NBC = padded.reshape(B, N, C, *x_BT.shape[2:]).swapaxes(0, 1)
    return nn.with_logical_constraint(x_NBC, (None, "batch", *[None] * (x_NBC.ndim - 2)))
