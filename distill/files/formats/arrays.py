"""Sets in numpy's archives and in others' safetensors files, by the shapes of their arrays."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ...class_names import MAX_CLASSES
from ...data.npz import archive_members, array_header, read_array
from ...data.raw import one_line, some
from ...types import RequestError
from ..safe import (
    PLAIN_DTYPES,
    TENSORS_CAP,
    check_built,
    check_file,
    fault,
    read_header,
    read_named_tensors,
)
from .stored_set import COPIES, StoredSet, checked_rate, received, refuse_other_number

_IMAGES: Final = ("images", "x", "data", "x_train")
_LABELS: Final = ("labels", "y", "targets", "y_train")
_RATES: Final = ("lr", "rate", "syn_lr")
"""Names that decide where several arrays have the right shape, the most usual first."""

Shapes = Mapping[str, tuple[int, ...]]


def is_npz(path: Path) -> bool:
    """Whether ``path`` is an archive of numpy's arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # no archive, or a damaged one
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: Path, number: int | None) -> StoredSet:
    """The set in an ``.npz`` file; ``classes`` names its classes.

    Raises RequestError: Python objects inside, truncated, too large, arrays that are no set.
    """
    refuse_other_number(path, number)
    check_file(path, TENSORS_CAP)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive_members(path, archive)
            headers = {
                key: array_header(path, archive, member, key) for key, member in members.items()
            }
            shapes = {name: shape for name, (shape, _) in headers.items()}
            chosen = _choose(path, shapes)
            named = [name for name in ("classes",) if name in shapes]
            if any(math.prod(shapes[name]) > MAX_CLASSES for name in named):  # of no length, even
                raise fault(path, f"classes has {shapes['classes']} names, at most {MAX_CLASSES}")
            size = sum(
                math.prod(shapes[key]) * headers[key][1].itemsize
                for key in (*chosen.values(), *named)
            )
            check_built(path, size + math.prod(shapes[chosen["images"]]) * COPIES * 4)
            arrays = {
                name: read_array(archive, members[name]) for name in (*chosen.values(), *named)
            }
            tensors = {role: _tensor(path, arrays[name]) for role, name in chosen.items()}
    except RequestError:
        raise
    except Exception as error:  # zip, zlib and npy faults share no base class
        raise RequestError(f"{path}: not a readable npz file: {one_line(error)}") from error
    classes = [str(name) for name in arrays["classes"].flatten()] if named else None
    return _assembled(path, tensors, sorted(set(shapes) - {*chosen.values(), *named}), classes)


def is_other_safetensors(path: Path) -> bool:
    """Whether ``path`` is a safetensors file of another project than this one."""
    try:
        tensors, ours = read_header(path)
    except RequestError:
        return False
    return bool(tensors) and not ours


def read_other_safetensors(path: Path, number: int | None) -> StoredSet:
    """The set in a safetensors file without this suite's metadata.

    Raises RequestError: truncated, too large, tensors that are no set.
    """
    refuse_other_number(path, number)
    check_file(path, TENSORS_CAP)
    found, _ = read_header(path)
    shapes = {name: shape for name, (_, shape) in found.items()}
    chosen = _choose(path, shapes)
    kinds = {found[name][0] for name in chosen.values()}
    if not kinds <= PLAIN_DTYPES.keys():
        raise fault(
            path, f"holds the types {some(sorted(kinds))}; {some([*PLAIN_DTYPES])} are read"
        )
    size = sum(math.prod(shapes[n]) * PLAIN_DTYPES[found[n][0]].itemsize for n in chosen.values())
    check_built(path, 2 * size + math.prod(shapes[chosen["images"]]) * COPIES * 4)
    values = read_named_tensors(path, list(chosen.values()))
    tensors = {role: values[name] for role, name in chosen.items()}
    return _assembled(path, tensors, sorted(set(shapes) - set(chosen.values())), None)


def _choose(path: Path, shapes: Shapes) -> dict[str, str]:
    """The names of the arrays that are the images, their labels and the learning rate."""
    images = _one(path, [n for n, s in shapes.items() if len(s) in (3, 4)], _IMAGES, "images")
    if images is None:
        raise fault(path, f"holds {some(sorted(shapes)) or 'nothing'}, and no images (N, C, H, W)")
    count = shapes[images][0]
    fitting = [n for n, s in shapes.items() if s[:1] == (count,) and len(s) <= 2 and n != "classes"]
    rates = [name for name in _RATES if name in shapes and math.prod(shapes[name]) == 1]
    labels = _one(path, [n for n in fitting if n not in rates], _LABELS, "labels")
    return {
        "images": images,
        **({} if labels is None else {"labels": labels}),
        **({"rate": rates[0]} if rates else {}),
    }


def _one(path: Path, names: Sequence[str], known: Sequence[str], what: str) -> str | None:
    """The only one of ``names``, or the one with a ``known`` name; ``None`` of none."""
    usual = [name for name in known if name in names]
    if len(names) > 1 and not usual:
        raise fault(path, f"holds several arrays that could be its {what}: {some(sorted(names))}")
    return usual[0] if usual else next(iter(names), None)


def _tensor(path: Path, array: object) -> Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise fault(
            path, f"holds an array of {getattr(array, 'dtype', '?')}, not numbers"
        ) from None


def _assembled(
    path: Path, tensors: Mapping[str, Tensor], unread: Sequence[str], classes: Sequence[str] | None
) -> StoredSet:
    images, rate = tensors["images"], tensors.get("rate")
    notes = [f"left out of the file: {some(unread)}"] if unread else []
    if rate is not None:
        notes.append(f"learning rate {float(rate):.4g} of the file")
    return received(
        path,
        images[:, None] if images.ndim == 3 else images,
        tensors.get("labels"),
        classes=classes,
        rate=None if rate is None else checked_rate(path, float(rate)),
        notes=notes,
    )
