"""A sweep: one base configuration, the axes along which it varies, seeds, and defenses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from pydantic import Field

from ...defenses.base import Budget, Defense
from ...distill.types import RequestError
from ..bench.options import BenchOptions, choose_defenses
from ..config.layers import as_key, for_clean, gather, read_yaml, with_keys
from ..config.schema import Config, Section, build_options, configure
from .jobs import MOST_RUNS, DistillationJob, Job, defense_job, share_experts

_CELLS = "cells"


@final
class Sweep(Section):
    """The content of a sweep's file.

    base: keys of the configuration, ``preset`` among them. The points are all combinations of: an
    entry of ``list`` (keys and values), a step of ``zip`` (whose axes advance together), one value
    of each axis of ``grid``. ``each`` adds points where a single axis differs from the base. A
    value that is a mapping sets several keys at once.
    """

    description: str = ""
    base: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    zip: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    list: tuple[dict[str, Any], ...] = ()
    each: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    seeds: int = Field(5, ge=1, description="distillation seeds, from first_seed")
    first_seed: int = Field(0, ge=0)
    defenses: tuple[str, ...] = Field((), description="default: only the attack is measured")
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    budget: Budget = "quick"
    holdout: int = Field(100, ge=0, description="clean images that the defender holds")
    images: int | None = Field(None, ge=1, description="test images that defenses are measured on")

    def points(self) -> tuple[SweepPoint, ...]:
        """All points, in the order of the file.

        Errors: ``RequestError`` for an empty axis, one that is there twice, axes of ``zip`` of
        different lengths, or too many runs with the seeds.
        """
        for entry in self.list or ({},):
            axes = itertools.chain(entry.items(), self.zip.items(), self.grid.items())
            with_keys(axes, "the axes of list, zip and grid")
        with_keys(self.each.items(), "the axes of each")
        for axis, values in {**self.grid, **self.zip, **self.each}.items():
            if not values:
                raise RequestError(f"axis {axis} has no values")
        lengths = {axis: len(values) for axis, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{axis} {count}" for axis, count in lengths.items())
            raise RequestError(f"the axes of zip need equally many values, got {text}")
        listed = [SweepPoint.of(entry.items()) for entry in self.list] or [SweepPoint()]
        zipped = [SweepPoint.of(step) for step in _steps(self.zip)] or [SweepPoint()]
        count = len(listed) * len(zipped) * math.prod(map(len, self.grid.values()))
        count += sum(map(len, self.each.values()))
        if count * self.seeds > MOST_RUNS:
            raise RequestError(
                f"{count} points with {self.seeds} seeds are {count * self.seeds} runs, at most "
                f"{MOST_RUNS} are allowed"
            )
        crossed = [SweepPoint.of(values) for values in _combinations(self.grid)]
        points = [a.joined(b).joined(c) for a, b, c in itertools.product(listed, zipped, crossed)]
        if self.each and not (self.grid or self.zip or self.list):
            points = []  # not the base itself
        points += [
            SweepPoint.of([(axis, value)], axis=as_key(axis))
            for axis, values in self.each.items()
            for value in values
        ]
        return tuple(points)

    def seed_range(self) -> range:
        """The distillation seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def config(self, point: SweepPoint, seed: int) -> Config:
        """The configuration of one cell; threads: 1, unless the sweep sets it."""
        base = with_keys(self.base.items(), "base")
        keys = {"threads": 1, **base, **point.keys, "seed": seed}
        preset = keys.pop("preset", None)
        gathered = gather(preset=preset, options=keys)
        return configure(**gathered) if gathered.get("attack") else for_clean(gathered)

    def chosen(self) -> dict[str, Defense]:
        """The defenses, with their options."""
        if not self.defenses:
            return {}
        return choose_defenses([*self.defenses], self.budget, self.options)

    def bench(self) -> BenchOptions:
        """The options for every defense."""
        return BenchOptions(budget=self.budget, holdout=self.holdout, images=self.images)


