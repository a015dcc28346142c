"""All that esfast replaces in vLLM, whose public functions don't reach it. Each Patch says what and why.

`PATCHES` names every function of vLLM that is replaced or relied on, with a digest of its source by version: 0.32 is
tested; of 0.30 and 0.31 most were read, and none was run. `make test-vllm` fails if the installed
version's source is another one: read what has changed, adapt, and add the digest.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..utils.errors import BadState
from .vllm_cpu_slots import CpuSlots

# How the names and paths of esfast's adapters begin. vLLM's prefix cache is keyed by them, so none is used twice.
PREFIX = "esfast-member-"


class Patch(NamedTuple):
    """target: "module:function" of vLLM. digests: of its source, by version of vLLM."""

    target: str
    why: str
    digests: dict[str, str]

    def digest(self) -> str:
        """The digest of the installed version's source, before it was replaced."""
        function = inspect.unwrap(pkgutil.resolve_name(self.target))
        return hashlib.sha256(textwrap.dedent(inspect.getsource(function)).encode()).hexdigest()[:16]


PATCHES: list[Patch] = [
    Patch(
        "vllm.v1.engine.core:EngineCore.collective_rpc",
        "resets the prefix cache; notes members",
        {"0.30.0": "56c0811fbd555964", "0.31.0": "56c0811fbd555964", "0.32.0": "56c0811fbd555964"},
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore.preprocess_add_request",
        "refuses members of the past",
        {"0.30.0": "e3a96663563dcf93", "0.31.0": "e3a96663563dcf93", "0.32.0": "e3a96663563dcf93"},
    ),
    Patch(
        "vllm.v1.engine.llm_engine:LLMEngine.collective_rpc",
        "notes members",
        {"0.30.0": "bf553abda3f00f0b", "0.31.0": "bf553abda3f00f0b", "0.32.0": "bf553abda3f00f0b"},
    ),
    Patch(
        "vllm.v1.engine.llm_engine:LLMEngine.add_request",
        "refuses members of the past",
        {"0.30.0": "126e267ae501c819", "0.31.0": "4a46389bc954f864", "0.32.0": "3db15e318e3be8ad"},
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        "cached keys know members by name and path",
        {"0.30.0": "75285033f18510be", "0.31.0": "4f67791285cae1c3", "0.32.0": "4f67791285cae1c3"},
    ),
    Patch(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        "CPU layers keep their weights",
        {"0.30.0": "a98204a3d07fcbd6", "0.31.0": "d41e9cf4aa576bf1", "0.32.0": "2ba18ce6108799da"},
    ),
    Patch(
        "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        "members are no files",
        {"0.30.0": "e3cde0994812895d", "0.31.0": "f5c098dfb73a44bd", "0.32.0": "650629aa015e307c"},
    ),
    Patch(
        "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter",
        "calls what draw_adapters replaces",
        {"0.30.0": "446cab32cdd48f58", "0.31.0": "446cab32cdd48f58", "0.32.0": "446cab32cdd48f58"},
    ),
    Patch(
        "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters",
        "quadratic in the adapters",
        {"0.30.0": "94cd7806d0160e73", "0.31.0": "94cd7806d0160e73", "0.32.0": "94cd7806d0160e73"},
    ),
    Patch(
        "vllm.lora.model_manager:LoRAModelManager._add_adapter",
        "members have nothing to merge",
        {"0.30.0": "54352d3cd3e24baa", "0.31.0": "54352d3cd3e24baa", "0.32.0": "8f29b1af36bfeb38"},
    ),
    Patch(
        "vllm.lora.model_manager:LoRAModelManager.activate_adapter",
        "members are drawn into the slot",
        {"0.30.0": "7e58dcf824c18880", "0.31.0": "de83d987e3b2bab0", "0.32.0": "de83d987e3b2bab0"},
    ),
    Patch(
        "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter",
        "chooses the slot",
        {"0.30.0": "3601a6eceb7209dc", "0.31.0": "3601a6eceb7209dc", "0.32.0": "3601a6eceb7209dc"},
    ),
    *(
        Patch(f"vllm.lora.punica_wrapper.{of}", "CPU slots cost less; without one: the base", {"0.32.0": digest})
        for of, digest in (
            ("punica_base:PunicaWrapperBase.update_metadata", "86f04c6554c626f1"),
            ("punica_cpu:PunicaWrapperCPU._shrink_prefill", "930e92633b0945a8"),
            ("punica_cpu:PunicaWrapperCPU._expand_prefill", "c22904c1d974986b"),
            ("punica_cpu:PunicaWrapperCPU._expand_slice_prefill", "a1004e162218ca68"),
            ("punica_cpu:PunicaWrapperCPU.add_lora_logits", "3b92417da6382f86"),
        )
    ),
]


def patch_vllm(extension: type) -> None:
    """Replaces functions in this process, for engines whose workers `extension` (WorkerExtension) extends; others are
    as before."""
    from vllm.model_executor.layers import utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine

    core: Any = EngineCore
    front: Any = LLMEngine
    core.collective_rpc = _noting_members(_resetting(core.collective_rpc, extension), extension)
    core.preprocess_add_request = _of_members(core.preprocess_add_request, lambda request: request.lora_request)
    front.collective_rpc = _noting_members(front.collective_rpc, extension)
    front.add_request = _of_members(front.add_request, lambda *a, lora_request=None, **k: lora_request)
    utils.dispatch_cpu_unquantized_gemm = _unpacked(utils.dispatch_cpu_unquantized_gemm, extension)


