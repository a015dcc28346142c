"""esfast tune."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Mapping
from typing import Any

from ..trainer.config import AUTO
from ..utils.errors import BadValue
from ..utils.interrupts import stoppable
from .options import as_flag
from .run_options import FIELDS, given, run_options
from .train import join, trainer_of

# What is searched for.
FOUND = ("sigma", "lr")


@stoppable()
def run(args: argparse.Namespace) -> None:
    settings = given(args)
    options = run_options(settings)
    for name in ("resume", "output_dir"):
        # A file of --config may be a run's.
        if getattr(args, name, None):
            raise BadValue(f"{as_flag(name)}: `esfast tune` leaves no run; `esfast train --sigma auto --lr auto` does")
    # Numbers of a file or a preset are what is to be replaced. One on the command line is kept.
    settings |= {name: AUTO for name in FOUND if not hasattr(args, name)}
    if not any(settings[name] == AUTO for name in FOUND):
        raise BadValue("--sigma: sigma and lr are both given, so there is nothing to find; leave one of them out")
    with tempfile.TemporaryDirectory(prefix="esfast-tune-") as scratch:
        settings |= {"output_dir": scratch, "resume": False}
        team = join(options)
        trainer, _ = trainer_of(options, settings, team)
        found = trainer.tune()
    if team.rank:
        return
    # Groups that nobody named, and that the numbers go with.
    implied = ["--groups", AUTO] if found.groups and not settings.get("groups") else []
    if args.json:
        print(json.dumps(found.to_json()))
        return
    print(found.table())
    print("\n".join(found.lines()))
    command = ["esfast", "train", *_options(args, found.settings), *implied, *_numbers(found.settings)]
    print("to train with it:\n  " + shlex.join(command))


def _options(args: argparse.Namespace, found: Mapping[str, Any]) -> list[str]:
    """The options that were given, again, but for what was found."""
    words = [word for name in ("preset", "config") if (v := getattr(args, name)) for word in (f"--{name}", v)]
    for name, value in vars(args).items():
        if name not in FIELDS or name in found:
            continue
        if isinstance(value, bool):
            words.append(as_flag(name) if value else "--no-" + as_flag(name).removeprefix("--"))
        else:
            words += [as_flag(name), *map(str, value if isinstance(value, list) else [value])]
    return words


def _numbers(settings: Mapping[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (as_flag(name), f"{value:g}")]
