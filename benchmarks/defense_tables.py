"""A benchmark's ``table.json`` as the compact tables of docs/defenses.md.

    python benchmarks/defense_tables.py benchmarks/results/classic-standard.json

A detector: AUROC (of rows, inputs, sets or models), then in brackets the false alarms on the clean
twin at the paper's threshold | at a calibrated one. If it compares classes, then also the share in
which the target is the most anomalous class, with the twin's in brackets. Any other defense:
ASR / CTA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distillsec.eval.results.benchmark import Benchmark, BenchmarkRow
from distillsec.eval.results.judgement import detection_figure
from distillsec.eval.results.record import Metrics

# False alarms on clean twins at the paper's and at a calibrated threshold, by the figure that
# judges the detector.
ALARMS = {
    "row_auroc": ("control_rows_flagged", "control_row_fpr_calibrated"),
    "auroc": ("control_fpr_paper", "control_fpr_at_5"),
    "set_auroc": ("control_set_alarm", "control_set_alarm_calibrated"),
    "model_auroc": ("control_alarm", "control_alarm_calibrated"),
}


def mean(metrics: Metrics, name: str) -> str:
    summary = metrics.get(name)
    return "–" if summary is None or summary.mean is None else f"{summary.mean:.2f}"


def cell(row: BenchmarkRow) -> str:
    """One defense against one attack."""
    if not row.seeds:
        return "n/a" if row.cells.get("not applicable") else "–"
    detector = detection_figure(row.metrics)
    if detector is None:
        text = " / ".join(
            mean(row.metrics, name) for name in ("attack_success_rate", "clean_test_accuracy")
        )
    else:
        alarms = " \\| ".join(mean(row.metrics, name) for name in ALARMS[detector])
        text = f"{mean(row.metrics, detector)} ({alarms})"
        if "target_suspected" in row.metrics:
            ours, twin = (mean(row.metrics, f"{side}target_suspected") for side in ("", "control_"))
            text = f"{text}, names {ours} ({twin})"
    return f"**{text}**" if row.holds else text


def compact(found: Benchmark) -> str:
    places = list(dict.fromkeys((row.setting, row.attack) for row in found.rows))
    names = dict.fromkeys(row.defense for row in found.rows)
    heads = [f"{setting}, {attack}" for setting, attack in places]
    lines = [f"| defense | {' | '.join(heads)} |", "| --- " * (len(places) + 1) + "|"]
    for name in names:
        cells = []
        for setting, attack in places:
            rows = found.select(setting=setting, attack=attack, defense=name)
            cells.append(cell(rows[0]) if rows else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path, nargs="+")
    for path in parser.parse_args().tables:
        print(compact(Benchmark.model_validate_json(path.read_text())))


if __name__ == "__main__":
    main()
