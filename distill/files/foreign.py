"""The safe import of other projects' distilled sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from ..preprocessing import Preprocessing
from ..types import Batch, DistilledSet, Recipe
from .artifact import check_set, pixel_range
from .pickled import StoredTensor
from .safe import check_built, fault
from .torch_file import read_foreign

_SETS_CAP: Final = 1000

_COPIES: Final = 3
"""Pixels are made from normalised images with two copies in between."""

_FARTHEST_MEAN: Final = 1.0
"""How far the average of all pixels may lie outside [0, 1]."""

_ROUNDING: Final = 1 / 510
"""How far pixels may leave [0, 1] by rounding: half a step of 8 bits."""

_SUM_TOLERANCE: Final = 0.01
"""How far the sum of a row of soft labels may lie from 1; half precision needs some."""

_MEASURED: Final = {"accs_all_exps"}
"""Keys that hold what others measured on their sets, and no part of a set."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignSet:
    """A distilled set from another project's file.

    warnings: what of the file was left out, what its values were taken for, and what makes that
    doubtful; a sentence each.
    """

    distilled: DistilledSet
    warnings: tuple[str, ...]


def import_pt(
    path: Path,
    *,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    number: int | None = None,
) -> ForeignSet:
    """A distilled set in a ``.pt`` file of another project, without running code of the file.

    path: DatasetCondensation's and baadd's ``{'data': [[images, labels], ...], ...}``, a pair
    ``[images, labels]``, or ``{'images': ..., 'labels': ...}``; images ``(N, C, H, W)`` floats
    in the normalised space of ``preprocessing``, labels ``(N,)`` integers or soft
    ``(N, classes)``: probabilities, or logits, which get a softmax. number: which of the file's
    sets, from 0; ``None``: the first. Returns a pixel-space set with the default recipe and that
    preprocessing.

    Raises RequestError: "refused unread" where the pickle names anything but plain tensors and
    numpy scalars; unreadable, truncated, too large, also in memory; another structure; no set of
    that number; a set that is not valid; pixels on another scale; soft labels that are neither
    probabilities nor logits.
    """
    value = read_foreign(path)
    pairs = _pairs(path, value)
    if number is not None and not 0 <= number < len(pairs):
        raise fault(path, f"holds {len(pairs)} sets, numbered from 0: there is no set {number}")
    warnings = []
    if number is None and len(pairs) > 1:
        warnings.append(f"set 0 of the {len(pairs)} in the file: --set-number N chooses another")
    unread = sorted(map(str, _other_keys(value)))
    if unread:
        warnings.append(f"left out of the file: {', '.join(unread):.100}")
    stored_images, stored_labels = pairs[number or 0]
    _check_images(path, stored_images, preprocessing)
    check_built(path, _built(stored_images, stored_labels))
    images, labels = _load(path, stored_images), _load(path, stored_labels)
    batch = Batch(
        images=preprocessing.to("cpu").pixels(images.float()).contiguous(),
        labels=labels.float() if labels.is_floating_point() else labels.long(),
    )
    recipe = Recipe(preprocessing=preprocessing)
    distilled = DistilledSet(batch=batch, classes=tuple(classes), recipe=recipe)
    check_set(path, distilled)
    warnings += _pixel_warnings(path, batch.images)
    if images.min() >= 0 and (any(preprocessing.mean) or preprocessing.zca is not None):
        warnings.append("its images have no negative value: were they normalised?")
    if batch.labels.ndim == 2 and not _are_distributions(batch.labels):
        _refuse_other_than_logits(path, batch.labels)
        warnings.append("its soft labels are logits: a softmax makes them probabilities")
        softened = batch.replace(labels=batch.labels.softmax(dim=1))
        distilled = DistilledSet(batch=softened, classes=distilled.classes, recipe=recipe)
    return ForeignSet(distilled=distilled, warnings=tuple(warnings))


def _pairs(path: Path, value: Any) -> list[tuple[StoredTensor, StoredTensor]]:
    if isinstance(value, dict) and "data" in value:
        found = value["data"]
    elif isinstance(value, dict) and {"images", "labels"} <= set(value):
        found = [[value["images"], value["labels"]]]
    else:
        found = [value]
    entries = found if isinstance(found, (list, tuple)) else []
    if len(entries) > _SETS_CAP:
        raise fault(path, f"holds {len(entries)} sets, at most {_SETS_CAP} are read")
    if not entries or not all(map(_is_pair, entries)):
        forms = "'data': [[images, labels], ...], a pair of tensors, or 'images' and 'labels'"
        raise fault(path, f"holds no distilled set: expected {forms}")
    return [(images, labels) for images, labels in entries]


def _is_pair(entry: object) -> bool:
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and all(isinstance(part, StoredTensor) for part in entry)
    )


def _other_keys(value: Any) -> set[Any]:
    """The keys of a file that are neither read nor known to be measurements."""
    if not isinstance(value, dict):
        return set()
    return set(value) - ({"data"} if "data" in value else {"images", "labels"}) - _MEASURED


def _check_images(path: Path, images: StoredTensor, space: Preprocessing) -> None:
    if not images.dtype.is_floating_point:
        raise fault(path, f"images are {images.dtype}, expected normalised floats")
    if len(images.shape) != 4 or {len(space.mean), len(space.std)} != {images.shape[1]}:
        given = f"{len(space.mean)} means and {len(space.std)} deviations"
        raise fault(path, f"images have the shape {images.shape}, given {given}")


def _built(images: StoredTensor, labels: StoredTensor) -> int:
    """The bytes of memory that a set takes while it is made, all copies together."""
    read = sum(2 * each.storage.count * each.dtype.itemsize for each in (images, labels))
    return (
        read
        + images.count * (images.dtype.itemsize + _COPIES * torch.float32.itemsize)
        + labels.count * (labels.dtype.itemsize + torch.int64.itemsize)
    )


def _load(path: Path, stored: StoredTensor) -> Tensor:
    try:
        return stored.load()
    except Exception as error:  # zip, zlib and short files share no base class
        raise fault(path, f"a tensor cannot be read: {error!s:.150}") from None


def _pixel_warnings(path: Path, pixels: Tensor) -> list[str]:
    """What is doubtful about the range of the pixels; far outside [0, 1] they are refused."""
    (low, high), mean = pixel_range(pixels), float(pixels.mean())
    span = f"its pixels run from {low:.3g} to {high:.3g}"
    if not -_FARTHEST_MEAN <= mean <= 1 + _FARTHEST_MEAN:
        raise fault(
            path,
            f"{span}, {mean:.3g} on average, where [0, 1] is expected: the images were not "
            "normalised as the data is (pixels from 0 to 255?)",
        )
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return []
    share = float(((pixels < 0) | (pixels > 1)).float().mean())
    return [
        f"{span}, {share:.0%} of them outside [0, 1]: were they whitened (--zca), or normalised "
        "by another mean and deviation?"
    ]


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
