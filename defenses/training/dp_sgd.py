"""The defense ``dp-sgd``."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from ...distill.batch_norm import batch_norm_layers
from ...distill.training import augmenter, drop_epoch, sgd
from ..base import DefenderView, DefenseOptions, Trainer


@final
class DpSgdOptions(DefenseOptions):
    """One of the settings of Hong et al.: the largest noise, with a clip of 1.

    Their code sweeps clips of 0.1, 1, 2, 4 and 8 and noise multipliers of 0, 0.00001, 0.001 and
    0.1 / clip, at δ 1e-5. The rest is the set's recipe.
    """

    clip: float = Field(1.0, gt=0, description="largest L2 norm of a row's gradient")
    noise: float = Field(0.1, ge=0, description="standard deviation of the noise / clip")
    delta: float = Field(1e-5, gt=0, lt=1, description="δ for which ε is reported")


@final
class DpSgd(Trainer):
    """DP-SGD: training in which the influence of each row is bounded (Abadi et al., "Deep Learning
    with Differential Privacy", CCS 2016; against backdoors: Hong et al., "On the Effectiveness of
    Mitigating Data Poisoning Attacks with Gradient Shaping", 2020).

    In words: train by the set's recipe, but clip every row's gradient and add noise to the sum. The
    clipping, the noise and the accounting are opacus's.

    Needs the extra ``dp`` (opacus), and a network without batch norm, which mixes rows. ε is
    reported for the rows of the received set. It does not cover the images that the set was
    distilled from: their distillation was not private. With the noise of Hong et al. ε is large:
    they find that the defense needs no meaningful privacy.

    Deviations: mini-batches are Poisson samples, as the accounting requires (Hong et al. shuffle);
    momentum, weight decay and the learning rate's schedule are the recipe's (Hong et al. use plain
    gradient descent). Borgnia et al. (ICASSP 2021) clip the mean gradient of the mini-batch to 1
    and add noise of 0.01: with rows clipped that is a noise of 1.28 for a mini-batch of 128, the
    strongest setting of the grid.
    """

    name = "dp-sgd"
    Options = DpSgdOptions
    options: DpSgdOptions
    needs = "the set; a network without batch norm; the extra dp (opacus)"
    grid: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"clip": 4.0, "noise": 0.0},
        {"clip": 4.0, "noise": 0.025},
        {},
        {"noise": 0.5},
        {"noise": 1.28},
    )

    def not_applicable_because(self, view: DefenderView) -> str | None:
        if importlib.util.find_spec("opacus") is None:
            return "needs opacus: pip install 'distillsec[dp]'"
        if batch_norm_layers(view.victim):
            return "batch norm mixes rows, so that rows have no gradients of their own"
        return None

    def caution(self, view: DefenderView) -> str | None:
        if not self.options.noise:
            return "without noise there is no privacy"
        epsilon = self.figures(view)["epsilon"]
        return (
            f"ε {epsilon:.3g} at δ {self.options.delta:g} for the {len(view.labels)} received "
            "rows; it does not cover the images that they were distilled from"
        )

    def figures(self, view: DefenderView) -> Mapping[str, float]:
        """``epsilon``: the privacy budget of the received rows; empty if there is no noise."""
        if not self.options.noise:
            return {}
        rate, steps = _schedule(view)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opacus uses deprecated parts of numpy and torch
            from opacus.accountants import RDPAccountant

            accountant = RDPAccountant()
            accountant.history = [(self.options.noise, rate, steps)]
            return {"epsilon": float(accountant.get_epsilon(self.options.delta))}

    def train(self, view: DefenderView) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _train(view, self.options)


def _schedule(view: DefenderView) -> tuple[float, int]:
    """The share of rows in a mini-batch, and the number of mini-batches."""
    recipe, count = view.distilled.recipe.by_epochs(), len(view.labels)
    size = min(recipe.batch_size, count)
    return size / count, recipe.epochs * -(-count // size)


def _train(view: DefenderView, options: DpSgdOptions) -> nn.Module:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    recipe, batch = view.distilled.recipe.by_epochs(), view.distilled.batch
    rate, steps = _schedule(view)
    generator, count = view.generator(DpSgd.name), len(batch)
    augment = augmenter(recipe, generator)
    network = view.network(view.seed(DpSgd.name, "weights"))
    private: Any = GradSampleModule(network)
    optimiser = DPOptimizer(
        sgd(network, recipe),
        noise_multiplier=options.noise,
        max_grad_norm=options.clip,
        expected_batch_size=max(1, round(rate * count)),
        generator=_on(view, batch.images.device),
    )
    drop = drop_epoch(recipe.epochs)
    private.train()
    for step in range(steps):
        if step == drop * steps // recipe.epochs:
            for group in optimiser.param_groups:
                group["lr"] *= 0.1
        drawn = torch.rand(count, generator=generator) < rate
        rows = torch.nonzero(drawn)[:, 0].to(batch.images.device)
        optimiser.zero_grad()
        if not len(rows):
            continue
        loss = functional.cross_entropy(private(augment(batch.images[rows])), batch.labels[rows])
        loss.backward()
        optimiser.step()
    private.remove_hooks()
    trained = view.network(0)
    trained.load_state_dict(network.state_dict())
    return trained.eval().requires_grad_(False)


def _on(view: DefenderView, device: torch.device) -> torch.Generator:
    """The generator of the noise, on ``device``."""
    generator = torch.Generator(device)
    generator.manual_seed(view.seed(DpSgd.name, "noise"))
    return generator
