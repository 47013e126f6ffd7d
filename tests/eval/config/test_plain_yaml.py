"""YAML within bounds: plain values, or one line."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from distillsec.distill.types import RequestError
from distillsec.eval.config.layers import read_yaml
from distillsec.eval.config.plain_yaml import YAML_CAP, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: [1, 2.5, x, true, null]", {"a": [1, 2.5, "x", True, None]}),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("'2024-01-01'", "2024-01-01"),
        ("18446744073709551615", 2**64 - 1),
        ("", None),
    ],
)
def test_plain_values_are_read(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {k0: 1, l0: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (ALIASES, "stands for 111111 values or more, at most 50000"),
        (MERGES, "at most 50000"),
        ("- a\n" * 50_001, "at most 50000"),
        ("&a [*a]", "a value holds itself"),
        ("a: 1\nb: 2\na: 3", "the key a is there twice, on lines 1 and 3"),
        ("{x: {a: 1, 'a': 2}}", "the key a is there twice, on line 1"),
        ("2024-13-45", "month must be in 1..12"),
        ("2024-01-01", "a date is no plain value: quote it"),
        ("2024-01-01 10:00:00", "a datetime is no plain value"),
        ("!!set {a, b}", "a set is no plain value"),
        ("!!binary aGk=", "a bytes is no plain value"),
        ("!!python/object/apply:os.mkdir [ran]", "could not determine a constructor"),
        ("!!int x", "invalid literal"),
        ("!!timestamp x", ""),
        ("!!bool maybe", "maybe"),
        ("9" * 5000, "5000 digits"),
        ("0x" + "f" * 5000, "more than 64 bits"),
        ("1" + ":0" * 50, "more than 64 bits"),
        ("[" * 51 + "]" * 51, "nested too deeply, more than 50"),
        ("[" * 100_000, "nested too deeply"),
        ("{[1]: 2}", "the key in line 1 is no name"),
        ("a: [1", "expected ',' or ']'"),
    ],
)
def test_what_is_not_read(text: str, fault: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError) as refused:
        parse_yaml(text)
    assert fault in str(refused.value) and "\n" not in str(refused.value)
    assert time.monotonic() - began < 10


def test_devices_and_large_files_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    large = tmp_path / "large"
    large.write_bytes(b"#" * (YAML_CAP + 1))
    for path, fault in (
        (Path("/dev/zero"), "a pipe or device"),
        (tmp_path / "pipe", "a pipe or device"),
        (large, "at most 262144"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(RequestError, match=fault):
            read_yaml(path)
