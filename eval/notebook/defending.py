"""``defend`` from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...defenses.base import Budget, Defense
from ...distill.plugins import objects_by_name
from ...distill.types import RequestError
from ..bench.defend import defend
from ..bench.options import BenchOptions, choose_defenses
from ..config.schema import build_options
from ..results.record import Record
from ..run.progress import Reporter
from ..run.reading import ReadingOptions
from .naming import ObjectNames, named
from .runs import Folder, Measured, as_source, folder_for, measured_config, stem_of

DefenseChoice = str | type[Defense] | Defense
"""A name (``all`` and the other groups too), a class, or a defense with its options."""


def run_defend(
    source: Measured,
    *,
    defenses: DefenseChoice | Sequence[DefenseChoice] = "all",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    budget: Budget = "quick",
    holdout: int = 100,
    images: int | None = None,
    preset: str | None = None,
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
    """Measure defenses on a finished set and its clean twin; as ``distillsec defend``.

    source: a run's folder or record, a file, or a ``DistilledSet``; for the last two name the
    ``dataset``. defenses: a name, a class or an instance, or several. options: by name, of those
    chosen by name. An instance has its own options; a class has those of the budget. budget,
    holdout, images: as for ``BenchOptions``. reading, trigger, control_run: as for ``evaluate``.
    The others, result and errors: as for ``run_attack``; the outcome of a defense that failed says
    why.
    """
    several = [defenses] if isinstance(defenses, (str, type, Defense)) else [*defenses]
    bench = build_options(
        BenchOptions, {"budget": budget, "holdout": holdout, "images": images}, "defend"
    )
    names = ObjectNames()
    with named(keys) as chosen:
        choices = [_named(choice, names) for choice in several]
        with objects_by_name(names.objects):
            config, given = measured_config(source, preset, chosen, out, resume=resume, trust=trust)
            return defend(
                as_source(source),
                config,
                folder_for(out, f"defend-{stem_of(source)}"),
                defenses=_chosen(choices, budget, options or {}),
                options=bench,
                given=given,
                reading=reading,
                trigger=trigger,
                control_run=control_run,
                data_dir=data_dir,
                resume=resume,
                reporter=Reporter(quiet=quiet),
            )


def _named(choice: DefenseChoice, names: ObjectNames) -> tuple[str, Defense | None]:
    """The name of a choice, and the defense itself where it was given."""
    if isinstance(choice, str):
        return choice, None
    if isinstance(choice, Defense):
        return names.defense(type(choice)), choice
    return names.defense(choice), None


def _chosen(
    choices: Sequence[tuple[str, Defense | None]],
    budget: Budget,
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, Defense]:
    """The defenses by name, instances with the options they have."""
    made = {name: defense for name, defense in choices if defense is not None}
    if len(made) < sum(defense is not None for _, defense in choices):
        raise RequestError("two defenses of one class were given: give them one after the other")
    found = choose_defenses([name for name, _ in choices], budget, options)
    return {**found, **made}
