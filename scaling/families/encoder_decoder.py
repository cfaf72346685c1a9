"""The encoder-decoder Transformer in numbers: its config, its sizes from one dial, its counts. No JAX.

An encoder reads tokens, each seeing all of them; a decoder writes, each token seeing those before it and, by a cross
attention in every layer, all that was read. Its layers are the decoder-only Transformer's, with its settings.

As a grid has them: the Transformer of Vaswani et al. 2017,

    model: {family: encoder_decoder, width: 512, num_layers: 6, num_encoder_layers: 6, norm: layer, biases: true,
            norm_position: post, positions: sinusoidal, activation: relu, scaled_embeddings: true,
            tied_embeddings: true, dropout: 0.1}

T5's base size (Raffel et al. 2020, arXiv 1910.10683), 222,903,552 parameters, and version 1.1's with
``activation: geglu, d_ff: 2048, tied_embeddings: false, scaled_embeddings: false`` (Shazeer 2020, arXiv 2002.05202),

    model: {family: encoder_decoder, width: 768, head_dim: 64, vocab_size: 32128, num_layers: 12,
            num_encoder_layers: 12, norm: rms, positions: relative, activation: relu, scaled_embeddings: true,
            tied_embeddings: true, dropout: 0.1}

Biases by distance are of self attention alone, a table for the encoder (both ways) and one for the decoder. The same
functions as T5's, drawn otherwise: logits of attention are divided by √head_dim here and the head's by nothing, where
T5 has the first in the size of its queries and divides the head's by √d_model; and T5 drops weights of attention and
values within the feed-forward too. The rule of sizes is the Transformer's, with an encoder as deep as the decoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.families import transformer
from scaling.families.base import ModelConfig
from scaling.families.counting import Counts, Lengths, Mixing, Product, Sees
from scaling.families.transformer import TransformerConfig, norm_has_bias
from scaling.fields import require, require_positive

network = "scaling.training.models.encoder_decoder"
sees: tuple[Sees, ...] = ("prefix",)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TransformerConfig):
    """An encoder and a decoder of ``num_layers``; every size but their depths is both's.

    ``tied_embeddings`` is of the decoder's table and the head.
    """

    family: Literal["encoder_decoder"] = "encoder_decoder"  # type: ignore[assignment]  # another family's name
    num_encoder_layers: int
    shared_embeddings: bool = True  # one table of tokens for what is read and what is written

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_encoder_layers")
        require(self.mlp is None, "mlp", self.mlp, "null: an encoder_decoder model has no experts")
        require(
            self.parameterization == "standard", "parameterization", self.parameterization,
            "standard: how rates transfer over the width of an encoder-decoder has not been checked here",
        )  # fmt: skip

    def tokens_at_once(self, lengths: Lengths) -> int:
        return max(lengths.read, lengths.written)


Config: type[ModelConfig] = EncoderDecoderConfig


def shape(width: int, given: Mapping[str, Any]) -> dict[str, Any]:
    return transformer.shape(width, given)


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the fields that follow from others of them: an encoder as deep as the decoder."""
    equal = {"num_encoder_layers": given["num_layers"]} if "num_layers" in given else {}
    return {**equal, **transformer.completed(given)}


def attention_parameters(config: EncoderDecoderConfig) -> int:
    """Of one layer's cross attention, norms apart."""
    c, D = config, config.d_model
    attn_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return 2 * D * (attn_width + kv_width) + (attn_width + 2 * kv_width + D if c.biases else 0)


def counts(config: EncoderDecoderConfig, sees: Sees = "prefix") -> Counts:
    """Parameters, products and mixings: those of a Transformer that writes, of one that reads, and what is across.

    The table of what is read is in ``embedding`` too.
    """
    c, D, L, E = config, config.d_model, config.num_layers, config.num_encoder_layers
    attn_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    one = transformer.counts(c, "causal")
    per_norm = 2 if norm_has_bias(c) else 1
    final = per_norm * D if c.norm_position == "pre" else 0
    groups = {name: one.groups[name] // L * (L + E) for name in ("attention", "mlp")}
    tables = c.vocab_size * (1 if c.shared_embeddings else 2)
    cross_norm = per_norm * (D + (2 * c.head_dim if c.qk_norm else 0))
    inner = [p for p in one.products if p.group != "unembedding"]
    products = (
        *inner,
        *(Product(p.group, p.fan_in, p.fan_out, p.copies // L * E, p.share, "read") for p in inner),
        Product("cross_attention", D, attn_width, 2 * L),  # queries, and the output
        Product("cross_attention", D, kv_width, 2 * L, over="read"),
        *(p for p in one.products if p.group == "unembedding"),
    )
    mixing = (
        Mixing(attn_width, c.num_heads, L, "causal"),
        Mixing(attn_width, c.num_heads, E, "full", "read"),
        Mixing(attn_width, c.num_heads, L, "cross"),
    )
    return Counts(
        {
            "embedding": tables * D + 2 * transformer.position_parameters(c),
            **groups,
            "cross_attention": L * attention_parameters(c),
            "norm": (one.groups["norm"] - final) // L * (L + E) + 2 * final + L * cross_norm,
            "unembedding": one.groups["unembedding"],
        },
        products,
        mixing,
    )


def kept_values(config: EncoderDecoderConfig) -> int:
    """Per token of the window and layer of the decoder, with the encoder's layers, as if each stack had all of them."""
    c, one = config, transformer.kept_values(config)
    across = 2 * c.d_model + 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    return one + across + -(-c.num_encoder_layers * (8 * c.d_model + one) // c.num_layers)


def pair_values(config: EncoderDecoderConfig, seq_len: int) -> int:
    """Of self attention and of what is across, and of the encoder's layers, counted as ``kept_values``."""
    c = config
    return c.num_heads * seq_len * 2 + -(-c.num_heads * seq_len * c.num_encoder_layers // c.num_layers)


def divided(config: EncoderDecoderConfig) -> list[tuple[str, int, str]]:
    return transformer.divided(config)
