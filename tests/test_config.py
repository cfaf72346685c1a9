"""Configs: what is refused, and that the id is the hash it says it is."""

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys

import pydantic
import pytest

from scaling.config import DataConfig, DivergenceConfig, EvalConfig, Horizon, OptimConfig, RunConfig, ScheduleConfig
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.families import ModelConfig
from scaling.fields import canonical_json, from_dict, parse, since, to_dict

MODEL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "num_kv_heads": 2, "d_ff": 128}
OPTIM = {"peak_lr": 0.01, "warmup_tokens": 0}
RUN = {"model": MODEL, "optim": OPTIM, "horizon": {"tokens": 1e6}, "batch_size": 16}


def first_fields(node) -> dict:
    """A config as it was under the first schema, which nobody adds to."""
    fields = [f.name for f in dataclasses.fields(node) if not f.metadata]
    return {
        name: first_fields(value) if dataclasses.is_dataclass(value := getattr(node, name)) else value
        for name in fields
    }


def test_the_id_is_the_hash_of_the_canonical_json():
    run = parse(RunConfig, RUN)
    written = json.dumps(first_fields(run), sort_keys=True, separators=(",", ":"))
    assert canonical_json(run) == written
    assert run.run_id == hashlib.sha256(written.encode()).hexdigest()[:12]


def test_every_field_of_a_run_is_in_its_id():
    def paths(node):
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if f.metadata:  # younger: see test_a_field_added_later_moves_no_id_until_it_is_used
                continue
            yield from ((f.name, *p) for p in paths(value)) if dataclasses.is_dataclass(value) else [(f.name,)]

    run = parse(RunConfig, RUN)
    hashed = json.loads(canonical_json(run))
    for path in paths(run):
        node, written = run, hashed
        for name in path:
            node, written = getattr(node, name), written[name]
        assert written == node


def test_a_field_added_later_moves_no_id_until_it_is_used():
    @dataclasses.dataclass(frozen=True)
    class Before:
        width: int = 3

    @dataclasses.dataclass(frozen=True)
    class After(Before):
        depth: int | None = since(2, None)

    assert canonical_json(After()) == canonical_json(Before()) == '{"width":3}'
    assert canonical_json(After(depth=1)) == '{"depth":1,"width":3}'
    assert from_dict(After, json.loads(canonical_json(After()))) == After()


def test_a_field_for_a_part_of_validation_leaves_earlier_ids():
    assert '"final_tokens"' not in canonical_json(EvalConfig())
    assert '"final_tokens":100' in canonical_json(EvalConfig(final_tokens=100))


def test_the_published_ids_stand():
    """Records under results/ were made under these ids: a config that is read back hashes to its own."""
    paths = sorted((pathlib.Path(__file__).parents[1] / "results").glob("*/runs/*.json"))
    assert paths
    for path in paths:
        assert from_dict(RunConfig, json.loads(path.read_text())["config"]).run_id == path.stem


def test_equal_runs_have_equal_ids_whatever_the_order_and_spelling():
    shuffled = {key: RUN[key] for key in reversed(RUN)}
    written_out = to_dict(parse(RunConfig, RUN))
    ids = {parse(RunConfig, raw).run_id for raw in (RUN, shuffled, written_out, {**RUN, "batch_size": 16.0})}
    assert len(ids) == 1
    assert parse(RunConfig, {**RUN, "seed": 1}).run_id not in ids


def test_round_trips():
    run = parse(RunConfig, RUN)
    through_json = json.loads(canonical_json(run))
    assert parse(RunConfig, through_json) == run
    assert from_dict(RunConfig, through_json) == run
    assert from_dict(RunConfig, through_json).run_id == run.run_id


def test_execution_is_not_part_of_a_run():
    assert "execution" not in to_dict(parse(RunConfig, RUN))


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(RunConfig, RUN).seed = 3


