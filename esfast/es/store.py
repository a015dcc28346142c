"""Who holds the weights that ES tunes: the protocol that ES knows."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.dtensors import in_shards, whole_state_dict
from ..core.plan import Plan
from ..update.updater import Generation, Rule, Updater
from ..utils.errors import BadState, BadValue
from ..utils.unwrap import save_unwrapped


class WeightStore(abc.ABC):
    """Holds weights, turns them into a member and back, and applies updates. ES and ESTrainer know no more of it.

    The weight modes of esfast.es.weights hold the weights of a model in this process; ES makes one of them from a
    model. A store that is handed to ES as the model may hold them elsewhere, for example in a fleet of engines:

        es = ES(store, sigma=1e-3)
        trainer = ESTrainer(store, reward, config, rows, evaluator=...)

    Attributes:
        mode: how updates are rounded, one of esfast.utils.names.WEIGHT_MODES. It stands in the journal.
        source: name or folder of the model that the weights came from; "" if unknown.
        whole_names, whole_numel, layout: of all tensors, as a Plan of the Hugging Face model has them.
        device: where the work is done, for clocks that wait for it.
        plan: the weights of this process, None if there are none here.
        updater: what a checkpoint saves, None if the run is resumed from its journal alone.
    """

    mode: str
    source: str = ""
    whole_names: list[str]
    whole_numel: int
    layout: str
    device: torch.device = torch.device("cpu")
    plan: Plan | None = None
    updater: Updater | None = None

    @abc.abstractmethod
    def begin(self, rule: Rule) -> None:
        """Called once, before anything else, by the ES that the store is handed to: updates follow this rule, and start
        from the weights of now. ValueError for a rule that the store can't follow."""

    @abc.abstractmethod
    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        """Makes the weights base + coeff * noise(seed), whichever member they were before. `coeff` is the member's sign
        times sigma. RuntimeError where members are made by somebody else."""

    @abc.abstractmethod
    def restore(self) -> None:
        """Takes the member away. It may be called when none is in place, and again after it was interrupted."""

    @abc.abstractmethod
    def update(self, record: Generation) -> None:
        """Applies a generation, the one after those that were applied or noted. All of it or nothing."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """That of `Plan.fingerprint` of the whole model, no member being in place. A collective call of processes that
        hold shards."""

    @abc.abstractmethod
    def save(self, folder: Path, gathered: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the weights into an empty folder that from_pretrained can load; `gathered` is what `gather` gave."""

    def gather(self, keep: bool) -> dict[str, torch.Tensor] | None:
        """What `save` needs of other processes. Those that hold shards of the weights call it together; only the one
        that saves keeps the result. None if nothing is needed."""
        return None

    def replay(self, records: Sequence[Generation]) -> None:
        """Applies many generations, when a run is resumed. Weights need to be up to date only after the last."""
        for record in records:
            self.update(record)

    def note_applied(self, record: Generation) -> None:
        """Notes a generation that is in the weights already, since a checkpoint held it: Momentum needs it."""
        return

    def changed_elsewhere(self) -> bool:
        """Whether something else changed the weights since the store last wrote them, so that it would undo that.
        Called between members."""
        return False

    def drift(self) -> float | None:
        """RMS distance of the weights from those of exact arithmetic; None if the store restores exactly."""
        return None


class LocalStore(WeightStore):
    """The weights of a plan in this process. A subclass sets `updater`."""

    plan: Plan

    def __init__(self, plan: Plan, rule: Rule):
        self.plan, self.rule, self.device = plan, rule, plan.device
        self.whole_names, self.whole_numel, self.layout = plan.whole_names, plan.whole_numel, plan.layout
        self.source = getattr(getattr(plan.module, "config", None), "_name_or_path", "")

    def begin(self, rule: Rule) -> None:
        if rule != self.rule:
            raise BadValue(f"the weights follow {self.rule}, which was given when they were made, asked for is {rule}")

    def replay(self, records: Sequence[Generation]) -> None:
        assert self.updater is not None
        for record in records:
            self.updater(record)
        self.settle()

    def settle(self) -> None:
        """Brings the live weights, and copies of them, up to date after `updater` was called."""

    def note_applied(self, record: Generation) -> None:
        assert self.updater is not None
        self.updater.recall(record)

    def changed_elsewhere(self) -> bool:
        """RuntimeError if the module has other parameters than the plan."""
        self.plan.check_module()
        return False

    def fingerprint(self) -> str:
        return self.plan.fingerprint()

    def gather(self, keep: bool) -> dict[str, torch.Tensor] | None:
        module = self.plan.module
        return whole_state_dict(module, keep) if module is not None and in_shards(module) else None

    def save(self, folder: Path, gathered: dict[str, torch.Tensor] | None = None) -> None:
        if not hasattr(self.plan.module, "save_pretrained"):
            raise BadState("save: expected the weights of a Hugging Face model, which has save_pretrained")
        save_unwrapped(self.plan.module, folder, gathered)

    def __repr__(self) -> str:
        return repr(self.plan)
