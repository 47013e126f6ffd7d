"""A real JPEG codec for batches of images in pixel space."""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """``images`` (N, C, H, W), grey or colour, compressed as JPEG of ``quality`` 1 to 100.

    Pixels are clipped to [0, 1] and rounded to 8 bits first. The codec (Pillow's) runs on the CPU;
    images on a GPU are copied there and back.
    """
    whole = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    decoded = torch.stack([_through_file(image, quality) for image in whole])
    return decoded.to(images.device, images.dtype) / 255


def _through_file(image: Tensor, quality: int) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    file = BytesIO()
    to_pil_image(image).save(file, "JPEG", quality=quality)
    file.seek(0)
    with Image.open(file) as loaded:
        found: Tensor = pil_to_tensor(loaded)
    return found
