"""Recipes against what the papers' authors published or trained with, not against the formulas again."""

import dataclasses

import pytest

from scaling import accounting
from scaling.families.transformer import TransformerConfig
from scaling.grid import recipes

STDLIB_TOKENS = 12e6


def model(d_model, num_layers, num_heads, d_ff, vocab_size, activation="gelu", **more):
    return TransformerConfig(
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=d_model // num_heads,
        num_kv_heads=more.pop("num_kv_heads", num_heads),
        d_ff=d_ff,
        vocab_size=vocab_size,
        activation=activation,
        **more,
    )


TINY = model(48, 3, 3, 192, 256)


def test_deepseek_gives_the_rates_and_batches_deepseek_trained_with():
    """DeepSeek LLM, table 2: 7B at 4.2e-4 with 2,304 × 4,096 tokens a batch, 67B at 3.2e-4 with 4,608 × 4,096."""
    small = model(4096, 30, 32, 11008, 102_400, "swiglu")
    large = model(8192, 95, 64, 22016, 102_400, "swiglu", num_kv_heads=8)
    found = recipes.deepseek_v1(small, 2.0e12, 4096)
    assert found.peak_lr == pytest.approx(4.2e-4, rel=0.05)
    assert found.batch_tokens == pytest.approx(2304 * 4096, rel=0.05)
    found = recipes.deepseek_v1(large, 2.0e12, 4096)
    assert found.peak_lr == pytest.approx(3.2e-4, rel=0.05)
    assert found.batch_tokens == pytest.approx(4608 * 4096, rel=0.05)


@pytest.mark.parametrize("num_tokens", [4e5, 1.6e6, 3.3e6, 12e6])
def test_the_default_is_the_first_but_for_a_warmup_of_80_steps(num_tokens):
    """Both are a tenth of the run at 800 steps, the fewest there are above the smallest batch."""
    first, second = recipes.default_v1(TINY, num_tokens, 128), recipes.default_v2(TINY, num_tokens, 128)
    assert second.warmup_tokens == min(80 * second.batch_tokens, int(num_tokens / 10))
    assert dataclasses.replace(second, warmup_tokens=first.warmup_tokens) == first
    assert second.warmup_tokens <= first.warmup_tokens


def test_porian_at_its_anchor():
    """Their model of 108.5M parameters with the head, without the embedding: .0047 and 160 sequences of 2,048."""
    anchor = model(576, 20, 9, 1536, 50_432, "swiglu")
    counts = accounting.param_counts(anchor)
    assert counts["non_embedding"] + counts["unembedding"] == pytest.approx(108_540_160, rel=0.002)
    found = recipes.porian_v1(anchor, 20 * 108e6, 2048)
    assert found.peak_lr == pytest.approx(0.0047, rel=0.005)
    assert found.batch_tokens == pytest.approx(160 * 2048, rel=0.01)
    assert found.beta2 == 0.99
    tied = recipes.porian_v1(dataclasses.replace(anchor, tied_embeddings=True), 20 * 108e6, 2048)
    assert tied == found  # the head's FLOPs are there, tied or not


def test_steplaw_by_hand():
    """10^(.252853 - .713 · 9 + .307 · 11) at a billion parameters and a hundred billion tokens: the logs by hand."""
    billion = model(2048, 20, 16, 8192, 65_536)
    counts = accounting.param_counts(billion)
    assert counts["non_embedding"] == pytest.approx(1.0066e9, rel=1e-3)
    found = recipes.steplaw_v1(billion, 1e11, 2048)
    assert found.peak_lr == pytest.approx(1.6325e-3 * 1.0066**-0.713, rel=1e-3)
    assert found.batch_tokens == pytest.approx(1.10771e6, rel=1e-3)


def test_default_is_the_measured_anchor_and_shrinks_the_batch_with_the_budget():
    found = recipes.default_v1(TINY, STDLIB_TOKENS, 128)
    assert found.peak_lr == pytest.approx(0.0084361, rel=1e-4)  # .01 (83,280 / 50,000)^(-1/3)
    assert (found.beta2, found.weight_decay) == (0.98, 0.1)
    batches = {tokens: recipes.default_v1(TINY, tokens, 128).batch_tokens for tokens in (1e5, 3e5, 5e5, 1e6, 1e7)}
    assert batches == {1e5: 512, 3e5: 512, 5e5: 512, 1e6: 1024, 1e7: 2048}
    # hundreds of steps from two hundred thousand tokens on
    assert all(tokens / recipes.default_v1(TINY, tokens, 128).batch_tokens >= 800 for tokens in (4.2e5, 1e6, 1.8e6))


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("tokens", [1e5, 1e7, 1e12])
def test_every_recipe_is_sane(name, tokens):
    found = recipes.RECIPES[name](TINY, tokens, 128)
    assert found.peak_lr > 0
    assert found.batch_tokens > 0
    assert 0 <= found.warmup_tokens <= tokens / 10
    assert type(found.warmup_tokens) is int
    assert 0.9 <= found.beta2 < 1


def test_names_carry_a_version():
    assert all(name.rpartition("@")[2].isdigit() for name in recipes.RECIPES)


@pytest.mark.parametrize(
    ("width", "num_tokens", "best"),
    [(24, 74e3, 128), (32, 116e3, 128), (24, 185e3, 128), (32, 290e3, 128), (16, 342e3, 256), (24, 6.5e6, 1408)],
)
def test_the_third_default_is_where_trials_had_their_best_batch(width, num_tokens, best):
    """Of batches four times apart (results/README.md); whole windows of 128."""
    found = recipes.default_v3(model(width, 3, width // 8, 4 * width, 256), num_tokens, 128)
    assert 0.8 <= 128 * max(1, round(found.batch_tokens / 128)) / best <= 1.25


def test_the_third_default_is_smooth_and_near_the_best_rate_tried():
    """Of .7, 1 and 1.4 × .0114 at 9K parameters, six seeds each, the middle one."""
    found = recipes.default_v3(model(16, 3, 2, 64, 256), 342_656, 128)
    assert 0.7 < found.peak_lr / 0.0114 < 1.4
    batches = [recipes.default_v3(TINY, d, 128).batch_tokens for d in (1e5, 1.01e5, 1e7, 1.01e7)]
    assert batches[1] / batches[0] == pytest.approx(1.01**0.6)
    assert batches[3] / batches[2] == pytest.approx(1.01**0.6)
