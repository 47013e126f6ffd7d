"""YAML of people and of strangers: only values that JSON has too, within bounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, final

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

YAML_CAP: Final = 256 * 1024
"""The most bytes of a YAML file."""

_DEPTH_CAP: Final = 50
_VALUES_CAP: Final = 50_000
_LEAST_INTEGER: Final = -(2**63)
_MOST_INTEGER: Final = 2**64 - 1


def parse_yaml(text: str) -> Any:
    """The value of YAML ``text``: mappings, lists, strings, numbers, true, false and null.

    Raises ValueError, one line, for everything else: another syntax; tags that name other types;
    dates (to be quoted); a key that is given twice; integers over 64 bits; more than 50 levels;
    more than 50,000 values, where each alias counts as all that it stands for.
    """
    try:
        return _value(yaml.load(text, _Loader))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # the scalars of other types fail in many ways
        raise ValueError(" ".join((str(error) or type(error).__name__).split())[:300]) from None


@final
class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses large values before they are built."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def get_single_node(self) -> Node | None:
        """The document's node, counted."""
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """One node, no deeper than allowed."""
        self._depth += 1
        if self._depth > _DEPTH_CAP:
            raise ValueError(f"nested too deeply, more than {_DEPTH_CAP} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """A mapping without a key that is given twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise ValueError(f"the key in line {line} is no name")
            if key.value in lines:
                first = lines[key.value]
                where = f"lines {first} and {line}" if first != line else f"line {line}"
                raise ValueError(f"the key {key.value:.60} is there twice, on {where}")
            lines[key.value] = line
        return node


def _count(node: Node, known: dict[int, int | None]) -> int:
    """How many values ``node`` stands for; ValueError for too many, or for one inside itself."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError("a value holds itself")
        return found
    known[id(node)] = None
    total = 1 + sum(_count(child, known) for child in _children(node))
    if total > _VALUES_CAP:
        raise ValueError(f"it stands for {total} values or more, at most {_VALUES_CAP} are read")
    known[id(node)] = total
    return total


def _children(node: Node) -> Iterable[Node]:
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, SequenceNode) else []


def _value(found: Any) -> Any:
    """``found``, where it holds nothing but what JSON has."""
    if isinstance(found, dict):
        return {_scalar(key): _value(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_value(value) for value in found]
    return _scalar(found)


def _scalar(found: Any) -> Any:
    if isinstance(found, int) and not _LEAST_INTEGER <= found <= _MOST_INTEGER:
        raise ValueError("an integer has more than 64 bits")
    if found is not None and not isinstance(found, (str, int, float)):
        raise ValueError(f"a {type(found).__name__} is no plain value: quote it")
    return found
