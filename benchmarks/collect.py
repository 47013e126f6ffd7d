"""Copy the figures of a finished run into one file: its record, its curve, and every seed.

    python benchmarks/collect.py RUN benchmarks/results/NAME.json

The record has the command that made the run, under ``command``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distillsec.distill.files.safe import read_json_lines

KEPT = ("trigger", "attack_counters", "distilled", "timings", "metrics", "environment")


def collect(run: Path) -> dict[str, Any]:
    """The record of ``run``, its learning curve, and the parts of each seed's own record."""
    found: dict[str, Any] = json.loads((run / "record.json").read_text())
    for seed in found["seeds"] or []:
        one = json.loads((run / f"seed-{seed}" / "record.json").read_text())
        found.setdefault("by_seed", {})[seed] = {key: one[key] for key in KEPT}
    rows = read_json_lines(run / "progress.jsonl")
    if rows:
        found["curve"] = [row for row in rows if "clean_test_accuracy" in row]
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(collect(Path(sys.argv[1])), indent=1) + "\n")
