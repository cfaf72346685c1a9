"""Tiny runs on a corpus of a few kilobytes, for the tests of the training loop."""

import contextlib
import dataclasses
import functools
import json
import random

import jax

from scaling import data
from scaling.config import DataConfig, DivergenceConfig, EvalConfig, Horizon, OptimConfig, RunConfig, ScheduleConfig
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families.transformer import TransformerConfig
from scaling.grid import Cell
from scaling.training import loop, models

EXECUTION = ExecutionConfig(mesh=MeshConfig(data=1, fsdp=8), checkpoint_seconds=1e9, eval_batch_size=8)


# For what runs once or twice and is held against an oracle: LLVM would optimise it for longer than it runs.
QUICK = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.partial(quick_jit, static_argnums=0)
def initial(config, seed):
    """A model's first parameters. The seed is an argument: XLA would fold the random numbers of a constant one, for
    tens of seconds."""
    return models.init(config, jax.random.key(seed))


def make_corpus(folder, cache):
    """(DataConfig, cache folder) of forty short documents."""
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "loss", "law", "power", "of"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=60)) + f" {i}\n")
    config = DataConfig(source=f"text:{folder}", seq_len=16, validation_fraction=0.2)
    data.prepare(config, cache)
    return config, cache


def cell(data_config, steps=24, seed=0, holdout=False, schedule=None, dropout=0.0, **optim):
    model = TransformerConfig(
        d_model=16, num_layers=1, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=32, dropout=dropout
    )  # fmt: skip
    optim = {"peak_lr": 0.01, "warmup_tokens": 128, "schedule": ScheduleConfig(**(schedule or {}))} | optim
    run = RunConfig(
        model,
        OptimConfig(**optim),
        Horizon(steps=steps),
        batch_size=8,
        data=data_config,
        eval=EvalConfig(num_points=6, curve_tokens=256),
        divergence=DivergenceConfig(patience_steps=5),
        seed=seed,
    )
    return Cell(run, holdout, labels={"size": 16})


def train(cells, corpus, folder, execution=EXECUTION, **kw):
    return loop.train(
        cells, execution=execution, workdir=folder / "work", results=folder / "results", cache_dir=corpus[1],
        sweep_name="t", **kw,
    )  # fmt: skip


def essence(record):
    """What must not depend on how often training was cut off, nor on who trained which steps."""
    fields = dataclasses.asdict(record)
    return json.dumps({k: v for k, v in fields.items() if k not in ("environment", "timing")})


@contextlib.contextmanager
def progress_at_every_step():
    original, loop._PROGRESS_SECONDS = loop._PROGRESS_SECONDS, 0.0
    try:
        yield
    finally:
        loop._PROGRESS_SECONDS = original
        loop.stop_requested.clear()


def train_and_stop_at(step, *args, **kw):
    """Trains as ``train`` does and asks to stop when progress says ``step``; the records, or None if it stopped."""

    def stop(event):
        if event["event"] == "progress" and event["step"] == step:
            loop.stop_requested.set()

    with progress_at_every_step():
        try:
            return train(*args, **kw, on_event=stop)
        except loop.Interrupted:
            return None
