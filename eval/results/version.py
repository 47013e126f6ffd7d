"""The version of the suite, without importing more than the standard library."""

from __future__ import annotations

from importlib import metadata


def installed_version() -> str:
    """The installed version of the suite, ``unknown`` in a bare checkout."""
    try:
        return metadata.version("distillsec")
    except metadata.PackageNotFoundError:
        return "unknown"


__version__ = installed_version()
