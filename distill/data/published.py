"""Published image sets: found on the machine, or fetched by torchvision; and scikit-learn's digits.

torchvision checks MD5 sums before it unpickles anything. Every fault becomes a one-line
``RequestError`` that names the file.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import shutil
import socket
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from ..types import RequestError
from .idx import read_idx
from .images import decode_files
from .raw import DataRequest, RawSet, one_line, stratified

SYSTEM_DIR = Path("/usr/share/datasets")
"""Where Debian's ``dataset-*`` packages put their files."""

NETWORK_TIMEOUT = 6.0
"""Seconds a connection may stay silent: torchvision sets no limit, and would hang offline."""


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
    read: Callable[[Any, Path, DataRequest], RawSet]
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


def _load_published(spec: Published, request: DataRequest) -> RawSet:
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


def _read_published(spec: Published, folder: Path, request: DataRequest) -> RawSet:
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


def _download(spec: Published, request: DataRequest, archive: Path | None) -> str | None:
    """Fetch and unpack the set into the first data folder; what went wrong, or ``None``.

    torchvision works in a temporary folder, and only whole parts are moved out of it: it writes
    under the final names, and for MNIST and GTSRB it later reads those files unchecked.
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


def read_cifar(spec: Published, folder: Path, _: DataRequest) -> RawSet:
    train, test = (spec.open(folder, split) for split in ("train", "test"))
    return RawSet(
        train=_labelled(train.data.transpose(0, 3, 1, 2), train.targets),
        test=_labelled(test.data.transpose(0, 3, 1, 2), test.targets),
        classes=tuple(train.classes),
    )


def read_arrays(classes: tuple[str, ...], spec: Published, folder: Path, _: DataRequest) -> RawSet:
    """SVHN and STL10: torchvision holds them as NCHW."""
    train, test = (spec.open(folder, split) for split in ("train", "test"))
    return RawSet(
        train=_labelled(train.data, train.labels),
        test=_labelled(test.data, test.labels),
        classes=classes,
    )


def read_gtsrb(spec: Published, folder: Path, request: DataRequest) -> RawSet:
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
    ).pixels
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


def read_mnist(spec: Published, folder: Path, _: DataRequest) -> RawSet:
    arrays = []
    for part, ndim in zip(spec.parts, (3, 1, 3, 1), strict=True):
        path = spec.part(folder, part) or folder / part
        arrays.append(read_idx(path, ndim))
        if ndim == 3 and arrays[-1].shape[1:] != (28, 28):
            raise RequestError(f"{path}: images of {arrays[-1].shape[1:]}, not 28x28")
        if ndim == 1 and len(arrays[-1]) != len(arrays[-2]):
            raise RequestError(f"{path}: {len(arrays[-1])} labels for {len(arrays[-2])} images")
    for kind, first in _FIRST_TEST_LABELS.items():
        # MNIST and Fashion-MNIST name their files alike: one would silently be read as the other.
        if kind != spec.kind and tuple(arrays[3][: len(first)].tolist()) == first:
            raise RequestError(f"{folder}: these are the files of {kind}, not of {spec.kind}")
    return RawSet(
        train=_labelled(arrays[0][:, None], arrays[1]),
        test=_labelled(arrays[2][:, None], arrays[3]),
        classes=tuple(spec.source.classes),
    )


def load_digits(_: DataRequest) -> RawSet:
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


def published(kind: str, *parts: str, **fields: Any) -> Callable[[DataRequest], RawSet]:
    return partial(_load_published, Published(kind=kind, parts=parts, **fields))
