"""A vLLM plugin. It changes only engines whose workers are extended by esfast's WorkerExtension.

vLLM calls `register` in each of its processes (entry point "vllm.general_plugins" of the installed package; the
environment variable VLLM_PLUGINS, if set, must name esfast). It does what a worker can't do itself:

- It resets the engine's prefix cache after a call that changes weights, since the cache's keys and values are those of
  the old weights.
- It refuses requests for members whose weights have changed since, before they are scheduled.
- On CPUs vLLM packs the matrices of linear layers when it loads them, computes with the packed copy and drops the
  weights. The plugin keeps the weights and lets vLLM compute with them.
"""

from __future__ import annotations

registered = False


def register() -> None:
    global registered
    if registered:
        return
    from .vllm import WorkerExtension
    from .vllm_patches import patch_vllm

    patch_vllm(WorkerExtension)
    registered = True
