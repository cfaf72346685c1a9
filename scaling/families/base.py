"""What every family of models has: the sizes that others ask for, and how a config finds its family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from scaling.families.counting import Counts, Lengths, Sees
from scaling.fields import Variants, require, require_positive


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Variants, told_by="family", usual="transformer"):
    """A model of some family: the fields that all families have. Its other fields are the family's own.

    ``d_model`` is the width of what the layers pass on, ``vocab_size`` V, ``num_layers`` L.
    """

    d_model: int
    num_layers: int
    family: str
    vocab_size: int = 256
    tied_embeddings: bool = False
    logit_softcap: float | None = None
    norm_eps: float = 1e-6
    # "mup": width-μP for Adam-like optimisers (Yang et al. 2022, table 8), relative to base_d_model. Hidden matrices
    # learn, and decay, at 1/m of the rate, m = d_model / base_d_model.
    parameterization: Literal["standard", "mup"] = "standard"
    base_d_model: int | None = None
    # Compute dtype; weights and optimiser state are float32 always.
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "num_layers", "vocab_size", "norm_eps")
        if self.logit_softcap is not None:
            require_positive(self, "logit_softcap")
        self.require_base_size("base_d_model")

    def require_base_size(self, name: str) -> None:
        """Raises ValueError unless a size of the base model is given exactly where μP scales from it."""
        value = getattr(self, name)
        if self.parameterization == "mup":
            want = "the size at which the learning rate was tuned (μP scales from it)"
            require(value is not None and value > 0, name, value, want)
        else:
            require(value is None, name, value, "null, or set parameterization: mup")

    @property
    def is_random(self) -> bool:
        """Whether a training step draws random numbers; its state then holds the run's seed."""
        return False

    def tokens_at_once(self, lengths: Lengths) -> int:
        """How many tokens of a window lie beside each other in one stack of layers, at most."""
        return lengths.read + lengths.written

    @property
    def mixes_documents(self) -> str | None:
        """The field by which a document tells on the next one even where documents are masked; None where none does."""
        return None

    @property
    def longest_window(self) -> tuple[str, int] | None:
        """The field that limits how many tokens a window may have, and its value; None without such a limit."""
        return None


class Family(Protocol):
    """What a module of ``scaling.families`` holds. None of it needs JAX. ``config`` is of the module's own ``Config``.

    ``network`` names the module with ``param_specs``, ``hidden``, ``head``, ``logits`` (``scaling.training.models``).
    """

    Config: type[ModelConfig]
    network: str
    sees: tuple[Sees, ...]  # what an objective may let a token see

    def shape(self, width: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that follow from one dial, a width, beside what else is ``given``."""

    def completed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` with the fields that follow from others of them, a size written out or not."""

    def counts(self, config: Any, sees: Sees = "causal") -> Counts:
        """Parameters, products and mixings, where a token sees what ``sees`` says."""

    def kept_values(self, config: Any) -> int:
        """Values per token and layer that the backward pass keeps of a layer; mesh axis ``tensor`` divides them."""

    def pair_values(self, config: Any, seq_len: int) -> int:
        """Values per token and layer that are kept of all its meetings with others, unless a kernel is fused."""

    def divided(self, config: Any) -> list[tuple[str, int, str]]:
        """(field, size, mesh axis) of what a mesh must divide."""
