"""No distillation: the training set itself, for comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.backend import Backend, BackendOptions
from ..core.real import RealData
from ..core.run import Run
from ..types import Batch, Recipe


@final
class WholeSetOptions(BackendOptions):
    """Nothing is optimised: ``ipc``, ``init`` and ``lr_img`` have no effect."""

    iterations: int = Field(0, ge=0, le=0, description="none: nothing is distilled")


@final
class WholeSet(Backend):
    """The whole training set, poisoned where an attack says so, and not distilled at all.

    In words: what networks trained on the raw data do. The classic data poisoning setting (BadNets:
    Gu, Dolan-Gavitt, Garg, 2017), for which most defenses were made; row i of the set is row i of
    the training data. No paper's recipe: 20 epochs, learning rate 0.05, no augmentation.
    """

    name = "whole"
    Options = WholeSetOptions
    cost = "none to make; victims train on all rows"
    needs = "nothing"
    keeps_rows: ClassVar[bool] = True
    victim_epochs = 20
    victim_lr = 0.05

    def __init__(self, options: BackendOptions, *, ipc: int, recipe: Recipe) -> None:
        pass

    def start(self, real: RealData) -> Batch:
        return real.whole()

    def optimiser(self, leaf: Tensor, learned: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD([leaf], lr=0.0)

    def steps(self) -> int:
        return 0

    # With no iterations the loop asks for none of these.

    def network(self, run: Run) -> nn.Module:
        return run.task.fresh_network()

    def losses(self, run: Run, network: nn.Module, synthetic: Batch) -> Iterator[Tensor]:
        yield from ()

    def advance(self, run: Run, network: nn.Module, synthetic: Batch) -> None:
        pass
