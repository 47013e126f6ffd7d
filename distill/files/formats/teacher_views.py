"""A teacher's soft labels of augmented views, as FKD's code stores them, one file a batch.

SRe2L, CDA, G-VBSM and D4M publish ``epoch_E/batch_B.tar``: a file of ``torch.save`` (no tar) with
``[coords (B, 4), flip (B,), mix_index, mix_lam, mix_bbox, logits (B, classes)]``
(``VILA-Lab/SRe2L``, relabel/generate_soft_label.py and utils_fkd.py at 16b1cc3). A row's image is
known from the order of torch's ``RandomSampler`` alone, seeded with 42 there.

Training on the views one by one needs labels by epoch, which a recipe does not hold. Read here is
the mean of the teacher's probabilities over all views of an image that are not mixed with others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from ..pickled import StoredTensor
from ..safe import check_built, fault
from ..torch_file import read_foreign
from .stored_set import load_stored

_SEED: Final = 42
_PARTS: Final = 6
_EPOCHS_CAP: Final = 10_000
_FEWEST_RIGHT: Final = 0.5
"""Of the images, whose mean label must be that of their class: another order gives chance."""


def is_views_folder(path: Path) -> bool:
    """Whether a folder holds ``epoch_0/batch_0.tar``."""
    return (path / "epoch_0" / "batch_0.tar").is_file()


def read_views(path: Path, hard: Tensor) -> tuple[Tensor, list[str]]:
    """The mean soft label of each image ``float32 (N, classes)``, and notes.

    hard: ``int64 (N,)``, the images' classes, in the order of their files. Where all views are
    mixed, no label can be given to one image: ``hard`` comes back.

    Raises RequestError: another structure, other numbers of images, a file that is refused,
    labels in an order other than the published one.
    """
    count = len(hard)
    epochs = _numbered(path, "epoch_", "")
    if len(epochs) > _EPOCHS_CAP:
        raise fault(path, f"holds {len(epochs)} epochs, at most {_EPOCHS_CAP} are read")
    sampler = RandomSampler(range(count), generator=torch.Generator().manual_seed(_SEED))
    total, views, mixed = torch.zeros(count, 0), torch.zeros(count), 0
    for epoch in epochs:
        order = torch.tensor(list(sampler))
        start = 0
        for file in _numbered(epoch, "batch_", ".tar"):
            logits, is_mixed = _batch(file)
            rows = order[start : start + len(logits)]
            if len(rows) != len(logits):
                raise fault(epoch, f"holds labels of more than the {count} images")
            start += len(logits)
            if is_mixed:
                mixed += 1
                continue
            if not total.shape[1]:
                check_built(file, 3 * count * logits.shape[1] * 4)
                total = torch.zeros(count, logits.shape[1])
            if logits.shape[1] != total.shape[1]:
                raise fault(file, f"has {logits.shape[1]} classes, others {total.shape[1]}")
            total[rows] += logits.softmax(dim=1)
            views[rows] += 1
        if start != count:
            raise fault(
                epoch, f"holds labels of {start} views, expected one of each of {count} images"
            )
    return _mean_labels(path, hard, total, views, mixed, len(epochs))


def _mean_labels(
    path: Path, hard: Tensor, total: Tensor, views: Tensor, mixed: int, epochs: int
) -> tuple[Tensor, list[str]]:
    have = f"{epochs} epochs of a teacher's soft labels in {path.name}"
    if not views.all():
        return hard, [
            f"{have} are not used: {mixed} of their batches are of mixed images, whose labels "
            "belong to no single image; the classes are the labels"
        ]
    soft = total / views[:, None]
    right = float((soft.argmax(dim=1) == hard).float().mean())
    if right < _FEWEST_RIGHT:
        raise fault(
            path,
            f"its labels agree with the classes of {right:.0%} of the images: they are of other "
            f"images, or in another order than that of seed {_SEED}",
        )
    return soft, [
        f"{have}: the mean of each image's views is its label (the teacher agrees with the classes "
        f"of {right:.0%}); training on single views is not done here"
    ]


def _batch(file: Path) -> tuple[Tensor, bool]:
    """A batch's logits ``float32 (B, classes)``, and whether its images were mixed."""
    value: Any = read_foreign(file)
    if not isinstance(value, list) or len(value) != _PARTS:
        raise fault(file, f"holds no batch of soft labels: expected a list of {_PARTS} parts")
    stored, mix_index = value[5], value[2]
    if not isinstance(stored, StoredTensor) or len(stored.shape) != 2 or not stored.count:
        raise fault(file, "its last part is no table of logits (images, classes)")
    check_built(file, 3 * stored.storage.count * 4)
    logits = load_stored(file, stored).float()
    if not logits.isfinite().all():
        raise fault(file, "logits hold NaN or infinite values")
    return logits, mix_index is not None


def _numbered(path: Path, before: str, after: str) -> list[Path]:
    """``BEFORE0AFTER``, ``BEFORE1AFTER``, … in ``path``; RequestError where one is missing."""
    pattern = re.compile(rf"{re.escape(before)}(\d{{1,7}}){re.escape(after)}")
    found = {int(m[1]): each for each in path.iterdir() if (m := pattern.fullmatch(each.name))}
    if sorted(found) != list(range(len(found))) or not found:
        raise fault(path, f"holds {len(found)} of {before}N{after}, expected all from 0 on")
    return [found[number] for number in range(len(found))]
