"""Losses of replaced-token detection: the discriminator's of every token, and the generator's of the hidden ones.

Shapes: B rows, T tokens, M hidden ones of a row, D d_model, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from scaling.config import RunConfig
from scaling.execution import ExecutionConfig
from scaling.objectives import replaced_token
from scaling.training import models
from scaling.training.losses import Losses
from scaling.training.models.parameters import ParamSpec, dense

_PREFIX = "generator_"


def param_specs(run: RunConfig) -> dict[str, ParamSpec]:
    """The discriminator's head, drawn as a head over the vocabulary is, and the generator's parameters. Its projection
    (D, D_g) makes of a table at D^-1/2 one at D_g^-1/2, what a tied table of its own would be drawn at."""
    model = run.model
    small = replaced_token.generator(run.objective, model)  # type: ignore[arg-type]  # its own config
    own = {n: s for n, s in models.param_specs(small).items() if n != "embedding"}
    std = small.d_model**-0.5
    return {
        "discriminator": ParamSpec((model.d_model, 1), ("embed", None), model.d_model**-0.5, "unembedding", decay=True),
        "discriminator_bias": ParamSpec((1,), ("norm",), 0.0, "unembedding"),
        f"{_PREFIX}projection": ParamSpec((model.d_model, small.d_model), ("embed", None), std, "generator"),
        **{f"{_PREFIX}{n}": dataclasses.replace(s, group="generator") for n, s in own.items()},
    }


def losses(run: RunConfig, execution: ExecutionConfig, params, batch) -> Losses:
    """Binary cross entropy in nats of each token, was it replaced; minimised is λ of it + the generator's loss.

    Clark et al. 2020, equations 1 to 3: with x the text, m the hidden places, x̂_m drawn from the generator's softmax
    and x elsewhere, L = E[-Σ_m log p_G(x_m | x masked)] + λ E[-Σ_t 1(x̂_t = x_t) log D_t + 1(x̂_t ≠ x_t) log(1 - D_t)],
    here means over hidden and over all tokens, as in their code. 1 - D is the chance of "replaced", whose logit the
    head gives. No gradient goes through the draw; a token that is drawn as it was counts as the text's.
    ``generator_loss`` is kept as a measure, in nats per hidden token.
    """
    config, tokens_BT = run.objective, batch["tokens"]
    network = models.network(run.model)
    sees = {"causal": False}
    keys = {} if "keys" not in batch else {"keys_B": batch["keys"]}
    theirs = {} if "keys" not in batch else {"keys_B": jax.vmap(lambda k: jax.random.fold_in(k, 1))(batch["keys"])}

    small = replaced_token.generator(config, run.model)  # type: ignore[arg-type]  # its own config
    of_generator = {n.removeprefix(_PREFIX): p for n, p in params.items() if n.startswith(_PREFIX)}
    of_generator["embedding"] = params["embedding"] @ of_generator.pop("projection")
    places_BM, hidden_BM = batch["places"], batch["hidden"]
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]

    def with_at_places(values_BM):
        """The tokens, those that are hidden replaced; a place beyond the window's own tokens is left alone."""
        there_BM = jnp.where(hidden_BM > 0, values_BM, jnp.take_along_axis(tokens_BT, places_BM, axis=1))
        return tokens_BT.at[rows_B1, places_BM].set(there_BM)

    shown_BT = with_at_places(jnp.full_like(places_BM, run.model.vocab_size - 1))
    found = network.hidden(small, execution, of_generator, shown_BT, **sees, **theirs)
    h_BMD = jnp.take_along_axis(found.h_BTD, places_BM[..., None], axis=1)
    logits_BMV = models.logits(small, models.head(small, of_generator), h_BMD)
    true_BM = jnp.take_along_axis(tokens_BT, places_BM, axis=1)
    at_true_BM = jnp.take_along_axis(logits_BMV, true_BM[..., None], axis=-1)[..., 0]
    generator_loss_BM = (jax.nn.logsumexp(logits_BMV, axis=-1) - at_true_BM) * hidden_BM

    noise_BMV = gumbel(batch["draw"], *logits_BMV.shape[1:])
    drawn_BM = jnp.argmax(jax.lax.stop_gradient(logits_BMV) + noise_BMV, axis=-1).astype(tokens_BT.dtype)
    read_BT = with_at_places(drawn_BM)

    judged = network.hidden(run.model, execution, params, read_BT, **sees, **keys)
    head_D1 = params["discriminator"].astype(judged.h_BTD.dtype)
    logit_BT = dense(judged.h_BTD, head_D1, dtype=jnp.float32)[..., 0] + params["discriminator_bias"][None]
    loss_BT = jax.nn.softplus(logit_BT) - jnp.where(read_BT != tokens_BT, logit_BT, 0.0)

    penalties = [p for p in (found.penalty, judged.penalty) if p is not None]
    return Losses(
        loss_BT,
        batch["weights"],
        scale=config.discriminator_weight,  # type: ignore[attr-defined]  # its own config
        penalty=sum(penalties, jnp.mean(generator_loss_BM)),
        measures={**judged.measures, "generator_loss": (generator_loss_BM.sum(axis=1), hidden_BM.sum(axis=1))},
    )


def gumbel(draw_B2, num_hidden: int, vocab_size: int):
    """Standard Gumbel noise, float32 (B, M, V): -log(-log u), u of 23 bits that a row's key and the place among its M V
    give through MurmurHash3's finaliser, twice (Appleby 2011).

    Not by ``jax.random``: its rounds of threefry, unrolled, are what the compiler would spend its time on.
    """
    place_1N = jnp.arange(num_hidden * vocab_size, dtype=jnp.uint32)[None]
    x_BN = _mixed(place_1N * jnp.uint32(0x9E3779B9) + draw_B2[:, :1])
    x_BN = _mixed(x_BN ^ draw_B2[:, 1:])
    u_BN = ((x_BN >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(u_BN)).reshape(-1, num_hidden, vocab_size)


def _mixed(x):
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
