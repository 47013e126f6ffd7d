"""Pixel space to normalised space and back: per channel, with optional ZCA whitening.

The published learning rates are made for normalised space, and a set is useful only with
the preprocessing it was made for. Both directions are stored with every distilled set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor

_PUBLISHED_EPS = 0.1
# Below this many pixels a whitening matrix fits in any memory (64×64 grey, 37×37 colour).
MAX_DIMENSIONS = 4096


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Zca:
    """ZCA whitening of flattened images, and its inverse.

    mean: ``float32 (1, D)``, D = C · H · W. matrix, inverse: ``float32 (D, D)``, for row vectors:
    ``(x - mean) @ matrix`` whitens.
    """

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def whiten(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        return ((images.flatten(1) - self.mean) @ self.matrix).view_as(images)

    def unwhiten(self, images: Tensor) -> Tensor:
        """The inverse of ``whiten``, up to rounding."""
        return (images.flatten(1) @ self.inverse + self.mean).view_as(images)

    def to(self, device: torch.device | str) -> Zca:
        """The same on ``device``."""
        parts = (self.mean, self.matrix, self.inverse)
        mean, matrix, inverse = (part.to(device) for part in parts)
        return Zca(mean=mean, matrix=matrix, inverse=inverse)

    def describe(self) -> dict[str, Any]:
        """Size and digest of the matrices, for the record."""
        return {"dimensions": self.mean.numel(), "digest": self._digest()}

    def _digest(self) -> str:
        return digest(self.mean, self.matrix, self.inverse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Zca:
        """Itself: copies of a network share the matrices, 75 MB for colour images of 32×32."""
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Zca) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(self._digest())


def fit_zca(images: Tensor, eps: float = _PUBLISHED_EPS) -> Zca:
    """The whitening of ``images`` ``(N, C, H, W)``: kornia's, with the unbiased covariance.

    eps is added to the covariance's eigenvalues; the trajectory-matching code (Cazenavette et al.)
    uses 0.1 on pixels in [0, 1].
    """
    from kornia.enhance import zca_mean

    matrix, mean, inverse = zca_mean(images.flatten(1), eps=eps, return_inverse=True)
    assert inverse is not None
    return Zca(mean=mean.float(), matrix=matrix.float(), inverse=inverse.float())


@final
@dataclass(frozen=True)
class Preprocessing:
    """Pixel space to normalised space and back.

    mean, std: per channel, pixel units. zca: a whitening that follows them; ``None`` for none.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    zca: Zca | None = None

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixel-space images ``(N, C, H, W)`` in normalised space."""
        mean, std = self._channels(pixels)
        normalised = (pixels - mean) / std
        return normalised if self.zca is None else self.zca.whiten(normalised)

    def pixels(self, normalised: Tensor) -> Tensor:
        """The inverse of ``normalise``, up to rounding."""
        mean, std = self._channels(normalised)
        images = normalised if self.zca is None else self.zca.unwhiten(normalised)
        return images * std + mean

    def to(self, device: torch.device | str) -> Preprocessing:
        """The same on ``device``."""
        zca = None if self.zca is None else self.zca.to(device)
        return Preprocessing(self.mean, self.std, zca)

    def describe(self) -> dict[str, Any]:
        """The values that JSON can hold; a whitening by its size and digest."""
        zca = None if self.zca is None else self.zca.describe()
        return {"mean": list(self.mean), "std": list(self.std), "zca": zca}

    def _channels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (_row(each, images.dtype, images.device) for each in (self.mean, self.std))
        return mean, std


@lru_cache(maxsize=256)
def _row(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as ``(1, C, 1, 1)``, kept: each copy to a GPU would wait for it."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def digest(*tensors: Tensor) -> str:
    """Sixteen hexadecimal digits that tell tensors apart, bit for bit."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()
