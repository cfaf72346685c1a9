"""Counts against published models, FLOPs against the papers' tables and against every matmul written down one by one.

That the counts equal the real model's is asserted where the model is: tests/training.
"""

import dataclasses
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scaling import accounting, families, grid
from scaling.config import Horizon, OptimConfig, RunConfig, ScheduleConfig
from scaling.families.counting import RULES
from scaling.families.encoder_decoder import EncoderDecoderConfig
from scaling.families.transformer import TransformerConfig


def model(d_model, num_layers, num_heads, head_dim, d_ff, vocab_size, **more):
    more.setdefault("num_kv_heads", num_heads)
    return TransformerConfig(
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        vocab_size=vocab_size,
        **more,
    )


GPT2 = {"norm": "layer", "biases": True, "positions": "learned", "tied_embeddings": True}
TINY = model(32, 2, 2, 16, 128, 256)


def run(horizon, *, batch_size=16, warmup_tokens=0, schedule=None, of=TINY, name="adamw"):
    optim = OptimConfig(
        peak_lr=0.01,
        warmup_tokens=warmup_tokens,
        name=name,
        weight_decay=0.0,
        schedule=schedule or ScheduleConfig(),
    )
    return RunConfig(model=of, optim=optim, horizon=horizon, batch_size=batch_size)


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, total",
    [  # counts that the models' own checkpoints have
        pytest.param(model(4096, 32, 32, 128, 11008, 32_000, activation="swiglu"), 6_738_415_616, id="llama-7b"),
        pytest.param(
            model(4096, 32, 32, 128, 14336, 128_256, activation="swiglu", num_kv_heads=8),
            8_030_261_248,
            id="llama-3-8b",
        ),
        pytest.param(
            model(2048, 22, 32, 64, 5632, 32_000, activation="swiglu", num_kv_heads=4),
            1_100_048_384,
            id="tinyllama",
        ),
        pytest.param(
            model(
                1024,
                28,
                16,
                128,
                3072,
                151_936,
                activation="swiglu",
                num_kv_heads=8,
                qk_norm=True,
                tied_embeddings=True,
            ),
            596_049_920,
            id="qwen3-0.6b",
        ),
        pytest.param(model(768, 12, 12, 64, 3072, 50_257, num_positions=1024, **GPT2), 124_439_808, id="gpt2"),
        pytest.param(model(1024, 24, 16, 64, 4096, 50_257, num_positions=1024, **GPT2), 354_823_168, id="gpt2-medium"),
        pytest.param(
            model(768, 12, 12, 64, 3072, 50_272, num_positions=2050, activation="relu", **GPT2),
            125_239_296,
            id="opt-125m",
        ),
        # whose two branches are side by side, of the same sizes
        pytest.param(model(768, 12, 12, 64, 3072, 50_304, norm="layer", biases=True), 162_322_944, id="pythia-160m"),
    ],
)
def test_totals_of_published_models(config, total):
    assert accounting.param_counts(config)["total"] == total


def test_gpt2_as_a_grid_writes_it():
    """Its dial gives its shape; weights of matrices as Kaplan et al. 2020 count them, 12 L D²."""
    written = """
recipe: none
base:
  model: {width: 768, vocab_size: 50257, tied_embeddings: true, norm: layer, norm_eps: 1.0e-5, biases: true,
          positions: learned, num_positions: 1024, dropout: .1}
  data: {seq_len: 1024}
  optim: {peak_lr: 6.0e-4, warmup_tokens: 0}
  horizon: {steps: 100}
  batch_size: 8
"""
    config = grid.expand(yaml.safe_load(written), name="x").cells[0].run.model
    assert (config.num_layers, config.num_heads, config.head_dim, config.d_ff) == (12, 12, 64, 3072)
    counts = families.of(config).counts(config)
    assert counts.num_params["total"] == 124_439_808
    assert counts.inner_weights == 84_934_656
    assert counts.num_params["embedding"] == (50_257 + 1024) * 768
    assert counts.num_params["non_embedding"] == 84_934_656 + 12 * 13 * 768 + 2 * 768  # 4 + 5 biases, 4 of norms
    plain = accounting.flops_per_token(dataclasses.replace(config, positions="none", num_positions=None), 1024)
    assert accounting.flops_per_token(config, 1024) == plain | {"6ND_total": plain["6ND_total"] + 6 * 1024 * 768}


