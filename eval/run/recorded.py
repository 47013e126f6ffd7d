"""What of a record's configuration is used: of a set to be measured, or a run to be resumed.

A record is data: a class or path that it names is used only where the user names it too, or trusts
the record.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from ...distill.types import RequestError
from ..config.received import MACHINE, machine_keys, received_keys
from ..results.record import Record, read_record
from .checks import check_objects
from .folder import RunFolder

# What measuring a set needs.
_NEEDED: Final = ("dataset", "network", "victim_network")

Keys = Mapping[str, Any]


def source_keys(record: Record, place: Path, own: Keys, *, trust: bool) -> dict[str, Any]:
    """The keys of the ``record`` in the run folder ``place`` that measuring its set takes.

    own: the user's keys, which win.
    Errors: ``RequestError`` where the network or the data is a class, a path or an object, and
    neither ``own`` nor trusted.
    """
    chosen = {"network", "victim_network"} & own.keys()
    return _keys(record, place, own, _NEEDED[:1] if chosen else _NEEDED, trust=trust)


def resumed_keys(folder: RunFolder, own: Keys, *, trust: bool) -> dict[str, Any]:
    """The keys of the run in ``folder`` that is to be resumed: options may be left out.

    Errors: as for ``source_keys``, for any of its keys.
    """
    if own and not folder.record.exists():
        return {}
    record = read_record(folder.record)
    values = _keys(record, folder.path, own, record.config.keys(), trust=trust)
    return {**machine_keys(record.config), **values}


def _keys(
    record: Record, place: Path, own: Keys, needed: Collection[str], *, trust: bool
) -> dict[str, Any]:
    check_objects(record, place, {*own, *(record.objects.keys() - needed)})
    if trust:
        machine = {key: record.config[key] for key in MACHINE & record.config.keys()}
        return {**received_keys(record.config, own, record.objects).keys, **machine}
    received = received_keys(record.config, own)
    for key, value in received.refused.items():
        if key in needed and key not in own:
            named = " ".join(value) if isinstance(value, list) else value
            name = "name the data with --dataset" if key == "dataset" else f"name its {key} again"
            raise RequestError(
                f"{place} was made with {key} {named}, which a record is not trusted to name: "
                f"{name}, or use --trust for a run of your own"
            )
    return dict(received.keys)
