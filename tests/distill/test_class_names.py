"""Class names: which are legal, and how the classes of two sources are matched."""

from __future__ import annotations

import pytest

from distillsec.distill.class_names import (
    MAX_CLASSES,
    check_class_names,
    match_classes,
    named_number,
)
from distillsec.distill.types import RequestError


@pytest.mark.parametrize(
    "name", ["می\u200cخواهم", "白\u3000猫", "👩\u200d🚀", "a b", "x" * 200, "$\\frac$"]
)
def test_joiners_wide_spaces_and_any_script_are_legal(name: str) -> None:
    check_class_names(["a", name])


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "class 1 has 0 characters"),
        ("x" * 201, "class 1 has 201 characters"),
        ("\x1b[2J", "control characters"),
        ("a\nb", "control characters"),
        ("caf\udce9", "not UTF-8"),
        ("a\u2028b", "line breaks"),
        ("a\u202eb", "direction of text"),
    ],
)
def test_what_terminals_and_files_cannot_hold_is_refused(name: str, fault: str) -> None:
    with pytest.raises(RequestError, match=fault) as caught:
        check_class_names(["a", name])
    str(caught.value).encode()  # a terminal can show it


def test_the_number_of_classes_is_bounded() -> None:
    with pytest.raises(RequestError, match="100001 classes"):
        check_class_names(["a"] * (MAX_CLASSES + 1))


@pytest.mark.parametrize(
    ("theirs", "ours", "numbers"),
    [
        ("ant bee cat", "ant bee cat", [0, 1, 2]),
        ("cat ant bee", "ant bee cat", [2, 0, 1]),
        ("CAT ant Bee", "ant bee cat", [2, 0, 1]),
        ("caf\u00e9 ant", "ant cafe\u0301", [1, 0]),  # as macOS stores it
        ("a A", "A a", [1, 0]),
        ("0 1 2", "ant bee cat", [0, 1, 2]),
        ("crane owl crane", "crane owl crane", [0, 1, 2]),  # ImageNet has two
    ],
)
def test_classes_are_matched_by_name_or_by_number(
    theirs: str, ours: str, numbers: list[int]
) -> None:
    assert match_classes(theirs.split(), ours.split()) == numbers


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("ant bee cow", "bee ant dog"), ("crane owl crane", "crane crane owl")],
)
def test_names_that_contradict_each_other_are_refused(theirs: str, ours: str) -> None:
    with pytest.raises(RequestError, match="cannot be matched"):
        match_classes(theirs.split(), ours.split())


def test_a_class_is_found_by_its_name() -> None:
    classes = ["one", "two", "two"]
    assert named_number("One", 1, classes) == 0
    assert named_number("two", 2, classes) == 2
    assert named_number("six", 1, classes) == 1
    with pytest.raises(RequestError, match="1 and 2 are both called"):
        named_number("two", 0, classes)
