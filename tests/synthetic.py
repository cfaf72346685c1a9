"""A results folder made from a known law: what a sweep would have left behind, with the truth at hand.

L(N, D) = E + A N^-α + B D^-β, with N non-embedding parameters, plus Gaussian noise; the constants are near those of
byte-level language models on source code. Curves are those of a constant rate with a linear cooldown: above the law
until the last fifth of the run, on it at the last step.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from scaling import accounting, records
from scaling.config import Horizon, OptimConfig, RunConfig
from scaling.families.transformer import TransformerConfig
from scaling.fields import from_dict, to_dict

LAW = {"E": 0.70, "A": 11.0, "alpha": 0.29, "B": 800.0, "beta": 0.54}
SIZES = ((16, 2), (24, 2), (32, 2), (48, 2), (48, 3), (64, 3))  # width, layers
BUDGETS = (3e11, 6e11, 1.2e12)
HELD_OUT_BUDGET = 2.4e12
NOISE = 0.004  # nats per token
ENVIRONMENT = {"python": "3.11.7", "jax": "0.10.2", "devices": ["TFRT_CPU_0"], "git_commit": "0" * 40, "dirty": False}


def law(num_params, num_tokens):
    """The truth, nats per token."""
    return LAW["E"] + LAW["A"] * num_params ** -LAW["alpha"] + LAW["B"] * num_tokens ** -LAW["beta"]


def run_config(
    size=(32, 2), *, flops: float | None = None, tokens: float | None = None, peak_lr=None, seed=0
) -> RunConfig:
    """A run of the default grid's kind: width × layers, byte vocabulary, 16 × 128 tokens a batch."""
    width, layers = size
    heads = max(1, width // 16)
    model = TransformerConfig(
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        head_dim=width // heads,
        num_kv_heads=heads,
        d_ff=4 * width,
    )
    num_params = accounting.param_counts(model)["non_embedding"]
    if peak_lr is None:
        peak_lr = 0.01 * (num_params / 5e4) ** (-1 / 3)
    optim = OptimConfig(peak_lr=peak_lr, warmup_tokens=num_params)
    return RunConfig(model=model, optim=optim, horizon=Horizon(flops=flops, tokens=tokens), batch_size=16, seed=seed)


def with_seed(record: records.RunRecord, seed: int) -> records.RunRecord:
    """The record of the same run, had it had another seed and come out the same."""
    run = dataclasses.replace(from_dict(RunConfig, record.config), seed=seed)
    return dataclasses.replace(record, run_id=run.run_id, config=to_dict(run))


def record(run: RunConfig, *, loss: float | None, holdout=False, labels=None, rng, status="completed"):
    """A record of ``run`` whose final loss is ``loss`` (null: it diverged two fifths of the way)."""
    plan = accounting.plan(run)
    last = plan.num_steps if loss is not None else round(0.4 * plan.num_steps)
    num_tokens = last * plan.batch_tokens
    return records.RunRecord(
        run_id=run.run_id,
        status=status,
        config=to_dict(run),
        sweep={
            "name": "synthetic",
            "holdout": holdout,
            "recipe": "default-1",
            "labels": {"size": f"{run.model.d_model}x{run.model.num_layers}", **(labels or {})},
        },
        num_params=plan.num_params,
        num_tokens=num_tokens,
        num_steps=last,
        batch_tokens=plan.batch_tokens,
        unique_tokens=11_600_000,
        epochs=num_tokens / 11_600_000,
        tokens_per_param=num_tokens / plan.num_params["non_embedding"],
        flops={rule: f * num_tokens / plan.num_tokens for rule, f in plan.flops.items()},
        loss=loss,
        loss_standard_error=None if loss is None else 0.0031,
        bits_per_byte=None if loss is None else loss / math.log(2),
        num_eval_tokens=0 if loss is None else 480_000,
        diverged_at_step=last if status == "diverged" else None,
        curve=_curve(run, plan, last, loss, rng),
        data={"source": "python-stdlib", "tokenizer": "bytes", "fingerprint": "f" * 64, "tokens_per_byte": 1.0},
        environment=ENVIRONMENT,
        timing={"seconds": last * 0.02, "step_seconds": last * 0.019, "tokens_per_s": 1e5, "flops_per_s": 3e10},
    )


def _curve(run: RunConfig, plan: accounting.Plan, last: int, loss: float | None, rng) -> dict:
    steps = np.unique(np.geomspace(8, last, 20).round().astype(int))
    tokens = steps * plan.batch_tokens
    annealed = law(plan.num_params["non_embedding"], tokens)
    cooled = np.clip((steps - 0.8 * plan.num_steps) / (0.2 * plan.num_steps), 0, 1)
    losses = np.minimum(annealed * (1 + 0.06 * (1 - cooled)), math.log(256)) + 2 * NOISE * rng.normal(size=steps.size)
    if loss is not None:
        losses[-1] = loss
    else:
        losses[-3:] = (2.4, 4.9, 8.8)
    warm = np.minimum(1, steps / max(1, plan.warmup_steps))
    return {
        "step": steps.tolist(),
        "num_tokens": tokens.tolist(),
        "loss": losses.tolist(),
        "standard_error": [0.012] * steps.size,
        "num_eval_tokens": [32_768] * (steps.size - 1) + [480_000],
        "train_loss": (losses + 0.02 * rng.normal(size=steps.size)).tolist(),
        "learning_rate": (run.optim.peak_lr * warm * (1 - cooled)).tolist(),
        "grad_norm": (0.5 + 2 * steps**-0.5).tolist(),
    }


def sweep_records(
    *, sizes=SIZES, budgets=BUDGETS, held_out_budget=HELD_OUT_BUDGET, noise=NOISE, seed=0, diverged=True
) -> list[records.RunRecord]:
    """Budgets × sizes at equal exact FLOPs, a held-out budget above them (null: none), one diverged run besides."""
    rng = np.random.default_rng(seed)
    out = []
    for budget in [*budgets, *([held_out_budget] if held_out_budget else [])]:
        for size in sizes:
            run = run_config(size, flops=budget)
            plan = accounting.plan(run)
            truth = law(plan.num_params["non_embedding"], plan.num_tokens)
            held = budget == held_out_budget
            loss = float(truth + noise * rng.normal())
            out.append(record(run, loss=loss, holdout=held, labels={"budget_flops": budget}, rng=rng))
    if diverged:
        run = run_config(sizes[-1], flops=budgets[-1], peak_lr=0.3)
        labels = {"budget_flops": budgets[-1]}
        out.append(record(run, loss=None, labels=labels, rng=rng, status="diverged"))
    return out


def learning_rate_records(*, sizes=SIZES[::2], tokens=(5e5, 2e6), factors=(0.25, 0.5, 1, 2, 4), seed=0):
    """Sizes × horizons × rates; in every cell the best rate is .01 (N/5e4)^(-1/3), the middle of ``factors``."""
    rng = np.random.default_rng(seed)
    out = []
    for size in sizes:
        for horizon in tokens:
            best = run_config(size, tokens=horizon)
            plan = accounting.plan(best)
            for factor in factors:
                run = run_config(size, tokens=horizon, peak_lr=best.optim.peak_lr * factor)
                loss = law(plan.num_params["non_embedding"], plan.num_tokens) + 0.04 * math.log(factor) ** 2
                out.append(record(run, loss=float(loss), labels={"lr_factor": factor}, rng=rng))
    return out


def manifest(runs: list[records.RunRecord], name="synthetic") -> dict:
    """The sweep.json that the sweep command would have written."""
    return {
        "schema": 1,
        "name": name,
        "grid": "base:\n  batch_size: 16\nisoflop:\n  budgets: [3e11, 6e11, 1.2e12]\n",
        "grid_path": f"sweeps/{name}.yaml",
        "command": f"python -m scaling.sweep --grid sweeps/{name}.yaml",
        "cells": [
            {
                "run_id": r.run_id,
                "holdout": r.sweep["holdout"],
                "labels": r.sweep["labels"],
                "recipe": r.sweep["recipe"],
                "num_params": r.num_params,
                "num_tokens": r.num_tokens,
                "num_steps": r.num_steps,
                "flops": r.flops,
                "predicted_seconds": 1.1 * r.timing["seconds"],
                "status": r.status,
            }
            for r in runs
        ],
        "plan": {"predicted_seconds": 420.0, "workers": 2},
        "actual": {"wall_seconds": 447.0, "seconds_in_steps": 812.0, "fraction_not_in_steps": 0.092},
        "environment": ENVIRONMENT,
    }


def write(folder: Path, runs: list[records.RunRecord], name="synthetic") -> Path:
    """Writes records and manifest; the fit is left to the caller."""
    for run in runs:
        records.save(folder, run)
    records.write_json(Path(folder) / "sweep.json", manifest(runs, name))
    return Path(folder)


def failed(run: records.RunRecord) -> records.RunRecord:
    """The same cell as if its worker had died three times: no loss, an empty curve."""
    empty = {name: [] for name in run.curve}
    return dataclasses.replace(
        run, status="failed", loss=None, loss_standard_error=None, bits_per_byte=None, num_tokens=0, num_steps=0,
        epochs=0.0, tokens_per_param=0.0, flops=dict.fromkeys(run.flops, 0.0), curve=empty, num_eval_tokens=0,
    )  # fmt: skip
