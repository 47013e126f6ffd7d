"""ANP: prune the channels that a small push turns into the backdoor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..distill.types import Batch
from .base import DefenderView, DefenseOptions, Repairer
from .channels import by_mask, channels, forward_with, prune_in_order
from .held_out import images_needed, images_wanted
from .tuning import drawn, follow


@final
class AnpOptions(DefenseOptions):
    """The paper's."""

    budget: float = Field(0.4, ge=0, description="largest perturbation, relative to the weights")
    clean: float = Field(0.2, ge=0, le=1, description="weight of the loss without perturbation")
    iterations: int = Field(2000, ge=1, description="steps of the masks")
    batch: int = Field(128, ge=2, description="images in a mini-batch")
    lr: float = Field(0.2, gt=0, description="SGD's learning rate for the masks")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    threshold: float = Field(
        0.2, ge=0, le=1, description="channels whose mask is below may be pruned"
    )
    loss: float = Field(0.05, ge=0, lt=1, description="held-out accuracy that pruning may cost")


@final
class Anp(Repairer):
    """ANP (Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021).

    In words: perturb all channels' weights and biases so that clean images are misclassified, and
    learn a mask over the channels that makes up for it; channels whose mask falls below 0.2 are
    pruned.

    Needs held-out images. Made for batch norm, whose scales and shifts are perturbed.

    Deviations: any affine norm's scales are, or the convolution's own weights where there is no
    norm; the perturbation is kept within the budget, as the paper says (the code lets it reach
    twice that).
    """

    name = "anp"
    Options = AnpOptions
    needs = "held-out images"
    quick: ClassVar[Mapping[str, Any]] = {"iterations": 300, "batch": 64}

    def __init__(self, options: AnpOptions) -> None:
        self.options: AnpOptions = options

    def objection(self, view: DefenderView) -> str | None:
        return images_needed(view, 2)

    def caution(self, view: DefenderView) -> str | None:
        return images_wanted(view, 100, "its masks are learned on")

    def repair(self, view: DefenderView) -> nn.Module:
        masks = learn_masks(
            view.trainable_victim(), view.holdout, self.options, view.generator(self.name)
        )
        network = view.trainable_victim().requires_grad_(False)
        order = by_mask(masks, self.options.threshold)
        prune_in_order(network, order, view.holdout, self.options.loss)
        return network


def learn_masks(
    network: nn.Module, clean: Batch, options: AnpOptions, generator: torch.Generator
) -> dict[str, Tensor]:
    """A mask ``(count,)`` in [0, 1] over each layer's channels. ``network`` is used up.

    ``generator`` (CPU) gives orders and the perturbations' starts.
    """
    layers, device = channels(network), clean.labels.device
    network.train().requires_grad_(False)
    masks = {layer.layer: torch.ones(layer.count, device=device) for layer in layers}
    optimiser = torch.optim.SGD(
        [mask.requires_grad_() for mask in masks.values()],
        lr=options.lr,
        momentum=options.momentum,
    )
    for rows in drawn(len(clean), options.batch, options.iterations, generator):
        images, labels = clean.images[rows], clean.labels[rows]
        weights, biases = worst_push(network, masks, images, labels, options, generator)
        pushed = {name: mask + weights[name] for name, mask in masks.items()}
        shifted = {name: 1 + push for name, push in biases.items()}
        robust = functional.cross_entropy(forward_with(network, images, pushed, shifted), labels)
        natural = functional.cross_entropy(forward_with(network, images, masks), labels)
        follow(optimiser, options.clean * natural + (1 - options.clean) * robust)
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


Pushes = dict[str, Tensor]


def worst_push(
    network: nn.Module,
    masks: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    options: AnpOptions,
    generator: torch.Generator,
) -> tuple[Pushes, Pushes]:
    """Relative perturbations of weights and biases, ``(count,)`` by layer, that raise the loss.

    One step along the gradient's sign from a random start, within ±``options.budget``.
    """
    starts: list[Pushes] = []
    for _ in range(2):
        drawn = {
            name: (2 * torch.rand(len(mask), generator=generator) - 1) * options.budget
            for name, mask in masks.items()
        }
        starts.append({n: v.to(images.device).requires_grad_() for n, v in drawn.items()})
    weights, biases = starts
    loss = functional.cross_entropy(
        forward_with(
            network,
            images,
            {name: mask.detach() + weights[name] for name, mask in masks.items()},
            {name: 1 + push for name, push in biases.items()},
        ),
        labels,
    )
    pushes = [*weights.values(), *biases.values()]
    gradients = torch.autograd.grad(loss, pushes, allow_unused=True)
    with torch.no_grad():
        for push, gradient in zip(pushes, gradients, strict=True):
            if gradient is not None:  # a layer without a bias
                push.add_(options.budget * gradient.sign()).clamp_(-options.budget, options.budget)
    return (
        {name: push.detach() for name, push in weights.items()},
        {name: push.detach() for name, push in biases.items()},
    )
