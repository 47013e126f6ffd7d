"""Readers for image sets that stand in files: IDX, image folders, npz, torchvision's sets.

Every fault in a file becomes a one-line ``RequestError`` that names the file. The files may be
hostile: nothing is unpickled before torchvision has checked its MD5 sum, and sizes are checked
before memory is taken for them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import shutil
import socket
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .types import RequestError

MAX_BYTES = 8 * 2**30
"""The most bytes of pixels that one set may hold; more is refused before it is allocated."""

SYSTEM_DIR = Path("/usr/share/datasets")
"""Where Debian's ``dataset-*`` packages put their files."""

NETWORK_TIMEOUT = 6.0
"""Seconds a connection may stay silent: torchvision sets no limit, and would hang offline."""

TEST_SHARE = 0.2
"""Share of the rows that becomes the test set where a source has no split of its own."""

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SPLIT_KEYS = ("x_train", "y_train", "x_test", "y_test")
_POOL_KEYS = ("x", "y")


@final
@dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted of a reader: the part after the colon in the name, and where to look.

    roots: data folders in search order; the first also takes downloads and the cache.
    image_size: the square size wanted, ``None`` for the files' own.
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
            _check_size(str(path), size)
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: not readable: {one_line(error)}") from error
    if len(body) != size:
        held = f"{len(body)}" if len(body) < size else "more"
        raise RequestError(f"{path}: its header promises {size} bytes of data, it holds {held}")
    return np.frombuffer(bytearray(body), dtype=np.uint8).reshape(shape)


def _check_size(where: str, size: int) -> None:
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
    # A cache that can't be read, or that holds something else, is as good as none.
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
                    _check_size(f"{file} and {len(files) - 1} more", len(files) * image.size)
                    images = np.empty((len(files), *image.shape), dtype=np.uint8)
                if image.shape[1:] != images.shape[2:]:
                    raise RequestError(
                        f"{file}: {image.shape[1]}x{image.shape[2]} pixels where {files[0]} has "
                        f"{images.shape[2]}x{images.shape[3]}; mixed sizes need image_size"
                    )
                if len(image) > images.shape[1]:  # the first colour image among greyscale ones
                    _check_size(f"{file} and {len(files) - 1} more", 3 * images.size)
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
    except Exception as error:  # Pillow's plugins raise what they like on a broken file
        raise RequestError(f"{file}: not a readable image: {one_line(error)}") from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _store(path: Path, images: NDArray[np.uint8]) -> None:
    """Write the cache under a temporary name, then rename; silently not at all if it can't be."""
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


def load_folder(request: Request) -> RawSet:
    """``folder:PATH``: ``PATH/CLASS/*`` or ``PATH/train/CLASS/*`` with ``PATH/test/CLASS/*``.

    Classes are the sub-folders in alphabetical order. Without train/ and test/ a fixed stratified
    fifth of the images is the test set. Nothing is written below PATH.

    Raises RequestError: no such folder, fewer than 2 classes, a class without images, other
    classes in test than in train, and whatever ``decode_files`` refuses.
    """
    top = Path(request.path).expanduser()
    if not top.is_dir():
        raise RequestError(f"{top}: no such folder")
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
        raise RequestError(f"{top}: train/ and test/ differ in the classes {_some(odd)}")
    images = decode_files(files + test_files, request.image_size, cache, request.progress)
    return RawSet(
        train=(images[: len(files)], labels),
        test=(images[len(files) :], test_labels),
        classes=classes,
    )


def _some(names: Sequence[str]) -> str:
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


# --- npz ------------------------------------------------------------------------------------


