"""From a configuration and its data to the things that run: task, backend, attack, recipe."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from ...attacks import Attack, DataInfo
from ...distill.core.backend import Backend
from ...distill.core.start import start_run
from ...distill.core.task import Task
from ...distill.data.registry import ImageSet, load_dataset
from ...distill.memory import keep_freed_memory
from ...distill.networks.makers import NetworkMaker
from ...distill.networks.registry import NetworkSpec
from ...distill.randomness import Streams
from ...distill.types import Distillate, DistilledSet, Recipe, RequestError, RunError
from ..config.schema import Config
from .checks import check_device


@final
@dataclass(frozen=True, eq=False)
class Workshop:
    """All that one configuration needs, made from it and nothing else."""

    config: Config
    data: ImageSet

    @property
    def streams(self) -> Streams:
        """The run's random streams."""
        return Streams(self.config.run.seed)

    @property
    def recipe(self) -> Recipe:
        """How victims train, before a backend has learned anything; it travels in the set's file.

        What the configuration leaves to the backend has the default of ``Recipe`` until then.
        """
        augment = self.config.victims.victim_augment
        if augment is None:
            raise RequestError("the victims' recipe is not resolved: use configure()")
        recipe = Recipe(preprocessing=self.data.preprocessing, augment=augment)
        return self.with_wishes(recipe)

    def with_wishes(self, recipe: Recipe) -> Recipe:
        """``recipe`` with the epochs and the rate that the configuration asks for.

        Whoever asks for one of them asks for training by epochs, in place of steps that were
        learned.
        """
        victims = self.config.victims
        wishes: dict[str, Any] = {"epochs": victims.victim_epochs, "lr": victims.victim_lr}
        wishes = {key: value for key, value in wishes.items() if value is not None}
        if not wishes:
            return recipe
        return recipe.by_epochs(**wishes, augment=victims.victim_augment or "")

    def network(self, spec: NetworkSpec) -> NetworkMaker:
        """Fresh networks of ``spec`` for this data, by seed."""
        return NetworkMaker(
            spec=spec,
            image_shape=self.data.image_shape,
            classes=len(self.data.classes),
            preprocessing=self.data.preprocessing,
            device=self.config.run.device,
        )

    def victim_networks(self) -> dict[str, NetworkMaker]:
        """The victims' architectures by name, the primary one first.

        A victim named like the distilling network has its parameters too; another has its
        published ones.
        """
        own = self.config.network
        names = self.config.victims.victim_network or (own.network,)
        specs = {name: own if name == own.network else NetworkSpec(network=name) for name in names}
        return {name: self.network(spec) for name, spec in specs.items()}

    def task(self, scratch: Path | None = None) -> Task:
        """The distillation that the configuration asks for; ``scratch`` as in ``Task``."""
        options = self.config.backend
        return Task(
            real=self.data.train,
            classes=len(self.data.classes),
            ipc=self.config.set.ipc,
            iterations=options.iterations,
            init=options.init,
            clip_pixels=options.clip_pixels,
            recipe=self.recipe,
            network=self.network(self.config.network),
            streams=self.streams,
            scratch=scratch,
            identity=self._identity(),
        )

    def _identity(self) -> dict[str, Any]:
        """What trained networks depend on beside the data they see and the way they train."""
        config, run = self.config, self.config.run
        options = config.attack_options
        return {
            **config.data.model_dump(),
            **config.network.model_dump(),
            "attack": config.attack,
            "attack_options": options.model_dump(mode="json") if options else None,
            "device": run.device,
            "threads": run.threads,
        }

    def backend(self) -> Backend:
        """The backend with its options."""
        make = self.config.backend_class()
        return make(self.config.backend, ipc=self.config.set.ipc, recipe=self.recipe)

    def attack(self) -> Attack | None:
        """A fresh attack, or ``None`` for a clean distillation."""
        if self.config.attack is None or self.config.attack_options is None:
            return None
        make = self.config.attack_class()
        try:
            return make(self.config.attack_options, self.data_info())
        except TypeError as error:  # a user's class that is not whole
            raise RequestError(f"attack {self.config.attack}: {error}") from error

    def poisoned_rows(self, count: int) -> Tensor | None:
        """Which rows of a set of ``count`` are poisoned; ``None`` where a set's rows are nobody's.

        ``bool (count,)``: known where a backend keeps the training set's rows as they are.
        """
        attack, backend = self.attack(), self.backend()
        if attack is None or not backend.keeps_rows or count != len(self.data.train):
            return None
        start_run(self.task(), backend, [attack])
        return attack.poisoned_rows

    def rehearse(self) -> None:
        """Start a run without a step: what the data cannot give is refused beforehand.

        Such as more poisoned rows, or more images to start from, than a class has. A hook that
        fails is left to the run, whose record tells of it.
        """
        attack = self.attack()
        with contextlib.suppress(RunError):
            start_run(self.task(), self.backend(), [attack] if attack else [])

    def data_info(self) -> DataInfo:
        """What an attacker knows of the data."""
        return DataInfo(
            image_shape=self.data.image_shape,
            classes=len(self.data.classes),
            mean=self.data.mean,
            std=self.data.std,
            device=torch.device(self.config.run.device),
        )

    def describe_data(self) -> dict[str, Any]:
        """What the record says of the data; the fingerprint tells changed files apart."""
        data = self.data
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (data.train.images, data.train.labels, data.test.images, data.test.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return {
            "name": data.name,
            "classes": list(data.classes),
            "train": len(data.train),
            "test": len(data.test),
            "image_shape": list(data.image_shape),
            "fingerprint": digest.hexdigest(),
        }

    def finished(self, made: Distillate) -> DistilledSet:
        """What was made as it is given away: with its classes and recipe."""
        recipe = self.with_wishes(made.recipe)
        return DistilledSet(batch=made.batch, classes=self.data.classes, recipe=recipe)


def open_workshop(
    config: Config, data_dir: Path | str | None = None, *, bars: bool = False
) -> Workshop:
    """Set the threads, load the data, and build one network to see that it fits the images.

    bars: whether downloading and decoding show progress bars.

    Errors: ``RequestError`` for a device that isn't here, data that can't be had or that the
    network can't take.
    """
    check_device(config.run.device)
    torch.set_num_threads(config.run.threads)
    threadpool_limits(config.run.threads, user_api="blas")  # numpy's and scikit-learn's
    keep_freed_memory()
    data = load_dataset(
        config.data.dataset,
        data_dir=Path(data_dir) if data_dir else None,
        image_size=config.data.image_size,
        progress=bars,
    ).to(config.run.device)
    if config.data.zca:
        data = data.whitened()
    workshop = Workshop(config, data)
    for build in (workshop.network(config.network), *workshop.victim_networks().values()):
        build(0)
    workshop.backend()
    workshop.attack()
    return workshop