@final
@dataclass(frozen=True)
class SweepPoint:
    """A variation of the base. values: (axis, value as shown); settings: (key, value).

    axis: the one that varies, for a point of ``each``.
    """

    values: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    axis: str | None = None

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Any]], axis: str | None = None) -> SweepPoint:
        """A point from (axis, value) pairs."""
        values, settings = [], []
        for name, value in pairs:
            key = as_key(name)
            if isinstance(value, Mapping):
                keys = with_keys(value.items(), key)
                shown = keys.get(key, ", ".join(f"{k} {v}" for k, v in keys.items()))
                settings += list(keys.items())
            else:
                shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                settings.append((key, value))
            values.append((key, shown))
        return cls(tuple(values), tuple(settings), axis)

    def joined(self, other: SweepPoint) -> SweepPoint:
        """Both together; ``other``'s keys take precedence."""
        return SweepPoint(self.values + other.values, self.settings + other.settings)

    @property
    def keys(self) -> dict[str, Any]:
        """The configuration's keys."""
        return dict(self.settings)

    def __str__(self) -> str:
        return ", ".join(f"{axis} {value}" for axis, value in self.values) or "the base"


def read_sweep(
    path: Path, *, base: Mapping[str, Any] | None = None, seeds: int | None = None
) -> Sweep:
    """The sweep in a YAML file, every configuration and defense in it checked.

    base, seeds: these take precedence over the file's.
    Errors: ``RequestError`` naming the file, the point, and what is wrong in it.
    """
    return sweep_from(read_yaml(path), str(path), base=base, seeds=seeds)


def sweep_from(
    content: Mapping[str, Any],
    owner: str,
    *,
    base: Mapping[str, Any] | None = None,
    seeds: int | None = None,
) -> Sweep:
    """The sweep that the mapping ``content`` describes, checked as by ``read_sweep``.

    owner: what errors call it.
    """
    sweep: Sweep = build_options(Sweep, content, owner)
    sweep = sweep.model_copy(
        update={"base": {**sweep.base, **(base or {})}, "seeds": seeds or sweep.seeds}
    )
    try:
        sweep.chosen()
        for point in sweep.points():
            try:
                config = sweep.config(point, sweep.first_seed)
                if config.attack:
                    config.attack_class()
                if not config.attack and sweep.defenses:
                    raise RequestError("defenses need an attack, and none is set")
            except RequestError as error:
                raise RequestError(f"{point}: {error}") from error
    except RequestError as error:
        raise RequestError(f"{owner}: {error}") from error
    return sweep


def cell_place(config: Config) -> str:
    """The folder of the cell of a configuration, below the sweep's; one for each configuration."""
    return f"{_CELLS}/{config.key()}"


def defense_place(sweep: Sweep, config: Config) -> str:
    """The folder of the defenses of a cell, below the sweep's."""
    bench = sweep.bench()
    return f"{cell_place(config)}-defended-{bench.budget}-{bench.holdout}-{bench.images or 'all'}"


def sweep_jobs(sweep: Sweep) -> list[Job]:
    """Every cell once, seed by seed; before an attack its clean twin, after it its defenses."""
    jobs: dict[str, Job] = {}
    chosen, bench = sweep.chosen(), sweep.bench()

    def add(config: Config) -> DistillationJob:
        control = None
        if config.attack and config.victims.control:
            control = add(config.without_attack()).place
        cell = DistillationJob(
            place=cell_place(config),
            config=config,
            control=control,
            keep_victims=not config.attack or bool(chosen),
        )
        jobs.setdefault(cell.place, cell)
        return cell

    for seed in sweep.seed_range():
        for point in sweep.points():
            cell = add(sweep.config(point, seed))
            if chosen:
                place = defense_place(sweep, cell.config)
                jobs.setdefault(place, defense_job(cell, place, None, chosen, bench))
    return share_experts([*jobs.values()])


def _steps(axes: Mapping[str, tuple[Any, ...]]) -> Iterable[list[tuple[str, Any]]]:
    """The steps of axes that advance together."""
    length = len(next(iter(axes.values()))) if axes else 0
    return [[(axis, values[step]) for axis, values in axes.items()] for step in range(length)]


def _combinations(axes: Mapping[str, tuple[Any, ...]]) -> Iterable[list[tuple[str, Any]]]:
    """Every combination of one value from each axis; for no axes a single empty one."""
    return [list(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
