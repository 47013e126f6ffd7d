"""Readers for image sets in the user's files: IDX and image folders.

Every fault in a file becomes a one-line ``RequestError`` that names the file. The files may be
malicious: nothing is unpickled, and sizes are checked before memory is taken for them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..types import RequestError

MAX_BYTES = 8 * 2**30
"""The most bytes of pixels that one set may hold; more is refused before it is allocated."""

TEST_SHARE = 0.2
"""Share of the rows that becomes the test set where a source has no split of its own."""

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@final
@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What a reader gets: the data set's name, where to look, how to load.

    path: the part of the name after the colon. roots: data folders in search order; the first also
    takes downloads and the cache.
    image_size: resize to this square, ``None`` keeps the files' size.
    """

    name: str
    path: str
    roots: tuple[Path, ...]
    image_size: int | None
    download: bool
    progress: bool


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RawSet:
    """Images as the files hold them, ``uint8`` or ``float32`` NCHW, with ``int64 (N,)`` labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]


def one_line(error: BaseException) -> str:
    """The error's text on a single line; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def stratified(where: str, labels: Tensor, test_size: float | int) -> tuple[Tensor, Tensor]:
    """The rows (train, test) of the fixed, stratified split; both ``int64``, train first.

    Raises RequestError, naming ``where``, if there are too few rows for every class to be split.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    rows = np.arange(len(labels))
    try:
        train, test = train_test_split(
            rows, test_size=test_size, random_state=0, stratify=labels.numpy()
        )
    except ValueError as error:
        raise RequestError(
            f"{where}: too few images to split into train and test: {one_line(error)}"
        ) from error
    return torch.from_numpy(train), torch.from_numpy(test)


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The unsigned bytes of an IDX file (gzipped if it ends in ``.gz``), in the file's shape.

    Not torchvision's reader: it neither opens gzip nor tells a short file from a good one.
    Raises RequestError for an unreadable or truncated file, a wrong header, surplus bytes.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:4] != bytes((0, 0, 8, ndim)):
                raise RequestError(
                    f"{path}: not an IDX file of {ndim}-dimensional bytes "
                    f"(it starts with {header[:4].hex() or 'nothing'}, not 000008{ndim:02x})"
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            size = math.prod(shape)
            check_size(str(path), size)
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: not readable: {one_line(error)}") from error
    if len(body) != size:
        held = f"{len(body)}" if len(body) < size else "more"
        raise RequestError(f"{path}: its header promises {size} bytes of data, it holds {held}")
    return np.frombuffer(bytearray(body), dtype=np.uint8).reshape(shape)


def check_size(where: str, size: int) -> None:
    if size > MAX_BYTES:
        raise RequestError(
            f"{where}: {size / 2**30:.1f} GiB of data; at most {MAX_BYTES / 2**30:.0f} GiB is read"
        )


# --- image files ----------------------------------------------------------------------------


def decode_files(files: Sequence[str], size: int | None, cache: Path, progress: bool) -> Tensor:
    """The images in ``files``, ``uint8 (N, C, H, W)``; C is 1 if all are greyscale, else 3.

    size: every image is resized to this square (antialiased, bilinear); ``None`` keeps the files'
    own size, which must then be one and the same.
    cache: folder for the decoded pixels; a file there is used while paths, sizes and times of all
    ``files`` are unchanged. Where it can't be written there is no cache.

    Raises RequestError for an unreadable image, mixed sizes, more than ``MAX_BYTES``.
    """
    key = hashlib.sha256(repr(("v1", size)).encode())
    for file in files:
        try:
            state = os.stat(file)  # noqa: PTH116 -- a Path for each of 60,000 files costs a second
        except OSError as error:
            raise RequestError(f"{file}: not readable: {one_line(error)}") from error
        key.update(repr((os.path.abspath(file), state.st_size, state.st_mtime_ns)).encode())  # noqa: PTH100
    stored = cache / f"{key.hexdigest()[:32]}.npz"
    # A cache that can't be read, or that holds something else, is ignored.
    with contextlib.suppress(Exception), stored.open("rb") as opened:
        images = np.load(opened, allow_pickle=False)["images"]
        if images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(files):
            return torch.from_numpy(images)
    images = _decode_all(files, size, progress)
    _store(stored, images)
    return torch.from_numpy(images)


def _decode_all(files: Sequence[str], size: int | None, progress: bool) -> NDArray[np.uint8]:
    images = np.empty((0, 1, 0, 0), dtype=np.uint8)
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
            for row, (file, image) in enumerate(zip(portion, decoded, strict=True), start):
                if row == 0:
                    check_size(f"{file} and {len(files) - 1} more", len(files) * image.size)
                    images = np.empty((len(files), *image.shape), dtype=np.uint8)
                if image.shape[1:] != images.shape[2:]:
                    raise RequestError(
                        f"{file}: {image.shape[1]}x{image.shape[2]} pixels where {files[0]} has "
                        f"{images.shape[2]}x{images.shape[3]}; mixed sizes need image_size"
                    )
                if len(image) > images.shape[1]:  # the first colour image among greyscale ones
                    check_size(f"{file} and {len(files) - 1} more", 3 * images.size)
                    images = np.repeat(images, 3, axis=1)
                images[row] = image
            bar.update(len(portion))
    return images


def _decode_group(files: Sequence[str], size: int | None) -> list[NDArray[np.uint8]]:
    return [_decode(file, size) for file in files]


def _decode(file: str, size: int | None) -> NDArray[np.uint8]:
    """One image, ``uint8 (1 or 3, H, W)``."""
    try:
        with Image.open(file) as opened:
            if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
                raise RequestError(f"{file}: mode {opened.mode}; only 8-bit images are read")
            image: Image.Image = opened
            if opened.mode == "P":
                image = opened.convert("RGBA")  # straight to RGB warns where it has transparency
            image = image.convert("L" if opened.mode in ("L", "1") else "RGB")
    except RequestError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type
        raise RequestError(f"{file}: not a readable image: {one_line(error)}") from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _store(path: Path, images: NDArray[np.uint8]) -> None:
    """Write the cache under a temporary name, then rename; do nothing where it can't be written."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, images=images)
        temporary.replace(path)
    except OSError:
        pass
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def load_folder(request: DataRequest) -> RawSet:
    """``folder:PATH``: ``PATH/CLASS/*`` or ``PATH/train/CLASS/*`` with ``PATH/test/CLASS/*``.

    A relative PATH is looked for in the working directory, then in the folders for data. Classes
    are the sub-folders in alphabetical order. Without train/ and test/ a fixed stratified
    fifth of the images is the test set. Nothing is written below PATH.

    Raises RequestError: no such folder, fewer than 2 classes, a class without images, other
    classes in test than in train, and whatever ``decode_files`` refuses.
    """
    given = Path(request.path).expanduser()
    places = [given, *(root / given for root in request.roots)]  # an absolute path stays as it is
    top = next((place for place in places if place.is_dir()), None)
    if top is None:
        looked = ", ".join(dict.fromkeys(map(str, places)))
        raise RequestError(f"{given}: no such folder (looked for {looked})")
    # A folder named "train" is a split only if it has folders of its own: it may be a class.
    splits = [s for s in ("train", "test") if any(p.is_dir() for p in (top / s).glob("*"))]
    if len(splits) == 1:
        raise RequestError(f"{top}: has {splits[0]}/ only; a split tree has train/ and test/")
    cache = request.roots[0] / ".cache"
    if not splits:
        classes, files, labels = _tree(top)
        images = decode_files(files, request.image_size, cache, request.progress)
        train, test = stratified(str(top), labels, TEST_SHARE)
        return RawSet(
            train=(images[train], labels[train]), test=(images[test], labels[test]), classes=classes
        )
    classes, files, labels = _tree(top / "train")
    test_classes, test_files, test_labels = _tree(top / "test")
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise RequestError(f"{top}: train/ and test/ differ in the classes {some(odd)}")
    images = decode_files(files + test_files, request.image_size, cache, request.progress)
    return RawSet(
        train=(images[: len(files)], labels),
        test=(images[len(files) :], test_labels),
        classes=classes,
    )


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _tree(top: Path) -> tuple[tuple[str, ...], list[str], Tensor]:
    """The classes below ``top``, their image files in a fixed order, and the files' labels."""
    folders = sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise RequestError(
            f"{top}: {len(folders)} class folders; an image folder has at least 2, one a class"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(
            os.path.join(place, name)  # noqa: PTH118 -- a Path for each file costs a second
            for place, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(_EXTENSIONS) and not name.startswith(".")
        )
        if not found:
            raise RequestError(f"{folder}: a class without images ({', '.join(_EXTENSIONS)})")
        files += found
        labels += [label] * len(found)
    return tuple(p.name for p in folders), files, torch.tensor(labels)
