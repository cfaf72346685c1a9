"""What a run costs before it runs: parameters, FLOPs under every rule, tokens and steps, memory and disk.

The counts are the family's (``scaling.families``), the rules are in ``counting.RULES``.
"""

import math
from dataclasses import dataclass

import numpy as np

from scaling import families, objectives
from scaling.config import Horizon, RunConfig, num_params_of
from scaling.families import ModelConfig
from scaling.families.counting import RULES, Counts, Lengths
from scaling.objectives import NEXT_TOKEN, ObjectiveConfig


def param_counts(model: ModelConfig) -> dict[str, int]:
    """Number of parameters by group, and their sums ``non_embedding`` and ``total``.

    A tied head costs no parameters; ``total`` counts the shared table once. Asserted equal to ``jax.eval_shape`` of
    the model in the tests.
    """
    return families.of(model).counts(model).num_params


def flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool = True) -> dict[str, float]:
    """Training FLOPs per token under every rule (``counting`` has them).

    ``causal=False`` counts the masked half of attention too in ``exact``: what a kernel that computes the full square
    really executes, or a model that sees both ways. Raises ValueError for a family that reads apart from what it
    writes: how much it reads is its objective's (``flops_of``).
    """
    seen = families.of(model).sees
    if "causal" not in seen:
        raise ValueError(f"model.family is {model.family!r}, which reads apart: count a run of it, by flops_of")
    counts = families.of(model).counts(model, "causal" if causal else "full")
    return _by_rule(counts, Lengths(read=0, written=seq_len, predicted=seq_len))


def _by_rule(counts: Counts, lengths: Lengths) -> dict[str, float]:
    return {name: rule(counts, lengths) for name, rule in RULES.items()}


def trained(model: ModelConfig, objective: ObjectiveConfig = NEXT_TOKEN) -> Counts:
    """Parameters, products and mixings of what a run trains: its model, and what its objective has beside it."""
    of = objectives.of(objective)
    return of.counts(objective, model, families.of(model).counts(model, of.sees))


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


def flops_of(run: RunConfig) -> dict[str, float]:
    """Training FLOPs per token of a run under every rule, as its objective lets tokens see each other."""
    return _by_rule(trained(run.model, run.objective), run.lengths)


def requested_tokens(
    model: ModelConfig, seq_len: int, batch_size: int, horizon: Horizon, objective: ObjectiveConfig = NEXT_TOKEN
) -> float:
    """Tokens a horizon asks for, before rounding to whole steps."""
    if horizon.tokens is not None:
        return float(horizon.tokens)
    if horizon.steps is not None or horizon.flops is not None:
        lengths = objectives.of(objective).lengths(objective, seq_len)
        if horizon.steps is not None:
            return float(horizon.steps) * batch_size * lengths.window
        return horizon.flops / RULES[horizon.rule](trained(model, objective), lengths)  # type: ignore[operator]  # one of two is set
    return horizon.tokens_per_param * num_params_of(trained(model, objective).num_params, horizon.params)  # type: ignore[operator]  # one of four is set


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
OPTIMIZER_SLOTS = {
    "adamw": 2, "adam": 2, "sgd": 0, "momentum": 1, "adagrad": 1, "lion": 1, "muon": 2, "soap": 2,
}  # fmt: skip
# Those that keep another number of copies of hidden matrices: Muon their momentum alone.
MATRIX_SLOTS = {"muon": 1}
# Optimisers that keep a square of each side of a hidden matrix too, so many of them; no side longer than the second.
SQUARES = {"soap": (2, 10_000)}


def optimizer_values(name: str, counts: Counts) -> int:
    """Float32 values that an optimiser keeps beside the parameters: copies of them, and squares of their sides."""
    squares, longest = SQUARES.get(name, (0, 0))
    hidden = [p for p in counts.products if p.is_hidden and p.group != "unembedding"]
    sides = sum(p.copies * side**2 for p in hidden for side in (p.fan_in, p.fan_out) if side <= longest)
    copies = OPTIMIZER_SLOTS[name]
    more = (MATRIX_SLOTS.get(name, copies) - copies) * sum(p.weights for p in hidden)
    return copies * counts.held + more + squares * sides


def activation_bytes(model: ModelConfig, seq_len: int, num_sequences: int, remat: str = "none") -> int:
    """Bytes that a model's layers keep for the backward pass of one step: a formula for planning, not a measurement.

    Per token and layer 8 D values and what the family keeps inside, besides what it keeps for pairs of tokens; with
    full remat only the layer's input.
    """
    width = 4 if model.dtype == "float32" else 2
    family = families.of(model)
    per_layer = model.d_model if remat == "full" else 8 * model.d_model + family.kept_values(model)
    if remat == "none":
        per_layer += family.pair_values(model, seq_len)
    return num_sequences * seq_len * model.num_layers * per_layer * width


def plan(run: RunConfig, remat: str = "none") -> Plan:
    """Resolves a run's horizon, warm-up and cooldown to whole steps and counts what they cost.

    Raises ValueError when the horizon is shorter than one step.
    """
    asked = requested_tokens(run.model, run.data.seq_len, run.batch_size, run.horizon, run.objective)
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
    counts = trained(run.model, run.objective)
    networks = objectives.of(run.objective).networks(run.objective, run.model)
    passes = run.lengths.passes
    sequences = run.lengths.window // passes, run.batch_size * passes
    num_params = counts.num_params
    state_bytes = 4 * (counts.held + optimizer_values(run.optim.name, counts))
    if run.optim.momentum_dtype == "bfloat16":  # one slot of two bytes
        state_bytes -= 2 * counts.held
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
        flops={rule: f * num_tokens for rule, f in flops_of(run).items()},
        state_bytes=state_bytes,
        memory_bytes=state_bytes
        + 4 * counts.held
        + sum(activation_bytes(m, *sequences, remat) for m in networks)
        + int(2 * 4 * run.batch_tokens * counts.num_logits),  # and their gradient, float32
        checkpoint_bytes=state_bytes,
    )
