"""Trigger inversion, BTI-DBF and MNTD on small constructed cases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from distillsec.defenses.common import shadows, trigger_inversion, unet
from distillsec.defenses.common.by_class import anomaly_index
from distillsec.defenses.models import bti_dbf, mntd, tabor
from distillsec.distill.training import predict
from distillsec.distill.types import Batch

if TYPE_CHECKING:
    from tests.defenses.conftest import Case


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


class Doors(nn.Module):
    """Says where an image's mean lies, but for class 2 if pixel (1, 1) is lit and (0, 0) dark."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        own = torch.stack([-(mean - centre).abs() * 40 for centre in (0.1, 0.9, 2.0, 0.5)], dim=1)
        door = (images[:, 0, 1, 1] - images[:, 0, 0, 0]).clamp(min=0) * 60
        return own + door[:, None] * torch.tensor([0.0, 0.0, 1.0, 0.0])


def lit(count: int = 40) -> Batch:
    images = 0.35 + 0.3 * torch.rand(count, 1, 6, 6, generator=seeded(1))
    return Batch(images=images, labels=torch.full((count,), 3))


def test_the_smallest_patch_is_found_for_the_class_with_a_backdoor() -> None:
    known = lit()
    options = trigger_inversion.InversionOptions(steps=150, images=40, batch=20)
    found = trigger_inversion.invert_triggers(Doors(), known, 4, options, seeded(2))
    assert bool(found.found.all())
    assert found.sizes.argmin() in (2, 3)  # every image is of class 3 already
    assert found.sizes[2] < 0.4 * found.sizes[:2].min()
    mask = found.masks[2, 0]
    assert mask.flatten().topk(1).indices.item() in (0, 7)
    for number in range(4):
        sent = predict(Doors(), found.stamp(known.images, number)) == number
        assert sent.double().mean() >= 0.95
    assert found.masks.min() >= 0 and found.masks.max() <= 1
    assert anomaly_index(-found.sizes).shape == (4,)


def test_a_class_without_a_patch_is_not_found() -> None:
    class Never(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(1, 2, 3))[:, None] * torch.tensor([1.0, 0.5, -1.0])

    options = trigger_inversion.InversionOptions(steps=5, images=40, batch=20)
    found = trigger_inversion.invert_triggers(Never(), lit(), 3, options, seeded())
    assert found.found.tolist() == [True, False, False]
    assert bool(found.penalties[1:].isinf().all()) and bool(found.sizes.isfinite().all())


def test_bounded_inverts_unbounded() -> None:
    values = torch.tensor([0.0, 0.2, 0.5, 1.0])
    free = trigger_inversion.unbounded(values, torch.device("cpu"))
    assert free.requires_grad and free.is_leaf and bool(free.isfinite().all())
    assert torch.allclose(trigger_inversion.bounded(free), values, atol=2e-4)


def test_variation_sums_squared_differences() -> None:
    values = torch.rand(2, 3, 4, 5, generator=seeded())
    brute = [
        sum(
            float((values[n, c, i + 1, j] - values[n, c, i, j]) ** 2) if i < 3 else 0.0
            for c in range(3)
            for i in range(4)
            for j in range(5)
        )
        + sum(
            float((values[n, c, i, j + 1] - values[n, c, i, j]) ** 2) if j < 4 else 0.0
            for c in range(3)
            for i in range(4)
            for j in range(5)
        )
        for n in range(2)
    ]
    assert tabor.variation(values).tolist() == pytest.approx(brute, rel=1e-5)


# BTI-DBF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 31, 17)])
def test_a_unet_keeps_shapes_and_treats_images_separately(shape: tuple[int, int, int]) -> None:
    net = unet.seeded_unet(shape[0], 4, 2, seeded(1)).eval()
    images = torch.rand(5, *shape, generator=seeded(2))
    drawn = net(images)
    assert drawn.shape == images.shape
    assert torch.allclose(net(images[2:3]), drawn[2:3], atol=1e-5)
    again = unet.seeded_unet(shape[0], 4, 2, seeded(1)).eval()
    assert torch.equal(again(images), drawn)
    assert not torch.equal(unet.seeded_unet(shape[0], 4, 2, seeded(3)).eval()(images), drawn)


def test_benign_features_predict_the_labels_and_the_others_do_not(badnets: Case) -> None:
    known = badnets.view.holdout
    model = bti_dbf.split_victim(badnets.view.trainable_victim())
    supply = bti_dbf.KnownBatches(known, badnets.view.distilled.recipe, 32, seeded())
    mask = bti_dbf.benign_features(model, supply, bti_dbf.BtiDbfOptions(mask_steps=400))
    maps = model.features(model.network.normalise(known.images))
    assert mask.shape[1:] == maps.shape[1:] and mask.min() >= 0 and mask.max() <= 1
    kept, left = (
        float((model.logits(part * maps).argmax(dim=1) == known.labels).double().mean())
        for part in (mask, 1 - mask)
    )
    assert kept >= 0.9 and left <= 0.5


# MNTD --------------------------------------------------------------------------------------------


def test_a_meta_classifier_separates_the_halves_of_a_zoo(honest: Case) -> None:
    """Clearly different halves: the logit of class 0 is higher in backdoored shadows."""
    view = honest.view
    states: dict[str, list[Tensor]] = {}
    for number in range(12):
        for name, value in view.network(number).state_dict().items():
            raised = value.clone()
            if number % 2 and name.endswith("head.bias"):
                raised[0] += 3
            states.setdefault(name, []).append(raised)
    stacked = {name: torch.stack(values) for name, values in states.items()}
    plain = shadows.Zoo(stacked, torch.arange(12) % 2 == 1, {})
    options = mntd.MntdOptions(epochs=60, batch=4, lr=0.01)
    network = view.network(0).eval()
    classifier = mntd.train_meta_classifier(plain, network, view, options)
    with torch.no_grad():
        scores = classifier(plain.logits(network, torch.arange(12), classifier.queries))
    assert bool(((scores > 0) == plain.backdoored).all())
