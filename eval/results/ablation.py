"""The table of a sweep: its rows, its file format, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from .columns import UNDEFENDED_COLUMNS
from .formatting import (
    markdown_failures,
    markdown_head,
    markdown_row,
    markdown_text,
    mean_and_interval,
)
from .record import Failure, Metrics

if TYPE_CHECKING:
    from pandas import DataFrame

ABLATION_VERSION = 1


@final
class AblationRow(BaseModel):
    """One point of a sweep and one victim architecture, over distillation seeds.

    axis: the one axis that differs from the base, for a point of ``each``. values: the swept
    values by axis. config: the flat configuration without the seed. network: the victims'
    architecture; primary: whether it is the first of several. seeds: those with figures; wanted:
    those asked for. folders: the cells of ``seeds``, below the sweep's folder. seconds: mean over
    cells, without the clean twin's. metrics: as in a run's record, each seed the mean over its
    victims. defenses: the same for each defense that gave figures.
    """

    model_config = ConfigDict(extra="forbid")

    axis: str | None = None
    values: dict[str, Any]
    config: dict[str, Any]
    network: str
    primary: bool = True
    seeds: list[int] = Field(default_factory=list)
    wanted: list[int]
    folders: list[str] = Field(default_factory=list)
    seconds: float | None = None
    reason: str | None = None
    labels: list[str] = Field(default_factory=list)
    metrics: Metrics = Field(default_factory=dict)
    defenses: dict[str, Metrics] = Field(default_factory=dict)


@final
class Ablation(BaseModel):
    """All rows of a sweep. axes: the names of what is swept, in the order of its file."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = ABLATION_VERSION
    kind: Literal["ablation"] = "ablation"
    status: Literal["running", "done"]
    sweep: dict[str, Any]
    axes: list[str]
    environment: dict[str, Any]
    command: str
    rows: list[AblationRow]
    failures: list[Failure]

    @property
    def one_at_a_time(self) -> bool:
        """Whether every row differs from the base in one axis: two columns then name the point."""
        return bool(self.rows) and all(
            row.axis is not None and len(row.values) == 1 for row in self.rows
        )

    def to_frame(self) -> DataFrame:
        """A pandas data frame with a row for each measured value (``frame.sweep_frame``)."""
        from .frame import sweep_frame

        return sweep_frame(self)

    def __repr__(self) -> str:
        name = self.sweep.get("description") or "Ablation"
        return (
            f"<Ablation {name}: {self.status}; {len(self.rows)} rows over {', '.join(self.axes)}>"
        )

    __str__ = __repr__


def ablation_markdown(table: Ablation) -> str:
    """One table of the points, and one of the defenses where there are any."""
    lines = [
        f"# {markdown_text(table.sweep['description'] or 'Ablation')}",
        "",
        "Figures: mean over distillation seeds [95 % interval]; each seed is the mean over its "
        "victims.",
        "",
    ]
    lines += _undefended(table) + _defended(table)
    lines += markdown_failures(table.failures)
    return "\n".join(lines) + "\n"


def _undefended(table: Ablation) -> list[str]:
    measured = {key for row in table.rows for key in row.metrics}
    columns = {key: title for key, title in UNDEFENDED_COLUMNS.items() if key in measured}
    several = len({row.network for row in table.rows}) > 1
    victims = ["victims"] if several else []
    lines = markdown_head([*_place_titles(table), *victims, *columns.values(), "seeds", "note"])
    for row in table.rows:
        place = [*_place(table, row), *([row.network] if several else [])]
        figures = [mean_and_interval(row.metrics, key) for key in columns]
        note = markdown_text("; ".join([*row.labels, *([row.reason] if row.reason else [])]))
        seeds = f"{len(row.seeds)}/{len(row.wanted)}"
        lines.append(markdown_row([*place, *figures, seeds, note]))
    return lines


def _defended(table: Ablation) -> list[str]:
    defended = [row for row in table.rows if row.defenses]
    if not defended:
        return []
    lines = ["", "## After each defense", ""]
    lines += markdown_head([*_place_titles(table), "defense", "ASR", "CTA", "AUROC"])
    for row in defended:
        for name, metrics in row.defenses.items():
            lines.append(markdown_row([*_place(table, row), name, *_defense_figures(metrics)]))
    return lines


def _defense_figures(metrics: Metrics) -> list[str]:
    detector = next((name for name in ("row_auroc", "auroc") if name in metrics), "auroc")
    names = ("attack_success_rate", "clean_test_accuracy", detector)
    return [mean_and_interval(metrics, name) for name in names]


def _place_titles(table: Ablation) -> Sequence[str]:
    return ("axis", "value") if table.one_at_a_time else [*map(markdown_text, table.axes)]


def _place(table: Ablation, row: AblationRow) -> list[str]:
    if table.one_at_a_time:
        return [markdown_text(str(each)) for each in (row.axis, *row.values.values())]
    return [markdown_text(str(row.values.get(axis, ""))) for axis in table.axes]
