"""A plan: runs in folders below one folder, and which of them must be there before which."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from ...defenses.base import Defense
from ...distill.core.hooks import Hook
from ...distill.types import RequestError
from ..bench.bench import BenchOptions
from ..bench.defend import defend, still_true
from ..bench.store import VictimStore
from ..config.schema import Config, configure
from ..results.record import Record, read_record
from ..run.cell import run_cell
from ..run.progress import Reporter

_EXPERTS = "experts"
_VICTIMS = "victims"


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece(ABC):
    """One run of a plan: the unit of work, of retries, and of resuming.

    place: its folder, below the plan's. config: what it runs. after: places that go first; a piece
    whose ``control`` or ``source`` among them failed can't run, the others only go first.
    """

    place: str
    config: Config
    after: tuple[str, ...] = ()

    @property
    @abstractmethod
    def needs(self) -> str | None:
        """The one place without whose finished run this one can't be."""

    @abstractmethod
    def run(self, out: Path, data_dir: Path | None) -> None:
        """Do it, in ``out / place``, from wherever an earlier attempt stopped."""

    def done(self, out: Path) -> bool:
        """Whether ``out / place`` holds this run, finished."""
        found = self.record(out)
        return found is not None and found.status == "done"

    def record(self, out: Path) -> Record | None:
        """This run's record, however far it came; ``None`` where there is none that is whole."""
        path = out / self.place / "record.json"
        if not path.exists():
            return None
        try:
            found = read_record(path)
        except RequestError:  # damaged: the run itself says so
            return None
        return found if found.config_key == self.config.key() else None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Distillation(Piece):
    """Distil and measure. control: the place of the clean twin, for an attack that has one.

    keep_victims: whether the trained victims are kept for others that want the same.
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
class Defending(Piece):
    """Set defenses against the set of the run in ``source``."""

    source: str
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
            given=("victims",),
            data_dir=data_dir,
            resume=place.exists(),
            store=VictimStore(out / _VICTIMS),
            reporter=Reporter(quiet=True),
        )

    def done(self, out: Path) -> bool:
        found = self.record(out)
        if found is None or found.status != "done":
            return False
        return set(self.defenses) <= set(still_true(found, self.defenses))


def defended(
    source: Distillation,
    place: str,
    network: str | None,
    defenses: Mapping[str, Defense],
    bench: BenchOptions,
) -> Defending:
    """Defenses of ``source``'s set; ``network``: the victims' (default: the distilling one)."""
    keys = source.config.flat() | ({"victim_network": network} if network else {})
    return Defending(
        place=place,
        config=configure(**keys),
        after=(source.place,),
        source=source.place,
        defenses=defenses,
        bench=bench,
    )


def experts_key(config: Config) -> str | None:
    """A hash of what a run's experts depend on; ``None`` for a backend without experts.

    Runs that share it share a buffer. An attack that moves with the experts shares with nobody.
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


def in_sequence(pieces: list[Piece]) -> list[Piece]:
    """The pieces, those that train the same experts one after the first of them.

    So the first trains them, and the others find them.
    """
    first: dict[str, str] = {}

    def after_the_first(piece: Piece) -> Piece:
        key = experts_key(piece.config) if isinstance(piece, Distillation) else None
        leader = piece.place if key is None else first.setdefault(key, piece.place)
        return piece if leader == piece.place else replace(piece, after=(*piece.after, leader))

    return [after_the_first(piece) for piece in pieces]
