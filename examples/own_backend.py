"""A distillation backend of your own: the mean and the spread of features are matched.

    cd examples
    distillsec attack --preset digits-dm --backend own_backend:MomentMatching --attack naive

A backend says what a step's loss is; the loop has the images, the hooks (so that every attack
works), the checkpoints and the log.
"""

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from distillsec.ext import Backend, BackendOptions, Batch, Recipe, Run, embed


class MomentMatchingOptions(BackendOptions):
    lr_img: float = Field(1.0, gt=0, description="learning rate of the synthetic images")
    batch_real: int = Field(64, ge=1, description="real images per class and step")
    spread: float = Field(1.0, ge=0, description="weight of the standard deviations")


class MomentMatching(Backend):
    """Distribution matching (Zhao, Bilen, 2023) with standard deviations beside the means.

    In words: embed a real batch and the synthetic images of each class by a random network, and
    move the synthetic images so that mean and standard deviation of every feature come closer.
    """

    name = "moments"
    Options = MomentMatchingOptions
    cost = "low: no network is trained"
    needs = "a network with features (embed)"

    def __init__(self, options: BackendOptions, *, ipc: int, recipe: Recipe) -> None:
        assert isinstance(options, MomentMatchingOptions)
        self._options = options

    def steps(self) -> int:
        return 1

    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD([leaf], lr=self._options.lr_img, momentum=0.5)

    def network(self, run: Run) -> nn.Module:
        return run.task.fresh_network(run.position.iteration).requires_grad_(False)

    def losses(self, run: Run, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        draws = run.position.generator("draw")
        for label in range(run.task.classes):
            real = embed(network, run.real.draw(label, self._options.batch_real, draws).images)
            made = embed(network, synthetic.images[synthetic.labels == label])
            mean = (real.mean(dim=0) - made.mean(dim=0)).square().sum()
            spread = (deviation(real) - deviation(made)).square().sum()
            yield mean + self._options.spread * spread

    def advance(self, run: Run, network: nn.Module, synthetic: Batch) -> None:
        """The networks are random and not trained."""


def deviation(features: Tensor) -> Tensor:
    """The standard deviation of each of ``features`` (N, F); smooth at 0, as for one image."""
    return (features.var(dim=0, correction=0) + 1e-6).sqrt()
