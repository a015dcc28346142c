"""Files and folders that are written whole or not at all, with the access rights that the umask gives.

What is being written has a hidden name that ends in TEMPORARY beside its target, and takes its place by a rename.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

# how the name of what is being written ends
TEMPORARY = ".tmp"


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that nothing has. Made by plain open or mkdir, which heed the umask; those of
    `tempfile` are private to the user whatever it says."""
    return path.parent / f".{path.name[:40]}.{secrets.token_hex(6)}{TEMPORARY}"


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes the file whole or not at all; text as UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            # half a character, which a completion may hold, has no form in UTF-8: it is shown as \udc00
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """A folder to be filled in the block, which is at `path` after it: whole, or if the block raises not at all.

    An older one there is replaced; with replace=False it is OSError, and the older one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_beside(path)
    unfinished.mkdir()
    try:
        yield unfinished
        follow_umask(unfinished)
        if replace and path.exists():
            shutil.rmtree(path)
        os.replace(unfinished, path)  # a neighbour's rename is atomic
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Gives the files in a folder that `mkdir` made the rights that `open` would have given them there. Safetensors
    makes its files readable for their owner alone."""
    rights = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            # another process may have just put it in its place
            with contextlib.suppress(FileNotFoundError):
                file.chmod(rights)


def check_writable(what: str, path: str | os.PathLike, folder: bool = False) -> Path:
    """The path, if a file (or a folder) can be made there; OSError or ValueError that begins with `what` if not.

    For the door of whatever works for long before it writes. Nothing is left behind, and no folder is made.
    """
    path = Path(path)
    try:
        os.fsencode(path)
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
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
        raise type(error)(f"{what}: can't write to {path}: {error.strerror or error}") from None
    return path
