"""A teacher's labels of views, in files a batch, as FKD's code writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler

from distillsec.distill.files.formats import labelled, read_received
from distillsec.distill.files.formats.stored_set import received
from distillsec.distill.types import RequestError

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]
COUNT, CLASSES, BATCH = 10, 5, 4
HARD = torch.arange(COUNT) % CLASSES


def relabel(
    folder: Path, *, epochs: int = 3, seed: int = 42, mixed: bool = False, half: bool = True
) -> torch.Tensor:
    """Writes batches in the order of SRe2L's relabelling; returns the mean label of each image."""
    rng = torch.Generator().manual_seed(0)
    sampler = RandomSampler(range(COUNT), generator=torch.Generator().manual_seed(seed))
    batches = BatchSampler(sampler, batch_size=BATCH, drop_last=False)
    total = torch.zeros(COUNT, CLASSES)
    for epoch in range(epochs):
        place = folder / f"epoch_{epoch}"
        place.mkdir(parents=True)
        for number, rows in enumerate(batches):
            logits = torch.randn(len(rows), CLASSES, generator=rng)
            logits[torch.arange(len(rows)), HARD[rows]] += 9
            logits = logits.half() if half else logits
            total[rows] += logits.float().softmax(dim=1)
            mix: list[Any] = [None, None, None]
            if mixed:
                mix = [torch.randperm(len(rows), generator=rng), 0.4, [0, 2, 0, 2]]
            views = [torch.rand(len(rows), 4), torch.zeros(len(rows), dtype=torch.bool)]
            torch.save([*views, *mix, logits], place / f"batch_{number}.tar")
    return total / epochs


def read(tmp_path: Path, labels: torch.Tensor = HARD) -> tuple[torch.Tensor, tuple[str, ...]]:
    stored = received(tmp_path, torch.zeros(COUNT, 1, 2, 2), labels)
    found = labelled(tmp_path, stored, CLASSES, tmp_path / "fkd")
    assert found.labels is not None
    return found.labels, found.notes


@pytest.mark.parametrize("half", [True, False])
def test_the_mean_over_views_is_the_label(tmp_path: Path, half: bool) -> None:
    wanted = relabel(tmp_path / "fkd", half=half)
    labels, (note,) = read(tmp_path)
    torch.testing.assert_close(labels, wanted)
    assert "3 epochs of a teacher's soft labels in fkd: the mean" in note and "100%" in note


def test_mixed_views_leave_the_classes(tmp_path: Path) -> None:
    relabel(tmp_path / "fkd", mixed=True)
    labels, (note,) = read(tmp_path)
    assert torch.equal(labels, HARD)
    assert "are not used: 9 of their batches are of mixed images" in note


def test_another_order_is_noticed(refused: Refused, tmp_path: Path) -> None:
    relabel(tmp_path / "fkd", seed=7, epochs=5)
    with refused(tmp_path / "fkd", "in another order than that of seed 42"):
        read(tmp_path)


def test_damaged_folders_are_refused(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "fkd"
    relabel(folder)
    with refused(folder, "name the folder of the images, with --labels"):
        read_received(folder)
    last = folder / "epoch_1" / "batch_2.tar"
    kept = torch.load(last, weights_only=True)
    for parts, fault in (
        (kept[:5], "a list of 6 parts"),
        ([*kept[:5], None], "no table of logits"),
        ([*kept[:5], kept[5] / 0], "NaN"),
        ([*kept[:5], kept[5][:, :3]], "has 3 classes, others 5"),
    ):
        torch.save(parts, last)
        with refused(last, fault):
            read(tmp_path)
    torch.save([*kept[:5], kept[5][:1]], last)
    with refused(folder / "epoch_1", "labels of 9 views, expected one of each of 10 images"):
        read(tmp_path)
    torch.save([*kept[:5], kept[5].repeat(3, 1)], last)
    with refused(folder / "epoch_1", "labels of more than the 10 images"):
        read(tmp_path)
    (folder / "epoch_1" / "batch_1.tar").unlink()
    with refused(folder / "epoch_1", "holds 2 of batch_N.tar, expected all from 0 on"):
        read(tmp_path)


def test_labels_in_a_file_and_none(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "labels.pt"
    torch.save(HARD, path)
    stored = received(tmp_path, torch.zeros(COUNT, 1, 2, 2), None)
    found = labelled(tmp_path, stored, CLASSES, path)
    assert found.labels is not None and torch.equal(found.labels, HARD)
    assert (found.files, found.notes) == ((tmp_path, path), ("labels of labels.pt",))
    ordered = labelled(tmp_path, stored, CLASSES, None)
    assert ordered.labels is not None and ordered.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert "taken for 2 of each class" in ordered.notes[0]
    with refused(tmp_path, "its 10 images are no multiple of 3"):
        labelled(tmp_path, stored, 3, None)
    with refused(tmp_path, "no epoch_0/batch_0.tar"):
        labelled(tmp_path, stored, CLASSES, tmp_path)
    relabel(tmp_path / "fkd")
    with refused(tmp_path / "fkd", "needs their classes"):
        labelled(tmp_path, stored, CLASSES, tmp_path / "fkd")
