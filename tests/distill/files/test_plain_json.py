"""JSON within bounds, in files, logs, and the headers of tensor files."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distillsec.distill.files.plain_json import DEPTH_CAP, JSON_CAP, VALUES_CAP, parse_json
from distillsec.distill.files.safe import read_json, read_json_lines, read_tensors
from distillsec.distill.types import RequestError

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_plain_values_are_read() -> None:
    values: tuple[Any, ...] = ({"a": [1, 2.5, None, True, "ü"]}, 3, "x", [], {})
    for value in values:
        assert parse_json(json.dumps(value).encode()) == value
    parse_json(nested(DEPTH_CAP))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (nested(DEPTH_CAP + 2), "nested too deeply, more than 100"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"[]," * (VALUES_CAP // 2) + b"1]", "about 2000001 values, at most 2000000"),
        (b"[1e999]", "1e999 is too large"),
        (b"-1e999", "-1e999 is too large"),
        (b"NaN", "NaN is no JSON number"),
        (b"9" * 5000, "digits"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_is_not_read(text: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_json(text)


@pytest.mark.parametrize("read", [read_json, read_json_lines, read_tensors])
def test_devices_and_large_files_are_refused_unread(
    refused: Refused, tmp_path: Path, read: Callable[[Path], object]
) -> None:
    with refused(Path("/dev/zero"), "a pipe or device"):
        read(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    with refused(tmp_path / "pipe", "a pipe or device"):
        read(tmp_path / "pipe")
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, JSON_CAP + 1)
    with refused(large, ": "):
        read(large)


@pytest.mark.parametrize("name", ["file", "log", "header"])
def test_small_values_in_large_numbers_stay_small(
    refused: Refused, tmp_path: Path, name: str
) -> None:
    path, text = tmp_path / name, b"[" + b"{}," * (JSON_CAP // 3 - 9) + b"1]"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "header":
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        read: Callable[[Path], object] = read_tensors
    else:
        path.write_bytes(text)
        read = read_json if name == "file" else read_json_lines
    with refused(path, "values, at most 2000000 are read"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_exotic_types_are_refused_unread(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.complex64, "C64")):
        save_file({"a": torch.ones(3).to(dtype)}, path, metadata={"distillsec": "{}"})
        with refused(path, f"a is of the type {name}; F64, F32"):
            read_tensors(path)
