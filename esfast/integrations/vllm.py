"""esfast in a vLLM worker: `LLM(..., worker_extension_cls="esfast.integrations.vllm.WorkerExtension")`.

It has the methods of es-at-scale's worker extension, with the same names and arguments, so that es-at-scale's code runs
with this one string changed. Its own further methods begin with esfast_. The noise is that of the Hugging Face model's
tensors (vllm_layout), so a Hugging Face model and vLLM at any tensor-parallel size hold the same perturbed weights to
the bit. Arguments are plain ints, floats, lists, dicts and strings.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np

from ..update.updater import Rule, UpdateRecord
from ..utils.errors import BadState

GROUP_TIMEOUT = timedelta(minutes=10)  # the longest that engines wait for each other


def _changes_weights(method):
    """A method after which vLLM's cached keys and values, and the members in LoRA slots, belong to other weights."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        if hasattr(self, "_esfast_adapters"):
            self._esfast_adapters.forget()
        return method(self, *args, **kwargs)

    marked: Any = call
    marked.changes_weights = True
    return marked


class WorkerExtension:
    """Methods of a vLLM worker, called through collective_rpc. An error is raised there, and no weight has changed.

    The first call checks all weights and copies them. Members are written from the copy and restored from it, so the
    same bits come back, however often. As in es-at-scale, a second perturbation adds to the first, and the same call
    with the opposite sign takes it away.
    """

    # What it finds in the worker.
    vllm_config: Any
    get_model: Callable[[], Any]
    model_runner: Any
    _esfast_weights: Any
    _esfast_adapters: Any

    # ---- es-at-scale's methods --------------------------------------------------------------------------------------

    @_changes_weights
    def perturb_self_weights(self, seed: int, noise_scale: float, negate: bool = False) -> bool:
        """Adds noise_scale * noise(seed); with `negate` subtracts it."""
        self._esfast.offsets.add(int(seed), -float(noise_scale) if negate else float(noise_scale))
        return True

    @_changes_weights
    def restore_self_weights(self, seed: int, sigma: float) -> bool:
        """Takes sigma * noise(seed) away. If no other noise is in place, the weights have their original bits."""
        self._esfast.offsets.add(int(seed), -float(sigma))
        return True

    @_changes_weights
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

    @_changes_weights
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

    @_changes_weights
    def load_weights_from_disk(self, path: str) -> bool:
        """Loads weights from a Hugging Face folder. ValueError if it holds another model; no weight has then
        changed."""
        self._esfast.load(path)
        return True

    def save_self_initial_weights(self) -> bool:
        """Copies the present weights to host memory, for `restore_self_initial_weights`."""
        self._esfast_initial = [t.detach().to("cpu", copy=True) for t in self._esfast.all.tensors]
        return True

    @_changes_weights
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

    @_changes_weights
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

    @_changes_weights
    def esfast_restore(self) -> None:
        """Takes away all noise that is in place."""
        self._esfast.offsets.clear()

    @_changes_weights
    def esfast_update(self, record: dict) -> None:
        """Applies a generation, which must be the next one: the record of `ES.step` as a dict."""
        self._esfast.update(UpdateRecord(**record))

    def esfast_fingerprint(self) -> str:
        """Fingerprint of the whole model, for every sharding. It equals `esfast.Plan(hf_model).fingerprint()`."""
        return self._esfast.fingerprint()

    # ---- members as LoRA adapters -----------------------------------------------------------------------------------

    def esfast_adapters(self) -> dict:
        """What the engine's LoRA slots hold: `slots` and `rank`, its max_loras and max_lora_rank, and `frozen`, groups
        as texts that freeze the tensors which slots do not carry. RuntimeError if it was started without enable_lora.
        """
        return self._esfast_members_of.describe()

    def esfast_members(self, seeds: list[int], sigmas: list[float], rank: int | None = None) -> list[dict]:
        """Members as LoRA adapters: the j-th is weights + sigmas[j] * noise(seeds[j]), with noise="low_rank". A sigma
        of 0 gives the weights as they are.

        Returns for each the fields of its vllm.lora.request.LoRARequest. The adapters are drawn on each worker when
        requests need them, and end when weights change. There may be more of them than slots (max_loras).

        The first call chooses the rule of updates, if esfast_begin was not called: low-rank noise of this rank, default
        1, with what slots do not carry (norms, biases, some embeddings) frozen.

        Raises:
            RuntimeError: no enable_lora, or the noise of perturb_self_weights is in place.
            ValueError: the rank exceeds max_lora_rank, or the rule has other noise, or moves tensors that slots do not
                carry.
        """
        return self._esfast_members_of.add(seeds, sigmas, rank)

    # ---- not called from outside ------------------------------------------------------------------------------------

    @property
    def _esfast(self):
        weights = self._esfast_looked_at
        if weights.mode is None:
            weights.begin(Rule())
            # Until the first update, esfast_members may choose another rule.
            weights.by_default = True
        return weights

    @property
    def _esfast_members_of(self):
        if not hasattr(self, "_esfast_adapters"):
            from .vllm_members import Members

            manager = getattr(self.model_runner, "lora_manager", None)
            self._esfast_adapters = Members(manager, self.get_model(), self._esfast_looked_at, self.vllm_config)
        return self._esfast_adapters

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
        if getattr(self.vllm_config, "kv_transfer_config", None) is not None:
            raise BadState(
                "the engine keeps keys and values elsewhere, too (kv_transfer_config), where those of other weights "
                "would stay: start it without"
            )
        model = self.vllm_config.model_config
        self._esfast_weights = WorkerWeights(self.get_model(), model.hf_config, model.model, get_tp_group())
        return self._esfast_weights

    # The plugin resets the prefix cache after these calls.
    CHANGES_WEIGHTS = frozenset(name for name, value in vars().items() if hasattr(value, "changes_weights"))
