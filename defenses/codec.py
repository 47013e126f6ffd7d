"""A real JPEG codec for batches of images in pixel space."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """``images`` (N, C, H, W), grey or colour, out of JPEG files of ``quality`` 1 to 100.

    Pixels are clipped to [0, 1] and rounded to 8 bits first. The codec runs on the CPU: images on a
    GPU are carried there and back.
    """
    bytes_ = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    mode = _MODES[images.shape[1]]
    decoded = [decode_jpeg(encode_jpeg(image, quality), mode) for image in bytes_]
    return torch.stack(decoded).to(images.device, images.dtype) / 255
