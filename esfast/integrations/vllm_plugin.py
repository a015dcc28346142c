"""A vLLM plugin. It changes only engines whose workers are extended by esfast's WorkerExtension.

vLLM calls `register` in each of its processes (entry point "vllm.general_plugins" of the installed package; the
environment variable VLLM_PLUGINS, if set, must name esfast). It does two things that a worker can't do itself:

- It resets the engine's prefix cache after a call that changes weights, since the cache's keys and values are those of
  the old weights.
- On CPUs vLLM packs the matrices of linear layers when it loads them, computes with the packed copy and drops the
  weights. The plugin keeps the weights and lets vLLM compute with them.
"""

from __future__ import annotations

import functools
import pkgutil

from ..utils.errors import BadState

registered = False


def register() -> None:
    global registered
    if registered:
        return
    from vllm.model_executor.layers import utils
    from vllm.v1.engine.core import EngineCore

    EngineCore.collective_rpc = _then_reset(EngineCore.collective_rpc)
    utils.dispatch_cpu_unquantized_gemm = _unpacked(utils.dispatch_cpu_unquantized_gemm)
    registered = True


def _extended(vllm_config) -> bool:
    from .vllm import WorkerExtension

    name = vllm_config.parallel_config.worker_extension_cls
    return bool(name) and issubclass(pkgutil.resolve_name(name), WorkerExtension)


def _then_reset(original):
    from .vllm import WorkerExtension

    @functools.wraps(original)
    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        changes = method in WorkerExtension.CHANGES_WEIGHTS and _extended(self.vllm_config)
        try:
            return original(self, method, timeout, args, kwargs)
        finally:
            # Also after an error, which may have left other weights.
            if changes and not self.reset_prefix_cache():
                raise BadState(
                    f"{method}: requests are running, with keys and values of the weights of before; wait for them, or "
                    "abort them, before weights change"
                )

    return collective_rpc


def _unpacked(original):
    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        import torch
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is not None and _extended(config):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            original(layer, remove_weight)

    return dispatch_cpu_unquantized_gemm
