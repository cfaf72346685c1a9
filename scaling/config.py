"""What a run is: frozen dataclasses, checked on construction, hashed to a ``run_id``.

Only the standard library is imported here, so a bare accelerator image can read a config.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from scaling.families import FAMILIES, ModelConfig
from scaling.families.counting import RULES, Lengths
from scaling.fields import Strict, canonical_json, require, require_fraction, require_positive, since
from scaling.objectives import NEXT_TOKEN, OBJECTIVES, ObjectiveConfig

# 256 bytes and the separator of documents: a smaller byte-level vocabulary could not write every text.
SMALLEST_BPE = 257

ParamCount = Literal["non_embedding", "total", "active"]


def num_params_of(num_params: Mapping[str, int], convention: str) -> int:
    """Returns the N of a convention from a model's or a record's ``num_params``, which has ``active`` only where a
    token does not meet all of ``non_embedding``."""
    if convention == "active":
        return num_params.get("active", num_params["non_embedding"])
    return num_params[convention]


@dataclass(frozen=True)
class DataConfig(Strict):
    """Which text, how it becomes tokens, and how long a training window is."""

    # python-stdlib | tfds:<name>[/config] | text:<folder or glob> | tokens:<folder>, or a mixture of them:
    # .7 * python-stdlib + .3 * text:notes; or synthetic:<process>[?key=value&…], whose entropy is known
    source: str = "python-stdlib"
    tokenizer: str = "bytes"  # bytes | bpe:<vocab_size>, trained on the train split | file:<path>
    seq_len: int = 128  # T: tokens a window predicts; a window holds T + 1 tokens
    text_key: str = "text"  # feature of a TFDS dataset that holds the text
    validation_fraction: float = 0.06  # of documents, chosen by the hash of their text
    # Train on so many tokens of the train split, again and again: its documents in order of their hash, so that a small
    # subset lies inside a large one. null: on all of it.
    unique_tokens: int | None = since(2, None)
    near_duplicates: Literal["keep", "drop"] = since(2, "keep")  # train documents that are near one of validation
    mask_documents: bool = since(2, False)  # no attention across documents, positions counted within each

    def __post_init__(self) -> None:
        require_positive(self, "seq_len")
        want = f"bytes, bpe:<size> with a size of {SMALLEST_BPE} or more, or file:<path>"
        require(self.tokenizer == "bytes" or self.tokenizer[:5] == "file:" or self.bpe_size is not None,
                 "tokenizer", self.tokenizer, want)  # fmt: skip
        if self.unique_tokens is not None:
            require_positive(self, "unique_tokens")
        if self.source.startswith("synthetic:"):
            require(not self.mask_documents, "mask_documents", True, "false: a synthetic source has no documents")
        require(
            0 < self.validation_fraction < 1,
            "validation_fraction",
            self.validation_fraction,
            "a number in (0, 1)",
        )

    @property
    def bpe_size(self) -> int | None:
        """The vocabulary of a ``bpe:<size>``, its separator included; None of any other tokenizer."""
        match = re.fullmatch(r"bpe:([0-9]{1,7})", self.tokenizer)
        return int(match[1]) if match and int(match[1]) >= SMALLEST_BPE else None


@dataclass(frozen=True)
class ScheduleConfig(Strict):
    """Learning rate against step, as a multiple of ``peak_lr``. Warm-up is linear from 0.

    wsd: constant, then over the last ``cooldown_fraction`` of the run down to ``final_lr_fraction``,
    linearly or as 1 - sqrt (Hägele et al. 2024). cosine, linear: from the end of warm-up to the end of the run.
    """

    name: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "wsd"
    cooldown_fraction: float = 0.2
    cooldown_shape: Literal["linear", "1-sqrt"] = "linear"
    final_lr_fraction: float = 0.0

    def __post_init__(self) -> None:
        require_fraction(self, "cooldown_fraction", "final_lr_fraction")


@dataclass(frozen=True)
class OptimConfig(Strict):
    """Optimiser, its hyperparameters and the schedule. ``beta1`` is the momentum of sgd-like optimisers."""

    peak_lr: float
    warmup_tokens: int
    name: Literal["adamw", "adam", "sgd", "momentum", "adagrad", "lion", "muon", "soap"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled; multiplied by the learning rate; must be 0 for adam
    decay_norms_and_embeddings: bool = False
    clip_norm: float | None = 1.0  # global norm of the gradient
    z_loss: float = 0.0  # coefficient of mean(logsumexp(logits)^2) (PaLM, Chowdhery et al. 2022)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    # Of the first moment alone. A second moment in bfloat16 would stand still: (1 - beta2) of it is less than half a
    # unit in its last place.
    momentum_dtype: Literal["float32", "bfloat16"] = since(2, "float32")
    precondition_every: int = since(3, 10)  # of soap: steps between two looks for the bases it works in

    def __post_init__(self) -> None:
        require_positive(self, "peak_lr", "eps")
        require_fraction(self, "beta1", "beta2")
        for name in ("warmup_tokens", "weight_decay", "z_loss"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number ≥ 0")
        if self.clip_norm is not None:
            require_positive(self, "clip_norm")
        if self.name in ("sgd", "adagrad"):
            want = "float32: this optimiser has no momentum"
            require(self.momentum_dtype == "float32", "momentum_dtype", self.momentum_dtype, want)
        require_positive(self, "precondition_every")
        if self.name != "soap":
            want = "10, which it is without a word, or name: soap"
            require(self.precondition_every == 10, "precondition_every", self.precondition_every, want)
        if self.name == "adam":
            require(self.weight_decay == 0, "weight_decay", self.weight_decay, "0, or name: adamw")


@dataclass(frozen=True)
class Horizon(Strict):
    """How long to train, said once: exactly one of the four. ``rule`` names the FLOP rule ``flops`` is counted by,
    ``params`` the parameters ``tokens_per_param`` refers to."""

    tokens: float | None = None
    flops: float | None = None
    tokens_per_param: float | None = None
    steps: int | None = None
    rule: str = "exact"
    params: ParamCount = "non_embedding"

    def __post_init__(self) -> None:
        given = [n for n in ("tokens", "flops", "tokens_per_param", "steps") if getattr(self, n) is not None]
        require(len(given) == 1, "horizon", given, "exactly one of tokens, flops, tokens_per_param, steps")
        require(self.rule in RULES, "rule", self.rule, f"one of {', '.join(RULES)}")
        require_positive(self, given[0])


@dataclass(frozen=True)
class EvalConfig(Strict):
    """Validation. The final loss is over the validation split's first ``final_tokens`` tokens (null: the whole split),
    the ``num_points`` log-spaced points of the curve over its first ``curve_tokens`` (null: the whole split). The split
    is in a fixed shuffled order: its first tokens are a fair sample, the same for every run."""

    num_points: int = 20
    curve_tokens: int | None = 16_384
    final_tokens: int | None = since(2, None)

    def __post_init__(self) -> None:
        require(self.num_points >= 0, "num_points", self.num_points, "a number ≥ 0")
        for name in ("curve_tokens", "final_tokens"):
            if getattr(self, name) is not None:
                require_positive(self, name)


@dataclass(frozen=True)
class DivergenceConfig(Strict):
    """A run stops as ``diverged`` when its training loss is not finite, or above ``loss`` for ``patience_steps``
    steps in a row (null: 1.5 × the loss of a uniform guess, under most objectives the log of the vocabulary size)."""

    loss: float | None = None
    patience_steps: int = 50

    def __post_init__(self) -> None:
        require_positive(self, "patience_steps")
        if self.loss is not None:
            require_positive(self, "loss")


@dataclass(frozen=True)
class StartConfig(Strict):
    """The run whose weights another begins with, at a step 0 of its own: fine-tuning, continued or staged training.

    A grid names it by its coordinates (``grid.starts``). Its model and its tokens are those of the run that it starts.
    """

    run: str  # run_id
    step: int | None = None  # of that run's; null: its last
    # What is taken: weights alone, under an optimiser that has seen nothing, or its moments too.
    take: Literal["params", "params+optimizer"] = "params"

    def __post_init__(self) -> None:
        require(re.fullmatch(r"[0-9a-f]{12}", self.run) is not None, "run", self.run, "a run_id")
        if self.step is not None:
            require_positive(self, "step")


@dataclass(frozen=True)
class RunConfig(Strict):
    """One training run, in full: two equal RunConfigs give the same record on the same machine.

    ``batch_size`` is in sequences. Where and how it is executed (mesh, workers, attention kernel) is not part of it:
    see ExecutionConfig.
    """

    model: ModelConfig
    optim: OptimConfig
    horizon: Horizon
    batch_size: int
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    seed: int = 0
    objective: ObjectiveConfig = since(3, NEXT_TOKEN)  # noqa: RUF009
    start: StartConfig | None = since(3, None)  # noqa: RUF009 (null: from weights drawn by the seed)

    def __post_init__(self) -> None:
        require_positive(self, "batch_size")
        self._require_that_family_sees()
        try:
            lengths = self.lengths
        except ValueError as e:
            raise ValueError(f"objective.{e}") from None
        OBJECTIVES[self.objective.name].require_fit(self.objective, self)
        if self.model.longest_window is not None:
            name, most = self.model.longest_window
            T = self.model.tokens_at_once(lengths)
            want = f"{T} or more, or a smaller data.seq_len, which is {self.data.seq_len}"
            require(most >= T, f"model.{name}", most, want)
        if self.model.mixes_documents is not None:
            want = f"false: by {self.model.mixes_documents} a document's tokens would tell on the next one's"
            require(not self.data.mask_documents, "data.mask_documents", True, want)
        require(0 <= self.seed < 2**31, "seed", self.seed, "an integer in [0, 2^31)")
        if self.data.source.startswith("synthetic:"):  # whose own loss is known of the whole of its split alone
            require(
                self.eval.final_tokens is None, "eval.final_tokens", self.eval.final_tokens,
                f"null: {self.data.source} validates on half a million tokens, over which its own loss is known",
            )  # fmt: skip
        if self.model.parameterization == "mup":
            adam_like = ("adamw", "adam", "lion")  # whose update does not scale with the gradient: μP's table 8
            require(
                self.optim.name in adam_like, "optim.name", self.optim.name, f"one of {', '.join(adam_like)} for mup"
            )

    def _require_that_family_sees(self) -> None:
        """Raises ValueError for an objective that lets a token see what the model's family cannot show it."""
        family, sees = self.model.family, OBJECTIVES[self.objective.name].sees
        can: tuple[str, ...] = FAMILIES[family].sees
        names = [name for name, objective in OBJECTIVES.items() if objective.sees in can]
        one_way = f"a {family} model reads one way"
        why = one_way if can == ("causal",) else f"of family {family} are models that write from what they have read"
        require(sees in can, "objective.name", self.objective.name, f"{' or '.join(names)}: {why}")
        if sees == "causal":
            return
        want = f"false: what {self.objective.name} reads does not say where each document begins"
        require(not self.data.mask_documents, "data.mask_documents", True, want)

    @functools.cached_property
    def lengths(self) -> Lengths:
        """Tokens of a window, by what becomes of them."""
        return OBJECTIVES[self.objective.name].lengths(self.objective, self.data.seq_len)

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.lengths.window

    @functools.cached_property
    def run_id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of this config."""
        return hashlib.sha256(canonical_json(self).encode()).hexdigest()[:12]


def program_key(run: RunConfig) -> RunConfig:
    """``run`` with everything that the compiled program does not depend on set to a fixed value: the numbers that live
    in the state (``optimizers.hyperparams``), the seed, the start, and what the host alone reads.

    Two runs with equal keys can be members of one pack.
    """
    neutral = dataclasses.replace(
        run.optim,
        peak_lr=1.0,
        warmup_tokens=0,
        beta1=0.0,
        beta2=0.0,
        eps=1.0,
        weight_decay=0.0,
        clip_norm=None,
        z_loss=0.0,
        schedule=dataclasses.replace(run.optim.schedule, cooldown_fraction=0.0, final_lr_fraction=0.0),
    )
    return dataclasses.replace(
        run,
        optim=neutral,
        horizon=Horizon(steps=1),
        seed=0,
        eval=dataclasses.replace(run.eval, num_points=0),
        divergence=DivergenceConfig(),
        start=None,
    )
