"""One owner per run: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import socket
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from .errors import FileTaken

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

# Seconds to wait for another process to end: after a kill the system may need a moment to release its lock.
PATIENCE = 3.0
_POLL = 0.1
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class InUse(FileTaken):
    """Another trainer, in this or another process, owns the run."""


class Lock:
    """The lock of a run: flock on the file JOURNAL.lock, which names its owner while there is one.

    The lock ends with `release`, with the last reference to it, and with the process, however that ends. Processes that
    are forked from the owner do not inherit it. If the file system has no locks, there is a warning instead.
    """

    def __init__(self, journal: Path):
        path, made = _file(journal), _missing(journal.parent)
        self._descriptor = _acquire(path)
        self._release = weakref.finalize(self, _let_go, path, self._descriptor, made)
        _held[_key(journal)] = self

    @classmethod
    def take(cls, journal: str | Path, shared: bool = False) -> Lock:
        """Takes the lock of the run with this journal. Makes the journal's folder if it isn't there; `release` removes
        it if it is empty. With `shared`, this process may hold the lock already.

        Raises InUse, which names the owner, after PATIENCE seconds; OSError if the file can't be written.
        """
        journal = Path(journal)
        mine = _holder(journal)
        if mine is not None and not shared:
            mine = None
            # The owner may be a deleted trainer that the garbage collector has not freed yet.
            gc.collect()
            mine = _holder(journal)
        if mine is None:
            return cls(journal)
        if not shared:
            raise InUse(
                f"{journal.parent} is in use by another trainer of this process ({_owner()}): let it finish, delete "
                "it, or choose another folder"
            )
        return mine

    @property
    def held(self) -> bool:
        return self._release.alive

    def release(self) -> None:
        self._release()


_held: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()


def _key(journal: Path) -> str:
    return os.path.realpath(journal)


def _holder(journal: Path) -> Lock | None:
    """This process's lock."""
    found = _held.get(_key(journal))
    return found if found is not None and found.held else None


def _file(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.lock")


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _missing(folder: Path) -> list[Path]:
    """The folder and the folders above it that don't exist, the innermost first."""
    return [f for f in (folder, *folder.parents) if not f.exists()]


def _acquire(path: Path) -> int | None:
    """A descriptor of the locked file; None where the file system has no locks."""
    until = time.monotonic() + PATIENCE
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # The previous owner removed the empty folder.
            continue
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 300, 0).decode(errors="replace") if fcntl else ""
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                path.unlink(missing_ok=True)
                log.warning(
                    "%s: the file system has no locks (%s), so see to it that one process alone trains there",
                    path.parent,
                    error.strerror,
                )
                return None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        else:
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _owner().encode())
                return descriptor
            # The file was removed before it was locked here: try again.
            os.close(descriptor)
            continue
        if time.monotonic() > until:
            raise InUse(
                f"{path.parent} is in use by {owner or 'another process'}: one process at a time trains there; wait "
                "for it, stop it, or choose another folder"
            )
        time.sleep(_POLL)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _let_go(path: Path, descriptor: int | None, made: Sequence[Path]) -> None:
    if descriptor is not None:
        # Remove it while it is locked: a process that locks it afterwards sees that the file is gone, and makes a new
        # one.
        with contextlib.suppress(OSError):
            if _is_at(path, descriptor):
                path.unlink()
        os.close(descriptor)
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()


def _forget() -> None:
    """Runs in a forked process, which must neither keep nor remove its parent's locks."""
    for lock in list(_held.values()):
        if lock._release.detach() and lock._descriptor is not None:
            os.close(lock._descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
