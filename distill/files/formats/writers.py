"""The formats in which a set of this suite is written for others, and what each loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from ...types import DistilledSet, Recipe
from ..artifact import export_png, quantised, save_set
from ..safe import fault, write_atomically

_NAMES = "the names of the classes"
_PREPROCESSING = "the preprocessing (mean, deviation, whitening), which the receiver must know"


@final
@dataclass(frozen=True, kw_only=True)
class Writer:
    """A format. description: for people. write: the set to a path; returns all files that
    were written. loses: what of the set is not in them, a phrase each."""

    description: str
    write: Callable[[Path, DistilledSet], list[Path]]
    loses: Callable[[DistilledSet], list[str]]


def _write_own(path: Path, distilled: DistilledSet) -> list[Path]:
    save_set(path, distilled)
    return [path]


def _write_pairs(path: Path, distilled: DistilledSet) -> list[Path]:
    """``{'data': [[images, labels]], 'accs_all_exps': {}}``, images as networks see them."""
    pair = [_seen(distilled), distilled.batch.labels.contiguous()]
    _save(path, {"data": [pair], "accs_all_exps": {}})
    return [path]


def _write_separate(path: Path, distilled: DistilledSet) -> list[Path]:
    """``images_X.pt``, ``labels_X.pt`` and ``lr_X.pt``, a bare tensor each; ``path``: the first."""
    before, found, after = path.name.rpartition("images")
    if not found:
        raise fault(path, 'is no name for a file of images: expected "images" in it')
    tensors = {
        "images": _seen(distilled),
        "labels": distilled.batch.labels.contiguous(),
        "lr": torch.tensor(distilled.recipe.lr),
    }
    files = {word: path.with_name(f"{before}{word}{after}") for word in tensors}
    for file in files.values():
        if file.exists():
            raise fault(file, "exists already")
    for word, file in files.items():
        _save(file, tensors[word])
    return [*files.values()]


def _write_npz(path: Path, distilled: DistilledSet) -> list[Path]:
    """``images`` in pixel space, ``labels``, ``classes``."""
    images, labels = (
        part.cpu().numpy() for part in (distilled.batch.images, distilled.batch.labels)
    )
    buffer = BytesIO()
    np.savez_compressed(buffer, images=images, labels=labels, classes=np.array(distilled.classes))
    write_atomically(path, lambda temporary: _write(temporary, buffer))
    return [path]


def _seen(distilled: DistilledSet) -> Tensor:
    """The images as networks see them: normalised or whitened."""
    return distilled.recipe.preprocessing.normalise(distilled.batch.images).contiguous()


def _save(path: Path, value: Any) -> None:
    # Into memory first: torch writes a file's name into it, and the temporary one is random.
    buffer = BytesIO()
    torch.save(value, buffer)
    write_atomically(path, lambda temporary: _write(temporary, buffer))


def _write(path: Path, buffer: BytesIO) -> None:
    path.write_bytes(buffer.getvalue())


# What is lost ------------------------------------------------------------------------------------


def _recipe_but(recipe: Recipe, *kept: str) -> list[str]:
    """What of a recipe is lost if only the fields ``kept`` are written."""
    settings = ("epochs", "lr", "momentum", "weight_decay", "batch_size", "augment")
    left = [name.replace("_", " ") for name in settings if name not in kept]
    lost = [f"the recipe: {', '.join(left)}"]
    if recipe.steps:
        lost.append(f"its {len(recipe.steps)} learned steps")
    if recipe.initial is not None:
        lost.append("the weights that training starts from")
    if recipe.network is not None:
        lost.append("the network that it was distilled with")
    return lost


def _lost_in_pairs(distilled: DistilledSet) -> list[str]:
    return [_NAMES, _PREPROCESSING, *_recipe_but(distilled.recipe)]


def _lost_separate(distilled: DistilledSet) -> list[str]:
    return [_NAMES, _PREPROCESSING, *_recipe_but(distilled.recipe, "lr")]


def _lost_in_npz(distilled: DistilledSet) -> list[str]:
    return [_PREPROCESSING, *_recipe_but(distilled.recipe)]


def _lost_in_png(distilled: DistilledSet) -> list[str]:
    images, rounded = distilled.batch.images, quantised(distilled).batch.images
    clipped = float(((images < 0) | (images > 1)).float().mean())
    most = float((images - rounded).abs().max())
    lost = [
        f"values beyond 8 bits: {clipped:.0%} were outside [0, 1], the most changed by {most:.3g}"
    ]
    if distilled.batch.labels.ndim == 2:
        lost.append("the soft labels: a file lies in the folder of its most likely class")
    return [*lost, _PREPROCESSING, *_recipe_but(distilled.recipe)]


WRITERS: Final[Mapping[str, Writer]] = {
    "distillsec": Writer(
        description="this suite's safetensors file, with the recipe",
        write=_write_own,
        loses=lambda _: [],
    ),
    "dc": Writer(
        description="a .pt file as DC, DSA and DM write it: {'data': [[images, labels]]}",
        write=_write_pairs,
        loses=_lost_in_pairs,
    ),
    "mtt": Writer(
        description="images_X.pt, labels_X.pt and lr_X.pt, as MTT and DATM write them",
        write=_write_separate,
        loses=_lost_separate,
    ),
    "npz": Writer(
        description="numpy's archive: images in pixel space, labels, classes",
        write=_write_npz,
        loses=_lost_in_npz,
    ),
    "png": Writer(
        description="a folder of 8-bit PNG files, a folder a class",
        write=export_png,
        loses=_lost_in_png,
    ),
}


def writer_for(path: Path) -> str:
    """The format that the name ``path`` stands for; RequestError where it stands for none."""
    if path.suffix in (".pt", ".pth"):
        return "mtt" if "images" in path.name else "dc"
    found = {".safetensors": "distillsec", ".npz": "npz", "": "png"}.get(path.suffix)
    if found is None:
        endings = ".safetensors, .pt, .npz, or a name without an ending for a folder of PNG files"
        raise fault(path, f"is a name of no known format: expected {endings}, or --format NAME")
    return found
