"""The defense ``mm-bd``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..base import DefenderView, DefenseOptions, Inspection, Inspector
from ..common.by_class import classes_needed

_CONVERGED = 1e-5
_FIRST = 1000.0  # the code's value of the loss before the first step
# Number of classes: share of clean models with a p-value below 0.05 if the margins are Gaussian.
_CHANCE = {5: 0.48, 6: 0.34, 7: 0.28, 8: 0.22, 10: 0.17, 12: 0.13, 20: 0.1, 43: 0.06, 100: 0.055}


@final
class MmBdOptions(DefenseOptions):
    """The official code's."""

    starts: int = Field(30, ge=1, description="random images that the ascent starts from")
    steps: int = Field(300, ge=1, description="largest number of steps of gradient ascent")
    lr: float = Field(0.01, gt=0, description="learning rate of the ascent")
    significance: float = Field(0.05, gt=0, lt=1, description="p-value below which is an alarm")


@final
class MmBd(Inspector):
    """MM-BD: the target class can reach a far larger margin than other classes (Wang, Xiang,
    Miller, Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor
    Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024).

    In words: for each class maximise the margin between its logit and the next largest one, from
    random images. A gamma distribution fitted to all but the largest of these margins gives a
    p-value for the largest: one below 0.05 is an alarm.

    Needs no images, but five classes: a gamma distribution has three parameters, and three values
    or fewer do not determine it. If margins are Gaussian, about 17 % of clean models with ten
    classes are flagged, and about half of those with five.

    The code's momentum of 0.2 has no effect, since it makes a new optimiser for each step; there is
    none here.

    Deviations: all classes are optimised at once, each until its own margins converge; the
    statistic is −log10 of the p-value. The victim normalises its input, whereas the code's networks
    take pixels.
    """

    name = "mm-bd"
    Options = MmBdOptions
    options: MmBdOptions
    needs = "only the model, and five classes"
    quick: ClassVar[Mapping[str, Any]] = {"starts": 10}

    def caution(self, view: DefenderView) -> str | None:
        chance = chance_of_alarm(view.classes)
        if self.options.significance != 0.05 or chance <= 0.1:
            return None
        return f"a gamma fitted to {view.classes - 1} margins flags {chance:.0%} of clean models"

    def not_applicable_because(self, view: DefenderView) -> str | None:
        return classes_needed(view, 5)

    def inspect(self, view: DefenderView) -> Inspection:
        shape = view.distilled.batch.images.shape[1:]
        starts = torch.rand(
            view.classes, self.options.starts, *shape, generator=view.generator(self.name)
        )
        margins = largest_margins(
            view.victim, starts.to(view.labels.device), self.options.steps, self.options.lr
        )
        p_value = p_value_of_largest(margins)
        return Inspection(
            statistic=-float(np.log10(max(p_value, 1e-300))),
            alarm=p_value < self.options.significance,
            anomaly=margins,
        )


def largest_margins(network: nn.Module, starts: Tensor, steps: int, lr: float) -> Tensor:
    """The largest margin found for each class, ``(K,)``, from images ``(K, S, C, H, W)``.

    Gradient ascent on the margins of a class, with pixels clamped to [0, 1] before each forward
    pass, until their sum changes by less than a factor of 1e-5.
    """
    classes, count = starts.shape[:2]
    images = starts.clone().requires_grad_()
    own = torch.arange(classes, device=starts.device)
    active = torch.ones(classes, dtype=torch.bool, device=starts.device)
    reached = torch.full((classes,), -float("inf"), device=starts.device)
    before = torch.full((classes,), -_FIRST, dtype=torch.float64, device=starts.device)
    for _ in range(steps):
        numbers = own[active]
        logits = network(images[numbers].clamp(0, 1).flatten(0, 1)).view(len(numbers), count, -1)
        mine, next_best = own_and_next(logits, numbers)
        reached[numbers] = (mine - next_best).detach().amax(dim=1)
        total = mine.sum(dim=1) - next_best.sum(dim=1)
        (gradient,) = torch.autograd.grad(total.sum(), images)
        with torch.no_grad():
            images += lr * gradient
        now = total.detach().double()
        change = (before[numbers] - now).abs() / before[numbers].abs()
        before[numbers] = now
        active[numbers] = ~(change < _CONVERGED)
        if not bool(active.any()):
            break
    return reached


def own_and_next(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the classes ``numbers`` (A,) and the largest other ones, each ``(A, S)``, of
    ``logits`` (A, S, K)."""
    mine = torch.nn.functional.one_hot(numbers, logits.shape[-1]).bool()[:, None]
    own = logits.masked_fill(~mine, -float("inf")).amax(dim=-1)
    return own, logits.masked_fill(mine, -float("inf")).amax(dim=-1)


def p_value_of_largest(margins: Tensor) -> float:
    """The p-value of the largest of ``margins`` (K,), if all come from one gamma distribution F.

    It is fitted to the others; the largest of K draws is at least as large with probability
    1 − F^K.
    """
    from scipy import stats

    values = margins.detach().double().cpu().numpy()
    highest = values.argmax()
    others = np.delete(values, highest)
    if np.ptp(others) == 0:
        return 1.0 if values[highest] <= others[0] else 0.0
    shape, place, scale = stats.gamma.fit(others)
    cdf = stats.gamma.cdf(values[highest], a=shape, loc=place, scale=scale)
    return float(1 - cdf ** len(values))


def chance_of_alarm(classes: int) -> float:
    """The share of clean models with a p-value below 0.05, if their margins are Gaussian."""
    return float(np.interp(classes, list(_CHANCE), list(_CHANCE.values())))
