"""MNTD: a classifier of networks, taught by shadow networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ...distill.randomness import seeded_weights
from ...distill.training import shuffled
from ..base import DefenderView, DefenseOptions, Inspection, Inspector
from ..common.held_out import images_needed
from ..common.shadows import ShadowOptions, Zoo, grow_zoo, load_zoo
from ..common.tuning import follow

PAIRS = 2304
"""The pairs of shadows that the official code trains: 2,048 to learn from, 256 to choose by."""


@final
class MntdOptions(DefenseOptions):
    """The official code's."""

    zoo: str | None = Field(None, description="file of `distillsec shadows` (default: trains one)")
    pairs: int = Field(PAIRS, ge=2, description="pairs of shadows, where it trains them itself")
    shadow_epochs: int = Field(100, ge=1, description="epochs that a shadow trains")
    shadow_batch: int = Field(100, ge=2, description="images in a shadow's mini-batch")
    queries: int = Field(10, ge=1, description="images that a network is asked about")
    hidden: int = Field(20, ge=1, description="hidden units of the meta-classifier")
    epochs: int = Field(10, ge=1, description="epochs of the meta-classifier")
    batch: int = Field(1, ge=1, description="shadows in its mini-batch")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")


@final
class Mntd(Inspector):
    """MNTD (Xu, Wang, Li, Borisov, Gunter, Li, "Detecting AI Trojans Using Meta Neural Analysis",
    IEEE S&P 2021), jumbo learning with query tuning.

    In words: train shadow networks, half of them with backdoors of all kinds; learn ten query
    images and a small classifier of the answers to them that tells the halves apart; ask the
    victim. The classifier is that of the epoch with the best AUROC on a ninth of the pairs, which
    it doesn't learn from. The statistic is its logit, and above 0 is an alarm. It names no class.

    Needs the file of a zoo (``distillsec shadows``), or held-out images to train shadows on; then
    it takes the published 2,304 pairs, and fewer are an objection. The shadows stand for the
    victim only as far as they are trained like it: networks trained on distilled images are not
    what shadows trained on real ones are.

    Deviations: networks answer in evaluation mode (the code leaves the dropout of its networks
    on), and normalise their input themselves. The code cuts at the median of the logits of all
    networks that it tests; one victim has none, so the cut is 0. It reports the mean AUROC of five
    classifiers; here there is one. Zoos of fewer than nine pairs have none to choose by, and the
    last epoch counts.
    """

    name = "mntd"
    Options = MntdOptions
    needs = "held-out images (hundreds), or a zoo of shadows"
    quick: ClassVar[Mapping[str, Any]] = {
        "pairs": 8,
        "shadow_epochs": 25,
        "shadow_batch": 32,
        "epochs": 150,
        "batch": 8,
    }

    def __init__(self, options: MntdOptions) -> None:
        self.options: MntdOptions = options
        self._grown: tuple[object, Zoo] | None = None
        self._loaded: tuple[object, Zoo] | None = None

    def objection(self, view: DefenderView) -> str | None:
        options = self.options
        if options.zoo:
            return None
        if options.pairs < PAIRS:
            return (
                f"not measured at this budget: {options.pairs} pairs of shadows, "
                f"the published number is {PAIRS}"
            )
        return images_needed(view, 10)

    def caution(self, view: DefenderView) -> str | None:
        if self.options.zoo:
            pairs = len(self._zoo(view)) // 2
            return (
                None
                if pairs >= PAIRS
                else f"a zoo of {pairs} pairs of shadows, the published number is {PAIRS}"
            )
        if len(view.holdout) >= 500:
            return None
        return f"its shadows are trained on {len(view.holdout)} held-out images"

    def inspect(self, view: DefenderView) -> Inspection:
        zoo = self._zoo(view)
        judge = learn_to_judge(zoo, view.network(0).eval(), view, self.options)
        with torch.no_grad():
            score = float(judge(view.victim(judge.queries)[None])[0])
        return Inspection(statistic=score, alarm=score > 0)

    def _zoo(self, view: DefenderView) -> Zoo:
        """The zoo of the file, or one trained once for all views with the same held-out images."""
        options = self.options
        if options.zoo:
            if self._loaded is None or self._loaded[0] is not view.network:
                self._loaded = view.network, load_zoo(Path(options.zoo), view.network)
            return self._loaded[1]
        if self._grown is None or self._grown[0] is not view.holdout.images:
            shadows = ShadowOptions(
                pairs=options.pairs, epochs=options.shadow_epochs, batch=options.shadow_batch
            )
            recipe = view.distilled.recipe
            zoo = grow_zoo(
                view.network,
                view.holdout,
                recipe,
                shadows,
                lambda number: view.generator("mntd", "shadow", number),
            )
            self._grown = view.holdout.images, zoo
        return self._grown[1]


@final
class Judge(nn.Module):
    """The meta-classifier and its queries: logits ``(M, N, classes)`` of M networks to ``(M,)``."""

    def __init__(self, queries: Tensor, classes: int, hidden: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(queries)
        self.hidden = nn.Linear(len(queries) * classes, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, logits: Tensor) -> Tensor:
        """How backdoored the networks look, as logits."""
        found: Tensor = self.out(functional.relu(self.hidden(logits.flatten(1))))[:, 0]
        return found


def learn_to_judge(zoo: Zoo, network: nn.Module, view: DefenderView, options: MntdOptions) -> Judge:
    """A judge that separates the zoo's backdoored networks from its clean ones.

    The last ninth of the pairs chooses the epoch (of equally good ones the first).
    """
    generator, device = view.generator("mntd", "classifier"), zoo.backdoored.device
    shape = view.distilled.batch.images.shape[1:]
    noise = torch.randn(options.queries, *shape, generator=generator)
    space = view.network.preprocessing
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (space.mean, space.std))
    with seeded_weights(view.seed("mntd", "weights")):
        judge = Judge(mean + std * noise, view.classes, options.hidden).to(device)
    optimiser = torch.optim.Adam(judge.parameters(), lr=options.lr)
    network.requires_grad_(False)
    teach = len(zoo) - 2 * (len(zoo) // 2 // 9)
    choose = torch.arange(teach, len(zoo), device=device)
    best, kept = -1.0, judge.state_dict()
    for _ in range(options.epochs):
        for rows in shuffled(teach, options.batch, generator, device):
            scores = judge(zoo.answers(network, rows, judge.queries))
            wanted = zoo.backdoored[rows].float()
            follow(optimiser, functional.binary_cross_entropy_with_logits(scores, wanted))
        if len(choose):
            with torch.no_grad():
                scores = judge(zoo.answers(network, choose, judge.queries))
            area = auroc(scores, zoo.backdoored[choose])
            if area > best:
                best, kept = area, copy.deepcopy(judge.state_dict())
    judge.load_state_dict(kept)
    return judge.eval()


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs of a positive and a negative that ``scores`` (N,) order rightly; equal
    scores count half. 0.5 where there is no pair."""
    above = scores[positive][:, None] - scores[~positive]
    return float(((above > 0).double() + (above == 0) / 2).mean()) if above.numel() else 0.5
