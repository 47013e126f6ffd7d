"""JSON of people and of strangers, within bounds."""

from __future__ import annotations

import json
import math
from typing import Any, Final

JSON_CAP: Final = 32 * 2**20
"""The most bytes of JSON that are read, in a file or in a tensor file's header."""

VALUES_CAP: Final = 2_000_000
"""The most values that JSON may hold: 32 MiB of the shortest ones would need over 1 GiB."""

DEPTH_CAP: Final = 100
"""The deepest nesting of JSON."""


def parse_json(text: bytes) -> Any:
    """The value of JSON ``text``.

    Raises ValueError for another syntax or encoding, NaN, infinity, a number that overflows, more
    than 100 levels, more than 2,000,000 values.
    """
    check_count(text)
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEPTH_CAP + 1):
        level = [child for each in level for child in _children(each)]
        if not level:
            return value
    raise ValueError(f"nested too deeply, more than {DEPTH_CAP} levels")


def check_count(text: bytes) -> None:
    """ValueError for more values than ``VALUES_CAP``, by counting what separates them."""
    count = sum(map(text.count, (b",", b"[", b"{")))
    if count > VALUES_CAP:
        raise ValueError(f"about {count} values, at most {VALUES_CAP} are read")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.20} is too large for a number")
    return number


def _children(value: Any) -> list[Any]:
    """The lists and mappings directly in ``value``."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in inside if isinstance(child, (dict, list))]
