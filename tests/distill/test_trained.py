"""A distilled set as a torch data set, and networks trained on it by its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

import distillsec
from distillsec.distill.files.artifact import load_set
from distillsec.distill.networks.makers import NetworkMaker, network
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.randomness import Streams
from distillsec.distill.types import DistilledSet, RequestError
from distillsec.eval.run.victims import train_victim


@pytest.fixture(scope="module")
def distilled(finished: Path) -> DistilledSet:
    return load_set(finished / "distilled.safetensors")


def test_a_set_is_a_torch_data_set(distilled: DistilledSet) -> None:
    assert isinstance(distilled, Dataset) and len(distilled) == len(distilled.batch) == 10
    images, labels = default_collate([distilled[number] for number in range(len(distilled))])
    assert torch.equal(images, distilled.batch.images)
    assert torch.equal(labels, distilled.batch.labels)


def test_a_loader_has_the_recipes_batch_size(distilled: DistilledSet) -> None:
    assert distilled.loader().batch_size == distilled.recipe.batch_size
    (images, labels) = next(iter(distilled.loader(batch_size=4, shuffle=False)))
    assert torch.equal(images, distilled.batch.images[:4])
    assert torch.equal(labels, distilled.batch.labels[:4])
    first = next(iter(distilled.loader(generator=torch.Generator().manual_seed(0))))[1]
    assert sorted(first.tolist()) == list(range(10)) and first.tolist() != list(range(10))
    batches = distilled.loader(batch_sampler=[[3, 1], [2]])
    assert [labels.tolist() for _, labels in batches] == [[3, 1], [2]]


def test_training_gives_the_victim_of_a_run(distilled: DistilledSet, one_thread: None) -> None:
    """Victim 0 of seed 5, bit for bit."""
    spec = NetworkSpec(network="convnet", width=4, depth=1)
    maker = NetworkMaker(
        spec=spec,
        image_shape=distilled.image_shape,
        classes=10,
        preprocessing=distilled.recipe.preprocessing,
    )
    victim = train_victim(distilled, maker, Streams(5), 0)
    ours = distilled.train(network("convnet", width=4, depth=1), seed=5)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(images), victim(images)) and not ours.training


class Own(nn.Module):
    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images)
        return found


def test_a_class_is_made_from_the_seed_alone(distilled: DistilledSet) -> None:
    first, again, other = (distilled.train(Own, seed=seed) for seed in (0, 0, 1))
    weights = [next(each.parameters()) for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_module_sees_normalised_images_and_is_trained_in_place(distilled: DistilledSet) -> None:
    module = Own(distilled.image_shape, 10)
    trained = distilled.train(module)
    normalised = distilled.recipe.preprocessing.normalise(distilled.batch.images)
    assert torch.equal(trained(distilled.batch.images), module(normalised))


def test_what_is_no_network_is_refused(distilled: DistilledSet) -> None:
    with pytest.raises(RequestError, match=r"distillsec\.network\(NAME\)"):
        distilled.train("convnet")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="cannot be called with image_shape"):
        distilled.train(nn.Linear)
    with pytest.raises(RequestError, match="did you mean convnet"):
        distillsec.network("convnt")
    with pytest.raises(RequestError, match="network convnet: width"):
        distillsec.network("convnet", width=0)
