"""Sets as image files: a folder a class, or one folder of files named by class.

SRe2L, CDA, G-VBSM and D4M write ``new000/class000_id000.jpg`` (``VILA-Lab/SRe2L``,
recover/data_synthesis.py at 16b1cc3), RDED ``00000/class00000_id00000.jpg`` (``LINs-lab/RDED``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from ...data.folder import class_tree, subfolders
from ...data.images import ENDINGS, decode_uncached
from ...data.raw import some
from ..safe import fault
from .stored_set import StoredSet, received, refuse_other_number

_FILES_CAP: Final = 2_000_000
_NAMED: Final = re.compile(r"class(\d{1,6})_id\d+\.\w+")
_NUMBERED: Final = re.compile(r"(?:\d+|(?:class|new)[_-]?\d+|\d+_.*)")
"""Names of folders that are a class's number: ``00003``, ``new003``, ``class3``, ``3_cat``."""

_HARD: Final = (
    "its labels are the classes of its folders: soft labels of a teacher, which the figures of "
    "many such sets need, are not in image files (--labels)"
)


def is_image_folder(path: Path) -> bool:
    """Whether a folder holds image files, or folders that do."""
    return path.is_dir() and bool(_image_names(path) or any(map(_image_names, subfolders(path))))


def read_image_folder(path: Path, number: int | None) -> StoredSet:
    """The set in a folder of image files, ``uint8``.

    Classes are the folders in the order of their names, or the numbers in the names of files;
    ``class_numbers`` knows which of the data's classes they are.
    Raises RequestError: an unreadable image, mixed sizes, too large, files that belong to no class.
    """
    refuse_other_number(path, number)
    if _image_names(path) and not any(map(_image_names, subfolders(path))):
        classes, files, labels = _flat(path)
        notes = [_HARD]
    else:
        left_out: Counter[str] = Counter()
        classes, files, found = class_tree(path, left_out)
        labels = found.tolist()
        notes = [_HARD, *(f"left out: {count} × {what}" for what, count in left_out.items())]
    if len(files) > _FILES_CAP:
        raise fault(path, f"holds {len(files)} images, at most {_FILES_CAP} are read")
    decoded = decode_uncached(files)
    notes += [f"{what}: {count} images" for what, count in decoded.changes.items()]
    return received(
        path,
        decoded.pixels,
        torch.tensor(labels),
        files=[Path(file) for file in files],
        classes=classes,
        notes=notes,
    )


def _image_names(path: Path) -> list[str]:
    """The image files that lie in ``path`` itself, sorted."""
    return sorted(
        each.name
        for each in path.iterdir()
        if each.name.lower().endswith(ENDINGS) and each.is_file()
    )


def _flat(path: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """The classes, files and labels of one folder of files that are named by their class."""
    names = _image_names(path)
    matches = [_NAMED.fullmatch(name) for name in names]
    odd = [name for name, match in zip(names, matches, strict=True) if match is None]
    if odd:
        raise fault(path, f"{some(odd)}: expected a folder a class, or files classN_idN")
    numbers = [int(match[1]) for match in matches if match]
    known = sorted(set(numbers))
    files = [str(path / name) for name in names]
    return tuple(map(str, known)), files, [known.index(number) for number in numbers]


def class_numbers(names: Sequence[str]) -> list[int] | None:
    """The class numbers that all ``names`` of folders stand for; ``None`` where they don't."""
    if not all(map(_NUMBERED.fullmatch, names)):
        return None
    found = [int(match[0]) for name in names if (match := re.search(r"\d{1,9}", name))]
    return found if len(set(found)) == len(names) else None
