"""CLP: prune the channels that can amplify an image most, without any image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..base import DefenderView, DefenseOptions, Repairer
from ..common.channels import BATCH_NORM, Channels, convolutions, silence


@final
class ClpOptions(DefenseOptions):
    """The paper's."""

    deviations: float = Field(3.0, description="deviations above a layer's mean that are pruned")


@final
class Clp(Repairer):
    """CLP (Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV
    2022).

    In words: bound each channel's Lipschitz constant by the spectral norm of its kernel times the
    scale of the batch norm behind it; prune channels more than three deviations above their layer's
    mean.

    Needs batch norm, whose running deviation makes the scale a constant; no image. The deviation
    is the unbiased one, as in the official code. A layer of n channels has none more than
    (n − 1) / √n of them above its mean: eight channels can't be pruned at three.

    Deviations: a convolution without any norm behind it counts with its own kernel, as the paper
    defines the bound (the official code looks at convolutions before a batch norm only).
    """

    name = "clp"
    Options = ClpOptions
    needs = "batch norm (or no norm at all)"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = tuple(
        {"deviations": value} for value in (5.0, 4.0, 3.0, 2.0, 1.5, 1.0)
    )

    def __init__(self, options: ClpOptions) -> None:
        self.options: ClpOptions = options

    def objection(self, view: DefenderView) -> str | None:
        layers = convolutions(view.victim)
        if not layers:
            return "the network has no convolution"
        if all(lipschitz(view.victim, layer) is None for layer in layers):
            return "the network has no batch norm: other norms have no scale of their own"
        return None

    def caution(self, view: DefenderView) -> str | None:
        widest = max(layer.count for layer in convolutions(view.victim))
        if (widest - 1) / widest**0.5 > self.options.deviations:
            return None
        return (
            f"of {widest} channels none is ever {self.options.deviations:g} deviations above the "
            "mean: nothing is pruned"
        )

    def repair(self, view: DefenderView) -> nn.Module:
        network = view.trainable_victim().requires_grad_(False)
        chosen = {}
        for layer in convolutions(network):
            bounds = lipschitz(network, layer)
            if bounds is not None and len(bounds) > 1:
                limit = bounds.mean() + self.options.deviations * bounds.std()
                chosen[layer.layer] = bounds > limit
        silence(network, chosen, biases=True)
        return network


def lipschitz(network: nn.Module, layer: Channels) -> Tensor | None:
    """An upper bound of each channel's Lipschitz constant, ``(count,)``; ``None`` behind a norm
    that divides by each image's own deviation.

    The spectral norm of the channel's kernel as a matrix (input channels, kernel pixels), times
    the norm's scale over its running deviation. As in the official code no epsilon is added.
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
