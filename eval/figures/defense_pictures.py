"""The picture of the defenses' results on one set and on its clean twin."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from matplotlib.axes import Axes

from ..results.columns import budget_label, twin_pair
from ..results.record import Outcome, Record
from .style import BLUE, INK, SOFT, VERMILLION, new_figure, save, style_axes

DETECTORS: Final = ("set scores", "input scores", "inspection")
# A detector is judged by the first of these that was measured.
_JUDGED_BY: Final = ("row_auroc", "auroc", "set_alarm", "alarm")
_REMAINING: Final = ("attack_success_rate", "clean_test_accuracy")
_ROW_HEIGHT: Final = 0.27  # inches


def defenses_picture(path: Path, record: Record) -> None:
    """Detectors on the left; on the right the ASR and CTA that remain after the other defenses.

    A filled mark is the attacked set, a hollow one its clean twin; a dashed line is the victims
    without a defense. Defenses without a figure are listed with the reason.
    """
    detectors = {n: o for n, o in record.defenses.items() if o.family in DETECTORS}
    others = {n: o for n, o in record.defenses.items() if o.family not in DETECTORS}
    rows = max(len(detectors), len(others), 3)
    figure = new_figure(12.5, 1.5 + _ROW_HEIGHT * rows, wspace=0.04)
    config, bench = record.config, record.bench
    made = ", ".join(config[key] for key in ("backend", "attack") if key in config) or "not known"
    figure.suptitle(
        f"Defenses of {config['dataset']}, {made}: "
        f"{bench['holdout']} held-out images, {config['victims']} victims\n"
        f"{budget_label(bench['budget'])}",
        fontsize=11,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    left, right = figure.subplots(1, 2)
    _detectors(left, detectors)
    _mitigation(right, others, record)
    save(figure, path)


def _detectors(axes: Axes, outcomes: dict[str, Outcome]) -> None:
    reasons: dict[str, str] = {}
    for y, (name, outcome) in enumerate(outcomes.items()):
        pairs = {key: twin_pair(outcome.metrics, key) for key in _JUDGED_BY}
        figure = next((key for key, pair in pairs.items() if pair.attacked is not None), None)
        if figure is None:
            reasons[name] = outcome.reason or "no figure: it raises no alarm"
            continue
        _mark(axes, y, pairs[figure].attacked, VERMILLION, filled=True)
        _mark(axes, y, pairs[figure].twin, BLUE, filled=False)
        if figure.endswith("alarm"):
            axes.annotate(
                "alarms", (1.04, y), fontsize=7, color=SOFT, va="center", annotation_clip=False
            )
    axes.axvline(0.5, color=SOFT, linewidth=0.8, linestyle=":")
    _finish(axes, list(outcomes), reasons, "AUROC, or share of victims with an alarm")
    _legend(axes, [("attacked set", VERMILLION, True), ("clean twin", BLUE, False)])


def _mitigation(axes: Axes, outcomes: dict[str, Outcome], record: Record) -> None:
    reasons: dict[str, str] = {}
    colours = dict(zip(_REMAINING, (VERMILLION, BLUE), strict=True))
    for y, (name, outcome) in enumerate(outcomes.items()):
        if outcome.status != "done":
            reasons[name] = outcome.reason or outcome.status
        for figure, colour in colours.items():
            both = twin_pair(outcome.metrics, figure)
            _mark(axes, y, both.attacked, colour, filled=True)
            _mark(axes, y, both.twin, colour, filled=False)
    for figure, colour in colours.items():
        before = twin_pair(record.metrics, figure).attacked
        if before is not None:
            axes.axvline(before, color=colour, linewidth=0.9, linestyle="--")
    _finish(axes, list(outcomes), reasons, "share of test images (dashed: no defense)")
    marks = [("ASR", VERMILLION, True), ("CTA", BLUE, True)]
    _legend(axes, [*marks, ("the same on the clean twin", SOFT, False)])


def _mark(axes: Axes, y: int, value: float | None, colour: str, *, filled: bool) -> None:
    if value is not None:
        face = colour if filled else "none"
        axes.plot(
            [value], [y], marker="o", markersize=5.5, markeredgecolor=colour, markerfacecolor=face
        )


def _finish(axes: Axes, names: list[str], reasons: dict[str, str], label: str) -> None:
    for y, name in enumerate(names):
        if name in reasons:
            text = reasons[name] if len(reasons[name]) < 75 else reasons[name][:72] + "…"
            axes.annotate(text, (0.0, y), fontsize=6.5, color=SOFT, va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(label, fontsize=8)
    style_axes(axes)


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
