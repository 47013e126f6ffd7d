"""Deep partition aggregation: its authors' code (alevine0/DPA at 4b80386), and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillsec.defenses.training import partition_ensemble as dpa
from distillsec.distill.types import Batch

if TYPE_CHECKING:
    from tests.defenses.conftest import Case

PIXELS = torch.tensor([[(i * 37 + j * 11) % 256 for j in range(4)] for i in range(9)])
ROWS = Batch(images=(PIXELS.float() / 255).view(9, 1, 2, 2), labels=torch.arange(9) % 3)


def test_rows_are_hashed_and_ordered_as_in_the_authors_code() -> None:
    """partition_data_norm_hash.py, three partitions."""
    parts = dpa.partition(ROWS.images, 3)
    wanted = [[0, 7, 3, 6], [1, 8, 4], [2, 5]]
    assert [sorted(part.tolist()) for part in parts] == [sorted(part) for part in wanted]
    for part, order in zip(parts, wanted, strict=True):
        found = dpa.in_order(ROWS.rows(part))
        assert torch.equal(found.images, ROWS.images[order])
        assert torch.equal(found.labels, ROWS.labels[order])


def test_every_8_bit_pixel_is_hashed_as_itself() -> None:
    pixels = (torch.arange(256).float() / 255).view(256, 1, 1, 1)
    for number, rows in enumerate(dpa.partition(pixels, 256)):
        assert rows.tolist() == [number]


@pytest.mark.parametrize(
    ("rows", "mean", "std"),
    [
        ([0, 7, 3, 6], 0.39411765336990356, 0.373380571603775),
        ([1, 8, 4], 0.3588235378265381, 0.21740363538265228),
        ([2, 5], 0.572549045085907, 0.2383185625076294),
    ],
)
def test_the_normalisation_of_a_partition_is_the_authors(
    rows: list[int], mean: float, std: float
) -> None:
    found = dpa.own_normalisation(ROWS.images[rows])
    assert found[0] == pytest.approx((mean,), abs=1e-6)
    assert found[1] == pytest.approx((std,), abs=1e-6)


def test_channels_are_normalised_separately_and_constant_ones_not_divided() -> None:
    images = torch.stack([torch.full((3, 2, 2), 0.25), torch.arange(12.0).view(3, 2, 2)], dim=1)
    mean, std = dpa.own_normalisation(images)
    assert mean == (0.25, 5.5)
    assert std == pytest.approx((1.0, 13**0.5))


def test_certificates_are_the_authors() -> None:
    """certify.py: ties go to the smaller class number, so a smaller one than the winner's needs
    one vote less."""
    votes = torch.tensor(
        [
            [5, 3, 2, 0],
            [3, 5, 2, 0],
            [4, 4, 1, 1],
            [1, 4, 4, 1],
            [0, 3, 3, 4],
            [2, 2, 2, 4],
            [10, 0, 0, 0],
            [3, 3, 2, 2],
            [1, 6, 2, 1],
            [4, 0, 0, 6],
        ]
    ).float()
    assert dpa.certified_radius(votes).tolist() == [1, 0, 0, 0, 0, 0, 5, 0, 2, 0]


def test_the_rate_falls_to_a_fifth_after_61_121_and_161_of_200_epochs() -> None:
    """train_cifar_nin_baseline.py cuts it when the epochs 60, 120 and 160 are done."""
    rates = [dpa.learning_rate(epoch, dpa.PartitionEnsembleOptions()) for epoch in range(200)]
    wanted = [0.1] * 61 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 39
    assert rates == pytest.approx(wanted)


def test_a_row_changes_one_network_only(badnets: Case) -> None:
    """Weights, order and normalisation of the others stay, whatever its pixels and label are."""
    view = badnets.rows(torch.arange(90)).view
    options = dpa.PartitionEnsembleOptions(partitions=3, epochs=2)
    batch = view.distilled.batch
    images, labels = batch.images.clone(), batch.labels.clone()
    place = next(n for n, rows in enumerate(dpa.partition(images, 3)) if 0 in rows.tolist())
    # Pixels whose sum stays the same modulo 3, so that the row stays in its partition.
    images[0], labels[0] = images[0].flip(1), (labels[0] + 1) % 10
    other = replace(view.distilled, batch=batch.replace(images=images, labels=labels))
    nets = [
        dpa.PartitionEnsemble(options).train(each)
        for each in (view, badnets.fresh(distilled=other))
    ]
    first, second = (list(net.networks) for net in nets)  # type: ignore[arg-type]
    same = [equal(one, two) for one, two in zip(first, second, strict=True)]
    assert same == [number != place for number in range(3)]


def equal(one: nn.Module, two: nn.Module) -> bool:
    values = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(mine, other) for mine, other in values)


def images_of(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_partition_of_a_row_depends_on_its_pixels_alone() -> None:
    images = images_of(40)
    parts = dpa.partition(images, 4)
    assert sorted(torch.cat(parts).tolist()) == list(range(40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for rows, moved in zip(parts, dpa.partition(images[order], 4), strict=True):
        assert sorted(order[moved].tolist()) == rows.tolist()


class Always(nn.Module):
    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), self.label), 4).float()


def test_the_first_class_wins_a_tie() -> None:
    voting = dpa.Vote([Always(3), Always(1), Always(3), Always(1)], 4)
    assert voting(images_of(2)).argmax(dim=1).tolist() == [1, 1]
    assert voting.votes(images_of(1)).tolist() == [[0, 2, 0, 2]]
    assert dpa.Vote([Always(0), Always(2), Always(2)], 4)(images_of(1)).argmax(dim=1).tolist() == [
        2
    ]


def test_the_certificate_equals_a_brute_force_search() -> None:
    """An adversary changes r votes at will; the prediction stays for r up to the radius."""
    networks, classes = 5, 3
    for counts in itertools.product(range(networks + 1), repeat=classes):
        if sum(counts) != networks:
            continue
        answer = int(np.argmax(counts))
        radius = 0
        while _stays(counts, answer, radius + 1) and radius < networks:
            radius += 1
        votes = torch.tensor([counts], dtype=torch.float32)
        assert min(int(dpa.certified_radius(votes)), networks) == min(radius, networks)


def _stays(counts: tuple[int, ...], answer: int, moved: int) -> bool:
    """Whether the prediction stays however ``moved`` networks vote."""
    voters = [label for label, count in enumerate(counts) for _ in range(count)]
    for chosen in itertools.combinations(range(len(voters)), min(moved, len(voters))):
        for others in itertools.product(range(len(counts)), repeat=len(chosen)):
            changed = list(voters)
            for place, label in zip(chosen, others, strict=True):
                changed[place] = label
            if int(np.argmax(np.bincount(changed, minlength=len(counts)))) != answer:
                return False
    return True
