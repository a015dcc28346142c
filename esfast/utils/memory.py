"""How much memory there is, and how a process keeps to what it needs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# From this size on an allocation gets pages of its own, which go back to the system as soon as it is freed.
OWN_PAGES_FROM = 2**20
# Free memory that the heap keeps at its end.
KEPT_FREE = 2**22
# To keep all that is freed: glibc's largest threshold, and the largest number that mallopt takes.
KEEP_UP_TO, KEPT_FREE_AT_MOST = 2**25, 2**31 - 1
# Parameters of glibc's mallopt
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory; for a CPU, of the machine's, or less if a container (cgroup) or `ulimit -v`, `-d`
    allows this process less.

    All of it, not what is free at the moment: what is chosen by it must be the same in the same run on the same
    machine.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits(), *_process_limits()])


def in_bytes(size: float) -> str:
    """Bytes as a text, "45 MB" or "1.20 GB"."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def own_memory(device: torch.device) -> int:
    """The part of `total_memory` that is for this process: processes that torchrun started on one machine share its
    memory, while each has a GPU of its own."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return total_memory(device) // (int(processes) if device.type != "cuda" and processes.isdecimal() else 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch says that memory ran out. On a CPU it is a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def give_back_freed_memory() -> None:
    """From now on glibc gives back the memory of large tensors when they are freed.

    By itself it learns from the first ones to keep most of them on its heap, up to 32 MB each. Between them lie small
    objects, and the gaps are rarely of the size that is needed next: the process takes up to half as much again as its
    tensors. It holds for the whole process. It changes nothing if the user has set how glibc allocates (MALLOC_*,
    GLIBC_TUNABLES), or if the C library is another.
    """
    _set_malloc(OWN_PAGES_FROM, KEPT_FREE)


def keep_freed_memory() -> None:
    """From now on glibc keeps the memory of tensors up to 32 MB when they are freed.

    By itself it gives back what is free at the end of its heap, and each of these pages is cleared again at the next
    use: the embedded model's batches take a fifth longer, with two threads a quarter. Otherwise as
    `give_back_freed_memory`.
    """
    _set_malloc(KEEP_UP_TO, KEPT_FREE_AT_MOST)


@contextlib.contextmanager
def own_pages() -> Iterator[None]:
    """In the block large tensors that find no place on glibc's heap get pages of their own, also after
    `keep_freed_memory`: tensors that stay shall not lie between those that come and go."""
    chosen = _chosen
    if chosen is None:
        yield
        return
    _set_malloc(OWN_PAGES_FROM, KEPT_FREE_AT_MOST)
    try:
        yield
    finally:
        _set_malloc(*chosen)


# What `_set_malloc` set last.
_chosen: tuple[int, int] | None = None


def _set_malloc(own_pages_from: int, kept_free: int) -> None:
    global _chosen
    chosen = [name for name in os.environ if name.startswith("MALLOC_")]
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    libc = _glibc()
    if libc is not None:
        _chosen = own_pages_from, kept_free
        libc.mallopt(_M_MMAP_THRESHOLD, own_pages_from)
        libc.mallopt(_M_TRIM_THRESHOLD, kept_free)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None


def _process_limits() -> Iterator[int]:
    try:
        import resource
    # on Windows
    except ImportError:
        return
    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            yield limit


def _cgroup_limits(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> Iterator[int]:
    """Memory limits of the control groups that this process is in, and of those around them.

    A container may see its own group as the root while `proc` still gives the host's path: where a folder is not there,
    those above it count.
    """
    try:
        lines = Path(proc).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # version 2 has one tree, whose list of controllers is empty
        if controllers and "memory" not in controllers.split(","):
            continue
        tree, name = (Path(root, "memory"), "memory.limit_in_bytes") if controllers else (Path(root), "memory.max")
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            try:
                limit = (tree / folder / name).read_text().strip()
            except OSError:
                continue
            # version 2 says "max" for none; version 1 a number larger than any memory
            if limit.isdecimal():
                yield int(limit)
