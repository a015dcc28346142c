"""Names of reasoning-gym's tasks with their options: `countdown?min_numbers=3&max_numbers=4`, mixtures `a+2*b`."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import importlib.util
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from ..utils.errors import BadImport, BadType, BadValue
from ..utils.settings import number, text, truth, whole_number
from ..utils.suggest import did_you_mean, unknown

PREFIX = "gym:"
# Ours: `gym:a+b` mixes tasks.
_OURS = ("composite",)
# Options that decide which problems come, which is the run's matter.
_OF_THE_RUN = {
    "seed": "the run's --seed decides which problems come",
    "size": "problems are endless; --train-prompts N trains on N fixed ones",
}
LEVEL = "level"
_NOT_HERE = "its values can't be written in a task's name; leave it at its default"


@dataclass(frozen=True)
class Part:
    """One task of a mixture: its name, its options as they were written, and its share of the problems."""

    name: str
    options: tuple[tuple[str, str], ...]
    weight: float

    def __str__(self) -> str:
        return self.name + "".join(f"{'&' if i else '?'}{k}={v}" for i, (k, v) in enumerate(self.options))


def parse(spec: str) -> list[Part]:
    """The parts of `a?x=1&y=2+3*b`. Values are decoded as in a URL, after the text was divided, so %2B stands for a
    plus sign, %26 for an ampersand and %2C for a comma. ValueError for what has another form."""
    parts = [_part(spec, words) for words in spec.split("+")]
    named = [str(part) for part in parts]
    if len(set(named)) < len(named):
        raise BadValue(f"task: {PREFIX}{spec} names {_twice(named)} twice; a weight, 2*{_twice(named)}, asks for more")
    return parts


def _part(spec: str, words: str) -> Part:
    weighed = re.fullmatch(r"\s*(?:([0-9.eE-]+)\s*\*)?\s*([^?*\s]+)\s*(?:\?(.*))?", words, re.DOTALL)
    if weighed is None:
        raise BadValue(
            f"task: expected {PREFIX}NAME, {PREFIX}NAME?OPTION=VALUE&OPTION=VALUE or a mixture {PREFIX}A+2*B, "
            f"got {PREFIX + spec!r:.120}"
        )
    factor, name, query = weighed.groups()
    weight = number(f"task: the weight of {name}", factor or 1)
    if not 0 < weight < 1e9:
        raise BadValue(f"task: the weight of {name}: expected a positive number, got {factor}")
    options = []
    for pair in filter(None, (query or "").split("&")):
        option, equals, value = pair.partition("=")
        if not equals:
            raise BadValue(f"task: {PREFIX}{name}: expected OPTION=VALUE after the question mark, got {pair!r:.60}")
        options.append((option.strip(), value))
    names = [option for option, _ in options]
    if len(set(names)) < len(names):
        raise BadValue(f"task: {PREFIX}{name}: the option {_twice(names)!r} is given twice")
    return Part(name, tuple(options), weight)


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def require_package() -> None:
    """ImportError, which names the extra, without reasoning-gym."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise BadImport("task: gym:... needs the package reasoning-gym: pip install 'esfast[gym]'")


# From here on reasoning-gym is imported, which takes more than a second: in the processes that make problems and score.


def names() -> list[str]:
    """The names of all tasks."""
    import reasoning_gym  # noqa: F401
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS.keys() - set(_OURS))


def dataset(part: Part, seed: int, size: int):
    """reasoning-gym's dataset of the part. ValueError or TypeError, in the words of the command line, for an unknown
    name or option, a value of another type, and what reasoning-gym's own checks refuse."""
    import reasoning_gym  # noqa: F401
    from reasoning_gym.factory import DATASETS

    where = f"task: {PREFIX}{part.name}"
    if part.name in _OURS:
        raise BadValue(f"{where}: tasks are mixed by their names: {PREFIX}A+2*B")
    if part.name not in DATASETS:
        raise BadValue(f"task: {unknown('gym task', part.name, names())}")
    made, settings = DATASETS[part.name]
    try:
        config = _config(where, part, settings, seed, size)
        return made(config)
    except (BadValue, BadType):
        raise
    except Exception as error:
        # Its checks are assertions; a constructor may raise anything.
        said = str(error) or "no reason is given"
        given = ", ".join(f"{k}={v}" for k, v in part.options) or "the defaults"
        raise BadValue(f"{where}: reasoning-gym refuses {given}: {said:.300}") from None


