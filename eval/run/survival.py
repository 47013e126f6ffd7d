"""What survives of a backdoor when the receiver stores, reduces or trains on the set differently.

Each variant changes one thing and leaves everything else as it is, for the set and for its clean
twin. Victim k has the same initial weights and training order in every variant that keeps the
architecture and the number of rows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn

from ...distill.augment import OPERATIONS
from ...distill.data.registry import dataset_entry
from ...distill.files.artifact import quantised
from ...distill.files.safe import write_text
from ...distill.networks.makers import NetworkMaker
from ...distill.networks.registry import NetworkSpec
from ...distill.networks.variants import variant_of
from ...distill.randomness import Streams
from ...distill.types import (
    DistilledSet,
    Recipe,
    RequestError,
    RunError,
    Step,
    hard_labels,
)
from ..config.schema import Config, without_flips
from ..figures.survival_picture import survival_picture
from ..results.metrics import collect
from ..results.record import Record, Survived
from ..results.survival_table import survival_markdown
from .cell import draw_set
from .folder import RunFolder
from .opening import OpenedSet, Source, name_of, open_set
from .progress import Reporter
from .reading import ReadingOptions
from .source import fingerprint
from .victims import Panel, train_victim

RATES: Final = (0.3, 3.0)
SHARES: Final = {"half of each class": 1 / 2, "quarter of each class": 1 / 4}

Change = Callable[[DistilledSet], DistilledSet]
"""What a receiver does to a set, or to its recipe, before training."""


@final
@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to use a set. network: the victims' architecture."""

    name: str
    change: Change
    network: NetworkMaker


# What a receiver may change ----------------------------------------------------------------------


def unchanged(distilled: DistilledSet) -> DistilledSet:
    """The set as it is."""
    return distilled


def augmented(recipe: Recipe, augment: str) -> Recipe:
    """``recipe`` with this augmentation; learned steps, which know none, become epochs."""
    return recipe.by_epochs(augment=augment)


def longer(recipe: Recipe, factor: int) -> Recipe:
    """``factor`` times the epochs; learned steps are repeated."""
    return replace(recipe, epochs=factor * recipe.epochs, steps=factor * recipe.steps)


def at_rate(recipe: Recipe, factor: float) -> Recipe:
    """``factor`` times the learning rate, also of each learned step."""
    steps = tuple(Step(rows=step.rows, rate=factor * step.rate) for step in recipe.steps)
    return replace(recipe, lr=factor * recipe.lr, steps=steps)


