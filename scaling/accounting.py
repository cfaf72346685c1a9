r"""Parameters by group, FLOPs under every rule, tokens and steps, memory and disk: what a run costs before it runs.

FLOPs are training FLOPs (forward + backward = 3 × forward), one multiply-add counted as two. Rules, per token, with
N ``non_embedding``, L layers, T ``seq_len``, A = H·K the attention width, G·K the key/value width, V the vocabulary:

- ``6ND``        6 N
- ``6ND_total``  6 (N + embedding + unembedding)
- ``kaplan``     3 (2 N_w + 2 L T A), N_w the non-embedding matmul weights (Kaplan et al. 2020, table 1)
- ``chinchilla`` 3 × the forward sum of Hoffmann et al. 2022, appendix F: the embedding as a dense product, unmasked
                 attention, softmax as 3 H T, the head
- ``exact``      3 (2 N_w + 2 L T A + 2 D V): every matmul incl. the head; causal attention, hence T/2 keys a query,
                 in each of its two products
"""

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np

from scaling.config import FlopRule, ModelConfig, RunConfig

FLOP_RULES: tuple[str, ...] = get_args(FlopRule)
PARAM_GROUPS = ("embedding", "attention", "mlp", "norm", "unembedding")


def mlp_matrices(model: ModelConfig) -> int:
    """Matrices of shape (d_model, d_ff) in one block: SwiGLU has a gate besides up and down."""
    return 3 if model.activation == "swiglu" else 2


def param_counts(model: ModelConfig) -> dict[str, int]:
    """Number of parameters by group, and their sums ``non_embedding`` and ``total``.

    A tied head costs no parameters; ``total`` counts the shared table once. Asserted equal to ``jax.eval_shape`` of
    the model in the tests.
    """
    D, L = model.d_model, model.num_layers
    attn_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    norm_per_layer = 2 * D + (2 * model.head_dim if model.qk_norm else 0)
    counts = {
        "embedding": model.vocab_size * D,
        "attention": L * (2 * D * attn_width + 2 * D * kv_width),
        "mlp": L * mlp_matrices(model) * D * model.d_ff,
        "norm": L * norm_per_layer + D,
        "unembedding": 0 if model.tied_embeddings else model.vocab_size * D,
    }
    counts["non_embedding"] = counts["attention"] + counts["mlp"] + counts["norm"]
    counts["total"] = counts["non_embedding"] + counts["embedding"] + counts["unembedding"]
    return counts


def flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool = True) -> dict[str, float]:
    """Training FLOPs per token under every rule (see the module's docstring).

    ``causal=False`` counts the masked half of attention too in ``exact``: what a kernel that computes the full square
    really executes.
    """
    n = param_counts(model)
    L, T, D, V, H = model.num_layers, seq_len, model.d_model, model.vocab_size, model.num_heads
    attn_width = H * model.head_dim
    matmul_weights = n["attention"] + n["mlp"]
    keys_per_query = T / 2 if causal else T
    chinchilla_layer = (
        2 * n["attention"] / L  # queries, keys, values and the output projection
        + 2 * T * attn_width  # logits
        + 3 * H * T  # softmax
        + 2 * T * attn_width  # values
        + 2 * n["mlp"] / L
    )
    return {
        "6ND": 6.0 * n["non_embedding"],
        "6ND_total": 6.0 * n["total"],
        "kaplan": 3.0 * (2 * matmul_weights + 2 * L * T * attn_width),
        "chinchilla": 3.0 * (2 * V * D + L * chinchilla_layer + 2 * D * V),
        "exact": 3.0 * (2 * matmul_weights + 2 * L * 2 * keys_per_query * attn_width + 2 * D * V),
    }


@dataclass(frozen=True)
class Plan:
    """Integers resolved once, and the achieved values that follow from them: rounding is never hidden."""

    run_id: str
    num_params: dict[str, int]
    num_steps: int
    warmup_steps: int
    cooldown_steps: int
    batch_tokens: int
    num_tokens: int  # achieved: num_steps × batch_tokens
    requested_tokens: float  # what the horizon asked for, before rounding to whole steps
    tokens_per_param: float  # num_tokens / non_embedding
    flops: dict[str, float]  # achieved, by rule
    state_bytes: int  # parameters and optimiser state, float32
    memory_bytes: int  # state + gradients + activations of one step, an estimate; see ``activation_bytes``
    checkpoint_bytes: int


