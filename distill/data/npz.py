"""The reader of ``npz:PATH``: numpy's archives, without its pickles.

Every fault becomes a one-line ``RequestError`` that names the file and the key.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..class_names import MAX_CLASSES
from ..types import RequestError
from .raw import (
    TEST_SHARE,
    DataRequest,
    RawSet,
    check_size,
    one_line,
    pixel_bytes,
    some,
    stratified,
)

_SPLIT_KEYS = ("x_train", "y_train", "x_test", "y_test")
_POOL_KEYS = ("x", "y")


def load_npz(request: DataRequest) -> RawSet:
    """``npz:PATH``: arrays ``x_train, y_train, x_test, y_test``, or ``x, y`` (fixed 80/20 split).

    Images: ``uint8``, or floating point in [0, 1]; NHWC, NCHW (C is 1 or 3) or NHW. Labels:
    integers 0 to k - 1, ``(N,)``. ``classes`` (k strings) is optional; other keys are left out, and
    named in the notes.

    Raises RequestError naming file and fault: missing keys, pickled objects, a truncated file,
    a key that is there twice, more than ``MAX_BYTES``, a shape or layout that isn't clear, NaN,
    values outside [0, 1], labels.
    """
    path = Path(request.path).expanduser()
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive_members(path, archive)
            keys = _npz_keys(path, archive, members)
            unread = sorted(members.keys() - set(keys))
            arrays = {key: read_array(archive, members[key]) for key in keys}
    except RequestError:
        raise
    except Exception as error:  # zip, zlib and npy faults share no base class
        raise RequestError(f"{path}: not a readable npz file: {one_line(error)}") from error
    pairs = {
        x: (images_from(path, x, arrays[x]), labels_from(path, y, arrays[y], len(arrays[x])))
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
    # A huge label is refused later; it must not create names without limit here.
    return RawSet(
        train=train,
        test=test,
        classes=classes or tuple(str(label) for label in range(min(count, len(train[1]) + 1))),
        notes=(f"left out: {some(unread)}",) if unread else (),
    )


def archive_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """An archive's members by key. Raises RequestError, naming ``path``, for a key there twice."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        key = info.filename.removesuffix(".npy")
        if key in members:
            raise RequestError(f"{path}: holds the key {key} twice")
        members[key] = info
    return members


def _npz_keys(
    path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]
) -> tuple[str, ...]:
    """The keys to read, once the headers have shown that their arrays are plain and not too big."""
    keys = next((k for k in (_SPLIT_KEYS, _POOL_KEYS) if members.keys() >= set(k)), None)
    if keys is None:
        raise RequestError(
            f"{path}: has the keys {some(sorted(members)) or 'none'}; "
            f"an npz set has {', '.join(_SPLIT_KEYS)}, or {', '.join(_POOL_KEYS)}"
        )
    if "classes" in members:
        keys = (*keys, "classes")
    total = 0
    for key in keys:
        shape, dtype = array_header(path, archive, members[key], key)
        if key == "classes" and math.prod(shape) > MAX_CLASSES:  # empty strings take no bytes
            raise RequestError(f"{path}: classes has {shape} names; at most {MAX_CLASSES}")
        total += pixel_bytes(math.prod(shape), dtype.itemsize)
        check_size(f"{path}: {key}", total)
    return keys


def array_header(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in an archive, from its header alone.

    Raises RequestError, naming ``path`` and ``key``: Python objects, fewer bytes than promised.
    """
    with archive.open(member) as file:
        reader: Any = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, _, dtype = reader(file)
        if dtype.hasobject:
            raise RequestError(f"{path}: {key} holds Python objects, which are not read")
        size = math.prod(shape) * dtype.itemsize
        if member.file_size != file.tell() + size:
            raise RequestError(f"{path}: {key} is truncated: {shape} {dtype} is promised")
    return shape, dtype


def read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """An array in an archive whose header was checked; Python objects are refused."""
    with archive.open(member) as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def images_from(path: Path | str, key: str, array: NDArray[Any]) -> Tensor:
    """``uint8`` or ``float32`` NCHW images; ``path`` and ``key`` name them in errors."""
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


def labels_from(path: Path | str, key: str, array: NDArray[Any], rows: int) -> Tensor:
    """``int64 (N,)`` labels of ``rows`` images; ``path`` and ``key`` name them in errors."""
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
