"""Optimisers and schedules from their configs.

Everything that may differ between the members of a pack (rate, decay, betas, horizon …) is an array in the state,
``hparams``, and not a constant of the program: cells that differ only there share one compiled step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from scaling.accounting import Plan
from scaling.config import OptimConfig, ScheduleConfig
from scaling.families import ModelConfig
from scaling.training import soap
from scaling.training.models.parameters import ParamSpec, width_multiplier


def hyperparams(optim: OptimConfig, plan: Plan) -> dict[str, np.ndarray]:
    """The per-run scalars that the step reads: float32 rates and int32 steps."""
    floats = {
        "peak_lr": optim.peak_lr,
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "clip_norm": np.inf if optim.clip_norm is None else optim.clip_norm,
        "z_loss": optim.z_loss,
        "final_lr_fraction": optim.schedule.final_lr_fraction,
    }
    steps = {
        "warmup_steps": plan.warmup_steps,
        "num_steps": plan.num_steps,
        "cooldown_steps": plan.cooldown_steps,
    }
    return {k: np.float32(v) for k, v in floats.items()} | {k: np.int32(v) for k, v in steps.items()}


def learning_rate(schedule: ScheduleConfig, hp: dict, step):
    r"""Learning rate of the update that takes the state from ``step`` to ``step + 1``.

    peak_lr · min(1, (step + 1) / warmup_steps) · m, where with S ``num_steps``, W ``warmup_steps``, C
    ``cooldown_steps``, f ``final_lr_fraction``:

    - wsd:          m = f + (1 - f) r, r = min(1, (S - step) / C); 1 - sqrt: r → 1 - sqrt(1 - r)
    - linear:       m = f + (1 - f) (1 - t), t = (step - W) / (S - W) clipped to [0, 1]
    - cosine:       m = f + (1 - f) (1 + cos π t) / 2
    - inverse_sqrt: m = (max(W, 1) / max(W, step + 1))^1/2
    - constant:     m = 1
    """
    step = step.astype(jnp.float32)
    total, warmup, cooldown = (hp[k].astype(jnp.float32) for k in ("num_steps", "warmup_steps", "cooldown_steps"))
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0, 1)
    left = jnp.clip((total - step) / jnp.maximum(cooldown, 1), 0, 1)
    if schedule.cooldown_shape == "1-sqrt":
        left = 1 - jnp.sqrt(1 - left)
    shape = {
        "wsd": left,
        "linear": 1 - progress,
        "cosine": (1 + jnp.cos(jnp.pi * progress)) / 2,
        "inverse_sqrt": jnp.sqrt(jnp.maximum(warmup, 1) / jnp.maximum(warmup, step + 1)),
        "constant": jnp.ones_like(step),
    }[schedule.name]
    decays = schedule.name in ("wsd", "linear", "cosine")
    # Exactly 1 where nothing decays yet, whatever f: runs that differ in f alone share their state up to there.
    decayed = hp["final_lr_fraction"] + (1 - hp["final_lr_fraction"]) * shape
    multiple = jnp.where(shape < 1, decayed, 1.0) if decays else shape
    return hp["peak_lr"] * jnp.minimum(1.0, (step + 1) / jnp.maximum(warmup, 1)) * multiple


def transform(config: OptimConfig, hp: dict, specs: dict[str, ParamSpec]) -> optax.GradientTransformation:
    """The direction of the update, before rate and decay. ``hp`` may hold traced scalars."""
    return OPTIMIZERS[config.name](config, hp, specs)


def _adam(config: OptimConfig, hp: dict, specs) -> optax.GradientTransformation:
    return optax.scale_by_adam(hp["beta1"], hp["beta2"], hp["eps"], mu_dtype=jnp.dtype(config.momentum_dtype))


def _muon(config: OptimConfig, hp: dict, specs) -> optax.GradientTransformation:
    """Matrices only; the rest by Adam. The scale makes an update's RMS that of AdamW's, so that rate and decay carry
    over (Liu et al. 2025, "Muon is scalable", eq. 4)."""
    dims = {n: optax.contrib.MuonDimensionNumbers(*axes) for n, axes in _matrices(specs).items()}

    def scaled(updates, _):
        sides = {n: max(specs[n].shape[axis] for axis in specs[n].matrix) for n in dims}
        return {n: 0.2 * sides[n] ** 0.5 * u if n in sides else u for n, u in updates.items()}

    mu_dtype = jnp.dtype(config.momentum_dtype)
    muon = optax.contrib.scale_by_muon(beta=hp["beta1"], mu_dtype=mu_dtype, weight_dimension_numbers=_only(dims))
    return _for_matrices(optax.chain(muon, optax.stateless(scaled)), config, hp, specs)


def _soap(config: OptimConfig, hp: dict, specs) -> optax.GradientTransformation:
    direction = soap.scale_by_soap(
        hp["beta1"], hp["beta2"], hp["eps"], _matrices(specs), every=config.precondition_every,
        mu_dtype=jnp.dtype(config.momentum_dtype),
    )  # fmt: skip
    return _for_matrices(direction, config, hp, specs)


def _momentum(config: OptimConfig, hp: dict, specs) -> optax.GradientTransformation:
    return optax.trace(hp["beta1"], accumulator_dtype=jnp.dtype(config.momentum_dtype))


def _lion(config: OptimConfig, hp: dict, specs) -> optax.GradientTransformation:
    return optax.scale_by_lion(hp["beta1"], hp["beta2"], mu_dtype=jnp.dtype(config.momentum_dtype))


OPTIMIZERS: dict[str, Callable[[OptimConfig, dict, dict[str, ParamSpec]], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": lambda config, hp, specs: optax.identity(),
    "momentum": _momentum,
    "adagrad": lambda config, hp, specs: optax.scale_by_rss(initial_accumulator_value=0.1, eps=hp["eps"]),
    "lion": _lion,
    "muon": _muon,
    "soap": _soap,
}


def state_axes(config: OptimConfig, specs: dict[str, ParamSpec]) -> dict[tuple[str, str], tuple[str | None, ...]]:
    """Logical axes of what an optimiser keeps in another shape than its parameter's, by (field, parameter).

    SOAP's means and bases are square: rows as that side of the parameter is laid out, columns whole.
    """
    found = {}
    for name, sides in _matrices(specs).items() if config.name == "soap" else ():
        axes = specs[name].logical_axes
        others = [axis for i, axis in enumerate(axes) if i not in sides]
        for field, side in zip(("left", "right"), sides):
            found |= {(f, name): (*others, axes[side], None) for f in (field, f"{field}_basis")}
    return found


def _matrices(specs: dict[str, ParamSpec]) -> dict[str, tuple[int, int]]:
    return {n: spec.matrix for n, spec in specs.items() if spec.matrix is not None}


def _for_matrices(transformation, config: OptimConfig, hp: dict, specs) -> optax.GradientTransformation:
    """The transformation for hidden matrices, Adam for the rest."""
    labels = {n: config.name if spec.matrix is not None else "adam" for n, spec in specs.items()}
    return optax.partition({config.name: transformation, "adam": _adam(config, hp, specs)}, labels)


def _only(dims: dict):
    """The dimension numbers of the arrays that are there (optax hands over masked trees)."""
    return lambda updates: {n: dims.get(n) if not isinstance(u, optax.MaskedNode) else u for n, u in updates.items()}


def rate_multipliers(model: ModelConfig, specs: dict[str, ParamSpec]) -> dict[str, float]:
    """μP: hidden matrices learn at peak_lr / m (Yang et al. 2022, table 8, Adam); 1 elsewhere.

    Decay goes with the rate (see ``update``): rate · λ / m a step, m = d_model / base_d_model, so wide
    models decay less.
    """
    m = width_multiplier(model)
    return {name: 1.0 / m if spec.mup == "hidden" else 1.0 for name, spec in specs.items()}


def decays(optim: OptimConfig, spec: ParamSpec) -> bool:
    """Whether weight decay acts on a parameter: hidden matrices and the head; all of them if configured so."""
    return optim.decay_norms_and_embeddings or spec.decay


def update(model: ModelConfig, optim: OptimConfig, specs, hp: dict, step, grads, opt_state, params):
    """One update: clip, transform, decay, scale. Returns (params, opt_state, {grad_norm, learning_rate}).

    p ← p - η μ_p (u + λ p) with η the schedule's rate, μ_p the μP multiplier, u the transform's direction and λ
    ``weight_decay`` where it acts.
    """
    grad_norm = optax.tree.norm(grads)
    clip = jnp.minimum(1.0, hp["clip_norm"] / jnp.maximum(grad_norm, 1e-30))
    grads = jax.tree.map(lambda g: g * clip, grads)
    directions, opt_state = transform(optim, hp, specs).update(grads, opt_state, params)
    rate = learning_rate(optim.schedule, hp, step)
    multipliers = rate_multipliers(model, specs)

    def new_value(name):
        decay = hp["weight_decay"] if decays(optim, specs[name]) else 0.0
        return params[name] - rate * multipliers[name] * (directions[name] + decay * params[name])

    metrics = {"grad_norm": grad_norm, "learning_rate": rate}
    return {name: new_value(name) for name in params}, opt_state, metrics
