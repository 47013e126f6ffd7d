"""Files that are either whole or absent: atomic writes, JSON and tensors with caps on their sizes,
and the reading of untrusted files.

Every fault of a file (missing, truncated, corrupted, too large, not permitted) is a
:class:`RequestError` of one line that names the file.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..types import RequestError

JSON_CAP: Final = 64 * 2**20
"""The most bytes that :func:`read_json` reads."""

TENSORS_CAP: Final = 4 * 2**30
"""The most bytes that :func:`read_tensors` reads."""

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
    write_atomically(path, lambda temporary: _write_bytes(temporary, text.encode()))


def read_json(path: Path) -> Any:
    """The value in a JSON file of at most 64 MiB.

    Raises RequestError: missing, too large, truncated, not JSON, NaN or infinity inside.
    """
    check_file(path, JSON_CAP)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise fault(path, f"cannot be read: {_reason(error)}") from None
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
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
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
    Raises RequestError: missing, over 4 GiB, truncated, corrupted, not a safetensors file, or
    without a JSON object under the metadata key ``distillsec``.
    """
    check_file(path, sys.maxsize if only else TENSORS_CAP)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # The reader's tensors may be views of one map of the file: a clone outlives the file.
            names = [name for name in sorted(file.keys()) if name.startswith(only)]
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except OSError as error:
        raise fault(path, f"cannot be read: {_reason(error)}") from None
    except Exception as error:  # a malicious header fails in many ways, none of them a bug of ours
        what = f"not a safetensors file, or a truncated or corrupted one ({_reason(error)})"
        raise fault(path, what) from None
    if INFO_KEY not in metadata:
        raise fault(path, f"no metadata under the key {INFO_KEY!r}: not a file of this suite")
    info = _parse(path, metadata[INFO_KEY].encode("utf-8", "replace"), "metadata is not JSON")
    if not isinstance(info, dict):
        raise fault(path, f"metadata is a JSON {type(info).__name__}, expected an object")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, info


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
        what = f"not a safetensors file, or a truncated or corrupted one ({_reason(error)})"
        raise fault(path, what) from None


class _Discarded:
    """Stands in for the numpy scalars of a foreign file: takes their bytes and keeps nothing.

    Only the accuracies beside the images are such scalars, and they are not needed: no code of
    numpy runs on untrusted bytes.
    """

    def __init__(self, *_args: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


_Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]
_ALLOWED: Final[list[_Allowed]] = [  # numpy 1's and numpy 2's names of the same two
    (_Discarded, "numpy.dtype"),
    (_Discarded, "numpy.core.multiarray.scalar"),
    (_Discarded, "numpy._core.multiarray.scalar"),
]


def read_foreign(path: Path) -> Any:
    """What a ``torch.save`` file of another project holds, tensors on the CPU, no code of it run.

    Raises RequestError: "refused unread" where it names anything but tensors, containers and numpy
    scalars (whose values are dropped); missing, too large, truncated, not of ``torch.save``.
    """
    check_file(path, TENSORS_CAP)
    try:
        if zipfile.is_zipfile(path):  # a zip of 1 MB may unpack to a thousand times that
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > TENSORS_CAP:
                raise fault(path, f"unpacks to {unpacked} bytes, at most {TENSORS_CAP} are read")
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")  # of the file's age: nothing the receiver can change
            # Explicit weights_only: the environment variable that lifts it has no effect then.
            return torch.load(path, map_location="cpu", weights_only=True)
    except RequestError:
        raise
    except pickle.UnpicklingError as error:
        what = f"refused unread: the file holds more than tensors ({_what(error)})"
        raise fault(path, what) from None
    except Exception as error:  # a hostile or broken archive fails in many ways
        text = (str(error) or type(error).__name__).split(". ")[0]
        what = f"not a PyTorch file, or a truncated or corrupted one ({text:.150})"
        if "TorchScript" in text:
            what = "refused unread: the file holds more than tensors (a TorchScript program)"
        raise fault(path, what) from None


def _what(error: Exception) -> str:
    """What a refused pickle asked for, from torch's long message."""
    named = re.search(r"GLOBAL\s+([\w.]+)|(Unsupported operand \d+)", str(error))
    if named is None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines[1] if len(lines) > 1 else lines[0])[:150]
    return f"it names {named[1]}" if named[1] else named[2].lower()


def _parse(path: Path, text: bytes, trouble: str) -> Any:
    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=constant)
    except RecursionError:
        raise fault(path, f"{trouble}: nested too deeply") from None
    except ValueError as error:  # the decoder's errors, and those of the text encoding
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