def _extended(vllm_config, extension: type) -> bool:
    name = vllm_config.parallel_config.worker_extension_cls
    return bool(name) and issubclass(pkgutil.resolve_name(name), extension)


def _resetting(original, extension):
    """Resets the prefix cache before a call that changes weights; nothing is computed in between. Refuses the call
    while there are requests: they would mix keys of two weights, or wait for members that are gone."""

    @functools.wraps(original)
    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        if method in extension.CHANGES_WEIGHTS and _extended(self.vllm_config, extension):
            if self.scheduler.has_unfinished_requests() or not self.reset_prefix_cache():
                raise BadState(
                    f"{method}: requests are not finished, which began with the weights as they are; wait for them, or "
                    "abort them (llm_engine.abort_request), before weights change. None has changed"
                )
        return original(self, method, timeout, args, kwargs)

    return collective_rpc


def _noting_members(original, extension):
    """Notes which members there are: those that esfast_members gave since the weights last changed."""

    @functools.wraps(original)
    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        if method in extension.CHANGES_WEIGHTS:
            self._esfast_members = {}
        answers = original(self, method, timeout, args, kwargs)
        if method == "esfast_members":
            known = self.__dict__.setdefault("_esfast_members", {})
            known.update((adapter["lora_int_id"], adapter["lora_name"]) for adapter in answers[0])
        return answers

    return collective_rpc


def _of_members(original, lora_of: Callable[..., Any]):
    """Refuses requests for members that there are no longer: at the door, since in a worker the error would end the
    engine. `lora_of` takes the arguments and returns the LoRARequest."""

    @functools.wraps(original)
    def add(self, *args, **kwargs):
        asked = lora_of(*args, **kwargs)
        if asked is not None:
            name = self.__dict__.get("_esfast_members", {}).get(asked.lora_int_id)
            ours = asked.lora_path.startswith(PREFIX)
            if name != (asked.lora_name if ours else None):
                raise BadState(unknown(asked.lora_name) if ours else number_taken(asked))
        return original(self, *args, **kwargs)

    return add


def unknown(name: str) -> str:
    return (
        f"{name!r} is no member of now: the weights have changed since, or esfast_members did not give it; ask "
        "esfast_members for the members of this generation"
    )


def number_taken(request) -> str:
    return (
        f"{request.lora_name!r}: lora_int_id {request.lora_int_id} is that of a member, which would answer; give your "
        "adapter another number"
    )


def _unpacked(original, extension):
    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        import torch
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is not None and _extended(config, extension):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            original(layer, remove_weight)

    return dispatch_cpu_unquantized_gemm


def draw_adapters(manager, members: Mapping[int, Any], write: Callable[[int, int], None]) -> None:
    """Makes a worker's LoRA manager draw members into its slots. Adapters of other kinds are loaded as before.

    Args:
        manager: the LRUCacheWorkerLoRAManager of one worker; only this object is changed.
        members: by number, the adapters that there are; each has a `name` and a `rank`.
        write: called with a slot and the number of the member that it is to hold.
    """
    from vllm.lora.lora_model import LoRAModel

    adapters = manager._adapter_manager
    load, add, activate, apply = (
        manager._load_adapter,
        adapters._add_adapter,
        adapters.activate_adapter,
        manager._apply_adapters,
    )

    def load_adapter(request):
        if not request.lora_path.startswith(PREFIX):
            return load(request)
        number = request.lora_int_id
        if number not in members or members[number].name != request.lora_name:
            raise BadState(unknown(request.lora_name))
        return LoRAModel(number, members[number].rank, {})

    def add_adapter(adapter):
        if adapter.id not in members:
            return add(adapter)
        # Without weights there is nothing to merge.
        adapters._registered_adapters[adapter.id] = adapter

    def activate_adapter(number):
        # vLLM chooses a slot, and clears it.
        taken = activate(number)
        if taken and number in members:
            try:
                write(adapters.lora_index_to_id.index(number), number)
            except BaseException:
                # The slot holds a part of the member, or none of it.
                adapters.remove_adapter(number)
                raise
        return taken

    def apply_adapters(requests):
        # vLLM goes over all adapters for each adapter of a batch. If all are in their slots, it has nothing to do.
        numbers = {request.lora_int_id for request in requests if request}
        if not all(number in adapters._active_adapters for number in numbers):
            return apply(requests)
        for number in numbers:
            adapters._registered_adapters.touch(number)
            adapters._active_adapters.touch(number)

    for wrapper in adapters.punica_wrapper_mapping.values():
        if type(wrapper).__name__ == "PunicaWrapperCPU":
            CpuSlots(wrapper)
    manager._load_adapter, manager._apply_adapters = load_adapter, apply_adapters
    adapters._add_adapter, adapters.activate_adapter = add_adapter, activate_adapter
