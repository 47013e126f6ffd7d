"""Evidence beside the inversion, and what a set's values show."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from distillsec.defenses.base import DefenderView
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, DistilledSet, Recipe
from distillsec.eval.audit.evidence import last_layer, row_statistics
from distillsec.eval.audit.structure import structure_notes

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = 1


def linear(scale: float) -> nn.Module:
    """Three classes at the corners of a triangle; the last one's weights times ``scale``."""
    layer = nn.Linear(3, 3)
    layer.weight.data = torch.diag(torch.tensor([1.0, 1.0, scale]))
    return nn.Sequential(nn.Flatten(), layer)


def test_the_last_layer_shows_the_class_with_larger_weights() -> None:
    found = last_layer([linear(4.0), linear(4.0)], 3)
    assert found is not None and found.shape == (3,)
    distances = (torch.diag(torch.tensor([1.0, 1.0, 4.0])) - torch.tensor([1, 1, 4]) / 3).norm(
        dim=1
    )
    wanted = (distances / distances.median()).log().double()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_a_last_layer_that_is_not_linear_shows_nothing() -> None:
    assert last_layer([linear(1.0), nn.Sequential(nn.Flatten())], 3) is None
    assert last_layer([linear(1.0)], 4) is None


class Features(nn.Module):
    """Its features are the pixels."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def view(*, patched: bool, held_out: int) -> DefenderView:
    """Three classes of 30 rows around their own means; half of class 1 is elsewhere if patched."""
    rng = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(3, 6, generator=rng)

    def draw(count: int) -> Batch:
        labels = torch.arange(count) % 3
        images = means[labels] + torch.randn(count, 6, generator=rng)
        return Batch(images=images.view(-1, 1, 2, 3), labels=labels)

    batch, holdout = draw(90), draw(held_out)
    if patched:
        batch.images[torch.nonzero(batch.labels == TARGET)[::2, 0], :, :, 0] += 6
    preprocessing = Preprocessing((0.0,), (1.0,))
    distilled = DistilledSet(
        batch=batch, classes=("a", "b", "c"), recipe=Recipe(preprocessing=preprocessing)
    )
    maker = NetworkMaker(
        spec=NetworkSpec(network="mlp"),
        image_shape=(1, 2, 3),
        classes=3,
        preprocessing=preprocessing,
    )
    return DefenderView(distilled=distilled, victim=Features(), network=maker, holdout=holdout)


def test_the_rows_of_a_poisoned_class_stand_out() -> None:
    poisoned = row_statistics([view(patched=True, held_out=90)])
    clean = row_statistics([view(patched=False, held_out=90)])
    assert poisoned is not None and clean is not None
    assert int(poisoned.argmax()) == TARGET and float(poisoned[TARGET]) > 1
    assert float(poisoned[TARGET]) > 1.5 * float(clean[TARGET])


def test_the_mean_over_the_victims_counts() -> None:
    alone = row_statistics([view(patched=True, held_out=90)])
    both = row_statistics([view(patched=True, held_out=90)] * 2)
    assert alone is not None and both is not None
    torch.testing.assert_close(alone, both)


def test_without_held_out_images_rows_say_nothing() -> None:
    assert row_statistics([view(patched=True, held_out=0)]) is None


def plain_set() -> DistilledSet:
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = Batch(images=images, labels=torch.tensor([0, 0, 1, 1, 2, 2]))
    recipe = Recipe(preprocessing=Preprocessing((0.5,), (0.25,)))
    return DistilledSet(batch=batch, classes=("a", "b", "c"), recipe=recipe)


def changed(**parts: torch.Tensor) -> DistilledSet:
    found = plain_set()
    return dataclasses.replace(found, batch=found.batch.replace(**parts))


def test_the_structure_of_a_plain_set_is_not_noted() -> None:
    assert structure_notes(plain_set()) == []


def test_unusual_values_are_noted() -> None:
    images = plain_set().batch.images
    twice = images.clone()
    twice[4], twice[5] = images[0], images[0]
    soft = torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    wrong = soft.clone()
    wrong[1, 1] = 0.5
    cases = {
        "50% of its pixels are outside [0, 1]": changed(
            images=torch.cat([images[:3], images[3:] + 2])
        ),
        "2 of 6 rows are the same as an earlier one": changed(images=twice),
        "the labels of 1 of 6 rows are no probabilities": changed(labels=wrong),
        "classes have 1 to 3 rows": changed(labels=torch.tensor([0, 0, 0, 1, 1, 2])),
    }
    for wanted, distilled in cases.items():
        (note,) = structure_notes(distilled)
        assert note.startswith(wanted)
    assert structure_notes(changed(labels=soft)) == []
