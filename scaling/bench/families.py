"""What ``python -m scaling.bench --family`` times of a family: its default shapes, and its layers beside those of
another library."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig
from scaling.families import ModelConfig
from scaling.families.encoder_decoder import EncoderDecoderConfig
from scaling.families.experts import ExpertsConfig
from scaling.families.recurrent import CELLS, RecurrentConfig
from scaling.families.transformer import TransformerConfig
from scaling.machine import processor
from scaling.objectives import NEXT_TOKEN, ObjectiveConfig
from scaling.objectives.span_corruption import SpanCorruption

# (width, layers) at about 50K, 300K and 1M non-embedding parameters, heads of 32: the sizes of the published
# comparison with other single-machine trainers, at sequence 256, byte vocabulary, 16 sequences a batch.
TRANSFORMER_SHAPES = ((32, 4), (64, 6), (128, 5))
# Two layers, as the family's rule has it; .1M, .3M and 1M parameters of an LSTM.
RECURRENT_WIDTHS = (64, 128, 256)
COMPARED_TOKENS = 128

# (weights by layer, x_BTD) → h_BTD
Stack = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Benched:
    """A family in the bench.

    Args:
      models: the shapes that are timed.
      objective: under which.
      other: the library whose layers ours are timed beside; None: no such layers.
      compared: the models whose layers are.
      stacks: model, its weights → our stack of layers and the other's, each with its own weights; the same function.
    """

    models: tuple[ModelConfig, ...]
    objective: ObjectiveConfig = NEXT_TOKEN
    other: str | None = None
    compared: tuple[ModelConfig, ...] = ()
    stacks: Callable[[Any, Mapping[str, Any]], tuple[tuple[Stack, Any], tuple[Stack, Any]]] | None = None

    @property
    def runs(self) -> list[RunConfig]:
        data, optim = DataConfig(seq_len=256), OptimConfig(peak_lr=0.01, warmup_tokens=0)
        steps, of = Horizon(steps=100), self.objective
        return [RunConfig(model, optim, steps, batch_size=16, data=data, objective=of) for model in self.models]


def _sizes(width: int, layers: int) -> dict[str, Any]:
    heads = width // 32
    return {
        "d_model": width, "num_layers": layers, "num_heads": heads, "head_dim": 32, "num_kv_heads": heads,
        "d_ff": 4 * width,
    }  # fmt: skip


# Of 8 experts half as wide as the dense feed-forward 2: as many parameters at work as without experts.
EXPERTS = ExpertsConfig(experts=8, active=2, granularity=2)


def _transformer(width: int, layers: int, mlp: ExpertsConfig | None = None) -> TransformerConfig:
    return TransformerConfig(**_sizes(width, layers), mlp=mlp)


def _encoder_decoder(width: int, layers: int) -> EncoderDecoderConfig:
    """Half of the layers read; ids beyond the bytes are the spans' sentinels."""
    sizes = _sizes(width, layers) | {"num_layers": -(-layers // 2), "num_encoder_layers": layers // 2}
    return EncoderDecoderConfig(**sizes, vocab_size=256 + 16)


FLAX_CELLS = {"rnn": "SimpleCell", "lstm": "OptimizedLSTMCell", "gru": "GRUCell"}  # of flax.linen


def as_flax(cell: str, p: Mapping[str, Any]) -> dict:
    """A recurrent layer's weights under the names of Flax's cell, whose LSTM forgets by σ(f), ours by σ(f + 1)."""
    if cell == "rnn":
        return {"i": {"kernel": p["w_x"][:, 0], "bias": p["bias"][0]}, "h": {"kernel": p["w_h"][:, 0]}}
    gates = {"lstm": "ifgo", "gru": "rzn"}[cell]
    inputs = {f"i{g}": {"kernel": p["w_x"][:, k]} for k, g in enumerate(gates)}
    state = {f"h{g}": {"kernel": p["w_h"][:, k]} for k, g in enumerate(gates)}
    for k, g in enumerate(gates):  # a GRU's biases stand beside its input, an LSTM's beside its state
        (inputs[f"i{g}"] if cell == "gru" else state[f"h{g}"])["bias"] = p["bias"][k] + (g == "f")
    if cell == "gru":
        state["hn"]["bias"] = p["bias_h"]
    return inputs | state


def _recurrent_stacks(config: RecurrentConfig, params: Mapping[str, Any]):
    import flax.linen as nn

    from scaling.training import models
    from scaling.training.models import recurrent

    flax_cell = getattr(nn, FLAX_CELLS[config.cell])
    names = [n for n, spec in models.param_specs(config).items() if spec.group == "recurrent"]
    layers = [{n: params[n][i] for n in names} for i in range(config.num_layers)]

    def ours(layers, x_BTD):
        for p in layers:
            x_BTD = recurrent.layer(config.cell, p, x_BTD)
        return x_BTD

    def flaxs(layers, x_BTD):
        for p in layers:
            x_BTD = nn.RNN(flax_cell(config.d_model)).apply({"params": {"cell": p}}, x_BTD)
        return x_BTD

    return (ours, layers), (flaxs, [as_flax(config.cell, p) for p in layers])


def _lstm(width: int) -> RecurrentConfig:
    return RecurrentConfig(d_model=width, num_layers=2, cell="lstm")


FAMILIES = {
    "transformer": Benched(tuple(_transformer(*shape) for shape in TRANSFORMER_SHAPES)),
    # Each beside the dense model of equal active parameters.
    "experts": Benched(tuple(_transformer(*shape, mlp) for shape in TRANSFORMER_SHAPES for mlp in (None, EXPERTS))),
    "encoder_decoder": Benched(
        tuple(_encoder_decoder(*shape) for shape in TRANSFORMER_SHAPES), objective=SpanCorruption()
    ),
    "recurrent": Benched(
        models=tuple(map(_lstm, RECURRENT_WIDTHS)),
        other="Flax",
        compared=tuple(
            replace(_lstm(width), cell=cell)  # type: ignore[arg-type]  # the names in CELLS are the field's
            for cell in CELLS
            for width in RECURRENT_WIDTHS
        ),
        stacks=_recurrent_stacks,
    ),
}


def compare(family: str, *, seconds: float, compared: Sequence[ModelConfig] | None = None) -> list[dict]:
    """Times forward and backward pass of stacks of layers, ours and the other library's in turn, in this process, about
    ``seconds`` for each pair; a row a model, ``compared`` (default: the family's).

    16 windows of ``COMPARED_TOKENS`` from the normal distribution, the sum of sin of what comes out. Rows hold
    ``model``, ``d_model``, ``ours_seconds`` and ``other_seconds`` (medians), and ``ratio``, the median of the other's
    time over ours turn by turn. Raises ValueError where the two give different gradients of x: they would not be the
    same work.
    """
    import jax

    from scaling.training import models

    benched, rows = FAMILIES[family], []
    for config in benched.compared if compared is None else compared:
        x_BTD = jax.random.normal(jax.random.key(1), (16, COMPARED_TOKENS, config.d_model))
        pair = benched.stacks(config, models.init(config, jax.random.key(0)))  # type: ignore[misc]  # as other is
        steps = [_compiled(stack, weights, x_BTD) for stack, weights in pair]
        gradients = [np.asarray(step()[1]) for step in steps]
        worst = np.abs(gradients[0] - gradients[1]).max() / np.abs(gradients[1]).max()
        if not worst < 1e-4:
            raise ValueError(
                f"{_name(config)} at width {config.d_model}: gradients differ by {worst:.1e} of the largest"
            )
        times = _in_turn(steps, seconds)
        rows.append(
            {
                "model": _name(config),
                "d_model": config.d_model,
                "ours_seconds": float(np.median(times[:, 0])),
                "other_seconds": float(np.median(times[:, 1])),
                "ratio": float(np.median(times[:, 1] / times[:, 0])),
            }
        )
    return rows


def _name(config: ModelConfig) -> str:
    return str(getattr(config, "cell", config.family))


def _compiled(stack: Stack, weights: Any, x_BTD) -> Callable[[], Any]:
    """() → the gradient by weights and x, compiled as train steps are."""
    import jax
    import jax.numpy as jnp

    from scaling.training.programs import optimised

    gradient = jax.jit(jax.grad(lambda weights, x_BTD: jnp.sum(jnp.sin(stack(weights, x_BTD))), argnums=(0, 1)))
    options: Any = optimised(2)
    compiled = gradient.lower(weights, x_BTD).compile(compiler_options=options)
    return lambda: jax.block_until_ready(compiled(weights, x_BTD))


def _in_turn(steps: Sequence[Callable[[], Any]], seconds: float) -> np.ndarray:
    """Seconds (turns, steps), at least three turns."""
    turns: list[list[float]] = []
    while len(turns) < 3 or np.sum(turns) < seconds:
        turn = []
        for step in steps:
            started = time.perf_counter()
            step()
            turn.append(time.perf_counter() - started)
        turns.append(turn)
    return np.array(turns)


def show_compared(console: Console, rows: Sequence[dict], family: str) -> None:
    """A line a model: forward and backward pass of its layers, ours and the other library's."""
    other = FAMILIES[family].other
    title = f"{processor()}, one process, forward and backward pass of a stack of layers, in turn"
    table = Table(title=title, title_justify="left")
    for heading in ("layers", "width", "ours ms", f"{other} ms", f"{other}'s time over ours"):
        table.add_column(heading, justify="right")
    for row in rows:
        ours, others = (f"{1e3 * row[key]:.1f}" for key in ("ours_seconds", "other_seconds"))
        table.add_row(row["model"], f"{row['d_model']}", ours, others, f"{row['ratio']:.2f}×")
    console.print(table)
