"""The summary of ``defend``: order, what is folded, and the conclusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distillsec.defenses import DEFENSES, GROUPS
from distillsec.eval.bench.options import choose_defenses, defense_names
from distillsec.eval.results.conclusion import conclusion
from distillsec.eval.results.defend_table import defend_table
from distillsec.eval.results.metrics import collect
from distillsec.eval.results.record import Metrics, Outcome, Record

CTA, ASR = "clean_test_accuracy", "attack_success_rate"


def figures(ours: Mapping[str, float], twin: Mapping[str, float] | None = None) -> Metrics:
    return collect([ours, ours], None if twin is None else [twin, twin])


def outcome(family: str, metrics: Metrics | None = None, **fields: Any) -> Outcome:
    known = {"family": family, "status": "done", "budget": "paper", "metrics": metrics or {}}
    return Outcome.model_validate(known | fields)


@pytest.fixture
def record() -> Record:
    clean = {CTA: 0.9, ASR: 0.0}
    none: dict[str, Any] = {"status": "not applicable"}
    defenses = {
        "strip": outcome("input scores", figures({"auroc": 0.55})),
        "teco": outcome("input scores", figures({"auroc": 0.97})),
        "scan": outcome("set scores", figures({"set_alarm": 1.0}, {"set_alarm": 0.0})),
        "beatrix": outcome("set scores", figures({"set_alarm": 1.0}, {"set_alarm": 1.0})),
        "fine-tuning": outcome("repair", figures({CTA: 0.9, ASR: 0.7}, clean)),
        "nad": outcome("repair", figures({CTA: 0.88, ASR: 0.02}, clean)),
        "rnp": outcome("repair", figures({CTA: 0.2, ASR: 0.0}, clean)),
        "clp": outcome("repair", reason="needs batch norm", **none),
        "ibd-psc": outcome("input scores", reason="needs batch norm", **none),
        "mntd": outcome("inspection", reason="needs a zoo", **none),
        "anp": outcome("repair", status="error", reason="it broke"),
    }
    ratings = {"fine-tuning": 0.5, "nad": 0.85, "rnp": 0.5}
    for name, rating in ratings.items():
        more = figures({"defense_effectiveness_rating": rating})
        defenses[name].metrics |= more
    return Record(
        kind="defend",
        status="done",
        config={"dataset": "digits", "attack": "naive", "victims": 2, "network": "convnet"},
        config_key="a",
        control_key="b",
        bench={"budget": "paper", "holdout": 100},
        metrics=figures({CTA: 0.9, ASR: 0.8}, {CTA: 0.91, ASR: 0.01}),
        defenses=defenses,
    )


def test_the_best_of_a_family_is_first(record: Record) -> None:
    text = defend_table(record, Path("runs/d"))
    for better, worse in (("teco", "strip"), ("scan", "beatrix"), ("nad", "fine-tuning")):
        assert text.index(f"  {better} ") < text.index(f"  {worse} ")
    lines = text.splitlines()
    assert lines[1].startswith("defend: ") and lines[2] == "  runs/d/record.json"


def test_what_does_not_apply_is_folded_by_reason(record: Record) -> None:
    lines = defend_table(record, Path("runs/d")).splitlines()
    start = lines.index("  not applicable: 3 of 11")
    assert lines[start + 1 : start + 3] == [
        "    clp, ibd-psc: needs batch norm",
        "    mntd: needs a zoo",
    ]
    assert sum("clp" in line for line in lines) == 1
    assert "    anp: error: it broke" in lines


def test_the_conclusion(record: Record) -> None:
    assert conclusion(record) == (
        "Without a defense the attack works (ASR 0.80, control 0.01). "
        "Detectors that see the attack (AUROC at least 0.9, or an alarm on it alone): 2 of 4 "
        "(teco, scan). Other defenses that remove it (ASR at most 0.1, at most 0.05 of CTA lost): "
        "1 of 3 (nad). "
        "False alarms on the clean twin: beatrix."
    )


def test_the_conclusion_of_a_quick_budget_is_no_verdict(record: Record) -> None:
    record.bench["budget"] = "quick"
    assert conclusion(record).endswith("With the quick budget this is no verdict on a defense.")


def test_the_conclusion_where_the_attack_does_not_work(record: Record) -> None:
    record.metrics = figures({CTA: 0.9, ASR: 0.05})
    text = conclusion(record)
    assert "does not work here (ASR 0.05): nothing is to be removed." in text
    assert "remove" not in text.split("removed.")[1]


def test_the_conclusion_without_a_trigger(record: Record) -> None:
    record.metrics = figures({CTA: 0.9})
    record.defenses = {"scan": outcome("set scores", figures({"set_alarm": 0.0}))}
    assert conclusion(record) == (
        "No trigger is known, so only alarms can be counted. Detectors that raise an alarm: 0 of 1."
    )


# Groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["sets", "inputs", "models", "training"])
def test_a_group_is_a_folder_of_the_catalogue(group: str) -> None:
    folder = [n for n, each in DEFENSES.items() if each.__module__.split(".")[-2] == group]
    assert list(GROUPS[group]) == folder


def test_groups_stand_for_their_defenses() -> None:
    assert defense_names(["inputs", "strip", "nad"]) == [*GROUPS["inputs"], "nad"]
    chosen = choose_defenses(["quick"], "quick", {})
    assert list(chosen) == list(GROUPS["quick"]) and set(chosen) < set(DEFENSES)
    assert GROUPS["all"] == tuple(DEFENSES)
    assert not GROUPS.keys() & DEFENSES.keys()
