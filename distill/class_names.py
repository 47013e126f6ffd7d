"""Class names: what a name may hold, and how the classes of two sources are matched."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Final

from .types import RequestError

MAX_CLASSES: Final = 100_000
MAX_NAME: Final = 200
"""The most characters of a name."""

_REFUSED: Final = {
    "Cc": "control characters",
    "Cs": "bytes that are not UTF-8",
    "Zl": "line breaks",
    "Zp": "line breaks",
}
# Embeddings, overrides and isolates: they reorder the text around a name.
_DIRECTIONS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def check_class_names(names: Sequence[str]) -> None:
    """Refuse names that terminals, files and web pages cannot hold safely.

    Every name has 1 to ``MAX_NAME`` characters of any script, joiners and wide spaces included, but
    no control characters, line breaks or marks that reverse the direction of text.
    Errors: ``RequestError`` with the name and what is wrong with it.
    """
    if len(names) > MAX_CLASSES:
        raise RequestError(f"{len(names)} classes; at most {MAX_CLASSES} are allowed")
    for number, name in enumerate(names):
        if not 1 <= len(name) <= MAX_NAME:
            raise RequestError(
                f"the name of class {number} has {len(name)} characters "
                f"({name[:20]!r}…); 1 to {MAX_NAME} are allowed"
            )
        for letter in name:
            fault = _REFUSED.get(unicodedata.category(letter))
            if letter in _DIRECTIONS:
                fault = "marks that change the direction of text"
            if fault:
                raise RequestError(f"the class name {name[:60]!a} holds {fault}")


def match_classes(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """For each class of ``theirs`` its number in ``ours``; the two have the same length.

    By name, if both have the same names, in any order and in any capitalisation. By number, if the
    names differ.
    Errors: ``RequestError`` if some names are the same under other numbers and the rest differ.
    """
    same_numbers = list(range(len(ours)))
    for key in _KEYS:
        their_keys, our_keys = list(map(key, theirs)), list(map(key, ours))
        if their_keys == our_keys:
            return same_numbers
        if len(set(our_keys)) == len(our_keys) and sorted(their_keys) == sorted(our_keys):
            return [our_keys.index(each) for each in their_keys]
    for number, (name, each) in enumerate(zip(theirs, their_keys, strict=True)):
        if each in our_keys and our_keys[number] != each:
            raise RequestError(
                f"class {name!r} is number {number} there and {our_keys.index(each)} here, and the "
                "other names are not the same: the classes cannot be matched"
            )
    return same_numbers


def same_names(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether the names are the same, in any capitalisation and in this order."""
    return list(map(_folded, theirs)) == list(map(_folded, ours))


def named_number(name: str, number: int, classes: Sequence[str]) -> int:
    """The number of the class ``name``; ``number`` if it is called so, or if no class is.

    Errors: ``RequestError`` if several other classes are called so.
    """
    if 0 <= number < len(classes) and _folded(classes[number]) == _folded(name):
        return number
    found = [i for i, each in enumerate(classes) if _folded(each) == _folded(name)]
    if len(found) > 1:
        raise RequestError(f"the classes {found[0]} and {found[1]} are both called {name!r}")
    return found[0] if found else number


def _composed(name: str) -> str:
    """The name in one spelling: file systems differ in how they store accents."""
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()


_KEYS: Final[Sequence[Callable[[str], str]]] = (_composed, _folded)
