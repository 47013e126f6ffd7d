"""Joint trigger inversion, on networks whose smallest triggers are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distillsec.distill.types import Batch
from distillsec.eval.audit.inversion import (
    CARRIERS,
    _other_rows,
    hit_rates,
    joint_patches,
    smallness,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4


class Regions(nn.Module):
    """Answers the class whose region is brightest. That of class 0 has four pixels, others 16."""

    def __init__(self, corner: int) -> None:
        super().__init__()
        regions = torch.zeros(CLASSES, 8, 8)
        regions[0, corner : corner + 2, corner : corner + 2] = 1
        regions[1, :4, 4:], regions[2, 4:, :4], regions[3, 4:, 4:] = 1, 1, 1
        self.regions = regions / regions.sum(dim=(1, 2), keepdim=True)

    def forward(self, images: Tensor) -> Tensor:
        return 10 * torch.einsum("nhw,khw->nk", images[:, 0], self.regions)


@pytest.fixture
def carriers() -> Batch:
    """Grey images, lighter in the region of their class."""
    rng, labels = torch.Generator().manual_seed(0), torch.arange(80) % CLASSES
    images = 0.2 + 0.1 * torch.rand(80, 1, 8, 8, generator=rng)
    images += 0.2 * (Regions(1).regions[labels] > 0).float().unsqueeze(1)
    return Batch(images=images, labels=labels)


def test_the_smallest_trigger_is_found(carriers: Batch) -> None:
    networks = [Regions(1), Regions(1)]
    found = joint_patches(networks, carriers, CLASSES, 160, torch.Generator().manual_seed(1))
    assert int(found.sizes.argmin()) == 0
    assert float(smallness(found.sizes)[0]) > 0.5
    mask = found.masks[0, 0]
    assert float(mask[1:3, 1:3].sum() / mask.sum()) > 0.8
    assert float(found.patterns[0, 0, 1:3, 1:3].mean()) > 0.8
    rates = hit_rates(Regions(1), found, carriers, CLASSES)
    assert rates.shape == (CLASSES,) and float(rates.mean()) > 0.5


def test_a_trigger_of_one_network_does_not_fool_two(carriers: Batch) -> None:
    """The networks have their small regions for class 0 in different places."""
    generator = torch.Generator().manual_seed(1)
    alone = joint_patches([Regions(0)], carriers, CLASSES, 100, generator)
    both = joint_patches([Regions(0), Regions(2)], carriers, CLASSES, 100, generator)
    assert float(both.sizes[0]) > 1.4 * float(alone.sizes[0])
    own, other = (hit_rates(net, alone, carriers, CLASSES)[0] for net in (Regions(0), Regions(2)))
    assert float(own) > 0.5 and float(other) < 0.2


def test_the_same_draws_give_the_same_patches(carriers: Batch) -> None:
    first, second = (
        joint_patches([Regions(1)], carriers, CLASSES, 5, torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first.masks, second.masks) and torch.equal(first.sizes, second.sizes)


@pytest.mark.parametrize("rows", [8, 200])
def test_carriers_are_of_other_classes(rows: int) -> None:
    own = torch.arange(rows) % CLASSES
    chosen = _other_rows(own, CLASSES, torch.Generator().manual_seed(0))
    assert chosen.shape == (CLASSES, min(CARRIERS, rows - rows // CLASSES))
    for label, mine in enumerate(chosen):
        assert label not in own[mine].tolist()
        assert len(mine.unique()) == len(mine)


def test_smallness_is_the_logarithm_of_the_ratio_to_the_median() -> None:
    found = smallness(torch.tensor([2.0, 4.0, 8.0]))
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0, 0.5]).log())