def load_npz(request: Request) -> RawSet:
    """``npz:PATH``: arrays ``x_train, y_train, x_test, y_test``, or ``x, y`` (fixed 80/20 split).

    Images: ``uint8``, or floating point in [0, 1]; NHWC, NCHW (C is 1 or 3) or NHW. Labels:
    integers 0 to k - 1, ``(N,)``. ``classes`` (k strings) is optional.

    Raises RequestError naming file and fault: missing keys, pickled objects, a truncated file,
    more than ``MAX_BYTES``, a shape or layout that isn't clear, NaN, values outside [0, 1], labels.
    """
    path = Path(request.path).expanduser()
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    try:
        keys = _npz_keys(path)
        with path.open("rb") as opened:  # numpy leaves a path's file open if the zip is broken
            content = np.load(opened, allow_pickle=False)
            arrays = {key: content[key] for key in keys}
    except RequestError:
        raise
    except Exception as error:  # zip, zlib and npy faults share no base class
        raise RequestError(f"{path}: not a readable npz file: {one_line(error)}") from error
    pairs = {
        x: (_npz_images(path, x, arrays[x]), _npz_labels(path, y, arrays[y], len(arrays[x])))
        for x, y in (("x_train", "y_train"), ("x_test", "y_test"), ("x", "y"))
        if x in arrays
    }
    if "x" in pairs:
        images, labels = pairs["x"]
        rows = stratified(str(path), labels, TEST_SHARE)
        train, test = ((images[part], labels[part]) for part in rows)
    else:
        train, test = pairs["x_train"], pairs["x_test"]
        if train[0].shape[1:] != test[0].shape[1:]:
            raise RequestError(
                f"{path}: x_train has images {tuple(train[0].shape[1:])} (C, H, W), "
                f"x_test has {tuple(test[0].shape[1:])}"
            )
    count = int(train[1].max()) + 1
    classes = _npz_classes(path, arrays["classes"]) if "classes" in arrays else None
    # A stray huge label is left to the check of the classes: it must not make names without end.
    return RawSet(
        train=train,
        test=test,
        classes=classes or tuple(str(label) for label in range(min(count, len(train[1]) + 1))),
    )


def _npz_keys(path: Path) -> tuple[str, ...]:
    """The keys to read, once the headers have shown that their arrays are plain and not too big."""
    total = 0
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        keys = next((k for k in (_SPLIT_KEYS, _POOL_KEYS) if members.keys() >= set(k)), None)
        if keys is None:
            raise RequestError(
                f"{path}: has the keys {_some(sorted(members)) or 'none'}; "
                f"an npz set has {', '.join(_SPLIT_KEYS)}, or {', '.join(_POOL_KEYS)}"
            )
        if "classes" in members:
            keys = (*keys, "classes")
        for key in keys:
            with archive.open(members[key]) as file:
                reader: Any = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[np.lib.format.read_magic(file)]
                shape, _, dtype = reader(file)
                if dtype.hasobject:
                    raise RequestError(f"{path}: {key} holds Python objects, which are not read")
                size = math.prod(shape) * dtype.itemsize
                if members[key].file_size != file.tell() + size:
                    raise RequestError(f"{path}: {key} is truncated: {shape} {dtype} is promised")
            total += size
            _check_size(f"{path}: {key}", total)
    return keys


def _npz_images(path: Path, key: str, array: NDArray[Any]) -> Tensor:
    """``uint8`` or ``float32`` NCHW."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise RequestError(
            f"{path}: {key} is {array.dtype}; images are uint8, or floating point in [0, 1]"
        )
    if array.size == 0:
        raise RequestError(f"{path}: {key} is empty, its shape is {array.shape}")
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise RequestError(f"{path}: {key} holds NaN or infinite values")
        if low < 0 or high > 1:
            raise RequestError(f"{path}: {key} holds values {low:g} to {high:g}; [0, 1] is allowed")
        array = array.astype(np.float32)
    if array.ndim == 3:
        return torch.from_numpy(np.ascontiguousarray(array[:, None]))
    first = array.ndim == 4 and array.shape[1] in (1, 3)
    last = array.ndim == 4 and array.shape[3] in (1, 3)
    if first == last:
        fault = "could be NHWC or NCHW" if first else "is none of NHWC, NCHW (C is 1 or 3), NHW"
        raise RequestError(f"{path}: {key} has the shape {array.shape}, which {fault}")
    return torch.from_numpy(np.ascontiguousarray(array if first else array.transpose(0, 3, 1, 2)))


def _npz_labels(path: Path, key: str, array: NDArray[Any], rows: int) -> Tensor:
    if array.dtype.kind not in "iu" or array.shape != (rows,):
        raise RequestError(
            f"{path}: {key} is {array.dtype} {array.shape}; labels are integers of shape ({rows},)"
        )
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise RequestError(f"{path}: {key} holds the label {array.min()}; labels begin at 0")
    return torch.from_numpy(array.astype(np.int64))


def _npz_classes(path: Path, array: NDArray[Any]) -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.ndim != 1 or array.size < 2:
        raise RequestError(
            f"{path}: classes is {array.dtype} {array.shape}; at least 2 strings, one a class"
        )
    return tuple(str(name) for name in array)


# --- published sets -------------------------------------------------------------------------

_Split = Literal["train", "test"]


@final
@dataclass(frozen=True, kw_only=True)
class Published:
    """A set that torchvision can fetch: what its files are called and who reads them.

    kind: class in ``torchvision.datasets``. parts: paths, below ``home``, that make the set
    whole; ``home`` is where torchvision puts them below its root.
    """

    kind: str
    parts: tuple[str, ...]
    read: Callable[[Any, Path, Request], RawSet]
    home: str = ""
    suffixes: tuple[str, ...] = ("",)
    split_key: Literal["train", "split"] = "split"
    hint: str = ""

    @property
    def source(self) -> Any:
        """The torchvision class."""
        from torchvision import datasets  # slow to import, and the default set needs none of it

        return getattr(datasets, self.kind)

    def open(self, root: Path, split: _Split, *, download: bool = False) -> Any:
        """torchvision's data set for one split."""
        value = split == "train" if self.split_key == "train" else split
        with warnings.catch_warnings():
            # Early numpy 2.4 warns of the published CIFAR files, pickled under Python 2.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            return self.source(str(root), **{self.split_key: value}, download=download)

    def part(self, folder: Path, part: str) -> Path | None:
        """The file or folder ``part`` as it stands in ``folder``."""
        paths = (folder / f"{part}{suffix}" for suffix in self.suffixes)
        return next((path for path in paths if path.exists()), None)


