"""What survives of a backdoor, as text and as Markdown."""

from __future__ import annotations

from .columns import SURVIVAL_COLUMNS
from .formatting import aligned, markdown_head, markdown_row, markdown_text, mean_and_interval
from .record import Record
from .subject import subject, victims_text

_TITLES = ["variant", *SURVIVAL_COLUMNS.values()]


def survival_lines(record: Record) -> list[str]:
    """The variants of a set, a line each, and why some have no figures; empty for no variants."""
    if not record.survival:
        return []
    return ["", *aligned([_TITLES, *_rows(record)]), *(f"  ! {text}" for text in _errors(record))]


def survival_markdown(record: Record) -> str:
    """The same as a page of its own."""
    config = {**record.config, "victim_network": []}
    texts = [
        f"{subject(record)}.",
        f"{config['victims']} victims a row, {victims_text(config)} unless the row names another "
        "network. Means and 95 % intervals over the victims of this one set.",
        *record.labels,
        f"Command: {record.command}",
    ]
    table = [*markdown_head(_TITLES)]
    table += [markdown_row([markdown_text(cell) for cell in row]) for row in _rows(record)]
    notes = [f"- {markdown_text(text)}" for text in _errors(record)]
    paragraphs = [line for text in texts for line in (markdown_text(text), "")]
    return "\n".join(["# What survives", "", *paragraphs, *table, "", *notes]).rstrip() + "\n"


def _rows(record: Record) -> list[list[str]]:
    return [
        [name, *(mean_and_interval(each.metrics, key) for key in SURVIVAL_COLUMNS)]
        for name, each in record.survival.items()
    ]


def _errors(record: Record) -> list[str]:
    found = record.survival.items()
    return [f"{name}: {each.error}" for name, each in found if each.error is not None]
