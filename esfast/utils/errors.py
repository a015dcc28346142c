"""Errors that a user can mend, under one base: EsfastError.

Each also derives from Python's own type, so that `except ValueError` still catches it. Any other exception that leaves
esfast is a bug, of esfast or of code that it was given; the command line shows its traceback.
"""

from __future__ import annotations

import functools


class EsfastError(Exception):
    """Base of the errors that a user can mend: a wrong argument, setting or file, a missing package, calls in the wrong
    order. The message says what was wrong, what was expected and, if that isn't plain, what to do.

    Each of them also derives from ValueError, TypeError, RuntimeError, ImportError or OSError."""


class BadValue(EsfastError, ValueError): ...


class BadType(EsfastError, TypeError): ...


class BadState(EsfastError, RuntimeError):
    """The call comes at the wrong time, or the state of the machine or of the weights does not allow it."""


class BadImport(EsfastError, ImportError): ...


class BadFile(EsfastError, OSError): ...


class FileTaken(EsfastError, FileExistsError): ...


class FileMissing(EsfastError, FileNotFoundError): ...


@functools.cache
def mendable(kind: type[Exception]) -> type[EsfastError]:
    """A class that derives from EsfastError and `kind`, for an operating system error whose message esfast rewrites."""
    return type(f"Esfast{kind.__name__}", (EsfastError, kind), {"__module__": __name__})


def is_mendable(error: BaseException) -> bool:
    """Whether a user can mend it: an EsfastError, an error of the operating system (of a file, a disk, a network), or
    that memory is full, on a GPU too. An OSError without a number is a library's, and tells nothing."""
    system = isinstance(error, OSError) and error.errno is not None
    return system or isinstance(error, (EsfastError, MemoryError)) or type(error).__name__ == "OutOfMemoryError"
