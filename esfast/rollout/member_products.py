"""Products of a few rows with each member's own matrix, on a CPU.

`torch.bmm` takes members one by one, and waits for each one's weights, which have left the nearer caches since the step
before. The extension's routine fetches the next member's weights meanwhile; see csrc/cpu_products.cpp. It is used where
it is faster and gives the bits of `torch.bmm`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..core.ops import instruction_set

try:
    from .. import _cpu as extension
except ImportError:
    # without a C++ compiler
    extension = None

# From more rows of each member on, `torch.bmm` is as fast.
MOST_ROWS = 32
# Numbers of a matrix, 256 KiB of them. A larger one leaves no room in the cache for that of the next member.
LARGEST = 65536

Product = Callable[[torch.Tensor], torch.Tensor]


def product_of(w: torch.Tensor, b: torch.Tensor | None) -> Product:
    """x (members * rows, ..., in) -> x @ w + b for each member, for w (members, in, out) and b (members, 1, out)."""
    members, size, out = w.shape

    def product(x: torch.Tensor) -> torch.Tensor:
        mine = x.reshape(members, -1, size)
        y = torch.bmm(mine, w) if b is None else torch.baddbmm(b, mine, w)
        return y.view(*x.shape[:-1], out)

    if not (_takes(w) and (b is None or _takes(b))):
        return product
    weights, bias, numbers = w.data_ptr(), 0 if b is None else b.data_ptr(), members * size

    def product_of_few(x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // numbers
        few = 0 < rows <= MOST_ROWS
        plain = type(x) is torch.Tensor and x.dtype is torch.float32 and x.is_cpu and not x.requires_grad
        fits = plain and x.shape[-1] == size and not x.is_neg()
        if not (few and fits and not _is_watched() and _same_bits(rows, size, out)):
            return product(x)
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], out))
        extension.products(x.data_ptr(), weights, bias, y.data_ptr(), members, rows, size, out, torch.get_num_threads())
        return y

    return product_of_few


def _is_watched() -> bool:
    """Whether something records PyTorch's operations, counts them or does them in another way, and so must see them:
    torch.compile, a TorchDispatchMode, torch.jit.trace, torch.func, forward-mode derivatives, or autocast."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def _takes(w: torch.Tensor) -> bool:
    """Whether the routine is there and takes such weights of members, (members, ..., out)."""
    plain = w.device.type == "cpu" and w.dtype is torch.float32 and w.is_contiguous() and not w.requires_grad
    return plain and _is_there() and w.numel() <= LARGEST * len(w)


@functools.cache
def _is_there() -> bool:
    return hasattr(extension, "products") and instruction_set(extension.instruction_sets()) == "avx512"


@functools.cache
def _same_bits(rows: int, size: int, out: int) -> bool:
    """Whether the routine adds up as `torch.bmm` does here on one thread, seen from a few thousand sums."""
    members, random = 2 + 4096 // (rows * out), torch.Generator().manual_seed(0)
    shapes = (members, rows, size), (members, size, out), (members, 1, out)
    # whatever the process has set as its default
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x, w, b = (torch.randn(shape, generator=random, **kind) for shape in shapes)
    y = torch.empty(members, rows, out, **kind)
    extension.products(x.data_ptr(), w.data_ptr(), b.data_ptr(), y.data_ptr(), members, rows, size, out, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.equal(y, torch.baddbmm(b, x, w))
    finally:
        torch.set_num_threads(threads)
