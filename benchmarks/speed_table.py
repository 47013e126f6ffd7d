"""A table and a picture of what ``speed.py`` measured.

    python benchmarks/speed_table.py benchmarks/results/speed-h200.json

writes ``speed-h200.md`` and ``speed-h200.png`` beside the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

WAYS = ("published", "plain", "fast", "fast tf32", "fast bf16")
COLOURS = ("#9a9a9a", "#56b4e9", "#009e73", "#009e73", "#d55e00")
NOT_CASES = ("machine", "floor", "command")


def cases(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median seconds by case and way."""
    rows = {
        case: {way: row["seconds"] for way, row in found[case].items() if "seconds" in row}
        for case in found
        if case not in NOT_CASES
    }
    return {case: seconds for case, seconds in rows.items() if seconds}


def table(found: dict[str, Any]) -> str:
    """Markdown: seconds of each way, and how many times as fast as the plain path it is."""
    rows = cases(found)
    ways = [way for way in WAYS if any(way in row for row in rows.values())]
    lines = [
        f"# Seconds on {found['machine']['device'] or 'a CPU'}",
        "",
        f"torch {found['machine']['torch']}; {found['machine']['seconds']}; medians of the rounds "
        "after the first. In brackets: times as fast as the plain path.",
        "",
        "| | " + " | ".join(ways) + " |",
        "| --- |" + " --- |" * len(ways),
    ]
    for case, row in rows.items():
        cells = [_cell(row, way) for way in ways]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines += _watched(found)
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, float], way: str) -> str:
    if way not in row:
        return ""
    seconds = f"{row[way]:.3g}"
    if way == "plain" or "plain" not in row:
        return seconds
    return f"{seconds} ({row['plain'] / row[way]:.1f}×)"


def _watched(found: dict[str, Any]) -> list[str]:
    """What the GPU did in an iteration of dc."""
    lines = []
    for way, row in found.get("dc, watched", {}).items():
        busy = row["busy_s"] / found["dc"][way]["seconds"]
        lines.append(
            f"- dc, {way}: the GPU is busy {busy:.0%} of the time; {row['launches']:,} kernel "
            f"launches, {row['graph_launches']:,} graph launches, {row['synchronisations']} "
            f"synchronisations; {row['peak_memory_gb']:.1f} GB at most."
        )
    return ["", *lines] if lines else []


def picture(found: dict[str, Any], path: Path) -> None:
    """Bars: how many times as fast as the plain path each way is."""
    rows = {case: row for case, row in cases(found).items() if "plain" in row}
    ways = [way for way in WAYS if way != "plain" and any(way in row for row in rows.values())]
    height = 0.8 / len(ways)
    figure, axes = pyplot.subplots(figsize=(7, 0.55 * len(rows) + 1.2), layout="constrained")
    for number, way in enumerate(ways):
        places = [place + number * height for place in range(len(rows))]
        values = [row["plain"] / row[way] if way in row else 0 for row in rows.values()]
        axes.barh(places, values, height, label=way, color=COLOURS[WAYS.index(way)])
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], list(rows))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times as fast as the plain path ({found['machine']['device'] or 'CPU'})")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Write both beside the JSON file."""
    source = Path(sys.argv[1])
    found = json.loads(source.read_text())
    source.with_suffix(".md").write_text(table(found))
    picture(found, source.with_suffix(".png"))


if __name__ == "__main__":
    main()
