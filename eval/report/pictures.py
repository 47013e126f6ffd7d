"""The pictures of runs in a report: files of the run's folder, alt texts, and their size."""

from __future__ import annotations

import base64
import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from PIL import Image

from ...distill.files.artifact import load_set
from ...distill.files.safe import check_file
from ...distill.types import DistilledSet, RequestError
from ..figures.twin_picture import MOST_COLUMNS, TILE, twin_picture
from ..results.formatting import duration
from ..results.record import Record
from ..results.subject import subject
from ..run.folder import path_inside
from .model import PicturedRun

_FILE_CAP: Final = 32 * 2**20
_PIXEL_CAP: Final = 40_000_000
_SHRINK: Final = 0.8
_NARROWEST: Final = 140
_COLOURS: Final = 64
# Columns and tiles of a set beside its twin, and the bytes that such a picture takes as base64
# without its images; a pixel takes _BYTES_OF_PIXEL, as distilled images are nearly noise.
_LAYOUTS: Final = ((MOST_COLUMNS, TILE, 20_000), (2, TILE, 20_000), (1, 40, 0))
_BYTES_OF_PIXEL: Final = 1.6


@final
@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as PNG, or the problem why there is none. alt: for readers who do not see it."""

    title: str
    alt: str
    png: bytes = b""
    problem: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class EmbeddedPicture:
    """A picture as a ``data:`` address of the page. width, height: in pixels."""

    title: str
    alt: str
    url: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def pictures_of(run: PicturedRun, *, share: int, few: bool = False) -> list[Picture]:
    """A run's pictures: the set beside its twin, trigger, triggered images, curves, defenses.

    share: bytes that they may take together, about. few: only the first and the triggered images.
    """
    record, folder = run.record, run.folder
    if record is None:
        return [Picture(title="pictures", alt="", problem=run.problem)]
    if record.kind == "defend":
        text = f"Dot plot of {len(record.defenses)} defenses on this set and its clean twin; "
        return [_file(folder / "defenses.png", "defenses", f"{text}the table has its numbers.")]
    found = [_set(run, record, share // 3)]
    attacked = record.kind == "attack"
    if attacked and not few:
        found.append(_file(folder / "trigger.png", "trigger", _of_trigger(record)))
    if attacked:
        found.append(_file(folder / "triggered.png", "triggered examples", _of_examples(record)))
    if record.kind in ("attack", "distill") and not few:
        found.append(_file(folder / "curves.png", "learning curves", _of_curves(record)))
    return found


def _set(run: PicturedRun, record: Record, share: int) -> Picture:
    """The set beside its clean twin and the difference; alone where it has no twin."""
    folder, what = run.folder, subject(record).replace(" · ", ", ")
    if not record.control:
        text = f"The distilled images, a row for each class: {what}."
        return _file(folder / "distilled.png", "distilled set", text)
    title = "distilled set beside its clean twin"
    try:
        attacked = load_set(folder / "distilled.safetensors")
        control = path_inside(run.root, folder / record.control["folder"])
        if control is None:
            raise RequestError("the clean twin lies outside of this folder")
        twin = load_set(control / "distilled.safetensors")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "twin.png"
            columns, tile = _layout(attacked, share)
            largest = twin_picture(path, attacked, twin, title=what, columns=columns, tile=tile)
            png = path.read_bytes()
    except (RequestError, ValueError) as error:
        return Picture(title=title, alt="", problem=f"not drawn: {' '.join(str(error).split())}")
    rms = record.distilled.get("rms_from_twin")
    apart = "" if rms is None else f", {_number(rms)} root mean square over the whole set"
    text = (
        f"Distilled images by class, {what}: left the set, in the middle its clean twin, right the "
        f"absolute difference, at most {largest:.2f} on a 0 to 1 scale{apart}."
    )
    return Picture(title=title, alt=text, png=png)


def _layout(found: DistilledSet, share: int) -> tuple[int, int]:
    """How many images of a class have room, and how large: fewer rather than blurred ones."""
    column = 3 * min(10, len(found.classes)) * found.batch.images[0].numel() * _BYTES_OF_PIXEL
    fitting = (layout[:2] for layout in _LAYOUTS if layout[2] + layout[0] * column <= share)
    return next(fitting, _LAYOUTS[-1][:2])


def _of_trigger(record: Record) -> str:
    trigger = record.trigger or {}
    text = (
        f"The trigger, kind {trigger.get('kind', '–')}, for target class "
        f"{trigger.get('target_class', '–')}, values {_number(trigger.get('min'))} to "
        f"{_number(trigger.get('max'))} on a 0 to 1 scale, "
        f"L2 norm {_number(trigger.get('l2'))}, L∞ {_number(trigger.get('linf'))}."
    )
    return " ".join([text, *(f"Note: {label}." for label in record.labels)])


def _of_examples(record: Record) -> str:
    trigger = record.trigger or {}
    rate = record.mean("attack_success_rate")
    sent = "" if rate is None else f" Victims send {rate:.0%} of such images to the target."
    return (
        "Test images in three rows: clean, with the trigger, and the difference, with the first "
        f"victim's predictions below; target class {trigger.get('target_class', '–')}. Triggered "
        f"against clean: PSNR {_number(trigger.get('psnr'))} dB, SSIM "
        f"{_number(trigger.get('ssim'))}.{sent}"
    )


def _of_curves(record: Record) -> str:
    steps = record.config.get("iterations")
    seconds = record.timings.get("distil_seconds")
    took = "" if seconds is None else f", which took {duration(seconds)}"
    return f"Learning curves of the distillation over {steps} iterations{took}."


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "–"


def _file(path: Path, title: str, text: str) -> Picture:
    """A PNG of a run's folder, or why there is none."""
    try:
        check_file(path, _FILE_CAP)
        png = path.read_bytes()
        _opened(png).close()
    except RequestError as error:
        return Picture(title=title, alt=text, problem=f"missing: {error}")
    except (OSError, ValueError, SyntaxError) as error:
        return Picture(title=title, alt=text, problem=f"{path}: no picture ({error})")
    return Picture(title=title, alt=text, png=png)