def kept_rows(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A random ``share`` of the rows of each class, rounded down and at least one.

    labels: int64 (N,), on the CPU. Returns row numbers in ascending order. From one state of the
    generator a smaller share gives a part of the rows of a larger one.
    """
    order = torch.randperm(len(labels), generator=generator)
    of_class = (order[labels[order] == label] for label in labels.unique())
    return torch.cat([rows[: max(1, int(share * len(rows)))] for rows in of_class]).sort().values


def only_rows(distilled: DistilledSet, rows: Tensor) -> DistilledSet:
    """The set with these rows only; learned steps are about those of their rows that are left."""
    place = {row: number for number, row in enumerate(rows.tolist())}
    steps = (
        Step(rows=tuple(place[row] for row in step.rows if row in place), rate=step.rate)
        for step in distilled.recipe.steps
    )
    recipe = replace(distilled.recipe, steps=tuple(step for step in steps if step.rows))
    batch = distilled.batch.rows(rows.to(distilled.batch.images.device))
    return replace(distilled, batch=batch, recipe=recipe)


def _part(distilled: DistilledSet, share: float, streams: Streams) -> DistilledSet:
    labels = hard_labels(distilled.batch.labels).cpu()
    rows = kept_rows(labels, share, streams.generator("victim", "kept rows"))
    return only_rows(distilled, rows)


def _retrained(distilled: DistilledSet, change: Callable[[Recipe], Recipe]) -> DistilledSet:
    return replace(distilled, recipe=change(distilled.recipe))


# The variants ------------------------------------------------------------------------------------


def variants(
    distilled: DistilledSet,
    own: NetworkMaker,
    chosen: Sequence[str],
    streams: Streams,
    *,
    flips: bool,
) -> list[Variant]:
    """All variants of ``distilled``, the set as it is first.

    own: the set's own network. chosen: the names of other networks; without any, those of
    ``other_networks``. flips: whether a horizontal flip keeps an image's label.
    Errors: ``RequestError`` for a chosen network that there isn't or that cannot take the images.
    """
    changes: dict[str, Change] = {
        **_recipes(distilled.recipe, flips),
        **_parts(distilled, streams),
    }
    return [
        Variant(name="as it is", change=unchanged, network=own),
        Variant(name="8-bit PNG", change=quantised, network=own),
        *(
            Variant(name=f"network: {name}", change=unchanged, network=network)
            for name, network in _networks(own, chosen).items()
        ),
        *(Variant(name=name, change=change, network=own) for name, change in changes.items()),
    ]


def other_networks(own: NetworkSpec) -> dict[str, NetworkSpec]:
    """Architectures beside ``own``: batch norm, twice the width, and an MLP.

    Where ``own`` has no norm or no width to change, the published ConvNet takes its place.
    """
    normed, wide = variant_of(own, "batch-norm"), variant_of(own, "wide")
    found = {
        f"{normed.network}, batch norm": normed,
        f"{wide.network}, width {wide.width}": wide,
        "mlp": variant_of(own, "mlp"),
    }
    return {name: spec for name, spec in found.items() if spec != own}


def _networks(own: NetworkMaker, chosen: Sequence[str]) -> dict[str, NetworkMaker]:
    """The other networks by name; one by default that cannot take the images is left out."""
    if chosen:
        named = {name: replace(own, spec=NetworkSpec(network=name)) for name in chosen}
        for network in named.values():
            network(0)
        return named
    makers = {name: replace(own, spec=spec) for name, spec in other_networks(own.spec).items()}
    return {name: network for name, network in makers.items() if _can_be_made(network)}


def _can_be_made(network: NetworkMaker) -> bool:
    try:
        network(0)
    except RequestError:
        return False
    return True


def _recipes(recipe: Recipe, flips: bool) -> dict[str, Change]:
    """Other recipes; a set whose recipe augments is trained without augmentation."""
    augment = "" if recipe.augment else without_flips("_".join(OPERATIONS), flips)
    changes: dict[str, Callable[[Recipe], Recipe]] = {
        "with augmentation" if augment else "without augmentation": partial(
            augmented, augment=augment
        ),
        "twice the epochs": partial(longer, factor=2),
        **{f"learning rate × {rate:g}": partial(at_rate, factor=rate) for rate in RATES},
    }
    return {name: partial(_retrained, change=change) for name, change in changes.items()}


def _parts(distilled: DistilledSet, streams: Streams) -> dict[str, Change]:
    """Parts of the set, without those that have as many rows as a larger one."""
    found: dict[str, Change] = {}
    count = len(distilled.batch)
    for name, share in SHARES.items():
        change = partial(_part, share=share, streams=streams)
        left = len(change(distilled).batch)
        if left < count:
            found[name], count = change, left
    return found


# Measuring ---------------------------------------------------------------------------------------


def evaluate_survival(
    source: Source,
    config: Config,
    out: Path | str,
    *,
    given: Sequence[str] = (),
    reading: ReadingOptions | None = None,
    trigger: Path | str | None = None,
    control_run: Path | str | None = None,
    data_dir: Path | str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Record:
    """Measure every variant of the set in ``source`` and of its clean twin, in the folder ``out``.

    Returns and writes the record, with the variants under ``survival`` and the set as it is under
    ``metrics``; also ``survival.md`` and ``survival.png``. A stopped run is continued after the
    last measured victim. config: as for ``evaluate``; its victim networks are the other
    architectures. The others and the errors: as for ``evaluate``.
    """
    reporter, folder = reporter or Reporter(), RunFolder(Path(out))
    opened = open_set(
        source,
        _by_own_network(config),
        "evaluate",
        settings="survival",
        given=given,
        reading=reading,
        trigger=trigger,
        control_run=control_run,
        data_dir=data_dir,
        bars=reporter.bars,
    )
    record, setup = opened.record, opened.setup
    chosen = [name for name in config.victims.victim_network if name != setup.network.spec.network]
    flips = dataset_entry(config.data.dataset).flips
    tried = variants(opened.distilled, setup.network, chosen, setup.streams, flips=flips)
    record.config["victim_network"] = [setup.network.spec.network, *chosen] if chosen else []
    names = [variant.name for variant in tried]
    record.distilled["fingerprint"] = fingerprint((record.distilled["fingerprint"], names), ())
    with folder.entered(record, resume=resume) as earlier:
        if earlier is not None and earlier.status == "done":
            return earlier
        with folder.keeping(record):
            _measure(opened, tried, folder, reporter)
            draw_set(folder, opened.distilled, Path(name_of(source)).name)
            write_text(folder.path / "survival.md", survival_markdown(record))
            survival_picture(folder.path / "survival.png", record)
    return record


def _by_own_network(config: Config) -> Config:
    """``config`` with victims of the set's own network: others are variants."""
    victims = config.victims.model_copy(update={"victim_network": ()})
    return config.model_copy(update={"victims": victims})


def _measure(
    opened: OpenedSet, tried: Sequence[Variant], folder: RunFolder, reporter: Reporter
) -> None:
    """Measure the variants one after the other; ``metrics`` are those of the first."""
    began = time.monotonic()
    setup, record = opened.setup, opened.record
    count = setup.config.victims.victims
    total = count * len(tried) * (1 if opened.twin is None else 2)
    done = len(folder.scores())
    with reporter.phase("victims of all variants", total, done) as phase:
        reached = itertools.count(done + 1)

        def train(
            distilled: DistilledSet, network: NetworkMaker, streams: Streams, number: int
        ) -> nn.Module:
            victim = train_victim(distilled, network, streams, number)
            phase.reach(next(reached))
            return victim

        silent = Reporter(quiet=True)
        panel = Panel(folder, setup.data.test, setup.streams, count, silent, train)
        for variant in tried:
            record.survival[variant.name] = _survived(panel, variant, opened)
            record.write(folder.record)
    record.metrics = record.survival[tried[0].name].metrics
    record.timings["victims_seconds"] = time.monotonic() - began


def _survived(panel: Panel, variant: Variant, opened: OpenedSet) -> Survived:
    """The metrics of a variant; of one whose training diverges the reason that there are none."""
    name, network, case, twin = variant.name, variant.network, opened.case, opened.twin
    try:
        ours = panel.measure(name, variant.change(opened.distilled), network, case)
        theirs = None
        if twin is not None:
            theirs = panel.measure(f"{name}, clean twin", variant.change(twin), network, case)
    except RunError as error:
        return Survived(error=str(error))
    return Survived(metrics=collect(ours, theirs))
