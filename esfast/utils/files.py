"""Writes files and folders whole or not at all, with the permissions that the umask gives.

The contents go to a hidden file beside the target, whose name ends in TEMPORARY; a rename then replaces the target.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import BadValue, mendable

# Ending of the names of files that are being written.
TEMPORARY = ".tmp"


def temporary_beside(path: Path) -> Path:
    """An unused name in the same folder. Create it with open or mkdir, which follow the umask; files of `tempfile` are
    always private to the user."""
    return path.parent / f".{path.name[:40]}.{secrets.token_hex(6)}{TEMPORARY}"


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes the file whole or not at all; text as UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            # A completion may hold half a surrogate pair, which UTF-8 can't encode; it is written as \udc00.
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yields a folder to fill in the block. After the block it is at `path`; if the block raises, `path` is unchanged.

    An older folder there is replaced. With replace=False it stays, and OSError is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_beside(path)
    unfinished.mkdir()
    try:
        yield unfinished
        follow_umask(unfinished)
        if replace and path.exists():
            shutil.rmtree(path)
        # A rename within a folder is atomic.
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Gives the files in a folder the permissions that `open` would have given them. Safetensors makes its files
    readable for their owner only."""
    rights = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            # Another process may just have renamed the file.
            with contextlib.suppress(FileNotFoundError):
                file.chmod(rights)


def check_writable(what: str, path: str | os.PathLike, folder: bool = False) -> Path:
    """Returns the path if a file (or a folder) can be made there; else raises OSError or ValueError that begins with
    `what`.

    Call it before long work whose result is to be written. It leaves nothing behind and makes no folder.
    """
    path = Path(path)
    try:
        os.fsencode(path)
        str(path).encode()
    except UnicodeEncodeError:
        raise BadValue(
            f"{what}: the name {ascii(str(path))} can't be written in UTF-8 and in the locale's encoding; "
            "take another name, or a UTF-8 locale such as LC_ALL=C.UTF-8"
        ) from None
    try:
        if path.exists() and path.is_dir() != folder:
            raise (NotADirectoryError if folder else IsADirectoryError)(f"it is a {'file' if folder else 'folder'}")
        nearest = path.absolute() if folder else path.absolute().parent
        while not nearest.exists():
            nearest = nearest.parent
        probe = temporary_beside(nearest / "esfast")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        kind: type = type(error)
        raise mendable(kind)(f"{what}: can't write to {path}: {error.strerror or error}") from None
    return path
