"""The attack table: {naive, Doorping in the pixel range, Doorping without bounds} × five backends.

    python benchmarks/attack_table.py RUNS benchmarks/results/attack-table

The runs lie under RUNS, the table is written as ``.json``, ``.md`` and ``.png``. Stopped or killed,
the same command goes on; ``--only digits`` (or ``fashion-mnist-dm``, say) runs a part, ``--jobs 1``
one process in place of two. Each attack shares the clean twin of its seed with the others.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cells import finished, over_seeds, run_once

from distillsec.distill.types import DistillsecError
from distillsec.eval.config.layers import for_clean, gather
from distillsec.eval.config.schema import configure
from distillsec.eval.results.metrics import Summary
from distillsec.eval.results.record import Record
from distillsec.eval.run.progress import duration

# In the pixel range the objective that does most there; without bounds the paper's.
ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "naive": {"attack": "naive"},
    "doorping, pixel range": {
        "attack": "doorping",
        "trigger_range": "pixel",
        "objective": "target-logit",
    },
    "doorping, unbounded": {
        "attack": "doorping",
        "trigger_range": "unbounded",
        "objective": "neuron",
    },
}
# dm trains no network whose logits could tell anything; its students do.
INSTEAD: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("dm", "doorping, pixel range"): {"objective": "student"},
}
# What keeps the table within its hours: fewer updates of the trigger, fewer victims, a shorter mtt.
VICTIMS = 3
SIZED: Mapping[str, Mapping[str, Any]] = {"fashion-mnist-mtt": {"iterations": 40}}
UPDATE_EVERY: Mapping[str, int] = {"digits": 2, "fashion-mnist": 5}
BACKENDS = ("dc", "dsa", "dm", "mtt", "dd")
# Distillation seeds; on Fashion-MNIST the dear backends have one.
SEEDS: Mapping[str, Mapping[str, int]] = {
    "digits": dict.fromkeys(BACKENDS, 5),
    "fashion-mnist": {"dc": 3, "dm": 3, "dsa": 1, "mtt": 1, "dd": 1},
}
METRICS = (
    "clean_test_accuracy",
    "control_clean_test_accuracy",
    "attack_success_rate",
    "control_attack_success_rate",
    "backdoor_gain",
)


@dataclass(frozen=True)
class Group:
    """A clean twin and the attacks that are measured against it: one process's work."""

    dataset: str
    backend: str
    seed: int

    @property
    def preset(self) -> str:
        return f"{self.dataset}-{self.backend}"

    def keys(self, attack: str) -> dict[str, Any]:
        """The flat configuration of one attack."""
        options = {"seed": self.seed, "victims": VICTIMS, **SIZED.get(self.preset, {})}
        options |= ATTACKS[attack]
        options |= INSTEAD.get((self.backend, attack), {})
        if options["attack"] == "doorping" and options["objective"] != "student":
            options["update_every"] = UPDATE_EVERY[self.dataset]
        return gather(preset=self.preset, options=options)

    def folder(self, runs: Path) -> Path:
        return runs / self.preset / f"seed-{self.seed}"


def groups(only: str) -> list[Group]:
    """All of them whose name begins with ``only``: a first seed of all backends, then a second …"""
    found = [
        Group(dataset, backend, seed)
        for dataset, backends in SEEDS.items()
        for seed in range(max(backends.values()))
        for backend in ("dc", "dm", "dsa", "mtt", "dd")
        if seed < backends[backend]
    ]
    return [group for group in found if group.preset.startswith(only)]


def run_group(group: Group, runs: Path) -> list[str]:
    """Distil the twin and the attacked sets that are not there yet; returns what failed."""
    folder, failed = group.folder(runs), []
    twin = folder / "clean"
    try:
        run_once(for_clean(group.keys("naive")), twin)
    except DistillsecError as error:
        return [f"{twin}: {error}"]
    for name in ATTACKS:
        place = folder / _folder_name(name)
        try:
            run_once(configure(**group.keys(name)), place, control_run=twin)
        except DistillsecError as error:
            failed.append(f"{place}: {error}")
    return failed


def _folder_name(attack: str) -> str:
    return attack.replace(", ", "-").replace(" ", "-")


def rows(runs: Path) -> Iterator[dict[str, Any]]:
    """A row for each data set, backend and attack that has a finished seed."""
    for dataset, backends in SEEDS.items():
        for backend in BACKENDS:
            for name in ATTACKS:
                seeds = (Group(dataset, backend, seed) for seed in range(backends[backend]))
                records = finished({g.seed: g.folder(runs) / _folder_name(name) for g in seeds})
                if records:
                    yield _row(dataset, backend, name, records, backends[backend])


