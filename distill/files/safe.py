"""Files that are either whole or absent: atomic writes, JSON and tensors with caps on their sizes,
and the reading of untrusted files.

Every fault of a file (missing, truncated, corrupted, too large, not permitted) is a
:class:`RequestError` of one line that names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..types import RequestError
from .plain_json import JSON_CAP, check_count, parse_json

TENSORS_CAP: Final = 4 * 2**30
"""The most bytes that :func:`read_tensors` reads."""

BUILT_CAP: Final = 16 * 2**30
"""The most bytes of memory that reading a file may take, all copies together."""

PLAIN_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of tensors that are read, by their names in safetensors. torch computes with all."""

_TENSOR_COUNT_CAP: Final = 100_000
_CORRUPTED: Final = "not a safetensors file, or a truncated or corrupted one"

INFO_KEY: Final = "distillsec"
"""The one metadata key of a tensor file; its value is one JSON string."""


def fault(path: Path, what: str) -> RequestError:
    """The error for a faulty file: one line, ``path: what``."""
    return RequestError(" ".join(f"{path}: {what}".split()))


def check_file(path: Path, cap: int) -> None:
    """Refuses all but a regular file of at most ``cap`` bytes, before a byte of it is read.

    Raises RequestError: missing, a folder or device, unreadable, larger than ``cap``.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise fault(path, "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise fault(path, f"cannot be read: {_reason(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        # Reading a named pipe would block, reading a device would never end.
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise fault(path, f"is {what}, expected a file")
    if found.st_size > cap:
        raise fault(path, f"too large: {found.st_size} bytes, at most {cap} are read")


def check_built(path: Path, size: int) -> None:
    """Refuses a file that takes ``size`` bytes of memory, all copies together, to read.

    Call it before the first is built. Raises RequestError: more than 16 GiB.
    """
    if size > BUILT_CAP:
        raise fault(path, f"takes {size} bytes of memory to read, at most {BUILT_CAP} are allowed")


def read_bytes(path: Path, cap: int) -> bytes:
    """The content of a regular file of at most ``cap`` bytes.

    Raises RequestError as :func:`check_file`; also where the file holds more than its size says.
    """
    check_file(path, cap)
    try:
        with path.open("rb") as file:
            content = file.read(cap + 1)
    except OSError as error:
        raise fault(path, f"cannot be read: {_reason(error)}") from None
    if len(content) > cap:  # files of /proc say that they are empty
        raise fault(path, f"too large: more than {cap} bytes")
    return content


def file_digest(path: Path) -> str:
    """32 hexadecimal digits of a file's content. Raises RequestError where it cannot be read."""
    check_file(path, sys.maxsize)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
    except OSError as error:
        raise fault(path, f"cannot be read: {_reason(error)}") from None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary file in ``path``'s folder, then renames it to ``path``.

    The folder must exist. On any error (a KeyboardInterrupt too) the temporary file is removed and
    an earlier file under ``path`` stays as it was; errors of ``write`` pass through, but OSError
    becomes RequestError.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            # The rename may reach the disk before the content does: then a power cut would leave
            # an empty file under the final name.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError):
            raise RequestError(f"cannot write {path}: {_reason(error)}") from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON atomically: indented by 2, keys in their order, newline at the end.

    Raises ValueError for NaN or infinity (a missing number is ``None``), TypeError for what JSON
    cannot hold, RequestError where the file cannot be written.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write_bytes(temporary, text.encode()))


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes ``content`` atomically."""
    write_atomically(path, lambda temporary: _write_bytes(temporary, content))


def read_json(path: Path) -> Any:
    """The value in a JSON file of at most 32 MiB.

    Raises RequestError: missing, too large, truncated, not JSON, nested more than 100 deep, more
    than 2,000,000 values, NaN or infinity inside.
    """
    text = read_bytes(path, JSON_CAP)
    if not text.strip():
        raise fault(path, "is empty, expected JSON")
    return _parse(path, text, "truncated or not JSON")


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one line to a JSON Lines file.

    Raises ValueError for NaN or infinity, TypeError for what JSON cannot hold.
    """
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON Lines file; empty where there is no such file.

    A line that is no JSON object is skipped: a process that is killed while it writes leaves half a
    line, and the next process appends to it.
    Raises RequestError: not a regular file, more than 32 MiB, more than 2,000,000 values.
    """
    if not path.exists():
        return []
    content = read_bytes(path, JSON_CAP)
    _check_count(path, content)
    rows = []
    for line in content.splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes named tensors with a JSON description as one safetensors file, atomically.

    tensors: dense, of any shape, dtype and device. info: what JSON can hold, without NaN.
    Equal content gives equal bytes, in any order of the two mappings.
    Raises ValueError or TypeError for an ``info`` that JSON cannot hold, RequestError where the
    file cannot be written.
    """
    metadata = {INFO_KEY: json.dumps(dict(info), allow_nan=False, sort_keys=True)}
    ready = _standalone(tensors)

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            save_file(ready, temporary, metadata=metadata)
        except SafetensorError as error:
            raise RequestError(f"cannot write {path}: {_reason(error)}") from None
        # safetensors leaves a file that its owner alone may read: of no use in a shared folder.
        temporary.chmod(mode)

    write_atomically(path, write)


