"""Studies of one question each: a preset, some variations of it, several seeds, one table.

    python benchmarks/variations.py dm-share RUNS benchmarks/results/dm-share
    python benchmarks/variations.py mtt-doorping RUNS benchmarks/results/mtt-doorping

Every variation is measured against the clean twin of its own configuration and seed, which those
that differ in the attack alone share. Stopped or killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import finished, over_seeds, run_once

from distillsec.eval.config.layers import gather
from distillsec.eval.config.schema import configure

METRICS = {
    "clean_test_accuracy": "CTA",
    "control_clean_test_accuracy": "CTA, twin",
    "attack_success_rate": "ASR",
    "control_attack_success_rate": "control ASR",
}


@dataclass(frozen=True)
class Study:
    """preset, what all its variations have, the variations by name, and the distillation seeds."""

    question: str
    preset: str
    common: Mapping[str, Any]
    variations: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]


_PIXEL = {"objective": "target-logit", "trigger_range": "pixel"}
_UNBOUNDED = {"objective": "neuron", "trigger_range": "unbounded"}
_ONCE = {"rounds": 1, "experts": 5}
_ROUNDS = {"rounds": 3, "experts": 3}

STUDIES: Mapping[str, Study] = {
    "dm-share": Study(
        question="NaiveAttack on dm: what share of the target's batches has to be poisoned rows?",
        preset="digits-dm",
        common={"attack": "naive"},
        variations={
            "10 %": {"target_share": 0.1},
            "25 %": {"target_share": 0.25},
            "as they come (50 %)": {},
            "75 %": {"target_share": 0.75},
            "90 %": {"target_share": 0.9},
        },
        seeds=(0, 1, 2, 3, 4),
    ),
    "mtt-doorping": Study(
        question="Doorping on mtt: when should the trigger move?",
        preset="digits-mtt",
        common={"attack": "doorping", "victims": 3},
        variations={
            f"{name}, {trigger}": {**how, **what}
            for trigger, what in (("pixel range", _PIXEL), ("unbounded", _UNBOUNDED))
            for name, how in {
                "with the experts": {**_ONCE, "moves_with": "experts"},
                "with the experts, in 3 rounds": {**_ROUNDS, "moves_with": "experts"},
                "against students": {**_ONCE, "moves_with": "students"},
                "against students, experts in 3 rounds": {**_ROUNDS, "moves_with": "students"},
                "with both": {**_ONCE, "moves_with": "both"},
                "with both, in 3 rounds": {**_ROUNDS, "moves_with": "both"},
            }.items()
        },
        seeds=(100, 101, 102),
    ),
}


def run_seed(study: Study, seed: int, runs: Path) -> None:
    """All variations of one seed that are not there yet, and the clean twins they need."""
    for name, options in study.variations.items():
        keys = gather(preset=study.preset, options={**study.common, **options, "seed": seed})
        config = configure(**keys)
        twin = runs / f"seed-{seed}" / f"clean-{config.control_key()}"
        run_once(config.without_attack(), twin)
        run_once(config, runs / f"seed-{seed}" / name, control_run=twin)


def rows(study: Study, runs: Path) -> list[dict[str, Any]]:
    """A row for each variation with its finished seeds."""
    table = []
    for name in study.variations:
        done = finished({seed: runs / f"seed-{seed}" / name for seed in study.seeds})
        if done:
            table.append(
                {
                    "variation": name,
                    "seeds": list(done),
                    "metrics": over_seeds(done, METRICS),
                    "attack_counters": {seed: r.attack_counters for seed, r in done.items()},
                    "config": next(iter(done.values())).config,
                }
            )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """The table for reading: means over seeds, each seed's ASR beside its mean."""
    titles = " | ".join(METRICS.values())
    lines = [f"| variation | seeds | {titles} | ASR by seed |", "| --- " * 7 + "|"]
    for row in table:
        means = [row["metrics"][name]["mean"] for name in METRICS]
        cells = [f"{mean:.3f}" if mean is not None else "–" for mean in means]
        by_seed = ", ".join(f"{v:.2f}" for v in row["metrics"]["attack_success_rate"]["values"])
        named = [row["variation"], str(len(row["seeds"])), *cells, by_seed]
        lines.append(f"| {' | '.join(named)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is missing of a study, then write its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("out", type=Path, help="the table's files, without their endings")
    parser.add_argument("--jobs", type=int, default=2, help="processes (one thread each)")
    given = parser.parse_args()
    study, runs = STUDIES[given.study], given.runs / given.study
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=spawn) as pool:
        work = {pool.submit(run_seed, study, seed, runs): seed for seed in study.seeds}
        for future in as_completed(work):
            future.result()
            print(f"seed {work[future]} done", flush=True)
    table = rows(study, runs)
    whole = {
        "question": study.question,
        "command": f"python benchmarks/variations.py {given.study} RUNS {given.out}",
        "rows": table,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
