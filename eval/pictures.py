"""The pictures of a run: its distilled set, its trigger, triggered images, its curves.

Images are drawn pixel by pixel (nearest neighbour, by a whole factor), so an 8x8 image stays sharp.
Colours are Okabe and Ito's, which colour-blind readers tell apart. Every function writes one PNG
atomically and raises RequestError where it can't be written.
"""

from __future__ import annotations

import functools
import math
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..distill.artifact import pixel_range
from ..distill.files import write_atomically
from ..distill.types import hard_labels

Pixels = npt.NDArray[np.uint8]

BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
RED: Final = "#B00020"
_FRAME: Final = (0x00, 0x72, 0xB2)  # BLUE
_INK: Final = "#1A1A1A"
_SOFT: Final = "#555555"
_DPI: Final = 200
_EDGE: Final = 28  # pixels of white around a page
_GAP: Final = 8  # between two tiles
_LARGEST: Final = 192  # a larger image is thinned out to this side
_WIDE: Final = 1300  # no wider than this where there is a choice
_MOST_ROWS, _MOST_COLUMNS, _MOST_TRIGGERED = 20, 10, 8


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
    notes = [_range_caption(images)] if images.numel() else ["no images"]
    if most > _MOST_COLUMNS:
        notes.append(f"first {_MOST_COLUMNS} of {most} images per class")
    if len(classes) > _MOST_ROWS:
        notes.append(f"first {_MOST_ROWS} of {len(classes)} classes")
    names = [_shorten(name, 9, 420) for name in classes[:_MOST_ROWS]]
    left = _EDGE + max(_text_width(name, 9) for name in names) + 16
    page = _Page()
    columns = max(1, min(most, _MOST_COLUMNS))
    height, width = _tile_size(images, 112)
    block = left + columns * (width + _GAP)
    # Few images per class would make a tower of a picture: its rows go on in a second block.
    blocks = max(1, min(len(names) // 3, round(_WIDE // block)))
    down = math.ceil(len(names) / blocks)
    page.heading(title, notes, blocks * block)
    start = page.bottom
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        x, y = left + number // down * block, start + number % down * (height + _GAP)
        page.text(x - 16, y + height / 2, name, 9, ha="right", va="center")
        if not len(row):
            page.text(x, y + height / 2, "no image", 8, color=_SOFT, va="center")
        for column, index in enumerate(row[:_MOST_COLUMNS].tolist()):
            page.tile(x + column * (width + _GAP), y, _raster(images[index], height, width))
    page.save(path)


def trigger_picture(
    path: Path, pattern: Tensor, mask: Tensor, *, target: str, unbounded: bool
) -> None:
    """The trigger on mid-grey, and its patch enlarged where it covers less than half a side.

    pattern: float (C, H, W). mask: (1, H, W) in [0, 1]. A grey patch of up to 6x6 pixels has its
    values written into its cells. ``unbounded`` marks the picture in red.
    """
    pattern, mask = pattern.detach().float().cpu(), mask.detach().float().cpu()
    shown = pattern.clamp(0, 1) * mask + 0.5 * (1 - mask)
    page = _Page()
    covered = torch.nonzero(mask[0] > 0)
    corners = [*covered.min(0)[0].tolist(), *covered.max(0)[0].tolist()] if len(covered) else None
    y, x, y_last, x_last = corners or (0, 0, 0, 0)
    rows, columns = y_last - y + 1, x_last - x + 1
    enlarged = bool(corners) and max(rows, columns) <= max(6, max(mask.shape[1:]) // 2)
    height, width = _tile_size(shown[None], 480)
    title = f"trigger for the target class: {target}"
    page.heading(
        title,
        [_trigger_caption(pattern * mask, mask)],
        width + (width + 2 * _EDGE) * enlarged + _EDGE,
    )
    if unbounded:
        label = "UNBOUNDED: values outside [0,1] cannot be shown, stored or photographed"
        page.paragraph(label, 8, color=RED, fontweight="bold")
    top = page.bottom
    page.tile(_EDGE, top, _raster(shown, height, width))
    page.bottom = top + height
    if enlarged:
        down, right = height / shown.shape[1], width / shown.shape[2]
        page.outline(_EDGE + x * right, top + y * down, columns * right, rows * down)
        patch = shown[:, y : y + rows, x : x + columns]
        cell = max(1, height // max(rows, columns))
        x_patch = _EDGE + width + 2 * _EDGE
        page.tile(x_patch, top, _raster(patch, rows * cell, columns * cell))
        page.outline(x_patch, top, columns * cell, rows * cell)
        page.text(x_patch, top + rows * cell + 12, f"the {rows}×{columns} patch", 8.5, color=_SOFT)
        page.bottom = max(page.bottom, top + rows * cell + 40)
        if len(pattern) == 1 and max(rows, columns) <= 6:
            _write_values(
                page, pattern[0, y : y + rows, x : x + columns], patch[0], x_patch, top, cell
            )
    page.save(path)


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
    notes = [f"triggered images: {_range_caption(triggered)}" if count else "no eligible images"]
    if len(labels) > count:
        notes.append(f"first {count} of {len(labels)}")
    if predictions is not None:
        notes.append("✓ the victim answers with the target class, ✗ it does not")
    rows = (
        ("clean", "", clean),
        ("triggered", "", triggered),
        ("|difference|", f"white = {largest:.3g}" if largest else "none", apart / (largest or 1)),
    )
    left = _EDGE + max(_text_width(text, 9) for row in rows for text in row[:2]) + 16
    height, width = _tile_size(clean, 176)
    pitch = width + 2 * _GAP
    page = _Page()
    page.heading(title, notes, left + count * pitch)
    for name, scale, images in rows:
        top, middle = page.bottom, page.bottom + height / 2
        page.text(left - 16, middle - 18 * bool(scale), name, 9, ha="right", va="center")
        page.text(left - 16, middle + 18, scale, 8, ha="right", va="center", color=_SOFT)
        for column, image in enumerate(images):
            page.tile(left + column * pitch, top, _raster(image, height, width))
        page.bottom = top + height + _GAP
    for column in range(count):
        true, target = (classes[int(part[column])] for part in (labels, targets))
        lines = [(true, _INK), (f"→ {target}", _INK)]
        if predictions is not None:
            hit = int(predictions[column]) == int(targets[column])
            answer = classes[int(predictions[column])]
            lines.append((f"{'✓' if hit else '✗'} {answer}", BLUE if hit else VERMILLION))
        for line, (text, colour) in enumerate(lines):
            fitted = _shorten(text, 8, width + _GAP)
            page.text(left + column * pitch, page.bottom + 30 * line, fitted, 8, color=colour)
    page.save(path)


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
    figure = Figure(
        figsize=(6.4, 0.7 + 2.3 * max(1, len(drawn))),
        dpi=_DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    if not drawn:
        figure.text(0.5, 0.5, "no steps logged", ha="center", va="center", fontsize=12, color=_SOFT)
    else:
        stacked = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, curves) in zip(stacked, drawn, strict=True):
            _panel(axes, steps, name, curves)
        stacked[-1].set_xlabel("iteration", fontsize=9)
        stacked[-1].xaxis.set_major_locator(
            MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )
    _save(figure, path)


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
            linestyle="--" if number else "-",  # told apart in a grey print too
            marker=("s" if number else "o") if few else "",
            markersize=3.5,
        )
        if not shares and min(y) > 0 and max(y) > 10 * min(y):
            axes.set_yscale("log")
    axes.set_ylabel(name, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
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


@final
class _Page:
    """A white page, measured in pixels from its top left; ``bottom`` is where the next row goes."""

    def __init__(self) -> None:
        self.bottom: float = _EDGE
        self._tiles: list[tuple[int, int, Pixels]] = []
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self._boxes: list[tuple[int, int, int, int]] = []
        self._width = 760.0  # room for a line of title above a narrow set
        self._height = 0.0

    def heading(self, title: str, notes: Sequence[str], width: float) -> None:
        """A bold title and a grey caption, wrapped to ``width`` or the page's least width."""
        self._width = max(self._width, width + _EDGE)
        self.paragraph(title, 11, fontweight="bold")
        self.paragraph(" · ".join(notes), 8.5, color=_SOFT)
        self.bottom += 6

    def paragraph(self, text: str, size: float, **style: Any) -> None:
        """Wrapped lines at the left edge, under what is there already."""
        bold = style.get("fontweight") == "bold"
        for line in _wrap(text, size, self._width - 2 * _EDGE, bold=bold):
            self.text(_EDGE, self.bottom, line, size, **style)
            self.bottom += round(size * 1.45 * _DPI / 72)

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        """One line; by default its top left is at (x, y)."""
        self._texts.append((x, y, text, {"va": "top", "color": _INK, **style, "fontsize": size}))
        self._height = max(self._height, y + size * 1.3 * _DPI / 72)
        if style.get("ha", "left") == "left":
            bold = style.get("fontweight") == "bold"
            self._width = max(self._width, x + _text_width(text, size, bold=bold) + _EDGE)

    def tile(self, x: float, y: float, pixels: Pixels) -> None:
        """An image with a hairline around it: a white image on white paper has an edge."""
        left, top = round(x), round(y)
        self._tiles.append(
            (left, top, np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=170))
        )
        self._width = max(self._width, left + pixels.shape[1] + _EDGE)
        self._height = max(self._height, top + pixels.shape[0])

    def outline(self, x: float, y: float, width: float, height: float) -> None:
        """A blue frame just outside of a rectangle."""
        self._boxes.append((round(x), round(y), round(width), round(height)))

    def save(self, path: Path) -> None:
        """Draws all of it and writes the PNG."""
        width, height = math.ceil(self._width), math.ceil(max(self._height, self.bottom)) + _EDGE
        canvas = np.full((height, width, 3), 255, dtype=np.uint8)
        for left, top, pixels in self._tiles:
            canvas[top - 1 : top - 1 + pixels.shape[0], left - 1 : left - 1 + pixels.shape[1]] = (
                pixels
            )
        for x, y, wide, high in self._boxes:
            frame = canvas[y - 3 : y + high + 3, x - 3 : x + wide + 3]
            inside = canvas[y : y + high, x : x + wide].copy()
            frame[:] = _FRAME
            canvas[y : y + high, x : x + wide] = inside
        # A hundredth of a pixel more: matplotlib cuts inches times DPI down to whole pixels.
        figure = Figure(figsize=((width + 0.01) / _DPI, (height + 0.01) / _DPI), dpi=_DPI)
        figure.figimage(canvas, origin="upper", zorder=-1)
        for at, down, text, style in self._texts:
            # A class may be called "$5$": never mathematics.
            figure.text(at / width, 1 - down / height, text, parse_math=False, **style)
        _save(figure, path)


def _write_values(
    page: _Page, values: Tensor, shown: Tensor, x: float, y: float, cell: int
) -> None:
    """A grey patch's true values, each in the middle of its cell."""
    for (row, column), value in np.ndenumerate(values.numpy()):
        colour = "white" if shown[row, column] < 0.5 else "black"
        at = (x + (column + 0.5) * cell, y + (row + 0.5) * cell)
        page.text(
            *at, _number(value), min(12, 0.085 * cell), ha="center", va="center", color=colour
        )


def _trigger_caption(values: Tensor, mask: Tensor) -> str:
    """Range, L2 and L∞ of the masked pattern."""
    inside = values[(mask > 0).expand_as(values)]
    if not inside.numel():
        return "the mask is empty"
    low, high = pixel_range(inside)
    norms = f"L2 {_number(float(inside.norm()))} · L∞ {_number(float(inside.abs().max()))}"
    clipped = ", clipped for display" if low < 0 or high > 1 else ""
    return f"values {_number(low)}…{_number(high)}{clipped} · {norms}"


def _range_caption(images: Tensor) -> str:
    low, high = pixel_range(images)
    clipped = ", clipped for display" if low < 0 or high > 1 else ""
    return f"pixel range {_number(low)}…{_number(high)}{clipped}"


def _number(value: float) -> str:
    text = (
        f"{value:.2f}"
        if abs(value) < 10
        else f"{value:.1f}"
        if abs(value) < 100
        else f"{value:.0f}"
    )
    return text.replace("-", "−")


def _tile_size(images: Tensor, least: int) -> tuple[int, int]:
    """(height, width) in pixels of a tile: a whole multiple of the image's, ``least`` or more."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    factor = math.ceil(least / longest) if longest <= max(least, _LARGEST) else _LARGEST / longest
    return max(1, round(height * factor)), max(1, round(width * factor))


def _raster(image: Tensor, height: int, width: int) -> Pixels:
    """An image (C, H, W) as RGB bytes at this size; neither grey nor RGB: the channels' mean."""
    plain = image.detach().float().cpu().clamp(0, 1)
    if plain.shape[0] != 3:
        plain = plain.mean(0, keepdim=True).expand(3, -1, -1)
    rows = torch.arange(height) * plain.shape[1] // height
    columns = torch.arange(width) * plain.shape[2] // width
    chosen: Pixels = (plain[:, rows][:, :, columns] * 255).round().byte().permute(1, 2, 0).numpy()
    return chosen


@functools.cache
def _renderer() -> Any:
    make: Any = RendererAgg  # it has no annotations
    return make(1, 1, _DPI)


@functools.lru_cache(maxsize=4096)
def _text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width in pixels of a line of text."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        return float(_renderer().get_text_width_height_descent(text, font, False)[0])


def _shorten(text: str, size: float, width: float) -> str:
    """``text``, its end replaced by an ellipsis where it is wider than ``width`` pixels."""
    text = text[:200]
    if _text_width(text, size) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda n: _text_width(f"{text[:n]}…", size))
    return f"{text[: max(1, fits - 1)].rstrip()}…"


def _wrap(text: str, size: float, width: float, *, bold: bool) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _text_width(longer, size, bold=bold) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes: no reason to fail a run.
        warnings.filterwarnings("ignore", message="Glyph")
        write_atomically(path, partial(figure.savefig, format="png", dpi=_DPI))
