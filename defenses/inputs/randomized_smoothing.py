"""The defense ``randomized-smoothing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ...distill.training import predict
from ..base import DefenderView, DefenseOptions, Predictor, Purifier


@final
class RandomizedSmoothingOptions(DefenseOptions):
    """The paper's smallest noise for CIFAR-10, and its number of copies for choosing a class."""

    sigma: float = Field(0.12, gt=0, description="standard deviation of the noise, pixel units")
    copies: int = Field(100, ge=1, description="noisy copies that vote")


@final
class RandomizedSmoothing(Purifier):
    """Randomized smoothing: the class predicted for most noisy copies of an input (Cohen,
    Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019;
    against backdoors: Wang, Cao, Jia, Gong, 2020; Weber et al., "RAB: Provable Robustness Against
    Backdoor Attacks", IEEE S&P 2023).

    In words: add normal noise to the input a hundred times, and answer with the class that most
    copies get.

    Needs only the model. Noise does not hide a trigger whose pixels differ much from the image's.

    The paper's standard deviations for CIFAR-10 are 0.12, 0.25, 0.5 and 1.0 for pixels in [0, 1]; a
    hundred copies choose the class (100,000 then certify it).

    Deviations: the victim is given, so it is not trained with noise; there is no abstention and no
    certificate; the noise is drawn once for all inputs, so that an answer does not depend on the
    other inputs.
    """

    name = "randomized-smoothing"
    Options = RandomizedSmoothingOptions
    options: RandomizedSmoothingOptions
    needs = "only the model"
    quick: ClassVar[Mapping[str, Any]] = {"copies": 20}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"sigma": 0.06},
        {},
        {"sigma": 0.25},
        {"sigma": 0.5},
        {"sigma": 1.0},
    )

    def purify(self, view: DefenderView) -> Predictor:
        shape = (self.options.copies, *view.distilled.image_shape)
        noise = self.options.sigma * torch.randn(shape, generator=view.generator(self.name))
        return lambda images: vote(view.victim, images, noise.to(images.device), view.classes)


def vote(network: nn.Module, images: Tensor, noise: Tensor, classes: int) -> Tensor:
    """The most frequent prediction ``(N,)`` of ``network`` for ``images`` (N, C, H, W) with each of
    ``noise`` (M, C, H, W) added; the smallest class of a tie."""
    counts = torch.zeros(len(images), classes, device=images.device)
    for field in noise:
        answers = predict(network, images + field)
        counts.scatter_add_(1, answers.unsqueeze(1), torch.ones_like(counts[:, :1]))
    return counts.argmax(dim=1)
