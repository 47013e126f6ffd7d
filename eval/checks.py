"""Which runs go together: a resumed one with its folder, a clean twin with its attack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..distill.types import RequestError
from .config import Config
from .record import Record, read_record


def check_same_run(earlier: Record, wanted: Record, out: Path) -> None:
    """Refuse to resume a run whose configuration or data was another one."""
    if earlier.config_key != wanted.config_key:
        raise RequestError(
            f"{out} holds another run; it can't be resumed with "
            f"{_differences(earlier.config, wanted.config)}"
        )
    if earlier.dataset != wanted.dataset:
        raise RequestError(f"{out} was begun on other data: {wanted.config['dataset']} has changed")


def check_control(path: Path, config: Config) -> None:
    """Refuse a clean twin that isn't this configuration's."""
    record = read_record(path / "record.json")
    if record.status != "done" or record.kind != "distill":
        raise RequestError(f"{path} is no finished clean run: {record.kind}, {record.status}")
    if record.control_key == config.control_key():
        return
    told = _differences(record.config, config.without_attack().flat())
    raise RequestError(f"{path} is no clean twin of this run; it differs in {told}")


def _differences(earlier: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first few keys that differ, with both values."""
    keys = sorted({*earlier, *wanted} - {"control"})
    changed = [key for key in keys if earlier.get(key) != wanted.get(key)]
    told = ", ".join(f"{key} {wanted.get(key)!r} (was {earlier.get(key)!r})" for key in changed[:3])
    return told + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
