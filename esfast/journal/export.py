"""Exported journals: a journal packed into one safetensors file of a few kilobytes, which `replay` reads as well.

Tensors, with all generations in a row: seeds (int64, the bits of the uint64) and coeffs (float32); counts (int64), the
number of seeds of each generation; rewards (float64, NaN for a member that was set aside) and their reward_counts;
sigma, lr and decay (float64), one a generation. The journal's header and checks are the file's metadata.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..update.updater import UpdateRecord
from ..utils.errors import BadValue
from ..utils.files import write_whole
from .journal import Contents, read


def pack(journal: str | Path, out: str | Path) -> int:
    """Packs a journal into `out`, whole or not at all; returns the file's size in bytes. ValueError as in `read`."""
    header, records, checks = read(journal)
    rewards = [[math.nan if x is None else x for x in r.rewards] for r in records]
    flat = {
        "seeds": ([s - 2**64 if s >= 2**63 else s for r in records for s in r.seeds], torch.int64),
        "coeffs": ([c for r in records for c in r.coeffs], torch.float32),
        "counts": ([len(r.seeds) for r in records], torch.int64),
        "rewards": ([x for each in rewards for x in each], torch.float64),
        "reward_counts": ([len(each) for each in rewards], torch.int64),
        **{name: ([getattr(r, name) for r in records], torch.float64) for name in ("sigma", "lr", "decay")},
    }
    data = save(
        {name: torch.tensor(values, dtype=dtype) for name, (values, dtype) in flat.items()},
        {"esfast_journal": json.dumps(header), "checks": json.dumps(checks)},
    )
    write_whole(out, data)
    return len(data)


def unpack(path: str | Path) -> Contents:
    """The contents of the packed journal; ValueError if the file is something else."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "esfast_journal" not in metadata:
                raise BadValue(f"{path} is no journal packed by `esfast export`")
            flat = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BadValue(f"{path} is damaged: {error}") from None
    seeds, coeffs, rewards = (iter(flat[name]) for name in ("seeds", "coeffs", "rewards"))
    records = []
    for g, (count, scored) in enumerate(zip(flat["counts"], flat["reward_counts"], strict=True)):
        row = [next(rewards) for _ in range(scored)]
        records.append(
            UpdateRecord(
                g,
                [next(seeds) % 2**64 for _ in range(count)],
                [next(coeffs) for _ in range(count)],
                [None if math.isnan(x) else x for x in row],
                flat["sigma"][g],
                flat["lr"][g],
                flat["decay"][g],
            )
        )
    checks = {int(g): text for g, text in json.loads(metadata["checks"]).items()}
    return Contents(json.loads(metadata["esfast_journal"]), records, checks)
