"""The record of an audit: a versioned JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from ...distill.files.safe import write_json
from .calibration import Conditions
from .verdict import VerdictName


@final
class ClassFinding(BaseModel):
    """What was found of one class.

    evidence: by kind, larger for a likelier target. size: of its patch, in pixels. held_out,
    other_network: the share of images of other classes that its patch sends there, on victims that
    the search did not see and on one of another architecture.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    evidence: dict[str, float]
    size: float
    held_out: float
    other_network: float


@final
class AuditRecord(BaseModel):
    """The verdict on a set with its evidence.

    suspect: the suspected target's number. score: in deviations of clean sets; parts: what each
    kind of evidence gave. as_high: the share of sets with a score as high, this one among them.
    smallest_rate: the smallest false-alarm rate that the calibration can state. accuracy: the
    victims', on clean images. structure: what the set's values show. labels: what was assumed when
    the set was read. Missing figures are ``None``.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    kind: Literal["audit"] = "audit"
    source: str
    verdict: VerdictName
    reason: str
    advice: str
    suspect: int | None = None
    suspect_class: str | None = None
    score: float | None = None
    parts: dict[str, float] = Field(default_factory=dict)
    as_high: float | None = None
    false_alarms: float
    clean_sets: int = 0
    smallest_rate: float | None = None
    accuracy: float | None = None
    classes: list[ClassFinding]
    structure: list[str] = Field(default_factory=list)
    labels: list[str] = Field(default_factory=list)
    conditions: Conditions
    victims: int
    seconds: float
    distilled: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    command: str = ""

    def write(self, path: Path) -> None:
        """Write atomically as JSON."""
        write_json(path, self.model_dump(mode="json"))
