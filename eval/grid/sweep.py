"""A sweep: one base configuration, axes along which it varies, seeds, and what is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from pydantic import Field

from ...defenses.base import Budget, Defense
from ...distill.types import RequestError
from ..bench.bench import BenchOptions, choose_defenses
from ..config.layers import as_key, for_clean, gather, read_yaml
from ..config.schema import Config, Section, build_options, configure
from .jobs import Distillation, Piece, defended, in_sequence

_CELLS = "cells"


@final
class Sweep(Section):
    """What a sweep's file holds.

    base: keys of the configuration, ``preset`` among them. The points around it are all
    combinations of: an entry of ``list`` (keys, written out), a step of ``zip`` (its axes go side
    by side), one value of each axis of ``grid``. ``each`` adds points where a single axis leaves
    the base. A value that is a mapping sets several keys at once.
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

    def points(self) -> tuple[Point, ...]:
        """All points, in the order in which they are written.

        Errors: ``RequestError`` for an empty axis, or axes of ``zip`` of different lengths.
        """
        for axis, values in {**self.grid, **self.zip, **self.each}.items():
            if not values:
                raise RequestError(f"axis {axis} has no values")
        lengths = {axis: len(values) for axis, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{axis} {count}" for axis, count in lengths.items())
            raise RequestError(f"the axes of zip go side by side, and differ in length: {told}")
        written = [Point.of(entry.items()) for entry in self.list] or [Point()]
        sides = [Point.of(step) for step in _steps(self.zip)] or [Point()]
        crossed = [Point.of(values) for values in _combinations(self.grid)]
        found = [a.joined(b).joined(c) for a, b, c in itertools.product(written, sides, crossed)]
        if self.each:
            varied = self.grid or self.zip or self.list
            alone = [
                Point.of([(axis, value)], axis=as_key(axis))
                for axis, values in self.each.items()
                for value in values
            ]
            found = [*(found if varied else []), *alone]
        return tuple(found)

    def seed_range(self) -> range:
        """The distillation seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def config(self, point: Point, seed: int) -> Config:
        """One cell's configuration: one thread, unless something else is said."""
        base = {as_key(str(key)): value for key, value in self.base.items()}
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
        """What holds for every defense."""
        return BenchOptions(budget=self.budget, holdout=self.holdout, images=self.images)


@final
@dataclass(frozen=True)
class Point:
    """Where the base is varied: values by axis as people read them, and the keys that they set.

    axis: the one that varies, for a point of ``each``.
    """

    values: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    axis: str | None = None

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Any]], axis: str | None = None) -> Point:
        """A point from (axis, value) pairs."""
        values, settings = [], []
        for name, value in pairs:
            told_as = as_key(name)
            if isinstance(value, Mapping):
                keys = {as_key(str(key)): each for key, each in value.items()}
                told = keys.get(told_as, ", ".join(f"{k} {v}" for k, v in keys.items()))
                settings += list(keys.items())
            else:
                told = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                settings.append((told_as, value))
            values.append((told_as, told))
        return cls(tuple(values), tuple(settings), axis)

    def joined(self, other: Point) -> Point:
        """Both together, the other's keys winning."""
        return Point(self.values + other.values, self.settings + other.settings)

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

    base, seeds: what wins over the file's.
    Errors: ``RequestError`` naming the file, the point, and what is wrong in it.
    """
    sweep: Sweep = build_options(Sweep, read_yaml(path), str(path))
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
                    raise RequestError("there is no attack to set defenses against")
            except RequestError as error:
                raise RequestError(f"{point}: {error}") from error
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    return sweep


def cell_of(config: Config) -> str:
    """Where the cell of a configuration lies: the same configuration, the same cell."""
    return f"{_CELLS}/{config.key()}"


def defended_of(sweep: Sweep, config: Config) -> str:
    """Where the bench's record of a cell lies."""
    bench = sweep.bench()
    return f"{cell_of(config)}-defended-{bench.budget}-{bench.holdout}-{bench.images or 'all'}"


def plan(sweep: Sweep) -> list[Piece]:
    """Every cell once, seed by seed; before an attack its clean twin, after it its defenses."""
    found: dict[str, Piece] = {}
    chosen, bench = sweep.chosen(), sweep.bench()

    def add(config: Config) -> Distillation:
        control = None
        if config.attack and config.victims.control:
            control = add(config.without_attack()).place
        cell = Distillation(
            place=cell_of(config),
            config=config,
            after=() if control is None else (control,),
            control=control,
            keep_victims=not config.attack or bool(chosen),
        )
        found.setdefault(cell.place, cell)
        return cell

    for seed in sweep.seed_range():
        for point in sweep.points():
            cell = add(sweep.config(point, seed))
            if chosen:
                place = defended_of(sweep, cell.config)
                found.setdefault(place, defended(cell, place, None, chosen, bench))
    return in_sequence([*found.values()])


def _steps(axes: Mapping[str, tuple[Any, ...]]) -> Iterable[list[tuple[str, Any]]]:
    """The steps of axes that go side by side."""
    length = len(next(iter(axes.values()))) if axes else 0
    return [[(axis, values[step]) for axis, values in axes.items()] for step in range(length)]


def _combinations(axes: Mapping[str, tuple[Any, ...]]) -> Iterable[list[tuple[str, Any]]]:
    """Every combination of one value from each axis; one empty combination of none."""
    return [list(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
