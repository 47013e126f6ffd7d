"""Pruning by learned masks over a network's channels."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..base import DefenderView, DefenseOptions, Repairer
from .channels import batch_norm_needed, low_masks, prune
from .held_out import images_needed


class MaskOptions(DefenseOptions, ABC):
    """Base of the options of ``MaskPruning``.

    threshold: the largest mask of a pruned channel, in [0, 1].
    """

    threshold: float


class MaskPruning(Repairer, ABC):
    """Shared by repairs that prune the channels whose learned mask is at most the threshold."""

    options: MaskOptions
    needs = "held-out images; batch norm (or no norm at all)"

    @abstractmethod
    def masks(self, view: DefenderView) -> dict[str, Tensor]:
        """A mask ``(count,)`` in [0, 1] over each layer's channels; the victim stays as it is."""

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return images_needed(view, 2) or batch_norm_needed(view.victim)

    def repair(self, view: DefenderView) -> nn.Module:
        # The masks do not depend on the threshold: the tuned budget learns them once.
        options = self.options.model_dump_json(exclude={"threshold"})
        masks = view.once((self.name, options), lambda: self.masks(view))
        network = view.trainable_victim().requires_grad_(False)
        prune(network, low_masks(masks, self.options.threshold))
        return network
