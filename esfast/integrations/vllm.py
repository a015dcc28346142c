"""esfast in a vLLM worker: `LLM(..., worker_extension_cls="esfast.integrations.vllm.WorkerExtension")`.

It has the methods of es-at-scale's worker extension, with the same names and arguments, so that es-at-scale's code runs
with this one string changed. Its own further methods begin with esfast_. The noise is that of the Hugging Face model's
tensors (vllm_layout), so a Hugging Face model and vLLM at any tensor-parallel size hold the same perturbed weights to
the bit. Arguments are plain ints, floats, lists, dicts and strings.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np

from ..update.updater import Rule, UpdateRecord
from ..utils.errors import BadState

GROUP_TIMEOUT = timedelta(minutes=10)  # the longest that engines wait for each other


class WorkerExtension:
    """Methods of a vLLM worker, called through collective_rpc. An error is raised there, and no weight has changed.

    The first call checks all weights and copies them. Members are written from the copy and restored from it, so the
    same bits come back, however often. As in es-at-scale, a second perturbation adds to the first, and the same call
    with the opposite sign takes it away.
    """

    # What it finds in the worker.
    vllm_config: Any
    get_model: Callable[[], Any]
    _esfast_weights: Any

    # After these calls vLLM's cached keys and values belong to other weights.
    CHANGES_WEIGHTS = frozenset(
        {
            "perturb_self_weights",
            "restore_self_weights",
            "update_weights_from_seeds",
            "broadcast_all_weights",
            "load_weights_from_disk",
            "restore_self_initial_weights",
            "esfast_begin",
            "esfast_restore",
            "esfast_update",
        }
    )

    # ---- es-at-scale's methods --------------------------------------------------------------------------------------

    def perturb_self_weights(self, seed: int, noise_scale: float, negate: bool = False) -> bool:
        """Adds noise_scale * noise(seed); with `negate` subtracts it."""
        self._esfast.offsets.add(int(seed), -float(noise_scale) if negate else float(noise_scale))
        return True

    def restore_self_weights(self, seed: int, sigma: float) -> bool:
        """Takes sigma * noise(seed) away. If no other noise is in place, the weights have their original bits."""
        self._esfast.offsets.add(int(seed), -float(sigma))
        return True

    def update_weights_from_seeds(
        self, seeds: list[int], coeffs: list[float], alpha: float, population_size: int
    ) -> bool:
        """weights += alpha / population_size * sum_n coeffs[n] * noise(seeds[n]), in one pass."""
        weights = self._esfast
        scaled = [float(np.float32(alpha / population_size * float(c))) for c in coeffs]
        weights.update(UpdateRecord(len(weights.records), [int(s) for s in seeds], scaled, [], 0.0, float(alpha)))
        return True

    def init_inter_engine_group(self, master_address: str, master_port: int, engine_idx: int, num_engines: int) -> bool:
        """Joins the engines' store, which the first engine hosts. No weights go through it."""
        from torch.distributed import TCPStore

        keeps = engine_idx == 0 and self._esfast.group.rank_in_group == 0
        self._esfast_store = TCPStore(
            master_address, int(master_port), is_master=keeps, wait_for_workers=False, timeout=GROUP_TIMEOUT
        )
        self._esfast_engine, self._esfast_rounds = int(engine_idx), 0
        return True

    def broadcast_all_weights(self, src_rank: int) -> bool:
        """Makes this engine's weights those of engine `src_rank`, on every engine at once.

        Seeds and coefficients are sent, a few hundred bytes, and each engine applies those that it lacks. Then the
        engines compare fingerprints; RuntimeError if they differ. If every engine got all updates, only this comparison
        happens.
        """
        store, weights = getattr(self, "_esfast_store", None), self._esfast
        if store is None:
            raise BadState("broadcast_all_weights: init_inter_engine_group was not called")
        key = f"esfast/{self._esfast_rounds}"
        self._esfast_rounds += 1
        if self._esfast_engine == src_rank:
            own, records = weights.fingerprint(), [dataclasses.asdict(r) for r in weights.records]
            if weights.group.rank_in_group == 0:
                store.set(key, json.dumps({"records": records, "fingerprint": own}))
            return True
        told = json.loads(store.get(key))
        for fields in told["records"][len(weights.records) :]:
            weights.update(UpdateRecord(**fields))
        own = weights.fingerprint()
        if own != told["fingerprint"]:
            raise BadState(
                f"broadcast_all_weights: after the same {len(told['records'])} updates engine {self._esfast_engine} "
                f"has weights {own}, engine {src_rank} has {told['fingerprint']}; they did not start from one model"
            )
        return True

    def save_self_weights_to_disk(self, path: str) -> bool:
        """Writes the weights as they are, as a Hugging Face folder called `path`, and journal.jsonl beside them: the
        seeds and coefficients of all updates, from which `esfast replay` makes the weights again."""
        self._esfast.save(path)
        return True

    def load_weights_from_disk(self, path: str) -> bool:
        """Loads weights from a Hugging Face folder. ValueError if it holds another model; no weight has then
        changed."""
        self._esfast.load(path)
        return True

    def save_self_initial_weights(self) -> bool:
        """Copies the present weights to host memory, for `restore_self_initial_weights`."""
        self._esfast_initial = [t.detach().to("cpu", copy=True) for t in self._esfast.all.tensors]
        return True

    def restore_self_initial_weights(self) -> bool:
        """Restores the weights of `save_self_initial_weights`; updates then start from these. Noise in place is
        removed."""
        if not hasattr(self, "_esfast_initial"):
            raise BadState("restore_self_initial_weights: save_self_initial_weights was not called")
        for t, saved in zip(self._esfast.all.tensors, self._esfast_initial, strict=True):
            t.detach().copy_(saved)
        self._esfast.anew()
        return True

    # ---- further ones -----------------------------------------------------------------------------------------------

    def esfast_describe(self, verify: bool = False) -> dict:
        """numel, layout and number of tensors of the Hugging Face model. With `verify` all weights are compared with
        the model's folder first: ValueError names one that differs."""
        weights = self._esfast_looked_at
        if verify:
            weights.verify()
        return weights.layout()

    def esfast_begin(self, rule: dict | None = None, weights: str = "base", include=None, exclude=None) -> bool:
        """Chooses how weights are changed, instead of the defaults of the first call. Updates start from the present
        weights; noise in place is taken away.

        Args:
            rule: noise, rounding, optimizer and decay, as `esfast.update.Rule.to_json` gives them.
            weights: "base", "master", "host" or "inplace", as in `esfast.ES`.
            include, exclude: glob patterns of Hugging Face names, as in `esfast.Plan`.
        """
        changed_by = Rule() if rule is None else Rule.from_json(rule)
        self._esfast_looked_at.begin(changed_by, weights, include, exclude)
        return True

    def esfast_restore(self) -> None:
        """Takes away all noise that is in place."""
        self._esfast.offsets.clear()

    def esfast_update(self, record: dict) -> None:
        """Applies a generation, which must be the next one: the record of `ES.step` as a dict."""
        self._esfast.update(UpdateRecord(**record))

    def esfast_fingerprint(self) -> str:
        """Fingerprint of the whole model, for every sharding. It equals `esfast.Plan(hf_model).fingerprint()`."""
        return self._esfast.fingerprint()

    # ---- not called from outside ------------------------------------------------------------------------------------

    @property
    def _esfast(self):
        weights = self._esfast_looked_at
        if weights.mode is None:
            self.esfast_begin()
        return weights

    @property
    def _esfast_looked_at(self):
        if hasattr(self, "_esfast_weights"):
            return self._esfast_weights
        from vllm.distributed import get_tp_group

        from . import vllm_plugin
        from .vllm_weights import WorkerWeights

        if not vllm_plugin.registered:
            raise BadState(
                "esfast's vLLM plugin is not loaded, so nobody would reset the prefix cache: install esfast where vLLM "
                "runs (pip install), and name esfast in VLLM_PLUGINS if that is set"
            )
        model = self.vllm_config.model_config
        self._esfast_weights = WorkerWeights(self.get_model(), model.hf_config, model.model, get_tp_group())
        return self._esfast_weights
