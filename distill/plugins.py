"""Names that a user gives: looked up in a registry, among the entry points of installed packages,
or imported as ``package.module:Name``; and objects that are given in place of a name."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from .types import RequestError

Entry = TypeVar("Entry")
_NO_OBJECTS: Mapping[str, Any] = {}
_OBJECTS: ContextVar[Mapping[str, Any]] = ContextVar("objects given by the user")


def look_up(name: str, registry: Mapping[str, Entry], what: str) -> Entry:
    """``registry[name]``; or a ``RequestError`` that lists the names and suggests a close one.

    ``what`` names an entry in messages ("network", "attack").
    """
    if name in registry:
        return registry[name]
    message = f"unknown {what} {name!r}; there are {', '.join(registry)}"
    close = difflib.get_close_matches(name.lower(), registry, n=1)
    raise RequestError(f"{message}; did you mean {close[0]}?" if close else message)


def installed_names(group: str) -> Mapping[str, metadata.EntryPoint]:
    """The entry points ``distillsec.GROUP`` of installed packages by name; nothing is imported."""
    return {point.name: point for point in metadata.entry_points(group=f"distillsec.{group}")}


def look_up_installed(name: str, registry: Mapping[str, Any], what: str) -> Any:
    """As ``look_up``, also among the entry points ``distillsec.<what>s`` of installed packages.

    The suite's own names come first: a package cannot replace one.
    """
    installed = {} if name in registry else installed_names(f"{what}s")
    if name not in installed:
        return look_up(name, {**installed, **registry}, what)
    try:
        return installed[name].load()
    # Another package's code runs here and may raise anything.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        place = installed[name].value
        raise RequestError(f"{what} {name}: its entry point {place} failed: {reason}") from error


def is_reference(name: str) -> bool:
    """Whether ``name`` is meant as ``package.module:Name`` and not as a registry's key."""
    return ":" in name


def load_object(reference: str, what: str) -> Any:
    """The object that ``package.module:Name`` names; nested names (``Outer.Inner``) are allowed.

    An object given under this name (``objects_by_name``) comes first. Modules in the current
    directory are found too, after all others. Errors: ``RequestError`` of one line where the object
    cannot be loaded; its cause is the module's own exception, if any.
    """
    if is_given(reference):
        return given_object(reference)
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


def reference_to(thing: object) -> str:
    """``module:qualname`` of a class or function, or of an instance's class.

    Only a name for records: it cannot be imported where the class is local, or in a notebook.
    """
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    name = re.sub(r"[<>]", "", str(getattr(named, "__qualname__", "")).replace("<locals>.", ""))
    return f"{named.__module__}:{name}"


@contextmanager
def objects_by_name(objects: Mapping[str, Any]) -> Iterator[None]:
    """Within, each name of ``objects`` means that object, in this thread."""
    token = _OBJECTS.set({**_OBJECTS.get(_NO_OBJECTS), **objects})
    try:
        yield
    finally:
        _OBJECTS.reset(token)


def is_given(name: str) -> bool:
    """Whether ``name`` stands for an object that the user gave."""
    return name in _OBJECTS.get(_NO_OBJECTS)


def given_object(name: str) -> Any:
    """The object that the user gave under ``name``."""
    return _OBJECTS.get(_NO_OBJECTS)[name]


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
