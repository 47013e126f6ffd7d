"""What is refused before a run: impossible starts, and runs that do not belong together."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ...attacks import PoisoningOptions, SetAttack
from ...distill.core.start import start_run
from ...distill.files.artifact import check_set, load_set
from ...distill.types import Batch, Distillate, DistilledSet, RequestError, RunError
from ..config.schema import Config
from ..results.record import Record, read_record
from .setup import Setup

# Keys in which a clean set of reference may differ: its seed, the machine, how it was measured.
_NOT_OF_THE_SET = {"seed", "device", "threads", "curve_every", "victims", "victim_network"}
_NOT_OF_THE_SET |= {"control"}


def check_start(setup: Setup) -> None:
    """Build everything that a run builds before its first step, once, to see that it can.

    Errors: ``RequestError``, for example for more poisoned rows, or more images to start from, than
    a class has. A hook that fails is left to the run, which records it.
    """
    backend, attack, options = setup.backend(), setup.attack(), setup.config.attack_options
    if isinstance(attack, SetAttack):
        raise RequestError(f"attack {attack.name} takes a finished set: name it with --on FILE")
    share = options.target_share if isinstance(options, PoisoningOptions) else None
    if share is not None and backend.keeps_rows:
        raise RequestError(
            f"target_share {share} has no effect: backend {backend.name} draws no "
            "batches; leave it out (--set target_share=null)"
        )
    _check_saving(setup)
    with contextlib.suppress(RunError):
        start_run(setup.task(), backend, [attack] if attack else [])


def _check_saving(setup: Setup) -> None:
    """Refuse names, shapes and recipes with which the finished set could not be saved."""
    images = torch.zeros(1, *setup.data.image_shape)
    blank = Batch(images=images, labels=torch.zeros(1, dtype=torch.int64))
    made = setup.distilled_set(Distillate(batch=blank, recipe=setup.recipe))
    check_set(Path("distilled.safetensors"), made)


def check_buffer(buffer: Path | str | None, config: Config) -> None:
    """Refuse a folder for experts where the backend trains none."""
    if buffer is not None and not config.backend_class().expert_options:
        raise RequestError(f"--buffer {buffer}: backend {config.set.backend} trains no experts")


def check_same_buffer(earlier: Record, wanted: Record, out: Path) -> None:
    """Refuse to resume a run without the folder that holds its experts.

    The folder in ``earlier`` is not used by itself: the record may be another person's.
    """
    if earlier.buffer is not None and wanted.buffer is None:
        raise RequestError(f"{out} was run with --buffer {earlier.buffer}: repeat it, or --trust")


def check_same_run(earlier: Record, wanted: Record, out: Path) -> None:
    """Refuse to resume a run with another configuration or other data."""
    if earlier.kind != wanted.kind:
        hint = ": resume it with --seeds N" if earlier.kind == "seeds" else ""
        raise RequestError(f"{out} holds a run of kind {earlier.kind}, not {wanted.kind}{hint}")
    check_objects(earlier, out, wanted.objects)
    if earlier.config_key != wanted.config_key:
        raise RequestError(
            f"{out} holds another run; it can't be resumed with "
            f"{_differences(earlier.config, wanted.config)}"
        )
    if earlier.dataset != wanted.dataset:
        raise RequestError(f"{out} was run on other data: {wanted.config['dataset']} has changed")
    if earlier.distilled.get("fingerprint") != wanted.distilled.get("fingerprint"):
        raise RequestError(f"{out} was run on another set, trigger or recipe")


def check_objects(earlier: Record, out: Path, given: Collection[str]) -> None:
    """Refuse to use the record of a run without the objects that it was given in Python.

    given: the keys that are given anew. Defenses are not needed: those that ran are kept.
    """
    for key, names in earlier.objects.items():
        if key not in given and key != "defenses":
            raise RequestError(
                f"{out} was run with {key} {', '.join(names)}, given as an object in Python: give "
                f"it again there, with {key}=..."
            )


def check_control(path: Path, config: Config, dataset: Mapping[str, Any]) -> None:
    """Refuse a clean twin of another configuration or other data, or one that is not finished.

    dataset: what the record says of the data (``ImageSet.describe``).
    """
    if not config.attack or not config.victims.control:
        raise RequestError("--control-run is for a run with an attack, and not with --no-control")
    record = read_record(path / "record.json")
    if record.status != "done" or record.kind != "distill":
        raise RequestError(f"{path} is no finished clean run: {record.kind}, {record.status}")
    if record.control_key != config.control_key():
        differences = _differences(record.config, config.without_attack().flat())
        raise RequestError(f"{path} is no clean twin of this run; it differs in {differences}")
    if record.dataset != dataset:
        raise RequestError(f"{path} is no clean twin of this run: {dataset['name']} has changed")
    load_set(path / "distilled.safetensors")


def check_reference(path: Path, config: Config, dataset: Mapping[str, Any]) -> DistilledSet:
    """The clean set in ``path``, made as the clean twin of this run but from another seed.

    dataset: as for ``check_control``. Errors: ``RequestError`` for any other run.
    """
    if not config.attack or not config.victims.control:
        raise RequestError("--reference-run is for a run with an attack and a clean twin")
    record = read_record(path / "record.json")
    if record.status != "done" or record.kind != "distill":
        raise RequestError(f"{path} is no finished clean run: {record.kind}, {record.status}")
    if record.dataset != dataset:
        raise RequestError(f"{path} was run on other data than {dataset['name']} as it is now")
    theirs, ours = (
        {key: value for key, value in keys.items() if key not in _NOT_OF_THE_SET}
        for keys in (record.config, config.without_attack().flat())
    )
    if theirs != ours:
        raise RequestError(f"{path} is no reference: it differs in {_differences(theirs, ours)}")
    if record.config.get("seed") == config.run.seed:
        raise RequestError(f"{path} has the seed of this run, {config.run.seed}: no reference")
    return load_set(path / "distilled.safetensors")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out; on a CPU torch has no type for it."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _differences(earlier: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first three keys that differ, with both values."""
    keys = sorted({*earlier, *wanted} - {"control"})
    changed = [key for key in keys if earlier.get(key) != wanted.get(key)]
    shown = [f"{key} {wanted.get(key)!r} (was {earlier.get(key)!r})" for key in changed[:3]]
    return ", ".join(shown) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
