"""Image files as arrays: decoded once, then kept in a cache.

Every fault in a file becomes a one-line ``RequestError`` that names the file. The files may be
malicious: only a few formats are tried, and sizes are checked before memory is taken for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..types import RequestError
from .raw import check_size, one_line, pixel_bytes

ENDINGS: Final = (
    *(".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".tif", ".tiff", ".webp"),
)
"""The endings of files that are read as images, in any capitalisation."""

# Of Pillow's other formats some start programs (EPS), and most are untested here.
_FORMATS: Final = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION: Final = 0x0112  # the tag's number in EXIF
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN_MODES: Final = ("1", "L", "P", "RGB")
_ALPHA_MODES: Final = ("LA", "La", "PA", "RGBA", "RGBa")

_Pixels = NDArray[np.uint8]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedImages:
    """Decoded files.

    pixels: ``uint8 (N, C, H, W)``. changes: in how many files each change was made that the viewer
    of a file would not expect, such as a dropped transparency.
    """

    pixels: Tensor
    changes: Counter[str]


def decode_files(
    files: Sequence[str], size: int | None, cache: Path, progress: bool
) -> DecodedImages:
    """The images in ``files``; C is 1 if all are greyscale, else 3.

    size: every image is resized to this square (antialiased, bilinear); ``None`` keeps the files'
    own size, which must then be one and the same.
    cache: folder for the decoded pixels; a file there is used while paths, sizes and times of all
    ``files`` are unchanged. Where it can't be written there is no cache.

    Raises RequestError for an unreadable image, mixed sizes, more than ``MAX_BYTES``.
    """
    key = hashlib.sha256(repr(("v2", size)).encode())
    for file in files:
        try:
            state = os.stat(file)  # noqa: PTH116 -- a Path for each of 60,000 files costs a second
        except OSError as error:
            raise RequestError(f"{file}: not readable: {one_line(error)}") from error
        if not stat.S_ISREG(state.st_mode):  # reading a pipe would wait for ever
            raise RequestError(f"{file}: not a regular file")
        key.update(repr((os.path.abspath(file), state.st_size, state.st_mtime_ns)).encode())  # noqa: PTH100
    stored = cache / f"{key.hexdigest()[:32]}.npz"
    # A cache that can't be read, or that holds something else, is ignored.
    with contextlib.suppress(Exception), stored.open("rb") as opened:
        content = np.load(opened, allow_pickle=False)
        images, changes = content["images"], Counter(map(str, content["changes"]))
        if images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(files):
            return DecodedImages(pixels=torch.from_numpy(images), changes=changes)
    images, changes = _decode_all(files, size, progress)
    _store(stored, images, changes)
    return DecodedImages(pixels=torch.from_numpy(images), changes=changes)


def decode_uncached(files: Sequence[str]) -> DecodedImages:
    """As ``decode_files`` at the files' own size, without a cache: for files that are read once."""
    for file in files:
        try:
            regular = stat.S_ISREG(os.stat(file).st_mode)  # noqa: PTH116 -- as in decode_files
        except OSError as error:
            raise RequestError(f"{file}: not readable: {one_line(error)}") from error
        if not regular:
            raise RequestError(f"{file}: not a regular file")
    images, changes = _decode_all(files, None, False)
    return DecodedImages(pixels=torch.from_numpy(images), changes=changes)


def decode_contents(names: Sequence[str], contents: Sequence[bytes]) -> DecodedImages:
    """The images in the ``contents`` of files, at their own size; ``names`` are for messages."""
    files = [_Content(name, content) for name, content in zip(names, contents, strict=True)]
    images, changes = _decode_all(files, None, False)
    return DecodedImages(pixels=torch.from_numpy(images), changes=changes)


