"""Set defenses against a finished set: a run's, with its clean twin, or a file that was sent."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...attacks import TestCase
from ...defenses.base import Defense
from ...distill.files.artifact import load_set
from ...distill.types import DistilledSet
from ..config.schema import Config
from ..figures.defense_pictures import defenses_picture
from ..results.record import Outcome, Record
from ..run.cell import describe_set, new_record
from ..run.checks import check_same_run
from ..run.evaluate import with_recipe
from ..run.folder import RunFolder
from ..run.progress import Phase, Reporter
from ..run.source import Source, check_fit, fingerprint, trigger_case
from ..run.workshop import Workshop, open_workshop
from .bench import VICTIMS, Bench, BenchOptions, Subject, check_holdout
from .store import VictimStore


def defend(
    source: Path | str,
    config: Config,
    out: Path | str,
    *,
    defenses: Mapping[str, Defense],
    options: BenchOptions | None = None,
    given: Sequence[str] = (),
    trigger: Path | str | None = None,
    data_dir: Path | str | None = None,
    resume: bool = False,
    store: VictimStore | None = None,
    reporter: Reporter | None = None,
) -> Record:
    """Measure ``defenses`` on the set in ``source``; returns and writes the record.

    The primary victim network is the one that is defended. Where the source is a run with its clean
    twin, everything is measured on the twin too. store: where victims are kept, by default in
    ``out``. With ``resume``, defenses that are done are not run again; those that failed are, and
    others may be added.
    given, trigger, data_dir: as for ``evaluate``.
    Errors: ``RequestError`` where the set doesn't fit the test data. A defense that fails or does
    not apply fails nothing: its outcome says why.
    """
    reporter, options = reporter or Reporter(), options or BenchOptions()
    if "victims" not in given:
        victims = config.victims.model_copy(update={"victims": VICTIMS[options.budget]})
        config = config.model_copy(update={"victims": victims})
    found, folder = Source(Path(source)), RunFolder(Path(out))
    workshop = open_workshop(config, data_dir, bars=reporter.bars)
    attacked = with_recipe(found.load(workshop), workshop, given)
    check_fit(found.set_file, attacked, workshop)
    check_holdout(options, workshop)
    trigger = Path(trigger) if trigger else found.trigger_file
    record = new_record(workshop, given, "defend")
    record.recipe = attacked.recipe.describe()
    record.distilled = describe_set(attacked) | {"source": str(source)}
    case = trigger_case(trigger, workshop, record)
    twin = None
    if found.control and case:
        twin = with_recipe(load_set(found.control), workshop, given)
    record.bench = options.model_dump(mode="json")
    files = (found.set_file, trigger, found.control)
    record.distilled["fingerprint"] = fingerprint((record.recipe, record.bench), files)
    earlier = folder.enter(resume=resume)
    if earlier is not None:
        check_same_run(earlier, record, folder.path)
        record.defenses = still_true(earlier, defenses)
    with folder.keeping(record):
        subject = _subject(workshop, attacked, twin, case)
        store = store or VictimStore(folder.path / "victims")
        _run(record, folder, subject, defenses, options, store, reporter)
        defenses_picture(folder.path / "defenses.png", record)
    return record


def _run(
    record: Record,
    folder: RunFolder,
    subject: Subject,
    defenses: Mapping[str, Defense],
    options: BenchOptions,
    store: VictimStore,
    reporter: Reporter,
) -> None:
    """Every defense that has no outcome yet; the record is written after each."""
    began = time.monotonic()
    left = [name for name in defenses if name not in record.defenses]
    phase: Phase
    with reporter.phase("defending", len(defenses), len(defenses) - len(left)) as phase:
        bench = Bench(subject, options, store, phase.side)
        record.timings["victims_seconds"] = time.monotonic() - began
        record.metrics = bench.before()
        for number, name in enumerate(left):
            record.defenses[name] = bench.outcome(defenses[name], options.budget)
            record.write(folder.record)
            phase.reach(len(defenses) - len(left) + number + 1)
    record.defenses = {name: record.defenses[name] for name in (*defenses, *record.defenses)}
    record.timings["defenses_seconds"] = sum(each.seconds for each in record.defenses.values())


def _subject(
    workshop: Workshop, attacked: DistilledSet, twin: DistilledSet | None, case: TestCase | None
) -> Subject:
    device = workshop.config.run.device
    return Subject(
        workshop=workshop,
        attacked=attacked.to(device),
        twin=None if twin is None else twin.to(device),
        case=case,
        poisoned=workshop.poisoned_rows(len(attacked.batch)) if case else None,
    )


def still_true(earlier: Record, defenses: Mapping[str, Defense]) -> dict[str, Outcome]:
    """The earlier outcomes that need no second run: no failures, and with the same options."""
    return {
        name: outcome
        for name, outcome in earlier.defenses.items()
        if outcome.status != "error"
        and (
            name not in defenses
            or outcome.options == defenses[name].options.model_dump(mode="json")
        )
    }
