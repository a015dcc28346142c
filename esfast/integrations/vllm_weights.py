"""The weights of a vLLM worker for ES: its part of every Hugging Face tensor, a base to restore from, a record."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..core.fingerprint import MASK, window_sums
from ..core.plan import Plan
from ..es.weights import MODES
from ..journal.journal import Journal, header_of
from ..update.updater import Rule, UpdateRecord
from ..utils.errors import BadState, BadValue
from . import vllm_files, vllm_layout
from .offsets import Offsets


class WorkerWeights:
    """
    Args:
        model: the worker's model.
        config: its Hugging Face config.
        source: the model's folder or name.
        group: vLLM's tensor-parallel group. All ranks make, save and fingerprint their weights together.

    Raises TypeError or ValueError, which names the weight, if `vllm_layout` or Plan refuses one. `begin` copies the
    weights.
    """

    def __init__(self, model, config, source: str, group):
        self.source, self.group = source, group
        self.wholes = vllm_layout.hf_shapes(config)
        found = vllm_layout.pieces(model, self.wholes)
        vllm_layout.check_live(model)
        self.places = self._gather([(name, tuple(t.shape), tuple(w.offset)) for name, t, w in found])
        self.first = vllm_layout.check_covered(self.wholes, self.places)
        self.found = found
        self.all = Plan(found)
        mine = zip(self.places[group.rank_in_group], self.first[group.rank_in_group], strict=True)
        kept = {(name, offset) for (name, _, offset), first in mine if first}
        self._owned = [e for e in self.all.entries if (e.name, tuple(e.window.offset)) in kept]
        self.mode: Any = None  # of esfast.es.weights, once `begin` was called
        self.by_default = False  # whether nobody has chosen the rule of updates

    def begin(self, rule: Rule, mode: str = "base", include=None, exclude=None) -> None:
        """Starts updates from the present weights. Arguments as for `esfast.ES`."""
        if mode not in MODES:
            raise BadValue(f"weights: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if self.mode is not None:
            self.offsets.clear()
        self.plan = Plan(self.found, include, exclude) if include or exclude else self.all
        self.rule, self.mode_name, self.by_default = rule, mode, False
        self.anew()

    def anew(self) -> None:
        """Starts updates from the present weights, after something else has written them."""
        # Free its memory first.
        self.offsets = self.mode = None
        self.mode = MODES[self.mode_name](self.plan, self.rule)
        self.offsets = Offsets(self.mode, self._refuse_changed)
        self.records: list[UpdateRecord] = []
        self.base = self._fingerprint(self.plan.names)

    def update(self, record: UpdateRecord) -> None:
        if self.offsets.terms:
            raise BadState(
                f"update: the noise of seed {next(iter(self.offsets.terms))} is still in place; restore first"
            )
        self.offsets.follow()
        if record.generation != len(self.records):
            raise BadValue(f"update: expected generation {len(self.records)}, got {record.generation}")
        self.mode.update(record)
        self.records.append(record)

    def _refuse_changed(self) -> None:
        raise BadState(
            "the engine's weights were changed by something other than esfast (reload_weights?), which no record of "
            "updates leads to; esfast_begin() makes updates start from them"
        )

    def fingerprint(self) -> str:
        """Fingerprint of the whole model's present weights, equal to `Plan(hf_model).fingerprint()`."""
        return self._fingerprint(self.wholes)

    def _fingerprint(self, names) -> str:
        taken = set(names)
        share = sum(window_sums([e for e in self._owned if e.name in taken])) & MASK
        return f"{sum(self._gather(share)) & MASK:016x}"

    def save(self, folder: str | Path) -> None:
        """Writes the present weights as a Hugging Face folder, with journal.jsonl, the updates that led to them."""
        tensors = vllm_files.gather_wholes(self.all, self.wholes, self.places, self.first, self.group)
        error = None
        if self.group.rank_in_group == 0:
            try:
                vllm_files.save_folder(Path(folder), tensors, self.source, {"journal.jsonl": self._journal_text()})
            except Exception as e:
                # All ranks must raise it: a rank that waits for another would wait forever.
                error = e
        self._raise_first(error)

    def load(self, folder: str | Path) -> None:
        """Loads weights from a Hugging Face folder; updates then start from these."""
        if self.offsets.terms:
            raise BadState("load: a member's noise is still in place; restore first")
        error = None
        try:
            new = [piece for _, piece in vllm_files.folder_pieces(self.all, folder)]
        except Exception as e:
            error = e
        self._raise_first(error)
        for entry, piece in zip(self.all.entries, new, strict=True):
            entry.tensor.detach().copy_(piece)
        self.anew()

    def verify(self) -> None:
        """Compares this worker's weights with the model's folder. ValueError names a weight that differs."""
        for e, piece in vllm_files.folder_pieces(self.all, self.source):
            if not torch.equal(e.tensor.detach().cpu(), piece):
                raise BadValue(f"vLLM: {e.name!r} at {e.window.offset} does not hold what {self.source} has there")

    def layout(self) -> dict:
        """The model's numel, names and layout for a journal, which are those of the Hugging Face model."""
        names = list(dict.fromkeys(self.all.names))
        numel = sum(torch.Size(self.wholes[name]).numel() for name in names)
        return {"numel": numel, "layout": self.all.layout, "names": names}

    def _journal_text(self) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            header = header_of(self.rule, 0, self.mode_name, self.plan) | {"base": self.base}
            journal = Journal.create(Path(scratch) / "journal", header)
            for record in self.records:
                journal.append(record)
            return journal.path.read_text(encoding="utf-8")

    def _gather(self, value) -> list:
        """The plain values of all ranks, by rank."""
        if self.group.world_size == 1:
            return [value]
        values: list = [None] * self.group.world_size
        dist.all_gather_object(values, value, group=self.group.cpu_group)
        return values

    def _raise_first(self, error: Exception | None) -> None:
        errors = [e for e in self._gather(None if error is None else f"{type(error).__name__}: {error}") if e]
        if error is not None:
            raise error
        if errors:
            raise BadState(f"another rank of this engine failed: {errors[0]}")
