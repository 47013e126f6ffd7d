"""Which runs go together: a resumed one with its folder, a clean twin with its attack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...distill.files.artifact import load_set
from ...distill.types import RequestError
from ..config.schema import Config
from ..results.record import Record, read_record


def check_same_run(earlier: Record, wanted: Record, out: Path) -> None:
    """Refuse to resume a run whose configuration or data was another one."""
    if earlier.kind != wanted.kind:
        hint = ": take it up with --seeds N" if earlier.kind == "seeds" else ""
        raise RequestError(f"{out} holds a run of kind {earlier.kind}, not {wanted.kind}{hint}")
    if earlier.config_key != wanted.config_key:
        raise RequestError(
            f"{out} holds another run; it can't be resumed with "
            f"{_differences(earlier.config, wanted.config)}"
        )
    if earlier.dataset != wanted.dataset:
        raise RequestError(f"{out} was begun on other data: {wanted.config['dataset']} has changed")
    if earlier.distilled.get("fingerprint") != wanted.distilled.get("fingerprint"):
        raise RequestError(f"{out} was begun on another set, trigger or recipe")


def check_control(path: Path, config: Config, dataset: Mapping[str, Any]) -> None:
    """Refuse a clean twin that isn't this configuration's, on this data, finished and readable."""
    if not config.attack or not config.victims.control:
        raise RequestError("--control-run is for a run with an attack, and not with --no-control")
    record = read_record(path / "record.json")
    if record.status != "done" or record.kind != "distill":
        raise RequestError(f"{path} is no finished clean run: {record.kind}, {record.status}")
    if record.control_key != config.control_key():
        told = _differences(record.config, config.without_attack().flat())
        raise RequestError(f"{path} is no clean twin of this run; it differs in {told}")
    if record.dataset != dataset:
        raise RequestError(f"{path} is no clean twin of this run: {dataset['name']} has changed")
    load_set(path / "distilled.safetensors")


def check_device(device: str) -> None:
    """Refuse a CUDA device that this machine hasn't got."""
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise RequestError(f"there is no {device} here: {count} CUDA devices were found")


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine, and not the code, is at fault; on a CPU torch has no type for it."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _differences(earlier: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first few keys that differ, with both values."""
    keys = sorted({*earlier, *wanted} - {"control"})
    changed = [key for key in keys if earlier.get(key) != wanted.get(key)]
    told = ", ".join(f"{key} {wanted.get(key)!r} (was {earlier.get(key)!r})" for key in changed[:3])
    return told + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
