"""Text → checked values: YAML read strictly, and checked against dataclasses with the path of whatever is wrong.

The grid's layers are kept flat, as ``Leaves``: {path into the run: (value, path in the file)}. Merging two of them is a
dict union, and any later error about a value still knows where in the file that value was written.
"""

import dataclasses
import difflib
import functools
import re
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, get_args, get_origin

from scaling import fields

Leaves = dict[tuple[str, ...], tuple[Any, str]]


class GridError(ValueError):
    """A grid that cannot be expanded; the text is one line with file, key, value and what to write instead."""


class _Repr(reprlib.Repr):
    maxstring = maxother = 60

    def repr_float(self, x: float, level: int) -> str:
        return f"{x:g}" if float(f"{x:g}") == x else repr(x)


shown: Callable[[Any], str] = _Repr().repr  # short, one line, also of a value that contains itself


# ---- YAML -----------------------------------------------------------------------------------------------------------


@functools.cache
def _loader() -> type:
    """A safe loader that reads scalars as YAML 1.2 does.

    PyYAML's own YAML 1.1 takes 1e17 and 3e-3 for text, 1:30 for ninety, 010 for eight and `no` for false. Duplicate
    keys, of which it keeps the last, are errors here. No tag makes a Python object.
    """
    import yaml

    plain = [*(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "str", "seq", "map")), None]

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}
        yaml_constructors: typing.ClassVar[dict[str | None, Any]] = {
            tag: yaml.SafeLoader.yaml_constructors[tag] for tag in plain
        }

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is here twice", problem_mark=key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
            return node

    def number(kind: type) -> Callable[[Any, Any], Any]:
        return lambda loader, node: kind(loader.construct_scalar(node).replace("_", ""))

    digits = r"[0-9](?:_?[0-9])*"
    resolvers = {
        "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        "int": (rf"[-+]?{digits}", list("-+0123456789")),
        "float": (rf"[-+]?(?:{digits}\.?(?:{digits})?|\.{digits})(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
        "merge": ("<<", ["<"]),
    }
    for name, (pattern, first) in resolvers.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", number(int))
    Loader.add_constructor("tag:yaml.org,2002:float", number(float))
    return Loader


def read_yaml(text: str) -> Any:
    """The plain dicts and lists of a YAML text. Raises GridError with line and column."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(e.problem or e.context).split())
        raise GridError(f"{at}not valid YAML: {problem}; mend that line") from None
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as e:
        # the last three: a number of too many digits, a tag that does not fit its value, nesting without end
        raise GridError(f"not valid YAML: {' '.join(str(e).split())[:200]}; mend that text") from None


# ---- checking -------------------------------------------------------------------------------------------------------


def schema_of(cls: type) -> dict[str, Any]:
    """Field names → type hints, nested for fields that are dataclasses."""
    hints = typing.get_type_hints(cls)
    inner = fields.configs_in(cls)
    return {f.name: schema_of(inner[f.name]) if f.name in inner else hints[f.name] for f in dataclasses.fields(cls)}


def schema_of_any(variants: dict[str, Any], told_by: str) -> dict[str, Any]:
    """Field names → type hints of all of several configs, the first one's where they differ; ``told_by`` names one."""
    found: dict[str, Any] = {}
    for variant in reversed(variants.values()):
        found |= schema_of(variant.Config)
    return found | {told_by: Literal[tuple(variants)]}


def require_known(group: str, config: type, leaves: Leaves, called: str, dials: Collection[str] = ()) -> None:
    """Raises GridError for a leaf of ``group`` that ``config`` has no field for: another variant's.

    ``called``: what the message calls the variant; ``dials``: names that stand for fields of it.
    """
    known = {*dials, *(f.name for f in dataclasses.fields(config))}
    for key, (_, path) in leaves.items():
        if key[0] == group and key[1] not in known:
            raise GridError(f"{path}: {called} has no {key[1]}; write one of {', '.join(sorted(known))}")


def join(path: str, key: Any) -> str:
    text = key if isinstance(key, str) and re.fullmatch(r"[\w.@-]+", key) else shown(key)
    return f"{path}.{text}" if path else text


def did_you_mean(wrong: Any, options: Iterable[str]) -> str:
    """A hint to the option nearest in spelling; of a dict the value is shown for the key that is near."""
    close = difflib.get_close_matches(str(wrong), options, n=1, cutoff=0.6)
    if not close:
        return ""
    found = options[close[0]] if isinstance(options, dict) else close[0]
    return f"; did you mean {found!r}?"


def paths_of(schema: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted path of a schema, shallow ones first."""
    nested = [paths_of(hint, f"{prefix}{key}.") for key, hint in schema.items() if isinstance(hint, dict)]
    return [f"{prefix}{key}" for key in schema] + [path for paths in nested for path in paths]


def mapping(raw: Any, path: str, allowed: Iterable[str] | None = None) -> dict[str, Any]:
    """``raw`` if it is a dict whose keys are all ``allowed``; a key that belongs one level deeper is pointed there."""
    if not isinstance(raw, dict):
        raise GridError(f"{path or 'grid'}: {shown(raw)} is not a mapping; write `key: value` lines")
    for key in raw:
        if not isinstance(key, str):
            raise GridError(f"{join(path, key)}: the key is not text; write it in quotes")
        if allowed is not None and key not in allowed:
            paths = paths_of(allowed) if isinstance(allowed, dict) else []
            deeper = next((p for p in paths if p.endswith(f".{key}")), None)
            hint = f"; did you mean {deeper!r}?" if deeper else did_you_mean(key, list(allowed))
            raise GridError(f"{join(path, key)}: unknown key{hint or '; write one of ' + ', '.join(allowed)}")
    return raw


def nonempty(raw: Any, path: str, kind: type = list) -> Any:
    if not isinstance(raw, kind) or not raw:
        want, how = ("a list", "[first, second]") if kind is list else ("a mapping", "{key: value}")
        raise GridError(f"{path}: {shown(raw)} is not {want} with at least one entry; write {how}")
    return raw


_WANTED = {
    str: ("text", "it in quotes"),
    bool: ("true or false", "one of the two"),
    dict: ("a mapping of coordinates", "e.g. {stage: pretrain}"),
}


def leaf(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the type ``hint`` asks for: whole floats become ints, ints become floats, nothing else changes."""
    options = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and type(None) in options:
        return None
    hint = options[0]
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if not isinstance(value, str) or value not in choices:
            raise GridError(f"{path}: {shown(value)} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")
        return value
    if get_origin(hint) is tuple:
        each = get_args(hint)[0]
        return tuple(leaf(v, each, f"{path}[{i}]") for i, v in enumerate(nonempty(value, path)))
    if hint in (int, float):
        return _number(value, hint, path)
    if not isinstance(value, hint):
        want, fix = _WANTED[hint]
        raise GridError(f"{path}: {shown(value)} is not {want}; write {fix}")
    return value


def _number(value: Any, kind: type, path: str) -> int | float:
    want = "an integer" if kind is int else "a number"
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?", value):
        raise GridError(f"{path}: {shown(value)} is text, not {want}; write {value[:40]} without quotes")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GridError(f"{path}: {shown(value)} is not {want}; write e.g. {'64' if kind is int else '0.01'}")
    # float() of a longer int would overflow, and no count or rate is near it
    if not -1e300 < value < 1e300:
        raise GridError(f"{path}: {shown(value)} is out of range; write {want} below 1e300")
    if kind is int and value != int(value):
        raise GridError(f"{path}: {shown(value)} is not an integer; write e.g. {round(value)}")
    return kind(value)


def flatten(raw: Any, schema: Any, path: str, key: tuple[str, ...] = ()) -> Leaves:
    """The leaves of a partial config, checked: unknown keys and wrong types are errors at their path in the file."""
    if not isinstance(schema, dict):
        return {key: (leaf(raw, schema, path), path)}
    leaves: Leaves = {}
    if raw is None and key:
        raise GridError(
            f"{path}: null: a group of fields is not set to nothing; leave {key[-1]} out here, and, where other cells "
            "have it, write it in their entries of an axis and not in base"
        )
    for name, value in mapping(raw, path, schema).items():
        leaves |= flatten(value, schema[name], join(path, name), (*key, name))
    return leaves


def nested(values: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Flat values as dicts in dicts."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = found
        for name in key[:-1]:
            inner = inner.setdefault(name, {})
        inner[key[-1]] = value
    return found


def build(
    cls: type, values: dict[tuple[str, ...], Any], leaves: Leaves, where: str, prefix: tuple[str, ...] = ()
) -> Any:
    """``fields.parse`` on flat values.

    Its first error becomes a GridError at the place in the file that ``leaves`` knows for it, or at ``where``.
    ``prefix`` is the path of ``cls`` in the run.
    """
    import pydantic

    try:
        return fields.parse(cls, nested(values))
    except pydantic.ValidationError as e:
        error = e.errors(include_url=False)[0]
    key = (*prefix, *(str(part) for part in error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        message = "missing; write a value"
    elif error["type"] == "value_error":  # from a config's own checks: "<field> is <value>: write <what>"
        raise refusal(key, message, leaves, where)
    raise _at(key, message, leaves, where)


def refusal(key: tuple[str, ...], message: str, leaves: Leaves, where: str) -> GridError:
    """The error of a config's own check, "<field> is <value>: write <what>", of the config at ``key``."""
    name, _, message = message.partition(" is ")
    return _at((*key, *name.split(".")), message, leaves, where)


def _at(key: tuple[str, ...], message: str, leaves: Leaves, where: str) -> GridError:
    if key in leaves:
        return GridError(f"{leaves[key][1]}: {message}")
    # Beside a sibling that the file does have, so that the reader lands in the right block.
    sibling = next((path for other, (_, path) in leaves.items() if other[:-1] == key[:-1] and "." in path), None)
    path = f"{sibling.rpartition('.')[0]}.{key[-1]}" if sibling else f"{where}: {'.'.join(key)}"
    return GridError(f"{path}: {message}")
