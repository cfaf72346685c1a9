r"""Named, versioned hyperparameter recipes: learning rate, batch, warm-up, β2 and weight decay from (N, D).

A recipe is a pure function of the model and of D, the tokens the horizon asks for. Its name carries a version
(``steplaw@1``): a published sweep keeps meaning what it meant, so a changed formula is a new version beside the old.
What a recipe returns is only a proposal: every value that a grid writes out wins over it.

Each paper counts N its own way, so each recipe here says which N it uses. Constants that a paper gives are its own;
what a paper leaves open (marked below) is this project's choice:

- warm-up: linear, min(tokens the recipe asks for, a tenth of the run). One token per parameter is what Porian et al.
  2024 found enough; a longer warm-up alone moved their exponent from .60 to .71. Where a recipe asks for steps they are
  of the batch that it proposes: under ``batch_scale``, or a batch written out, the tokens stay and the steps do not.
- batches are rounded to whole sequences, at least one, where a run is built (``grid``).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from scaling import accounting, families
from scaling.families import ModelConfig

MAX_WARMUP_FRACTION = 0.1


@dataclass(frozen=True)
class Hyperparameters:
    """What a recipe proposes for one run. ``batch_tokens`` is not yet rounded to whole sequences."""

    peak_lr: float
    batch_tokens: float
    warmup_tokens: int
    beta2: float
    weight_decay: float


def default_v1(model: ModelConfig, num_tokens: float, seq_len: int) -> Hyperparameters:
    r"""For byte models of 5K to 500K parameters on a laptop: peak_lr = .01 (N / 50,000)^(-1/3).

    N is non-embedding. The exponent is Porian et al.'s, the constant is from a sweep of this project at 3e11 to
    1.2e12 FLOPs (``sweeps/learning_rate.yaml``). The batch is 2,048 tokens, halved down to 512 while the run would
    have fewer than 800 steps: halving it gained .04, .03 and .01 nats at 430, 518 and 935 steps, and lost .01 at 859
    (results/README.md). Warm-up a tenth of the run; β2 .98; weight decay .1.
    """
    num_params = accounting.param_counts(model)["non_embedding"]
    batch_tokens = 2048
    while batch_tokens > 512 and num_tokens / batch_tokens < 800:
        batch_tokens //= 2
    return Hyperparameters(
        peak_lr=0.01 * (num_params / 50_000) ** (-1 / 3),
        batch_tokens=batch_tokens,
        warmup_tokens=int(MAX_WARMUP_FRACTION * num_tokens),
        beta2=0.98,
        weight_decay=0.1,
    )


# The shortest run that default@1's batch rule makes, 800 steps, warms up over a tenth of itself: so do they all.
DEFAULT_WARMUP_STEPS = 80


def default_v2(model: ModelConfig, num_tokens: float, seq_len: int) -> Hyperparameters:
    """default@1 with a warm-up that does not grow with the run: 80 steps, and never more than a tenth of the run.

    Runs of one shape and batch that differ in length then are the same run until the shorter begins to cool down, and
    a sweep trains that part once. Against a tenth of the run (170 to 238 steps) the loss moved by -.006, +.0005 and
    -.002 nats at the recipe's rate, by -.009 to -.013 at twice and by -.017 to +.014 at half that rate
    (``sweeps/warmup.yaml``).
    """
    before = default_v1(model, num_tokens, seq_len)
    warmup_tokens = min(DEFAULT_WARMUP_STEPS * before.batch_tokens, MAX_WARMUP_FRACTION * num_tokens)
    return dataclasses.replace(before, warmup_tokens=int(warmup_tokens))


def default_v3(model: ModelConfig, num_tokens: float, seq_len: int) -> Hyperparameters:
    r"""peak_lr = .0075 (N / 50,000)^(-1/3), batch = 512 (D / 1.6M)^.6 tokens: smooth in N and D, down to 30K tokens.

    N is non-embedding. default@2's batch falls by halves with the horizon, a step in the loss between neighbours, and
    never below 512 tokens. Here it is near the best of those tried (results/README.md): 128 beat 512 and 640 by .05 to
    .13 nats at 74K to 290K tokens, 256 beat 128 by .02 at 342K, 1,408 beat 512 by .05 at 6.5M; between, a factor of two
    is within the noise of seeds (1 %). Of rate constants .0065 was the best of .0046, .0065 and .0091 at 9K parameters
    and 342K tokens; default@2's .01 is near it from a million tokens on. Warm-up, β2 and weight decay as default@2.
    """
    num_params = accounting.param_counts(model)["non_embedding"]
    batch_tokens = 512 * (num_tokens / 1.6e6) ** 0.6
    return Hyperparameters(
        peak_lr=0.0075 * (num_params / 50_000) ** (-1 / 3),
        batch_tokens=batch_tokens,
        warmup_tokens=int(min(DEFAULT_WARMUP_STEPS * batch_tokens, MAX_WARMUP_FRACTION * num_tokens)),
        beta2=0.98,
        weight_decay=0.1,
    )


def porian_v1(model: ModelConfig, num_tokens: float, seq_len: int) -> Hyperparameters:
    r"""peak_lr = .0047 (N / 108M)^(-1/3), batch = 160 × 2,048 (N / 108M)^(2/3) tokens.

    N counts the head's matrix (tied or not) but not the input embedding, as their FLOPs do. Fitted near 20 tokens per
    parameter, 5M to 900M parameters, RefinedWeb and OpenWebText2, without learning-rate decay. β2 .95 from half a
    million tokens a batch on, .99 below, their finding for small batches rounded to one threshold. Warm-up one token
    per parameter. Weight decay .1 is this project's choice.

    Reference: Porian et al. 2024, "Resolving Discrepancies in Compute-Optimal Scaling of Language Models".
    """
    num_params = accounting.param_counts(model)["non_embedding"] + model.vocab_size * model.d_model
    batch_tokens = 160 * 2048 * (num_params / 108e6) ** (2 / 3)
    return Hyperparameters(
        peak_lr=0.0047 * (num_params / 108e6) ** (-1 / 3),
        batch_tokens=batch_tokens,
        warmup_tokens=int(min(num_params, MAX_WARMUP_FRACTION * num_tokens)),
        beta2=0.95 if batch_tokens >= 2**19 else 0.99,
        weight_decay=0.1,
    )


def steplaw_v1(model: ModelConfig, num_tokens: float, seq_len: int) -> Hyperparameters:
    r"""peak_lr = 1.79 N^-.713 D^.307, batch = .58 D^.571 tokens.

    N is non-embedding. Fitted on 60M to 1B parameters and 2B to 100B tokens, with a cosine down to a fixed final rate
    of 1e-5. The warm-up is theirs, 2,000 steps, under this project's cap of a tenth of the run; β2 .95 and weight
    decay .1 as in their set-up.

    Reference: Li et al. 2025, "Predictable Scale: Part I, Step Law", equation 1.
    """
    num_params = accounting.param_counts(model)["non_embedding"]
    batch_tokens = 0.58 * num_tokens**0.571
    return Hyperparameters(
        peak_lr=1.79 * num_params**-0.713 * num_tokens**0.307,
        batch_tokens=batch_tokens,
        warmup_tokens=int(min(2000 * batch_tokens, MAX_WARMUP_FRACTION * num_tokens)),
        beta2=0.95,
        weight_decay=0.1,
    )


def deepseek_v1(model: ModelConfig, num_tokens: float, seq_len: int) -> Hyperparameters:
    r"""peak_lr = .3118 C^-.1250, batch = .2920 C^.3271 tokens, at C = M D.

    M is their non-embedding FLOPs per token, 72 L d^2 + 12 L d T for the shapes they train: here 6 × the matmul
    weights of the blocks + 12 L A T, attention not halved, head not counted. Fitted at 1e17 to 2e19 FLOPs. Warm-up
    2,000 steps under this project's cap of a tenth of the run; β2 .95 and weight decay .1 are theirs.

    Reference: DeepSeek-AI 2024, "DeepSeek LLM: Scaling Open-Source Language Models with Longtermism", equations 1, 2.
    """
    counts = families.of(model).counts(model)
    attention = sum(12 * m.layers * m.width * seq_len for m in counts.attention)
    flops = (6 * counts.inner_weights + attention) * num_tokens
    batch_tokens = 0.2920 * flops**0.3271
    return Hyperparameters(
        peak_lr=0.3118 * flops**-0.1250,
        batch_tokens=batch_tokens,
        warmup_tokens=int(min(2000 * batch_tokens, MAX_WARMUP_FRACTION * num_tokens)),
        beta2=0.95,
        weight_decay=0.1,
    )


RECIPES: dict[str, Callable[[ModelConfig, float, int], Hyperparameters]] = {
    "default@1": default_v1,
    "default@2": default_v2,
    "default@3": default_v3,
    "porian@1": porian_v1,
    "steplaw@1": steplaw_v1,
    "deepseek@1": deepseek_v1,
}
