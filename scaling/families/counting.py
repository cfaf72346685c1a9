"""What a family counts, and the rules that make FLOPs of it: each rule is written once, for all families.

FLOPs are training FLOPs (forward + backward = 3 × forward), one multiply-add counted as two. Rules, per token, with
N ``non_embedding``, N_w the weights of the matrix products except the head, for every mixing of tokens L its layers,
A its width, H its heads and T the tokens it is over, V D the head. Groups that are no part of N are worked with all the
same, and count; what a token does not meet (``inactive``) does not. A token is one of
the window's text. Where not each is met once (``Lengths``), N_w, V D and T are what a token of the text meets on
average: products times the tokens that go through them, and pairs of tokens that a mixing is over, by the window's
text. ``6ND`` and ``6ND_total`` stay what their names say: all parameters, all of the text, whatever meets which stack.

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
    """Tokens of one window: that are read whole, that are written, that carry loss (next token: 0, T, T), and of its
    text, as ``num_tokens`` counts them; 0 means as many as are written.

    ``passes``: sequences that a window gives, of so many tokens read and written each (two spans: 2).
    """

    read: int
    written: int
    predicted: int
    text: int = 0
    passes: int = 1

    def of(self, over: "Over") -> int:
        """Tokens of a sequence that go through what is ``over`` them."""
        return (self.read if over != "written" else 0) + (self.written if over != "read" else 0)

    @property
    def window(self) -> int:
        return self.text or self.passes * self.written

    def share(self, over: "Over") -> float:
        """Tokens that go through what is ``over`` them, by the tokens of the text."""
        return self.passes * self.of(over) / self.window


# Tokens that meet something: those that are read whole, those that are written, or both.
Over = Literal["read", "written", "both"]
# What a token sees: those before it; all; all that are read and, of what is written, those before it.
Sees = Literal["causal", "full", "prefix"]


@dataclass(frozen=True)
class Product:
    """Matrix products of one kind, (fan_in, fan_out) each, ``copies`` of them (layers, most often).

    ``share``: the part of the weights that a token meets, k of E experts, or of the tokens that meet them. ``over``:
    whose tokens these are. ``is_hidden``: whether both sides grow with width (not a router's): what optimisers of
    matrices work on.
    """

    group: str
    fan_in: int
    fan_out: int
    copies: int = 1
    share: float = 1.0
    over: Over = "written"
    is_hidden: bool = True

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

    ``over``: the tokens that meet; of kind ``cross`` the written ones meet all that are read. ``scan`` is a recurrence:
    its products are among the ``Product``, and no token meets another by a product.
    """

    width: int
    heads: int
    layers: int
    kind: Sees | Literal["cross", "scan"]
    over: Over = "written"

    def square(self, lengths: Lengths) -> int:
        """Pairs of a query and a key, those that a mask hides too."""
        pairs = lengths.written * lengths.read if self.kind == "cross" else lengths.of(self.over) ** 2
        return lengths.passes * pairs

    def pairs(self, lengths: Lengths) -> float:
        """Pairs of a query and a key that it may see, of n causal tokens n²/2."""
        if self.kind == "causal":
            return self.square(lengths) / 2
        if self.kind == "prefix":
            hidden = lengths.written * lengths.read + lengths.written**2 / 2
            return self.square(lengths) - lengths.passes * hidden
        return self.square(lengths)


@dataclass(frozen=True)
class Counts:
    """What a model is made of, in numbers.

    Args:
      groups: parameters by group; tables of tokens and positions are ``embedding``, a head of its own ``unembedding``.
      products: the matrix products that a token meets. The head is in group ``unembedding``, also where it is tied.
      mixing: how tokens meet.
      inactive: parameters of the model that a token does not meet (experts that were not chosen).
      inactive_apart: the same of the groups ``apart``.
      lookups: weights of the tables of tokens that a token is read from; None: as many as the head's.
      apart: groups that do not count as the model's N (a generator that is thrown away, say).
    """

    groups: Mapping[str, int]
    products: tuple[Product, ...]
    mixing: tuple[Mixing, ...] = ()
    inactive: int = 0
    inactive_apart: int = 0
    lookups: int | None = None
    apart: tuple[str, ...] = field(default=())

    @property
    def num_params(self) -> dict[str, int]:
        """Parameters by group, and their sums ``non_embedding`` and ``total``; where a token does not meet all of them,
        ``active`` too: those of ``non_embedding`` that it meets."""
        inner = {g: n for g, n in self.groups.items() if g not in ("embedding", "unembedding") and g not in self.apart}
        whole = sum(n for g, n in self.groups.items() if g not in self.apart)
        counted = {**self.groups, "non_embedding": sum(inner.values()), "total": whole}
        return {**counted, "active": counted["non_embedding"] - self.inactive} if self.inactive else counted

    @property
    def held(self) -> int:
        """Parameters that are trained and kept, groups apart too."""
        return sum(self.groups.values())

    @property
    def worked_on(self) -> int:
        """Of those, the ones that a token meets."""
        return self.held - self.inactive - self.inactive_apart

    @property
    def inner_weights(self) -> float:
        """N_w: weights of the products that a token meets, without the head."""
        return sum(p.met for p in self.products if not _is_head(p))

    @property
    def head_weights(self) -> float:
        return sum(p.met for p in self.products if _is_head(p))

    @property
    def num_logits(self) -> float:
        """Of a token, on average."""
        return sum(p.share * p.fan_out * p.copies for p in self.products if _is_head(p))

    def inner(self, group: str) -> int:
        """Weights of the products of one group."""
        return sum(p.weights for p in self.products if p.group == group)

    @property
    def attention(self) -> list[Mixing]:
        """The mixings that are made of products of queries and keys."""
        return [m for m in self.mixing if m.kind != "scan"]

    def worked(self, lengths: Lengths) -> tuple[float, float]:
        """Weights of the products that a token of the text meets, on average: (without the head, of the head)."""
        sums = [0.0, 0.0]
        for p in self.products:
            sums[_is_head(p)] += p.share * p.weights * lengths.share(p.over)
        return sums[0], sums[1]


def _is_head(product: Product) -> bool:
    return product.group == "unembedding"


def six_nd(counts: Counts, lengths: Lengths) -> float:
    return 6.0 * (counts.worked_on - sum(counts.groups[g] for g in ("embedding", "unembedding")))


def six_nd_total(counts: Counts, lengths: Lengths) -> float:
    return 6.0 * counts.worked_on


def kaplan(counts: Counts, lengths: Lengths) -> float:
    inner, _ = counts.worked(lengths)
    return 3.0 * (
        2 * inner + sum(2 * m.layers * (m.square(lengths) / lengths.window) * m.width for m in counts.attention)
    )


def chinchilla(counts: Counts, lengths: Lengths) -> float:
    inner, head = counts.worked(lengths)
    lookups = counts.head_weights if counts.lookups is None else counts.lookups
    embedding = lookups * lengths.share("both")
    attention = sum(
        m.layers * (2 * m.width + 3 * m.heads + 2 * m.width) * (m.square(lengths) / lengths.window)
        for m in counts.attention
    )
    return 3.0 * (2 * embedding + 2 * inner + attention + 2 * head)


def exact(counts: Counts, lengths: Lengths) -> float:
    inner, head = counts.worked(lengths)
    attention = sum(2 * m.layers * 2 * (m.pairs(lengths) / lengths.window) * m.width for m in counts.attention)
    return 3.0 * (2 * inner + attention + 2 * head)


# Training FLOPs per token by each rule. A rule that is added here is known to grids, plans, records and laws.
RULES: dict[str, Callable[[Counts, Lengths], float]] = {
    "6ND": six_nd,
    "6ND_total": six_nd_total,
    "kaplan": kaplan,
    "chinchilla": chinchilla,
    "exact": exact,
}
