"""The configuration of one run: frozen sections, one flat set of keys for people.

A person writes ``{"dataset": "digits", "attack": "naive", "trigger_size": 3}``, in YAML or as
options; ``configure`` sorts the keys into the sections below and refuses a wrong one in one line.
Which keys exist depends on the backend and the attack, since each has its own options.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from joblib import cpu_count
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from ...attacks import ATTACKS, Attack, AttackOptions
from ...distill.augment import parse_strategy
from ...distill.backends import BACKENDS
from ...distill.core.backend import Backend, BackendOptions
from ...distill.data.registry import dataset_entry
from ...distill.engine import Precision, Speed
from ...distill.networks.registry import NetworkSpec
from ...distill.plugins import is_reference, load_object, look_up_installed
from ...distill.types import RequestError


class Section(BaseModel):
    """Base of the sections: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@final
class DataSection(Section):
    """What is distilled."""

    dataset: str = Field("digits", description="a name of `list datasets`, folder:PATH or npz:PATH")
    image_size: int | None = Field(None, ge=4, le=1024, description="resize to this side")
    zca: bool = Field(
        False, description="ZCA whitening of the images, fitted on the clean training set"
    )


@final
class SetSection(Section):
    """The distilled set: how it is made, and how large it is."""

    backend: str = Field("dc", description="a name of `list backends`, or package.module:Class")
    ipc: int = Field(1, ge=1, le=10_000, description="synthetic images per class")


@final
class VictimSection(Section):
    """The networks trained on the set to measure it."""

    victims: int = Field(
        5, ge=1, le=10_000, description="networks trained on the set, fresh weights each"
    )
    victim_network: tuple[str, ...] = Field(
        (), description="their architectures, the first is primary (default: the distilling one)"
    )
    victim_epochs: int | None = Field(
        None, ge=1, description="training epochs (default: the backend's published recipe)"
    )
    victim_lr: float | None = Field(
        None,
        gt=0,
        description="SGD learning rate, a tenth after half (default: 0.01, or the learned one)",
    )
    victim_augment: str | None = Field(
        None, description="siamese operations joined by _, or none (default: the backend's)"
    )
    control: bool = Field(True, description="also distil the clean twin: the control")

    @field_validator("victim_network", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@final
class RunSection(Section):
    """Seed and machine: another seed, device or thread count gives another result."""

    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="the distillation seed; all random streams derive from it",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads; another count gives other bits (0: all cores)"
    )
    curve_every: int = Field(
        0, ge=0, description="iterations between two victims for the learning curve (0: no curve)"
    )
    speed: Speed | None = Field(
        None,
        description="plain: the reference path; fast: compiled passes, and CUDA graphs on a GPU "
        "(default: fast on a GPU, plain on a CPU, where compiling pays for long runs only)",
    )
    precision: Precision | None = Field(
        None,
        description="of products on a GPU: float32, tf32, or bf16 for fast passes without a second "
        "derivative (default: tf32 on a GPU, float32 elsewhere)",
    )
    deterministic: bool = Field(
        False, description="the same bits for the same seed on a GPU too, at a price"
    )

    @model_serializer(mode="wrap")
    def _without_newer_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later where it says what held before: hashes stay as they were."""
        values: dict[str, Any] = dump(self)
        before: dict[str, object] = {
            "precision": usual_precision(self.device),
            "deterministic": False,
        }
        if not on_gpu(self.device):
            before["speed"] = "plain"
        return {k: v for k, v in values.items() if k not in before or v not in (before[k], None)}


@final
class Config(Section):
    """One run, complete. ``attack`` is ``None`` for a clean distillation."""

    data: DataSection = DataSection()
    network: NetworkSpec = NetworkSpec()
    set: SetSection = SetSection()
    backend: SerializeAsAny[BackendOptions]
    attack: str | None = None
    attack_options: SerializeAsAny[AttackOptions] | None = None
    victims: VictimSection = VictimSection()
    run: RunSection = RunSection()

    def flat(self) -> dict[str, Any]:
        """The flat keys, as ``configure`` and YAML files take them."""
        keys: dict[str, Any] = {"attack": self.attack} if self.attack else {}
        for part in self._parts():
            keys.update(part.model_dump(mode="json"))
        return keys

    def _parts(self) -> Iterable[BaseModel]:
        parts = (self.data, self.network, self.set, self.backend, self.attack_options)
        return (part for part in (*parts, self.victims, self.run) if part is not None)

    def key(self) -> str:
        """A hash of the whole configuration."""
        return _hash(self.flat())

    def control_key(self) -> str:
        """A hash of all but the attack: runs with the same one share a clean twin."""
        return _hash(self.without_attack().flat())

    def without_attack(self) -> Config:
        """The clean twin's configuration."""
        victims = self.victims.model_copy(update={"control": False})
        changes = {"attack": None, "attack_options": None, "victims": victims}
        return self.model_copy(update=changes)

    def backend_class(self) -> type[Backend]:
        """The backend's class."""
        return find_backend(self.set.backend)

    def attack_class(self) -> type[Attack]:
        """The attack's class; only for a configuration that has one."""
        if self.attack is None:
            raise RequestError("this configuration has no attack")
        return find_attack(self.attack)


def find_backend(name: str) -> type[Backend]:
    """A backend by name or ``package.module:Class``; ``RequestError`` where there is none."""
    found: type[Backend] = find_class(name, BACKENDS, Backend, "backend")
    return found


def find_attack(name: str) -> type[Attack]:
    """An attack by name or ``package.module:Class``; ``RequestError`` where there is none."""
    found: type[Attack] = find_class(name, ATTACKS, Attack, "attack")
    return found