def _load_published(spec: Published, request: Request) -> RawSet:
    """Read a published set from the first folder that has it; download it if none has.

    Raises RequestError: the set is nowhere and can't be downloaded; a file of it is corrupt.
    """
    subfolders = dict.fromkeys((request.name, spec.home, ""))
    folders = [root / sub for root in request.roots for sub in subfolders]
    folders.append(SYSTEM_DIR / request.name)
    folder = _whole(spec, folders)
    fault = "downloading is switched off"
    if folder is None:
        archive = _good_archive(spec, request.roots[0])
        if request.download or archive:
            fault = f"the download failed: {_download(spec, request, archive)}"
            folder = _whole(spec, folders)
    if folder is None:
        raise RequestError(
            f"{request.name} not found: looked for {', '.join(spec.parts)} in "
            f"{', '.join(str(folder) for folder in folders)}; {fault}; "
            f"put the files into one of these folders{spec.hint}"
        )
    return _read_published(spec, folder, request)


def _whole(spec: Published, folders: Sequence[Path]) -> Path | None:
    """The first folder in which no part of the set is missing."""
    return next((f for f in folders if all(spec.part(f, part) for part in spec.parts)), None)


def _read_published(spec: Published, folder: Path, request: Request) -> RawSet:
    try:
        return spec.read(spec, folder, request)
    except RequestError:
        raise
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        from torchvision.datasets.utils import check_integrity

        bad = [path for path, md5 in _sums(spec, folder) if not check_integrity(path, md5)]
        where = bad[0] if bad else folder
        fault = "missing, or its MD5 sum is wrong" if bad else one_line(error)
        raise RequestError(
            f"{where}: not a good file of {request.name}: {fault}; delete {folder / spec.parts[0]} "
            "to have the set downloaded afresh"
        ) from error


def _sums(spec: Published, folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of the set with the MD5 sums that torchvision holds them to."""
    source = spec.source
    base = folder / getattr(source, "base_folder", "")
    for name, md5 in getattr(source, "train_list", []) + getattr(source, "test_list", []):
        yield base / name, md5
    if meta := getattr(source, "meta", None):
        yield base / meta["filename"], meta["md5"]
    for split, (_, name, md5) in getattr(source, "split_list", {}).items():
        if split in ("train", "test"):
            yield base / name, md5


def _good_archive(spec: Published, root: Path) -> Path | None:
    """The set's archive as published, if the user has put it into ``root``."""
    from torchvision.datasets.utils import check_integrity

    name, md5 = (getattr(spec.source, key, None) for key in ("filename", "tgz_md5"))
    return root / name if name and md5 and check_integrity(root / name, md5) else None


def _download(spec: Published, request: Request, archive: Path | None) -> str | None:
    """Fetch and unpack the set into the first data folder; what went wrong, or ``None``.

    torchvision works in a temporary folder and only whole parts are moved out of it: it writes
    under the final names, and for MNIST and GTSRB later takes whatever stands there as good.
    """
    root = request.roots[0]
    timeout = socket.getdefaulttimeout()
    log = sys.stderr if request.progress else io.StringIO()
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".download-", dir=root))
        try:
            if archive is not None:
                (temporary / archive.name).symlink_to(archive.resolve())
            socket.setdefaulttimeout(NETWORK_TIMEOUT)
            with contextlib.redirect_stderr(log):
                for split in ("train", "test"):
                    spec.open(temporary, split, download=True)
            for part in spec.parts:
                target = root / spec.home / part
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    (temporary / spec.home / part).replace(target)
        finally:
            socket.setdefaulttimeout(timeout)
            shutil.rmtree(temporary, ignore_errors=True)
    except (
        RuntimeError,
        OSError,  # URLError and timeouts are among them
        EOFError,
        ValueError,
        http.client.HTTPException,
        tarfile.TarError,
        zlib.error,
    ) as error:
        return one_line(error)
    return None


