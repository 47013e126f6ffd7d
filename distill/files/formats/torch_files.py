"""Sets in files of ``torch.save``: pairs in one file, or images and labels in a file each.

Structures, read in the publishing code:

- DC, DSA, DM, IDM, baadd: ``{'data': [[images, labels], …], 'accs_all_exps': …}``, a pair for
  each experiment (``VICO-UoE/DatasetCondensation``, main.py). DataDAM shares
  ``{'data': [images, labels]}``.
- IDC, NCFM: ``[images, labels]`` (``snu-mllab/Efficient-Dataset-Condensation``, condense.py at
  086273c; ``gszfwsb/NCFM``, condenser/Condenser.py at 2d7cdaf).
- MTT, DATM, DD-Ranking: ``images_best.pt``, ``labels_best.pt`` and ``lr_best.pt``, a bare tensor
  each (``NUS-HPC-AI-Lab/DATM``, distill/DATM.py at 41cbb4c; ``NUS-HPC-AI-Lab/DD-Ranking``,
  demo_soft.py at 97082f6); DATM's labels are logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ..pickled import StoredTensor
from ..safe import fault
from ..torch_file import read_foreign
from .stored_set import (
    StoredSet,
    check_stored,
    checked_labels,
    checked_rate,
    load_stored,
    received,
    refuse_other_number,
)

_SETS_CAP: Final = 1000
_FOLDER_CAP: Final = 1000
_ENDINGS: Final = (".pt", ".pth")

_MEASURED: Final = {"accs_all_exps"}
"""Keys that hold what others measured on their sets, and no part of a set."""


def read_torch_file(path: Path, number: int | None) -> StoredSet:
    """The set in a file of ``torch.save``; of a bare tensor of images also the files beside it.

    Raises RequestError: "refused unread" where the pickle names anything but plain tensors and
    numpy scalars; unreadable, truncated, too large, also in memory; another structure; no set of
    that number; tensors that are no set.
    """
    value = read_foreign(path)
    if isinstance(value, StoredTensor):
        refuse_other_number(path, number)
        return _with_files_beside(path, value, {})
    pairs = _pairs(path, value)
    refuse_other_number(path, number, len(pairs))
    notes = []
    if number is None and len(pairs) > 1:
        notes.append(f"set 0 of the {len(pairs)} in the file: --set-number N chooses another")
    rate = _rate_inside(path, value)
    if rate is not None:
        notes.append(f"learning rate {rate:.4g} of the file")
    unread = sorted(map(str, _other_keys(value) - ({"lr"} if rate is not None else set())))
    if unread:
        notes.append(f"left out of the file: {', '.join(unread):.100}")
    images, labels = pairs[number or 0]
    check_stored(path, images, labels)
    tensors = load_stored(path, images), load_stored(path, labels)
    return received(path, *tensors, rate=rate, notes=notes)


def is_tensor_folder(path: Path) -> bool:
    """Whether a folder holds files with an ending of ``torch.save``."""
    return path.is_dir() and bool(_torch_files(path))


def read_tensor_folder(path: Path, number: int | None) -> StoredSet:
    """The set in a folder that holds images, labels and perhaps a learning rate, a file each.

    Raises RequestError: as ``read_torch_file``; several files of images, or none.
    """
    files = _torch_files(path)
    if len(files) > _FOLDER_CAP:
        raise fault(path, f"holds {len(files)} files, at most {_FOLDER_CAP} are read")
    values = {file: read_foreign(file) for file in files}
    tensors = {file: each for file, each in values.items() if isinstance(each, StoredTensor)}
    images = [file for file, tensor in tensors.items() if _is_images(tensor)]
    if len(images) != 1:
        names = ", ".join(file.name for file in images[:5]) or "none"
        raise fault(path, f"holds {len(images)} files of images ({names}): name the one to read")
    refuse_other_number(path, number)
    return _with_files_beside(images[0], tensors[images[0]], tensors)


def read_labels_file(path: Path, count: int) -> tuple[Tensor, list[str]]:
    """The labels in a file that holds one tensor, for ``count`` images; and notes.

    Raises RequestError: as ``read_torch_file``.
    """
    stored = _tensor_in(path)
    if len(stored.shape) not in (1, 2) or stored.shape[0] != count:
        raise fault(path, f"holds a tensor {stored.shape}, not the labels of {count} images")
    return checked_labels(path, load_stored(path, stored), count)


# One file ----------------------------------------------------------------------------------------


def _pairs(path: Path, value: Any) -> list[tuple[StoredTensor, StoredTensor]]:
    if isinstance(value, dict) and "data" in value:
        found = [value["data"]] if _is_pair(value["data"]) else value["data"]
    elif isinstance(value, dict) and {"images", "labels"} <= set(value):
        found = [[value["images"], value["labels"]]]
    else:
        found = [value]
    entries = found if isinstance(found, (list, tuple)) else []
    if len(entries) > _SETS_CAP:
        raise fault(path, f"holds {len(entries)} sets, at most {_SETS_CAP} are read")
    if not entries or not all(map(_is_pair, entries)):
        forms = "'data': [[images, labels], ...], a pair of tensors, or 'images' and 'labels'"
        raise fault(path, f"holds no distilled set: expected {forms}")
    return [(images, labels) for images, labels in entries]


def _is_pair(entry: object) -> bool:
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and all(isinstance(part, StoredTensor) for part in entry)
    )


def _other_keys(value: Any) -> set[Any]:
    """The keys of a file that are neither read nor known to be measurements."""
    if not isinstance(value, dict):
        return set()
    return set(value) - ({"data"} if "data" in value else {"images", "labels"}) - _MEASURED


def _rate_inside(path: Path, value: Any) -> float | None:
    """The learning rate under the key ``lr``: a number, or a tensor of one."""
    found = value.get("lr") if isinstance(value, dict) else None
    if isinstance(found, StoredTensor):
        return _rate(path, found)
    return checked_rate(path, float(found)) if isinstance(found, float) else None


# A file each -------------------------------------------------------------------------------------


def _torch_files(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.suffix in _ENDINGS and each.is_file())


def _is_images(tensor: StoredTensor) -> bool:
    return len(tensor.shape) == 4


def _tensor_in(path: Path) -> StoredTensor:
    value = read_foreign(path)
    if not isinstance(value, StoredTensor):
        raise fault(path, f"holds a {type(value).__name__}, expected one tensor")
    return value


def _with_files_beside(
    path: Path, images: StoredTensor, folder: Mapping[Path, StoredTensor]
) -> StoredSet:
    """The images in ``path`` with the labels and the learning rate in the files beside it.

    These have the name of ``path`` with another word in place of "images". Where there is none and
    ``folder`` (its tensors by file) holds one tensor that could be the labels, it is.
    """
    if not _is_images(images):
        raise fault(path, f"holds a tensor {images.shape}, expected images (N, C, H, W)")
    notes: list[str] = []
    files, labels, rate = [path], None, None
    labels_file = _beside(path, "labels") or _only_labels(folder, images.shape[0])
    check_stored(path, images)
    if labels_file is not None:
        labels, notes = read_labels_file(labels_file, images.shape[0])
        files.append(labels_file)
        notes.insert(0, f"labels of {labels_file.name}, beside the images")
    rate_file = _beside(path, "lr")
    if rate_file is not None:
        rate = _rate(rate_file, _tensor_in(rate_file))
        files.append(rate_file)
        notes.append(f"learning rate {rate:.4g} of {rate_file.name}")
    pixels = load_stored(path, images)
    return received(path, pixels, labels, files=files, rate=rate, notes=notes)


def _beside(path: Path, word: str) -> Path | None:
    """The file that is called as ``path`` is, with ``word`` in place of the last "images".

    MTT's ``images_zca_N.pt``, a picture of ``images_N.pt``, shares its labels.
    """
    before, found, after = path.name.rpartition("images")
    if not found:
        return None
    names = (f"{before}{word}{after}", f"{before}{word}{after.replace('_zca', '', 1)}")
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def _only_labels(folder: Mapping[Path, StoredTensor], count: int) -> Path | None:
    """The only file of ``folder`` whose tensor could be the labels of ``count`` images."""
    fitting = [
        file
        for file, tensor in folder.items()
        if tensor.shape[:1] == (count,) and len(tensor.shape) <= 2
    ]
    return fitting[0] if len(fitting) == 1 else None


def _rate(path: Path, stored: StoredTensor) -> float:
    if stored.count != 1:
        raise fault(path, f"holds {stored.count} learning rates, expected one")
    return checked_rate(path, float(load_stored(path, stored)))
