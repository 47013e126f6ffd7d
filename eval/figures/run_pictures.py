"""The pictures of a run: its distilled set, its trigger, triggered images, its curves.

Every function writes one PNG atomically and raises RequestError where it can't be written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ...attacks.triggers import Region, TriggerPicture
from ...distill.types import hard_labels
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
from .style import BLUE, INK, RED, SOFT, VERMILLION, new_figure, save, style_axes

_WIDE: Final = 1300  # no wider than this where there is a choice
_MOST_ROWS, _MOST_COLUMNS, _MOST_TRIGGERED = 20, 10, 8
_MOST_WRITTEN: Final = 6  # a larger region's cells have no room for their values


def distilled_picture(
    path: Path, images: Tensor, labels: Tensor, classes: Sequence[str], *, title: str
) -> None:
    """The set: a row per class, a column per image; at most 20 classes and 10 images of each.

    images: float (N, C, H, W), clipped to [0, 1] for display, the true range in the caption.
    labels: int64 (N,) or float (N, classes). classes: names in label order.
    """
    hard = hard_labels(labels).cpu()
    rows = [torch.nonzero(hard == label)[:, 0] for label in range(min(len(classes), _MOST_ROWS))]
    most = int(torch.bincount(hard).max()) if len(hard) else 0
    notes = [range_caption(images)] if images.numel() else ["no images"]
    if most > _MOST_COLUMNS:
        notes.append(f"first {_MOST_COLUMNS} of {most} images per class")
    if len(classes) > _MOST_ROWS:
        notes.append(f"first {_MOST_ROWS} of {len(classes)} classes")
    names = [shorten(name, 9, 420) for name in classes[:_MOST_ROWS]]
    left = EDGE + max(text_width(name, 9) for name in names) + 16
    canvas = Canvas()
    columns = max(1, min(most, _MOST_COLUMNS))
    height, width = tile_size(images, 112)
    block = left + columns * (width + GAP)
    # Few images per class would make a tall, narrow picture: its rows go on in a second block.
    blocks = max(1, min(len(names) // 3, round(_WIDE // block)))
    down = math.ceil(len(names) / blocks)
    canvas.heading(title, notes, blocks * block)
    start = canvas.bottom
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        x, y = left + number // down * block, start + number % down * (height + GAP)
        canvas.text(x - 16, y + height / 2, name, 9, ha="right", va="center")
        if not len(row):
            canvas.text(x, y + height / 2, "no image", 8, color=SOFT, va="center")
        for column, index in enumerate(row[:_MOST_COLUMNS].tolist()):
            canvas.tile(x + column * (width + GAP), y, raster(images[index], height, width))
    canvas.save(path)


def trigger_picture(path: Path, trigger: TriggerPicture, *, target: str) -> None:
    """The trigger, its labels in red, and its region enlarged.

    A grey region of up to 6x6 pixels has its values written into its cells.
    """
    image, canvas = trigger.image.clamp(0, 1), Canvas()
    height, width = tile_size(image[None], 480)
    notes = [trigger.caption]
    if not torch.equal(image, trigger.image):
        notes.append("clipped for display")
    enlarged = (width + 2 * EDGE) * (trigger.region is not None)
    canvas.heading(f"trigger for the target class: {target}", notes, width + enlarged + EDGE)
    for label in trigger.labels:
        canvas.paragraph(label, 8, color=RED, fontweight="bold")
    top = canvas.bottom
    canvas.tile(EDGE, top, raster(image, height, width))
    canvas.bottom = top + height
    if trigger.region is not None:
        _enlarge(canvas, trigger.image, trigger.region, top, height, width)
    canvas.save(path)


def _enlarge(
    canvas: Canvas, image: Tensor, region: Region, top: float, height: int, width: int
) -> None:
    """Outline ``region`` in the image's tile, and draw it enlarged to the tile's right."""
    y, x, rows, columns = region
    down, right = height / image.shape[1], width / image.shape[2]
    canvas.outline(EDGE + x * right, top + y * down, columns * right, rows * down)
    values = image[:, y : y + rows, x : x + columns]
    shown = values.clamp(0, 1)
    cell = max(1, height // max(rows, columns))
    left = EDGE + width + 2 * EDGE
    canvas.tile(left, top, raster(shown, rows * cell, columns * cell))
    canvas.outline(left, top, columns * cell, rows * cell)
    note = f"{rows}×{columns} pixels, enlarged"
    canvas.text(left, top + rows * cell + 12, note, 8.5, color=SOFT)
    canvas.bottom = max(canvas.bottom, top + rows * cell + 40)
    if len(image) == 1 and max(rows, columns) <= _MOST_WRITTEN:
        _write_values(canvas, values[0], shown[0], left, top, cell)


def triggered_picture(
    path: Path,
    clean: Tensor,
    triggered: Tensor,
    labels: Tensor,
    targets: Tensor,
    classes: Sequence[str],
    *,
    predictions: Tensor | None = None,
    title: str,
) -> None:
    """Up to 8 test images: clean, triggered, and the scaled difference between the two.

    clean, triggered: float (N, C, H, W). labels, targets, predictions: int64 (N,); a victim's
    prediction is marked ✓ where it is the target, ✗ where not.
    """
    count = min(len(clean), _MOST_TRIGGERED)
    clean, triggered = (part[:count].detach().float().cpu() for part in (clean, triggered))
    apart = (triggered - clean).abs()
    largest = float(apart.max()) if apart.numel() else 0.0
    notes = [f"triggered images: {range_caption(triggered)}" if count else "no eligible images"]
    if len(labels) > count:
        notes.append(f"first {count} of {len(labels)}")
    if predictions is not None:
        notes.append("✓ the victim answers with the target class, ✗ it does not")
    rows = (
        ("clean", "", clean),
        ("triggered", "", triggered),
        ("|difference|", f"white = {largest:.3g}" if largest else "none", apart / (largest or 1)),
    )
    left = EDGE + max(text_width(text, 9) for row in rows for text in row[:2]) + 16
    height, width = tile_size(clean, 176)
    pitch = width + 2 * GAP
    canvas = Canvas()
    canvas.heading(title, notes, left + count * pitch)
    for name, scale, images in rows:
        top, middle = canvas.bottom, canvas.bottom + height / 2
        canvas.text(left - 16, middle - 18 * bool(scale), name, 9, ha="right", va="center")
        canvas.text(left - 16, middle + 18, scale, 8, ha="right", va="center", color=SOFT)
        for column, image in enumerate(images):
            canvas.tile(left + column * pitch, top, raster(image, height, width))
        canvas.bottom = top + height + GAP
    for column in range(count):
        true, target = (classes[int(part[column])] for part in (labels, targets))
        lines = [(true, INK), (f"→ {target}", INK)]
        if predictions is not None:
            hit = int(predictions[column]) == int(targets[column])
            answer = classes[int(predictions[column])]
            lines.append((f"{'✓' if hit else '✗'} {answer}", BLUE if hit else VERMILLION))
        for line, (text, colour) in enumerate(lines):
            fitted = shorten(text, 8, width + GAP)
            canvas.text(left + column * pitch, canvas.bottom + 30 * line, fitted, 8, color=colour)
    canvas.save(path)


def curves_picture(path: Path, steps: Sequence[Mapping[str, Any]]) -> None:
    """The course of a distillation, from the rows of ``progress.jsonl``.

    steps: mappings with ``iteration`` and ``loss``, optionally ``trigger_loss`` and the shares
    ``clean_test_accuracy`` and ``attack_success_rate``; missing or null values are left out. A
    loss that spans more than a decade gets a logarithmic axis.
    """
    panels: list[tuple[str, list[tuple[str, str, str]]]] = [
        ("distillation loss", [("loss", "", BLUE)]),
        ("trigger loss", [("trigger_loss", "", VERMILLION)]),
        (
            "share of test images",
            [
                ("clean_test_accuracy", "clean test accuracy (CTA)", BLUE),
                ("attack_success_rate", "attack success rate (ASR)", VERMILLION),
            ],
        ),
    ]
    drawn = [
        (name, [(key, text, colour) for key, text, colour in curves if _points(steps, key)[0]])
        for name, curves in panels
    ]
    drawn = [(name, curves) for name, curves in drawn if curves]
    figure = new_figure(6.4, 0.7 + 2.3 * max(1, len(drawn)))
    if not drawn:
        figure.text(0.5, 0.5, "no steps logged", ha="center", va="center", fontsize=12, color=SOFT)
    else:
        stacked = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, curves) in zip(stacked, drawn, strict=True):
            _panel(axes, steps, name, curves)
        stacked[-1].set_xlabel("iteration", fontsize=9)
        stacked[-1].xaxis.set_major_locator(
            MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )
    save(figure, path)


def _panel(
    axes: Axes, steps: Sequence[Mapping[str, Any]], name: str, curves: list[tuple[str, str, str]]
) -> None:
    shares = name.startswith("share")
    for number, (key, text, colour) in enumerate(curves):
        x, y = _points(steps, key)
        few = len(x) <= 40
        axes.plot(
            x,
            y,
            color=colour,
            label=text,
            linewidth=1.2,
            linestyle="--" if number else "-",  # distinct in a grey print too
            marker=("s" if number else "o") if few else "",
            markersize=3.5,
        )
        if not shares and min(y) > 0 and max(y) > 10 * min(y):
            axes.set_yscale("log")
    axes.set_ylabel(name, fontsize=9)
    style_axes(axes)
    if shares:
        axes.set_ylim(-0.03, 1.03)
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def _points(steps: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [
        (float(row["iteration"]), float(row[key]))
        for row in steps
        if row.get(key) is not None and math.isfinite(row[key])
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _write_values(
    canvas: Canvas, values: Tensor, shown: Tensor, x: float, y: float, cell: int
) -> None:
    """The true values of grey pixels, each in the middle of its cell."""
    for (row, column), value in np.ndenumerate(values.numpy()):
        colour = "white" if shown[row, column] < 0.5 else "black"
        at = (x + (column + 0.5) * cell, y + (row + 0.5) * cell)
        canvas.text(
            *at, as_text(value), min(12, 0.085 * cell), ha="center", va="center", color=colour
        )