def requested_tokens(model: ModelConfig, seq_len: int, batch_size: int, horizon) -> float:
    """Tokens a horizon asks for, before rounding to whole steps."""
    if horizon.tokens is not None:
        return float(horizon.tokens)
    if horizon.steps is not None:
        return float(horizon.steps) * batch_size * seq_len
    if horizon.flops is not None:
        return horizon.flops / flops_per_token(model, seq_len)[horizon.rule]
    return horizon.tokens_per_param * param_counts(model)[horizon.params]


def flat_steps(run: RunConfig, plan: "Plan") -> int:
    """Steps of a run that do not depend on its horizon: up to there the rate is warm-up and constant.

    Runs equal but for horizon and cooldown have equal states up to the smaller of theirs. 0 for a schedule that knows
    its end from the start.
    """
    name = run.optim.schedule.name
    return plan.num_steps - plan.cooldown_steps if name in ("wsd", "constant", "inverse_sqrt") else 0


def eval_steps(num_steps: int, num_points: int) -> list[int]:
    """The steps of a curve: ``num_points`` log-spaced from a hundredth of the run to its end, distinct."""
    if num_points < 2:
        return [num_steps] * num_points
    return sorted({max(1, round(s)) for s in np.geomspace(num_steps / 100, num_steps, num_points)})


# Float32 copies of the parameters that an optimiser keeps beside them.
OPTIMIZER_SLOTS = {"adamw": 2, "adam": 2, "sgd": 0, "momentum": 1, "adagrad": 1, "lion": 1, "muon": 2}


def activation_bytes(model: ModelConfig, seq_len: int, batch_size: int, remat: str = "none") -> int:
    """Bytes kept for the backward pass of one step: a formula for planning, not a measurement.

    Per token and layer about (8 D + 2 A + 2 GK + 2 F·matrices/2) values plus H·T attention weights; with full remat
    only the layer's input. Logits and their gradient in float32 on top.
    """
    width = 4 if model.dtype == "float32" else 2
    attn_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    per_layer = (
        model.d_model
        if remat == "full"
        else 8 * model.d_model + 2 * attn_width + 2 * kv_width + mlp_matrices(model) * model.d_ff
    )
    if remat == "none":
        per_layer += model.num_heads * seq_len
    tokens = batch_size * seq_len
    return int(tokens * (model.num_layers * per_layer * width + 2 * model.vocab_size * 4))


def plan(run: RunConfig, remat: str = "none") -> Plan:
    """Resolves a run's horizon, warm-up and cooldown to whole steps and counts what they cost.

    Raises ValueError when the horizon is shorter than one step.
    """
    asked = requested_tokens(run.model, run.data.seq_len, run.batch_size, run.horizon)
    num_steps = round(asked / run.batch_tokens)
    if num_steps < 1:
        raise ValueError(
            f"horizon asks for {asked:.3g} tokens, less than one batch of {run.batch_tokens}: "
            "write a longer horizon or a smaller batch_size"
        )
    num_tokens = num_steps * run.batch_tokens
    warmup_steps = math.ceil(run.optim.warmup_tokens / run.batch_tokens)
    schedule = run.optim.schedule
    cooldown_steps = round(schedule.cooldown_fraction * num_steps) if schedule.name == "wsd" else 0
    num_params = param_counts(run.model)
    state_bytes = 4 * num_params["total"] * (1 + OPTIMIZER_SLOTS[run.optim.name])
    if run.optim.momentum_dtype == "bfloat16":  # one slot of two bytes
        state_bytes -= 2 * num_params["total"]
    return Plan(
        run_id=run.run_id,
        num_params=num_params,
        num_steps=num_steps,
        warmup_steps=min(warmup_steps, num_steps),
        cooldown_steps=cooldown_steps,
        batch_tokens=run.batch_tokens,
        num_tokens=num_tokens,
        requested_tokens=asked,
        tokens_per_param=num_tokens / num_params["non_embedding"],
        flops={rule: f * num_tokens for rule, f in flops_per_token(run.model, run.data.seq_len).items()},
        state_bytes=state_bytes,
        memory_bytes=state_bytes
        + 4 * num_params["total"]
        + activation_bytes(run.model, run.data.seq_len, run.batch_size, remat),
        checkpoint_bytes=state_bytes,
    )
