"""Tensors made on the CPU, moved to where the work is done."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the CPU does not wait for a GPU to have it.

    A copy from ordinary memory would wait until the GPU has done all that it was given before.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
