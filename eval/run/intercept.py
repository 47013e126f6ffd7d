"""An interceptor's attack on a finished set, in a run's folder or a file: no raw training data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...attacks import ATTACKS, SetAttack
from ...distill.backends.received_set import ReceivedSet
from ...distill.core.task import Task
from ...distill.files.artifact import save_set, save_trigger
from ...distill.types import Batch, Distillate, DistilledSet, RequestError
from ..config.schema import Config
from ..figures.run_pictures import distilled_picture
from ..results.record import Record
from .cell import Cell, trigger_info
from .distilling import distil_in
from .folder import RunFolder
from .opening import OpenedSet, Source, as_path, open_set
from .own_network import with_own_network
from .progress import Reporter
from .reading import ReadingOptions
from .setup import Setup
from .source import SetFiles
from .victims import train_victim


def intercept(
    source: Source,
    config: Config,
    out: Path | str,
    *,
    given: Sequence[str] = (),
    reading: ReadingOptions | None = None,
    data_dir: Path | str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Record:
    """Attack the set in ``source`` in the folder ``out``; returns and writes the record.

    config: a ``SetAttack``, the test data and the victims; the set's own recipe is used, with the
    overrides that ``given`` names. The attack sees the set and nothing else: of the data set only
    the test images and the class names are used, to measure it (for another project's file also
    what reading it needs). The clean twin is the received set itself. given, reading: as for
    ``evaluate``. resume: resume the run in ``out``; of a finished one the record is returned.
    Errors: ``RequestError`` where the set does not fit the test data, and for other attacks.
    """
    reporter, folder = reporter or Reporter(), RunFolder(Path(out))
    _check_attack(config)
    opened = _opened(source, config, given, reading, data_dir, reporter)
    attack = opened.setup.attack()
    assert isinstance(attack, SetAttack)
    record = opened.record
    with folder.entered(record, resume=resume) as earlier:
        if earlier is not None and earlier.status == "done":
            return earlier
        with folder.keeping(record):
            received = opened.distilled
            poisoned = _poison(opened, attack, folder, reporter)
            twin = _keep_twin(opened, folder) if config.victims.control else None
            cell = Cell(opened.setup, folder, record, reporter, train_victim)
            cell.measure(attack, poisoned, twin, f"{len(received.batch)} received images")
    return record


def _check_attack(config: Config) -> None:
    if config.attack is None or not issubclass(config.attack_class(), SetAttack):
        known = [name for name, attack in ATTACKS.items() if issubclass(attack, SetAttack)]
        raise RequestError(
            f"--on is for attacks on a finished set ({', '.join(known)}), not for "
            f"{config.attack or 'a run without an attack'}"
        )


def _opened(
    source: Source,
    config: Config,
    given: Sequence[str],
    reading: ReadingOptions | None,
    data_dir: Path | str | None,
    reporter: Reporter,
) -> OpenedSet:
    """The set as an interceptor gets it, without training images, and the record of the attack."""
    with as_path(source) as path:
        config, warnings = _with_own_network(config, SetFiles(path, reading), given)
    opened = open_set(
        source,
        config,
        "attack",
        settings="intercepted",
        given=given,
        reading=reading,
        data_dir=data_dir,
        bars=reporter.bars,
        attacked=False,
    )
    assert config.attack_options is not None
    opened.record.config |= {
        "attack": config.attack,
        **config.attack_options.model_dump(mode="json"),
    }
    opened.record.labels += warnings
    data = opened.setup.data
    nothing = data.train.rows(torch.zeros(0, dtype=torch.int64, device=data.train.labels.device))
    setup = replace(opened.setup, data=replace(data, train=nothing))
    return replace(opened, setup=setup)


def _with_own_network(
    config: Config, found: SetFiles, given: Sequence[str]
) -> tuple[Config, list[str]]:
    """As ``with_own_network``, also where the victims' networks are others: the attacker trains
    networks like that of the set."""
    alone = config.victims.model_copy(update={"victim_network": ()})
    own, warnings = with_own_network(config.model_copy(update={"victims": alone}), found, given)
    return own.model_copy(update={"victims": config.victims}), warnings


def _poison(
    opened: OpenedSet, attack: SetAttack, folder: RunFolder, reporter: Reporter
) -> DistilledSet:
    """The set after the attack; it and the trigger are written."""
    setup, distilled, record = opened.setup, opened.distilled, opened.record
    received = Distillate(batch=distilled.batch, recipe=distilled.recipe)
    # The network's first layer holds the set's own mean and deviation, not the data's.
    network = replace(setup.network, preprocessing=distilled.recipe.preprocessing)
    began = time.monotonic()
    with reporter.phase("rebuilding archetypes", 1) as phase:
        archetypes = attack.receive(received, network, setup.streams)
        phase.reach(1)
    record.timings["archetypes_seconds"] = time.monotonic() - began
    _draw_archetypes(folder, setup, archetypes)
    task = Task(
        real=archetypes,
        classes=len(distilled.classes),
        ipc=1,
        iterations=attack.steps,
        init="noise",
        clip_pixels=False,
        recipe=distilled.recipe,
        network=network,
        streams=setup.streams,
    )

    def finish(made: Distillate) -> DistilledSet:
        return replace(distilled, batch=made.batch)

    backend = ReceivedSet(distilled.batch, lr=attack.lr, iterations=attack.steps)
    poisoned, seconds = distil_in(
        folder, setup, task, backend, attack, finish, reporter, "changing the set"
    )
    record.timings["attack_seconds"] = seconds
    info = trigger_info(attack, setup.data.classes)
    save_trigger(folder.trigger, attack.trigger.tensors(), info)
    return poisoned


def _draw_archetypes(folder: RunFolder, setup: Setup, archetypes: Batch) -> None:
    images, labels, classes = archetypes.images, archetypes.labels, setup.data.classes
    path = folder.path / "archetypes.png"
    distilled_picture(path, images, labels, classes, title="archetypes, rebuilt from the set")


def _keep_twin(opened: OpenedSet, folder: RunFolder) -> DistilledSet:
    """The clean twin: the received set, kept in the run's folder."""
    twin = RunFolder(folder.control)
    twin.path.mkdir(exist_ok=True)
    save_set(twin.distilled, opened.distilled)
    key = opened.setup.config.control_key()
    opened.record.control = {"folder": folder.control.name, "key": key, "reused": True}
    return opened.distilled
