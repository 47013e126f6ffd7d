"""Image folders as SRe2L, RDED and others publish them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distillsec.distill.files.formats import read_received
from distillsec.distill.files.formats.image_folders import class_numbers
from distillsec.distill.types import RequestError

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]


def draw(top: Path, names: Sequence[str]) -> None:
    """Grey 4×4 images whose pixels are the number of the name."""
    for number, name in enumerate(names):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("names", "labels", "numbers"),
    [
        (("new000/class000_id000.png", "new002/class002_id000.png"), [0, 1], [0, 2]),  # SRe2L
        (("00003/class00003_id00000.png", "00001/class00001_id00000.png"), [0, 1], [1, 3]),  # RDED
        (("0_cat/000.png", "1_dog/000.png"), [0, 1], [0, 1]),  # this suite's export
        (("cat/a.png", "dog/a.png", "dog/b.png"), [0, 1, 1], None),
        (("n02_x/a.png", "n01_x/a.png"), [0, 1], None),
        (("class1/a.png", "new1/a.png"), [0, 1], None),
    ],
)
def test_classes_are_numbers_or_names(
    tmp_path: Path, names: Sequence[str], labels: list[int], numbers: list[int] | None
) -> None:
    draw(tmp_path, names)
    form, found = read_received(tmp_path)
    assert form == "image folder" and found.labels is not None
    assert found.labels.tolist() == labels
    assert found.classes == tuple(sorted({name.partition("/")[0] for name in names}))
    assert class_numbers(found.classes) == numbers
    assert found.images.dtype == torch.uint8
    order = [names.index(str(file.relative_to(tmp_path))) for file in found.files]
    assert found.images[:, 0, 0, 0].tolist() == order
    assert "soft labels of a teacher" in found.notes[0]


def test_one_folder_of_files_that_name_their_class(refused: Refused, tmp_path: Path) -> None:
    draw(tmp_path, ["class00004_id00001.png", "class00004_id00002.png", "class00001_id00001.png"])
    found = read_received(tmp_path)[1]
    assert found.labels is not None and found.labels.tolist() == [0, 1, 1]
    assert found.classes == ("1", "4") and class_numbers(found.classes) == [1, 4]
    draw(tmp_path, ["other.png"])
    with refused(tmp_path, "other.png: expected a folder a class, or files classN_idN"):
        read_received(tmp_path)


def test_folders_without_a_set_are_refused(refused: Refused, tmp_path: Path) -> None:
    with refused(tmp_path, "holds no set: expected tensor folder, table, image folder"):
        read_received(tmp_path)
    draw(tmp_path, ["a/1.png"])
    with refused(tmp_path, "1 class folders"):
        read_received(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.png").write_bytes(b"no image")
    with refused(tmp_path / "b" / "1.png", "not a readable image"):
        read_received(tmp_path)
    (tmp_path / "b" / "1.png").unlink()
    (tmp_path / "b" / "1.png").symlink_to("/dev/zero")
    with refused(tmp_path / "b" / "1.png", "not a regular file"):
        read_received(tmp_path)
