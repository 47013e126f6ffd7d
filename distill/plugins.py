"""Names that a user gives: looked up in a registry, or imported as ``package.module:Name``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from .types import RequestError

Entry = TypeVar("Entry")


def look_up(name: str, registry: Mapping[str, Entry], what: str) -> Entry:
    """``registry[name]``; or a ``RequestError`` that lists the names and suggests a close one.

    ``what`` names an entry in messages ("network", "attack").
    """
    if name in registry:
        return registry[name]
    message = f"unknown {what} {name!r}; there are {', '.join(registry)}"
    close = difflib.get_close_matches(name.lower(), registry, n=1)
    raise RequestError(f"{message}; did you mean {close[0]}?" if close else message)


def is_reference(name: str) -> bool:
    """Whether ``name`` is meant as ``package.module:Name`` and not as a registry's key."""
    return ":" in name


def load_object(reference: str, what: str) -> Any:
    """The object that ``package.module:Name`` names; nested names (``Outer.Inner``) are allowed.

    Modules in the current directory are found too, after all others. Errors: ``RequestError`` of
    one line where the object cannot be loaded; its cause is the module's own exception, if any.
    """
    module_name, colon, name = reference.partition(":")
    parts = (*module_name.split("."), *name.split("."))
    if not colon or not all(part.isidentifier() for part in parts):
        raise RequestError(f"{what} {reference!r} is not of the form package.module:Name")
    found: Any = _import(module_name, f"{what} {reference!r}")
    for part in name.split("."):
        if not hasattr(found, part):
            raise RequestError(f"{what} {reference!r}: module {module_name} has no {name}")
        found = getattr(found, part)
    return found


def _import(module_name: str, asked: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        with _current_directory_importable():
            return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RequestError(f"{asked}: there is no module {error.name}") from error
    # The user's code runs here and may raise anything.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(f"{asked}: importing {module_name} failed: {reason}") from error


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        # The import may itself have changed sys.path.
        if here in sys.path:
            sys.path.remove(here)
