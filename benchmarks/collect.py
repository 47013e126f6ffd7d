"""Keep a finished run's figures: its record, and of several seeds what their summary leaves out.

    python benchmarks/collect.py RUN benchmarks/results/NAME.json

The command that made the run stands in the record, under ``command``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KEPT = ("trigger", "attack_counters", "distilled", "timings", "metrics", "environment")


def collect(run: Path) -> dict[str, Any]:
    """The record of ``run``; its learning curve; for each seed, what belongs to it alone."""
    found: dict[str, Any] = json.loads((run / "record.json").read_text())
    for seed in found["seeds"] or []:
        one = json.loads((run / f"seed-{seed}" / "record.json").read_text())
        found.setdefault("by_seed", {})[seed] = {key: one[key] for key in KEPT}
    log = run / "progress.jsonl"
    if log.exists():
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        found["curve"] = [row for row in rows if "clean_test_accuracy" in row]
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(collect(Path(sys.argv[1])), indent=1) + "\n")
