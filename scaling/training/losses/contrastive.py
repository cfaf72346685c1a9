"""Losses of pairs of spans, each told from the second spans of other rows.

Shapes: B rows, N = 2 B spans, two of a row beside each other, C tokens of a span, D d_model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.config import RunConfig
from scaling.execution import ExecutionConfig
from scaling.training import models
from scaling.training.losses import Losses
from scaling.training.models.parameters import ParamSpec


def param_specs(run: RunConfig) -> dict[str, ParamSpec]:
    return {}


def losses(run: RunConfig, execution: ExecutionConfig, params, batch) -> Losses:
    """Cross entropy in nats of each row's own pair among its candidates, (B, 1) (van den Oord et al. 2018, equation 4).

    With a_i and p_i the first and the second span of row i at unit length, τ the temperature and n the negatives,
    -log exp(a_i p_i / τ) / Σ_j exp(a_i p_j / τ), j being i, i + 1, …, i + n modulo B. Where rows have a ``group`` (of
    validation), j are the rows of that, n + 1 of them. ``accuracy`` is kept as a measure: how often a row's own pair is
    more alike than each of the others.
    """
    config, spans, lengths_B1 = run.objective, batch["spans"], batch["length"]
    B, C = spans.shape[0], config.span  # type: ignore[attr-defined]  # its own config
    keys = {}
    if "keys" in batch:  # one of each span's own
        keys_B2 = jax.vmap(lambda key: jax.random.split(key, 2))(batch["keys"])
        keys = {"keys_B": keys_B2.reshape(2 * B)}
    tokens_NC = nn.with_logical_constraint(spans.reshape(2 * B, C), ("batch", "seq"))
    lengths_N1 = jnp.repeat(lengths_B1, 2, axis=0)
    present_NC = jnp.arange(C)[None] < lengths_N1
    network = models.network(run.model)
    found = network.hidden(run.model, execution, params, tokens_NC, causal=False, present_BT=present_NC, **keys)

    spans_B2D = at_unit_length(found.h_BTD, present_NC, lengths_N1).reshape(B, 2, -1)
    own_BD, pair_BD = spans_B2D[:, 0], nn.with_logical_constraint(spans_B2D[:, 1], (None, None))
    # Not in fewer bits than float32 has: what is divided by the temperature would be off by as much more.
    product_BB = jnp.matmul(own_BD, pair_BD.T, precision=jax.lax.Precision.HIGHEST)
    similarity_BB = nn.with_logical_constraint(product_BB, ("batch", None)) / config.temperature  # type: ignore[attr-defined]  # likewise
    i_B1, j_1B = jnp.arange(B)[:, None], jnp.arange(B)[None]
    if "group" in batch:
        candidate_BB = batch["group"][:, None] == batch["group"][None]
    else:
        candidate_BB = (j_1B - i_B1) % B <= config.negatives  # type: ignore[attr-defined]  # likewise
    own_B1 = jnp.sum(jnp.where(i_B1 == j_1B, similarity_BB, 0.0), axis=1, keepdims=True)
    normalizer_B1 = jax.nn.logsumexp(jnp.where(candidate_BB, similarity_BB, -jnp.inf), axis=1, keepdims=True)
    others_BB = jnp.where(candidate_BB & (i_B1 != j_1B), similarity_BB, -jnp.inf)
    weights_B1 = batch["weights"]
    right_B1 = weights_B1 * (own_B1 > jnp.max(others_BB, axis=1, keepdims=True))
    measures = {**found.measures, "accuracy": (right_B1[:, 0], weights_B1[:, 0])}
    return Losses(normalizer_B1 - own_B1, weights_B1, penalty=found.penalty, measures=measures)


def at_unit_length(h_NCD, present_NC, lengths_N1):
    """The mean over a span's own tokens, divided by its length as a vector, float32 (N, D)."""
    sum_ND = jnp.sum(jnp.where(present_NC[..., None], h_NCD.astype(jnp.float32), 0.0), axis=1)
    mean_ND = sum_ND / jnp.maximum(lengths_N1, 1)
    return mean_ND * jax.lax.rsqrt(jnp.maximum(jnp.sum(mean_ND**2, axis=1, keepdims=True), 1e-12))
