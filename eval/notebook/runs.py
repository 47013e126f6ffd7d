"""``attack``, ``distill`` and ``evaluate`` from Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...distill.types import DistilledSet, RequestError
from ..config.layers import for_clean, gather, without_attack
from ..config.schema import Config, configure
from ..results.record import Record
from ..run.cell import run_cell
from ..run.evaluate import evaluate
from ..run.folder import RunFolder, fresh_folder
from ..run.intercept import intercept
from ..run.opening import Source, name_of
from ..run.progress import OnIteration, Reporter
from ..run.reading import ReadingOptions
from ..run.recorded import resumed_keys, source_keys
from ..run.seeds import run_seeds
from ..run.source import SetFiles
from ..run.survival import evaluate_survival
from .naming import Keys, named

Measured = Source | Record
"""What may be measured: a run's folder, a file, a ``DistilledSet``, or the record of a run."""
Folder = Path | str


def run_attack(
    *,
    preset: str | None = None,
    on: Measured | None = None,
    reading: ReadingOptions | None = None,
    seeds: int | None = None,
    out: Folder | None = None,
    resume: bool = False,
    trust: bool = False,
    data_dir: Folder | None = None,
    control_run: Folder | None = None,
    reference_run: Folder | None = None,
    buffer: Folder | None = None,
    quiet: bool = False,
    on_iteration: OnIteration | None = None,
    **keys: Any,
) -> Record:
    """Distil under an attack, with its clean twin, and measure both; as ``distillsec attack``.

    keys: of the configuration (``trigger_size=4``); they win over the ``preset``. ``attack`` and
    ``backend`` may be classes, an attack also an instance (its options count), ``network`` a class,
    a function or a module (copied, with fresh weights), ``dataset`` a torch ``Dataset`` or tensors
    (``given_dataset`` has the forms). on: a finished set to attack without raw data, with
    ``reading`` as for ``evaluate``. seeds: the number of distillation seeds. out: the run's
    folder, by default a fresh one under ``runs/``. resume: continue the run in ``out``; its keys
    may be left out, objects not. trust: use the classes and paths that its record names. data_dir,
    control_run, reference_run, buffer: as for ``run_cell``. on_iteration: called after each outer
    iteration, for trackers.
    Returns the record, which is also in ``out``. Errors: ``RequestError`` before any work,
    ``RunError`` for a run that failed.
    """
    with named(keys) as chosen:
        own = gather(preset=preset, options=chosen)
        resumed = _resumed(out, own, resume=resume, trust=trust)
        reporter = Reporter(quiet=quiet, on_iteration=on_iteration)
        if on is not None:
            if (seeds, control_run, reference_run, buffer) != (None,) * 4:
                raise RequestError(
                    "seeds, control_run, reference_run and buffer are for attacks that distil: "
                    "leave them out with on="
                )
            received = without_attack(_of_source(on, own, trust))
            config = configure(**{**received, **resumed, **own})
            arguments: Keys = {"data_dir": data_dir, "resume": resume, "reporter": reporter}
            place = folder_for(out, f"{config.attack}-{stem_of(on)}")
            arguments |= {"given": sorted(own), "reading": reading}
            return intercept(as_source(on), config, place, **arguments)
        if reading is not None:
            raise RequestError("reading is for a file: name it with on=")
        config = configure(**{**resumed, **own})
        if config.attack is None:
            raise RequestError("no attack was chosen: attack=NAME or a class")
        return _run(
            config,
            folder_for(out, preset or f"{config.set.backend}-{config.attack}"),
            seeds,
            control_run,
            reference_run,
            given=sorted(own),
            data_dir=data_dir,
            resume=resume,
            buffer=buffer,
            reporter=reporter,
        )


def run_distill(
    *,
    preset: str | None = None,
    seeds: int | None = None,
    out: Folder | None = None,
    resume: bool = False,
    trust: bool = False,
    data_dir: Folder | None = None,
    buffer: Folder | None = None,
    quiet: bool = False,
    on_iteration: OnIteration | None = None,
    **keys: Any,
) -> Record:
    """Distil without an attack and measure clean test accuracy; as ``distillsec distill``.

    An attack in the preset is left out. Arguments, result and errors: as for ``run_attack``.
    """
    with named(keys) as chosen:
        own = gather(preset=preset, options=chosen)
        config = for_clean({**_resumed(out, own, resume=resume, trust=trust), **own})
        return _run(
            config,
            folder_for(out, preset or f"{config.set.backend}-clean"),
            seeds,
            None,
            None,
            given=sorted(own),
            data_dir=data_dir,
            resume=resume,
            buffer=buffer,
            reporter=Reporter(quiet=quiet, on_iteration=on_iteration),
        )


