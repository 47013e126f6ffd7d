"""What a user may give for an option: its type, what is allowed, its default, what it means."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, final, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping"}
_BOUNDS = ((Ge, "≥ {}", "ge"), (Gt, "> {}", "gt"), (Le, "≤ {}", "le"), (Lt, "< {}", "lt"))


@final
@dataclass(frozen=True)
class OptionHelp:
    """One option. kind: its type in words. allowed: its choices or bounds, empty for none."""

    key: str
    kind: str
    allowed: str
    default: str
    description: str


def option_help(options: type[BaseModel]) -> dict[str, OptionHelp]:
    """The options of a model by key; an option with only a new default has its parent's text."""
    return {
        key: OptionHelp(
            key,
            _kind(field.annotation),
            _allowed(field),
            _default(field),
            _description(options, key),
        )
        for key, field in options.model_fields.items()
    }


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not types.NoneType]
        return " or ".join(dict.fromkeys(_kind(part) for part in parts))
    if origin is Literal:
        return "choice"
    if origin in (tuple, list):
        return f"list of {_kind(get_args(annotation)[0])}"
    return _NAMES.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def _allowed(field: FieldInfo) -> str:
    """Choices, or bounds such as ``≥ 0, < 1``."""
    chosen = [str(choice) for choice in choices(field.annotation)]
    limits = [
        text.format(format(getattr(each, name), "g"))
        for each in field.metadata
        for kind, text, name in _BOUNDS
        if isinstance(each, kind)
    ]
    return ", ".join(chosen or limits)


def choices(annotation: Any) -> Iterator[object]:
    """The values that ``Literal`` types in an annotation allow."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
        return
    for part in get_args(annotation):
        yield from choices(part)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "" if field.is_required() else str(field.get_default(call_default_factory=True))
    return "none" if field.default in (None, "") else str(field.default)


def _description(options: type[BaseModel], key: str) -> str:
    texts = (base.model_fields[key].description for base in _lineage(options, key))
    return next((text for text in texts if text), "")


def _lineage(options: type[BaseModel], key: str) -> Iterator[type[BaseModel]]:
    for base in options.__mro__:
        if issubclass(base, BaseModel) and key in base.model_fields:
            yield base
