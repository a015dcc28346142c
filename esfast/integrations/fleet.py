"""ESTrainer with its weights in a Fleet of vLLM engines, and none in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..config import ESConfig
from ..es import ES, Member
from ..plan import Plan
from ..rewards import RewardFunc
from ..rows import Rows
from ..trainer import ESTrainer
from ..update import Generation, Rule
from .ray import Fleet


class FleetPlan(Plan):
    """The weights of a Fleet, none of which are in this process: what ES and its journal ask of a plan."""

    def __init__(self, fleet: Fleet):
        self.fleet, self._stated = fleet, fleet.describe()
        self.entries, self._tensors = [], []
        self.device, self.low = torch.device("cpu"), None
        self._finish()

    sharded = True  # nothing here to make a checkpoint of: the journal holds all

    @property
    def layout(self) -> str:
        return self._stated["layout"]

    @property
    def numel(self) -> int:
        return self._stated["numel"]

    whole_numel = numel

    def fingerprint(self) -> str:
        return self.fleet.fingerprint()

    def save_pretrained(self, folder: str | Path) -> None:
        self.fleet.save(folder)

    def __len__(self) -> int:
        return self._stated["tensors"]

    def __repr__(self) -> str:
        return f"FleetPlan({len(self)} tensors, {self.numel:,} weights, in each of {len(self.fleet.alive)} engines)"


class FleetWeights:
    """A weight mode whose weights are in the engines, which make members by themselves."""

    mode = "base"

    def __init__(self, plan: FleetPlan, rule: Rule, backend: str = "auto"):
        self.fleet, self.updater = plan.fleet, self
        self.fleet.begin(rule, self.mode)

    def __call__(self, record: Generation) -> None:
        self.fleet.update(record)

    update = __call__

    def settle(self) -> None:
        """Engines do so after every update."""

    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        raise RuntimeError("the members of a Fleet are in its engines: ask for their completions with Fleet.members")

    def restore(self) -> None: ...


class FleetES(ES):
    modes = {name: type(f"Fleet_{name}", (FleetWeights,), {"mode": name}) for name in ("base", "master", "host")}
