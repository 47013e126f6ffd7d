"""A finished set to be measured, in a run's folder or a file, and the files beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from ...attacks import TestCase, goal_from, make_test_case, trigger_from
from ...distill.class_names import match_classes, named_number, same_names
from ...distill.data.raw import some
from ...distill.files.artifact import load_set, load_trigger
from ...distill.files.safe import read_header
from ...distill.networks.registry import NetworkSpec
from ...distill.notices import warn
from ...distill.types import DistilledSet, RequestError
from ..config.schema import Config, DataSection, RunSection, VictimSection
from ..results.record import Record, read_record
from ..results.subject import subject
from .folder import RunFolder, last_active, path_inside
from .reading import ReadingOptions, ReadSet, read_set
from .setup import Setup


@final
class SetFiles:
    """A run folder or a file to be evaluated, and the files beside it.

    In a run folder: the set, its trigger, its clean twin and its record. A file of this suite, or
    a file or folder of another project, is a set and nothing else.

    reading: how another project's files are to be read. control_run: the folder of the clean twin;
    by default the one that the record names, if it lies inside the run folder. read: what was
    decided about another project's set, known once it is loaded.
    """

    def __init__(
        self,
        path: Path,
        reading: ReadingOptions | None = None,
        control_run: Path | None = None,
    ) -> None:
        if not path.exists():
            raise RequestError(f"{path}: no such run folder or file")
        self.path, self.reading = path, reading or ReadingOptions()
        self.read: ReadSet | None = None
        self.record: Record | None = None
        self.set_file, self.trigger_file, self.control = path, None, None
        if path.is_dir() and RunFolder(path).record.exists():
            folder = RunFolder(path)
            self.record = read_record(folder.record)
            _check_source(path, self.record)
            self.set_file = folder.distilled
            self.trigger_file = folder.trigger if folder.trigger.exists() else None
            self.control = self._find_control()
        if control_run is not None:
            self._check_twin(control_run)
            self.control = RunFolder(control_run).distilled

    @property
    def origin(self) -> str:
        """Where the set is from, as far as this is known."""
        if self.record is None:
            return "origin unknown"
        return f"recorded as {subject(self.record, unattacked='no attack')}"

    @property
    def is_own(self) -> bool:
        """Whether the set's file is one of this suite, whose metadata say how to read it."""
        if self.record is not None:
            return True
        if self.set_file.is_dir():
            return False
        try:
            return read_header(self.set_file)[1]
        except RequestError:
            # A damaged file with our ending is read as ours: the fault is named there.
            return self.set_file.suffix == ".safetensors"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the set was read from, known once it is loaded."""
        return (self.set_file,) if self.read is None else self.read.files

    @property
    def labels(self) -> list[str]:
        """Warnings that stand beside every figure of the set, known once it is loaded."""
        return [] if self.read is None else list(self.read.notes)

    @property
    def warnings(self) -> list[str]:
        """What of the run folder is not used."""
        named = self.record.control if self.record else None
        if not named or self.control is not None:
            return []
        return [f"no control: the clean twin, {named['folder']}, is not in the run's folder"]

    def _find_control(self) -> Path | None:
        named = self.record.control if self.record else None
        place = path_inside(self.path, self.path / named["folder"]) if named else None
        twin = place and RunFolder(place).distilled
        return twin if twin and twin.exists() else None

    def _check_twin(self, control_run: Path) -> None:
        """Refuse a clean twin of another run than this one."""
        twin = read_record(RunFolder(control_run).record)
        if self.record is None or not self.record.config.get("attack"):
            raise RequestError("--control-run is for the folder of a run with an attack")
        if twin.kind != "distill" or twin.control_key != self.record.control_key:
            raise RequestError(f"{control_run} is no clean twin of {self.path}")

    def load(self, setup: Setup, *, bars: bool = False) -> DistilledSet:
        """The set; files of other projects hold no recipe and get the configuration's."""
        if not self.is_own:
            self.read = read_set(self.set_file, setup, self.reading, bars=bars)
            for text in self.read.notes:
                warn(f"{self.set_file}: {text}")
            return self.read.distilled
        return self.load_own()

    def load_own(self) -> DistilledSet:
        """The set in a file of this suite.

        Errors: ``RequestError`` also for options of reading that such a file does not need.
        """
        if self.reading.number:
            number = self.reading.number
            raise RequestError(f"{self.set_file} holds one set: there is no set {number}")
        if self.reading.choices:
            raise RequestError(
                f"{self.set_file} is a file of this suite, which says how it is read: leave out "
                "--space, --factor and --labels"
            )
        return load_set(self.set_file)


