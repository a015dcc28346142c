"""Members of a population side by side: for each tensor the weights of K members in one stack, (K, *shape).

`StackWriter` writes them. On a CPU one call of the extension writes all members, which threads share, and lays matrices
transposed where that is wanted: 30 members of 124,000 weights take 8 to 10 ms on one thread and 4.5 on two, where two
calls for each member, one for the noise and one to transpose it, took 12. Elsewhere it is a call for each member.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..utils.errors import BadValue
from .kinds import DOMAINS, check_kind, check_rank
from .ops import Call, check_rounding, get_backend, instruction_set, run_checked, run_on_cpu, subnormals_kept
from .plan import Plan
from .segments import Slice

# Weights x members from which threads share a call: it takes 1.5 ms on one. `add_noise_` asks for more: a population is
# written by one call, and those who make it know of other processes and set fewer threads.
WORK_OF_THREADS = 1_000_000


class Stack(NamedTuple):
    """Where K members have a tensor, which is the part `window` of the whole one called `name`.

    stack   (K, *shape), without gaps; None: only `turned` is wanted
    turned  float32 matrices transposed, (K, columns, rows), without gaps; None: only `stack` is wanted
    """

    name: str
    window: Slice
    stack: torch.Tensor | None
    turned: torch.Tensor | None = None

    def of_member(self, k: int) -> tuple[str, torch.Tensor, Slice]:
        """An entry for a Plan. If only `turned` is wanted, that memory with the shape of the tensor."""
        tensor = self.turned[k].view(*self.turned.shape[:0:-1]) if self.stack is None else self.stack[k]
        return self.name, tensor, self.window

    def row(self) -> tuple[int, ...]:
        """The fields of csrc/module.cpp's Stack, but the first. A step of 0 says that only `turned` is wanted."""
        step = 0 if self.stack is None else self.stack[0].nbytes
        if self.turned is None:
            return step, 0, 0, 0, 0
        columns, rows = self.turned.shape[1:]
        return step, self.turned.data_ptr(), self.turned[0].nbytes, rows, columns


def can_turn(device: torch.device, backend: str = "auto", noise: str = "gaussian") -> bool:
    """Whether a StackWriter with these options lays matrices transposed."""
    return get_backend(backend, device, noise) is run_on_cpu


class StackWriter:
    """Writes members to stacks: member k of a call becomes round(base + coeffs[k] * noise(seeds[k])).

    base  the same tensors, in the order of the stacks; the other arguments are as in `add_noise_`

    Raises TypeError or ValueError as `add_noise_`, and ValueError if a stack has `turned` where `can_turn` says no.
    `room` is how many bytes a thread takes during a call, at most.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        base: Plan,
        noise: str = "gaussian",
        rounding: str = "nearest",
        backend: str = "auto",
        rank: int = 1,
    ):
        self._run = get_backend(backend, base.device, noise)
        self._call = functools.partial(
            Call,
            base=base,
            kind=noise,
            rank=check_rank(check_kind(noise), rank),
            stochastic=check_rounding(rounding) == "stochastic",
        )
        self._at_once = self._run is run_on_cpu
        if not self._at_once and any(stack.turned is not None for stack in stacks):
            raise BadValue("stacks: only the CPU's extension lays matrices transposed")
        self._most = len(stacks[0].turned if stacks[0].stack is None else stacks[0].stack)
        # of each member; where all are written at once the first one's tells where all are
        self._plans = [Plan([s.of_member(k) for s in stacks]) for k in range(1 if self._at_once else self._most)]
        self._rows = np.array([(0, *stack.row()) for stack in stacks], dtype=np.int64)
        self.room = max((stack.turned[0].nbytes for stack in stacks if stack.stack is None), default=0)

    def write(self, seeds: np.ndarray, coeffs: np.ndarray, members: int) -> None:
        """Writes the first so many members: with seeds and coefficients as `check_members` returns them, one for each,
        or none, and then all are copies of the base."""
        if not 0 <= members <= self._most or len(seeds) not in (0, members) or len(seeds) != len(coeffs):
            raise BadValue(
                f"stacks: expected at most {self._most} members, and a seed and a coefficient for each or none; got "
                f"{members}, {len(seeds)} seeds and {len(coeffs)} coefficients"
            )
        with subnormals_kept():
            if self._at_once:
                self._write_at_once(self._call(self._plans[0], seeds, coeffs), members)
                return
            for k, plan in enumerate(self._plans[:members]):
                run_checked(self._run, self._call(plan, seeds[k : k + 1], coeffs[k : k + 1]))

    def _write_at_once(self, call: Call, members: int) -> None:
        from .. import _cpu as extension

        self._rows[:, 0] = call.table.ends
        extension.write_stacks(
            call.table.rows,
            self._rows,
            members,
            call.seeds,
            call.coeffs,
            DOMAINS[call.kind],
            call.stochastic,
            call.low.data_ptr() if call.low is not None else 0,
            torch.get_num_threads() if call.plan.numel * members >= WORK_OF_THREADS else 1,
            instruction_set(extension.instruction_sets()),
            call.rank,
        )
