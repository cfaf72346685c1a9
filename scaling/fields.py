"""Frozen dataclasses that check themselves: what their fields may be, and their JSON.

Only the standard library is imported here, so that a bare accelerator image can read a config. What a person wrote goes
through ``parse``, whose pydantic is imported where it is first needed."""

import dataclasses
import functools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import pydantic


def require(ok: bool, name: str, value: Any, want: str) -> None:
    """Raises ValueError naming the field, its value and what to write instead."""
    if not ok:
        raise ValueError(f"{name} is {value!r}: write {want}")


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, name, value, "a positive number")


def require_fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, name, value, "a number in [0, 1)")


def since(schema: int, default: Any) -> Any:
    """A field that records made before ``schema`` do not have. ``default`` is what the code did before there was the
    field, for ever: at that value it is left out of the canonical JSON, so that ids given earlier stay what they were.
    """
    return field(default=default, metadata={"since": schema})


class Strict:
    """Unknown keys are errors when pydantic builds one of these."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


class Variants(Strict):
    """A base of configs that are told apart by one of their fields, ``told_by``: ``family`` of a model, say.

    Its subclasses are entered in ``variants`` by their default of that field; JSON that has none means ``usual``.
    """

    told_by: ClassVar[str]
    usual: ClassVar[str]
    variants: ClassVar[dict[str, type]]

    def __init_subclass__(cls, *, told_by: str | None = None, usual: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if told_by is not None:
            cls.told_by, cls.usual, cls.variants = told_by, usual, {}
        else:
            cls.variants[getattr(cls, cls.told_by)] = cls

    @classmethod
    def variant(cls, raw: Mapping[str, Any]) -> type:
        """Returns the class that ``raw`` is of, ``cls`` itself if that is one; raises ValueError for none."""
        if cls in cls.variants.values():
            return cls
        name = raw.get(cls.told_by, cls.usual)
        require(name in cls.variants, cls.told_by, name, f"one of {', '.join(cls.variants)}")
        return cls.variants[name]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """How pydantic builds a field of this type: as the variant that is named."""
        if cls in cls.variants.values():
            return handler(source)
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls._validated)

    @classmethod
    def _validated(cls, raw: Any) -> Any:
        if isinstance(raw, cls):
            return raw
        require(isinstance(raw, Mapping), cls.told_by, raw, "a mapping of its fields")
        return parse(cls, raw)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts, every default written out."""
    return dataclasses.asdict(config)


def canonical_json(config: Any) -> str:
    """Sorted keys, no spaces, shortest round-trip floats, fields younger than the config left out; the text that
    ``run_id`` hashes."""
    return json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _canonical(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
    return {f.name: _canonical(v) for f, v in pairs if not ("since" in f.metadata and v == f.default)}


def value_at(config: Any, path: str) -> Any:
    """Returns the value at a dotted path of fields, as in ``optim.name``; None below what is None (a model without
    experts has no number of them). Raises KeyError where there is no such field."""
    node = config
    for name in path.split("."):
        if not dataclasses.is_dataclass(node) or name not in {f.name for f in dataclasses.fields(node)}:
            raise KeyError(path)
        node = getattr(node, name)
        if node is None:
            return None
    return node


def from_dict(cls: type, raw: dict[str, Any]) -> Any:
    """Builds the dataclass ``cls`` from what ``to_dict`` gave, with the standard library alone.

    For trusted text only (a worker's input, a record's config): types are not checked, unknown and missing keys raise
    TypeError. Everything a person wrote goes through ``parse``.
    """
    cls = cls.variant(raw) if hasattr(cls, "variant") else cls  # a base whose subclasses are told apart by a field
    inner = configs_in(cls)
    return cls(
        **{
            key: from_dict(inner[key], value) if key in inner and value is not None else value
            for key, value in raw.items()
        }
    )


@functools.cache
def configs_in(cls: type) -> dict[str, type]:
    """The fields of a dataclass that hold one, or one or null, with it."""
    return {name: found for name, hint in get_type_hints(cls).items() if (found := config_in(hint)) is not None}


def config_in(hint: Any) -> type | None:
    """The dataclass that a field of this type holds, where it holds one or null; None of any other type."""
    options = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


@functools.cache
def _adapter(cls: type) -> "pydantic.TypeAdapter[Any]":
    import pydantic

    return pydantic.TypeAdapter(cls)


def parse(cls: type, raw: Any) -> Any:
    """Builds the dataclass ``cls`` from plain dicts.

    Raises pydantic.ValidationError, whose ``errors()`` carry the path of every bad key.
    """
    return _adapter(cls.variant(raw) if hasattr(cls, "variant") else cls).validate_python(raw)
