"""Read a set of another project: what it holds, what its values mean, whether it is packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from ...distill.class_names import match_classes
from ...distill.data.registry import ImageSet
from ...distill.files.artifact import check_set, pixel_range
from ...distill.files.formats import labelled, read_received
from ...distill.files.formats.image_folders import class_numbers
from ...distill.files.formats.stored_set import StoredSet
from ...distill.files.safe import fault
from ...distill.files.spaces import FARTHEST_MEAN, ROUNDING, PixelEvidence
from ...distill.preprocessing import Preprocessing
from ...distill.types import Batch, DistilledSet, RequestError
from .choosing import (
    Choice,
    DataSpaces,
    choose_factor,
    choose_space,
    given_space,
    likely_factor,
    packed_note,
    unpacked,
)
from .setup import Setup
from .small_victims import SmallVictims, held_out_images


@final
@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How a file is to be read; what is ``None`` is found out.

    number: which of the sets in a file, from 0 (default: the first). space: a key of ``SPACES``.
    factor: each image packs factor² smaller ones; 1: none does. labels: a file or folder of labels.
    """

    number: int | None = None
    space: str | None = None
    factor: int | None = None
    labels: Path | None = None

    @property
    def choices(self) -> tuple[object, ...]:
        """What was chosen, for a fingerprint; empty for the defaults."""
        number = (self.number,) if self.number else ()
        given = (self.space, self.factor, self.labels)
        return number if given == (None, None, None) else (*number, *map(str, given))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ReadSet:
    """A set of another project, in pixel space, with what was decided about it.

    form: a key of ``FORMATS``. accuracies: of the small victims by reading; empty where nothing had
    to be tried. evidence: of the pixels by space. files: all that was read. notes: all that was
    assumed and decided, a sentence each.
    """

    distilled: DistilledSet
    form: str
    space: str
    factor: int
    accuracies: Mapping[str, float]
    evidence: Mapping[str, PixelEvidence]
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def read_set(
    path: Path,
    setup: Setup,
    options: ReadingOptions,
    clean: Batch | None = None,
    *,
    bars: bool = False,
) -> ReadSet:
    """The set in ``path``, a file or folder of another project.

    setup: the data that the set was distilled from, and the victims' recipe. clean: real images to
    test readings on, by default up to 500 training images of the data; without any the values alone
    decide. bars: whether trying readings shows a progress bar.
    Errors: ``RequestError`` naming the file: it cannot be read safely, it does not fit the data,
    its values fit no space; an unknown space.
    """
    data, device = setup.data, setup.config.run.device
    victims = SmallVictims(setup=setup, clean=held_out_images(setup) if clean is None else clean)
    form, found = read_received(path, options.number)
    found = labelled(path, found, len(data.classes), options.labels)
    _check_shape(path, found.images, data)
    stored = Batch(images=found.images, labels=_labels(path, found, data)).to(device)
    likely = options.factor or likely_factor(stored, victims.clean, len(data.classes))
    spaces = DataSpaces(data)
    try:
        given = options.space or ("zca" if data.zca is not None else None)
        space = (
            given_space(given)
            if given
            else choose_space(stored, spaces, victims, likely, bars=bars)
        )
        preprocessing = spaces.preprocessing(space.chosen)
        pixels = stored.replace(images=spaces.pixels(space.chosen, stored.images))
        packed = _packing(pixels, preprocessing, victims, options.factor, likely)
    except RequestError as error:
        raise fault(path, str(error)) from None
    factor = int(packed.chosen)
    recipe = dataclasses.replace(setup.recipe, preprocessing=preprocessing.to("cpu"))
    if found.rate is not None:
        recipe = dataclasses.replace(recipe, lr=found.rate)
    batch = unpacked(pixels, factor).to("cpu")
    distilled = DistilledSet(batch=batch, classes=data.classes, recipe=recipe)
    check_set(path, distilled)
    return ReadSet(
        distilled=distilled,
        form=form,
        space=space.chosen,
        factor=factor,
        accuracies={**space.accuracies, **packed.accuracies},
        evidence=space.evidence,
        files=found.files,
        notes=(*found.notes, *space.notes, *packed.notes, *_range_notes(path, batch.images)),
    )


def _packing(
    batch: Batch,
    preprocessing: Preprocessing,
    victims: SmallVictims,
    given: int | None,
    likely: int,
) -> Choice:
    """The factor by which a set in pixel space is packed: the one given, or found out."""
    if given is not None:
        notes = (f"{packed_note(given, len(batch))}, as given",) if given > 1 else ()
        return Choice(chosen=str(given), notes=notes)
    if likely == 1:
        return Choice(chosen="1", notes=())
    return choose_factor(batch, preprocessing, victims, likely)


def _check_shape(path: Path, images: Tensor, data: ImageSet) -> None:
    shape = tuple(images.shape[1:])
    if shape != data.image_shape:
        raise fault(path, f"{shape} images don't fit {data.name}: {data.image_shape}")


def _labels(path: Path, found: StoredSet, data: ImageSet) -> Tensor:
    """The labels with the class numbers of the data; classes are matched by name.

    Errors: ``RequestError`` for labels of other classes than the data's.
    """
    labels, count = found.labels, len(data.classes)
    assert labels is not None
    if found.classes is not None and labels.ndim == 1:
        labels = _numbers(path, found.classes, data)[_in_range(path, labels, len(found.classes))]
    elif found.classes is not None and labels.shape[1] == len(found.classes) == count:
        labels = labels[:, _numbers(path, found.classes, data).argsort()]
    if labels.ndim == 2 and labels.shape[1] != count:
        have = f"soft labels have {labels.shape[1]} classes"
        raise fault(path, f"{have}, which don't fit {data.name}: {count} classes")
    return _in_range(path, labels, count) if labels.ndim == 1 else labels


def _in_range(path: Path, labels: Tensor, count: int) -> Tensor:
    """Hard ``labels`` of ``count`` classes. Errors: ``RequestError`` for those of others."""
    if not 0 <= int(labels.min()) <= int(labels.max()) < count:
        have = f"labels run from {int(labels.min())} to {int(labels.max())}"
        raise fault(path, f"{have}, expected 0 to {count - 1}")
    return labels


def _numbers(path: Path, theirs: Sequence[str], data: ImageSet) -> Tensor:
    """For each class of a file its number in the data: by name, or the number in its name.

    Errors: ``RequestError`` for other numbers of classes, and names that contradict the data's.
    """
    names = [sorted(map(str.casefold, classes)) for classes in (theirs, data.classes)]
    numbered = class_numbers(theirs) if names[0] != names[1] else None
    if numbered is not None:
        return torch.tensor(numbered)
    if len(theirs) != len(data.classes):
        have = f"{len(theirs)} classes"
        raise fault(path, f"{have} don't fit {data.name}: {len(data.classes)} classes")
    try:
        return torch.tensor(match_classes(theirs, data.classes))
    except RequestError as error:
        raise fault(path, str(error)) from None


def _range_notes(path: Path, pixels: Tensor) -> list[str]:
    """What the range of the pixels tells; far outside [0, 1] they are refused."""
    (low, high), mean = pixel_range(pixels), float(pixels.mean())
    span = f"its pixels run from {low:.3g} to {high:.3g}"
    if not -FARTHEST_MEAN <= mean <= 1 + FARTHEST_MEAN:
        raise fault(
            path, f"{span}, {mean:.3g} on average, where [0, 1] is expected: another --space?"
        )
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return []
    share = float(((pixels < 0) | (pixels > 1)).float().mean())
    return [f"{span}, {share:.0%} of them outside [0, 1]"]
