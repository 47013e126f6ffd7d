"""What tables, reports and resumed runs read of the free mappings in a record, with its types.

A record may come from another person: each mapping is checked as one of these when it is read, and
stays a mapping, which may have other keys too and, unless it is a trigger, may lack any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar, final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ...defenses.base import Budget
from ...distill.files.safe import fault

_TableModel = TypeVar("_TableModel", bound=BaseModel)
_Count = Annotated[int, Field(ge=0)]


class _RecordPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


@final
class _ConfigPart(_RecordPart):
    attack: str | None = None
    dataset: str = ""
    network: str = ""
    backend: str = ""
    ipc: _Count = 0
    iterations: _Count = 0
    victims: _Count = 0
    victim_network: list[str] = []
    seed: _Count = 0
    device: str = ""
    threads: _Count = 0


@final
class _TriggerPart(_RecordPart):
    kind: str
    range: str = ""
    min: float
    max: float
    l2: float = 0.0
    linf: float = 0.0
    target: int | None
    target_class: str
    source: int = 0
    source_class: str = ""
    psnr: float | None = None
    ssim: float | None = None


@final
class _ReferencePart(_RecordPart):
    linf: float
    l2: float
    rms: float
    pairs: _Count


@final
class _SetPart(_RecordPart):
    images: _Count = 0
    per_class: list[_Count] = []
    pixel_range: list[float] = []
    rms_from_twin: float | None = None
    linf_from_twin: float | None = None
    l2_from_twin: float | None = None
    reference_distance: _ReferencePart | None = None
    source: str = ""
    origin: str = ""
    fingerprint: str = ""


@final
class _ControlPart(_RecordPart):
    folder: str
    key: str = ""
    reused: bool = False


@final
class _BenchPart(_RecordPart):
    budget: Budget = "quick"
    holdout: _Count = 0
    images: int | None = None


def first_fault(error: ValidationError) -> str:
    """Where the first fault is and what is wrong, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def table_from(model: type[_TableModel], version: int, file: Path, found: Any) -> _TableModel:
    """The table of a sweep or a suite that JSON of ``file`` holds.

    Errors: ``RequestError`` naming the file where it is damaged or of another schema.
    """
    have = found.get("schema_version") if isinstance(found, dict) else None
    if have != version:
        raise fault(file, f"is no table of schema {version} (found {have!r:.40})")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise fault(file, f"is damaged: {first_fault(error)}") from None


def _checked(model: type[BaseModel]) -> AfterValidator:
    def check(found: dict[str, Any] | None) -> dict[str, Any] | None:
        if found:
            try:
                model.model_validate(found)
            except ValidationError as error:
                what = {"fault": first_fault(error)}
                raise PydanticCustomError("record_part", "{fault}", what) from error
        return found

    return AfterValidator(check)


ConfigMapping = Annotated[dict[str, Any], _checked(_ConfigPart)]
TriggerMapping = Annotated[dict[str, Any] | None, _checked(_TriggerPart)]
SetMapping = Annotated[dict[str, Any], _checked(_SetPart)]
ControlMapping = Annotated[dict[str, Any] | None, _checked(_ControlPart)]
BenchMapping = Annotated[dict[str, Any], _checked(_BenchPart)]
