"""Fixtures of the distill tests: no data but the test's own, and expected refusals."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distillsec.distill.data import published as data_published
from distillsec.distill.data.registry import ImageSet, load_dataset
from distillsec.distill.types import RequestError

Bytes = NDArray[np.uint8]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no system data, and no data folder but the test's."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(data_published, "SYSTEM_DIR", tmp_path / "system")
    monkeypatch.delenv("DISTILLSEC_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refusal() -> Callable[..., str]:
    """The one line with which the set is refused; it holds every one of ``texts``."""
    return _refusal


def _refusal(name: str, data_dir: Path, *texts: object, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        load_dataset(name, data_dir=data_dir, **options)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert str(text) in message
    return message


@pytest.fixture
def check_pixels() -> Callable[..., None]:
    """The set holds exactly these images (uint8 NCHW) and labels, in this order."""
    return _check_pixels


def _check_pixels(data: ImageSet, train: Bytes, test: Bytes, labels: Any, test_labels: Any) -> None:
    for batch, images, wanted in (
        (data.train, train, labels),
        (data.test, test, test_labels),
    ):
        assert batch.images.dtype == torch.float32
        assert torch.equal(batch.images, torch.from_numpy(np.ascontiguousarray(images)) / 255)
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == list(wanted)
        assert batch.index is not None
        assert batch.index.tolist() == list(range(len(images)))


@pytest.fixture
def refused() -> Callable[[Path, str], pytest.RaisesExc[RequestError]]:
    """Expects a RequestError of one line that names the file and the fault."""
    return _refused


def _refused(path: Path, fault: str) -> pytest.RaisesExc[RequestError]:
    def one_line(error: RequestError) -> bool:
        text = str(error)
        return "\n" not in text and str(path) in text and fault in text

    return pytest.RaisesExc(RequestError, check=one_line)
