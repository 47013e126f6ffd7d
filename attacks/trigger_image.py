"""A trigger from an image file of the user: the option, and its safe reading."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from ..distill.files.safe import check_file, fault
from ..distill.types import RequestError

if TYPE_CHECKING:
    from PIL import Image

_LARGEST_FILE: Final = 16 * 2**20
_LARGEST_SIDE: Final = 4096
_WITH_DIGEST: Final = re.compile(r"(.+)@([0-9a-f]{16})", re.DOTALL)


class TriggerImageOptions(BaseModel):
    """The option of attacks whose fixed trigger may be an image file."""

    trigger_image: str | None = Field(
        None,
        min_length=1,
        description="PNG or JPEG file that is the trigger, resized to it; recorded as "
        "FILE@DIGEST, by its content",
    )

    @field_validator("trigger_image")
    @classmethod
    def _add_digest(cls, value: str | None) -> str | None:
        """Another content is another configuration. A value that has its digest is not read."""
        if value is None or _WITH_DIGEST.fullmatch(value):
            return value
        content = _read(Path(value))
        _decode(Path(value), content)  # a file that is no image fails here, before any work
        return f"{value}@{_digest(content)}"

    def image(self, shape: tuple[int, int, int]) -> Tensor | None:
        """The image in [0, 1], resized to ``shape`` (C, H, W), grey or in colour as C says.

        ``None`` where no file was given. Errors: ``RequestError`` where the file is missing, has
        changed since the configuration was made, or is no image that can be used.
        """
        found = _WITH_DIGEST.fullmatch(self.trigger_image or "")
        if found is None:
            return None
        path, known = Path(found[1]), found[2]
        content = _read(path)
        if _digest(content) != known:
            raise fault(path, f"has changed: its digest is {_digest(content)}, recorded is {known}")
        return _as_tensor(_decode(path, content), shape)


def _read(path: Path) -> bytes:
    check_file(path, _LARGEST_FILE)
    try:
        return path.read_bytes()
    except OSError as error:
        raise fault(path, f"cannot be read: {error.strerror}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _decode(path: Path, content: bytes) -> Image.Image:
    """The image, upright, as ``L`` or ``RGB``.

    Errors: ``RequestError`` for another format, a side over 4096 pixels, more than 8 bits a
    channel, transparency, and a damaged file.
    """
    from PIL import Image, ImageOps  # takes a while to import

    try:
        opened = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        if max(opened.size) > _LARGEST_SIDE:  # before its pixels take memory
            size = "×".join(map(str, opened.size))
            raise fault(path, f"{size} pixels, at most {_LARGEST_SIDE} a side are read")
        if opened.mode not in ("1", "L", "P", "RGB", "CMYK", "LA", "RGBA"):
            raise fault(path, f"mode {opened.mode}: only images of 8 bits a channel are read")
        image = ImageOps.exif_transpose(opened)
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.tobytes().strip(b"\xff"):
            raise fault(path, "is transparent in places: put it on a background first")
        return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except RequestError:
        raise
    except Exception:  # Pillow's plugins raise errors of any type
        raise fault(path, "not a readable PNG or JPEG image") from None


def _as_tensor(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """``float32`` of that shape (C, H, W), antialiased; one channel repeats where it must."""
    from PIL.Image import Resampling

    channels, height, width = shape
    fitting = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(fitting.resize((width, height), Resampling.BILINEAR), dtype=np.float32)
    values = torch.from_numpy(pixels.reshape(height, width, -1) / 255).permute(2, 0, 1)
    return values.contiguous() if len(values) == channels else values[:1].repeat(channels, 1, 1)
