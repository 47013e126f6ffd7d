"""The defense ``clp``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..base import DefenderView, DefenseOptions, Repairer
from ..common.channels import BATCH_NORM, Channels, convolutions, prune


@final
class ClpOptions(DefenseOptions):
    """The paper's."""

    deviations: float = Field(
        3.0, description="threshold: standard deviations above the mean of a layer"
    )


@final
class Clp(Repairer):
    """CLP: prune the channels with the largest Lipschitz constants; needs no images (Zheng, Tang,
    Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022).

    In words: bound each channel's Lipschitz constant by the spectral norm of its kernel times the
    scale of the batch norm after it; prune channels more than three standard deviations above the
    mean of their layer.

    Needs batch norm, whose running variance makes the scale a constant; no images. The standard
    deviation is the unbiased one, as in the official code. No channel of a layer of n is more than
    (n − 1) / √n of them above the mean: a layer of eight is never pruned at three.

    Deviations: for a convolution without a norm after it the bound is that of its kernel, as the
    paper defines it (the official code only considers convolutions before a batch norm).
    """

    name = "clp"
    Options = ClpOptions
    options: ClpOptions
    needs = "batch norm (or no norm at all)"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = tuple(
        {"deviations": value} for value in (5.0, 4.0, 3.0, 2.0, 1.5, 1.0)
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        layers = convolutions(view.victim)
        if not layers:
            return "the network has no convolution"
        if all(lipschitz(view.victim, layer) is None for layer in layers):
            return "the network has no batch norm: the bound is not defined for other norms"
        return None

    def caution(self, view: DefenderView) -> str | None:
        widest = max(layer.count for layer in convolutions(view.victim))
        if (widest - 1) / widest**0.5 > self.options.deviations:
            return None
        return (
            f"none of {widest} channels can be {self.options.deviations:g} standard deviations "
            "above the mean: nothing is pruned"
        )

    def repair(self, view: DefenderView) -> nn.Module:
        network = view.trainable_victim().requires_grad_(False)
        chosen = {}
        for layer in convolutions(network):
            bounds = lipschitz(network, layer)
            if bounds is not None and len(bounds) > 1:
                limit = bounds.mean() + self.options.deviations * bounds.std()
                chosen[layer.layer] = bounds > limit
        prune(network, chosen, biases=True)
        return network


def lipschitz(network: nn.Module, layer: Channels) -> Tensor | None:
    """An upper bound of each channel's Lipschitz constant, ``(count,)``; ``None`` before a norm
    that divides by the standard deviation of each image.

    The spectral norm of the channel's kernel as a matrix (input channels, kernel pixels), times the
    norm's scale over its running standard deviation. As in the official code no epsilon is added.
    """
    kernel: Any = network.get_submodule(layer.source).weight
    norms: Tensor = torch.linalg.matrix_norm(kernel.detach().flatten(2).double(), ord=2)
    if layer.layer == layer.source:
        return norms
    norm: Any = network.get_submodule(layer.layer)
    if not isinstance(norm, BATCH_NORM):
        return None
    assert norm.running_var is not None
    scale: Tensor = norm.weight.detach().double() / norm.running_var.double().sqrt()
    return norms * scale.abs()
