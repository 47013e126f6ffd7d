"""Open a finished set to be measured: load it, check it, and make the record."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from ...attacks import TestCase
from ...distill.files.artifact import load_set, quantised, save_set
from ...distill.types import DistilledSet
from ..config.schema import Config
from ..results.record import Record, RecordKind
from .own_network import with_own_network
from .reading import ReadingOptions
from .recipes import override_given
from .records import count_per_class, describe_set, new_record
from .setup import Setup, prepare, with_preprocessing
from .source import (
    SetFiles,
    check_fit,
    fingerprint,
    in_set_order,
    measured_config,
    trigger_case,
)

Source = Path | str | DistilledSet
"""A run's folder, a file, or the set itself."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedSet:
    """A finished set with all that measuring it needs, on the run's device.

    case: the test case of its trigger; ``None`` where no trigger is known. twin: its clean twin;
    ``None`` where there is none, or no trigger. record: the record of the measurement.
    """

    setup: Setup
    distilled: DistilledSet
    twin: DistilledSet | None
    case: TestCase | None
    record: Record


def name_of(source: Source) -> str:
    """What records and messages call a set to be measured."""
    return "a DistilledSet" if isinstance(source, DistilledSet) else str(source)


@contextmanager
def as_path(source: Source) -> Iterator[Path]:
    """``source`` as a path; a ``DistilledSet`` is a file while it is opened, checked as any."""
    if not isinstance(source, DistilledSet):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "DistilledSet.safetensors"
        save_set(path, source)
        yield path


def open_set(
    source: Source,
    config: Config,
    kind: RecordKind,
    *,
    settings: object,
    given: Sequence[str] = (),
    reading: ReadingOptions | None = None,
    trigger: Path | str | None = None,
    control_run: Path | str | None = None,
    data_dir: Path | str | None = None,
    bars: bool = False,
    eight_bits: bool = False,
    attacked: bool = True,
) -> OpenedSet:
    """The set in ``source`` as ``config`` measures it; writes nothing.

    source: as for ``Source``. kind: of the record. settings: what the measurement depends on beside
    the configuration and the files. given: the keys that the user chose; they override the set's
    own recipe. reading: how another project's files are to be read. trigger: a trigger file
    (default: the one beside the set). control_run: as for ``SetFiles``. bars: as for ``prepare``.
    eight_bits: round the images as PNG files do. attacked: whether the set is measured as an
    attacked one; otherwise the trigger and the twin beside it are left out.
    Errors: ``RequestError`` where the set does not fit the test data.
    """
    twin_folder = None if control_run is None else Path(control_run)
    with as_path(source) as path:
        return _opened(
            SetFiles(path, reading, twin_folder),
            name_of(source),
            config,
            kind,
            settings=settings,
            given=given,
            trigger=Path(trigger) if trigger else None,
            data_dir=data_dir,
            bars=bars,
            eight_bits=eight_bits,
            attacked=attacked,
        )


def _opened(
    found: SetFiles,
    name: str,
    config: Config,
    kind: RecordKind,
    *,
    settings: object,
    given: Sequence[str],
    trigger: Path | None,
    data_dir: Path | str | None,
    bars: bool,
    eight_bits: bool,
    attacked: bool,
) -> OpenedSet:
    """As ``open_set``. name: what the record calls the source."""
    config, warnings = with_own_network(config, found, given)
    setup = prepare(config, data_dir, bars=bars)

    def as_measured(distilled: DistilledSet) -> DistilledSet:
        recipe = override_given(distilled.recipe, config.victims, given)
        distilled = replace(distilled, recipe=recipe)
        return quantised(distilled) if eight_bits else distilled

    loaded = found.load(setup, bars=bars)
    check_fit(found.set_file, loaded, setup)
    setup = with_preprocessing(setup, loaded.recipe.preprocessing)
    setup = in_set_order(found.set_file, loaded, setup)
    record = new_record(setup, given, kind)
    record.config = measured_config(config, found, given)
    record.labels += [*found.labels, *(found.warnings if attacked else []), *warnings]
    distilled = as_measured(loaded)
    record.recipe = distilled.recipe.describe()
    if eight_bits:
        record.labels.append("8-bit images: clipped to [0, 1] and rounded")
    trigger = trigger or (found.trigger_file if attacked else None)
    case = trigger_case(trigger, setup, record)
    files = (*found.files, trigger, found.control if attacked else None)
    record.distilled = {
        **describe_set(distilled),
        "per_class": count_per_class(distilled),
        "source": name,
        "origin": found.origin,
        "fingerprint": fingerprint((record.recipe, settings, *found.reading.choices), files),
    }
    twin = None
    if found.control and case:
        twin = as_measured(load_set(found.control))
        check_fit(found.control, twin, setup)
    return OpenedSet(
        setup=setup,
        distilled=distilled.to(config.run.device),
        twin=None if twin is None else twin.to(config.run.device),
        case=case,
        record=record,
    )
