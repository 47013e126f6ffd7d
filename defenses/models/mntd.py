"""The defense ``mntd``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from ...distill.files.safe import TENSORS_CAP, check_file
from ...distill.randomness import seeded_weights
from ...distill.training import shuffled
from ..base import DefenderView, DefenseOptions, Inspection, Inspector
from ..common.held_out import images_needed
from ..common.sgd import backward_step
from ..common.shadows import ShadowOptions, Zoo, load_zoo, train_zoo

PAIRS = 2304
"""The pairs of shadows in the official code: 2,048 for training, 256 for choosing the epoch."""


@final
class MntdOptions(DefenseOptions):
    """The official code's."""

    zoo: str | None = Field(None, description="file of `distillsec shadows` (default: trains one)")

    @field_validator("zoo")
    @classmethod
    def _is_a_file(cls, value: str | None) -> str | None:
        if value is not None:
            check_file(Path(value), TENSORS_CAP)
        return value

    pairs: int = Field(PAIRS, ge=2, description="pairs of shadows, if it trains them")
    shadow_epochs: int = Field(100, ge=1, description="training epochs of a shadow")
    shadow_batch: int = Field(100, ge=2, description="images in a shadow's mini-batch")
    queries: int = Field(10, ge=1, description="query images whose logits are classified")
    hidden: int = Field(20, ge=1, description="hidden units of the meta-classifier")
    epochs: int = Field(10, ge=1, description="epochs of the meta-classifier")
    batch: int = Field(1, ge=1, description="shadows in a mini-batch of the meta-classifier")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")


@final
class Mntd(Inspector):
    """MNTD: a classifier of networks, trained on shadow networks (Xu, Wang, Li, Borisov, Gunter,
    Li, "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021; jumbo learning with query
    tuning).

    In words: train shadow networks, half of them with backdoors of many kinds. Learn ten query
    images and a small classifier that separates the halves by their logits on these, and apply it
    to the victim. The classifier is that of the epoch with the best AUROC on a ninth of the pairs,
    which are not trained on. The statistic is its logit, above 0 is an alarm. It names no class.

    Needs the file of a zoo (``distillsec shadows``), or held-out images to train shadows on. It
    then trains the published 2,304 pairs; with fewer it is not applicable. Shadows represent the
    victim only if they are trained like it: networks trained on distilled images differ from
    shadows trained on real ones.

    Deviations: networks are in evaluation mode (the code leaves the dropout of its networks on),
    and normalise their input. The code's threshold is the median logit of all networks that it
    tests; a single victim has none, so the threshold is 0. The code reports the mean AUROC of five
    classifiers; here there is one. A zoo of fewer than nine pairs cannot choose an epoch and uses
    the last one.
    """

    name = "mntd"
    Options = MntdOptions
    options: MntdOptions
    needs = "held-out images (hundreds), or a zoo of shadows"
    quick: ClassVar[Mapping[str, Any]] = {
        "pairs": 8,
        "shadow_epochs": 25,
        "shadow_batch": 32,
        "epochs": 150,
        "batch": 8,
    }

    def __init__(self, options: MntdOptions) -> None:
        super().__init__(options)
        self._trained: tuple[object, Zoo] | None = None
        self._loaded: tuple[object, Zoo] | None = None

    def not_applicable_because(self, view: DefenderView) -> str | None:
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
        return f"the shadows are trained on {len(view.holdout)} held-out images"

    def inspect(self, view: DefenderView) -> Inspection:
        zoo = self._zoo(view)
        classifier = train_meta_classifier(zoo, view.network(0).eval(), view, self.options)
        with torch.no_grad():
            score = float(classifier(view.victim(classifier.queries)[None])[0])
        return Inspection(statistic=score, alarm=score > 0)

    def _zoo(self, view: DefenderView) -> Zoo:
        """The zoo of the file, or one trained once for all views with the same held-out images."""
        options = self.options
        if options.zoo:
            if self._loaded is None or self._loaded[0] is not view.network:
                self._loaded = view.network, load_zoo(Path(options.zoo), view.network)
            return self._loaded[1]
        if self._trained is None or self._trained[0] is not view.holdout.images:
            shadows = ShadowOptions(
                pairs=options.pairs, epochs=options.shadow_epochs, batch=options.shadow_batch
            )
            zoo = train_zoo(
                view.network,
                view.holdout,
                view.distilled.recipe,
                shadows,
                lambda number: view.generator("mntd", "shadow", number),
            )
            self._trained = view.holdout.images, zoo
        return self._trained[1]


@final
class MetaClassifier(nn.Module):
    """The meta-classifier and its queries: logits ``(M, N, classes)`` of M networks to ``(M,)``."""

    def __init__(self, queries: Tensor, classes: int, hidden: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(queries)
        self.hidden = nn.Linear(len(queries) * classes, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, logits: Tensor) -> Tensor:
        """The logits of the networks being backdoored."""
        found: Tensor = self.out(functional.relu(self.hidden(logits.flatten(1))))[:, 0]
        return found


def train_meta_classifier(
    zoo: Zoo, network: nn.Module, view: DefenderView, options: MntdOptions
) -> MetaClassifier:
    """A classifier that separates the zoo's backdoored networks from its clean ones.

    The last ninth of the pairs chooses the epoch (of equally good ones the first).
    """
    generator, device = view.generator("mntd", "classifier"), zoo.backdoored.device
    shape = view.distilled.batch.images.shape[1:]
    noise = torch.randn(options.queries, *shape, generator=generator)
    space = view.network.preprocessing
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (space.mean, space.std))
    with seeded_weights(view.seed("mntd", "weights")):
        classifier = MetaClassifier(mean + std * noise, view.classes, options.hidden).to(device)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=options.lr)
    network.requires_grad_(False)
    train = len(zoo) - 2 * (len(zoo) // 2 // 9)
    held_out = torch.arange(train, len(zoo), device=device)
    best, kept = -1.0, classifier.state_dict()
    for _ in range(options.epochs):
        for rows in shuffled(train, options.batch, generator, device):
            scores = classifier(zoo.logits(network, rows, classifier.queries))
            labels = zoo.backdoored[rows].float()
            backward_step(optimiser, functional.binary_cross_entropy_with_logits(scores, labels))
        if len(held_out):
            with torch.no_grad():
                scores = classifier(zoo.logits(network, held_out, classifier.queries))
            area = auroc(scores, zoo.backdoored[held_out])
            if area > best:
                best, kept = area, copy.deepcopy(classifier.state_dict())
    classifier.load_state_dict(kept)
    return classifier.eval()


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The area under the ROC curve of ``scores`` (N,): the share of pairs of a positive and a
    negative in the right order, equal scores counted half. 0.5 if there is no pair."""
    above = scores[positive][:, None] - scores[~positive]
    return float(((above > 0).double() + (above == 0) / 2).mean()) if above.numel() else 0.5