def _config(where: str, part: Part, settings: type, seed: int, size: int):
    hints = typing.get_type_hints(settings)
    known = {f.name: hints[f.name] for f in dataclasses.fields(settings) if f.name not in _OF_THE_RUN}
    given: dict[str, Any] = {}
    level = None
    for name, written in part.options:
        if name in _OF_THE_RUN:
            raise BadValue(f"{where}: {name!r} is no option here: {_OF_THE_RUN[name]}")
        if name == LEVEL and LEVEL not in known:
            level = whole_number(f"{where}: {name}", unquote(written))
        elif name not in known:
            raise BadValue(
                f"{where}: unknown option {name!r}.{did_you_mean(name, known)} It has: "
                f"{', '.join(_shown(settings, hints))}"
            )
        else:
            given[name] = _value(f"{where}: {name}", written, known[name])
    made = settings() if level is None else _of_level(where, part.name, level)
    config = dataclasses.replace(made, **given, seed=seed, size=size)
    if hasattr(config, "validate"):
        config.validate()
    return config


def _shown(settings: type, hints: Mapping[str, Any]) -> Iterator[str]:
    """The options with their defaults, for a message."""
    default = settings()
    for field in dataclasses.fields(settings):
        if field.name not in _OF_THE_RUN:
            yield f"{field.name}={_written(getattr(default, field.name)):.60}"


def _written(value: Any) -> str:
    """A value as the options have it."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_written, value))
    return quote(str(getattr(value, "value", value)), safe=" :*/-")


def _of_level(where: str, name: str, level: int):
    """The configuration of a level of the task's curriculum: each attribute at this level, or at its last."""
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(name):
        raise BadValue(f"{where}: reasoning-gym has no curriculum for it, so there are no levels")
    curriculum = create_curriculum(name)
    highest = max((len(a.levels) for a in curriculum.attributes.values()), default=1) - 1
    if not 0 <= level <= highest:
        raise BadValue(f"{where}: level: expected 0 to {highest}, got {level}")
    for attribute in curriculum.attributes.values():
        curriculum.set_attr_level(attribute.name, min(level, len(attribute.levels) - 1))
    return curriculum.generate_configuration()


def _value(what: str, written: str, hint: Any) -> Any:
    """The value of an option in the type that the task's configuration has."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in inside:
        (inner,) = (a for a in inside if a is not type(None))
        return None if unquote(written).strip().lower() in ("none", "null", "") else _value(what, written, inner)
    if origin is typing.Literal:
        return _one_of(what, unquote(written), inside)
    if hint in (list, tuple) or origin in (list, tuple, Sequence):
        item = inside[0] if inside else None
        if typing.get_origin(item) is not None:
            raise BadValue(f"{what}: {_NOT_HERE}")
        items = [_value(what, w, item) for w in written.split(",")] if written.strip() else []
        return items if hint is list or origin is list else tuple(items)
    decoded = unquote(written)
    if hint is None:
        # A tuple that doesn't say of what: numbers where they are numbers.
        return _plain(decoded)
    if hint in _READ:
        return _READ[hint](what, decoded)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(_one_of(what, decoded, [member.value for member in hint]))
    if hint in (datetime.date, datetime.time):
        try:
            return hint.fromisoformat(decoded)
        except ValueError:
            raise BadValue(f"{what}: expected a {hint.__name__} such as 2026-01-31 or 13:45, got {decoded!r}") from None
    raise BadValue(f"{what}: {_NOT_HERE}")


_READ = {int: whole_number, float: number, bool: truth, str: text}


def _plain(word: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(word)
        except ValueError:
            pass
    return word


def _one_of(what: str, given: str, choices) -> Any:
    found = next((c for c in choices if str(c) == given), None)
    if found is None:
        raise BadValue(f"{what}: expected one of {', '.join(map(str, choices))}, got {given!r:.60}")
    return found
