"""How many threads a small model's batches get on a CPU.

The matrices of a small model keep several threads busy only in a batch of many rows. And at the end of every operation
the threads wait for the last one: if another process has taken a core, each operation takes as long as the scheduler
lets that process run, some milliseconds. So threads are chosen before each forward pass, by its work and by how long
the threads before had to wait for a core.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import torch

# Weights x tokens of a forward pass that make a thread worth its share. Measured on two cores: two threads are faster
# than one from 20 million on (1.2 times), 1.5 times as fast from 300 million on.
WORK_OF_THREAD = 10_000_000
# Threads are too many if together they waited for cores for more than this share of the time.
CROWDED = 0.5
# Seconds after which the waiting is looked at: a look takes some 0.1 milliseconds.
STRETCH = 0.05
# After a crowded stretch there are fewer threads for so many times its length; for twice as many if the next stretch
# is crowded, too, and so on, at most for the second number.
PAUSE, LONGEST_PAUSE = 2, 32

now = time.monotonic


class Threads:
    """Sets the number of threads before each forward pass of a model with so many weights."""

    def __init__(self, weights: int):
        self.weights = weights
        self._most = 1
        self._few, self._few_until, self._pause = 1, 0.0, PAUSE
        # of the stretch that is watched: when it began, how long threads had waited before, the number of threads, and
        # whether that is fewer than usual
        self._began: tuple[float, float, int, bool] | None = None

    @contextlib.contextmanager
    def at_most(self, number: int) -> Iterator[None]:
        """In the block `choose` sets at most so many threads; after it the number is as before."""
        before, self._most = torch.get_num_threads(), number
        try:
            yield
        finally:
            self._look(0.0)
            self._began, self._most = None, 1
            torch.set_num_threads(before)

    def choose(self, tokens: int) -> None:
        """Sets the number of threads for a forward pass over so many tokens."""
        self._look(STRETCH)
        fewer = now() < self._few_until
        most = min(self._few, self._most) if fewer else self._most
        number = max(1, min(most, self.weights * tokens // WORK_OF_THREAD))
        if number == 1:
            self._began = None
        elif self._began is None or self._began[2] != number:
            self._began = now(), seconds_waited(), number, fewer
        torch.set_num_threads(number)

    def _look(self, least: float) -> None:
        """Ends the stretch if it took so long, and takes fewer threads if they waited too much."""
        if self._began is None:
            return
        began, waited, number, fewer = self._began
        seconds = now() - began
        if seconds < least:
            return
        self._began = None
        if seconds_waited() - waited > CROWDED * seconds:
            self._few, self._few_until = max(1, number // 2), now() + self._pause * seconds
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif not fewer:
            self._pause = PAUSE


def seconds_waited() -> float:
    """How long this process' threads were ready to run and had no core, in all; 0 where the system doesn't say."""
    waited = 0
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
                with open(f"/proc/self/task/{thread}/schedstat") as file:
                    waited += int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return waited / 1e9
