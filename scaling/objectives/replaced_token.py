"""Replaced tokens (Clark et al. 2020, ELECTRA): a generator fills in what is hidden, a discriminator tells which tokens
are not the text's.

Of a window's T tokens after the first, round(rate · T) are hidden, as the mask, the last id of the vocabulary. The
generator, a model of the same family and depth at a part of the width, is trained as a masked model; what it draws
takes their places, and the discriminator, which is the run's model, says of every token whether it is another than the
text's. Which are hidden follows from the window's key alone, and so does the noise that the generator draws by.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from scaling import families
from scaling.families.counting import Counts, Lengths, Product, Sees
from scaling.fields import require, require_positive
from scaling.objectives import masked
from scaling.objectives.base import ObjectiveConfig, each_alone

if TYPE_CHECKING:
    import numpy as np

    from scaling.families import ModelConfig

losses = "scaling.training.losses.replaced_token"
unit = "nats per token"
sees: Sees = "full"
is_likelihood = False
_MULTIPLE = 8  # of the generator's width: what the families' rules of sizes ask for


@dataclass(frozen=True, kw_only=True)
class ReplacedToken(ObjectiveConfig):
    """``rate``: the share of tokens that is hidden; ``generator_width``: the generator's width by the model's, to the
    nearest multiple of 8; ``discriminator_weight``: of the discriminator's loss, the generator's having 1. Defaults are
    Clark et al.'s, section 3 and table 6 (their small and large models have a quarter, and hide 15 % and 25 %)."""

    name: Literal["replaced_token"] = "replaced_token"
    rate: float = 0.15
    generator_width: float = 0.25
    discriminator_weight: float = 50.0

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "rate", self.rate, "a share of the tokens in (0, 1), as 0.15")
        want = "a share of the model's width in (0, 1], as 0.25"
        require(0 < self.generator_width <= 1, "generator_width", self.generator_width, want)
        require_positive(self, "discriminator_weight")


Config: type[ObjectiveConfig] = ReplacedToken


def extra_ids(config: ReplacedToken, seq_len: int) -> int:
    return 1


def guess(config: ReplacedToken, vocab_size: int) -> float:
    return math.log(2)


def require_fit(config: ReplacedToken, run: Any) -> None:
    """Raises ValueError for an untied head, which nothing would train; for μP, which is not known to hold between
    models of two widths; and for a z-loss, as the discriminator has no normaliser."""
    of, model = "replaced_token", run.model
    want = f"true: the discriminator of {of} has no head over the vocabulary, so nothing would train one of its own"
    require(model.tied_embeddings, "model.tied_embeddings", model.tied_embeddings, want)
    want = f"standard: how rates transfer over two widths that share a table, as {of}'s do, is not known"
    require(model.parameterization == "standard", "model.parameterization", model.parameterization, want)
    want = f"0: there is no normaliser over the vocabulary in the loss of {of}"
    require(run.optim.z_loss == 0, "optim.z_loss", run.optim.z_loss, want)


def generator(config: ReplacedToken, model: "ModelConfig") -> "ModelConfig":
    """Returns the generator's config: the model's, at its own width and by the family's rule of sizes, but as deep.

    Its table of tokens is the model's times a projection (D, D_g), and its head is that table again: the two share
    embeddings (Clark et al. 2020, section 3.2), of which ELECTRA's generator reads the projection too.
    """
    family = families.of(model)
    width = _MULTIPLE * max(1, round(config.generator_width * model.d_model / _MULTIPLE))
    of_width = set(family.completed(family.shape(width, {})))
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in of_width}
    sizes = family.completed(family.shape(width, given))
    return dataclasses.replace(model, **{**sizes, "num_layers": model.num_layers})


rows_together = each_alone


def networks(config: ReplacedToken, model: "ModelConfig") -> "tuple[ModelConfig, ...]":
    return model, generator(config, model)


def lengths(config: ReplacedToken, seq_len: int) -> Lengths:
    return Lengths(read=0, written=seq_len, predicted=seq_len)


def counts(config: ReplacedToken, model: "ModelConfig", of_model: Counts) -> Counts:
    """Both models. The generator is apart, no part of N, and worked with all the same: a token meets both, and of the
    generator's head a share ``rate``, the tokens that are hidden.

    ``exact`` takes three times forward for both, as of every run here; ELECTRA's published counter (their
    flops_computation.py) takes backward to cost what forward does, twice forward in all: mind it in a comparison.
    Not counted: the generator's table as a product of the model's with the projection, V D D_g for a batch, or a part
    of one, whatever its tokens.
    """
    small = generator(config, model)
    of_generator = families.of(small).counts(small, sees)
    V, D, small_D = model.vocab_size, model.d_model, small.d_model
    inner = [p for p in of_model.products if p.group != "unembedding"]
    theirs = [
        dataclasses.replace(p, group="generator") for p in of_generator.products if p.group != "unembedding"
    ]  # fmt: skip
    heads = [Product("unembedding", D, 1), Product("unembedding", small_D, V, share=config.rate)]
    return Counts(
        groups={
            **of_model.groups,
            "unembedding": D + 1,  # the discriminator's, with its bias
            "generator": sum(of_generator.groups.values()) - V * small_D + D * small_D,
        },
        products=(*inner, *theirs, *heads),
        mixing=(*of_model.mixing, *of_generator.mixing),
        inactive=of_model.inactive,
        inactive_apart=of_generator.inactive,
        lookups=V * (D + small_D),
        apart=(*of_model.apart, "generator"),
    )


def predicted(config: ReplacedToken, tokens_R: "np.ndarray") -> "np.ndarray":
    return tokens_R


def batch_spec(config: ReplacedToken, seq_len: int) -> dict[str, tuple[int, str]]:
    num_hidden = masked.num_chosen(config.rate, seq_len)
    return {
        "tokens": (seq_len, "int32"),
        "weights": (seq_len, "float32"),
        "places": (num_hidden, "int32"),  # of the hidden tokens, in no order
        "hidden": (num_hidden, "float32"),  # 0 where a window that is padded has fewer
        "draw": (2, "uint32"),  # a key of the generator's noise
    }


def batch(
    config: ReplacedToken,
    vocab_size: int,
    windows_RS: "np.ndarray",
    keys_R: "np.ndarray",
    present_RT: "np.ndarray | None" = None,
) -> "dict[str, np.ndarray]":
    import numpy as np

    tokens_RT = windows_RS[:, 1:]
    weights_RT = np.ones(tokens_RT.shape, np.float32) if present_RT is None else present_RT
    order_RT, num_R = masked.ordered(config.rate, keys_R, tokens_RT.shape[1], present_RT)
    places_RM = order_RT.argsort(axis=1, kind="stable")[:, : masked.num_chosen(config.rate, tokens_RT.shape[1])]
    draw_R2 = masked.uniform(keys_R, 2, salt=3) * 2.0**32
    return {
        "tokens": tokens_RT,
        "weights": weights_RT.astype(np.float32),
        "places": places_RM.astype(np.int32),
        "hidden": (np.arange(places_RM.shape[1]) < num_R[:, None]).astype(np.float32),
        "draw": draw_R2.astype(np.uint32),
    }


def read(batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return batch["tokens"], batch["tokens"], batch["weights"]