# What measuring a set depends on; the other keys are about how it was made.
_MEASURING = {
    key
    for section in (DataSection, NetworkSpec, VictimSection, RunSection)
    for key in section.model_fields
}


def measured_config(config: Config, found: SetFiles, given: Collection[str]) -> dict[str, Any]:
    """The keys of ``config`` that a record of measuring the set may show.

    Those of the measurement, those ``given``, and those that the set's own record has too. Others
    are defaults, and no facts about the set.
    """
    recorded = found.record.config if found.record else {}
    return {
        key: value
        for key, value in config.flat().items()
        if key in _MEASURING or key in given or (key in recorded and recorded[key] == value)
    }


def check_fit(path: Path, distilled: DistilledSet, setup: Setup) -> None:
    """Refuse a set whose images or classes are not those of the data."""
    data = setup.data
    if distilled.image_shape != data.image_shape or len(distilled.classes) != len(data.classes):
        raise RequestError(
            f"{path}: {distilled.image_shape} images of {len(distilled.classes)} classes don't fit "
            f"{data.name}: {data.image_shape}, {len(data.classes)} classes"
        )


def in_set_order(path: Path, distilled: DistilledSet, setup: Setup) -> Setup:
    """``setup`` with the data's classes in the order of the set in ``path``, matched by name.

    The data's labels change and not the set's: a set may hold weights that training starts from,
    and their outputs have its order.
    Errors: ``RequestError`` where the names contradict each other.
    """
    theirs, data = distilled.classes, setup.data
    try:
        numbers = match_classes(theirs, data.classes)
    except RequestError as error:
        raise RequestError(f"{path} and {data.name}: {error}") from error
    if not same_names(theirs, [data.classes[number] for number in numbers]):
        warn(
            f"{path}: its classes are called {some(theirs)}, those of {data.name} "
            f"{some(data.classes)}: they are matched by number"
        )
    if numbers == sorted(numbers):
        return setup
    warn(f"{path}: its classes have another order than those of {data.name}: matched by name")
    return replace(setup, data=data.in_order(numbers))


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
    info = _with_class_numbers(path, info, data.classes)
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


def _with_class_numbers(
    path: Path, info: Mapping[str, Any], classes: Sequence[str]
) -> dict[str, Any]:
    """A trigger's description with the numbers that its target and source have among ``classes``.

    Errors: ``RequestError`` where several classes have the name.
    """
    found = dict(info)
    for role in ("target", "source"):
        name, number = info.get(f"{role}_class"), info.get(role)
        if not isinstance(name, str) or not isinstance(number, int):
            continue
        try:
            found[role] = named_number(name, number, classes)
        except RequestError as error:
            raise RequestError(f"{path}: the trigger's {role}: {error}") from error
        if found[role] != number:
            warn(f"{path}: the trigger's {role} {name!r} is class {found[role]} here, not {number}")
        elif 0 <= number < len(classes) and not same_names([name], [classes[number]]):
            warn(
                f"{path}: no class is called {name!r}: the trigger's {role} is class {number}, "
                f"{classes[number]!r}"
            )
    return found


def _check_source(path: Path, record: Record) -> None:
    if record.kind == "seeds":
        raise RequestError(f"{path} holds several seeds: evaluate one of them, {path}/seed-N")
    measured = {"evaluate": "an evaluation", "defend": "a defended set"}.get(record.kind)
    if measured:
        raise RequestError(
            f"{path} is itself {measured}, of {record.distilled.get('source', 'a set')}"
        )
    if record.status != "done":
        state = f"{record.status}, last active {last_active(path)}"
        raise RequestError(f"{path} is not finished ({state}): continue it with --resume")
