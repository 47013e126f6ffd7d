"""What a report shows: runs, sweeps and suites in one common form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from ...defenses.base import Family
from ..results.record import Failure, Metrics, Record

Shape = Literal["run", "sweep", "suite"]
ABOUT = ("dataset", "backend", "attack", "ipc", "victims")


@final
@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """The figures of a run, of a point of a sweep, or of a line of a suite.

    varied: the settings that are varied, by name. about: keys of the configuration that say what
    was run (``ABOUT``), as far as they are known. key: what a row of another experiment must share
    to be compared with this one. axis: the setting that differs from the base, where only one does.
    network: the victims'; primary: whether it is the first of several. defense: ``None`` for
    undefended victims; family, state and holds are a defense's. seeds: those behind the figures, of
    ``seeds_wanted`` requested. conditional: whether intervals are over the victims of one set.
    labels: what must stand beside the figures. folders: the runs, in the order of the seeds.
    """

    varied: Mapping[str, Any]
    key: tuple[str, ...]
    network: str
    axis: str | None = None
    primary: bool = True
    defense: str | None = None
    family: Family | None = None
    state: str = "done"
    holds: bool | None = None
    seeds: Sequence[int] = ()
    seeds_wanted: int = 1
    conditional: bool = False
    labels: Sequence[str] = ()
    note: str = ""
    folders: Sequence[Path] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)

    @property
    def point(self) -> str:
        """The varied settings in words, empty where nothing is varied."""
        return ", ".join(f"{name} {value}" for name, value in self.varied.items())

    def __str__(self) -> str:
        """The row in words: the varied settings, the victims' network, the defense."""
        network = f"victims: {self.network}" if self.network else ""
        return ", ".join(filter(None, (self.point, network, self.defense))) or "the run"


@final
@dataclass(frozen=True, kw_only=True)
class PicturedRun:
    """A run whose pictures are shown.

    root: the folder of the run, or of its sweep or suite; nothing outside of it is read. record:
    ``None`` where it cannot be read, see ``problem``.
    """

    title: str
    folder: Path
    root: Path
    record: Record | None
    problem: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run, sweep or suite of a report.

    kind: the record's or the table's. varied: the names of the settings in the rows' ``varied``, in
    order. axes: those of a sweep; one_at_a_time: whether each row differs from the base in one of
    them. pictured: of each point the first seed's run. runs: how many the figures come from.
    budget: the defenses', where there are any. config: the resolved configuration of a run, or the
    sweep or suite as its file has it.
    """

    path: Path
    shape: Shape
    kind: str
    status: str
    title: str
    error: str = ""
    varied: Sequence[str] = ()
    axes: Sequence[str] = ()
    one_at_a_time: bool = False
    rows: Sequence[ResultRow] = ()
    pictured: Sequence[PicturedRun] = ()
    runs: int = 1
    budget: str = ""
    failures: Sequence[Failure] = ()
    command: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name or str(self.path)

    def relative(self, folder: Path) -> str:
        """A folder's path from this experiment's name on: pages are sent to other people."""
        here = self.path.parent
        return str(folder.relative_to(here)) if folder.is_relative_to(here) else folder.name

    @property
    def undefended(self) -> list[ResultRow]:
        """The rows without a defense."""
        return [row for row in self.rows if row.defense is None]

    @property
    def defended(self) -> list[ResultRow]:
        """The rows of defenses."""
        return [row for row in self.rows if row.defense is not None]

    @property
    def labels(self) -> list[str]:
        """What must stand beside some of the figures."""
        return list(dict.fromkeys(text for row in self.rows for text in row.labels))

    @property
    def interval_note(self) -> str:
        """Over what the intervals are, as a sentence."""
        if self.rows and all(row.conditional for row in self.rows):
            return (
                "Intervals are 95 % intervals over the victims of this one distilled set. They do "
                "not cover the variation between distillations."
            )
        return (
            "Intervals are 95 % intervals over distillation seeds (Student's t for rates, cut to "
            "[0, 1]; Wilson's for shares). Each seed counts once, with the mean over its victims."
        )