def read_tensors(
    path: Path, *, device: torch.device | str = "cpu", only: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description that :func:`write_tensors` wrote, tensors on ``device``.

    only: leave all but the tensors whose names begin so in the file, which may then have any size.
    Raises RequestError: missing, over 4 GiB, truncated, corrupted, not a safetensors file, a header
    over 32 MiB, more than 100,000 tensors, a type that is not in ``PLAIN_DTYPES``, or without a
    JSON object under the metadata key ``distillsec``.
    """
    check_file(path, sys.maxsize if only else TENSORS_CAP)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        # The reader's tensors may be views of one map of the file: a clone outlives the file.
        names = [name for name in sorted(file.keys()) if name.startswith(only)]
        _check_types(path, {name: file.get_slice(name).get_dtype() for name in names})
        tensors = {name: file.get_tensor(name).clone() for name in names}
    if INFO_KEY not in metadata:
        raise fault(path, f"no metadata under the key {INFO_KEY!r}: not a file of this suite")
    info = _parse(path, metadata[INFO_KEY].encode("utf-8", "replace"), "metadata is not JSON")
    if not isinstance(info, dict):
        raise fault(path, f"metadata is a JSON {type(info).__name__}, expected an object")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, info


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], bool]:
    """Type and shape of each tensor of a safetensors file, and whether this suite wrote it.

    Nothing but the header is read. Raises RequestError as :func:`read_tensors`, but for types.
    """
    check_file(path, sys.maxsize)
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
        found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        return found, INFO_KEY in (file.metadata() or {})


def read_named_tensors(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """These tensors of anybody's safetensors file, on the CPU; errors as :func:`read_tensors`."""
    check_file(path, TENSORS_CAP)
    with _opened(path) as file:
        _check_types(path, {name: file.get_slice(name).get_dtype() for name in names})
        return {name: file.get_tensor(name).clone() for name in names}


def read_shape(path: Path, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type and shape of tensor ``name``, from the header alone; errors as :func:`read_slice`."""
    check_file(path, sys.maxsize)
    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = file.get_slice(name)
            return PLAIN_DTYPES[found.get_dtype()], tuple(found.get_shape())
    except Exception as error:  # as in read_tensors
        raise fault(path, f"{_CORRUPTED} ({_reason(error)})") from None


def read_slice(path: Path, name: str, *index: int) -> Tensor:
    """The part ``tensor[index]`` of tensor ``name``, on the CPU, through a map of the file.

    Nothing else of the file is read, so its size has no cap.
    Raises RequestError: missing, truncated or corrupted, no such tensor, outside of it.
    """
    check_file(path, sys.maxsize)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            part: Tensor = file.get_slice(name)[index]
            return part.clone()
    except Exception as error:  # as in read_tensors
        raise fault(path, f"{_CORRUPTED} ({_reason(error)})") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, opened once its header has been checked; its faults in one line."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except RequestError:
        raise
    except OSError as error:
        raise fault(path, f"cannot be read: {_reason(error)}") from None
    except Exception as error:  # a malicious header fails in many ways, none of them a bug of ours
        raise fault(path, f"{_CORRUPTED} ({_reason(error)})") from None


def _check_header(path: Path) -> None:
    """Refuses a safetensors header that takes much memory to read, before it is read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > JSON_CAP:
                raise fault(path, f"{_CORRUPTED} (a header of {length} bytes)")
            header = file.read(length)
    except OSError as error:
        raise fault(path, f"cannot be read: {_reason(error)}") from None
    _check_count(path, header)


def _check_count(path: Path, text: bytes) -> None:
    try:
        check_count(text)
    except ValueError as error:
        raise fault(path, f"holds {error}") from None


def _check_types(path: Path, types: Mapping[str, str]) -> None:
    if len(types) > _TENSOR_COUNT_CAP:
        raise fault(path, f"holds {len(types)} tensors, at most {_TENSOR_COUNT_CAP} are read")
    for name, found in types.items():
        if found not in PLAIN_DTYPES:
            known = ", ".join(PLAIN_DTYPES)
            raise fault(path, f"{name:.50} is of the type {found}; {known} are read")


def _parse(path: Path, text: bytes, trouble: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise fault(path, f"{trouble}: {error}") from None


def _standalone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory: safetensors refuses shared memory."""
    ready: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().data_ptr() in taken:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    return ready


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _remove(temporary: Path) -> None:
    try:
        temporary.unlink()
    except OSError:
        # Absent because the write never began, or the disk is gone: the first error is the one
        # to report.
        return


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
