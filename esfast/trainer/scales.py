"""The sizes of the weights: what sigma is compared with, and groups of tensors with a sigma of their own."""

from __future__ import annotations

import math
import re

from ..core.plan import Plan
from ..update.groups import Group

# Factors of groups stay between 1 / MOST and MOST. A group whose weights are all zero gets the factor 1.
MOST = 32.0
# Weights that are converted to float64 at a time.
CHUNK = 2**22


def rms(plan: Plan) -> float:
    """Root mean square of the matrices; of all weights if there is no matrix. 0.0 if all are zero."""
    squares = _squares(plan)
    matrices = {name: each for name, each in squares.items() if each[2]} or squares
    return math.sqrt(math.fsum(s for s, _, _ in matrices.values()) / sum(n for _, n, _ in matrices.values()))


def groups(plan: Plan) -> list[str]:
    """A group for each kind of tensor, with a sigma and lr in proportion to the RMS of its tensors. Tensors whose names
    differ only in numbers, such as the same matrix of all layers, are of one kind."""
    whole = rms(plan)
    kinds: dict[str, list[tuple[float, int]]] = {}
    for name, (square, count, _) in _squares(plan).items():
        kinds.setdefault(_pattern(name), []).append((square, count))
    found = []
    # The longest pattern first: the first that matches a name counts.
    for pattern in sorted(kinds, key=lambda p: (-len(p), p)):
        # Of a tensor in shards this process may hold nothing.
        own = math.sqrt(math.fsum(s for s, _ in kinds[pattern]) / max(1, sum(n for _, n in kinds[pattern])))
        factor = float(f"{min(MOST, max(1 / MOST, own / whole)):.2g}") if own and whole else 1.0
        found.append(str(Group(pattern, factor, factor)))
    return found


def _squares(plan: Plan) -> dict[str, tuple[float, int, bool]]:
    """For each tensor the sum of squares, the number of weights, and whether it is a matrix. For a sharded tensor,
    those of the part on this rank."""
    return {
        e.name: (
            math.fsum(float(part.double().square().sum()) for part in e.tensor.detach().reshape(-1).split(CHUNK)),
            e.tensor.numel(),
            len(e.window.shape) > 1,
        )
        for e in plan.entries
    }


def _pattern(name: str) -> str:
    """The name as a glob pattern, with * for its numbers."""
    parts = ["*" if part.isdecimal() else re.sub(r"([\[*?])", r"[\1]", part) for part in name.split(".")]
    return ".".join(parts)
