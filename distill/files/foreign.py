"""The safe import of other projects' distilled sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..preprocessing import Preprocessing
from ..types import Batch, DistilledSet, Recipe
from .artifact import check_set
from .safe import TENSORS_CAP, fault, read_foreign


def import_pt(
    path: Path, *, preprocessing: Preprocessing, classes: Sequence[str]
) -> list[DistilledSet]:
    """The distilled sets in a ``.pt`` file of another project, without running code of the file.

    path: DatasetCondensation's and baadd's ``{'data': [[images, labels], ...], ...}``, a pair
    ``[images, labels]``, or ``{'images': ..., 'labels': ...}``; images ``(N, C, H, W)`` floats
    in the normalised space of ``preprocessing``, labels ``(N,)`` integers or soft
    ``(N, classes)``. Returns pixel-space sets with the default recipe and that preprocessing.

    Raises RequestError: "refused unread" where the pickle names anything but tensors and numpy
    scalars; unreadable, truncated, too large; another structure; a set that is not valid.
    """
    sets, space = [], preprocessing
    for images, labels in _pairs(path, read_foreign(path)):
        if not images.is_floating_point():
            raise fault(path, f"images are {images.dtype}, expected normalised floats")
        if images.ndim != 4 or {len(space.mean), len(space.std)} != {images.shape[1]}:
            given = f"{len(space.mean)} means and {len(space.std)} deviations"
            raise fault(path, f"images have the shape {tuple(images.shape)}, given {given}")
        batch = Batch(
            images=space.pixels(images.float()).contiguous(),
            labels=(labels.float() if labels.is_floating_point() else labels.long()).contiguous(),
        )
        recipe = Recipe(preprocessing=space)
        distilled = DistilledSet(batch=batch, classes=tuple(classes), recipe=recipe)
        check_set(path, distilled)
        sets.append(distilled)
    return sets


def _pairs(path: Path, value: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(value, dict) and "data" in value:
        found = value["data"]
    elif isinstance(value, dict) and {"images", "labels"} <= set(value):
        found = [[value["images"], value["labels"]]]
    else:
        found = [value]
    entries = found if isinstance(found, (list, tuple)) else []
    pairs = [tuple(entry) for entry in entries if isinstance(entry, (list, tuple))]
    if not pairs or len(pairs) != len(entries) or not all(map(_is_pair, pairs)):
        forms = "'data': [[images, labels], ...], a pair of tensors, or 'images' and 'labels'"
        raise fault(path, f"holds no distilled set: expected {forms}")
    return [(images.detach(), labels.detach()) for images, labels in pairs]


def _is_pair(pair: tuple[Any, ...]) -> bool:
    """Two dense CPU tensors whose elements all have a place in the file's size cap.

    A stride of 0 makes a terabyte out of one number: the cap holds for the elements.
    """
    return len(pair) == 2 and all(
        isinstance(part, Tensor)
        and part.layout == torch.strided
        and part.device.type == "cpu"
        and not part.is_quantized
        and not part.is_complex()
        and part.numel() * 8 <= TENSORS_CAP
        for part in pair
    )
