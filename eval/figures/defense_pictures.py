"""The picture of the bench: what each defense did to one set and to its clean twin."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..results.columns import budget_label, twin_pair
from ..results.record import Outcome, Record
from .canvas import BLUE, DPI, INK, SOFT, VERMILLION, save

DETECTORS: Final = ("set scores", "input scores", "inspection")
# Of several figures the first that was measured is the one a detector is judged by.
_DETECTED: Final = ("row_auroc", "auroc", "set_alarm", "alarm")
_ANSWERED: Final = ("attack_success_rate", "clean_test_accuracy")
_ROW: Final = 0.27  # inches


def defenses_picture(path: Path, record: Record) -> None:
    """What each defense did: detectors on the left, what is left of ASR and CTA on the right.

    A filled mark is the attacked set, a hollow one its clean twin; a line is the victims with no
    defense. Defenses that gave no figure are named with the reason.
    """
    detectors = {n: o for n, o in record.defenses.items() if o.family in DETECTORS}
    others = {n: o for n, o in record.defenses.items() if o.family not in DETECTORS}
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
        f"{bench['holdout']} held-out images, {config['victims']} victims\n"
        f"{budget_label(bench['budget'])}",
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
        figures = (key for key in _DETECTED if twin_pair(outcome.metrics, key).attacked is not None)
        figure = next(figures, None)
        if figure is None:
            told[name] = outcome.reason or "no figure: it raises no alarm"
            continue
        both = twin_pair(outcome.metrics, figure)
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
            both = twin_pair(outcome.metrics, figure)
            _mark(axes, y, both.attacked, colour, filled=True)
            _mark(axes, y, both.twin, colour, filled=False)
    for figure, colour in colours.items():
        before = twin_pair(record.metrics, figure).attacked
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
