"""Converts the values of settings, from Python, YAML or the command line, to plain Python of their field's type.

YAML reads 1e-3 as text, numbers come from NumPy and torch, folders are paths, lists are tuples. After the conversion a
settings object holds only what config.yaml can hold and `yaml.safe_load` reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import json
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import BadType, BadValue
from .suggest import did_you_mean

_TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NOTHING = ("none", "null")
FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127


class Kind(NamedTuple):
    """What a setting may be: an int, float, bool, str or dict, or a list of them, or also None, or also one of some
    words (a Literal), such as "auto" in the place of a number."""

    item: type
    is_list: bool
    is_optional: bool
    words: tuple[str, ...] = ()


def option(default, text: str, choices: Sequence[str] | None = None):
    """A field of a dataclass of settings, with its help. The command line makes an option of it."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@functools.cache
def options_of(owner: type) -> dict[str, tuple[dataclasses.Field, Kind]]:
    """The fields of a dataclass that `option` made, by name. Other fields of a subclass, whatever their types, are not
    looked at."""
    made = {f.name: f for f in dataclasses.fields(owner) if "choices" in f.metadata}
    found: dict[str, Kind] = {}
    for base in reversed(owner.__mro__):
        names = made.keys() & inspect.get_annotations(base).keys()
        hints = inspect.get_annotations(base, eval_str=True) if names else {}
        found |= {name: _kind(hints[name]) for name in names}
    return {name: (field, found[name]) for name, field in made.items()}


def _kind(hint: Any) -> Kind:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    alternatives = typing.get_args(hint) if union else (hint,)
    words = tuple(word for a in alternatives if typing.get_origin(a) is typing.Literal for word in typing.get_args(a))
    (inner,) = (a for a in alternatives if a is not types.NoneType and typing.get_origin(a) is not typing.Literal)
    is_list = typing.get_origin(inner) is list
    return Kind(typing.get_args(inner)[0] if is_list else inner, is_list, types.NoneType in alternatives, words)


def convert_fields(settings: Any) -> None:
    """Converts every field that `option` made to its type, in place; see `convert_given`."""
    owner: type = type(settings)
    for name, value in convert_given(owner, {name: getattr(settings, name) for name in options_of(owner)}).items():
        setattr(settings, name, value)


def convert_given(owner: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among `given` that are fields of the dataclass `owner`, each converted to its field's type.

    TypeError names a field whose value is of another type, ValueError one whose value is not among its choices.
    """
    return {
        name: _converted(f"{owner.__name__}.{name}", given[name], kind, field.metadata["choices"])
        for name, (field, kind) in options_of(owner).items()
        if name in given
    }


def _converted(what: str, given: Any, kind: Kind, choices: Sequence[str] | None) -> Any:
    try:
        value = _convert(what, given, kind)
    except TypeError:
        if choices is None:
            raise
        # Not convertible: none of the choices.
        value = repr(given)
    for item in value if isinstance(value, list) else [value]:
        if choices is not None and item is not None and item not in choices:
            known, hint = ", ".join(map(repr, choices)), did_you_mean(item, choices)
            raise BadValue(f"{what}: expected one of {known}, got {given!r:.80}{hint and '.' + hint}")
    return value


def convert(what: str, value: Any, hint: Any) -> Any:
    """The value as `hint` says, such as int, dict | None or list[str]; None where it may be.

    TypeError, which begins with `what`, if the value is something else or the conversion would lose something: 30.0
    becomes an int, 30.5 does not; 0 and 1 become bools, other numbers do not; a bool never becomes a number.
    """
    return _convert(what, value, _kind(hint))


def _convert(what: str, value: Any, kind: Kind) -> Any:
    value = plain(value)
    if kind.is_optional and (value is None or isinstance(value, str) and value.strip().lower() in _NOTHING):
        return None
    if isinstance(value, str) and value.strip().lower() in kind.words:
        return value.strip().lower()
    item = _CONVERTERS[kind.item]
    if not kind.is_list:
        try:
            return item(what, value)
        except BadType as error:
            raise BadType(", or ".join([str(error), *map(repr, kind.words)])) from None
    if isinstance(value, Mapping):
        raise BadType(f"{what}: expected a list, got {value!r:.80}")
    return [item(what, v) for v in (value if isinstance(value, list) else [value])]


def plain(value: Any) -> Any:
    """Converts numbers of NumPy and torch, arrays, enums, paths, tuples and sets, also in lists and dicts, to types
    that YAML has."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if callable(getattr(value, "tolist", None)):
        # A tensor without memory stays what it is, and is refused as no number.
        with contextlib.suppress(RuntimeError):
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
    except (TypeError, ValueError, RuntimeError):
        pass
    raise BadType(f"{what}: expected an int, got {type(value).__name__} {value!r:.80}")


def number(what: str, value: Any) -> float:
    try:
        if not isinstance(value, (bool, bytes)) and value is not None:
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
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


_CONVERTERS: dict[type, Callable[[str, Any], Any]] = {
    int: whole_number,
    float: number,
    bool: truth,
    str: text,
    dict: mapping,
}


def check_int(what: str, value, low: int, high: int) -> int:
    """`value` as an int with low <= value < high; TypeError or ValueError that names `what` otherwise."""
    try:
        # operator.index would take True, and a tensor or an array that holds it, for 1. While torch.compile traces, a
        # TypeError of its own is not caught in PyTorch 2.8.
        held = value if isinstance(value, int) else plain(value)
        number = operator.index(held) if hasattr(held, "__index__") and not isinstance(held, bool) else None
    except (TypeError, ValueError, RuntimeError):
        # RuntimeError: a tensor without memory.
        number = None
    if number is None:
        raise BadType(f"{what}: expected an int, got {type(value).__name__} {value!r:.80}")
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
        raise BadValue(f"{what}: expected a positive finite number, got {value!r:.80}")
    return number
