"""Reward functions that a worker can import by name and that do what they should not, for test_reward_faults."""

import itertools
import os
import signal
from decimal import Decimal
from fractions import Fraction

import numpy as np


def length(prompts, completions, **columns):
    return [len(text) for text in completions]


def marks(prompts, completions, gold, **columns):
    """The length of each row's `gold`. Afterwards it shortens every list that it was given."""
    seen = [float(len(g)) for g in gold]
    for value in (*prompts, *completions, *gold):
        if isinstance(value, list):
            value.pop()
    prompts.clear()
    return seen


def exits(prompts, completions, how, **columns):
    if how[0] == "os._exit":
        os._exit(3)
    if how[0] == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"sys.exit": SystemExit(3), "interrupt": KeyboardInterrupt("no Ctrl-C"), "close": GeneratorExit()}[how[0]]


def returns(prompts, completions, how, **columns):
    value = RETURNED[how[0]]
    return value() if callable(value) else value


def tensor(values, dtype="float32", **options):
    """A function that makes the tensor when it is called, so that a worker that needs no tensor need not import
    torch."""

    def made():
        import torch

        return torch.tensor(values, dtype=getattr(torch, dtype), **options)

    return made


RETURNED = {
    "dict": {"a": 1.0, "b": 2.0},
    "set": {1.0, 2.0},
    "text": "12",
    "bytes": b"12",
    "none": None,
    "number": 0.5,
    "0-d array": np.array(1.0),
    "0-d tensor": tensor(1.0),
    "rows": np.ones((2, 2)),
    "nested": [[1.0], [2.0]],
    "complex": [1j, 0.0],
    "texts": ["1", "2"],
    "bytes within": [b"1", b"2"],
    "huge": [10**400, 1],
    "vast": [1e308, 1.0],
    "enormous": [10**5000, 1],
    "infinite": [float("-inf"), 1.0],
    "three": [1.0, 2.0, 3.0],
    "endless": itertools.count(),
    "objects": [object(), object()],
    "none is fine": [None, 2],
    "bools": [True, np.False_],
    "array": np.array([1, 2]),
    "float16": np.array([1, 2], dtype=np.float16),
    "tensor": tensor([1.0, 2.0], requires_grad=True),
    "bfloat16": tensor([1, 2], "bfloat16"),
    "column": np.array([[1.0], [2.0]]),
    "tuple": (1, 2),
    "decimals": [Decimal(1), Fraction(2)],
    "bfloat16s": lambda: list(tensor([1, 2], "bfloat16")()),
}


def yields(prompts, completions, **columns):
    yield from (1.0, 2.0)
