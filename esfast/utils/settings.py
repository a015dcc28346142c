"""Converts the values of settings, from Python, YAML or the command line, to plain Python of their field's type.

YAML reads 1e-3 as text, numbers come from NumPy and torch, folders are paths, lists are tuples. After the conversion a
settings object holds only what config.yaml can hold and `yaml.safe_load` reads.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

from .errors import BadType, BadValue

_TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NOTHING = ("none", "null")
FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127


def convert_fields(settings: Any) -> None:
    """Converts every field of a dataclass of settings to its type (see `convert`), and checks the choices of fields
    that have some. Fields of a subclass that `option` did not make are left alone."""
    owner = type(settings).__name__
    for field in (f for f in dataclasses.fields(settings) if "choices" in f.metadata):
        what, given, choices = f"{owner}.{field.name}", getattr(settings, field.name), field.metadata["choices"]
        try:
            value = convert(what, given, field.type)
        except TypeError:
            if choices is None:
                raise
            # none of them
            value = repr(given)
        for item in value if isinstance(value, list) else [value]:
            if choices is not None and item is not None and item not in choices:
                raise BadValue(f"{what}: expected one of {', '.join(map(repr, choices))}, got {given!r:.80}")
        setattr(settings, field.name, value)


def convert(what: str, value: Any, kind: str) -> Any:
    """The value as int, float, bool, str, dict, or as a list of one of them; None where `kind` ends in "| None".

    TypeError, which begins with `what`, if the value is something else or the conversion would lose something: 30.0
    becomes an int, 30.5 does not; 0 and 1 become bools, other numbers do not; a bool never becomes a number.
    """
    inner = kind.removesuffix(" | None")
    value = plain(value)
    if inner != kind and (value is None or isinstance(value, str) and value.strip().lower() in _NOTHING):
        return None
    if not inner.startswith("list["):
        return _CONVERTERS[inner](what, value)
    if isinstance(value, Mapping):
        raise BadType(f"{what}: expected a list, got {value!r:.80}")
    item = _CONVERTERS[inner[len("list[") : -1]]
    return [item(what, v) for v in (value if isinstance(value, list) else [value])]


def plain(value: Any) -> Any:
    """Converts numbers of NumPy and torch, arrays, enums, paths, tuples and sets, also in lists and dicts, to types
    that YAML has."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if callable(getattr(value, "tolist", None)):
        value = value.tolist()
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, Mapping):
        return {name: plain(v) for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def whole_number(what: str, value: Any) -> int:
    try:
        if isinstance(value, str):
            try:
                return int(value)
            except ValueError:
                value = float(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, ValueError):
        pass
    raise BadType(f"{what}: expected an int, got {type(value).__name__} {value!r:.80}")


def number(what: str, value: Any) -> float:
    try:
        if not isinstance(value, (bool, bytes)) and value is not None:
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise BadType(f"{what}: expected a number, got {type(value).__name__} {value!r:.80}")


def truth(what: str, value: Any) -> bool:
    found = _TRUTHS.get(value.strip().lower()) if isinstance(value, str) else None
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        found = bool(value)
    if found is None:
        raise BadType(f"{what}: expected true or false, got {type(value).__name__} {value!r:.80}")
    return found


def text(what: str, value: Any) -> str:
    """A str. An int becomes one, since YAML reads a folder called 2024 as an int."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadType(f"{what}: expected a text, got {type(value).__name__} {value!r:.80}")
    return str(value)


def mapping(what: str, value: Any) -> dict[str, Any]:
    """A dict with names as keys, or the JSON text of one, as in TRL."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise BadType(f"{what}: expected a dict, or JSON such as '{{\"name\": true}}', got {value!r:.80}")
    for name, v in value.items():
        try:
            json.dumps(v)
        except (TypeError, ValueError, RecursionError):
            raise BadType(
                f"{what}: {name!r} is a {type(v).__name__}, {v!r:.60}; expected what JSON has: texts, numbers, true or "
                "false, null, lists and dicts (a date needs quotes in YAML)"
            ) from None
    return dict(value)


_CONVERTERS: dict[str, Callable[[str, Any], Any]] = {
    "int": whole_number,
    "float": number,
    "bool": truth,
    "str": text,
    "dict": mapping,
}


def check_int(what: str, value, low: int, high: int) -> int:
    """`value` as an int with low <= value < high; TypeError or ValueError that names `what` otherwise."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise BadType(f"{what}: expected an int, got {type(value).__name__} {value!r}")
    if not low <= number < high:
        raise BadValue(f"{what}: expected {low} <= {what} < {high}, got {number}")
    return number


def check_number(what: str, value: float, low: float, high: float = math.inf) -> None:
    """ValueError unless low <= value < high (no infinity, no NaN)."""
    if not low <= value < high:
        most = "" if high == math.inf else f" and less than {high:g}"
        raise BadValue(f"{what}: expected a finite number of at least {low:g}{most}, got {value!r}")


def check_positive(what: str, value) -> float:
    """The value as a float. ValueError, which names `what`, unless it is positive and finite, also as a float32."""
    try:
        number = float("nan") if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = float("nan")
    if not 2.0**-150 < number <= FLOAT32_MAX:
        raise BadValue(f"{what}: expected a positive finite number, got {value!r}")
    return number
