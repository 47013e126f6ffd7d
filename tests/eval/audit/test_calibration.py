"""Scores among clean sets, what a calibration fits, and verdicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillsec.distill.types import RequestError
from distillsec.eval.audit.calibration import (
    Calibration,
    CleanSet,
    Conditions,
    deviations,
    fitting,
    read_calibration,
    score,
    shipped_calibrations,
)
from distillsec.eval.audit.examine import Examination
from distillsec.eval.audit.inversion import JointPatches
from distillsec.eval.audit.verdict import LEAST_SCORE, judge

CONDITIONS = Conditions(
    dataset="digits",
    image_shape=(1, 8, 8),
    classes=10,
    per_class=(10, 10),
    network={"network": "convnet", "width": 32, "depth": 2},
    clean=200,
    seed=0,
)


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(seed)).double()


def calibration(values: Tensor, rows: Tensor | None = None) -> Calibration:
    sets = []
    for number, row in enumerate(values.tolist()):
        evidence = {"inversion": row}
        if rows is not None:
            evidence["rows"] = rows[number].tolist()
        sets.append(CleanSet(name=f"{number}", fingerprint=f"{number}", evidence=evidence))
    return Calibration(made_by="a test", conditions=CONDITIONS, sets=sets)


def test_deviations_from_the_others() -> None:
    values = torch.tensor([[5.0, 0.0], [1.0, 0.0], [3.0, 0.0]]).double()
    found = deviations(values)
    assert float(found[0, 0]) == pytest.approx((5 - 2) / 2**0.5)
    assert float(found[1, 0]) == pytest.approx((1 - 4) / 2**0.5)
    assert found[:, 1].abs().max() == 0


def test_a_column_without_spread_has_that_of_the_others() -> None:
    values = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 0.0]]).double()
    # The others' variances are 2 and 0: their mean is 1.
    assert float(deviations(values)[0, 1]) == pytest.approx(1.0)


def test_a_class_that_is_small_in_every_set_is_no_suspect() -> None:
    values = 0.1 * noise(20)
    values[:, 4] += 2
    ours = values[0].clone()
    ours[7] += 1
    found = score({"inversion": ours}, calibration(values[1:]))
    assert found.suspect == 7 and found.value > 5
    assert found.above == pytest.approx(1 / 20)
    assert found.parts == {"inversion": pytest.approx(found.value)}


def test_kinds_of_evidence_add_up() -> None:
    values, rows = noise(20), noise(20, seed=1)
    ours, theirs = values[0].clone(), rows[0].clone()
    ours[2] += 4
    theirs[2] += 4
    found = score({"inversion": ours, "rows": theirs}, calibration(values[1:], rows[1:]))
    assert found.suspect == 2
    assert found.value == pytest.approx(sum(found.parts.values()) / 2**0.5)


def test_the_false_alarm_rate_is_as_stated() -> None:
    """Sets of one kind: a share of 1/20 exceeds 19 others."""
    trials = 400
    alarms = 0
    for trial in range(trials):
        values = noise(20, seed=trial)
        alarms += score({"inversion": values[0]}, calibration(values[1:])).above <= 0.05
    assert alarms / trials == pytest.approx(0.05, abs=0.03)


def test_other_kinds_and_too_few_sets_are_refused() -> None:
    values = noise(5)
    with pytest.raises(RequestError, match="kinds inversion, the calibration inversion, rows"):
        score({"inversion": values[0]}, calibration(values, values))
    with pytest.raises(RequestError, match="has 2 sets, expected 3"):
        score({"inversion": values[0]}, calibration(values[:2]))


def test_what_does_not_fit_is_named() -> None:
    known = [calibration(noise(20))]
    assert fitting(CONDITIONS, known) is known[0]
    other = CONDITIONS.model_copy(update={"dataset": "mnist", "per_class": (1, 1)})
    with pytest.raises(RequestError, match="dataset digits, not mnist; per class 10×10, not 1×1"):
        fitting(other, known)
    with pytest.raises(RequestError, match="no calibration"):
        fitting(CONDITIONS, [])


def test_a_file_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path, ours = tmp_path / "mine.json", calibration(noise(3))
    ours.write(path)
    assert read_calibration(path) == ours
    found = json.loads(path.read_text())
    found["sets"][1]["evidence"]["inversion"].pop()
    path.write_text(json.dumps(found))
    with pytest.raises(RequestError, match="its sets differ in their evidence"):
        read_calibration(path)
    path.write_text("{}")
    with pytest.raises(RequestError, match="no calibration of an audit"):
        read_calibration(path)


def test_the_shipped_calibrations_can_state_five_per_cent() -> None:
    found = shipped_calibrations()
    assert found
    for each in found:
        assert each.smallest_rate <= 0.05
        assert len({one.fingerprint for one in each.sets}) == len(each.sets)
        assert "benchmarks/audit_calibration.py" in each.made_by
    assert len({each.conditions.model_dump_json() for each in found}) == len(found)


# Verdicts ------------------------------------------------------------------------------------


def examination(values: Tensor, accuracy: float | None = 0.9) -> Examination:
    ones = torch.ones(10)
    patches = JointPatches(
        masks=torch.ones(10, 1, 8, 8), patterns=torch.ones(10, 1, 8, 8), sizes=ones
    )
    return Examination(
        evidence={"inversion": values},
        patches=patches,
        held_out=ones,
        other_network=ones,
        sizes=ones,
        accuracy=accuracy,
        victims=(),
        seconds=1.0,
    )


def shifted(by: float) -> Tensor:
    values = torch.zeros(10).double()
    values[6] = by
    return values


def test_verdicts() -> None:
    known = [calibration(noise(24))]
    clear = judge(examination(shifted(9.0)), CONDITIONS, known)
    assert (clear.verdict, clear.clean_sets) == ("backdoored", 24)
    assert clear.score is not None and clear.score.suspect == 6
    assert clear.reason.startswith("0 of 24 clean sets")
    quiet = judge(examination(shifted(0.0)), CONDITIONS, known)
    assert quiet.verdict == "no evidence" and "no proof" in quiet.advice


def test_one_clean_set_as_high_is_suspicious() -> None:
    values = noise(24)
    values[3, 1] += 30
    found = judge(examination(shifted(9.0)), CONDITIONS, [calibration(values)])
    assert found.verdict == "suspicious" and found.reason.startswith("1 of 24 clean sets")


def test_a_score_that_is_the_highest_but_low_is_suspicious() -> None:
    values = 0.9 * noise(24).clamp(-1, 1)
    found = judge(examination(shifted(2.6)), CONDITIONS, [calibration(values)])
    assert found.score is not None and 2 < found.score.value < LEAST_SCORE
    assert found.score.above == 1 / 25 and found.verdict == "suspicious"


def test_what_cannot_be_said_is_not_said() -> None:
    few = judge(examination(shifted(9.0)), CONDITIONS, [calibration(noise(12))])
    assert few.verdict == "cannot say" and "1/13 = 7.7%" in few.reason
    more = judge(examination(shifted(9.0)), CONDITIONS, [calibration(noise(12))], 0.08)
    assert more.verdict == "backdoored"
    other = CONDITIONS.model_copy(update={"dataset": "mnist"})
    unknown = judge(examination(shifted(9.0)), other, [calibration(noise(24))])
    assert unknown.verdict == "cannot say" and "dataset digits, not mnist" in unknown.reason
    assert "--calibrate" in unknown.advice and unknown.score is None
    weak = replace(examination(shifted(9.0)), accuracy=0.15)
    untrained = judge(weak, CONDITIONS, [calibration(noise(24))])
    assert untrained.verdict == "cannot say" and "accuracy of 0.15" in untrained.reason