def run_evaluate(
    source: Measured,
    *,
    preset: str | None = None,
    survival: bool = False,
    png: bool = False,
    reading: ReadingOptions | None = None,
    trigger: Folder | None = None,
    control_run: Folder | None = None,
    out: Folder | None = None,
    resume: bool = False,
    trust: bool = False,
    data_dir: Folder | None = None,
    quiet: bool = False,
    **keys: Any,
) -> Record:
    """Train fresh victims on a finished set and measure them; as ``distillsec evaluate``.

    source: a run's folder or record, a file, or a ``DistilledSet``; for the last two name the
    ``dataset``. survival: measure what survives other formats, networks, recipes and sizes.
    png, reading, trigger, control_run: as for ``evaluate``. The others, result and errors: as
    for ``run_attack``.
    """
    if png and survival:
        raise RequestError("survival measures 8-bit images too: leave out png")
    with named(keys) as chosen:
        config, given = measured_config(source, preset, chosen, out, resume=resume, trust=trust)
        folder = folder_for(out, f"evaluate-{stem_of(source)}")
        arguments: Keys = {
            "given": given,
            "reading": reading,
            "trigger": trigger,
            "control_run": control_run,
            "data_dir": data_dir,
            "resume": resume,
            "reporter": Reporter(quiet=quiet),
        }
        if survival:
            return evaluate_survival(as_source(source), config, folder, **arguments)
        return evaluate(as_source(source), config, folder, png=png, **arguments)


def measured_config(
    source: Measured,
    preset: str | None,
    keys: Keys,
    out: Folder | None,
    *,
    resume: bool,
    trust: bool,
) -> tuple[Config, list[str]]:
    """The configuration with which a finished set is measured, and the keys that were chosen."""
    own = gather(preset=preset, options=keys)
    resumed = _resumed(out, own, resume=resume, trust=trust)
    return configure(**{**_of_source(source, own, trust), **resumed, **own}), sorted(own)


def _of_source(source: Measured, own: Keys, trust: bool) -> Keys:
    """What the record of a run to be measured says of its configuration."""
    found = as_source(source)
    record = None if isinstance(found, DistilledSet) else SetFiles(Path(found)).record
    if record is not None and not isinstance(found, DistilledSet):
        return source_keys(record, Path(found), own, trust=trust)
    if "dataset" not in own:
        raise RequestError(f"{name_of(found)} has no record: name the data to test it on, dataset=")
    return {}


def _resumed(out: Folder | None, own: Keys, *, resume: bool, trust: bool) -> Keys:
    if not resume:
        return {}
    if out is None:
        raise RequestError("resume needs the run's folder: out=FOLDER")
    return resumed_keys(RunFolder(Path(out)), own, trust=trust)


def _run(
    config: Config,
    out: Path,
    seeds: int | None,
    control_run: Folder | None,
    reference_run: Folder | None,
    **arguments: Any,
) -> Record:
    if seeds is None:
        arguments |= {"control_run": control_run, "reference_run": reference_run}
        return run_cell(config, out, **arguments)
    if control_run is not None or reference_run is not None:
        raise RequestError("control_run and reference_run are for one seed: leave out seeds")
    return run_seeds(config, seeds, out, **arguments)


def as_source(source: Measured) -> Source:
    """``source``; of a record its folder."""
    return source.folder if isinstance(source, Record) else source


def stem_of(source: Measured) -> str:
    """What a folder for measurements of ``source`` is named after."""
    found = as_source(source)
    return "set" if isinstance(found, DistilledSet) else Path(found).stem or "set"


def folder_for(out: Folder | None, name: str) -> Path:
    """The folder given, or a fresh one for ``name``, in which a class goes without its module."""
    return fresh_folder(re.sub(r"[\w.]+:", "", name)) if out is None else Path(out)
