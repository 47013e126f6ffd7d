"""A white canvas measured in pixels: tiles of images, text and frames, written as one PNG.

Images are drawn pixel by pixel (nearest neighbour, by a whole factor), so an 8x8 image stays sharp.
"""

from __future__ import annotations

import functools
import math
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from torch import Tensor

from ...distill.files.artifact import pixel_range
from .style import BLUE, DPI, INK, SOFT, save

Pixels = npt.NDArray[np.uint8]

_FRAME: Final = tuple(bytes.fromhex(BLUE[1:]))
EDGE: Final = 28  # pixels of white around the canvas
GAP: Final = 8  # between two tiles
_LARGEST: Final = 192  # a larger image is reduced to this side


@final
class Canvas:
    """A white area, measured in pixels from its top left; ``bottom`` is where the next row goes."""

    def __init__(self) -> None:
        self.bottom: float = EDGE
        self._tiles: list[tuple[int, int, Pixels]] = []
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self._boxes: list[tuple[int, int, int, int]] = []
        self._width = 760.0  # room for a line of title above a narrow set
        self._height = 0.0

    def heading(self, title: str, notes: Sequence[str], width: float) -> None:
        """A bold title and a grey caption, wrapped to ``width`` or at least the title's room."""
        self._width = max(self._width, width + EDGE)
        self.paragraph(title, 11, fontweight="bold")
        self.paragraph(" · ".join(notes), 8.5, color=SOFT)
        self.bottom += 6

    def paragraph(self, text: str, size: float, **style: Any) -> None:
        """Wrapped lines at the left edge, below everything drawn so far."""
        bold = style.get("fontweight") == "bold"
        for line in _wrap(text, size, self._width - 2 * EDGE, bold=bold):
            self.text(EDGE, self.bottom, line, size, **style)
            self.bottom += round(size * 1.45 * DPI / 72)

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        """One line; by default its top left is at (x, y)."""
        self._texts.append((x, y, text, {"va": "top", "color": INK, **style, "fontsize": size}))
        self._height = max(self._height, y + size * 1.3 * DPI / 72)
        if style.get("ha", "left") == "left":
            bold = style.get("fontweight") == "bold"
            self._width = max(self._width, x + text_width(text, size, bold=bold) + EDGE)

    def tile(self, x: float, y: float, pixels: Pixels) -> None:
        """An image with a thin frame, so that a white image on white paper has an edge."""
        left, top = round(x), round(y)
        self._tiles.append(
            (left, top, np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=170))
        )
        self._width = max(self._width, left + pixels.shape[1] + EDGE)
        self._height = max(self._height, top + pixels.shape[0])

    def outline(self, x: float, y: float, width: float, height: float) -> None:
        """A blue frame just outside of a rectangle."""
        self._boxes.append((round(x), round(y), round(width), round(height)))

    def save(self, path: Path) -> None:
        """Draws everything and writes it as PNG."""
        width, height = math.ceil(self._width), math.ceil(max(self._height, self.bottom)) + EDGE
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
        figure = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)
        figure.figimage(canvas, origin="upper", zorder=-1)
        for at, down, text, style in self._texts:
            # A class may be called "$5$", which is not mathematics.
            figure.text(at / width, 1 - down / height, text, parse_math=False, **style)
        save(figure, path)


def range_caption(images: Tensor) -> str:
    """The pixel range, and whether the display clips it."""
    low, high = pixel_range(images)
    clipped = ", clipped for display" if low < 0 or high > 1 else ""
    return f"pixel range {as_text(low)}…{as_text(high)}{clipped}"


def as_text(value: float) -> str:
    """A number with three significant digits or so."""
    text = (
        f"{value:.2f}"
        if abs(value) < 10
        else f"{value:.1f}"
        if abs(value) < 100
        else f"{value:.0f}"
    )
    return text.replace("-", "−")


def tile_size(images: Tensor, least: int) -> tuple[int, int]:
    """(height, width) in pixels of a tile: a whole multiple of the image's, ``least`` or more."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    factor = math.ceil(least / longest) if longest <= max(least, _LARGEST) else _LARGEST / longest
    return max(1, round(height * factor)), max(1, round(width * factor))


def raster(image: Tensor, height: int, width: int) -> Pixels:
    """An image (C, H, W) as RGB bytes at this size; of other than 1 or 3 channels the mean."""
    plain = image.detach().float().cpu().clamp(0, 1)
    if plain.shape[0] != 3:
        plain = plain.mean(0, keepdim=True).expand(3, -1, -1)
    levels = (plain * 255).round().byte().numpy()  # while the image is still small
    rows = np.arange(height) * levels.shape[1] // height
    columns = np.arange(width) * levels.shape[2] // width
    chosen: Pixels = levels.transpose(1, 2, 0)[rows][:, columns]
    return chosen


@functools.cache
def _renderer() -> Any:
    make: Any = RendererAgg  # it has no annotations
    return make(1, 1, DPI)


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width in pixels of a line of text."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        return float(_renderer().get_text_width_height_descent(text, font, False)[0])


def shorten(text: str, size: float, width: float) -> str:
    """``text``, its end replaced by an ellipsis where it is wider than ``width`` pixels."""
    text = text[:200]
    if text_width(text, size) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda n: text_width(f"{text[:n]}…", size))
    return f"{text[: max(1, fits - 1)].rstrip()}…"


def _wrap(text: str, size: float, width: float, *, bold: bool) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size, bold=bold) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
