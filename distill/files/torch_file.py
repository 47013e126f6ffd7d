"""Reading ``torch.save`` files without unpickling them."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import torch

from ..types import RequestError
from .pickled import PICKLE_CAP, MoreThanTensors, PickleMachine, Storage
from .safe import TENSORS_CAP, check_file, fault

_RECORDS_CAP: Final = 100_000
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C


def read_foreign(path: Path) -> Any:
    """What a ``torch.save`` file of another project holds; tensors as ``StoredTensor``.

    Raises RequestError: "refused unread" where it names anything but dense tensors of common types,
    containers and numpy scalars (whose values are dropped); missing, too large, truncated, packed
    so that it is larger than the file, not of ``torch.save``.
    """
    check_file(path, TENSORS_CAP)
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except RequestError:
        raise
    except MoreThanTensors as error:
        what = f"refused unread: the file holds more than plain tensors ({error})"
        raise fault(path, what) from None
    except Exception as error:  # a hostile or broken archive fails in many ways
        text = str(error) or type(error).__name__
        what = f"not a PyTorch file, or a truncated or corrupted one ({text:.150})"
        raise fault(path, what) from None


def _read_zip(path: Path) -> Any:
    """The form since torch 1.6: ``NAME/data.pkl`` and a record for each storage."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
    size = path.stat().st_size
    unpacked = sum(record.file_size for record in records.values())
    if unpacked > size:  # torch never compresses; a zip of 1 MB may unpack to a thousand times that
        raise fault(path, f"unpacks to {unpacked} bytes from {size}: torch writes no such file")
    if len(records) > _RECORDS_CAP:
        raise fault(path, f"holds {len(records)} records, at most {_RECORDS_CAP} are read")

    def content(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(records[name])

    (pickled,) = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    folder = pickled.removesuffix("data.pkl")
    if records[pickled].file_size > PICKLE_CAP:
        raise ValueError(f"its pickle has more than {PICKLE_CAP} bytes")
    if f"{folder}byteorder" in records and content(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        name = f"{folder}data/{key}"
        if records[name].file_size < count * dtype.itemsize:
            raise ValueError("a tensor is truncated")
        return Storage(dtype=dtype, count=count, read=lambda: content(name))

    return PickleMachine(BytesIO(content(pickled)), storage).run()


def _read_legacy(path: Path) -> Any:
    """The older form: five pickles, then each storage's count and numbers."""
    with path.open("rb") as file:
        stream = BytesIO(file.read(PICKLE_CAP))
    places: dict[str, tuple[int, int]] = {}
    size = path.stat().st_size

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        if count * dtype.itemsize > size:
            raise ValueError("a tensor is truncated")

        def read() -> bytes:
            begin, length = places[key]
            with path.open("rb") as file:
                file.seek(begin)
                return file.read(min(length, count) * dtype.itemsize)

        return Storage(dtype=dtype, count=count, read=read)

    machine = PickleMachine(stream, storage)
    if machine.run() != _LEGACY_MAGIC:
        raise ValueError("it has not the first number of such a file")
    _, system, found, keys = (machine.run() for _ in range(4))
    if not system["little_endian"]:
        raise ValueError("its numbers are big-endian")
    begin = stream.tell()
    for key in keys:
        with path.open("rb") as file:
            file.seek(begin)
            length = int.from_bytes(file.read(8), "little")
        places[key] = begin + 8, length
        begin += 8 + length * machine.item_sizes[key]
        if begin > size:
            raise ValueError("a tensor is truncated")
    return found
