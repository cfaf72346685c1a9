"""The encoder-decoder Transformer (Vaswani et al. 2017): two stacks of the Transformer's layers, one reading the other.

Shapes: B batch, R tokens read, T tokens written, D d_model, L layers of the decoder, E of the encoder. The decoder's
parameters are called as the Transformer's; what is across in its layers is ``cross_…``, the encoder's ``encoder_…``.
"""

import dataclasses
import functools

import flax.linen as nn
import jax

from scaling.execution import ExecutionConfig
from scaling.families.encoder_decoder import EncoderDecoderConfig
from scaling.training import sharding
from scaling.training.models import attention, transformer
from scaling.training.models.parameters import Hidden, ParamSpec

# Of a layer's self attention, which a cross attention has of its own.
_OF_ATTENTION = ("attn_norm", "w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o", "q_norm", "k_norm")
_TABLE = "embedding"


def param_specs(config: EncoderDecoderConfig) -> dict[str, ParamSpec]:
    """Every parameter by name, initialised as the Transformer's; matrices that write to the decoder's residual stream
    are divided by (3 L)^1/2 under pre-norm, as each layer adds to it three times."""
    c = config
    specs = transformer.param_specs(c)
    if c.norm_position == "pre":
        specs |= {n: _scaled(specs[n], (2 / 3) ** 0.5) for n in ("w_o", "w_out")}
    for name in [n for n in specs if n.removesuffix("_bias") in _OF_ATTENTION]:
        spec = specs[name]
        specs[_across(name)] = dataclasses.replace(spec, group="norm" if spec.group == "norm" else "cross_attention")
    own = transformer.param_specs(_encoder(c))
    own = {n: spec for n, spec in own.items() if n != "unembedding" and not (n == _TABLE and c.shared_embeddings)}
    return specs | {f"encoder_{name}": spec for name, spec in own.items()}


def _across(name: str) -> str:
    return "cross_" + name.removeprefix("attn_")


def _scaled(spec: ParamSpec, factor: float) -> ParamSpec:
    return dataclasses.replace(spec, init_std=spec.init_std * factor)  # type: ignore[operator]  # a matrix's is drawn


def _encoder(config: EncoderDecoderConfig) -> EncoderDecoderConfig:
    """The config of the stack that reads."""
    return dataclasses.replace(config, num_layers=config.num_encoder_layers)


def hidden(
    config: EncoderDecoderConfig,
    execution: ExecutionConfig,
    params: dict[str, jax.Array],
    tokens_BT,
    *,
    read_BR,
    mask_documents: bool = False,
    keys_B=None,
) -> Hidden:
    """Returns h_BTD for tokens_BT that are written, the decoder's output, normalised, in the compute dtype.

    ``read_BR``: the tokens that the encoder reads, without which there is nothing to write from; ``mask_documents`` is
    false (``RunConfig`` has seen to it); ``keys_B``: a key a row, by which dropout is drawn in training.
    """
    c, specs = config, param_specs(config)
    R, T = read_BR.shape[1], tokens_BT.shape[1]
    choose = functools.partial(attention.choose, execution.attention, sharding.platform())
    biased = c.positions == "relative"
    own = [n for n in specs if n.startswith("encoder_")]
    of_encoder = {n.removeprefix("encoder_"): n for n in own} | ({_TABLE: _TABLE} if c.shared_embeddings else {})
    keys = [None, None]
    if keys_B is not None:
        keys = [jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys_B) for i in (0, 1)]
    its = {n: params[name] for n, name in of_encoder.items()}
    read = transformer.through_stack(
        _encoder(c), execution, {n: specs[name] for n, name in of_encoder.items()}, its, read_BR,
        transformer.with_distances(c, choose(R, causal=False, biased=biased), its, R, both_ways=True), keys_B=keys[0],
    )  # fmt: skip
    of_decoder = {n: spec for n, spec in specs.items() if n not in own}
    across = (choose(R, causal=False, cross=True), read.h_BTD)
    written = transformer.through_stack(
        c, execution, of_decoder, params, tokens_BT,
        transformer.with_distances(c, choose(T, biased=biased), params, T, both_ways=False), across=across,
        keys_B=keys[1],
    )  # fmt: skip
    return Hidden(nn.with_logical_constraint(written.h_BTD, ("batch", "seq", "act_embed")))
