"""What plug-ins need is in ``distillsec.ext``."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from distillsec import ext
from distillsec.attacks import ATTACKS
from distillsec.defenses import DEFENSES
from distillsec.distill.backends import BACKENDS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_every_name_is_there_and_documented() -> None:
    assert sorted(ext.__all__) == ext.__all__
    for name in ext.__all__:
        found = getattr(ext, name)
        assert not inspect.isclass(found) or inspect.getdoc(found), name


@pytest.mark.parametrize("kind", [*ATTACKS.values(), *BACKENDS.values(), *DEFENSES.values()])
def test_a_base_class_of_the_suites_own_is_there(kind: type) -> None:
    """Each class of the catalogues could be written with what ``ext`` has."""
    names = {base.__name__ for base in kind.__mro__[1:]}
    assert names & {"Attack", "Backend", "Defense"}
    assert kind.__mro__[1].__name__ in ext.__all__ or names & set(ext.__all__)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("own_*.py")), ids=lambda p: p.stem)
def test_the_examples_need_nothing_else_of_the_suite(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    used = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {module for module in used if module and module.startswith("distillsec")}
    assert own <= {"distillsec.ext"}
