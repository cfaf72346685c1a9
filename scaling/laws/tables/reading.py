"""Files people keep runs in → a pandas table: CSV under any delimiter and decimal mark, JSON, JSON lines.

A file is decoded, its shape is checked (every row has as many fields as the header), and every column that holds
numbers alone becomes numbers. What names mean is not asked here: see ``columns``. What was read otherwise than as it
stands is told in ``table.attrs["notes"]``.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

NOTES = "notes"
MAX_NAMES = 5
DELIMITERS = (",", "\t", ";", "|")
PACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
OTHER_KINDS = {b"PK": "an Excel workbook or a zip", b"PAR1": "Parquet", b"\xd0\xcf": "an old Excel workbook"}
# What pandas, R, spreadsheets and trackers write where there is no value.
EMPTY = {"", "-", "–", "nan", "null", "none", "na", "n/a", "#n/a", "<na>"}
# Powers of ten of what people write behind a number.
SUFFIXES = {
    "k": 3, "thousand": 3, "m": 6, "mn": 6, "million": 6, "b": 9, "g": 9, "bn": 9, "billion": 9,
    "t": 12, "tn": 12, "trillion": 12,
}  # fmt: skip
_TAIL = rf"(?:e(?P<power>[+-]?\d+))?\s*(?P<suffix>{'|'.join(sorted(SUFFIXES, key=len, reverse=True))})?"
_NUMBER = {
    ".": re.compile(rf"(?P<sign>[+-]?)(?P<whole>\d{{1,3}}(?:[, '_]\d{{3}})+|\d*)(?:\.(?P<part>\d*))?{_TAIL}", re.I),
    ",": re.compile(rf"(?P<sign>[+-]?)(?P<whole>\d{{1,3}}(?:[. '_]\d{{3}})+|\d*)(?:,(?P<part>\d*))?{_TAIL}", re.I),
}
_LONG = re.compile(r"[+-]?\d{5,}(?:[.,]\d*)?")


def read(path: Path | str) -> "pd.DataFrame":
    """Reads a file as a table under the names it has, numbers as numbers.

    Lines that begin with ``#`` are comments. Raises ValueError, in one line, on what is no table.
    """
    path = Path(path) if isinstance(path, str) else path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: write a results folder or a CSV") from None
    notes: list[str] = []
    try:
        text = _decode(data, notes)
        if text.lstrip()[:1] in ("{", "["):
            names, rows = _records(text)
        else:
            names, rows = _fields(text, notes)
        return typed(names, rows, notes)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def listed(names: Iterable[Any]) -> str:
    """At most five names, and how many more there are."""
    names = [str(n) for n in names]
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _decode(data: bytes, notes: list[str]) -> str:
    for magic, unpack in PACKED.items():
        if data.startswith(magic):
            try:
                data = unpack(data)
            except (OSError, EOFError, lzma.LZMAError) as e:
                raise ValueError(f"cannot be unpacked ({e}): write it as CSV") from None
    for magic, kind in OTHER_KINDS.items():
        if data.startswith(magic):
            raise ValueError(f"is {kind}: save it as CSV")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif data[1:2] == b"\0" and data[3:4] == b"\0":
        encoding = "utf-16-le"
    elif data[:1] == b"\0" and data[2:3] == b"\0":
        encoding = "utf-16-be"
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError as e:
            raise ValueError(f"not a readable CSV ({e}): save it as UTF-8") from None
        notes.append("the file is not UTF-8: read as Windows-1252")
    if "\0" in text:
        raise ValueError("not a readable CSV (it holds bytes of zero): save it as CSV in UTF-8")
    return text


def _fields(text: str, notes: list[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of delimited text, field counts checked."""
    lines: list[str] = []
    commented: list[tuple[bool, str]] = []
    for line in text.splitlines():
        if line.startswith("#"):
            commented.append((bool(lines), line))
        elif line.strip():
            lines.append(line)
    delimiter = None
    if lines and (found := re.fullmatch(r'"?sep=(.)"?', lines[0].strip(), re.I)):
        delimiter = found[1]
        lines = lines[1:]
    if not lines:
        raise ValueError("not a readable CSV (it is empty): write a header line and comma-separated rows")
    delimiter = delimiter or _delimiter(lines)
    names, *rows = _split(lines, delimiter)
    names = [name.strip() for name in names]
    if all(_parse(name, ".") is not None for name in names if name):
        raise ValueError(f"its first line is numbers ({listed(names)}): write a header line such as N,D,loss")
    if (
        delimiter != "\t"
        and delimiter is not None
        and {len(r) for r in rows} == {len(names) + 1}
        and not any(r[-1].strip() for r in rows)
    ):
        rows = [r[:-1] for r in rows]
        notes.append("every row ends in one delimiter more than the header: the empty field is not read")
    for i, row in enumerate(rows):
        if len(row) > len(names) and not any(x.strip() for x in row[len(names) :]):
            row = rows[i] = row[: len(names)]
        if len(row) != len(names):
            raise ValueError(
                f"row {i + 1} has {len(row)} fields and the header has {len(names)} ({listed(names)}): write as many "
                "fields as names, in quotes where a field holds the delimiter"
            )
    hidden = [line for after, line in commented if after and len(next(_split([line], delimiter), ())) == len(names)]
    if hidden and len(names) > 1:
        notes.append(
            f"{len(hidden)} lines among the rows begin with # and are comments, not runs (first: {hidden[0][:40]!r})"
        )
    return _without_blank(names, rows)


