"""A suite: attacks × defenses × seeds × victims on several settings, from a YAML file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from pydantic import Field, field_validator

from ...defenses.base import Budget, Defense, Inspector, SetScorer
from ...distill.types import RequestError
from ..bench.options import VICTIMS, BenchOptions, choose_defenses, defense_names
from ..config.layers import for_clean, gather, read_yaml
from ..config.schema import Config, Section, build_options, configure
from .jobs import MOST_RUNS, DistillationJob, Job, defense_job, share_experts

_CLEAN = "clean"
_CALIBRATION = 1000  # the distance of the calibration seeds from the first seed


@final
class Setting(Section):
    """One distillation that is attacked: a preset, or keys of the configuration, or both.

    attacks: further keys of an attack in this setting; ``null`` omits the attack.
    """

    preset: str | None = Field(None, description="start from a preset")
    keys: dict[str, Any] = Field(default_factory=dict, description="keys of the configuration")
    attacks: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    defenses: tuple[str, ...] | None = Field(None, description="default: the suite's")
    seeds: int | None = Field(
        None, ge=1, le=_CALIBRATION, description="distillation seeds (default: the suite's)"
    )
    holdout: int | None = Field(None, ge=0, description="clean images (default: the suite's)")
    calibration: int | None = Field(None, ge=0, description="clean sets (default: the suite's)")
    images: int | None = Field(None, ge=1, description="test images (default: the suite's)")


@final
class Suite(Section):
    """The content of a suite's file."""

    description: str = ""
    settings: dict[str, Setting] = Field(min_length=1)
    attacks: dict[str, dict[str, Any]] = Field(min_length=1)
    defenses: tuple[str, ...] = ("all",)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    victim_networks: tuple[str, ...] = Field((), description="default: the distilling network")
    victims: int | None = Field(None, ge=1, description="victims (default: the budget's)")
    seeds: int = Field(5, ge=1, le=_CALIBRATION, description="distillation seeds, from first_seed")
    first_seed: int = Field(0, ge=0)
    budget: Budget = "quick"
    holdout: int = Field(100, ge=0, description="clean images that the defender holds")
    images: int | None = Field(None, ge=1, description="test images measured")
    calibration: int = Field(
        0, ge=0, description="further clean sets, for the calibrated thresholds"
    )

    @field_validator("settings", "attacks")
    @classmethod
    def _names_are_folders(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"{name!r} names a folder: expected letters, digits, - _ .")
            if name == _CLEAN:
                raise ValueError(f"{_CLEAN!r} is the folder of the clean twin: choose another name")
        return value

    def key(self) -> str:
        """A hash of what the suite measures, without what may grow when it is resumed: seeds, clean
        sets for calibration, and defenses."""
        growing = {"seeds": True, "defenses": True, "calibration": True}
        settings = {"settings": {"__all__": growing}}
        parts = self.model_dump(mode="json", exclude={"description": True, **growing, **settings})
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def seeds_of(self, setting: str) -> range:
        """The distillation seeds of a setting."""
        return range(
            self.first_seed, self.first_seed + (self.settings[setting].seeds or self.seeds)
        )

    def calibration_seeds_of(self, setting: str) -> range:
        """The distillation seeds of the clean sets for calibration."""
        own, first = self.settings[setting].calibration, self.first_seed + _CALIBRATION
        return range(first, first + (self.calibration if own is None else own))

    def defenses_of(self, setting: str) -> dict[str, Defense]:
        """The defenses of a setting, with their options."""
        names = list(self.settings[setting].defenses or self.defenses)
        chosen = defense_names(names)
        options = {name: given for name, given in self.options.items() if name in chosen}
        return choose_defenses(names, self.budget, options)

    def bench_of(self, setting: str) -> BenchOptions:
        """The options for every defense on a setting."""
        own = self.settings[setting]
        return BenchOptions(
            budget=self.budget,
            holdout=self.holdout if own.holdout is None else own.holdout,
            images=self.images if own.images is None else own.images,
        )

    def attacks_of(self, setting: str) -> list[str]:
        """The attacks on a setting."""
        own = self.settings[setting].attacks
        return [name for name in self.attacks if own.get(name, {}) is not None]

    def config(self, setting: str, attack: str, seed: int) -> dict[str, Any]:
        """The flat keys of one attacked distillation."""
        own = self.settings[setting]
        keys = {
            "victims": self.victims or VICTIMS[self.budget],
            **own.keys,
            **self.attacks[attack],
            **(own.attacks.get(attack) or {}),
            "seed": seed,
        }
        if not keys.get("attack"):
            raise RequestError(f"{attack} of {setting}: no attack is set: attack: NAME")
        return gather(preset=own.preset, options=keys)

    def networks(self) -> tuple[str | None, ...]:
        """The victims' architectures; ``None`` for the distilling one."""
        return self.victim_networks or (None,)