def test_groups_add_up_and_a_tied_head_is_counted_once():
    counts = accounting.param_counts(TINY)
    assert counts["non_embedding"] == counts["attention"] + counts["mlp"] + counts["norm"]
    assert counts["total"] == sum(families.of(TINY).counts(TINY).groups.values())
    tied = accounting.param_counts(dataclasses.replace(TINY, tied_embeddings=True))
    assert tied["unembedding"] == 0
    assert tied["total"] == counts["total"] - counts["unembedding"]
    assert tied["embedding"] == counts["embedding"]


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_params, config, ratio",
    [  # Hoffmann et al. 2022, table A4: FLOPs of their appendix F over 6 N D, at sequence 2,048 and 32,000 tokens
        (305e6, model(1024, 20, 16, 64, 4096, 32_000), 1.10),
        (552e6, model(1280, 24, 10, 128, 5120, 32_000), 1.08),
        (1.6e9, model(2048, 28, 16, 128, 8192, 32_000), 1.03),
        (6.8e9, model(3584, 40, 28, 128, 14336, 32_000), 0.99),
    ],
)
def test_chinchilla_rule_reproduces_table_a4(num_params, config, ratio):
    """The table counts neither the embedding nor the logits, though the text does (as they told nanoGPT's author)."""
    embedding_and_logits = 3 * 2 * (2 * config.vocab_size * config.d_model)
    blocks = accounting.flops_per_token(config, 2048)["chinchilla"] - embedding_and_logits
    assert blocks / (6 * num_params) == pytest.approx(ratio, abs=0.0051)


def matmuls(config, seq_len):
    """Every matmul of one sequence as (rows, inner, columns), the square of attention in full."""
    d, q_width = config.d_model, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    layer = [(seq_len, d, q_width), (seq_len, d, kv_width), (seq_len, d, kv_width), (seq_len, q_width, d)]
    layer += [(seq_len, d, config.d_ff), (seq_len, config.d_ff, d)]
    if config.activation == "swiglu":
        layer.append((seq_len, d, config.d_ff))
    attention = config.num_heads * [(seq_len, config.head_dim, seq_len), (seq_len, seq_len, config.head_dim)]
    return config.num_layers * layer + [(seq_len, d, config.vocab_size)], config.num_layers * attention


def flops(shapes):
    return sum(2 * m * k * n for m, k, n in shapes)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        model(48, 3, 6, 8, 100, 77, activation="swiglu", num_kv_heads=2),
        model(64, 3, 4, 32, 256, 256, activation="relu2", tied_embeddings=True, qk_norm=True),
    ],
)
@pytest.mark.parametrize("seq_len", [1, 16, 128])
def test_exact_rule_is_the_sum_of_the_matmuls(config, seq_len):
    dense, attention = matmuls(config, seq_len)
    full = accounting.flops_per_token(config, seq_len, causal=False)["exact"]
    causal = accounting.flops_per_token(config, seq_len)["exact"]
    assert full * seq_len == pytest.approx(3 * (flops(dense) + flops(attention)), rel=1e-12)
    assert causal * seq_len == pytest.approx(3 * (flops(dense) + flops(attention) / 2), rel=1e-12)


def test_kaplan_rule_is_his_table_1():
    """C_forward = 2 N + 2 n_layer n_ctx d_attn with N = 12 n_layer d_model², by hand for GPT-2's smallest shape."""
    gpt2 = model(768, 12, 12, 64, 3072, 50_257)
    assert accounting.flops_per_token(gpt2, 1024)["kaplan"] == 3 * (2 * 84_934_656 + 2 * 12 * 1024 * 768)


def test_six_nd_rules_differ_by_the_embeddings():
    found = accounting.flops_per_token(TINY, 128)
    assert found["6ND_total"] - found["6ND"] == 6 * 2 * 256 * 32
    assert set(found) == set(RULES)


