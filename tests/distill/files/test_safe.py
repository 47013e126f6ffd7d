"""Atomic files of JSON and tensors: exact round trips, and every fault as one line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from distillsec.distill.files import safe as files
from distillsec.distill.files.artifact import load_set, load_trigger
from distillsec.distill.files.safe import (
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from distillsec.distill.files.torch_file import read_foreign
from distillsec.distill.types import RequestError

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]


# Atomic writes and JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_killed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def die(temporary: Path) -> None:
        temporary.write_text("half")
        raise error("died")

    with pytest.raises(RequestError if error is OSError else error):
        write_atomically(path, die)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_faults_of_the_disk_are_requests(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = tmp_path / "absent" / "file.json"
    with refused(absent, "No such file"):
        write_json(absent, {})
    with refused(absent, "cannot write"):
        write_tensors(absent, {"a": torch.ones(1)}, {})
    path = tmp_path / "file.json"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused(path, "cannot write"):
        write_json(path, {})
    assert not list(tmp_path.iterdir())


def test_json_round_trip_and_faults(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    value = {"b": [1, 0.1, None], "a": {"ä": True}}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text().endswith("}\n")
    assert path.read_text().index('"b"') < path.read_text().index('"a"')
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == value
    for content, fault in [
        (b"", "is empty"),
        (b'{"a": [1, ', "truncated or not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b"\xff\xfe\x00", "truncated or not JSON"),
        (b"[" * 200_000, "nested too deeply"),
    ]:
        path.write_bytes(content)
        with refused(path, fault):
            read_json(path)


def test_what_is_no_file_is_refused_unread(refused: Refused, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for reader in (read_json, read_tensors, load_set, load_trigger):
        with refused(tmp_path / "absent", "no such file"):
            reader(tmp_path / "absent")
        with refused(tmp_path, "a folder"):
            reader(tmp_path)
        with refused(pipe, "a pipe"):
            reader(pipe)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(files.TENSORS_CAP + 1)  # sparse: no disk is filled
    for reader in (read_json, read_tensors):
        with refused(large, "too large"):
            reader(large)
    with refused(large, "too large"):
        read_foreign(large)


# Tensors ------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=4),
    dtype=st.sampled_from(DTYPES),
    info=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans()),
)
def test_tensors_round_trip(shapes: list[list[int]], dtype: torch.dtype, info: Any) -> None:
    tensors = {f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        write_tensors(path, tensors, info)
        found, described = read_tensors(path)
    assert described == info
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((2, 3), i, dtype=DTYPES[i]) for i in range(6)}
    info = {"z": 1, "a": [1, 2]}
    write_tensors(tmp_path / "1", tensors, info)
    write_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(info.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with safe_open(tmp_path / "1", framework="pt") as file:
        assert set(file.metadata()) == {"distillsec"}
    reference = tmp_path / "reference"
    reference.touch()
    assert (tmp_path / "1").stat().st_mode == reference.stat().st_mode


def test_views_special_values_and_overwriting_round_trip(tmp_path: Path) -> None:
    base = torch.randn(4, 6, requires_grad=True)
    tensors = {
        "base": base,
        "transposed": base.t(),
        "part": base[1:3],
        "stretched": torch.ones(1).expand(5),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    path = tmp_path / "state"
    for _ in range(2):
        write_tensors(path, tensors, {})
    found, _ = read_tensors(path)
    write_tensors(path, {"other": torch.zeros(100)}, {})  # what was read does not live in the file
    for name, tensor in tensors.items():
        assert found[name].numpy().tobytes() == tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ({}, "no metadata under the key"),
        ({"distillsec": "{"}, "not JSON"),
        ({"distillsec": "[1]"}, "expected an object"),
        ({"distillsec": '{"a": Infinity}'}, "Infinity"),
    ],
)
def test_foreign_metadata_is_refused(
    refused: Refused, tmp_path: Path, metadata: dict[str, str], fault: str
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata=metadata)
    with refused(path, fault):
        read_tensors(path)
