"""Lazy names of a package: each is imported on first use, so that importing the package costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(
    package: str, homes: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the `__getattr__` and `__dir__` of a package. `homes` maps each name to the module in the package that
    defines it, `modules` maps short names of modules to where they lie."""
    modules = modules or {}

    def get(name: str) -> Any:
        if name in modules:
            found: object = import_module(f".{modules[name]}", package)
        elif name in homes:
            found = getattr(import_module(f".{homes[name]}", package), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: sorted({*homes, *modules, *vars(sys.modules[package])})
