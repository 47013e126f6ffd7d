"""YAML files and settings: no key is lost because it is there twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillsec.distill.types import RequestError
from distillsec.eval.config.layers import by_owner, key_values, read_yaml


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ipc: 2\nseed: 1\nipc: 5\n", "the key ipc is there twice, on lines 1 and 3"),
        ("grid:\n  ipc: [1]\n  'ipc': [2]\n", "the key ipc is there twice, on lines 2 and 3"),
        ("list:\n- {a: 1, a: 2}\n", "the key a is there twice, on line 2"),
        ("trigger-size: 2\ntrigger_size: 3\n", "the key trigger_size is given twice"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(RequestError, match=fault) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_merged_key_may_be_replaced(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 3}\nb:\n  <<: *a\n  x: 2\n"
    found = read_yaml(write(tmp_path / "a.yaml", text))
    assert found == {"a": {"x": 1, "y": 3}, "b": {"x": 2, "y": 3}}


@pytest.mark.parametrize("text", ["a: 2020-13-45", "[" * 3000, "a: \x00", f"a: {'1' * 5000}"])
def test_values_that_yaml_cannot_build_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError, match="not YAML"):
        read_yaml(write(tmp_path / "a.yaml", text))


def test_a_setting_that_is_given_twice_is_refused() -> None:
    assert key_values(["ipc=2", "seed=3"]) == {"ipc": 2, "seed": 3}
    with pytest.raises(RequestError, match="--set: the key batch_real is given twice"):
        key_values(["batch-real=2", "batch_real=3"])
    with pytest.raises(RequestError, match="--option strip: the key copies is given twice"):
        by_owner(["strip.copies=2", "strip.copies=3"])
    with pytest.raises(RequestError, match=r"--set a=.*: the key b is there twice"):
        key_values(["a={b: 1, b: 2}"])
