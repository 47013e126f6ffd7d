"""Distilled sets and triggers as files, and sets as 8-bit images.

A distilled set's file holds exactly ``images``, ``labels`` and what a receiver needs to train on
them (``zca.*`` for a whitening, ``initial`` where training starts from given weights). The set of
keys is fixed, so that the file can carry nothing of an attack.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..augment import parse_strategy
from ..class_names import MAX_CLASSES, MAX_NAME, check_class_names
from ..preprocessing import Preprocessing, Zca
from ..types import (
    LARGEST_DEPTH,
    LARGEST_WIDTH,
    Batch,
    DistilledSet,
    Recipe,
    RequestError,
    Step,
    hard_labels,
)
from .prefixes import add_prefix, select_prefix
from .safe import fault, read_tensors, write_atomically, write_tensors

FORMAT_VERSION: Final = 1
_LARGEST_SIDE: Final = 4096
_LARGEST_VALUE: Final = 1e6  # of pixels, labels, weights: far above those of published sets
_LARGEST_MOMENT: Final = 1e4  # of the pixels' mean and deviation: 0 to 255 is the widest scale
# The longest published training: 1,000 epochs; 300 epochs of 200,000 images in 470,000 steps.
_LARGEST_EPOCHS: Final = 10_000
_LARGEST_VISITS: Final = 100_000_000
_LARGEST_STEPS: Final = 1_000_000
_Side = Annotated[int, Field(ge=1, le=_LARGEST_SIDE)]
_Rate = Annotated[float, Field(gt=0, le=1000)]
_Mean = Annotated[float, Field(ge=-_LARGEST_MOMENT, le=_LARGEST_MOMENT)]
_Deviation = Annotated[float, Field(ge=1 / _LARGEST_MOMENT, le=_LARGEST_MOMENT)]
_Word = Annotated[str, Field(max_length=200, pattern=r"^[a-z-]+$")]


class _Info(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _StepInfo(_Info):
    rows: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]
    rate: _Rate


class _NetworkInfo(_Info):
    """The network of a recipe, as ``NetworkSpec`` has it."""

    network: Annotated[str, Field(max_length=200, pattern=r"^[\w.:-]+$")]
    width: Annotated[int, Field(ge=1, le=LARGEST_WIDTH)] | None = None
    depth: Annotated[int, Field(ge=1, le=LARGEST_DEPTH)] | None = None
    norm: _Word | None = None
    activation: _Word | None = None
    pooling: _Word | None = None
    head: Annotated[int, Field(ge=0, le=LARGEST_WIDTH)] | None = None


class _RecipeInfo(_Info):
    """A :class:`Recipe` as metadata; the upper bounds keep a hostile file from endless training."""

    mean: Annotated[list[_Mean], Field(min_length=1, max_length=_LARGEST_SIDE)]
    std: Annotated[list[_Deviation], Field(min_length=1, max_length=_LARGEST_SIDE)]
    epochs: Annotated[int, Field(ge=1, le=_LARGEST_EPOCHS)]
    lr: _Rate
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, le=10)]
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)]
    augment: Annotated[str, Field(max_length=200, pattern=r"^([a-z]+(_[a-z]+)*)?$")]
    steps: Annotated[list[_StepInfo], Field(max_length=100_000)] = []
    network: _NetworkInfo | None = None


class _SetInfo(_Info):
    """The metadata of a distilled set: these keys, no others."""

    format_version: int
    classes: Annotated[list[str], Field(min_length=1, max_length=MAX_CLASSES)]
    image_shape: Annotated[list[_Side], Field(min_length=3, max_length=3)]
    recipe: _RecipeInfo


def save_set(path: Path, distilled: DistilledSet) -> None:
    """Writes a distilled set as one safetensors file; :func:`load_set` gives back the same bits.

    Raises RequestError, and writes nothing, where the set is one that ``load_set`` would refuse or
    where the file cannot be written.
    """
    check_set(path, distilled)
    write_tensors(path, _tensors(distilled), _describe(distilled))


def check_set(path: Path, distilled: DistilledSet) -> None:
    """Refuses, naming ``path``, a set that :func:`load_set` would not give back."""
    _check_set(path, _tensors(distilled), _describe(distilled))


def load_set(path: Path | str) -> DistilledSet:
    """The distilled set in a file of :func:`save_set`, on the CPU.

    Raises RequestError naming the file and the fault: unreadable, truncated or corrupted; another
    format version; unknown or missing tensors or metadata; wrong type or shape; NaN or infinity;
    a label of no class; a recipe that no network can train by.
    """
    path = Path(path)
    tensors, info = read_tensors(path)
    valid = _check_set(path, tensors, info)
    values: dict[str, Any] = valid.recipe.model_dump()
    mean, std = (tuple(values.pop(key)) for key in ("mean", "std"))
    values["steps"] = tuple(Step(rows=tuple(s.rows), rate=s.rate) for s in valid.recipe.steps)
    network = valid.recipe.network
    values["network"] = None if network is None else network.model_dump(exclude_none=True)
    zca = select_prefix("zca", tensors)
    space = Preprocessing(mean, std, Zca(**zca) if zca else None)
    recipe = Recipe(**values, preprocessing=space, initial=tensors.get("initial"))
    batch = Batch(images=tensors["images"], labels=tensors["labels"])
    return DistilledSet(batch=batch, classes=tuple(valid.classes), recipe=recipe)


def _tensors(distilled: DistilledSet) -> dict[str, Tensor]:
    """All tensors of a set's file, by their names in it."""
    batch, recipe = distilled.batch, distilled.recipe
    tensors = {"images": batch.images, "labels": batch.labels}
    zca = recipe.preprocessing.zca
    if zca is not None:
        names = ("mean", "matrix", "inverse")
        tensors |= add_prefix("zca", {name: getattr(zca, name) for name in names})
    if recipe.initial is not None:
        tensors["initial"] = recipe.initial
    return tensors