def _labelled(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """numpy's images (NCHW, any strides) and labels as tensors."""
    return (
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(np.asarray(labels).astype(np.int64)),
    )


def read_cifar(spec: Published, folder: Path, _: Request) -> RawSet:
    train, test = (spec.open(folder, split) for split in ("train", "test"))
    return RawSet(
        train=_labelled(train.data.transpose(0, 3, 1, 2), train.targets),
        test=_labelled(test.data.transpose(0, 3, 1, 2), test.targets),
        classes=tuple(train.classes),
    )


def read_arrays(classes: tuple[str, ...], spec: Published, folder: Path, _: Request) -> RawSet:
    """SVHN and STL10: torchvision holds them as NCHW."""
    train, test = (spec.open(folder, split) for split in ("train", "test"))
    return RawSet(
        train=_labelled(train.data, train.labels),
        test=_labelled(test.data, test.labels),
        classes=classes,
    )


def read_gtsrb(spec: Published, folder: Path, request: Request) -> RawSet:
    train, test = (spec.open(folder, split)._samples for split in ("train", "test"))
    for path, label in train:
        # torchvision numbers the folders it finds, so one that is missing shifts all labels.
        if Path(path).parent.name != f"{label:05d}":
            raise RequestError(f"{path}: class folder {label:05d} was expected; one is missing")
    images = decode_files(
        [path for path, _ in train + test],
        request.image_size or 32,
        request.roots[0] / ".cache",
        request.progress,
    )
    labels = torch.tensor([label for _, label in train + test])
    return RawSet(
        train=(images[: len(train)], labels[: len(train)]),
        test=(images[len(train) :], labels[len(train) :]),
        classes=tuple(f"{label:05d}" for label in range(43)),
    )


_FIRST_TEST_LABELS = {
    "MNIST": (7, 2, 1, 0, 4, 1, 4, 9, 5, 9),
    "FashionMNIST": (9, 2, 1, 1, 6, 1, 4),
}


def read_mnist(spec: Published, folder: Path, _: Request) -> RawSet:
    arrays = []
    for part, ndim in zip(spec.parts, (3, 1, 3, 1), strict=True):
        path = spec.part(folder, part) or folder / part
        arrays.append(read_idx(path, ndim))
        if ndim == 3 and arrays[-1].shape[1:] != (28, 28):
            raise RequestError(f"{path}: images of {arrays[-1].shape[1:]}, not 28x28")
        if ndim == 1 and len(arrays[-1]) != len(arrays[-2]):
            raise RequestError(f"{path}: {len(arrays[-1])} labels for {len(arrays[-2])} images")
    for kind, first in _FIRST_TEST_LABELS.items():
        # MNIST and Fashion-MNIST name their files alike: one would silently pass for the other.
        if kind != spec.kind and tuple(arrays[3][: len(first)].tolist()) == first:
            raise RequestError(f"{folder}: these are the files of {kind}, not of {spec.kind}")
    return RawSet(
        train=_labelled(arrays[0][:, None], arrays[1]),
        test=_labelled(arrays[2][:, None], arrays[3]),
        classes=tuple(spec.source.classes),
    )


def load_digits(_: Request) -> RawSet:
    """scikit-learn's digits: pixels 0 to 16, scaled to [0, 1]; a fixed split with 500 test rows."""
    from sklearn import datasets  # slow to import

    content = datasets.load_digits()
    images = torch.from_numpy(content.images / 16).to(torch.float32)[:, None]
    labels = torch.from_numpy(content.target.astype(np.int64))
    train, test = stratified("digits", labels, 500)
    return RawSet(
        train=(images[train], labels[train]),
        test=(images[test], labels[test]),
        classes=DIGIT_NAMES,
    )


DIGIT_NAMES = tuple("0123456789")
STL10_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
IDX_FILES = tuple(
    f"{split}-{what}-ubyte"
    for split in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
)
GTSRB_FILES = ("GTSRB/Training", "GTSRB/Final_Test/Images", "GT-final_test.csv")


def published(kind: str, *parts: str, **fields: Any) -> Callable[[Request], RawSet]:
    return partial(_load_published, Published(kind=kind, parts=parts, **fields))
