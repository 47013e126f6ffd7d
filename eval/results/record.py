"""The record of a run: the versioned JSON that tables, reports and checks read."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from ...defenses.base import Budget, Family
from ...defenses.tuned import Tuning
from ...distill.files.safe import read_json, write_json
from ...distill.types import RequestError
from .metrics import Summary
from .record_parts import (
    BenchMapping,
    ConfigMapping,
    ControlMapping,
    SetMapping,
    TriggerMapping,
    first_fault,
)
from .version import installed_version

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

RECORD_FILE = "record.json"
SCHEMA_VERSION = 1
_PACKAGES = ("torch", "torchvision", "kornia", "numpy", "scikit-learn", "scipy", "safetensors")

RecordKind = Literal["attack", "distill", "evaluate", "seeds", "defend"]
RunStatus = Literal["running", "done", "interrupted", "error"]
Metrics = dict[str, Summary]


@final
class Outcome(BaseModel):
    """The result of one defense.

    status: ``done``; ``not applicable`` or ``error`` with the reason. caution: why the figures say
    little although the defense ran. metrics: over victims; the clean twin's have the prefix
    ``control_``. tuning: for the tuned budget, what was tried on the attacked set and on its twin.
    """

    model_config = ConfigDict(extra="forbid")

    family: Family
    status: Literal["done", "not applicable", "error"]
    reason: str | None = None
    caution: str | None = None
    budget: Budget
    options: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    metrics: Metrics = Field(default_factory=dict)
    tuning: dict[str, Tuning] = Field(default_factory=dict)


@final
class Failure(BaseModel):
    """A failed run of a suite or a sweep: its folder there, and the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: str
    reason: str


@final
class Survived(BaseModel):
    """What one variant of a set measured. error: why there are no metrics."""

    model_config = ConfigDict(extra="forbid")

    metrics: Metrics = Field(default_factory=dict)
    error: str | None = None


@final
class Record(BaseModel):
    """The configuration, environment and results of a run.

    config: the resolved flat configuration; config_given: the keys that were not defaults.
    config_key, control_key: hashes of the configuration, and of its part without the attack.
    hooks: the attack's hooks in their order, with the threat model of each.
    metrics: of the primary victim network. metrics_by_network: of the others, never pooled.
    conditional_on_set: true where intervals are over victims of one distilled set; false where
    they are over distillation seeds.
    buffer: the folder of expert buffers, where one was given.
    bench: the options of all defenses (budget, holdout, images). defenses: their outcomes.
    survival: of the variants of a set, by name, in the order of the table.
    labels: warnings that stand beside a figure in every table, such as an unbounded trigger.
    objects: by key (``attack``, ``defenses``), the names that stand for objects given in Python; no
    record can load them. The file has it only where there are any.
    """

    model_config = ConfigDict(extra="forbid")
    _folder: Path | None = PrivateAttr(None)

    schema_version: int = SCHEMA_VERSION
    kind: RecordKind
    status: RunStatus = "running"
    error: str | None = None
    config: ConfigMapping
    config_given: list[str] = Field(default_factory=list)
    config_key: str
    control_key: str
    environment: dict[str, Any] = Field(default_factory=dict)
    command: str = ""
    dataset: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    hooks: list[dict[str, str]] = Field(default_factory=list)
    trigger: TriggerMapping = None
    attack_counters: dict[str, Any] = Field(default_factory=dict)
    distilled: SetMapping = Field(default_factory=dict)
    control: ControlMapping = None
    buffer: str | None = None
    labels: list[str] = Field(default_factory=list)
    timings: dict[str, float] = Field(default_factory=dict)
    conditional_on_set: bool = True
    metrics: Metrics = Field(default_factory=dict)
    metrics_by_network: dict[str, Metrics] = Field(default_factory=dict)
    seeds: list[int] | None = None
    bench: BenchMapping = Field(default_factory=dict)
    defenses: dict[str, Outcome] = Field(default_factory=dict)
    survival: dict[str, Survived] = Field(default_factory=dict)
    objects: dict[str, list[str]] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_empty_objects(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        if not self.objects:
            values.pop("objects", None)
        return values

    def write(self, path: Path) -> None:
        """Write atomically as JSON."""
        write_json(path, self.model_dump(mode="json"))
        self._folder = path.parent

    @property
    def folder(self) -> Path:
        """The run's folder: that from which the record was read, or to which it was written.

        Errors: ``RequestError`` for a record that is in no folder.
        """
        if self._folder is None:
            raise RequestError("this record is in no folder")
        return self._folder

    def mean(self, metric: str) -> float | None:
        """The mean of a metric of the primary network; ``None`` where it was not measured."""
        summary = self.metrics.get(metric)
        return summary.mean if summary else None

    # In a notebook -------------------------------------------------------------------------------

    def __repr__(self) -> str:
        from .glance import short_text

        return short_text(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        from .glance import as_html

        return as_html(self)

    def to_frame(self) -> DataFrame:
        """A pandas data frame with a row for each measured value (``frame.record_frame``)."""
        from .frame import record_frame

        return record_frame(self)

    def plot(self, axes: Axes | None = None) -> Axes:
        """CTA and ASR with intervals on ``axes``, or on those of a new matplotlib figure."""
        from .glance import plot_record

        return plot_record(self, axes)


def read_record(path: Path | str) -> Record:
    """The record in a run's folder, or in a file.

    Errors: ``RequestError`` naming the file where it is missing, damaged or of another schema.
    """
    path = Path(path)
    file = path / RECORD_FILE if path.is_dir() else path
    record = record_from(file, read_json(file))
    record._folder = file.parent
    return record


def record_from(path: Path, found: object) -> Record:
    """The record that JSON of the file ``path`` holds. Errors: as for ``read_record``."""
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        have = f"found {version!r:.40}"
        raise RequestError(f"{path} is no record of schema {SCHEMA_VERSION} ({have})")
    try:
        return Record.model_validate(found)
    except ValidationError as error:
        raise RequestError(f"{path} is damaged: {first_fault(error)}") from error


def environment(device: str) -> dict[str, Any]:
    """Versions, commit, device and start time of this process."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor()
    return {
        "distillsec": installed_version(),
        **commit(),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(terse=True),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> dict[str, Any]:
    """``commit`` and ``dirty`` where the package runs from a checkout, else ``None`` for both."""
    folder = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def command_line() -> str:
    """The command line of this process, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
