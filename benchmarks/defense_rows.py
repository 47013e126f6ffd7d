"""How many rows a defense of the set needs: BadNets on 10, 100 and 500 digits, five seeds.

    python benchmarks/defense_rows.py benchmarks/results/defense-rows

Writes ``.json`` and ``.md``. A tenth of the rows is poisoned (one of ten). Victims train on these
rows only; the same rows without poison are the clean twin. The figures of a defense on few rows
compare with its figures on many.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillsec.attacks import Attack
from distillsec.defenses import DEFENSES
from distillsec.defenses.base import Sanitiser, SetScorer, Trainer
from distillsec.distill.core.start import start_run
from distillsec.distill.files.safe import write_json, write_text
from distillsec.distill.types import DistilledSet
from distillsec.eval.bench.bench import Bench, SetUnderTest
from distillsec.eval.bench.options import BenchOptions, make_defense
from distillsec.eval.bench.store import VictimStore
from distillsec.eval.config.layers import gather
from distillsec.eval.config.schema import configure
from distillsec.eval.results.metrics import over_seeds
from distillsec.eval.results.record import Outcome, environment
from distillsec.eval.run.setup import Setup, prepare

SIZES = (10, 100, 500)
SEEDS = range(5)
POISONED = 0.1
EPOCHS = 150
SHOWN = (
    "row_auroc",
    "rows_flagged",
    "control_rows_flagged",
    "set_alarm",
    "control_set_alarm",
    "attack_success_rate",
    "clean_test_accuracy",
)


def poisoned_digits(seed: int) -> tuple[Setup, Attack, DistilledSet, DistilledSet]:
    """The attacked and the clean training set, with the setup and the attack."""
    options = {"attack": "naive", "seed": seed, "victims": 2, "victim_epochs": EPOCHS}
    setup = prepare(configure(**gather(preset="digits-whole", options=options)))
    attack, backend = setup.attack(), setup.backend()
    assert attack is not None
    made = start_run(setup.task(), backend, [attack]).synthetic.distillate()
    clean = start_run(setup.task(), backend).synthetic.distillate()
    return setup, attack, setup.distilled_set(made), setup.distilled_set(clean)


def chosen_rows(poisoned: Tensor, count: int, seed: int) -> Tensor:
    """``count`` rows, a tenth of them poisoned."""
    generator = torch.Generator().manual_seed(seed)
    bad = max(1, round(POISONED * count))
    picked = []
    for rows, wanted in ((poisoned, bad), (~poisoned, count - bad)):
        found = torch.nonzero(rows)[:, 0]
        picked.append(found[torch.randperm(len(found), generator=generator)[:wanted]])
    return torch.cat(picked)


def outcomes(count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Every defense of the set, on ``count`` rows."""
    setup, attack, attacked, clean = poisoned_digits(seed)
    assert attack.poisoned_rows is not None
    rows = chosen_rows(attack.poisoned_rows, count, seed)
    test = setup.data.test
    tested = SetUnderTest(
        setup=setup,
        attacked=replace(attacked, batch=attacked.batch.rows(rows)),
        twin=replace(clean, batch=clean.batch.rows(rows)),
        case=attack.test_case(test.images, test.labels),
        poisoned=attack.poisoned_rows[rows],
    )
    with tempfile.TemporaryDirectory() as place:
        options = BenchOptions(holdout=200, budget="paper")
        bench = Bench(tested, options, VictimStore(Path(place)), lambda *_: None)
        yield (
            "none",
            Outcome(family="training", status="done", budget="paper", metrics=bench.before()),
        )
        for name, defense in DEFENSES.items():
            if issubclass(defense, SetScorer | Sanitiser | Trainer):
                yield name, bench.outcome(make_defense(name, "paper", {}), "paper")


def measured() -> dict[str, Any]:
    """Figures over seeds by number of rows and defense, or the reason why there are none."""
    found: dict[str, Any] = {}
    for count in SIZES:
        each: dict[str, list[Outcome]] = {}
        for seed in SEEDS:
            for name, outcome in outcomes(count, seed):
                each.setdefault(name, []).append(outcome)
            sys.stderr.write(f"{count} rows, seed {seed}: done\n")
        found[str(count)] = {name: _summary(seeds) for name, seeds in each.items()}
    return found


def _summary(seeds: list[Outcome]) -> dict[str, Any]:
    done = [outcome.metrics for outcome in seeds if outcome.status == "done"]
    note = next((o.reason or o.caution for o in seeds if o.reason or o.caution), None)
    metrics = over_seeds(done)
    return {
        "seeds": len(done),
        "note": note,
        "metrics": {k: metrics[k].model_dump(mode="json") for k in SHOWN if k in metrics},
    }


def as_markdown(found: dict[str, Any]) -> str:
    """A table for each number of rows."""
    lines = ["# Defenses of the set with 10, 100 and 500 rows", "", __doc__ or ""]
    for count, rows in found.items():
        lines += ["", f"## {count} rows", "", f"| defense | {' | '.join(SHOWN)} | note |"]
        lines.append("| --- " * (len(SHOWN) + 2) + "|")
        for name, row in rows.items():
            figures = [_figure(row["metrics"].get(key)) for key in SHOWN]
            lines.append(f"| {name} | {' | '.join(figures)} | {row['note'] or ''} |")
    return "\n".join(lines) + "\n"


def _figure(summary: dict[str, Any] | None) -> str:
    if summary is None or summary["mean"] is None:
        return "–"
    text = f"{summary['mean']:.3f}"
    if summary["ci95"]:
        text += f" [{summary['ci95'][0]:.2f}, {summary['ci95'][1]:.2f}]"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="path of the results without suffix")
    out: Path = parser.parse_args().out
    found = measured()
    command = f"python benchmarks/defense_rows.py {out}"
    write_json(
        out.with_suffix(".json"),
        {"command": command, "environment": environment("cpu"), "rows": found},
    )
    write_text(out.with_suffix(".md"), as_markdown(found))


if __name__ == "__main__":
    main()
