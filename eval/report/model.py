"""What a report is about: runs, sweeps and suites as one plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

from ...defenses.base import Family
from ...distill.types import RequestError
from ..results.record import Failure, Metrics, Record, read_record

Shape = Literal["run", "sweep", "suite"]
NO_CELL: Final = "no cell has finished yet"


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one place: a run, a point of a sweep, a line of a suite.

    place: what is varied, by name, as it is shown. key: what a row of another report must share to
    be compared with this one. axis: the one axis that leaves the base, where there is one.
    defense: ``None`` for undefended victims; family and state are a defense's. seeds: those that
    the figures are over; wanted: how many were asked for. conditional: whether intervals are over
    the victims of one set. labels: what must stand beside the figures. folders: the runs behind
    them, in the order of the seeds.
    """

    place: Mapping[str, Any]
    key: tuple[str, ...]
    network: str
    axis: str | None = None
    primary: bool = True
    defense: str | None = None
    family: Family | None = None
    state: str = "done"
    holds: bool | None = None
    seeds: Sequence[int] = ()
    wanted: int = 1
    conditional: bool = False
    labels: Sequence[str] = ()
    note: str = ""
    folders: Sequence[Path] = ()
    metrics: Metrics = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run whose pictures are shown: one for each place, of its first seed."""

    title: str
    folder: Path
    record: Record | None
    trouble: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Source:
    """One run, sweep or suite of a report.

    kind: the record's or the table's. columns: the names in the rows' ``place``, in order. axes:
    what a sweep varies; one_at_a_time: whether each row leaves the base along one of them. cells:
    how many runs the figures come from. budget: the defenses', where there are any. config: the
    resolved configuration of a run, or the sweep or suite as its file said.
    """

    path: Path
    shape: Shape
    kind: str
    status: str
    title: str
    error: str = ""
    columns: Sequence[str] = ()
    axes: Sequence[str] = ()
    one_at_a_time: bool = False
    rows: Sequence[Row] = ()
    shown: Sequence[Shown] = ()
    cells: int = 1
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

    def told(self, folder: Path) -> str:
        """A folder inside this one, without where this one lies: pages are sent to others."""
        here = self.path.parent
        return str(folder.relative_to(here)) if folder.is_relative_to(here) else folder.name

    @property
    def undefended(self) -> list[Row]:
        """The rows without a defense."""
        return [row for row in self.rows if row.defense is None]

    @property
    def defended(self) -> list[Row]:
        """The rows of defenses."""
        return [row for row in self.rows if row.defense is not None]

    @property
    def labels(self) -> list[str]:
        """What must stand beside some of the figures."""
        return list(dict.fromkeys(text for row in self.rows for text in row.labels))


def told_place(row: Row) -> str:
    """Where a row stands, in words."""
    return ", ".join(f"{name} {value}" for name, value in row.place.items()) or "the base"


def inside(root: Path, place: str) -> Path:
    """``root / place``, or a path that can't be where a table names one outside of its folder."""
    found = root / place
    within = found.resolve().is_relative_to(root.resolve())
    return found if within else root / ".outside"


def shown_run(title: str, folder: Path) -> Shown:
    """A run's pictures, with its record where that can be read."""
    try:
        return Shown(title=title, folder=folder, record=read_record(folder / "record.json"))
    except RequestError as error:
        return Shown(title=title, folder=folder, record=None, trouble=str(error))


def described(plan: Any) -> str:
    """A sweep's or a suite's own description."""
    return str(plan.get("description") or "") if isinstance(plan, dict) else ""
