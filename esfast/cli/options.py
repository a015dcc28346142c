"""Turns a dataclass of settings into options of argparse. Names, types and defaults come from its fields, help and
choices from their metadata (`esfast.utils.settings.option`).

No library does it, because of its help and its time. `esfast train --help` takes 0.2 s with this module, 1.9 s with
transformers.HfArgumentParser, which imports Transformers, and 0.4 s with jsonargparse, one more dependency (measured
side by side, the best of six). HfArgumentParser fails on a bool whose metadata has choices; jsonargparse shows neither
help texts nor choices from metadata.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..utils.settings import number, options_of, whole_number


def as_flag(name: str) -> str:
    """The option for a setting: `population_size` gives `--population-size`."""
    return "--out" if name == "output_dir" else "--" + name.replace("_", "-")


def integer(text: str) -> int:
    """The type of an option that takes a whole number; 1e3 is one."""
    return whole_number("", text)


def real(text: str) -> float:
    return number("", text)


# Errors of argparse name a type by these.
integer.__name__, real.__name__ = "int", "float"
# For each type, the function that reads it, and its value's name in the help. A dict stays text here: settings that
# come from anywhere are converted in one place, esfast.utils.settings.
_READ: dict[type, tuple[Callable[[str], Any], str]] = {int: (integer, "N"), float: (real, "X"), dict: (str, "JSON")}


def add_options(
    parser: argparse.ArgumentParser,
    owners: Collection[type],
    groups: Mapping[str, str],
    defaults: Mapping[str, Any],
    only: Collection[str] | None = None,
) -> None:
    """Adds an option for each field of the dataclasses `owners`, or those named in `only`.

    `groups` maps the first field of each group in the help to the group's title. `defaults` has the defaults to show if
    the command's differ from the dataclass's. An option that isn't given is absent from the namespace, which is not the
    same as its default: presets, tasks and the embedded model have their own defaults.
    """
    group: argparse._ActionsContainer = parser
    for name, (field, kind) in {n: o for owner in owners for n, o in options_of(owner).items()}.items():
        if name in groups:
            group = parser.add_argument_group(groups[name])
        if only is not None and name not in only:
            continue
        flags = ["--out", "--output-dir"] if name == "output_dir" else [as_flag(name)]
        text, default, choices = field.metadata["help"], defaults.get(name, field.default), field.metadata["choices"]
        if default is not None and "default:" not in text:
            text += f" (default: {'yes' if default is True else 'no' if default is False else default})"
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind.item is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **settings)
            continue
        read, written = _READ.get(kind.item, (str, name.upper()))
        if kind.is_list:
            settings |= {"nargs": "+", "metavar": name.upper()}
        elif not choices:
            settings |= {"metavar": written}
        group.add_argument(*flags, type=_or_word(read, kind.words), choices=choices, **settings)


def _or_word(read: Callable[[str], Any], words: Collection[str]) -> Callable[[str], Any]:
    """Reads a value, or one of the words that may stand in its place."""
    if not words:
        return read

    def either(text: str) -> Any:
        return word if (word := text.strip().lower()) in words else read(text)

    # argparse's errors name it
    either.__name__ = " or ".join([read.__name__, *words])
    return either
