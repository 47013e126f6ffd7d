"""The jobs of a sweep or a suite: runs in folders below one folder, and their dependencies."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from ...defenses.base import Defense
from ...distill.core.hooks import Hook
from ...distill.types import RequestError
from ..bench.defend import defend, reusable_outcomes
from ..bench.options import BenchOptions
from ..bench.store import VictimStore
from ..config.schema import Config, configure
from ..results.record import Record, read_record
from ..run.cell import run_cell
from ..run.progress import Reporter

MOST_RUNS: Final = 5_000
"""The most distillations of a sweep or a suite."""

_EXPERTS = "experts"
_VICTIMS = "victims"


@dataclass(frozen=True, kw_only=True, eq=False)
class Job(ABC):
    """One run: the unit of work, of retries, and of resuming.

    place: its folder, below the sweep's or the suite's. config: what it runs. after: the places of
    jobs that run first; unlike the job in ``needs``, they may fail.
    """

    place: str
    config: Config
    after: tuple[str, ...] = ()

    @property
    @abstractmethod
    def needs(self) -> str | None:
        """The place of the job that must have succeeded before this one can run."""

    @abstractmethod
    def run(self, out: Path, data_dir: Path | None) -> None:
        """Run in ``out / place``; an earlier attempt is resumed."""

    def done(self, out: Path) -> bool:
        """Whether ``out / place`` holds this run, finished."""
        found = self.record(out)
        return found is not None and found.status == "done"

    def record(self, out: Path) -> Record | None:
        """The record of this run, finished or not; ``None`` where it is missing or damaged."""
        path = out / self.place / "record.json"
        if not path.exists():
            return None
        try:
            found = read_record(path)
        except RequestError:  # the run itself reports the damage
            return None
        return found if found.config_key == self.config.key() else None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DistillationJob(Job):
    """Distil a set and measure it. control: the place of the clean twin, if the attack has one.

    keep_victims: whether to store the trained victims for other jobs.
    """

    control: str | None = None
    keep_victims: bool = True

    @property
    def needs(self) -> str | None:
        return self.control

    def run(self, out: Path, data_dir: Path | None) -> None:
        place, experts = out / self.place, experts_key(self.config)
        run_cell(
            self.config,
            place,
            data_dir=data_dir,
            resume=place.exists(),
            control_run=None if self.control is None else out / self.control,
            buffer=None if experts is None else out / _EXPERTS / experts,
            train=VictimStore(out / _VICTIMS, keep=self.keep_victims).victim,
            reporter=Reporter(quiet=True),
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DefenseJob(Job):
    """Measure defenses on the set of the run in ``source``. control: as in ``DistillationJob``."""

    source: str
    control: str | None
    defenses: Mapping[str, Defense]
    bench: BenchOptions

    @property
    def needs(self) -> str | None:
        return self.source

    def run(self, out: Path, data_dir: Path | None) -> None:
        place = out / self.place
        defend(
            out / self.source,
            self.config,
            place,
            defenses=self.defenses,
            options=self.bench,
            given=("network", "victims"),
            control_run=None if self.control is None else out / self.control,
            data_dir=data_dir,
            resume=place.exists(),
            store=VictimStore(out / _VICTIMS),
            reporter=Reporter(quiet=True),
        )

    def done(self, out: Path) -> bool:
        found = self.record(out)
        if found is None or found.status != "done":
            return False
        return set(self.defenses) <= set(reusable_outcomes(found, self.defenses))


def defense_job(
    source: DistillationJob,
    place: str,
    network: str | None,
    defenses: Mapping[str, Defense],
    bench: BenchOptions,
) -> DefenseJob:
    """Defenses of ``source``'s set; ``network``: the victims' (default: the distilling one)."""
    keys = source.config.flat() | ({"victim_network": network} if network else {})
    return DefenseJob(
        place=place,
        config=configure(**keys),
        source=source.place,
        control=source.control,
        defenses=defenses,
        bench=bench,
    )


def experts_key(config: Config) -> str | None:
    """A hash of everything that a run's experts depend on; ``None`` for a backend without experts.

    Runs with the same key share a buffer. An attack that changes while experts train shares none.
    """
    wanted = config.backend_class().expert_options
    if not wanted:
        return None
    if config.attack and config.attack_class().on_network is not Hook.on_network:
        return config.key()
    options = config.backend.model_dump(mode="json", include=set(wanted))
    parts: dict[str, Any] = {
        "backend": config.set.backend,
        "options": options,
        "data": config.data.model_dump(mode="json"),
        "network": config.network.model_dump(mode="json"),
        "attack": config.attack,
        "attack_options": config.attack_options and config.attack_options.model_dump(mode="json"),
        "machine": [config.run.device, config.run.threads],
        "seed": config.run.seed,
    }
    if config.attack is None and options.get("expert_seed") is not None:
        del parts["seed"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def share_experts(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, where the first of several with the same experts runs before the others: it trains
    the experts, and the others find them."""
    first: dict[str, str] = {}

    def after_first(job: Job) -> Job:
        key = experts_key(job.config) if isinstance(job, DistillationJob) else None
        trainer = job.place if key is None else first.setdefault(key, job.place)
        return job if trainer == job.place else replace(job, after=(*job.after, trainer))

    return [after_first(job) for job in jobs]
