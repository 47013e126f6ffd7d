"""Measure defenses on a finished set: that of a run, with its clean twin, or a received file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...defenses.base import Defense
from ...distill.core.start import start_run
from ...distill.plugins import is_given
from ..config.schema import Config
from ..figures.defense_pictures import defenses_picture
from ..results.record import Outcome, Record
from ..run.folder import RunFolder
from ..run.opening import OpenedSet, Source, open_set
from ..run.progress import Phase, Reporter
from ..run.reading import ReadingOptions
from .bench import Bench, SetUnderTest, check_holdout
from .options import VICTIMS, BenchOptions
from .store import VictimStore


def defend(
    source: Source,
    config: Config,
    out: Path | str,
    *,
    defenses: Mapping[str, Defense],
    options: BenchOptions | None = None,
    given: Sequence[str] = (),
    reading: ReadingOptions | None = None,
    trigger: Path | str | None = None,
    control_run: Path | str | None = None,
    data_dir: Path | str | None = None,
    resume: bool = False,
    store: VictimStore | None = None,
    reporter: Reporter | None = None,
) -> Record:
    """Measure ``defenses`` on the set in ``source``; returns and writes the record.

    source: a run's folder, a file, or a ``DistilledSet``.
    Only victims of the primary network are defended. If the source is a run with a clean twin, all
    is measured on the twin too. store: the cache of victims, by default in ``out``. With
    ``resume``, finished defenses are not run again; failed ones are, and new ones may be added.
    given, reading, trigger, control_run, data_dir: as for ``evaluate``.
    Errors: ``RequestError`` where the set does not fit the test data. The outcome of a defense that
    fails or is not applicable says why; the others run all the same.
    """
    reporter, options = reporter or Reporter(), options or BenchOptions()
    if "victims" not in given:
        victims = config.victims.model_copy(update={"victims": VICTIMS[options.budget]})
        config = config.model_copy(update={"victims": victims})
    settings = options.model_dump(mode="json")
    opened = open_set(
        source,
        config,
        "defend",
        settings=settings,
        given=given,
        reading=reading,
        trigger=trigger,
        control_run=control_run,
        data_dir=data_dir,
        bars=reporter.bars,
    )
    check_holdout(options, opened.setup)
    record, folder = opened.record, RunFolder(Path(out))
    record.bench = settings
    with folder.entered(record, resume=resume) as earlier:
        if earlier is not None:
            record.defenses = reusable_outcomes(earlier, defenses)
        objects = _objects(earlier, defenses)
        if objects:
            record.objects["defenses"] = objects
        with folder.keeping(record):
            tested = _set_under_test(opened)
            store = store or VictimStore(folder.path / "victims")
            _run_defenses(record, folder, tested, defenses, options, store, reporter)
            defenses_picture(folder.path / "defenses.png", record)
    return record


def _run_defenses(
    record: Record,
    folder: RunFolder,
    tested: SetUnderTest,
    defenses: Mapping[str, Defense],
    options: BenchOptions,
    store: VictimStore,
    reporter: Reporter,
) -> None:
    """Run the defenses that have no outcome yet; the record is written after each."""
    began = time.monotonic()
    left = [name for name in defenses if name not in record.defenses]
    phase: Phase
    with reporter.phase("defending", len(defenses), len(defenses) - len(left)) as phase:
        bench = Bench(tested, options, store, phase.side)
        record.timings["victims_seconds"] = time.monotonic() - began
        record.metrics = bench.before()
        for number, name in enumerate(left):
            record.defenses[name] = bench.outcome(defenses[name], options.budget)
            record.write(folder.record)
            phase.reach(len(defenses) - len(left) + number + 1)
    record.defenses = {name: record.defenses[name] for name in (*defenses, *record.defenses)}
    record.timings["defenses_seconds"] = sum(each.seconds for each in record.defenses.values())


def _objects(earlier: Record | None, defenses: Mapping[str, Defense]) -> list[str]:
    """The names of the defenses that are objects given in Python, in earlier sessions too."""
    before = earlier.objects.get("defenses", []) if earlier else []
    return list(dict.fromkeys([*before, *filter(is_given, defenses)]))


def _set_under_test(opened: OpenedSet) -> SetUnderTest:
    return SetUnderTest(
        setup=opened.setup,
        attacked=opened.distilled,
        twin=opened.twin,
        case=opened.case,
        poisoned=_poisoned_rows(opened) if opened.case else None,
    )


def _poisoned_rows(opened: OpenedSet) -> Tensor | None:
    """``bool (N,)``: the poisoned rows of the set.

    They are known where the backend keeps the rows of the training set; ``None`` elsewhere.
    """
    setup, count = opened.setup, len(opened.distilled.batch)
    backend = setup.backend()
    if not backend.keeps_rows or count != len(setup.data.train):
        return None
    attack = setup.attack()  # may read the file of a trigger
    if attack is None:
        return None
    start_run(setup.task(), backend, [attack])  # the attack chooses its rows in on_start
    return attack.poisoned_rows


def reusable_outcomes(earlier: Record, defenses: Mapping[str, Defense]) -> dict[str, Outcome]:
    """The earlier outcomes to keep: those that did not fail, and have the same options."""
    return {
        name: outcome
        for name, outcome in earlier.defenses.items()
        if outcome.status != "error"
        and (
            name not in defenses
            or outcome.options == defenses[name].options.model_dump(mode="json")
        )
    }