def _opened(png: bytes) -> Image.Image:
    """A PNG of limited size, not yet decoded. Errors: ``ValueError`` and what Pillow raises."""
    image = Image.open(io.BytesIO(png), formats=["PNG"])
    if image.width * image.height > _PIXEL_CAP:
        raise ValueError(f"{image.width}×{image.height} pixels are too many")
    return image


# Fitting ------------------------------------------------------------------------------------------


def fit(pictures: Sequence[Picture], room: int) -> list[EmbeddedPicture]:
    """The pictures as ``data:`` addresses of at most ``room`` bytes together.

    Where together they are too large, the largest are reduced to one common size in bytes. A
    picture without room even then becomes a note.
    """
    whole = [_whole(picture) for picture in pictures]
    cap = _cap([len(each.url) for each in whole], room)
    return [
        each if len(each.url) <= cap else _smaller(picture, cap)
        for picture, each in zip(pictures, whole, strict=True)
    ]


def _cap(sizes: Sequence[int], room: int) -> int:
    """The largest c for which the sum of min(size, c) is at most ``room``."""
    left = len(sizes)
    for size in sorted(sizes):
        if size * left > room:
            return max(0, room // left)
        room, left = room - size, left - 1
    return max(sizes, default=0)


def _whole(picture: Picture) -> EmbeddedPicture:
    """The picture in its own size, with fewer colours: fewer pixels would look worse."""
    if not picture.png:
        return EmbeddedPicture(title=picture.title, alt=picture.alt, problem=picture.problem)
    try:
        image = _opened(picture.png).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        return EmbeddedPicture(
            title=picture.title, alt=picture.alt, problem=f"no picture ({error})"
        )
    return _fitted(picture, image, _palette(image, _COLOURS))


def _smaller(picture: Picture, cap: int) -> EmbeddedPicture:
    """The widest version of at most ``cap`` bytes."""
    image = _opened(picture.png).convert("RGB")
    width = image.width
    while width >= _NARROWEST:
        size = (width, max(1, image.height * width // image.width))
        # By the mean of pixels: sharper resampling rings around the squares of an enlarged small
        # image, and the rings cost more bytes than the removed pixels save.
        small = image if width == image.width else image.resize(size, Image.Resampling.BOX)
        found = _fitted(picture, small, _palette(small, _COLOURS // 4))
        if len(found.url) <= cap:
            return found
        width = int(width * min(_SHRINK, math.sqrt(cap / len(found.url)) * 1.1))
    return EmbeddedPicture(
        title=picture.title, alt=picture.alt, problem="left out: no room in this page"
    )


def _fitted(picture: Picture, image: Image.Image, png: bytes) -> EmbeddedPicture:
    return EmbeddedPicture(
        title=picture.title,
        alt=picture.alt,
        url=f"data:image/png;base64,{base64.b64encode(png).decode()}",
        width=image.width,
        height=image.height,
    )


def _palette(image: Image.Image, colours: int) -> bytes:
    """As PNG with a palette chosen from a sample of the pixels, which is ten times as fast."""
    step = (max(1, image.width // 3), max(1, image.height // 3))
    few = image.resize(step, Image.Resampling.NEAREST).quantize(colours)
    buffer = io.BytesIO()
    image.quantize(palette=few, dither=Image.Dither.NONE).save(buffer, "PNG", compress_level=7)
    return buffer.getvalue()