@pytest.mark.parametrize(
    "cls, raw, says",
    [
        (ModelConfig, MODEL | {"d_model": 0}, "d_model is 0: write a positive number"),
        (ModelConfig, MODEL | {"head_dim": 3}, "head_dim is 3: write an even number"),
        (ModelConfig, MODEL | {"num_kv_heads": 3}, "num_kv_heads is 3: write a divisor of num_heads (2)"),
        (ModelConfig, MODEL | {"logit_softcap": -1.0}, "logit_softcap is -1.0: write a positive number"),
        (ModelConfig, MODEL | {"parameterization": "mup"}, "base_d_model is None: write the size at which"),
        (ModelConfig, MODEL | {"base_d_model": 32}, "base_d_model is 32: write null"),
        (DataConfig, {"seq_len": 0}, "seq_len is 0: write a positive number"),
        (DataConfig, {"validation_fraction": 1.0}, "validation_fraction is 1.0: write a number in (0, 1)"),
        (ScheduleConfig, {"cooldown_fraction": 1.0}, "cooldown_fraction is 1.0: write a number in [0, 1)"),
        (OptimConfig, OPTIM | {"peak_lr": float("nan")}, "peak_lr is nan: write a positive number"),
        (OptimConfig, OPTIM | {"beta2": 1.0}, "beta2 is 1.0: write a number in [0, 1)"),
        (OptimConfig, OPTIM | {"warmup_tokens": -1}, "warmup_tokens is -1: write a number ≥ 0"),
        (OptimConfig, OPTIM | {"clip_norm": 0.0}, "clip_norm is 0.0: write a positive number"),
        (OptimConfig, OPTIM | {"name": "adam"}, "weight_decay is 0.1: write 0, or name: adamw"),
        (Horizon, {}, "write exactly one of tokens, flops, tokens_per_param, steps"),
        (Horizon, {"tokens": 1.0, "steps": 1}, "horizon is ['tokens', 'steps']: write exactly one"),
        (Horizon, {"flops": -1.0}, "flops is -1.0: write a positive number"),
        (EvalConfig, {"num_points": -1}, "num_points is -1: write a number ≥ 0"),
        (EvalConfig, {"final_tokens": 0}, "final_tokens is 0: write a positive number"),
        (
            RunConfig,
            RUN | {"data": {"source": "synthetic:markov"}, "eval": {"final_tokens": 5}},
            "eval.final_tokens is 5: write null: synthetic:markov validates on half a million tokens",
        ),
        (DivergenceConfig, {"patience_steps": 0}, "patience_steps is 0: write a positive number"),
        (RunConfig, RUN | {"batch_size": 0}, "batch_size is 0: write a positive number"),
        (RunConfig, RUN | {"seed": 2**31}, "seed is 2147483648: write an integer in [0, 2^31)"),
        (MeshConfig, {"fsdp": -1}, "fsdp is -1: write data beside it: only one of them"),
        (OptimConfig, OPTIM | {"name": "sgd", "momentum_dtype": "bfloat16"}, "write float32: this optimiser has no"),
        (ExecutionConfig, {"accumulation_steps": 0}, "accumulation_steps is 0: write a positive number"),
        (ExecutionConfig, {"loss_chunk_tokens": -1}, "loss_chunk_tokens is -1: write a positive number"),
        (MeshConfig, {"tensor": 0}, "tensor is 0: write an integer ≥ 1"),
        (MeshConfig, {"data": -2}, "data is -2: write an integer ≥ 1, or -1"),
        (ExecutionConfig, {"disk_budget_gb": 0.0}, "disk_budget_gb is 0.0: write a positive number"),
    ],
)
def test_bad_values_are_named_with_their_remedy(cls, raw, says):
    with pytest.raises(pydantic.ValidationError) as caught:
        parse(cls, raw)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "raw, path",
    [
        (RUN | {"batchsize": 1}, ("batchsize",)),
        (RUN | {"model": MODEL | {"dmodel": 1}}, ("model", "dmodel")),
        (RUN | {"model": {k: v for k, v in MODEL.items() if k != "d_ff"}}, ("model", "d_ff")),
        (RUN | {"optim": OPTIM | {"schedule": {"name": "cosin"}}}, ("optim", "schedule", "name")),
    ],
)
def test_errors_carry_their_path(raw, path):
    with pytest.raises(pydantic.ValidationError) as caught:
        parse(RunConfig, raw)
    assert caught.value.errors()[0]["loc"] == path


def test_a_config_is_read_with_the_standard_library_alone():
    """On an image with nothing but Python and JAX a worker reads its runs: no pydantic, no numpy."""
    script = (
        "import json, sys\n"
        "from scaling import config, fields\n"
        "run = fields.from_dict(config.RunConfig, json.load(sys.stdin))\n"
        "print(run.run_id, sorted({'pydantic', 'numpy', 'jax', 'yaml', 'pandas'} & set(sys.modules)))\n"
    )
    run = parse(RunConfig, RUN)
    done = subprocess.run(
        [sys.executable, "-c", script], input=canonical_json(run), capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == [run.run_id, "[]\n"]
