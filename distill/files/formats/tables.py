"""Sets as tables of the Hugging Face hub: parquet files, and the arrow files of ``datasets``.

A column of images (encoded files, with a path that is not followed, or nested lists of numbers) and
a column of class numbers. pyarrow reads the tables; it comes with the extra ``hub``.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """All rows of ``files`` in one table; its size is known before it is read."""
    arrow = _arrow()
    size = rows = 0
    for file in files:
        with file.open("rb") as opened:
            parquet = opened.read(4) == _PARQUET
        if parquet:
            with arrow.parquet.ParquetFile(file) as found:
                rows += found.metadata.num_rows
                groups = range(found.metadata.num_row_groups)
                size += sum(found.metadata.row_group(each).total_byte_size for each in groups)
        else:  # mapped, so that its size in memory is that of the file
            size += file.stat().st_size
    check_built(path, 4 * size)
    if rows > _ROWS_CAP:
        raise fault(path, f"holds {rows} rows, at most {_ROWS_CAP} are read")
    tables = [_one_table(arrow, file) for file in files]
    table = arrow.concat_tables(tables)
    if table.num_rows > _ROWS_CAP:
        raise fault(path, f"holds {table.num_rows} rows, at most {_ROWS_CAP} are read")
    return table


def _one_table(arrow: Any, file: Path) -> Any:
    with file.open("rb") as opened:
        head = opened.read(6)
    if head[:4] == _PARQUET:
        with arrow.parquet.ParquetFile(file) as found:
            return found.read(use_threads=False)
    open_table = arrow.ipc.open_file if head == _ARROW else arrow.ipc.open_stream
    table = open_table(arrow.memory_map(str(file))).read_all()
    table.validate(full=True)
    return table


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
