"""Invisible: a small perturbation of the whole image, optimised during the distillation."""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field
from torch import Tensor

from .moving import MovingTriggerAttack, MovingTriggerOptions
from .search import SearchSpace
from .triggers import AdditiveTrigger, Norm, TriggerRange


@final
class InvisibleOptions(MovingTriggerOptions):
    """Options of ``invisible``."""

    trigger_norm: Norm = Field("linf", description="norm in which the perturbation is bounded")
    trigger_bound: float = Field(
        0.1, gt=0, description="largest norm of the perturbation, pixel units"
    )
    trigger_range: TriggerRange = Field(
        "pixel",
        description="pixel: the sum is clamped to [0, 1]; unbounded: it is not (the paper's form)",
    )


@final
class Invisible(MovingTriggerAttack):
    """Invisible: a perturbation of the whole image that moves with the network, as in Doorping.

    The third attack in the code of "Backdoor Attacks Against Dataset Distillation" (Liu et al.,
    NDSS 2023; ``liuyugeng/baadd``, ``update_inv_trigger`` in DC/utils.py at commit cade4d2). Its
    trigger is from "Invisible Backdoor Attacks on Deep Neural Networks via Steganography and
    Regularization" (Li et al., arXiv 1909.02742).

    In words: poisoned rows carry clean pixels + perturbation, clamped to [0, 1]. Whenever the
    distilling network has moved, the perturbation is optimised against it (``objective``) within
    its L∞ or L2 ball, and from the next draw on the poisoned rows carry the new one.

    Deviations from the reference code:

    - The perturbation is added to clean rows. There it is added to rows that already carry earlier
      ones, so it accumulates; that form is not offered.
    - The sum is clamped to [0, 1], unless ``trigger_range`` is ``unbounded``.
    - The norm is bounded by a projection after every step. There a penalty acts on pixels above a
      threshold, which starts at the whole pixel range and shrinks.
    - It starts uniform within ± the bound. There it starts as a test image of the target class.
    - ``neuron`` and ``neuron-reference`` raise the neuron's activation. There both sides of the
      squared error are differentiated, which lowers it. The steps are Doorping's (there at most 100
      at the same rate), and so is everything that this list does not name.
    - For ``neuron-reference`` the perturbation lies on the mean image: the reference passes it to
      the network alone, in normalised units.

    In the reference's DC code the update cannot run, since a call lacks an argument.
    """

    name = "invisible"
    Options = InvisibleOptions
    options: InvisibleOptions

    def first_pattern(self, rng: torch.Generator) -> Tensor:
        """Uniform within ± the bound, then projected onto the ball."""
        bound = self.options.trigger_bound
        values = torch.rand(self.data.image_shape, generator=rng).to(self.data.device)
        return self._onto_ball((2 * values - 1) * bound)

    def trigger_of(self, pattern: Tensor) -> AdditiveTrigger:
        options = self.options
        return AdditiveTrigger(
            perturbation=pattern,
            norm=options.trigger_norm,
            bound=options.trigger_bound,
            range=options.trigger_range,
        )

    def search_space(self) -> SearchSpace:
        """All pixels, within the ball."""
        return SearchSpace(
            mask=torch.ones_like(self._pattern[:1]),
            shift=torch.zeros_like(self._mean),
            scale=self._std,
            project=self._onto_ball,
            canvas=self._mean.expand(self.data.image_shape),
        )

    def _onto_ball(self, pattern: Tensor) -> Tensor:
        options = self.options
        bounded = AdditiveTrigger.bounded(pattern, options.trigger_norm, options.trigger_bound)
        return bounded.perturbation
