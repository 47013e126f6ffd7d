"""The reader of IDX files, in which MNIST and Fashion-MNIST are published."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..types import RequestError
from .raw import check_size, one_line, pixel_bytes


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The unsigned bytes of an IDX file (gzipped if it ends in ``.gz``), in the file's shape.

    Not torchvision's reader: it neither opens gzip nor notices a truncated file.
    Raises RequestError for an unreadable or truncated file, a wrong header, surplus bytes.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:4] != bytes((0, 0, 8, ndim)):
                raise RequestError(
                    f"{path}: not an IDX file of {ndim}-dimensional bytes "
                    f"(it starts with {header[:4].hex() or 'nothing'}, not 000008{ndim:02x})"
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            size = math.prod(shape)
            check_size(str(path), pixel_bytes(size))
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: not readable: {one_line(error)}") from error
    if len(body) != size:
        held = f"{len(body)}" if len(body) < size else "more"
        raise RequestError(f"{path}: its header promises {size} bytes of data, it holds {held}")
    return np.frombuffer(bytearray(body), dtype=np.uint8).reshape(shape)
