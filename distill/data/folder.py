"""The reader of ``folder:PATH``: image files in one folder a class, with or without splits.

Every fault becomes a one-line ``RequestError`` that names the file or folder.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Final, Literal, NoReturn

import torch
from torch import Tensor

from ..types import RequestError
from .images import ENDINGS, decode_files
from .raw import TEST_SHARE, DataRequest, RawSet, one_line, some, stratified

_Split = Literal["train", "test", "validation"]
_SPLIT_NAMES: Final[dict[str, _Split]] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


def load_folder(request: DataRequest) -> RawSet:
    """``folder:PATH``: ``PATH/CLASS/*`` or ``PATH/train/CLASS/*`` with ``PATH/test/CLASS/*``.

    A relative PATH is looked for in the working directory, then in the folders for data. Classes
    are the sub-folders in alphabetical order. Splits are recognised in any capitalisation, as
    training, testing, val, valid and validation too; a validation split serves as the test set
    where there is no other. Without splits a fixed stratified fifth of the images is the test set.
    Hidden and linked folders, and files without an ending in ``ENDINGS``, are left out and counted
    in the notes. Nothing is written below PATH.

    Raises RequestError: no such folder, fewer than 2 classes, a class without images, classes that
    all hold the same folders, other classes in test than in train, a folder that can't be read,
    and all that ``decode_files`` refuses.
    """
    top = _find(request)
    left_out: Counter[str] = Counter()
    train_top, test_top = _split_folders(top, left_out)
    classes, files, labels = class_tree(train_top, left_out)
    train_size = len(files)
    if test_top is not None:
        test_classes, test_files, test_labels = class_tree(test_top, left_out)
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise RequestError(
                f"{top}: {train_top.name}/ and {test_top.name}/ differ in the classes {some(odd)}"
            )
        files, labels = files + test_files, torch.cat([labels, test_labels])
    decoded = decode_files(files, request.image_size, request.roots[0] / ".cache", request.progress)
    notes = [f"{what}: {count} of {len(files)} images" for what, count in decoded.changes.items()]
    if left_out:
        counted = [f"{count} × {kind}" for kind, count in left_out.most_common()]
        notes.append(f"left out: {some(counted)}")
    if test_top is not None and _SPLIT_NAMES[test_top.name.casefold()] == "validation":
        notes.append(f"{test_top.name}/ is the test set")
    train, test = (
        stratified(str(top), labels, TEST_SHARE)
        if test_top is None
        else (slice(train_size), slice(train_size, None))
    )
    return RawSet(
        train=(decoded.pixels[train], labels[train]),
        test=(decoded.pixels[test], labels[test]),
        classes=classes,
        notes=tuple(notes),
    )


def _find(request: DataRequest) -> Path:
    given = Path(request.path).expanduser()
    places = [given, *(root / given for root in request.roots)]  # an absolute path stays as it is
    top = next((place for place in places if place.is_dir()), None)
    if top is None:
        looked = ", ".join(dict.fromkeys(map(str, places)))
        raise RequestError(f"{given}: no such folder (looked for {looked})")
    return top


def _split_folders(top: Path, left_out: Counter[str]) -> tuple[Path, Path | None]:
    """The folders of the training and the test images; ``top`` and ``None`` without splits.

    A folder named "train" is a split only if it has folders of its own: it may be a class.
    """
    splits: dict[_Split, Path] = {}
    for folder in subfolders(top):
        split = _SPLIT_NAMES.get(folder.name.casefold())
        if split is None or not subfolders(folder):
            continue
        if split in splits:
            names = f"{splits[split].name}/ and {folder.name}/"
            raise RequestError(f"{top}: {names} are both the {split} split")
        splits[split] = folder
    if splits.keys() <= {"validation"}:
        return top, None
    train, test = splits.get("train"), splits.get("test", splits.get("validation"))
    if train is None or test is None:
        raise RequestError(
            f"{top}: has {next(iter(splits.values())).name}/ only; "
            "a split tree has train/ and test/"
        )
    _count_files(top, left_out)
    others = [folder.name for folder in subfolders(top) if folder not in (train, test)]
    left_out.update(f"folder {name}/" for name in others)
    return train, test


def class_tree(top: Path, left_out: Counter[str]) -> tuple[tuple[str, ...], list[str], Tensor]:
    """The classes below ``top``, their image files in a fixed order, and the files' labels.

    left_out: counts what no class holds. Raises RequestError: fewer than 2 folders, one without
    images, folders that all hold the same folders.
    """
    folders = subfolders(top)
    if len(folders) < 2:
        raise RequestError(
            f"{top}: {len(folders)} class folders; an image folder has at least 2, one a class"
        )
    _refuse_repeated_folders(top, folders)
    _count_files(top, left_out)
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = _image_files(folder, left_out)
        if not found:
            raise RequestError(f"{folder}: a class without images ({', '.join(ENDINGS)})")
        files += found
        labels += [label] * len(found)
    return tuple(folder.name for folder in folders), files, torch.tensor(labels)


def _refuse_repeated_folders(top: Path, folders: list[Path]) -> None:
    """Refuse splits or groups that would be taken for classes."""
    inner = [sorted(each.name for each in subfolders(folder)) for folder in folders]
    held = {frozenset(name.casefold() for name in names) for names in inner}
    if len(held) == 1 and len(inner[0]) > 1:
        raise RequestError(
            f"{top}: the folders {some([each.name for each in folders])} all hold the same folders "
            f"({some(inner[0])}), so they are no classes; expected PATH/CLASS, or PATH/train/CLASS "
            "and PATH/test/CLASS"
        )


def subfolders(top: Path) -> list[Path]:
    """The folders in ``top`` that are not hidden, in the same order on every system."""
    try:
        return sorted(
            (each for each in top.iterdir() if each.is_dir() and not each.name.startswith(".")),
            key=lambda each: each.name,
        )
    except OSError as error:
        _refuse(error)


def _count_files(top: Path, left_out: Counter[str]) -> None:
    """Count the files and hidden folders beside the folders in ``top``: no class holds them."""
    for entry in top.iterdir():
        if entry.name.startswith("."):
            left_out[f"hidden {'folder' if entry.is_dir() else 'file'}"] += 1
        elif not entry.is_dir():
            left_out[f"{entry.suffix.lower() or 'other'} beside the folders"] += 1


def _image_files(folder: Path, left_out: Counter[str]) -> list[str]:
    """The paths of all images below ``folder``; the rest is counted."""
    found = []
    for place, folders, names in os.walk(folder, onerror=_refuse):
        for name in (*folders,):
            hidden = name.startswith(".")
            if hidden or os.path.islink(os.path.join(place, name)):  # noqa: PTH114, PTH118
                left_out["hidden folder" if hidden else "linked folder"] += 1
                folders.remove(name)
        for name in names:
            if name.startswith("."):
                left_out["hidden file"] += 1
            elif name.lower().endswith(ENDINGS):
                found.append(os.path.join(place, name))  # noqa: PTH118 -- Paths cost a second
            else:
                left_out[os.path.splitext(name)[1].lower() or "without ending"] += 1  # noqa: PTH122
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    raise RequestError(f"{error.filename}: not readable: {one_line(error)}") from error
