"""Families of models in numbers, without JAX: one module each, entered in ``FAMILIES``.

A family is a module here (``base.Family`` says what it holds) and its network in ``scaling/training/models/``.
"""

from scaling.families import encoder_decoder, recurrent, transformer
from scaling.families.base import Family, ModelConfig

FAMILIES: dict[str, Family] = {"transformer": transformer, "recurrent": recurrent, "encoder_decoder": encoder_decoder}


def of(config: ModelConfig) -> Family:
    """The family that a config is of."""
    return FAMILIES[config.family]
