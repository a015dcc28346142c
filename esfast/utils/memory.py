"""How much memory a device has."""

from __future__ import annotations

import os

import torch


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory; for a CPU, of the machine's.

    All of it, not what is free at the moment: what is chosen by it must be the same in the same run on the same
    machine.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
