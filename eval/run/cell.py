"""One cell: distil, distil the clean twin, train victims on both, measure, record."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ...attacks import Attack, TestCase
from ...distill.files.artifact import load_set, save_trigger
from ...distill.types import DistilledSet
from ..config.schema import Config
from ..figures.run_pictures import (
    curves_picture,
    distilled_picture,
    trigger_picture,
    triggered_picture,
)
from ..results.metrics import Scores, collect, distance, stealth
from ..results.record import Metrics, Record
from .checks import (
    check_buffer,
    check_control,
    check_reference,
    check_same_buffer,
    check_start,
)
from .distilling import distil_in
from .folder import RunFolder
from .progress import Reporter
from .records import describe_distance, describe_set, new_record
from .setup import Setup, prepare
from .victims import Panel, VictimTrainer, train_victim

_SHOWN = 8  # triggered images in the picture
_STEALTH_IMAGES = 256


def run_cell(
    config: Config,
    out: Path | str,
    *,
    given: Sequence[str] = (),
    data_dir: Path | str | None = None,
    resume: bool = False,
    control_run: Path | str | None = None,
    reference_run: Path | str | None = None,
    buffer: Path | str | None = None,
    train: VictimTrainer = train_victim,
    reporter: Reporter | None = None,
) -> Record:
    """Run ``config`` in the folder ``out`` and return its record, which is also written there.

    given: the keys that were not defaults. resume: resume the run in ``out``; of a finished one the
    record is returned. control_run: a folder with a finished clean twin to reuse. reference_run: a
    folder with a finished clean run of another seed; its distance from the clean twin is given with
    that of the attacked set. buffer: a folder for expert buffers, by attack (``clean`` for none),
    which later runs may reuse; by default in ``out`` itself. train: returns a trained victim.
    Errors: ``RequestError`` before anything is written. A later failure is also in the record, with
    status ``error``, and the last checkpoint stays.
    """
    reporter, folder = reporter or Reporter(), RunFolder(Path(out))
    control_run = None if control_run is None else Path(control_run)
    setup = prepare(config, data_dir, bars=reporter.bars)
    check_start(setup)
    check_buffer(buffer, config)
    if control_run is not None:
        check_control(control_run, config, setup.data.describe())
    reference = None
    if reference_run is not None:
        reference = check_reference(Path(reference_run), config, setup.data.describe())
    record = new_record(setup, given)
    record.buffer = None if buffer is None else str(Path(buffer).absolute())
    with folder.entered(record, resume=resume) as earlier:
        if earlier is not None and earlier.status == "done":
            return earlier
        if earlier is not None:
            check_same_buffer(earlier, record, folder.path)
        with folder.keeping(record):
            Cell(setup, folder, record, reporter, train).run(control_run, reference)
    return record


@final
class Cell:
    """The steps of one cell, which share its setup, folder, record and reporter."""

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        record: Record,
        reporter: Reporter,
        train: VictimTrainer,
    ) -> None:
        self._setup, self._folder = setup, folder
        self._record, self._reporter = record, reporter
        self._train = train
        self._config = setup.config

    def run(self, control_run: Path | None, reference: DistilledSet | None) -> None:
        """The whole cell, from the distillation to the finished record."""
        attack = self._setup.attack()
        distilled = self._distil(self._setup, self._folder, attack, "distilling")
        twin = self._twin(control_run) if attack and self._config.victims.control else None
        backend, ipc = self._config.set.backend, self._config.set.ipc
        self.measure(attack, distilled, twin, f"{backend}, {ipc} per class", reference)
        if twin is not None and control_run is None:
            self._close_twin(twin)

    def measure(
        self,
        attack: Attack | None,
        distilled: DistilledSet,
        twin: DistilledSet | None,
        origin: str,
        reference: DistilledSet | None = None,
    ) -> None:
        """Measure sets that are made: metrics, descriptions, pictures.

        origin: how the set was made, for its picture. reference: a clean set of another seed, for
        its distance from the twin.
        """
        case = self._prepare(attack) if attack else None
        began = time.monotonic()
        metrics = self._measure(distilled, twin, case)
        self._record.timings["victims_seconds"] = time.monotonic() - began
        primary, *others = metrics
        self._record.metrics = metrics[primary]
        self._record.metrics_by_network = {name: metrics[name] for name in others}
        self._describe(distilled, twin, reference)
        self._draw(distilled, attack, origin)

    # Distilling --------------------------------------------------------------------------------

    def _distil(
        self, setup: Setup, folder: RunFolder, attack: Attack | None, title: str
    ) -> DistilledSet:
        """Distil in ``folder``, from its checkpoint if there is one; write the set and trigger."""
        name = re.sub(r"[^\w.-]+", "_", setup.config.attack or "clean")
        shared = self._record.buffer
        scratch = Path(shared) / name if shared else folder.experts
        task, backend = setup.task(scratch), setup.backend()
        distilled, seconds = distil_in(
            folder, setup, task, backend, attack, setup.distilled_set, self._reporter, title
        )
        if folder is self._folder:
            self._record.recipe = distilled.recipe.describe()
        spent_on = "distil_seconds" if folder is self._folder else "control_seconds"
        self._record.timings[spent_on] = seconds
        if attack:
            info = trigger_info(attack, setup.data.classes)
            save_trigger(folder.trigger, attack.trigger.tensors(), info)
        return distilled

    def _twin(self, control_run: Path | None) -> DistilledSet:
        """The clean twin: a finished one of another run, or distilled beside the attacked set."""
        key = self._config.control_key()
        folder = RunFolder(control_run or self._folder.control)
        self._record.control = {
            "folder": os.path.relpath(folder.path, self._folder.path),
            "key": key,
            "reused": control_run is not None,
        }
        if control_run is not None:
            return load_set(folder.distilled).to(self._config.run.device)
        folder.path.mkdir(exist_ok=True)
        setup = self._setup.without_attack()
        return self._distil(setup, folder, None, "distilling the clean twin")

    # Measuring ---------------------------------------------------------------------------------

    def _prepare(self, attack: Attack) -> TestCase:
        """The attack's test case; also writes what the record says of the attack."""
        test = self._setup.data.test
        case = attack.test_case(test.images, test.labels)
        few = _spread(case.eligible, _STEALTH_IMAGES)
        record = self._record
        record.hooks = [{"name": attack.name, "threat_model": attack.threat_model}]
        record.trigger = {
            **trigger_info(attack, self._setup.data.classes),
            **stealth(test.images[few], case.triggered[few]),
        }
        record.attack_counters = dict(attack.counters())
        record.labels += attack.trigger.labels
        return case

    def _measure(
        self, distilled: DistilledSet, twin: DistilledSet | None, case: TestCase | None
    ) -> dict[str, Metrics]:
        """Metrics by victim network, the primary one first."""
        setup, count = self._setup, self._config.victims.victims
        test, streams = setup.data.test, setup.streams
        panel = Panel(self._folder, test, streams, count, self._reporter, self._train)
        found: dict[str, Metrics] = {}
        for name, network in setup.victim_networks.items():
            show = self._show(case) if case and not found else None
            scores = panel.measure(name, distilled, network, case, show)
            control: list[Scores] | None = None
            if twin is not None:
                control = panel.measure(f"{name}, clean twin", twin, network, case)
            found[name] = collect(scores, control)
        return found

    def _show(self, case: TestCase) -> Callable[[nn.Module], None]:
        """Draw triggered test images with the first victim's answers."""

        def show(victim: nn.Module) -> None:
            data = self._setup.data
            few = _spread(case.eligible, _SHOWN)
            with torch.no_grad():
                answers = victim(case.triggered[few]).argmax(dim=1)
            triggered_picture(
                self._folder.path / "triggered.png",
                data.test.images[few],
                case.triggered[few],
                data.test.labels[few],
                case.targets[few],
                data.classes,
                predictions=answers,
                title="test images, clean and triggered, with the first victim's answers",
            )

        return show

    # Recording ---------------------------------------------------------------------------------

    def _describe(
        self, distilled: DistilledSet, twin: DistilledSet | None, reference: DistilledSet | None
    ) -> None:
        self._record.distilled |= describe_set(distilled)
        if twin is not None:
            clean = [twin] if reference is None else [twin, reference.to(self._config.run.device)]
            apart = distance(distilled.batch.images, twin.batch.images)
            self._record.distilled |= describe_distance(apart, clean)

    def _draw(self, distilled: DistilledSet, attack: Attack | None, origin: str) -> None:
        """The pictures of the set, the loss curve and the trigger."""
        config, folder = self._config, self._folder
        title = f"{self._setup.data.name}, {origin}, {config.attack or 'clean'}"
        draw_set(folder, distilled, title)
        curves_picture(folder.path / "curves.png", folder.logged())
        if attack and self._record.trigger:
            path, target = folder.path / "trigger.png", self._record.trigger["target_class"]
            trigger_picture(path, attack.trigger.picture(), target=target)

    def _close_twin(self, twin: DistilledSet) -> None:
        """Write the twin's own record: a clean run, which other attacks may reuse."""
        folder = RunFolder(self._folder.control)
        record = new_record(self._setup.without_attack(), self._record.config_given)
        record.recipe = twin.recipe.describe()
        record.timings = {"distil_seconds": self._record.timings["control_seconds"]}
        prefix = "control_"
        record.metrics = {
            name.removeprefix(prefix): summary
            for name, summary in self._record.metrics.items()
            if name == f"{prefix}clean_test_accuracy"
        }
        record.distilled = describe_set(twin)
        draw_set(folder, twin, f"{self._setup.data.name}, the clean twin")
        curves_picture(folder.path / "curves.png", folder.logged())
        folder.close(record, "done")


def trigger_info(attack: Attack, classes: Sequence[str]) -> dict[str, Any]:
    """What records and trigger files say of the attack's trigger and goal."""
    return {**attack.trigger.describe(), **attack.goal.describe(classes)}


def _spread(eligible: Tensor, count: int) -> Tensor:
    """At most ``count`` eligible rows, evenly spaced: the test set may be sorted by class."""
    rows = torch.nonzero(eligible)[:, 0]
    chosen = torch.linspace(0, max(0, len(rows) - 1), min(count, len(rows))).long()
    return rows[chosen.to(rows.device)]


def draw_set(folder: RunFolder, distilled: DistilledSet, title: str) -> None:
    """``distilled.png`` in ``folder``."""
    batch, path = distilled.batch, folder.path / "distilled.png"
    distilled_picture(path, batch.images, batch.labels, distilled.classes, title=title)