@final
@dataclass(frozen=True)
class TwinGroup:
    """A clean twin, and the attacks that are measured against it."""

    setting: str
    seed: int

    def place(self, name: str) -> str:
        """The folder of one of its runs, below the suite's."""
        return f"{self.setting}/seed-{self.seed}/{name}"

    def defense_place(self, attack: str, network: str | None) -> str:
        """The folder of the defenses against one attack, below the suite's."""
        name = f"{attack}-defended" + (f"-{network}" if network else "")
        return self.place(name).replace(":", "_")


def read_suite(path: Path) -> Suite:
    """The suite in a YAML file, every configuration and defense in it checked.

    Errors: ``RequestError`` naming the file and what is wrong in it.
    """
    suite: Suite = build_options(Suite, read_yaml(path), str(path))
    try:
        runs = _count_runs(suite)
        if runs > MOST_RUNS:
            raise RequestError(f"plans {runs} runs, at most {MOST_RUNS} are allowed")
        chosen = {name for setting in suite.settings for name in suite.defenses_of(setting)}
        unused = [name for name in suite.options if name not in chosen]
        if unused:
            raise RequestError(f"options for {', '.join(unused)}, which was not chosen")
        for group in groups(suite):
            twin(suite, group)
            for config in configurations(suite, group).values():
                config.attack_class()
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    return suite


def _count_runs(suite: Suite) -> int:
    """Attacked and clean distillations of all settings, before any is planned."""
    total = 0
    for name in suite.settings:
        seeds, clean = suite.seeds_of(name), suite.calibration_seeds_of(name)
        total += (seeds.stop - seeds.start) * (1 + len(suite.attacks_of(name)))
        total += clean.stop - clean.start
    return total


def groups(suite: Suite) -> list[TwinGroup]:
    """All groups: the first seed of every setting, then the second, and so on."""
    most = max(len(suite.seeds_of(setting)) for setting in suite.settings)
    return [
        TwinGroup(setting, suite.seeds_of(setting)[number])
        for number in range(most)
        for setting in suite.settings
        if number < len(suite.seeds_of(setting))
    ]


def calibration_groups(suite: Suite, setting: str) -> list[TwinGroup]:
    """The groups of a setting that are only for calibration: a clean set without attacks."""
    return [TwinGroup(setting, seed) for seed in suite.calibration_seeds_of(setting)]


def calibrated_defenses(suite: Suite, setting: str) -> dict[str, Defense]:
    """The defenses of a setting that give a statistic of sets or of models."""
    chosen = suite.defenses_of(setting)
    return {n: d for n, d in chosen.items() if isinstance(d, SetScorer | Inspector)}


def configurations(suite: Suite, group: TwinGroup) -> Mapping[str, Config]:
    """The attacked configurations of a group, by attack."""
    return {
        attack: configure(**suite.config(group.setting, attack, group.seed))
        for attack in suite.attacks_of(group.setting)
    }


def twin(suite: Suite, group: TwinGroup) -> Config:
    """The clean configuration that all attacks of a group share.

    Errors: ``RequestError`` where they need different ones.
    """
    configs = configurations(suite, group)
    first = next(iter(configs.values()))
    for name, config in configs.items():
        if config.control_key() != first.control_key():
            raise RequestError(f"{group.setting}: {name} needs another clean twin than the others")
    return for_clean(first.flat())


def suite_jobs(suite: Suite) -> list[Job]:
    """For each group its clean twin, its attacks, and the defenses against each of them."""
    jobs: list[Job] = []
    for group in groups(suite):
        clean = DistillationJob(place=group.place(_CLEAN), config=twin(suite, group))
        chosen, bench = suite.defenses_of(group.setting), suite.bench_of(group.setting)
        jobs.append(clean)
        for attack, config in configurations(suite, group).items():
            attacked = DistillationJob(
                place=group.place(attack), config=config, control=clean.place
            )
            jobs.append(attacked)
            jobs += [
                defense_job(attacked, group.defense_place(attack, network), network, chosen, bench)
                for network in suite.networks()
            ]
    return share_experts(jobs + _calibration_jobs(suite))


def _calibration_jobs(suite: Suite) -> list[Job]:
    """The clean sets for calibration, and the detectors of sets and models on each."""
    jobs: list[Job] = []
    for setting in suite.settings:
        chosen, bench = calibrated_defenses(suite, setting), suite.bench_of(setting)
        for group in calibration_groups(suite, setting) if chosen else ():
            clean = DistillationJob(place=group.place(_CLEAN), config=twin(suite, group))
            jobs.append(clean)
            jobs += [
                defense_job(clean, group.defense_place(_CLEAN, network), network, chosen, bench)
                for network in suite.networks()
            ]
    return jobs
