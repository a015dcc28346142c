"""esfast tune."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Mapping
from typing import Any

from ..distributed.team import Team
from ..trainer.config import AUTO
from ..utils.errors import BadValue
from ..utils.interrupts import stoppable
from .models import device_of
from .options import as_flag
from .run_options import FIELDS, given, run_options
from .train import trainer_of


@stoppable()
def run(args: argparse.Namespace) -> None:
    settings = given(args)
    options = run_options(settings)
    for name in ("resume", "output_dir"):
        if settings.get(name):
            raise BadValue(f"{as_flag(name)}: `esfast tune` leaves no run; `esfast train --sigma auto --lr auto` does")
    with tempfile.TemporaryDirectory(prefix="esfast-tune-") as scratch:
        settings |= {"sigma": AUTO, "lr": AUTO, "output_dir": scratch}
        team = Team.join(device_of(options), 1 if options.engine == "vllm" else options.tensor_parallel_size)
        trainer, _ = trainer_of(options, settings, team)
        found = trainer.tune()
    if team.rank:
        return
    groups = trainer.args.groups
    if args.json:
        print(json.dumps({**found.to_json(), "groups": groups}))
        return
    print(found.table())
    print("\n".join(found.lines()))
    print("to train with it:\n  " + shlex.join(["esfast", "train", *_options(args), *_numbers(found.settings)]))


def _options(args: argparse.Namespace) -> list[str]:
    """The options that were given, again."""
    words = [word for name in ("preset", "config") if (v := getattr(args, name)) for word in (f"--{name}", v)]
    for name, value in vars(args).items():
        if name not in FIELDS or name in ("sigma", "lr"):
            continue
        if isinstance(value, bool):
            words.append(as_flag(name) if value else "--no-" + as_flag(name).removeprefix("--"))
        else:
            words += [as_flag(name), *map(str, value if isinstance(value, list) else [value])]
    return words


def _numbers(settings: Mapping[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (as_flag(name), f"{value:g}")]