def _row(
    dataset: str, backend: str, attack: str, records: Mapping[int, Record], wanted: int
) -> dict[str, Any]:
    last = next(reversed(records.values()))
    triggers = [record.trigger or {} for record in records.values()]
    return {
        "dataset": dataset,
        "backend": backend,
        "attack": attack,
        "seeds": list(records),
        "seeds_wanted": wanted,
        "metrics": over_seeds(records, METRICS),
        "trigger_values": [
            min(trigger["min"] for trigger in triggers),
            max(trigger["max"] for trigger in triggers),
        ],
        "attack_counters": {s: record.attack_counters for s, record in records.items()},
        "seconds": {s: sum(record.timings.values()) for s, record in records.items()},
        "labels": last.labels,
        "config": last.config,
        "environment": last.environment,
    }


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The table for reading: means over seeds, 95 % t-intervals of ASR and control."""
    lines = [
        "| data | backend | attack | seeds | CTA (twin) | ASR | control | gain | trigger values |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        found = {name: Summary.model_validate(value) for name, value in row["metrics"].items()}
        low, high = row["trigger_values"]
        attack = row["attack"].replace("unbounded", "**unbounded**")
        cta, twin = (
            _told(found[name], False)
            for name in ("clean_test_accuracy", "control_clean_test_accuracy")
        )
        rates = (
            _told(found[name])
            for name in ("attack_success_rate", "control_attack_success_rate", "backdoor_gain")
        )
        cells = (row["dataset"], f"`{row['backend']}`", attack, str(len(row["seeds"])))
        cells += (f"{cta} ({twin})", *rates, f"{low:.1f} to {high:.1f}".replace("-", "−"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _told(summary: Summary, interval: bool = True) -> str:
    if summary.mean is None:
        return "–"
    text = f"{summary.mean:.3f}"
    if interval and summary.ci95 is not None:
        text += f" [{summary.ci95[0]:.2f}, {summary.ci95[1]:.2f}]"
    return text.replace("-", "−")


def picture(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """ASR of each attack on each backend beside its control, with the seeds as points."""
    datasets = [name for name in SEEDS if any(row["dataset"] == name for row in table)]
    figure, axes = plt.subplots(
        len(datasets), len(ATTACKS), figsize=(11, 2.9 * len(datasets)), sharey=True, squeeze=False
    )
    for line, dataset in zip(axes, datasets, strict=True):
        for axis, attack in zip(line, ATTACKS, strict=True):
            chosen = {
                r["backend"]: r for r in table if (r["dataset"], r["attack"]) == (dataset, attack)
            }
            for place, backend in enumerate(BACKENDS):
                if backend in chosen:
                    _marks(axis, place, chosen[backend]["metrics"])
            axis.set_xticks(range(len(BACKENDS)), BACKENDS)
            axis.set_xlim(-0.5, len(BACKENDS) - 0.5)
            axis.set_ylim(-0.04, 1.04)
            axis.grid(axis="y", alpha=0.3)
            axis.set_title(f"{dataset}: {attack}", fontsize=10)
        line[0].set_ylabel("share of triggered images")
    handles, labels = axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06 / len(datasets) * 2, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _marks(axis: Any, place: int, metrics: Mapping[str, Any]) -> None:
    styles = (
        ("attack_success_rate", "ASR", -0.12, "#c0392b", "o"),
        ("control_attack_success_rate", "control ASR (clean twin)", 0.12, "#2c6fbb", "s"),
    )
    for name, label, shift, colour, marker in styles:
        values = [value for value in metrics[name]["values"] if value is not None]
        axis.plot([place + shift] * len(values), values, ".", color=colour, alpha=0.35)
        mean = metrics[name]["mean"]
        if mean is not None and math.isfinite(mean):
            axis.plot(place + shift, mean, marker, color=colour, label=label)


def write(runs: Path, out: Path, spent: float) -> None:
    """The table's three files; ``spent`` seconds of wall time, earlier sessions included."""
    table = list(rows(runs))
    if not table:
        return
    command = "python benchmarks/attack_table.py RUNS benchmarks/results/attack-table"
    whole = {"command": command, "wall_seconds": round(spent), "rows": table}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(table))
    picture(table, out.with_suffix(".png"))


def main() -> int:
    """Run what is missing, then write the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("out", type=Path, help="the table's files, without their endings")
    parser.add_argument("--only", default="", help="run presets that begin so")
    parser.add_argument("--jobs", type=int, default=2, help="processes (one thread each)")
    given = parser.parse_args()
    work, failed, begun = groups(given.only), [], time.monotonic()
    clock = given.runs / "wall-seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0
    given.runs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=spawn) as pool:
        futures = {pool.submit(run_group, group, given.runs): group for group in work}
        for done, future in enumerate(as_completed(futures), 1):
            failed += future.result()
            spent = time.monotonic() - begun
            clock.write_text(str(before + spent))
            write(given.runs, given.out, before + spent)
            group, left = futures[future], spent / done * (len(work) - done)
            print(
                f"{done}/{len(work)} {group.preset} seed {group.seed}, {duration(spent)} so far, "
                f"about {duration(left)} left",
                flush=True,
            )
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
