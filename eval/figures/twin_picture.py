"""The picture of a set beside its clean twin, and of the difference between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ...distill.types import DistilledSet, hard_labels
from .canvas import (
    EDGE,
    GAP,
    Canvas,
    as_text,
    range_caption,
    raster,
    shorten,
    text_width,
    tile_size,
)
from .style import SOFT

_MOST_ROWS: Final = 10
MOST_COLUMNS: Final = 4  # of each of the three
TILE: Final = 72  # an image's longest side in pixels, or the next whole multiple of its own


def twin_picture(
    path: Path,
    attacked: DistilledSet,
    twin: DistilledSet,
    *,
    title: str,
    columns: int = MOST_COLUMNS,
    tile: int = TILE,
) -> float:
    """A row per class: images of the set, the same of its twin, and the scaled |difference|.

    Image k of a class stands beside image k of the twin's: both started from the same image. At
    most 10 classes and ``columns`` images of each, at least ``tile`` pixels long. Returns the
    largest difference of a shown pixel.
    Errors: ``RequestError`` where the picture can't be written; ``ValueError`` for sets of images
    of different shapes.
    """
    if attacked.image_shape != twin.image_shape:
        raise ValueError(f"images are {attacked.image_shape}, the twin's {twin.image_shape}")
    names = [shorten(name, 9, 300) for name in attacked.classes[:_MOST_ROWS]]
    both = [_rows(found, len(names), columns) for found in (attacked, twin)]
    pairs = [list(zip(ours, theirs, strict=False)) for ours, theirs in zip(*both, strict=True)]
    columns = max((len(row) for row in pairs), default=0)
    largest = max((float((a - b).abs().max()) for row in pairs for a, b in row), default=0.0)
    height, width = tile_size(attacked.batch.images, tile)
    left = EDGE + max((text_width(name, 9) for name in names), default=0) + 16
    block = columns * (width + GAP) + 3 * GAP
    canvas = Canvas()
    heads = ("the set", "its clean twin", f"|difference|, white = {as_text(largest)}")
    wide = max(text_width(head, 8) for head in heads) <= block - GAP
    notes = _notes(attacked, columns, len(names))
    canvas.heading(title, notes if wide else [", ".join(heads), *notes], left + 3 * block)
    if wide:
        for number, head in enumerate(heads):
            canvas.text(left + number * block, canvas.bottom, head, 8, color=SOFT)
        canvas.bottom += 34
    for name, row in zip(names, pairs, strict=True):
        top = canvas.bottom
        canvas.text(left - 16, top + height / 2, name, 9, ha="right", va="center")
        for column, (ours, theirs) in enumerate(row):
            apart = (ours - theirs).abs() / (largest or 1)
            for number, image in enumerate((ours, theirs, apart)):
                x = left + number * block + column * (width + GAP)
                canvas.tile(x, top, raster(image, height, width))
        canvas.bottom = top + height + GAP
    canvas.save(path)
    return largest


def _rows(found: DistilledSet, classes: int, columns: int) -> list[list[Tensor]]:
    """The first images of each class."""
    hard, images = hard_labels(found.batch.labels), found.batch.images
    rows = [torch.nonzero(hard == label)[:columns, 0] for label in range(classes)]
    return [list(images[row]) for row in rows]


def _notes(attacked: DistilledSet, columns: int, rows: int) -> list[str]:
    hard = hard_labels(attacked.batch.labels)
    most = int(torch.bincount(hard).max()) if len(hard) else 0
    notes = [range_caption(attacked.batch.images)]
    if most > columns:
        notes.append(f"first {columns} of {most} images per class")
    if len(attacked.classes) > rows:
        notes.append(f"first {rows} of {len(attacked.classes)} classes")
    return notes
