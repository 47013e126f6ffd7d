"""Tables of the Hugging Face hub, written with pyarrow as ``datasets`` writes them."""

from __future__ import annotations

import builtins
import json
import resource
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distillsec.distill.files import safe as files
from distillsec.distill.files.formats import read_received
from distillsec.distill.types import RequestError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 3), dtype=np.uint8)
LABELS = [1, 0, 1, 2]
FEATURES = {"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}


def png(pixels: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


ENCODED = [{"bytes": png(pixels), "path": "../../etc/passwd"} for pixels in PIXELS]


def write(path: Path, columns: dict[str, Any], *, metadata: Any = None) -> Path:
    """A table in the form that the ending of ``path`` names."""
    table = arrow.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return path
    new = arrow.ipc.new_file if path.stem == "file" else arrow.ipc.new_stream
    with arrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["x.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("label", ["label", "class_id"])
def test_encoded_images_are_read(tmp_path: Path, name: str, label: str) -> None:
    columns = {"image": ENCODED, label: LABELS, "caption": ["x"] * 4}
    path = write(tmp_path / name, columns, metadata=FEATURES)
    form, found = read_received(path)
    assert form == "table" and found.labels is not None
    assert torch.equal(found.images, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert found.labels.tolist() == LABELS
    assert found.classes == (("a", "b", "c") if label == "label" else None)
    assert found.notes == ("left out of the table: caption",)


def test_numbers_in_lists_and_soft_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((4, 1, 3, 3), dtype=np.float32)
    soft = [[0.5, 0.5], [1.0, 0.0], [0.25, 0.75], [0.0, 1.0]]
    path = write(tmp_path / "x.parquet", {"pixels": pixels.tolist(), "label": soft})
    found = read_received(path)[1]
    torch.testing.assert_close(found.images, torch.from_numpy(pixels))
    assert found.labels is not None and found.labels.tolist() == soft


def test_a_folder_of_shards(tmp_path: Path) -> None:
    for number in range(2):
        part = slice(2 * number, 2 * number + 2)
        columns = {"image": ENCODED[part], "label": LABELS[part]}
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", columns)
    found = read_received(tmp_path)[1]
    assert found.labels is not None and found.labels.tolist() == LABELS
    assert len(found.files) == 2


def test_what_is_no_set_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"label": LABELS}, "has 0 columns of images"),
        ({"a": ENCODED, "b": ENCODED, "label": LABELS}, "has 2 columns of images (a, b)"),
        ({"image": ENCODED, "one": LABELS, "two": LABELS}, "could be its labels: one, two"),
        (
            {"image": [{"bytes": None, "path": "/etc/passwd"}] * 4, "label": LABELS},
            "names files that are elsewhere",
        ),
        ({"image": [{"bytes": b"x", "path": ""}] * 4, "label": LABELS}, "not a readable image"),
        ({"image": ENCODED, "label": [0, 1, None, 2]}, "lacks 1 values"),
        ({"image": [[[1, 2]], [[1]]], "label": [0, 1]}, "lists of several lengths"),
    ]
    for columns, fault in cases:
        write(path, columns)
        with refused(path, fault):
            read_received(path)


@pytest.mark.parametrize("name", ["x.parquet", "file.arrow", "stream.arrow"])
def test_damaged_tables_are_refused(refused: Refused, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, {"image": ENCODED, "label": LABELS})
    content = path.read_bytes()
    for end in range(8, len(content) // 2, 53):  # an arrow file does without its last part
        path.write_bytes(content[:end])
        with refused(path, ": "):
            read_received(path)


def test_the_size_is_bounded_before(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.zeros((2000, 1, 8, 8), np.uint8).tolist()  # packs to almost nothing
    path = write(tmp_path / "x.parquet", {"image": pixels, "label": [0] * 2000})
    monkeypatch.setattr(files, "BUILT_CAP", 100_000)
    with refused(path, "bytes of memory to read, at most 100000"):
        read_received(path)


def test_bombs_stay_small(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large value that stands in a page once for all rows, and values that were packed."""
    monkeypatch.setattr(files, "BUILT_CAP", 10_000_000)
    images = arrow.array([{"bytes": b"\0" * 500_000, "path": ""}] * 500)
    columns = {"image": images, "label": [0] * 500}
    path = write(tmp_path / "x.parquet", columns)
    assert path.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(path, "bytes of memory to read, at most 10000000"):
        read_received(path)
    table = arrow.table(columns)
    options = arrow.ipc.IpcWriteOptions(compression="zstd")
    for name, new in (("x.arrow", arrow.ipc.new_stream), ("y.arrow", arrow.ipc.new_file)):
        path = tmp_path / name
        with (
            arrow.OSFile(str(path), "wb") as sink,
            new(sink, table.schema, options=options) as writer,
        ):
            writer.write_table(table)
        with refused(path, "compressed values or dictionaries, which are not read"):
            read_received(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_pyarrow_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.parquet", {"image": ENCODED, "label": LABELS})
    original = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=r"reading tables needs pyarrow: pip install"):
        read_received(path)
