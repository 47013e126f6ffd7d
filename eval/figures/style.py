"""What all pictures share: colours, axes, and how a figure becomes a file.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ...distill.files.safe import write_atomically

BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
RED: Final = "#B00020"
INK: Final = "#1A1A1A"
SOFT: Final = "#555555"
DPI: Final = 200


def new_figure(width: float, height: float, wspace: float = 0.02) -> Figure:
    """An empty figure of this size in inches, whose parts do not overlap."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=wspace)
    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def style_axes(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Small ticks, a light grid behind the data, no box around it."""
    axes.tick_params(which="both", labelsize=8)
    axes.grid(True, axis=grid, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    _draw(figure, buffer, "png")
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Writes a figure atomically, as PNG or SVG after the path's ending. Equal figures give equal
    bytes. Errors: ``RequestError`` where it can't be written."""
    write_atomically(path, lambda temporary: _draw(figure, temporary, path.suffix[1:]))


def _draw(figure: Figure, target: Path | io.BytesIO, image_format: str) -> None:
    options: dict[str, Any] = {"metadata": {"Date": None}} if image_format == "svg" else {}
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "distillsec"}):
        # A name in a script that the font lacks is drawn as boxes: no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(target, format=image_format, dpi=DPI, **options)