def _describe(distilled: DistilledSet) -> dict[str, Any]:
    recipe = distilled.recipe.describe()
    return {
        "format_version": FORMAT_VERSION,
        "classes": list(distilled.classes),
        "image_shape": list(distilled.batch.images.shape[1:]),
        "recipe": {key: recipe[key] for key in _RecipeInfo.model_fields if key in recipe},
    }


def _check_set(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> _SetInfo:
    _check_names(path, set(tensors))
    images, labels = tensors["images"], tensors["labels"]
    version = info.get("format_version")
    if version != FORMAT_VERSION:
        raise fault(
            path, f"format_version is {version!r:.50}; this version reads {FORMAT_VERSION} only"
        )
    try:
        valid = _SetInfo.model_validate(dict(info))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise fault(path, f"metadata {where}: {first['msg']}, not {first['input']!r:.60}") from None
    try:
        check_class_names(valid.classes)
    except RequestError as error:
        raise fault(path, str(error)) from None
    _check_images(path, images)
    if list(images.shape[1:]) != valid.image_shape:
        shape = tuple(images.shape[1:])
        raise fault(path, f"images are {shape}, metadata says {tuple(valid.image_shape)}")
    _check_labels(path, labels, len(images), len(valid.classes))
    _check_recipe(path, valid.recipe, images)
    _check_extras(path, tensors, images[0].numel())
    return valid


def _check_names(path: Path, names: set[str]) -> None:
    zca = {"zca.mean", "zca.matrix", "zca.inverse"}
    optional = {"initial"} | (zca if zca <= names else set())
    if names - optional != {"images", "labels"}:
        found = ", ".join(sorted(names)) or "nothing"
        raise fault(path, f"holds the tensors {found[:100]}; a distilled set has images, labels")


def _check_recipe(path: Path, recipe: _RecipeInfo, images: Tensor) -> None:
    for key, value in (("mean", recipe.mean), ("std", recipe.std)):
        if len(value) != images.shape[1]:
            have = f"{len(value)} numbers for {images.shape[1]} channels"
            raise fault(path, f"the recipe's {key} has {have}")
    try:
        parse_strategy(recipe.augment)
    except RequestError as error:
        raise fault(path, f"the recipe's augment: {error}") from None
    _check_work(path, recipe, len(images))
    highest = max((max(step.rows) for step in recipe.steps), default=0)
    if highest >= len(images):
        raise fault(path, f"the recipe's steps train on row {highest} of {len(images)} images")


def _check_work(path: Path, recipe: _RecipeInfo, count: int) -> None:
    """How long training by the recipe may take; a step sees no image twice."""
    longest = max((len(step.rows) for step in recipe.steps), default=0)
    if longest > count:
        raise fault(path, f"a step of the recipe trains on {longest} rows of {count} images")
    visits = recipe.epochs * count
    if visits > _LARGEST_VISITS:
        have = f"{recipe.epochs} epochs of {count} images"
        raise fault(
            path, f"the recipe's {have} are {visits}, at most {_LARGEST_VISITS} are allowed"
        )
    steps = recipe.epochs * -(-count // recipe.batch_size)
    if steps > _LARGEST_STEPS:
        have = f"{recipe.epochs} epochs in batches of {recipe.batch_size}"
        raise fault(path, f"the recipe's {have} are {steps} steps, at most {_LARGEST_STEPS}")


def _check_extras(path: Path, tensors: Mapping[str, Tensor], dimensions: int) -> None:
    """The tensors of a recipe, beside the images and labels."""
    square = (dimensions, dimensions)
    shapes = {"zca.mean": (1, dimensions), "zca.matrix": square, "zca.inverse": square}
    for name, tensor in tensors.items():
        if name in ("images", "labels"):
            continue
        wanted = shapes.get(name, (max(1, tensor.numel()),))
        if tensor.dtype != torch.float32 or tensor.shape != wanted:
            have = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise fault(path, f"{name} is {have}, expected torch.float32 {wanted}")
        _check_values(path, f"{name} holds", tensor)


def _check_values(path: Path, what: str, values: Tensor) -> None:
    """Refuses NaN, infinity, and numbers beyond ``_LARGEST_VALUE`` on either side."""
    low, high = pixel_range(values)
    largest = max(abs(low), abs(high))
    if not math.isfinite(largest):
        raise fault(path, f"{what} NaN or infinite values")
    if largest > _LARGEST_VALUE:
        limit = f"at most {_LARGEST_VALUE:g} is allowed on either side"
        raise fault(path, f"{what} values from {low:.3g} to {high:.3g}, {limit}")


def _check_images(path: Path, images: Tensor) -> None:
    if images.dtype != torch.float32:
        raise fault(path, f"images are {images.dtype}, expected torch.float32")
    if images.ndim != 4 or not images.numel() or max(images.shape[1:]) > _LARGEST_SIDE:
        limits = f"expected (N, C, H, W), none 0, sides up to {_LARGEST_SIDE}"
        raise fault(path, f"images have the shape {tuple(images.shape)}, {limits}")
    _check_values(path, "images hold", images)


def _check_labels(path: Path, labels: Tensor, count: int, classes: int) -> None:
    if labels.dtype not in (torch.int64, torch.float32):
        raise fault(path, f"labels are {labels.dtype}, expected torch.int64 or torch.float32")
    expected = (count,) if labels.dtype == torch.int64 else (count, classes)
    if labels.shape != expected:
        have = f"{labels.dtype} labels have the shape {tuple(labels.shape)}"
        raise fault(path, f"{have}, expected {expected}")
    if labels.dtype == torch.float32:
        _check_values(path, "labels hold", labels)
    elif labels.min() < 0 or labels.max() >= classes:
        low, high = int(labels.min()), int(labels.max())
        raise fault(path, f"labels run from {low} to {high}, expected 0 to {classes - 1}")


def save_trigger(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes a trigger: its tensors by kind (pattern, mask, ...), and what it is.

    info: at least ``kind``, ``target`` and ``range``; JSON values.
    Raises RequestError where one is missing, a tensor is not finite, or the file can't be written.
    """
    _check_trigger(path, tensors, info)
    write_tensors(path, tensors, info)


def load_trigger(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the description of a :func:`save_trigger` file.

    Raises RequestError naming the file and the fault, as :func:`read_tensors` and ``save_trigger``.
    """
    path = Path(path)
    tensors, info = read_tensors(path)
    _check_trigger(path, tensors, info)
    return tensors, info


def _check_trigger(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    missing = [key for key in ("kind", "target", "range") if key not in info]
    if missing:
        raise fault(path, f"no trigger: its metadata lacks {', '.join(missing)}")
    kind, target = info["kind"], info["target"]
    if not isinstance(kind, str) or not kind.isprintable() or len(kind) > MAX_NAME:
        raise fault(path, f"the trigger's kind is {kind!r:.60}, expected a name")
    if target is not None and (type(target) is not int or target < 0):
        raise fault(path, f"the trigger's target is {target!r:.60}, expected a class number")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise fault(path, f"the trigger's {name} holds NaN or infinite values")


def pixel_range(images: Tensor) -> tuple[float, float]:
    """The smallest and the largest value of ``images`` (any shape, not empty)."""
    low, high = torch.aminmax(images)
    return float(low), float(high)


def quantised(distilled: DistilledSet) -> DistilledSet:
    """What 8-bit files keep of a set: its images clipped to [0, 1] and rounded to 1/255."""
    images = _bytes_of(distilled.batch.images).float() / 255
    return dataclasses.replace(distilled, batch=distilled.batch.replace(images=images))


def export_png(folder: Path, distilled: DistilledSet) -> list[Path]:
    """Writes every image as an 8-bit PNG, ``CLASSINDEX_classname/NNN.png``; returns their paths.

    Images are clipped to [0, 1] and rounded (:func:`quantised`); grey or RGB. Soft labels count as
    their largest entry. Class names lose what a file name cannot hold safely.
    Raises RequestError: other than 1 or 3 channels, a folder that holds files or can't be written.
    """
    from torchvision.transforms.functional import to_pil_image

    images = _bytes_of(distilled.batch.images).cpu()
    if images.shape[1] not in (1, 3):
        raise fault(folder, f"PNG holds 1 or 3 channels, the set has {images.shape[1]}")
    digits = len(str(len(distilled.classes) - 1))
    paths: list[Path] = []
    seen: dict[int, int] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):  # images of two sets in one folder would pass for one set
            raise fault(folder, "is not empty")
        for image, label in zip(images, hard_labels(distilled.batch.labels).tolist(), strict=True):
            name = re.sub(r"[^A-Za-z0-9.-]+", "_", distilled.classes[label])[:60]
            path = folder / f"{label:0{digits}d}_{name}" / f"{seen.get(label, 0):03d}.png"
            seen[label] = seen.get(label, 0) + 1
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, partial(to_pil_image(image).save, format="PNG"))
            paths.append(path)
    except OSError as error:
        raise fault(folder, f"cannot write: {error.strerror or error}") from None
    return paths


def _bytes_of(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
