"""The defense ``anp``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.training import augmenter
from ...distill.types import Batch, Recipe
from ..base import DefenderView
from ..common.channels import channels, forward_with
from ..common.held_out import few_images_caution
from ..common.mask_pruning import MaskOptions, MaskPruning
from ..common.sgd import backward_step


@final
class AnpOptions(MaskOptions):
    """The official code's (``optimize_mask_cifar.py``); the threshold is the paper's."""

    budget: float = Field(0.4, ge=0, description="perturbation, relative to the weights")
    steps: int = Field(1, ge=1, description="steps of the perturbation, each of budget / steps")
    clean: float = Field(0.2, ge=0, le=1, description="weight of the loss without perturbation")
    iterations: int = Field(2000, ge=1, description="steps of the masks")
    batch: int = Field(128, ge=2, description="images in a mini-batch, drawn with replacement")
    lr: float = Field(0.2, gt=0, description="SGD's learning rate for the masks")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    threshold: float = Field(0.2, ge=0, le=1, description="largest mask of a pruned channel")


@final
class Anp(MaskPruning):
    """ANP: prune the channels that are sensitive to small perturbations of their weights (Wu, Wang,
    "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021).

    In words: perturb the weights and biases of all channels so that clean images are misclassified,
    and learn a mask over the channels that compensates for it. Channels with a mask of at most 0.2
    are pruned: their weight is set to 0, their bias stays.

    Needs held-out images (500 in the paper). The paper perturbs a neuron's weight and bias. After a
    convolution with batch norm these are the norm's scale and shift, as in the official code;
    without a norm they are the convolution's own. They are not defined for instance, group and
    layer norm, which undo a factor on the weights and have no running averages: the defense is not
    applicable there. (Perturbing their scales in the same way costs half of the accuracy on the
    digits, with 2,000 steps and instance norm.)

    The perturbation starts at random within ±0.4 and takes one step of 0.4 along the gradient's
    sign. As in the official code, and unlike in the paper's formula, it is not projected back to
    ±0.4. The official code tries thresholds from 0 to 0.9 in steps of 0.05 and prints ACC and ASR
    of each; 0.2 is the paper's.

    Deviations: hidden linear layers have masks too, as the paper defines them (the official
    networks have no such layers); images are augmented by the set's recipe.
    """

    name = "anp"
    Options = AnpOptions
    options: AnpOptions
    quick: ClassVar[Mapping[str, Any]] = {"iterations": 300, "batch": 64}
    grid: ClassVar[Sequence[Mapping[str, Any]]] = tuple(
        {"threshold": value} for value in (0.0, 0.2, 0.35, 0.5, 0.7, 0.9)
    )

    def caution(self, view: DefenderView) -> str | None:
        return few_images_caution(view, 100, "its masks are learned on")

    def masks(self, view: DefenderView) -> dict[str, Tensor]:
        generator, recipe = view.generator(self.name), view.distilled.recipe
        return learn_masks(view.trainable_victim(), view.holdout, recipe, self.options, generator)


def learn_masks(
    network: nn.Module,
    clean: Batch,
    recipe: Recipe,
    options: AnpOptions,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A mask ``(count,)`` in [0, 1] over each layer's channels. ``network`` is changed.

    Batch norms normalise by the mini-batch. ``generator`` (CPU) draws mini-batches, augmentation
    and the initial perturbations.
    """
    device, augment = clean.labels.device, augmenter(recipe, generator)
    network.train().requires_grad_(False)
    masks = {
        layer.layer: torch.ones(layer.count, device=device).requires_grad_()
        for layer in channels(network)
    }
    optimiser = torch.optim.SGD(list(masks.values()), lr=options.lr, momentum=options.momentum)
    for _ in range(options.iterations):
        rows = torch.randint(len(clean), (options.batch,), generator=generator).to(device)
        images, labels = augment(clean.images[rows]), clean.labels[rows]
        weights, biases = perturbations(network, masks, images, labels, options, generator)
        robust = functional.cross_entropy(
            forward_with(network, images, *perturbed(masks, weights, biases)), labels
        )
        natural = functional.cross_entropy(forward_with(network, images, masks), labels)
        backward_step(optimiser, options.clean * natural + (1 - options.clean) * robust)
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


ByLayer = Mapping[str, Tensor]


def perturbed(
    masks: ByLayer, weights: ByLayer, biases: ByLayer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The factors of weights (mask + perturbation) and of biases (1 + perturbation)."""
    return (
        {name: mask + weights[name] for name, mask in masks.items()},
        {name: 1 + change for name, change in biases.items()},
    )


def perturbations(
    network: nn.Module,
    masks: ByLayer,
    images: Tensor,
    labels: Tensor,
    options: AnpOptions,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Relative perturbations of weights and biases, ``(count,)`` by layer, that raise the loss.

    ``options.steps`` steps along the gradient's sign, of total length ``options.budget``, from a
    random start within ±``options.budget``.
    """
    fixed = {name: mask.detach() for name, mask in masks.items()}
    starts: list[dict[str, Tensor]] = []
    for _ in range(2):
        drawn = {
            name: (2 * torch.rand(len(mask), generator=generator) - 1) * options.budget
            for name, mask in masks.items()
        }
        starts.append({n: v.to(images.device).requires_grad_() for n, v in drawn.items()})
    weights, biases = starts
    changes = [*weights.values(), *biases.values()]
    for _ in range(options.steps):
        loss = functional.cross_entropy(
            forward_with(network, images, *perturbed(fixed, weights, biases)), labels
        )
        gradients = torch.autograd.grad(loss, changes, allow_unused=True)
        with torch.no_grad():
            for change, gradient in zip(changes, gradients, strict=True):
                if gradient is not None:  # a layer without a bias
                    change.add_(options.budget / options.steps * gradient.sign())
    return (
        {name: change.detach() for name, change in weights.items()},
        {name: change.detach() for name, change in biases.items()},
    )
