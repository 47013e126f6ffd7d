"""What every reader of image sets gets and gives, and the checks that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

from ..types import RequestError

MAX_BYTES: Final = 8 * 2**30
"""The most memory that the pixels of one set may take, with their copy as floats."""

TEST_SHARE: Final = 0.2
"""Share of the rows that becomes the test set where a source has no split of its own."""

_FLOAT_BYTES: Final = 4


@final
@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What a reader gets: the data set's name, where to look, how to load.

    path: the part of the name after the colon. roots: data folders in search order; the first also
    takes downloads and the cache.
    image_size: resize to this square, ``None`` keeps the files' size.
    """

    name: str
    path: str
    roots: tuple[Path, ...]
    image_size: int | None
    download: bool
    progress: bool


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RawSet:
    """Images as the files hold them, ``uint8`` or ``float32`` NCHW, with ``int64 (N,)`` labels.

    notes: what of the files was left out, and what was done to pixels; a sentence each.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def one_line(error: BaseException) -> str:
    """The error's text on a single line; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def pixel_bytes(values: int, itemsize: int = 1) -> int:
    """The memory of that many pixel values as they are stored, and as the floats they become."""
    return values * (itemsize + _FLOAT_BYTES)


def check_size(where: str, size: int) -> None:
    """Refuse pixels that take more than ``MAX_BYTES``; ``size``: their bytes."""
    if size > MAX_BYTES:
        raise RequestError(
            f"{where}: {size / 2**30:.1f} GiB of data; at most {MAX_BYTES / 2**30:.0f} GiB is read"
        )


def stratified(where: str, labels: Tensor, test_size: float | int) -> tuple[Tensor, Tensor]:
    """The rows (train, test) of the fixed, stratified split; both ``int64``, train first.

    Raises RequestError, naming ``where``, if there are too few rows for every class to be split.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    rows = np.arange(len(labels))
    try:
        train, test = train_test_split(
            rows, test_size=test_size, random_state=0, stratify=labels.numpy()
        )
    except ValueError as error:
        raise RequestError(
            f"{where}: too few images to split into train and test: {one_line(error)}"
        ) from error
    return torch.from_numpy(train), torch.from_numpy(test)
