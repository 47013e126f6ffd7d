"""A record at a glance, in a notebook: one line, a table, a plot."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, final

from .columns import UNDEFENDED_COLUMNS
from .formatting import mean_and_interval, minus
from .metrics import Summary
from .record import Metrics, Record
from .subject import subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, as in the other pictures; what belongs to the twin is grey.
_OURS, _TWINS = "#0072B2", "#8A8A8A"
_ASR = "attack_success_rate"
_SHORT = {"clean_test_accuracy": "CTA", _ASR: "ASR", f"control_{_ASR}": "control ASR"}


def short_text(record: Record) -> str:
    """The record in one line: what it is about, its status, its main figures."""
    figures = [
        f"{title} {minus(f'{mean:.3f}')}"
        for name, title in _SHORT.items()
        if (mean := record.mean(name)) is not None
    ]
    count = len(record.defenses)
    counted = [f"{count} defenses"] if count else []
    return (
        f"<Record {record.kind}: {'; '.join([subject(record), record.status, *figures, *counted])}>"
    )


def as_html(record: Record) -> str:
    """The record as a small HTML table; every text in it is escaped."""
    status = record.status if record.error is None else f"{record.status}: {record.error}"
    over = "victims of this one set" if record.conditional_on_set else "distillation seeds"
    head = f"<b>{escape(record.kind)}: {escape(subject(record))}</b> ({escape(status)})"
    notes = "".join(f"<br>{escape(text)}" for text in record.labels)
    columns = [name for name in UNDEFENDED_COLUMNS if name in record.metrics]
    titles = "".join(f"<th>{escape(UNDEFENDED_COLUMNS[name])}</th>" for name in columns)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{escape(mean_and_interval(metrics, column))}</td>" for column in columns)
        + "</tr>"
        for name, metrics in _by_row(record).items()
    )
    caption = f"mean [95 % interval] over {over}"
    return f"{head}{notes}<table><tr><th>{caption}</th>{titles}</tr>{rows}</table>"


def _by_row(record: Record) -> dict[str, Metrics]:
    """The metrics of each line: the victims' networks, then the defenses that ran."""
    networks = record.config.get("victim_network") or [record.config.get("network", "victims")]
    done = {name: o.metrics for name, o in record.defenses.items() if o.status == "done"}
    return {str(networks[0]): record.metrics, **record.metrics_by_network, **done}


def plot_record(record: Record, axes: Axes | None = None) -> Axes:
    """CTA and ASR as points with their 95 % intervals; the clean twin's are grey.

    With defenses there is a line for each that has an ASR. axes: where to draw; by default a new
    figure.
    """
    if axes is None:
        from matplotlib import pyplot

        size = (7.5, 1.4 + 0.35 * len(_lines(record)))
        _, axes = pyplot.subplots(figsize=size, layout="constrained")
    lines = _lines(record)
    for place, line in enumerate(lines):
        seen = [value for value in line.summary.values if value is not None]
        axes.plot(seen, [place] * len(seen), "|", color=line.colour, alpha=0.4, markersize=9)
        if line.summary.ci95 is not None:
            axes.hlines(place, *line.summary.ci95, color=line.colour, linewidth=1.5)
        axes.plot(line.mean, place, "o", color=line.colour, markersize=6)
    axes.set_yticks(range(len(lines)), [line.title for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("rate; marks: " + ("victims" if record.conditional_on_set else "seeds"))
    axes.set_title(subject(record), fontsize=10, loc="left")
    axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    return axes


@final
@dataclass(frozen=True)
class _Line:
    """One line of the plot."""

    title: str
    mean: float
    summary: Summary
    colour: str


def _lines(record: Record) -> list[_Line]:
    rates = {key: title for key, title in UNDEFENDED_COLUMNS.items() if key != "backdoor_gain"}
    found = [(title, name, record.metrics) for name, title in rates.items()]
    found += [(f"ASR, {name}", _ASR, each.metrics) for name, each in record.defenses.items()]
    return [
        _Line(title, summary.mean, summary, _TWINS if name.startswith("control_") else _OURS)
        for title, name, metrics in found
        if (summary := metrics.get(name)) is not None and summary.mean is not None
    ]
