"""CUDA graphs: work that reads and writes the same memory every time, captured once and replayed by one call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..utils.errors import EsfastError
from ..utils.memory import out_of_memory

# Before a capture the work runs a few times: libraries load their kernels and take their workspaces.
WARM_UPS = 3


class CaptureFailed(EsfastError, RuntimeError):
    """Work can't be captured as a CUDA graph; the message says why."""


def captured(
    prepare: Callable[[], None], work: Callable[[], object], beside: torch.cuda.CUDAGraph | None
) -> torch.cuda.CUDAGraph:
    """A CUDA graph, whose `replay` does `work`.

    prepare  called before each time that the work runs to warm up; what the work changes is lost
    work     must not read values of tensors on the host, and must leave its results in tensors that exist already
    beside   another graph, which is never replayed at the same time. The two share memory for what the work allocates

    Raises CaptureFailed, torch.OutOfMemoryError.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    try:
        prepare()
        # What the work allocates to keep belongs to the stream that uses it.
        work()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS - 1):
                prepare()
                work()
        current.wait_stream(side)
        # Other threads (rewards) may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=None if beside is None else beside.pool(), capture_error_mode="thread_local"):
            work()
    except Exception as error:
        # What interrupted the work says more than the error of ending the capture.
        cause = error.__context__ or error
        for each in (error, cause):
            if out_of_memory(each):
                raise each from None
        first_line = next(iter(str(cause).strip().splitlines()), "")
        raise CaptureFailed(f"{type(cause).__name__}: {first_line:.200}") from error
    finally:
        # If a capture fails, PyTorch leaves its stream as the current one.
        torch.cuda.set_stream(current)
    return graph


def addresses(model: torch.nn.Module) -> tuple:
    """Where the weights are that a graph of the model reads: address, shape and strides of each tensor. For several
    members these are their stacks, or the weights and their factors."""
    held = [getattr(t, "held", t) for t in (*_all(model.named_parameters), *_all(model.named_buffers))]
    tensors = [t for h in held for t in ([h] if isinstance(h, torch.Tensor) else [h.weight, h.a, h.b])]
    return tuple((t.data_ptr(), t.shape, t.stride()) for t in tensors)


def _all(named: Callable) -> list:
    return [tensor for _, tensor in named(remove_duplicate=False)]
