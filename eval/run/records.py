"""The record of a new run, and what it says of a set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from ...distill.files.artifact import pixel_range
from ...distill.plugins import is_given
from ...distill.types import DistilledSet, hard_labels
from ..config.schema import Config, on_gpu
from ..results.metrics import Distance, distance, mean_distance
from ..results.record import Record, RecordKind, command_line, environment
from .setup import Setup


def new_record(setup: Setup, given: Sequence[str], kind: RecordKind | None = None) -> Record:
    """The record of a new run: all that is known before any work."""
    config = setup.config
    return Record(
        kind=kind or ("attack" if config.attack else "distill"),
        config=config.flat(),
        config_given=sorted(given),
        config_key=config.key(),
        control_key=config.control_key(),
        environment={
            **environment(config.run.device),
            "repeats_bit_for_bit": config.run.deterministic or not on_gpu(config.run.device),
        },
        command=command_line(),
        dataset=setup.data.describe(),
        recipe=setup.recipe.describe(),
        objects=given_objects(config),
    )


def given_objects(config: Config) -> dict[str, list[str]]:
    """By key, the names in ``config`` that stand for objects given in Python."""
    named: dict[str, Sequence[str | None]] = {
        "attack": [config.attack],
        "backend": [config.set.backend],
        "network": [config.network.network],
        "victim_network": config.victims.victim_network,
        "dataset": [config.data.dataset],
    }
    found = {key: [n for n in names if n and is_given(n)] for key, names in named.items()}
    return {key: names for key, names in found.items() if names}


def describe_set(distilled: DistilledSet) -> dict[str, Any]:
    """What a record says of a set: how many images, and the range of their pixels."""
    images = distilled.batch.images
    return {"images": len(images), "pixel_range": list(pixel_range(images))}


def describe_distance(from_twin: Distance | None, clean: Sequence[DistilledSet]) -> dict[str, Any]:
    """What a record says of how far a set is from its clean twin, beside the reference.

    clean: clean sets of several seeds, the twin among them. The reference is the mean distance of
    two of them, ``None`` for fewer than two.
    """
    pairs = [(one.batch.images, other.batch.images) for one, other in combinations(clean, 2)]
    reference = mean_distance([distance(one, other) for one, other in pairs])
    return {
        **{f"{name}_from_twin": value for name, value in (from_twin or {}).items()},
        "reference_distance": None if reference is None else {**reference, "pairs": len(pairs)},
    }


def count_per_class(distilled: DistilledSet) -> list[int]:
    """The smallest and the largest number of images of a class."""
    labels = hard_labels(distilled.batch.labels)
    counts = labels.bincount(minlength=len(distilled.classes)).tolist()
    return [min(counts), max(counts)]
