"""How much an operation may hold at once beside its inputs: constants, so that memory follows neither prompts nor load."""

import torch

__all__ = ["allowance"]

_GPU = 16
"""A GPU has that much more to spare than a server's share of the host's memory, and pays for every launch."""


def allowance(device: torch.device, on_cpu: int) -> int:
    """Bytes for one operation's intermediate results on a device; `on_cpu` bytes on the CPU."""
    return on_cpu if device.type == "cpu" else on_cpu * _GPU