@dataclass(frozen=True)
class _Content:
    """A file's content under a name."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


def _decode_all(
    files: Sequence[str | _Content], size: int | None, progress: bool
) -> tuple[_Pixels, Counter[str]]:
    images = np.empty((0, 1, 0, 0), dtype=np.uint8)
    changes: Counter[str] = Counter()
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(files), desc="decoding", unit="img", disable=not progress) as bar,
    ):
        # In portions, so that decoding can't run ahead of the copy and hold every image twice;
        # in groups, since a task for each small file would cost half as much as its decoding.
        for start in range(0, len(files), 1024):
            portion = files[start : start + 1024]
            groups = [portion[i : i + 64] for i in range(0, len(portion), 64)]
            decoded = chain.from_iterable(pool.map(partial(_decode_group, size=size), groups))
            for row, (file, (image, made)) in enumerate(zip(portion, decoded, strict=True), start):
                if row == 0:
                    where = f"{file} and {len(files) - 1} more"
                    check_size(where, pixel_bytes(len(files) * image.size))
                    images = np.empty((len(files), *image.shape), dtype=np.uint8)
                if image.shape[1:] != images.shape[2:]:
                    raise RequestError(
                        f"{file}: {image.shape[1]}x{image.shape[2]} pixels where {files[0]} has "
                        f"{images.shape[2]}x{images.shape[3]}; mixed sizes need image_size"
                    )
                if len(image) > images.shape[1]:  # the first colour image among greyscale ones
                    where = f"{file} and {len(files) - 1} more"
                    check_size(where, pixel_bytes(3 * images.size))
                    images = np.repeat(images, 3, axis=1)
                images[row] = image
                changes.update(made)
            bar.update(len(portion))
    return images, changes


def _decode_group(
    files: Sequence[str | _Content], size: int | None
) -> list[tuple[_Pixels, list[str]]]:
    return [_decode(file, size) for file in files]


def _decode(file: str | _Content, size: int | None) -> tuple[_Pixels, list[str]]:
    """One image, ``uint8 (1 or 3, H, W)``, and the changes that were made to it."""
    try:
        source = file if isinstance(file, str) else BytesIO(file.content)
        with Image.open(source, formats=_FORMATS) as opened:
            if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
                raise RequestError(f"{file}: mode {opened.mode}; only 8-bit images are read")
            image, changes = _plain(opened)
    except RequestError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type
        raise RequestError(f"{file}: not a readable image: {one_line(error)}") from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), changes


def _plain(opened: Image.Image) -> tuple[Image.Image, list[str]]:
    """An opened file as ``L`` or ``RGB``, upright, and the changes that this took."""
    changes = []
    if _raw_mode(opened).endswith((";16B", ";16L", ";16N")):
        changes.append("16 bits a channel reduced to 8")
    opened.load()
    image: Image.Image = opened
    if opened.mode in _ALPHA_MODES or "transparency" in opened.info:
        if opened.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            changes.append("transparency dropped, the colour below it kept")
    elif opened.mode not in _PLAIN_MODES:
        changes.append(f"converted from {opened.mode} to RGB")
    if opened.mode == "P":
        image = opened.convert("RGBA")  # straight to RGB warns where it has transparency
    image = image.convert("L" if opened.mode in ("L", "1") else "RGB")
    turn = _turn(opened)
    if turn is not None:
        changes.append("turned upright, as their EXIF orientation says")
        image = image.transpose(turn)
    if getattr(opened, "is_animated", False):
        changes.append("only the first of several frames read")
    return image, changes


def _raw_mode(opened: Image.Image) -> str:
    """How a file that is not loaded yet stores its pixels, in Pillow's words."""
    for *_, options in getattr(opened, "tile", ()):
        return options if isinstance(options, str) else str(next(iter(options), ""))
    return ""


def _turn(opened: Image.Image) -> Image.Transpose | None:
    """What turns the image upright; damaged EXIF counts as none. TIFF is upright once loaded."""
    with contextlib.suppress(Exception):
        return _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
    return None


def _store(path: Path, images: _Pixels, changes: Counter[str]) -> None:
    """Write the cache under a temporary name, then rename; do nothing where it can't be written."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, images=images, changes=np.array([*changes.elements()], dtype=np.str_))
        temporary.replace(path)
    except OSError:
        pass
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
