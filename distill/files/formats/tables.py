"""Sets as tables of the Hugging Face hub: parquet files, and the arrow files of ``datasets``.

An arrow file may be packed to any size, and a page of a parquet file may hold one large value for
many rows: both are read in portions, and compressed arrow files are refused.

A column of images (encoded files, with a path that is not followed, or nested lists of numbers) and
a column of class numbers. pyarrow reads the tables; it comes with the extra ``hub``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ...data.images import decode_contents
from ...data.raw import one_line, some
from ...types import RequestError
from ..plain_json import parse_json
from ..safe import TENSORS_CAP, check_built, check_file, fault
from .stored_set import StoredSet, received, refuse_other_number

_PARQUET, _ARROW, _STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_ENDINGS: Final = (".parquet", ".arrow")
_FILES_CAP: Final = 1000
_ROWS_CAP: Final = 2_000_000
_COPIES: Final = 4
_PORTION: Final = 4
"""Rows: of 2 GiB each at most, which is the largest page of a parquet file."""
_FILE_HEAD: Final = 8
"""The bytes before the stream in an arrow file."""
_LABELS: Final = ("label", "labels", "class_id", "class", "target", "fine_label")


def is_table(path: Path) -> bool:
    """Whether ``path`` is a parquet or arrow file, or a folder that holds some."""
    if path.is_dir():
        return bool(_table_files(path))
    with path.open("rb") as file:
        head = file.read(8)
    return head[:4] in (_PARQUET, _STREAM) or head[:6] == _ARROW


def read_table(path: Path, number: int | None) -> StoredSet:
    """The set in a table.

    Raises RequestError: pyarrow is not installed, too large, damaged, several columns of images, no
    column of class numbers, images that are paths, or of several sizes.
    """
    refuse_other_number(path, number)
    files = _table_files(path) if path.is_dir() else [path]
    if len(files) > _FILES_CAP:
        raise fault(path, f"holds {len(files)} tables, at most {_FILES_CAP} are read")
    for file in files:
        check_file(file, TENSORS_CAP)
    try:
        table = _tables(path, files)
        names = _class_names(table.schema)
        images_at, labels_at = _columns(path, table)
        images = _images(path, table, images_at)
        labels = None if labels_at is None else _numbers(path, table.column(labels_at))
    except RequestError:
        raise
    except Exception as error:  # pyarrow's errors share no base class with others
        raise RequestError(f"{path}: not a readable table: {one_line(error):.200}") from None
    unread = sorted(set(table.column_names) - {images_at, labels_at})
    return received(
        path,
        images,
        labels,
        files=files,
        classes=names.get(labels_at or ""),
        notes=[f"left out of the table: {some(unread)}"] if unread else [],
    )


def _table_files(path: Path) -> list[Path]:
    """The tables in a folder, or in its folder ``data``."""
    places = [path, path / "data"]
    found = [sorted(p for p in place.glob("*") if p.suffix in _ENDINGS) for place in places]
    return next((files for files in found if files), [])


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RequestError("reading tables needs pyarrow: pip install 'distillsec[hub]'") from None
    return pyarrow


def _tables(path: Path, files: Sequence[Path]) -> Any:
    """All rows of ``files`` in one table, read in portions, so that its size is bounded."""
    arrow = _arrow()
    batches: list[Any] = []
    size = rows = 0
    for file in files:
        with file.open("rb") as opened:
            parquet = opened.read(4) == _PARQUET
        for batch in (_parquet_batches if parquet else _arrow_batches)(arrow, file):
            size, rows = size + batch.nbytes, rows + batch.num_rows
            check_built(path, _COPIES * size)
            if rows > _ROWS_CAP:
                raise fault(path, f"holds more than {_ROWS_CAP} rows")
            batches.append(batch)
    if not batches:
        raise fault(path, "holds no rows")
    return arrow.Table.from_batches(batches)


def _parquet_batches(arrow: Any, file: Path) -> Iterator[Any]:
    """A few rows at a time: a page of some bytes may hold the same large value many times."""
    with arrow.parquet.ParquetFile(file) as found:
        groups = range(found.metadata.num_row_groups)
        check_built(
            file, _COPIES * sum(found.metadata.row_group(g).total_byte_size for g in groups)
        )
        yield from found.iter_batches(batch_size=_PORTION, use_threads=False)


def _arrow_batches(arrow: Any, file: Path) -> Iterator[Any]:
    """The batches of the form of streams and files, whose values lie in the file as they are.

    Raises RequestError for compressed values, which may be of any size, and for dictionaries.
    """
    source = arrow.memory_map(str(file))
    with file.open("rb") as opened:
        source.seek(_FILE_HEAD if opened.read(6) == _ARROW else 0)
    schema = None
    for message in arrow.ipc.MessageReader.open_stream(source):
        if schema is None:
            schema = arrow.ipc.read_schema(message)
            continue
        if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
            raise fault(file, "holds compressed values or dictionaries, which are not read")
        batch = arrow.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        yield batch


def _is_compressed(metadata: bytes) -> bool:
    """Whether the record batch that a message describes has compressed values.

    metadata: a flatbuffer of the table ``Message`` (Arrow's Message.fbs), whose third field is the
    ``RecordBatch``, whose fourth is the compression.
    """
    (message,) = struct.unpack_from("<I", metadata)
    field = message + _field(metadata, message, 2)
    header = field + struct.unpack_from("<I", metadata, field)[0]
    return _field(metadata, header, 3) != 0


def _field(metadata: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies, from the table's start; 0 where it has none."""
    entries = table - struct.unpack_from("<i", metadata, table)[0]
    (size,) = struct.unpack_from("<H", metadata, entries)
    place = 4 + 2 * number
    return int(struct.unpack_from("<H", metadata, entries + place)[0]) if place < size else 0


def _columns(path: Path, table: Any) -> tuple[str, str | None]:
    """The names of the column of images and of that of class numbers."""
    types = _arrow().types
    kinds = {field.name: field.type for field in table.schema}
    images = [n for n, kind in kinds.items() if types.is_struct(kind) or _depth(kind) >= 2]
    if len(images) != 1:
        have = some(images) or "none"
        raise fault(path, f"has {len(images)} columns of images ({have}) of {some([*kinds])}")
    fitting = [n for n, kind in kinds.items() if types.is_integer(kind) or _depth(kind) == 1]
    usual = [name for name in _LABELS if name in fitting]
    if len(fitting) > 1 and not usual:
        raise fault(path, f"has several columns that could be its labels: {some(fitting)}")
    return images[0], usual[0] if usual else next(iter(fitting), None)


def _depth(kind: Any) -> int:
    """How many lists are nested in a type of numbers; 0 for other types."""
    types, depth = _arrow().types, 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth if types.is_integer(kind) or types.is_floating(kind) else 0


def _images(path: Path, table: Any, name: str) -> Tensor:
    column = table.column(name)
    if not _arrow().types.is_struct(column.type):
        found = _numbers(path, column)
        return found[:, None] if found.ndim == 3 else found
    rows = [row.get("bytes") if row else None for row in column.to_pylist()]
    contents = [content for content in rows if isinstance(content, bytes)]
    if len(contents) != len(rows):
        raise fault(path, f"{name} names files that are elsewhere, and holds no images")
    return decode_contents([f"{path}, row {row}" for row in range(len(contents))], contents).pixels


def _numbers(path: Path, column: Any) -> Tensor:
    """A column of numbers, or of nested lists of them, as one tensor."""
    if column.null_count:
        raise fault(path, f"lacks {column.null_count} values of a column that is read")
    array, shape = column.combine_chunks(), [len(column)]
    while _depth(array.type):
        lengths = set(array.value_lengths().to_pylist())
        if len(lengths) != 1:
            raise fault(path, "holds lists of several lengths, expected images of one size")
        array, shape = array.flatten(), [*shape, *lengths]
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy()).view(shape)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes by column, as ``datasets`` writes them into a table."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = parse_json(text)["info"]["features"]
        found = {name: each["names"] for name, each in features.items() if "names" in each}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {
        name: names
        for name, names in found.items()
        if isinstance(names, list) and all(isinstance(each, str) for each in names)
    }
