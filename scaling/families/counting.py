"""What a family counts, and the rules that make FLOPs of it: each rule is written once, for all families.

FLOPs are training FLOPs (forward + backward = 3 × forward), one multiply-add counted as two. Rules, per token, with
N ``non_embedding``, N_w the weights of the matrix products except the head, for every mixing of tokens L its layers,
A its width, H its heads and T the tokens it is over, V D the head. Groups that are no part of N are worked with all the
same, and count; what a token does not meet (``inactive``) does not:

- ``6ND``        6 N
- ``6ND_total``  6 (N + embedding + unembedding)
- ``kaplan``     3 (2 N_w + Σ 2 L T A) (Kaplan et al. 2020, table 1)
- ``chinchilla`` 3 × the forward sum of Hoffmann et al. 2022, appendix F: the embedding of tokens as a dense product
                 as large as the head, unmasked attention, softmax as 3 H T, the head
- ``exact``      3 (2 N_w + Σ 2 · 2 L K A + 2 D V): every matmul incl. the head; K keys a query, T/2 where attention is
                 causal, in each of its two products
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Lengths:
    """Tokens of one window: that an encoder reads, that a decoder writes, that carry loss (a decoder: 0, T, T)."""

    read: int
    written: int
    predicted: int


@dataclass(frozen=True)
class Product:
    """Matrix products of one kind, (fan_in, fan_out) each, ``copies`` of them (layers, most often).

    ``share``: the part of the weights that a token meets, k of E experts, or of the tokens that meet them. ``over``:
    whose tokens these are.
    """

    group: str
    fan_in: int
    fan_out: int
    copies: int = 1
    share: float = 1.0
    over: Literal["read", "written"] = "written"

    @property
    def weights(self) -> int:
        return self.fan_in * self.fan_out * self.copies

    @property
    def met(self) -> float:
        """Weights that a token meets on average."""
        return self.weights if self.share == 1.0 else self.share * self.weights


@dataclass(frozen=True)
class Mixing:
    """How tokens of a window meet: ``layers`` of a mixing of this ``width`` and so many ``heads``.

    ``scan`` is a recurrence: its products are among the ``Product``, and no token meets another by a product.
    """

    width: int
    heads: int
    layers: int
    kind: Literal["causal", "full", "cross", "scan"]


@dataclass(frozen=True)
class Counts:
    """What a model is made of, in numbers.

    Args:
      groups: parameters by group; tables of tokens and positions are ``embedding``, a head of its own ``unembedding``.
      products: the matrix products that a token meets. The head is in group ``unembedding``, also where it is tied.
      mixing: how tokens meet.
      inactive: parameters that a token does not meet (experts that were not chosen).
      apart: groups that do not count as the model's N (a generator that is thrown away, say).
    """

    groups: Mapping[str, int]
    products: tuple[Product, ...]
    mixing: tuple[Mixing, ...] = ()
    inactive: int = 0
    apart: tuple[str, ...] = field(default=())

    @property
    def num_params(self) -> dict[str, int]:
        """Parameters by group, and their sums ``non_embedding`` and ``total``."""
        inner = {g: n for g, n in self.groups.items() if g not in ("embedding", "unembedding") and g not in self.apart}
        whole = sum(n for g, n in self.groups.items() if g not in self.apart)
        return {**self.groups, "non_embedding": sum(inner.values()), "total": whole}

    @property
    def held(self) -> int:
        """Parameters that are trained and kept, groups apart too."""
        return sum(self.groups.values())

    @property
    def inner_weights(self) -> float:
        """N_w: weights of the products that a token meets, without the head."""
        return sum(p.met for p in self.products if not _is_head(p))

    @property
    def head_weights(self) -> float:
        return sum(p.met for p in self.products if _is_head(p))

    def inner(self, group: str) -> int:
        """Weights of the products of one group."""
        return sum(p.weights for p in self.products if p.group == group)

    @property
    def attention(self) -> list[Mixing]:
        """The mixings that are made of products of queries and keys."""
        return [m for m in self.mixing if m.kind != "scan"]


def _is_head(product: Product) -> bool:
    return product.group == "unembedding"


def six_nd(counts: Counts, lengths: Lengths) -> float:
    return 6.0 * (counts.held - counts.inactive - sum(counts.groups[g] for g in ("embedding", "unembedding")))


def six_nd_total(counts: Counts, lengths: Lengths) -> float:
    return 6.0 * (counts.held - counts.inactive)


def kaplan(counts: Counts, lengths: Lengths) -> float:
    T = lengths.written
    return 3.0 * (2 * counts.inner_weights + sum(2 * m.layers * T * m.width for m in counts.attention))


def chinchilla(counts: Counts, lengths: Lengths) -> float:
    T = lengths.written
    attention = sum(m.layers * (2 * T * m.width + 3 * m.heads * T + 2 * T * m.width) for m in counts.attention)
    return 3.0 * (2 * counts.head_weights + 2 * counts.inner_weights + attention + 2 * counts.head_weights)


def exact(counts: Counts, lengths: Lengths) -> float:
    T = lengths.written
    attention = sum(2 * m.layers * 2 * (T / 2 if m.kind == "causal" else T) * m.width for m in counts.attention)
    return 3.0 * (2 * counts.inner_weights + attention + 2 * counts.head_weights)


# Training FLOPs per token by each rule. A rule that is added here is known to grids, plans, records and laws.
RULES: dict[str, Callable[[Counts, Lengths], float]] = {
    "6ND": six_nd,
    "6ND_total": six_nd_total,
    "kaplan": kaplan,
    "chinchilla": chinchilla,
    "exact": exact,
}
