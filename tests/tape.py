"""A stand-in for a CUDA graph on the CPU: records operations with the tensors that they read and write, and replays
them on these."""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esfast.rollout.graphs import CaptureFailed

# They read a value on the host, have results whose shape depends on values, or copy from the host's memory.
FORBIDDEN = (
    "_local_scalar_dense is_nonzero equal nonzero masked_select _unique2 unique_dim unique_consecutive bincount "
    "repeat_interleave lift_fresh lift_fresh_copy"
).split()


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Raises CaptureFailed where CUDA would refuse to capture an operation. `calls` are the operations that do
    something, in their order; views are left out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        masked = name.startswith("index") and any(x.dtype is torch.bool for x in tensors(args[1:2]))
        if name in FORBIDDEN or masked:
            raise CaptureFailed(f"{func} while a graph is captured")
        result = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        made = [x.untyped_storage().data_ptr() not in given for x in tensors(result)]
        if func._schema.is_mutable or any(made):
            self.calls.append((func, args, kwargs, tensors(result), made))
        return result

    def replay(self):
        for func, args, kwargs, results, made in self.calls:
            for old, new, own in zip(results, tensors(func(*args, **kwargs)), made, strict=True):
                if own:
                    old.copy_(new)


def taped(prepare, work, beside=None):
    """As esfast.rollout.graphs.captured."""
    prepare()
    work()
    prepare()
    tape = Tape()
    # Transformers asks whether a stream is captured.
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True), tape:
        work()
    return tape