def test_head_dominates_small_models():
    """Porian et al.: the head is 94 % of 6 N at 5.2M parameters (96 wide, 3 deep, 50,432 tokens)."""
    counts = accounting.param_counts(model(96, 3, 4, 24, 256, 50_432, activation="swiglu"))
    assert counts["unembedding"] / (counts["non_embedding"] + counts["unembedding"]) == pytest.approx(0.94, abs=0.005)


# ---- plans ----------------------------------------------------------------------------------------------------------

HORIZONS = [
    Horizon(steps=500),
    Horizon(tokens=500 * 2048),
    Horizon(tokens_per_param=500 * 2048 / accounting.param_counts(TINY)["non_embedding"]),
    Horizon(tokens_per_param=500 * 2048 / accounting.param_counts(TINY)["total"], params="total"),
    *(
        Horizon(flops=500 * 2048 * per_token, rule=rule)
        for rule, per_token in accounting.flops_per_token(TINY, 128).items()
    ),
]


@pytest.mark.parametrize("horizon", HORIZONS, ids=lambda h: f"{h.rule}")
def test_one_run_said_in_every_horizon(horizon):
    plan = accounting.plan(run(horizon))
    assert plan.num_steps == 500
    assert plan.num_tokens == 500 * 2048
    assert plan.requested_tokens == pytest.approx(500 * 2048, rel=1e-12)
    assert plan.flops["6ND"] == 6 * plan.num_params["non_embedding"] * 500 * 2048


@given(st.floats(1e4, 1e9), st.integers(1, 64))
def test_achieved_values_are_those_of_whole_steps(tokens, batch_size):
    plan = accounting.plan(run(Horizon(tokens=tokens), batch_size=batch_size))
    assert plan.num_tokens == plan.num_steps * plan.batch_tokens == plan.num_steps * batch_size * 128
    assert abs(plan.num_tokens - tokens) <= plan.batch_tokens / 2
    assert plan.tokens_per_param * plan.num_params["non_embedding"] == pytest.approx(plan.num_tokens)
    assert plan.requested_tokens == tokens


def test_warmup_and_cooldown_in_steps():
    schedule = ScheduleConfig(name="wsd", cooldown_fraction=0.25)
    plan = accounting.plan(run(Horizon(steps=100), warmup_tokens=3 * 2048 + 1, schedule=schedule))
    assert (plan.warmup_steps, plan.cooldown_steps) == (4, 25)
    assert accounting.plan(run(Horizon(steps=100), schedule=ScheduleConfig(name="cosine"))).cooldown_steps == 0
    assert accounting.plan(run(Horizon(steps=3), warmup_tokens=10**9)).warmup_steps == 3


def test_a_horizon_of_less_than_a_step_is_refused():
    with pytest.raises(ValueError, match=r"10 tokens, less than one batch of 2048: write a longer horizon"):
        accounting.plan(run(Horizon(tokens=10)))


def test_bytes_of_state():
    total = accounting.param_counts(TINY)["total"]
    assert accounting.plan(run(Horizon(steps=1))).state_bytes == 12 * total  # weights, two moments
    assert accounting.plan(run(Horizon(steps=1), name="sgd")).state_bytes == 4 * total
    assert accounting.plan(run(Horizon(steps=1), name="lion")).checkpoint_bytes == 8 * total
    plans = [accounting.plan(run(Horizon(steps=1)), remat=remat) for remat in ("none", "dots", "full")]
    assert plans[0].memory_bytes > plans[1].memory_bytes > plans[2].memory_bytes > plans[2].state_bytes


def test_a_plan_carries_the_id_of_its_run():
    config = run(Horizon(steps=1))
    assert accounting.plan(config).run_id == config.run_id
    assert math.isfinite(sum(accounting.plan(config).flops.values()))


def test_flops_of_what_reads_apart_are_asked_of_a_run():
    config = EncoderDecoderConfig(
        d_model=16, num_layers=1, num_encoder_layers=1, num_heads=2, head_dim=8, num_kv_heads=2, d_ff=64
    )
    with pytest.raises(ValueError, match=r"^model.family is 'encoder_decoder', which reads apart: count a run of it"):
        accounting.flops_per_token(config, 128)
