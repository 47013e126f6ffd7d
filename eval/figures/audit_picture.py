"""The picture of an audit: each class's recovered patch, and one of them on clean images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from torch import Tensor

from .canvas import EDGE, GAP, Canvas, raster, shorten, tile_size
from .style import BLUE, INK, SOFT, VERMILLION

_MOST_CLASSES: Final = 20
_A_ROW: Final = 10


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PatchedImages:
    """Clean images ``(N, C, H, W)`` of other classes than ``label``, the same with its patch, their
    labels, and a victim's answers, int64 ``(N,)``."""

    clean: Tensor
    patched: Tensor
    labels: Tensor
    answers: Tensor
    label: int


def audit_picture(
    path: Path,
    patches: Tensor,
    captions: Sequence[str],
    shown: PatchedImages,
    classes: Sequence[str],
    *,
    title: str,
) -> None:
    """Writes one PNG; at most 20 classes.

    patches: mask times pattern, ``(K, C, H, W)``. captions: a short text for each patch (its size).
    Errors: ``RequestError`` where the picture can't be written.
    """
    canvas, name = Canvas(), classes[shown.label]
    hits, count = int((shown.answers == shown.label).sum()), len(shown.answers)
    notes = [f"with the patch of {name}, a victim gives {hits} of {count} images to it"]
    if len(classes) > _MOST_CLASSES:
        notes.append(f"first {_MOST_CLASSES} of {len(classes)} classes")
    height, width = tile_size(patches, 112)
    pitch = width + 2 * GAP
    canvas.heading(title, notes, EDGE + min(len(classes), _A_ROW) * pitch)
    canvas.paragraph("the smallest patch found for each class, and its size in pixels", 8.5)
    for first in range(0, min(len(classes), _MOST_CLASSES), _A_ROW):
        top = canvas.bottom + GAP
        for label in range(first, min(len(classes), first + _A_ROW, _MOST_CLASSES)):
            left = EDGE + (label - first) * pitch
            canvas.tile(left, top, raster(patches[label], height, width))
            if label == shown.label:
                canvas.outline(left, top, width, height)
            for line, text in enumerate((classes[label], captions[label])):
                fitted = shorten(text, 8, width + GAP)
                canvas.text(left, top + height + 8 + 28 * line, fitted, 8, color=(INK, SOFT)[line])
        canvas.bottom = top + height + 76
    canvas.paragraph(f"clean images, with the patch of {name}, and the victim's answers", 8.5)
    _draw_images(canvas, shown, classes)
    canvas.save(path)


def _draw_images(canvas: Canvas, shown: PatchedImages, classes: Sequence[str]) -> None:
    """A column for each image: clean, with the patch, its class, the answer."""
    height, width = tile_size(shown.clean, 112)
    top, pitch = canvas.bottom + GAP, width + 2 * GAP
    for column, (clean, patched) in enumerate(zip(shown.clean, shown.patched, strict=True)):
        left = EDGE + column * pitch
        canvas.tile(left, top, raster(clean, height, width))
        canvas.tile(left, top + height + GAP, raster(patched, height, width))
        answer, hit = int(shown.answers[column]), bool(shown.answers[column] == shown.label)
        lines = (
            (classes[int(shown.labels[column])], INK),
            (f"→ {classes[answer]}", VERMILLION if hit else BLUE),
        )
        for line, (text, colour) in enumerate(lines):
            fitted = shorten(text, 8, width + GAP)
            y = top + 2 * height + 2 * GAP + 28 * line
            canvas.text(left, y, fitted, 8, color=colour)
    canvas.bottom = top + 2 * height + 2 * GAP + 64
