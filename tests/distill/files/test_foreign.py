"""Other projects' files: read without running their code, or refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillsec.distill.files.artifact import save_set
from distillsec.distill.files.foreign import import_pt
from distillsec.distill.preprocessing import Preprocessing, fit_zca
from distillsec.distill.types import Recipe, RequestError

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]
IMAGES, LABELS = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def published() -> dict[str, Any]:
    """The structure of DatasetCondensation's ``res_*.pt``."""
    rng = torch.Generator().manual_seed(0)
    data = [[torch.randn(4, 2, 3, 3, generator=rng), torch.arange(4)] for _ in range(2)]
    accuracies = [np.float64(0.5), np.float64(0.25), np.int64(3), np.float32(1)]
    return {"data": data, "accs_all_exps": {"ConvNet": accuracies, "MLP": []}}


@pytest.mark.parametrize("modern", [True, False])
def test_published_files_are_imported(tmp_path: Path, modern: bool) -> None:
    path = tmp_path / "res_DC.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=modern)
    mean, std, classes = (0.5, 0.4), (0.2, 0.3), ["a", "b", "c", "d"]
    sets = import_pt(path, preprocessing=Preprocessing(mean, std), classes=classes)
    assert len(sets) == 2
    for found, (images, labels) in zip(sets, published()["data"], strict=True):
        scale, shift = torch.tensor(std).view(2, 1, 1), torch.tensor(mean).view(2, 1, 1)
        torch.testing.assert_close(found.batch.images, images * scale + shift)
        assert torch.equal(found.batch.labels, labels)
        assert found.recipe == Recipe(preprocessing=Preprocessing(mean, std))
        assert found.classes == tuple(classes)
        save_set(tmp_path / "converted.safetensors", found)


def test_numpy_1_names_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert len(import_pt(path, preprocessing=Preprocessing((0, 0), (1, 1)), classes="abcd")) == 2


def test_pairs_and_soft_labels_are_read(tmp_path: Path) -> None:
    path, images = tmp_path / "x.pt", torch.rand(3, 1, 2, 2, dtype=torch.float64)
    for value in (
        [images, torch.zeros(3, dtype=torch.int32)],
        (torch.nn.Parameter(images), torch.zeros(3).long()),
        {"images": images, "labels": torch.rand(3, 2, dtype=torch.float64)},
    ):
        torch.save(value, path)
        (found,) = import_pt(path, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])
        assert torch.equal(found.batch.images, images.float())
        assert not found.batch.images.requires_grad


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_with_code_is_refused_unread(
    refused: Refused, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The variable by which torch's users switch the protection off everywhere.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    value = published() | {"accs_all_exps": Malicious(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    with refused(path, "refused unread: the file holds more than tensors"):
        import_pt(path, preprocessing=Preprocessing((0, 0), (1, 1)), classes="abcd")
    assert not marker.exists()
    Malicious(marker).__reduce__()[0](marker)
    assert marker.exists()  # it would have worked


@pytest.mark.parametrize(
    "value",
    [np.zeros(3), slice(1), print, torch.nn.Linear(1, 1)],
    ids=["array", "slice", "function", "module"],
)
def test_other_objects_are_refused(refused: Refused, tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.pt"
    torch.save({"data": [[IMAGES, LABELS]], "more": value}, path)
    with refused(path, "refused unread"):
        import_pt(path, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])


@pytest.mark.parametrize("modern", [True, False])
def test_broken_pt_files_are_refused(refused: Refused, tmp_path: Path, modern: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=modern)
    content = path.read_bytes()
    for broken in [b"", b"no pickle at all", *(content[:i] for i in range(1, len(content), 97))]:
        path.write_bytes(broken)
        with refused(path, ": "):
            import_pt(path, preprocessing=Preprocessing((0, 0), (1, 1)), classes="abcd")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"data": []}, "holds no distilled set"),
        ({"data": [[IMAGES]]}, "holds no distilled set"),
        ({"data": 3}, "holds no distilled set"),
        (IMAGES, "holds no distilled set"),
        ([IMAGES.to_sparse(), LABELS], "holds no distilled set"),
        ([torch.zeros(1, device="meta"), LABELS], "holds no distilled set"),
        ([torch.zeros(1).expand(10**6, 1, 1000, 1000), LABELS], "holds no distilled set"),
        ([IMAGES.byte(), LABELS], "expected normalised floats"),
        ([IMAGES[0], LABELS], "given 1 means"),
        ([torch.zeros(2, 3, 2, 2), LABELS], "given 1 means"),
        ([IMAGES / 0, LABELS], "NaN"),
        ([IMAGES, LABELS + 5], "labels run from 5 to 6"),
    ],
)
def test_other_structures_are_refused(
    refused: Refused, tmp_path: Path, value: Any, fault: str
) -> None:
    path = tmp_path / "x.pt"
    torch.save(value, path)
    with refused(path, fault):
        import_pt(path, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])


def test_a_whitened_file_comes_back_to_pixels(tmp_path: Path) -> None:
    pixels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    zca = fit_zca(pixels)
    path = tmp_path / "whitened.pt"
    torch.save([zca.whiten(pixels), torch.arange(40) % 2], path)
    (found,) = import_pt(path, preprocessing=Preprocessing((0.0,), (1.0,), zca), classes=("a", "b"))
    torch.testing.assert_close(found.batch.images, pixels, atol=1e-4, rtol=0)
    assert found.recipe.preprocessing.zca == zca
