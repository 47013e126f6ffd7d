"""The pictures of the bench: one run's defenses, and a suite's heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from .benchmark_table import Benchmark, Row, judged
from .defense_tables import cell
from .page import BLUE, DPI, INK, SOFT, VERMILLION, save
from .record import Outcome, Record

_DETECTORS: Final = ("set scores", "input scores", "inspection")
# Of several figures the first that was measured is the one a detector is judged by.
_DETECTED: Final = ("row_auroc", "auroc", "set_alarm", "alarm")
_ANSWERED: Final = ("attack_success_rate", "clean_test_accuracy")
_KINDS: Final = {
    "row_auroc": "rows",
    "auroc": "inputs",
    "set_auroc": "sets",
    "model_auroc": "models",
}  # what an AUROC is of
_ROW: Final = 0.27  # inches


def defenses_picture(path: Path, record: Record) -> None:
    """What each defense did: detectors on the left, what is left of ASR and CTA on the right.

    A filled mark is the attacked set, a hollow one its clean twin; a line is the victims with no
    defense. Defenses that gave no figure are named with the reason.
    """
    detectors = {n: o for n, o in record.defenses.items() if o.family in _DETECTORS}
    others = {n: o for n, o in record.defenses.items() if o.family not in _DETECTORS}
    rows = max(len(detectors), len(others), 3)
    figure = Figure(
        figsize=(12.5, 1.5 + _ROW * rows),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04),
    )
    config, bench = record.config, record.bench
    figure.suptitle(
        f"Defenses of {config['dataset']}, {config['backend']}, "
        f"{config.get('attack') or 'no attack known'}: "
        f"budget {bench['budget']}, {bench['holdout']} held-out images, "
        f"{config['victims']} victims",
        fontsize=11,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    left, right = figure.subplots(1, 2)
    _detectors(left, detectors)
    _answers(right, others, record)
    save(figure, path)


def _detectors(axes: Axes, outcomes: dict[str, Outcome]) -> None:
    told: dict[str, str] = {}
    for y, (name, outcome) in enumerate(outcomes.items()):
        figures = (key for key in _DETECTED if cell(outcome.metrics, key).attacked is not None)
        figure = next(figures, None)
        if figure is None:
            told[name] = outcome.reason or "no figure: it raises no alarm"
            continue
        both = cell(outcome.metrics, figure)
        _mark(axes, y, both.attacked, VERMILLION, filled=True)
        _mark(axes, y, both.twin, BLUE, filled=False)
        if figure.endswith("alarm"):
            axes.annotate(
                "alarms", (1.04, y), fontsize=7, color=SOFT, va="center", annotation_clip=False
            )
    axes.axvline(0.5, color=SOFT, linewidth=0.8, linestyle=":")
    _finish(axes, list(outcomes), told, "AUROC, or share of victims that alarm")
    _legend(axes, [("attacked set", VERMILLION, True), ("clean twin", BLUE, False)])


def _answers(axes: Axes, outcomes: dict[str, Outcome], record: Record) -> None:
    told: dict[str, str] = {}
    colours = dict(zip(_ANSWERED, (VERMILLION, BLUE), strict=True))
    for y, (name, outcome) in enumerate(outcomes.items()):
        if outcome.status != "done":
            told[name] = outcome.reason or outcome.status
        for figure, colour in colours.items():
            both = cell(outcome.metrics, figure)
            _mark(axes, y, both.attacked, colour, filled=True)
            _mark(axes, y, both.twin, colour, filled=False)
    for figure, colour in colours.items():
        before = cell(record.metrics, figure).attacked
        if before is not None:
            axes.axvline(before, color=colour, linewidth=0.9, linestyle="--")
    _finish(axes, list(outcomes), told, "share of test images (dashed: no defense)")
    marks = [("ASR", VERMILLION, True), ("CTA", BLUE, True)]
    _legend(axes, [*marks, ("the same on the clean twin", SOFT, False)])


def _mark(axes: Axes, y: int, value: float | None, colour: str, *, filled: bool) -> None:
    if value is not None:
        face = colour if filled else "none"
        axes.plot(
            [value], [y], marker="o", markersize=5.5, markeredgecolor=colour, markerfacecolor=face
        )


def _finish(axes: Axes, names: list[str], told: dict[str, str], label: str) -> None:
    for y, name in enumerate(names):
        if name in told:
            text = told[name] if len(told[name]) < 75 else told[name][:72] + "…"
            axes.annotate(text, (0.0, y), fontsize=6.5, color=SOFT, va="center")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, marks: list[tuple[str, str, bool]]) -> None:
    for text, colour, filled in marks:
        face = colour if filled else "none"
        axes.plot(
            [], [], "o", markersize=5.5, markeredgecolor=colour, markerfacecolor=face, label=text
        )
    axes.legend(
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(marks),
    )


def heatmap_picture(path: Path, found: Benchmark) -> None:
    """A suite at a look: defenses down, settings and attacks across.

    Left the detectors, by the AUROC of rows, of inputs, of sets or of models; right the others, by
    their effectiveness rating (DER), with what is left of ASR and CTA below it. Green is good for
    the defender. A cell that gave no figure says why.
    """
    places = list(dict.fromkeys((row.setting, row.attack, row.network) for row in found.rows))
    members = dict.fromkeys((row.defense, row.family) for row in found.rows if row.family)
    sides = [
        [name for name, family in members if (family in _DETECTORS) == wanted]
        for wanted in (True, False)
    ]
    sides[1].insert(0, "none")
    rows = max(len(side) for side in sides)
    figure = Figure(
        figsize=(5.2 + 1.15 * 2 * len(places), 2.6 + 0.42 * rows),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03),
    )
    figure.suptitle(
        found.suite["description"] or "benchmark", fontsize=11, fontweight="bold", x=0.01, ha="left"
    )
    titles = ("detection: AUROC", "answers: DER, below it ASR / CTA")
    for axes, names, title in zip(figure.subplots(1, 2), sides, titles, strict=True):
        axes.set_title(title, fontsize=9, loc="left")
        _heat(axes, found, names, places)
    save(figure, path)


def _heat(
    axes: Axes, found: Benchmark, names: list[str], places: list[tuple[str, str, str]]
) -> None:
    for x, (setting, attack, network) in enumerate(places):
        rows = found.chosen(setting=setting, attack=attack, network=network)
        by_name = {row.defense: row for row in rows}
        for y, name in enumerate(names):
            value, text = _heat_cell(by_name[name]) if name in by_name else (None, "")
            colour = "#EEEEEE" if value is None else _shade(value)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=INK)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    alone = len({network for *_, network in places}) == 1
    heads = ["\n".join(place[:2] if alone else place) for place in places]
    axes.set_xticks(range(len(places)), heads, fontsize=7, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _heat_cell(row: Row) -> tuple[float | None, str]:
    """How good it is for the defender, 0 to 1, and what the cell says."""
    detector = judged(row.metrics)
    if detector is not None:
        value = row.metrics[detector].mean
        kind = _KINDS[detector]
        return (None, "–") if value is None else (value, f"{value:.2f}\n{kind}")
    left = cell(row.metrics, "attack_success_rate").attacked
    kept = cell(row.metrics, "clean_test_accuracy").attacked
    if left is None or kept is None:
        return None, next((status for status in row.cells if status != "done"), "–")
    rated = cell(row.metrics, "defense_effectiveness_rating").attacked
    head = "" if rated is None else f"{rated:.2f}\n"
    return rated, f"{head}{left:.2f} / {kept:.2f}"


def _shade(value: float) -> tuple[float, float, float]:
    """Vermillion at 0 over white at a half to bluish green at 1: told apart by the colour-blind."""
    value = min(1.0, max(0.0, value))
    end = (0.0, 0.62, 0.45) if value > 0.5 else (0.84, 0.37, 0.0)
    weight = 0.75 * abs(2 * value - 1)
    red, green, blue = (1 - weight + weight * part for part in end)
    return red, green, blue
