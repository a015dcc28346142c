"""The thing that a trainer tunes: a model in this process, with or without adapters, or weights in a store
elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from ..core.plan import Plan
from ..distributed.team import Team
from ..es.store import WeightStore
from ..rollout import adapters
from ..utils.errors import BadType, BadValue
from .config import AUTO, ESConfig
from .door import open_model
from .identity import config_of
from .kl import KLToBase


class Tuned(Protocol):
    """
    model    the value of ESTrainer.model: an nn.Module, or the store
    name     name or folder from which its tokenizer can be loaded; "" if unknown
    library  the library that loads the saved model, for the model card
    """

    model: Any
    name: str
    library: str

    def identity(self) -> dict[str, Any]:
        """What must be the same in a resumed run, besides reward functions and data."""

    def weights(self) -> Plan | WeightStore:
        """The argument for ES. ValueError for weights that can't be tuned with this config."""

    def begin(self, adapter: Path, resumed: bool, writes: bool) -> None:
        """Called after the run folder is claimed and before ES is made. `adapter` is the folder for the adapters that
        the run begins with."""

    def kl(self, tokenizer) -> KLToBase | None:
        """The metric kl_to_base, relative to the present weights; None if the config doesn't ask for it."""


def open_tuned(model, peft_config, config: ESConfig, team: Team) -> Tuned:
    """TypeError or ValueError for a model that can't be tuned."""
    if isinstance(model, WeightStore):
        return _Store(model, peft_config, config)
    return _Model(model, peft_config, config, team)


class _Model:
    """A Hugging Face model, used both to generate and to update."""

    def __init__(self, model, peft_config, config: ESConfig, team: Team):
        named = isinstance(model, (str, os.PathLike))
        if team.shards > 1 and (named or peft_config is not None or adapters.is_peft(model)):
            raise BadValue(
                "a model in shards: expected the model itself, without adapters; see esfast.distributed.tensor_parallel"
            )
        model = open_model(model)
        if peft_config is not None:
            model = adapters.wrap(model, peft_config, config.seed)
        adapters.check(model)
        self.model, self._config = model, config
        self.name = getattr(getattr(model, "config", None), "_name_or_path", "")
        self.library = "peft" if adapters.is_peft(model) else "transformers"
        self._include = config.include or adapters.patterns(model)

    def identity(self) -> dict[str, Any]:
        model = self.model
        return {
            "model": type(model).__qualname__,
            "model config": config_of(model),
            **adapters.identity(model),
        }

    def weights(self) -> Plan:
        plan = Plan(self.model, self._include, self._config.exclude)
        adapters.check_saved(self.model, plan.whole_names)
        return plan

    def begin(self, adapter: Path, resumed: bool, writes: bool) -> None:
        adapters.begin(self.model, adapter, resumed, writes)

    def kl(self, tokenizer) -> KLToBase | None:
        if not self._config.kl_to_base:
            return None
        return KLToBase(self.model, tokenizer, self._config.max_completion_length)


class _Store:
    """Weights in a store of its own, such as a fleet of engines."""

    library = "transformers"

    def __init__(self, store: WeightStore, peft_config, config: ESConfig):
        if peft_config is not None:
            raise BadType("peft_config: expected a model to put adapters into, got weights in a store")
        check_store_settings(config, f"a {type(store).__name__}")
        self.model, self.name = store, store.source

    def identity(self) -> dict[str, Any]:
        return {}

    def weights(self) -> WeightStore:
        return self.model

    def begin(self, adapter: Path, resumed: bool, writes: bool) -> None: ...

    def kl(self, tokenizer) -> None:
        return None


def check_store_settings(config: ESConfig, store: str) -> None:
    """ValueError for settings that need the weights in this process, and not in `store`."""
    needs = {"kl_to_base": False, "perturb_rounding": "nearest", "include": None, "exclude": None}
    for name, only in (needs | {"prompts_per_member": "shared"}).items():
        if getattr(config, name) != only:
            raise BadValue(f"{name}: with the weights in {store} only {only!r} works, got {getattr(config, name)!r}")
    if config.groups == [AUTO]:
        raise BadValue("groups: 'auto' needs the weights in this process; name the groups, or leave them out")
