"""What a file of another project holds, before it is known what its pixel values mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from ..artifact import pixel_range
from ..pickled import StoredTensor
from ..safe import check_built, fault

COPIES: Final = 3
"""Pixels are made from stored images with two copies in between."""

LARGEST_SIDE: Final = 4096
_LARGEST_RATE: Final = 1000.0
_COLOURS: Final = (1, 3)
_SUM_TOLERANCE: Final = 0.01
"""How far the sum of a row of soft labels may lie from 1; half precision needs some."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StoredSet:
    """A distilled set as its files hold it.

    images: ``(N, C, H, W)``, ``uint8`` or ``float32``, values as stored, finite. labels:
    ``int64 (N,)``, or ``float32 (N, classes)`` probabilities; ``None`` where the files hold none.
    classes: the names of the classes where the files hold them. rate: a learned learning rate for
    training on it. files: all that was read. notes: what of the files was assumed, changed or left
    out; a sentence each.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...] | None = None
    rate: float | None = None
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def with_labels(self, labels: Tensor, files: Sequence[Path], *notes: str) -> StoredSet:
        """The same with other labels, read from ``files``, and further notes."""
        return dataclasses.replace(
            self, labels=labels, files=(*self.files, *files), notes=(*self.notes, *notes)
        )


@final
@dataclass(frozen=True, kw_only=True)
class Format:
    """A format in which distilled sets are published.

    description: for people. matches: whether a path has it, by structure; cheap, and false for
    what it cannot read. read: the set, from a path and the number of the set in it (``None``: the
    first).
    """

    description: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, int | None], StoredSet]


def received(
    path: Path,
    images: Tensor,
    labels: Tensor | None,
    *,
    files: Sequence[Path] = (),
    classes: Sequence[str] | None = None,
    rate: float | None = None,
    notes: Sequence[str] = (),
) -> StoredSet:
    """A set from the tensors that ``path`` holds, checked.

    images: ``(N, C, H, W)`` or ``(N, H, W, C)`` with 1 or 3 channels, numbers of any type.
    labels: as for ``checked_labels``, or ``None``.
    Raises RequestError: other shapes, NaN or infinity, no images, rows of labels that are neither
    probabilities nor logits.
    """
    images, moved = _channels_first(path, images)
    softened: list[str] = []
    if labels is not None:
        labels, softened = checked_labels(path, labels, len(images))
    return StoredSet(
        images=images,
        labels=labels,
        classes=None if classes is None else tuple(classes),
        rate=rate,
        files=tuple(files) or (path,),
        notes=(*notes, *moved, *softened),
    )


def labels_in_order(path: Path, count: int, classes: int) -> Tensor:
    """Labels for ``count`` images of ``classes`` classes, as many of each, in their order.

    All published distillers store sets so. Raises RequestError where the numbers don't divide.
    """
    if count % classes:
        raise fault(path, f"has no labels, and its {count} images are no multiple of {classes}")
    return torch.arange(classes).repeat_interleave(count // classes)


def load_stored(path: Path, stored: StoredTensor) -> Tensor:
    """The tensor's values.

    Raises RequestError naming ``path``: they take too much memory, or cannot be read.
    """
    check_built(path, 2 * stored.storage.count * stored.dtype.itemsize)
    try:
        return stored.load()
    except Exception as error:  # zip, zlib and short files share no base class
        raise fault(path, f"a tensor cannot be read: {error!s:.150}") from None


def check_stored(path: Path, images: StoredTensor, *labels: StoredTensor) -> None:
    """Refuse images and labels that take too much memory to read, before any is read."""
    size = sum(2 * each.storage.count * each.dtype.itemsize for each in (images, *labels))
    size += images.count * (images.dtype.itemsize + COPIES * torch.float32.itemsize)
    size += sum(each.count * (each.dtype.itemsize + torch.int64.itemsize) for each in labels)
    check_built(path, size)


def checked_rate(path: Path, rate: float) -> float:
    """A learned learning rate. Raises RequestError for one that no training can use."""
    if not 0 < rate <= _LARGEST_RATE:
        have = f"holds the learning rate {rate:.3g}"
        raise fault(path, f"{have}, expected more than 0, at most {_LARGEST_RATE:g}")
    return rate


def _channels_first(path: Path, images: Tensor) -> tuple[Tensor, list[str]]:
    """The images as ``uint8`` or ``float32`` NCHW, and a note if they were not."""
    if images.ndim != 4 or not images.numel() or max(images.shape[1:]) > LARGEST_SIDE:
        limits = f"expected (N, C, H, W), none 0, sides up to {LARGEST_SIDE}"
        raise fault(path, f"images have the shape {tuple(images.shape)}, {limits}")
    notes = []
    if images.shape[1] > max(_COLOURS) and images.shape[3] in _COLOURS:
        images = images.permute(0, 3, 1, 2)
        notes.append("its channels are in the last place: moved to the front")
    images = images.contiguous() if images.dtype == torch.uint8 else images.float().contiguous()
    if not all(map(math.isfinite, pixel_range(images))):
        raise fault(path, "images hold NaN or infinite values")
    return images, notes


def checked_labels(path: Path, labels: Tensor, count: int) -> tuple[Tensor, list[str]]:
    """Hard labels ``int64 (N,)`` or soft ones ``float32 (N, classes)``; a note if they changed.

    labels: class numbers ``(N,)`` of any type, or ``(N, classes)`` probabilities or logits.
    Raises RequestError: another shape, NaN, fractions, rows that are neither of the two.
    """
    if labels.shape[:1] != (count,) or labels.ndim not in (1, 2):
        have = f"labels have the shape {tuple(labels.shape)}"
        raise fault(path, f"{have}, expected ({count},) or ({count}, classes)")
    if labels.ndim == 1:
        hard = labels.long()
        if labels.is_floating_point() and not torch.equal(hard.to(labels.dtype), labels):
            raise fault(path, "labels hold NaN or fractions, expected class numbers")
        return hard, []
    soft = labels.float()
    if not soft.numel() or not all(map(math.isfinite, pixel_range(soft))):
        raise fault(path, "labels hold NaN or infinite values")
    if _are_distributions(soft):
        return soft.contiguous(), []
    _refuse_other_than_logits(path, soft)
    return soft.softmax(dim=1), ["its soft labels are logits: a softmax makes them probabilities"]


def _are_distributions(labels: Tensor) -> bool:
    """Whether every row of ``labels`` is a probability distribution."""
    return bool((labels >= 0).all() and ((labels.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE).all())


def _refuse_other_than_logits(path: Path, labels: Tensor) -> None:
    """Refuse rows that are no distributions, and that need not be logits either.

    Logits have negative values, and values that no probability comes near. Learned probabilities
    that left [0, 1] a little, and one-hot labels that were centred or scaled, are none.
    """
    (low, high), sums = pixel_range(labels), labels.sum(dim=1)
    if low < 0 and (low < -1 or high > 2):
        return
    raise fault(
        path,
        f"soft labels run from {low:.3g} to {high:.3g}, and their rows sum to {sums.min():.3g} to "
        f"{sums.max():.3g}: neither probabilities, which sum to 1, nor logits",
    )


def refuse_other_number(path: Path, number: int | None, sets: int = 1) -> None:
    """Refuse a ``number`` that none of the ``sets`` in ``path`` has; they count from 0."""
    if number is not None and not 0 <= number < sets:
        held = "one set" if sets == 1 else f"{sets} sets, numbered from 0"
        raise fault(path, f"holds {held}: there is no set {number}")
