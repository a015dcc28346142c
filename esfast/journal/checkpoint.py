"""Checkpoints: the weights (of the base or the master) and the optimizer's state, so that a resumed run replays only
the generations since. A journal alone is enough to resume; checkpoints bound how long that takes."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.fingerprint import MASK, window_sums
from ..core.plan import Entry, Plan
from ..update.updater import Updater
from ..utils.errors import BadFile, BadValue
from ..utils.files import TEMPORARY, follow_umask

log = logging.getLogger(__name__)

# How many checkpoints are kept: the newest, and one to fall back on if that is damaged.
KEPT = 2
_NAME = re.compile(r"generation-(\d{8})(|-\d+of\d+)\.safetensors")


def save(folder: Path, generation: int, updater: Updater, part: str = "", run: str = "") -> Path:
    """Writes the state after `generation` generations, whole or not at all. Then removes all but the KEPT newest
    checkpoints, and those of another number of shards.

    part  suffix of the file's name: each process saves its part of a model in shards
    run   identifies the run and the generations up to here (History.identities)

    OSError if the file can't be written; earlier checkpoints are still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, generation, part)
    temporary = folder / f".{path.name}{TEMPORARY}"
    metadata = {"generation": str(generation), "fingerprint": _fingerprint(updater.plan.entries, updater.plan.low)}
    metadata |= {"run": run} if run else {}
    try:
        save_file({k: t.contiguous() for k, t in _tensors(updater).items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        follow_umask(folder)
    except SafetensorError as error:
        raise BadFile(f"checkpoint: {path} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    there = _list(folder)
    # A later checkpoint belongs to another run; leave it.
    newest = sorted(g for g, other in there if other == part and g <= generation)[-KEPT:]
    for old, other in there:
        if other == part and old < newest[0] or other.partition("of")[2] != part.partition("of")[2]:
            _path(folder, old, other).unlink(missing_ok=True)
    return path


def _path(folder: Path, generation: int, part: str) -> Path:
    return folder / f"generation-{generation:08d}{part}.safetensors"


def _list(folder: Path) -> list[tuple[int, str]]:
    """(generation, part) of each checkpoint in the folder."""
    names = [_NAME.fullmatch(p.name) for p in folder.iterdir()] if folder.is_dir() else []
    return [(int(m[1]), m[2]) for m in names if m]


def load_newest(
    folder: Path,
    until: int,
    updater: Updater,
    part: str = "",
    identities: Sequence[str] = (),
    checks: Mapping[int, str] | None = None,
) -> int:
    """Loads the newest usable checkpoint of at most `until` generations; returns its generation, or 0 if there is none.

    A damaged checkpoint, or one of another run, is ignored with a warning, and no weight changes. Processes that hold a
    model together may find different checkpoints: the generations since are replayed.

    identities  hashes of the run after 0, 1, ... generations
    checks      the journal's fingerprints by generation; they identify older checkpoints, which have no hash
    """
    for generation in sorted((g for g, other in _list(folder) if g <= until and other == part), reverse=True):
        path = _path(folder, generation, part)
        try:
            _load(path, updater, identities[generation], (checks or {}).get(generation))
            return generation
        except (SafetensorError, ValueError, OSError) as error:
            log.warning("checkpoint: %s is not usable (%s): going back further", path, error)
    return 0


def _load(path: Path, updater: Updater, identity: str, check: str | None) -> None:
    targets = _tensors(updater)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("run", identity) != identity:
            raise BadValue("it is of another run")
        if set(file.keys()) != set(targets):
            raise BadValue("it holds other tensors than this run has")
        for name, target in targets.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(target.shape):
                raise BadValue(f"its {name} has the shape {shape}, expected {tuple(target.shape)}")
        if _fingerprint_of(file, updater.plan) != metadata.get("fingerprint"):
            raise BadValue("its fingerprint does not fit")
        if "run" not in metadata and metadata["fingerprint"] != check:
            raise BadValue("it does not say of which run it is, and the journal does not vouch for its weights")
        # One tensor at a time, so that there is no second copy in memory.
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))


def _fingerprint(entries: Sequence[Entry], low: torch.Tensor | None) -> str:
    """Fingerprint of this process's weights."""
    return f"{sum(window_sums(entries, low)) & MASK:016x}"


def _fingerprint_of(file, plan: Plan) -> str:
    """Fingerprint of the file's weights, under the names of the plan."""
    total = 0
    low = file.get_tensor("low") if plan.low is not None else None
    for e, name in zip(plan.entries, _names(plan), strict=True):
        tensor = file.get_tensor(name)
        if tensor.dtype is not e.tensor.dtype:
            raise BadValue(f"its {name} is {tensor.dtype}, expected {e.tensor.dtype}")
        total += window_sums([dataclasses.replace(e, tensor=tensor)], low)[0]
    return f"{total & MASK:016x}"


def _names(plan: Plan) -> list[str]:
    # Numbered, since parts of one tensor share its name.
    return [f"{i}:{e.name}" for i, e in enumerate(plan.entries)]


def _tensors(updater: Updater) -> dict[str, torch.Tensor]:
    plan = updater.plan
    named = dict(zip(_names(plan), (t.detach() for t in plan.tensors), strict=True))
    more = {"low": plan.low, **updater.state.tensors}
    return named | {name: t for name, t in more.items() if t is not None}