def find_class(name: str, registry: Mapping[str, Any], base: type[Any], what: str) -> Any:
    """A subclass of ``base`` by name or ``package.module:Class``; else a ``RequestError``.

    Names are those of the ``registry`` and of the entry points of installed packages.
    """
    if not isinstance(name, str):  # a number in YAML
        raise RequestError(f"{what}: expected a name, got {name!r}")
    if name in registry:
        return registry[name]
    named = is_reference(name)
    found = load_object(name, what) if named else look_up_installed(name, registry, what)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise RequestError(f"{what} {name} is not a subclass of distillsec's {base.__name__}")
    return found


def configure(**keys: Any) -> Config:
    """A configuration from flat keys; the others have their defaults.

    Errors: ``RequestError``, one line, for an unknown key (with close ones suggested), a key of
    another attack or backend, and an impossible value.
    """
    given = {key: value for key, value in keys.items() if value is not None}
    backend = find_backend(given.get("backend", SetSection().backend))
    attack = find_attack(given["attack"]) if given.get("attack") else None
    models: dict[str, type[BaseModel]] = {
        "data": DataSection,
        "network": NetworkSpec,
        "set": SetSection,
        "backend": backend.Options,
        "victims": VictimSection,
        "run": RunSection,
    }
    if attack:
        models["attack_options"] = attack.Options
    _refuse_unknown(given, models)
    parts: dict[str, Any] = {
        name: _build(model, {k: given[k] for k in model.model_fields if k in given})
        for name, model in models.items()
    }
    parts["run"] = _resolve_machine(parts["run"])
    flips = dataset_entry(parts["data"].dataset).flips
    parts["backend"] = _resolve_augment(parts["backend"], "augment" in given, flips)
    parts["victims"] = _resolve_recipe(parts["victims"], backend, flips)
    return Config(attack=given.get("attack"), **parts)


def _build(model: type[BaseModel], values: Mapping[str, Any]) -> BaseModel:
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "configuration"
        got = reprlib.repr(first.get("input"))
        raise RequestError(f"{key}: {first['msg'].lower()}, got {got}") from error


def build_options(model: type[BaseModel], values: Mapping[str, Any], owner: str) -> Any:
    """``model(**values)``; a wrong key or value is a ``RequestError`` that names the ``owner``."""
    for key in values:
        if key not in model.model_fields:
            takes = ", ".join(model.model_fields) or "none"
            raise RequestError(f"{owner} has no option {key}; it takes {takes}")
    try:
        return _build(model, values)
    except RequestError as error:
        raise RequestError(f"{owner}: {error}") from error


def _refuse_unknown(given: Mapping[str, Any], models: Mapping[str, type[BaseModel]]) -> None:
    known = {"attack"}.union(*(model.model_fields for model in models.values()))
    for key in given:
        if key in known:
            continue
        owners = [name for name, options in _all_options() if key in options.model_fields]
        if owners:
            raise RequestError(f"{key} is an option of {', '.join(owners)}, not of what was chosen")
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; --print-config lists the keys"
        raise RequestError(f"there is no configuration key {key!r}{hint}")


def _all_options() -> Iterable[tuple[str, type[BaseModel]]]:
    yield from ((name, attack.Options) for name, attack in ATTACKS.items())
    yield from ((name, backend.Options) for name, backend in BACKENDS.items())


def _resolve_augment(options: Any, chosen: bool, flips: bool) -> Any:
    """A backend's own augmentation, without flips where they change an image's meaning."""
    if "augment" not in type(options).model_fields:
        return options
    if chosen:
        parse_strategy(options.augment)
        return options
    return options.model_copy(update={"augment": without_flips(options.augment, flips)})


def _resolve_recipe(victims: VictimSection, backend: type[Backend], flips: bool) -> VictimSection:
    """The victims' recipe: the backend's published one, with what was given in its place."""
    augment = victims.victim_augment
    augment = without_flips(backend.victim_augment, flips) if augment is None else augment
    return victims.model_copy(
        update={
            "victim_epochs": victims.victim_epochs or backend.victim_epochs,
            "victim_lr": victims.victim_lr or backend.victim_lr,
            "victim_augment": "_".join(parse_strategy(augment)),
        }
    )


def without_flips(augment: str, flips: bool) -> str:
    """``augment``, without flips unless ``flips`` allows them."""
    return "_".join(part for part in augment.split("_") if flips or part != "flip")


def _resolve_machine(run: RunSection) -> RunSection:
    """Device and thread count made explicit: a result depends on both.

    Whether the device exists is checked on the machine that runs it.
    """
    device = run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    speed = run.speed or ("fast" if on_gpu(device) else "plain")
    precision = run.precision or usual_precision(device)
    if precision == "tf32" and not on_gpu(device):
        raise RequestError(f"precision tf32 is a GPU's: {device} takes float32 or bf16")
    if precision == "bf16" and speed == "plain":
        raise RequestError("precision bf16 needs the fast path: --speed fast")
    threads = run.threads or cpu_count()
    found = {"device": device, "threads": threads, "speed": speed, "precision": precision}
    return run.model_copy(update=found)


def on_gpu(device: str) -> bool:
    """Whether ``device`` is a CUDA GPU; "auto" is not yet one."""
    return device.startswith("cuda")


def usual_precision(device: str) -> Precision:
    """What a device's products are computed in unless asked otherwise."""
    return "tf32" if on_gpu(device) else "float32"


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    numbered = kind == "cuda" and number.isdecimal()
    if not (numbered or device in ("cpu", "cuda", "mps")):
        raise RequestError(f"device must be auto, cpu, cuda, cuda:N or mps, got {device!r}")


def _hash(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
