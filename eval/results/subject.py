"""What a record is about, in one line."""

from __future__ import annotations

from typing import Any

from .record import Record


def subject(record: Record, *, unattacked: str = "clean") -> str:
    """The data, the distillation and the attack; of a measured set where it is from and its size.

    A set that was evaluated or defended may be another person's: nothing is said of how it was made
    but what its own record claims. An interceptor's attack is named after it. unattacked: what
    stands in the place of an attack.
    """
    config, measured = record.config, record.distilled
    if not measured.get("origin"):
        ipc = f"IPC {config['ipc']}" if "ipc" in config else None
        made = (config.get("dataset"), config.get("backend"), ipc, config.get("network"))
        return " · ".join(str(part) for part in (*made, config.get("attack") or unattacked) if part)
    size = f"{measured.get('images')} images, {_span(measured.get('per_class') or [0])} per class"
    tested = f"tested on {config.get('dataset')}"
    last = config.get("attack") if record.kind == "attack" else tested
    return " · ".join((str(measured.get("source")), size, measured["origin"], str(last)))


def objects_text(record: Record) -> str:
    """Which names of the configuration stand for objects given in Python; empty for none."""
    named = [f"{key} {', '.join(names)}" for key, names in record.objects.items()]
    return f"given as objects in Python: {'; '.join(named)}" if named else ""


def victims_text(config: dict[str, Any]) -> str:
    """The victims' networks; of the distilling one also what of it was set."""
    own = str(config.get("network"))
    keys = ("width", "depth", "norm", "activation", "pooling", "head")
    found = [f"{key} {config[key]}" for key in keys if config.get(key) is not None]
    texts = {own: ", ".join([own, *found])}
    return "; ".join(texts.get(name, name) for name in config.get("victim_network") or [own])


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
