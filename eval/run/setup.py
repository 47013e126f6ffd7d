"""From a configuration to what runs: data, networks, task, backend, attack."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from threadpoolctl import threadpool_limits

from ...attacks import Attack, DataInfo
from ...distill.core.backend import Backend
from ...distill.core.task import Task
from ...distill.data.registry import ImageSet, load_dataset
from ...distill.engine import Engine
from ...distill.memory import keep_freed_memory
from ...distill.networks.makers import NetworkMaker
from ...distill.networks.registry import NetworkSpec
from ...distill.preprocessing import Preprocessing
from ...distill.randomness import Streams
from ...distill.types import Distillate, DistilledSet, Recipe, RequestError
from ..config.schema import Config
from .recipes import override, victims_recipe

_MACHINE = ("device", "threads", "speed", "precision", "deterministic")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """A configuration with its data, and what is built from the two.

    recipe: how victims train before a backend has learned anything. network: the distilling
    network. victim_networks: the victims' architectures by name, the primary one first.
    """

    config: Config
    data: ImageSet
    recipe: Recipe
    streams: Streams
    network: NetworkMaker
    victim_networks: Mapping[str, NetworkMaker]

    @property
    def primary_network(self) -> NetworkMaker:
        """The first of the victims' architectures."""
        return next(iter(self.victim_networks.values()))

    def without_attack(self) -> Setup:
        """The clean twin's setup."""
        return replace(self, config=self.config.without_attack())

    def task(self, scratch: Path | None = None) -> Task:
        """The distillation task; ``scratch`` as in ``Task``."""
        options = self.config.backend
        return Task(
            real=self.data.train,
            classes=len(self.data.classes),
            ipc=self.config.set.ipc,
            iterations=options.iterations,
            init=options.init,
            clip_pixels=options.clip_pixels,
            recipe=self.recipe,
            network=self.network,
            streams=self.streams,
            scratch=scratch,
            identity=_identity(self.config),
            engine=self.network.engine,
        )

    def backend(self) -> Backend:
        """The backend with its options."""
        make = self.config.backend_class()
        return make(self.config.backend, ipc=self.config.set.ipc, recipe=self.recipe)

    def attack(self) -> Attack | None:
        """A fresh attack, or ``None`` for a clean distillation."""
        if self.config.attack is None or self.config.attack_options is None:
            return None
        info = DataInfo(
            image_shape=self.data.image_shape,
            classes=len(self.data.classes),
            mean=self.data.mean,
            std=self.data.std,
            device=torch.device(self.config.run.device),
        )
        make = self.config.attack_class()
        try:
            return make(self.config.attack_options, info)
        except TypeError as error:  # a user's class with an abstract method left
            raise RequestError(f"attack {self.config.attack}: {error}") from error

    def distilled_set(self, made: Distillate) -> DistilledSet:
        """``made`` with the class names, and the recipe with the configuration's overrides and
        its network."""
        network = self.config.network.model_dump(exclude_none=True)
        recipe = replace(override(made.recipe, self.config.victims), network=network)
        return DistilledSet(batch=made.batch, classes=self.data.classes, recipe=recipe)


def prepare(config: Config, data_dir: Path | str | None = None, *, bars: bool = False) -> Setup:
    """Set the threads, load the data, and build the setup and one network of each kind.

    bars: whether downloading and decoding show progress bars.
    Errors: ``RequestError`` for a device that is not on this machine, data that cannot be loaded,
    and images that a network cannot take.
    """
    _check_device(config.run.device)
    torch.set_num_threads(config.run.threads)
    threadpool_limits(config.run.threads, user_api="blas")  # numpy's and scikit-learn's
    keep_freed_memory()
    data = load_dataset(
        config.data.dataset,
        data_dir=Path(data_dir) if data_dir else None,
        image_size=config.data.image_size,
        progress=bars,
    ).to(config.run.device)
    setup = build(config, data.whitened() if config.data.zca else data)
    for network in (setup.network, *setup.victim_networks.values()):
        network(0)
    return setup


def build(config: Config, data: ImageSet) -> Setup:
    """The setup of ``config`` on ``data``.

    A victim named like the distilling network has its parameters too; another has the published
    ones of its architecture.
    """

    def network(spec: NetworkSpec) -> NetworkMaker:
        return NetworkMaker(
            spec=spec,
            image_shape=data.image_shape,
            classes=len(data.classes),
            preprocessing=data.preprocessing,
            device=config.run.device,
            engine=engine,
        )

    engine = _engine(config)
    own = config.network
    names = config.victims.victim_network or (own.network,)
    specs = {name: own if name == own.network else NetworkSpec(network=name) for name in names}
    return Setup(
        config=config,
        data=data,
        recipe=victims_recipe(config.victims, data.preprocessing),
        streams=Streams(config.run.seed),
        network=network(own),
        victim_networks={name: network(spec) for name, spec in specs.items()},
    )


def _engine(config: Config) -> Engine:
    """How passes run, set up for this process."""
    run = config.run
    assert run.speed is not None and run.precision is not None
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first use
    torch.use_deterministic_algorithms(run.deterministic)
    engine = Engine(run.speed, run.precision)
    engine.apply()
    return engine


def with_preprocessing(setup: Setup, preprocessing: Preprocessing) -> Setup:
    """``setup`` with networks that do ``preprocessing``, of a set's recipe, with pixels first."""
    if preprocessing == setup.data.preprocessing:
        return setup
    moved = preprocessing.to(setup.config.run.device)
    return build(setup.config, setup.data.with_preprocessing(moved))


def _identity(config: Config) -> dict[str, Any]:
    """What trained networks depend on beside the data they see and the way they train."""
    options, run = config.attack_options, config.run.model_dump()
    return {
        **config.data.model_dump(),
        **config.network.model_dump(),
        "attack": config.attack,
        "attack_options": options.model_dump(mode="json") if options else None,
        **{key: run[key] for key in _MACHINE if key in run},
    }


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    if device == "mps" and not torch.backends.mps.is_available():
        raise RequestError("there is no mps here: torch finds no Apple GPU")
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise RequestError(f"there is no {device} here: {count} CUDA devices were found")
