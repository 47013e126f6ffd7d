"""Every format in which distilled sets are published, read without running code of the files.

A new format is a file with its reader and an entry in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from ...types import hard_labels
from ..safe import check_file, fault
from .arrays import is_npz, is_other_safetensors, read_npz, read_other_safetensors
from .image_folders import is_image_folder, read_image_folder
from .stored_set import Format, StoredSet, labels_in_order
from .tables import is_table, read_table
from .teacher_views import is_views_folder, read_views
from .torch_files import is_tensor_folder, read_labels_file, read_tensor_folder, read_torch_file

FORMATS: Final[Mapping[str, Format]] = {
    "tensor folder": Format(
        description="a folder of images.pt, labels.pt, lr.pt: DD-Ranking, MTT, DATM",
        matches=is_tensor_folder,
        read=read_tensor_folder,
    ),
    "table": Format(
        description="parquet or arrow files, as on the Hugging Face hub",
        matches=is_table,
        read=read_table,
    ),
    "image folder": Format(
        description="image files in a folder a class: SRe2L, CDA, G-VBSM, D4M, RDED",
        matches=is_image_folder,
        read=read_image_folder,
    ),
    "npz": Format(
        description="numpy's archive of images and labels",
        matches=is_npz,
        read=read_npz,
    ),
    "safetensors": Format(
        description="a safetensors file of images and labels",
        matches=is_other_safetensors,
        read=read_other_safetensors,
    ),
    "torch file": Format(
        description="a .pt file: DC, DSA, DM, IDM, DataDAM, IDC, NCFM; MTT and DATM with the "
        "files beside it",
        matches=Path.is_file,
        read=read_torch_file,
    ),
}
"""In the order in which they are tried: what is no other file is read as one of torch's."""

_LARGEST_FILE: Final = 2**63


def read_received(path: Path, number: int | None = None) -> tuple[str, StoredSet]:
    """The set in ``path``, a file or folder of another project, and the name of its format.

    number: which of the sets in a file, from 0; ``None``: the first.
    Raises RequestError, in one line: no such file, no known format, and all that a reader refuses.
    """
    if not path.is_dir():
        check_file(path, _LARGEST_FILE)
    try:
        name = next((name for name, form in FORMATS.items() if form.matches(path)), None)
    except OSError as error:
        raise fault(path, f"cannot be read: {error.strerror or error}") from None
    if name is None and is_views_folder(path):
        held = "a teacher's labels for views of images"
        raise fault(path, f"holds {held}: name the folder of the images, with --labels {path}")
    if name is None:
        raise fault(path, f"is no run folder and holds no set: expected {', '.join(FORMATS)}")
    return name, FORMATS[name].read(path, number)


def read_labels(path: Path, found: StoredSet) -> tuple[Tensor, list[str]]:
    """The labels in ``path`` for the images of ``found``, and notes.

    path: a file of one tensor, or a folder of FKD's label batches, which need the images' classes.
    Raises RequestError: neither of the two, labels of other images.
    """
    if not path.is_dir():
        return read_labels_file(path, len(found.images))
    if not is_views_folder(path):
        raise fault(path, "holds no epoch_0/batch_0.tar, a teacher's labels of views")
    if found.labels is None:
        raise fault(path, "gives the images' labels in an order that needs their classes")
    return read_views(path, hard_labels(found.labels))


def labelled(path: Path, found: StoredSet, classes: int, labels: Path | None) -> StoredSet:
    """``found`` with labels: its own, those in the file ``labels``, or classes in order.

    Raises RequestError: as ``read_labels``; no labels, and images that are no multiple of
    ``classes``.
    """
    if labels is not None:
        read, notes = read_labels(labels, found)
        files = [] if labels.is_dir() else [labels]
        return found.with_labels(read, files, *(notes or [f"labels of {labels.name}"]))
    if found.labels is None:
        ordered = labels_in_order(path, len(found.images), classes)
        count = len(found.images) // classes
        note = f"no labels: its images are taken for {count} of each class, in the classes' order"
        return found.with_labels(ordered, [], note)
    return found
