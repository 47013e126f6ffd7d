"""A suite's heat map: every defense against every attack on every setting."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..results.benchmark import Benchmark
from ..results.columns import budget_label, twin_pair
from ..results.judgement import DETECTION_FIGURES, detection_figure
from ..results.record import Metrics
from .defense_pictures import DETECTORS
from .style import INK, new_figure, save


def heatmap_picture(path: Path, found: Benchmark) -> None:
    """Defenses down, settings and attacks across.

    Left the detectors, by the AUROC of rows, of inputs, of sets or of models; below it, where a
    detector compares classes, the share in which the target is the most anomalous one. Right the
    others, by their effectiveness rating (DER), with the remaining ASR and CTA below it. Green is
    good for the defender. A cell without a figure says why.
    """
    places = list(dict.fromkeys((row.setting, row.attack, row.network) for row in found.rows))
    members = dict.fromkeys((row.defense, row.family) for row in found.rows if row.family)
    sides = [
        [name for name, family in members if (family in DETECTORS) == wanted]
        for wanted in (True, False)
    ]
    sides[1].insert(0, "none")
    rows = max(len(side) for side in sides)
    figure = new_figure(5.2 + 1.15 * 2 * len(places), 2.6 + 0.42 * rows, wspace=0.03)
    title = f"{found.suite['description'] or 'benchmark'}\n{budget_label(found.suite['budget'])}"
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    titles = ("detection: AUROC", "mitigation: DER, below it ASR / CTA")
    for axes, names, title in zip(figure.subplots(1, 2), sides, titles, strict=True):
        axes.set_title(title, fontsize=9, loc="left")
        _heat(axes, found, names, places)
    save(figure, path)


def _heat(
    axes: Axes, found: Benchmark, names: list[str], places: list[tuple[str, str, str]]
) -> None:
    for x, (setting, attack, network) in enumerate(places):
        rows = found.select(setting=setting, attack=attack, network=network)
        by_name = {row.defense: row for row in rows}
        for y, name in enumerate(names):
            row = by_name.get(name)
            value, text = (None, "") if row is None else heat_cell(row.metrics, row.cells)
            colour = "#EEEEEE" if value is None else shade(value)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=INK)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    one_network = len({network for *_, network in places}) == 1
    heads = ["\n".join(place[:2] if one_network else place) for place in places]
    axes.set_xticks(range(len(places)), heads, fontsize=7, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def heat_cell(metrics: Metrics, states: Iterable[str]) -> tuple[float | None, str]:
    """How good a defense is for the defender, 0 to 1, and what its cell says.

    states: how its runs ended, shown where there is no figure.
    """
    detector = detection_figure(metrics)
    if detector is not None:
        value, named = metrics[detector].mean, twin_pair(metrics, "target_suspected").attacked
        if value is None:
            return None, "–"
        below = DETECTION_FIGURES[detector] if named is None else f"target {named:.2f}"
        return value, f"{value:.2f}\n{below}"
    left = twin_pair(metrics, "attack_success_rate").attacked
    kept = twin_pair(metrics, "clean_test_accuracy").attacked
    if left is None or kept is None:
        return None, next((status for status in states if status != "done"), "–")
    rated = twin_pair(metrics, "defense_effectiveness_rating").attacked
    head = "" if rated is None else f"{rated:.2f}\n"
    return rated, f"{head}{left:.2f} / {kept:.2f}"


def shade(value: float) -> tuple[float, float, float]:
    """Vermillion at 0, white at a half, bluish green at 1: safe for colour-blind readers."""
    value = min(1.0, max(0.0, value))
    end = (0.0, 0.62, 0.45) if value > 0.5 else (0.84, 0.37, 0.0)
    weight = 0.75 * abs(2 * value - 1)
    red, green, blue = (1 - weight + weight * part for part in end)
    return red, green, blue
