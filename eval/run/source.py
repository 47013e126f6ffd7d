"""A finished set to be measured, in a run's folder or a file, and the files beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from ...attacks import TestCase, goal_from, make_test_case, trigger_from
from ...distill.files.artifact import load_set, load_trigger
from ...distill.files.foreign import import_pt
from ...distill.types import DistilledSet, RequestError
from ..results.record import Record, read_record
from .folder import RunFolder
from .setup import Setup


@final
class SetFiles:
    """A run folder or a file to be evaluated, and the files beside it.

    In a run folder: the set, its trigger, its clean twin and its configuration. A file
    (``.safetensors``, or another project's ``.pt``) is a set and nothing else.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise RequestError(f"{path}: no such run folder or file")
        self.path = path
        self.record: Record | None = None
        self.set_file, self.trigger_file, self.control = path, None, None
        if path.is_dir():
            folder = RunFolder(path)
            self.record = read_record(folder.record)
            _check_source(path, self.record)
            self.set_file = folder.distilled
            self.trigger_file = folder.trigger if folder.trigger.exists() else None
            self.control = self._find_control(folder)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration the set was made with, where it is known."""
        return dict(self.record.config) if self.record else {}

    def _find_control(self, folder: RunFolder) -> Path | None:
        known = self.record.control if self.record else None
        if not known:
            return None
        twin = folder.path / known["folder"] / "distilled.safetensors"
        return twin if twin.exists() else None

    def load(self, setup: Setup) -> DistilledSet:
        """The set; a ``.pt`` file holds no recipe and gets the configuration's."""
        data, space = setup.data, setup.data.preprocessing
        if self.set_file.suffix in (".pt", ".pth"):
            sets = import_pt(self.set_file, preprocessing=space, classes=data.classes)
            return replace(sets[0], recipe=setup.recipe)
        return load_set(self.set_file)


def check_fit(path: Path, distilled: DistilledSet, setup: Setup) -> None:
    """Refuse a set whose images or classes are not those of the data."""
    data = setup.data
    if distilled.image_shape != data.image_shape or len(distilled.classes) != len(data.classes):
        raise RequestError(
            f"{path}: {distilled.image_shape} images of {len(distilled.classes)} classes don't fit "
            f"{data.name}: {data.image_shape}, {len(data.classes)} classes"
        )


def fingerprint(what: object, files: Iterable[Path | None]) -> str:
    """A hash of what a measurement depends on beside its configuration: ``what``, and files."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8)
    for file in files:
        digest.update(file.read_bytes() if file else b"none")
    return digest.hexdigest()


def trigger_case(path: Path | None, setup: Setup, record: Record) -> TestCase | None:
    """The test case of the trigger in ``path``; its description goes into the record.

    Errors: ``RequestError`` naming the file, where it is damaged or does not suit the data.
    """
    if path is None:
        return None
    tensors, info = load_trigger(path)
    data, test = setup.data, setup.data.test
    moved = {name: tensor.to(test.images.device) for name, tensor in tensors.items()}
    try:
        trigger, goal = trigger_from(info, moved), goal_from(info, len(data.classes))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    if not trigger.fits(data.image_shape):
        raise RequestError(f"{path}: the trigger does not fit {data.image_shape} images")
    record.trigger = {**trigger.describe(), **goal.describe(data.classes)}
    record.labels += trigger.labels
    return make_test_case(trigger, goal, test.images, test.labels)


def _check_source(path: Path, record: Record) -> None:
    if record.kind == "seeds":
        raise RequestError(f"{path} holds several seeds: evaluate one of them, {path}/seed-N")
    measured = {"evaluate": "an evaluation", "defend": "a defended set"}.get(record.kind)
    if measured:
        raise RequestError(f"{path} is itself {measured}, of {record.distilled['source']}")
    if record.status != "done":
        raise RequestError(f"{path} is not finished ({record.status}): continue it with --resume")
