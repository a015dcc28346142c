"""Errors that a user can mend, under one base: EsfastError.

Each is also of Python's own type for its kind, so that `except ValueError` catches what it always caught. Any other
exception that leaves esfast is a bug, of esfast or of code that it was given, and the command line shows it as one.
"""

from __future__ import annotations

import functools


class EsfastError(Exception):
    """Base of the errors that a user can mend: an argument, a setting, a file, a package that is missing, the wrong
    order of calls. The message says what was wrong, what was expected and, where that isn't plain, what to do."""


class BadValue(EsfastError, ValueError): ...


class BadType(EsfastError, TypeError): ...


class BadState(EsfastError, RuntimeError):
    """A call at the wrong time, or a state of the machine or of the weights in which it can't be done."""


class BadImport(EsfastError, ImportError): ...


class BadFile(EsfastError, OSError): ...


class FileTaken(EsfastError, FileExistsError): ...


class FileMissing(EsfastError, FileNotFoundError): ...


@functools.cache
def mendable(kind: type[Exception]) -> type[EsfastError]:
    """An EsfastError that is also of `kind`, for an error of the operating system whose message esfast rewrites."""
    return type(f"Esfast{kind.__name__}", (EsfastError, kind), {"__module__": __name__})
