"""Measures where the time of a run goes, and what ES costs beyond generating text."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

# Of a training iteration. perturb: writing members and restoring; score: calling reward functions, or handing work to
# their processes; wait: for rewards after the last member; journal: until it is on disk; other: rows and logging.
PHASES = ("perturb", "generate", "score", "wait", "update", "journal", "other")


class PhaseTimer:
    """Seconds by phase: `record(phase)` adds the time since the previous `record` to that phase."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._device, self._last = device, time.perf_counter()

    def record(self, phase: str) -> None:
        # Wait for the device: kernels go on after the call that launched them has returned.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """Moves seconds, which were timed separately, from the phase `source` to the phase `target`."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each phase of training since the copy of `seconds` was made."""
        return {phase: self.seconds[phase] - before[phase] for phase in PHASES}


def account(seconds: Mapping[str, float], tokens: int | None) -> dict[str, float]:
    """Figures from the seconds of iterations by phase and the tokens generated in them.

    overhead_ratio      seconds of the whole iteration divided by those of generating; everything else counts as
                        overhead, also scoring. It assumes that generating is as fast as with weights that never
                        change; `esfast bench iteration` measures that too
    tokens_per_second   tokens divided by the seconds of the whole iteration
    """
    total = sum(seconds[phase] for phase in PHASES)
    figures = {"overhead_ratio": total / seconds["generate"]} if seconds["generate"] else {}
    return figures | ({"tokens_per_second": tokens / total} if tokens and total else {})
