"""The report's table of probes: what other tasks lost or gained while the model was trained on one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..trainer.probes import PREFIX
from .runs import Run
from .text import escaped


def forgotten(runs: Sequence[Run]) -> str:
    """HTML of a table with a row for each run and probe, before the first generation and after the last evaluation;
    nothing without probes. The change stands beside its standard error."""
    rows = []
    for run in runs:
        names = dict.fromkeys(n.removeprefix(PREFIX).rpartition("/")[0] for n in run.evaluated if n.startswith(PREFIX))
        for name in names:
            reward, error, right = (run.series(f"{PREFIX}{name}/{m}") for m in ("reward", "reward_se", "accuracy"))
            change = ""
            if len(reward) > 1:
                change = f"{reward[-1][1] - reward[0][1]:+.4g}"
            if len(error) > 1:
                change += f" ± {math.hypot(error[0][1], error[-1][1]):.2g}"
            cells = [run.name, name, _from_to(reward), change, _from_to(right)]
            rows.append(
                "".join(f'<td class="{"number" if i > 1 else ""}">{escaped(c)}</td>' for i, c in enumerate(cells))
            )
    if not rows:
        return ""
    head = "".join(f'<th class="number">{title}</th>' for title in ("reward", "change", "accuracy"))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        "<h2>What other tasks lost</h2>"
        f'<div class="table"><table><tr><th>run</th><th>probe</th>{head}</tr>{body}</table></div>'
    )


def _from_to(series: Sequence[tuple]) -> str:
    return f"{series[0][1]:.4g} → {series[-1][1]:.4g}" if series else ""