def _without_blank(names: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Nameless columns are a pandas index, or the field after a last delimiter: neither is data."""
    keep = [i for i, name in enumerate(names) if name]
    for i, name in enumerate(names):
        if not name and i > 0 and any(row[i].strip() for row in rows):
            raise ValueError(f"column {i + 1} has no name in the header ({listed(names)}): write one")
    return [names[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _split(lines: Sequence[str], delimiter: str | None) -> Iterator[list[str]]:
    if delimiter is None:
        return iter([line.split() for line in lines])
    return csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter, skipinitialspace=True)


def _delimiter(lines: Sequence[str]) -> str | None:
    """The delimiter under which most rows have the header's number of fields; None: blanks."""
    scores = {}
    for delimiter in DELIMITERS:
        header, *rows = _split(lines[:200], delimiter)
        if len(header) > 1:
            same = sum(abs(len(row) - len(header)) <= 1 for row in rows)
            scores[delimiter] = (same / max(len(rows), 1), len(header))
    if scores:
        return max(scores, key=scores.get)  # type: ignore[arg-type]  # every key is there
    header, *rows = [line.split() for line in lines]
    return None if len(header) > 1 and rows and all(len(row) == len(header) for row in rows) else ","


def _records(text: str) -> tuple[list[str], list[list[Any]]]:
    """Names and rows of JSON (objects in a list, columns in an object, pandas' orients) or of JSON lines."""
    try:
        whole = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        whole = [_line(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    except RecursionError:
        raise ValueError("JSON nested too deep for a table: write a list of objects, one a run") from None
    rows = _rows(whole)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("JSON without rows: write a list of objects, one a run, or one object a line")
    rows = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, [[row.get(name) for name in names] for row in rows]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"an object names {listed(twice)} twice: write each key once")
    return dict(pairs)


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as e:
        raise ValueError(f"line {number} is not JSON ({e.msg}): write one object a line") from None


def _rows(whole: Any) -> list[Any]:
    if isinstance(whole, list):
        return whole
    if "data" in whole and "columns" in whole:  # pandas' orient="split"
        if not all(isinstance(row, list) for row in (whole["data"] if isinstance(whole["data"], list) else [None])):
            raise ValueError("data beside columns is no list of rows: write data as [[…], …]")
        if not isinstance(whole["columns"], list):
            raise ValueError('columns beside data is no list of names: write columns as ["num_params", …]')
        if any(len(row) != len(whole["columns"]) for row in whole["data"]):
            raise ValueError(f"a row of data has not {len(whole['columns'])} values, one a column")
        return [dict(zip(whole["columns"], row)) for row in whole["data"]]
    if isinstance(whole.get("data"), list):  # orient="table"
        return whole["data"]
    inner = list(whole.values())
    if inner and all(isinstance(x, list) for x in inner):
        if len({len(x) for x in inner}) > 1:
            raise ValueError(f"its columns differ in length ({listed(f'{k} {len(x)}' for k, x in whole.items())})")
        return [dict(zip(whole, values)) for values in zip(*inner)]
    if inner and all(isinstance(x, dict) for x in inner) and len({tuple(x) for x in inner}) == 1:
        labels = list(inner[0])
        if any("loss" in str(name).lower() for name in labels):  # orient="index"
            return inner
        return [{name: column[label] for name, column in whole.items()} for label in labels]
    return [whole]


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def typed(names: Sequence[str], rows: Sequence[Sequence[Any]], notes: list[str]) -> "pd.DataFrame":
    """A table whose columns of numbers are numbers. Raises ValueError where a decimal comma cannot be told from a
    separator of thousands, or two columns of one name differ."""
    import pandas as pd

    if not rows:
        raise ValueError("no rows: nothing to fit")
    columns: dict[str, list[Any]] = {}
    for name, values in zip(names, zip(*rows)):
        if name in columns and list(values) != columns[name]:
            raise ValueError(f"two columns are named {name} and differ: rename one")
        columns[str(name)] = list(values)
    mark = decimal_mark([x for values in columns.values() if _is_text(values) for x in values])
    if mark == ",":
        notes.append("decimal commas: 5,96 is read as 5.96")
    table = pd.DataFrame({name: _column(values, mark) for name, values in columns.items()})
    table.attrs[NOTES] = tuple(notes)
    return table


def _is_text(values: list[Any]) -> bool:
    """Whether a column is text that may be numbers: names of runs say nothing about a decimal mark."""
    words = [x for x in values if isinstance(x, str) and not is_empty(x)]
    return bool(words) and all(_parse(x, ".") is not None or _parse(x, ",") is not None for x in words)


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in EMPTY) or value != value


def decimal_mark(words: Iterable[Any]) -> str:
    """ "." or ",": what stands before the decimals of a file's numbers.

    5.96286 can only be decimal, 20,000,000 only thousands, 5,962 either. Where nothing but such as the last is there,
    long numbers without separators (20000000) say that thousands are not separated. Raises ValueError otherwise.
    """
    only: dict[str, str] = {}
    either: dict[str, str] = {}
    long = False
    for word in words:
        if not isinstance(word, str) or is_empty(word):
            continue
        dot, comma = _parse(word, "."), _parse(word, ",")
        if dot is None or comma is None:
            only.setdefault("." if comma is None else ",", word)
        elif dot != comma:
            either.setdefault("," if "," in word else ".", word)
        long |= bool(_LONG.fullmatch(word.strip()))
    if len(only) == 2:
        raise ValueError(f"{only['.'].strip()} has a decimal point and {only[','].strip()} a decimal comma: write one")
    if only:
        return next(iter(only))
    if "," in either and (len(either) == 2 or not long):
        raise ValueError(
            f"{either[','].strip()} could be {_parse(either[','], '.'):g} or {_parse(either[','], ','):g}: write "
            "decimal points, and no separators of thousands"
        )
    return "," if "," in either else "."


def _column(values: list[Any], mark: str) -> Any:
    """Numbers where all are (without suffixes: 20M is also a name), else what is there, empty fields as None."""
    found = [parse(x, mark, suffixes=False) for x in values]
    if all(x is not None for x in found) and not all(np.isnan(x) for x in found):  # type: ignore[arg-type]  # none is None
        whole = all(isinstance(x, int) or (isinstance(x, str) and x.strip().isdigit()) for x in values)
        return [int(x) for x in values] if whole else found
    if mark == "," and _is_text(values):  # 53,3M
        return [None if is_empty(x) else str(x).replace(".", "").replace(",", ".") for x in values]
    return [None if is_empty(x) else x.strip() if isinstance(x, str) else x for x in values]


def parse(value: Any, mark: str = ".", *, suffixes: bool = True) -> float | None:
    """A number from what a cell holds ("53.3M", "1,234,567", 3e9), NaN where it is empty, None where it is none."""
    if isinstance(value, bool | np.bool_ | list | dict):
        return None
    if is_empty(value):
        return float("nan")
    if not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError):
            return None
    return _parse(value, mark, suffixes)


def _parse(word: str, mark: str, suffixes: bool = True) -> float | None:
    word = re.sub("[\u00a0\u2009\u202f]", " ", word).strip().replace("\u2212", "-").replace("\u2019", "'")
    if re.fullmatch(r"[+-]?inf(inity)?", word, re.I):
        return float(word)
    found = _NUMBER[mark].fullmatch(word)
    if not found or not (found["whole"] or found["part"]) or (found["suffix"] and not suffixes):
        return None
    whole = re.sub(r"[^\d]", "", found["whole"])
    power = int(found["power"] or 0) + SUFFIXES.get((found["suffix"] or "").lower(), 0)
    return float(f"{found['sign']}{whole or 0}.{found['part'] or 0}e{power}")
