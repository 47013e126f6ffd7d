"""The package's house rules that its syntax trees show, and tests of these checks.

Imports go one way: ``cli`` → ``commands`` → ``eval`` → ``attacks``, ``defenses`` → ``distill``,
skipping layers downwards allowed; attacks and defenses never import each other.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import distillsec

PACKAGE = "distillsec"
FOLDERS = ("commands", "eval", "attacks", "defenses", "distill")
FACE = "__init__"
EXT = "ext"
MAY_IMPORT = {
    "cli": {FACE, "commands", "eval", "attacks", "defenses", "distill"},
    FACE: {"eval", "attacks", "defenses", "distill"},
    EXT: {"attacks", "defenses", "distill"},
    "commands": {"eval", "attacks", "defenses", "distill"},
    "eval": {"attacks", "defenses", "distill"},
    "attacks": {"distill"},
    "defenses": {"distill"},
    "distill": set[str](),
}
# Inside a folder: the subfolders that each subfolder may import. The modules beside them (types,
# base, …) have the empty name: in distill every subfolder may import them, not the reverse.
SUBFOLDERS: dict[str, dict[str, set[str]]] = {
    "eval": {
        "config": set(),
        "results": set(),
        "figures": {"results", "config"},
        "run": {"figures", "results", "config"},
        "bench": {"run", "figures", "results", "config"},
        "audit": {"bench", "run", "figures", "results", "config"},
        "grid": {"bench", "run", "figures", "results", "config"},
        "report": {"audit", "grid", "bench", "run", "figures", "results", "config"},
        "notebook": {"grid", "bench", "run", "figures", "results", "config"},
    },
    "distill": {
        "": set(),
        "data": {""},
        "networks": {""},
        "files": {"data", ""},
        "core": {"files", "networks", "data", ""},
        "backends": {"core", "files", "networks", "data", ""},
    },
    "defenses": {
        "": {"common", "sets", "inputs", "models", "training"},
        "common": {""},
        "sets": {"common", ""},
        "inputs": {"common", ""},
        "models": {"common", ""},
        "training": {"common", ""},
    },
}
MAY_PRINT = {"cli.py"}
# Layers initialise themselves from torch's global generator: seeded there, inside fork_rng.
MAY_SEED = {"distill/networks/registry.py"}
SEEDS = {
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
    "torch.seed",
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
}
DRAWS = {
    f"torch.{name}"
    for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")
}

Sources = dict[str, str]
Finding = tuple[int, str]
Rule = Callable[[str, str], Iterator[Finding]]


def installed() -> Sources:
    """The installed package's modules by path: the root's files and the folders' trees.

    Not everything below the root: the root of an editable install is the checkout, tests included.
    """
    root = Path(distillsec.__path__[0])
    paths = [
        *root.glob("*.py"),
        *(path for name in FOLDERS for path in (root / name).rglob("*.py")),
    ]
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in sorted(paths)}


def module_name(path: str) -> list[str]:
    return [PACKAGE, *path.removesuffix(".py").removesuffix("/__init__").split("/")]


def targets(path: str, node: ast.AST) -> Iterator[tuple[str, bool]]:
    """The dotted names that ``node`` imports, made absolute, and whether they were relative."""
    here = module_name(path) if path != "__init__.py" else [PACKAGE]
    package = here if path.endswith("__init__.py") else here[:-1]
    if isinstance(node, ast.Import):
        yield from ((alias.name, False) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = [*above, *((node.module or "").split(".") if node.module else [])]
        if node.level and not above:
            yield "..", True  # above the package's root
        elif base == [PACKAGE]:
            yield from ((f"{PACKAGE}.{alias.name}", node.level > 0) for alias in node.names)
        else:
            yield ".".join(base), node.level > 0
    elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
        name = node.args[0] if node.args else None
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield name.value, False


def wrong_imports(path: str, source: str) -> Iterator[Finding]:
    """Imports (at any depth, so deferred ones too) against the arrows or the house's style."""
    top = path.split("/")[0].removesuffix(".py")
    allowed = MAY_IMPORT.get(top)
    if allowed is None:
        yield 1, f"{path} belongs to no layer: at the root: __init__.py, cli.py, ext.py"
        return
    for node in ast.walk(ast.parse(source)):
        for name, relative in targets(path, node):
            line = getattr(node, "lineno", 0)
            parts = name.split(".")
            if name == ".." or (not relative and parts[0] in MAY_IMPORT):
                yield line, f"{name!r} is not the name of anything in {PACKAGE}"
            if parts[0] != PACKAGE:
                continue
            layer = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else FACE
            if layer not in allowed and not (layer == top and top in FOLDERS):
                yield line, f"{top} imports {layer}; it may import {sorted(allowed) or 'nothing'}"
            if relative and top in (FACE, EXT):
                yield line, f"the root's {top}.py uses absolute imports"
            if not relative and top in FOLDERS:
                yield line, f"inside the folders imports are relative, not {name!r}"


def wrong_subfolders(path: str, source: str) -> Iterator[Finding]:
    """Imports inside a folder against the arrows between its subfolders."""
    folder, *rest = path.split("/")
    arrows = SUBFOLDERS.get(folder)
    if arrows is None or path == f"{folder}/__init__.py":
        return
    here = rest[0] if len(rest) > 1 else ""
    if here not in arrows:
        yield 1, f"{folder}/{here or rest[0]} is in no subfolder of {sorted(arrows)}"
        return
    for node in ast.walk(ast.parse(source)):
        for name, _ in targets(path, node):
            parts = name.split(".")
            if parts[:2] != [PACKAGE, folder] or len(parts) < 3:
                continue
            there = parts[2] if parts[2] in arrows else ""
            if there != here and there not in arrows[here]:
                line = getattr(node, "lineno", 0)
                yield line, f"{folder}/{here} imports {there or parts[2]}; allowed: {arrows[here]}"


def prints(path: str, source: str) -> Iterator[Finding]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and dotted(node.func) == "print" and path not in MAY_PRINT:
            yield node.lineno, "only cli.py prints"


def global_randomness(path: str, source: str) -> Iterator[Finding]:
    """Calls that seed a global generator, or draw from torch's, outside ``with fork_rng()``."""
    tree = ast.parse(source)
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, inside = dotted(node.func), id(node) in forked
        if name in SEEDS and not (inside and path in MAY_SEED):
            yield node.lineno, f"{name} sets a global seed; draw from a named stream"
        if name in DRAWS and not inside and "generator" not in {k.arg for k in node.keywords}:
            yield node.lineno, f"{name} without generator= draws from torch's global generator"


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain, or the empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


RULES: tuple[Rule, ...] = (wrong_imports, wrong_subfolders, prints, global_randomness)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    sources = installed()
    assert {"__init__.py", "cli.py"} <= sources.keys()
    assert {path.split("/")[0] for path in sources} >= set(FOLDERS)
    found = [
        f"{path}:{line}: {what}"
        for path, text in sources.items()
        for line, what in rule(path, text)
    ]
    assert not found, "\n".join(["", *found])


def repeated_classes(sources: Sources) -> list[str]:
    """Class names, private ones too, that more than one module of ``sources`` defines."""
    places: dict[str, list[str]] = {}
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path)
    return [f"{name}: {', '.join(paths)}" for name, paths in places.items() if len(paths) > 1]


def test_every_class_name_is_unique_in_the_package() -> None:
    found = repeated_classes(installed())
    assert not found, "\n".join(["", *found])


def test_a_repeated_class_name_is_found() -> None:
    sources = {"eval/a.py": "class Row: ...", "eval/b.py": "def f():\n    class Row: ..."}
    assert repeated_classes(sources) == ["Row: eval/a.py, eval/b.py"]
    assert not repeated_classes({"eval/a.py": "class Row: ...", "eval/b.py": "class _Row: ..."})


BAD_IMPORTS = {
    "a defense in an attack": ("attacks/bad.py", "from ..defenses import DEFENSES"),
    "an attack in a defense": ("defenses/bad.py", "from ..attacks.base import Attack"),
    "by the parent's name": ("attacks/bad.py", "from .. import defenses"),
    "upwards": ("distill/bad.py", "from ..attacks import ATTACKS"),
    "upwards from an attack": ("attacks/bad.py", "from ..eval.cell import run"),
    "upwards from deeper": ("eval/presets/bad.py", "from ...cli import main"),
    "deferred": ("distill/bad.py", "def late():\n    from ..eval import cell"),
    "for types only": ("distill/bad.py", "if TYPE_CHECKING:\n    from ..eval import cell"),
    "by import_module": ("distill/bad.py", "importlib.import_module('distillsec.eval.run.cell')"),
    "cli": ("eval/bad.py", "from ..cli import main"),
    "cli from the face": ("__init__.py", "from distillsec.cli import main"),
    "the face": ("distill/bad.py", "from .. import __version__"),
    "absolute": ("eval/bad.py", "from distillsec.distill.types import Batch"),
    "absolute in its own folder": ("eval/bad.py", "import distillsec.eval.run.cell"),
    "bare folder": ("eval/bad.py", "from distill.types import Batch"),
    "relative face": ("__init__.py", "from .eval import run"),
    "above the root": ("eval/bad.py", "from ...distill import types"),
    "a stray file": ("helpers.py", "import os"),
}


@pytest.mark.parametrize(("path", "source"), BAD_IMPORTS.values(), ids=BAD_IMPORTS)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert list(wrong_imports(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli.py", "from .eval.cell import run\nfrom distillsec.eval import sweep"),
        ("__init__.py", "from distillsec.attacks import ATTACKS"),
        ("eval/__init__.py", "from .cell import run\nfrom ..distill import types"),
        ("eval/presets/__init__.py", "from ..config import Config\nfrom ...distill import types"),
        ("attacks/good.py", "import torch\nfrom . import base\nfrom ..distill.hooks import Hook"),
        ("distill/good.py", "from .types import Batch\nfrom random import Random"),
    ],
)
def test_a_right_import_is_let_through(path: str, source: str) -> None:
    assert not list(wrong_imports(path, source))


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("eval/results/bad.py", "from ..grid.jobs import Job", True),
        ("eval/run/bad.py", "from ..bench import bench", True),
        ("eval/bad.py", "import os", True),
        ("eval/grid/good.py", "from ..results.record import Record\nfrom .jobs import Job", False),
        ("distill/types.py", "from .core.hooks import Hook", True),
        ("distill/core/bad.py", "def late():\n    from ..backends import BACKENDS", True),
        (
            "distill/core/good.py",
            "from ..types import Batch\nfrom ..files.safe import fault",
            False,
        ),
        ("defenses/sets/bad.py", "from ..models.clp import Clp", True),
        ("defenses/__init__.py", "from .models.clp import Clp", False),
    ],
)
def test_an_import_between_subfolders_is_judged(path: str, source: str, found: bool) -> None:
    assert bool(list(wrong_subfolders(path, source))) is found


def test_print_is_found() -> None:
    assert list(prints("eval/bad.py", "def f():\n    print(1)"))
    assert not list(prints("cli.py", "print(1)"))
    assert not list(prints("eval/good.py", "log.print(1)"))


FORKED_SEED = "with torch.random.fork_rng():\n    torch.manual_seed(1)"


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        (
            "distill/networks/registry.py",
            "with torch.random.fork_rng():\n    torch.manual_seed(1)",
            False,
        ),
        ("distill/networks/registry.py", "torch.manual_seed(1)", True),
        ("distill/core/loop.py", "with torch.random.fork_rng():\n    torch.manual_seed(1)", True),
        ("eval/run/cell.py", "np.random.seed(0)", True),
        ("eval/run/cell.py", "import random\nrandom.seed(0)", True),
        ("eval/run/cell.py", "generator.manual_seed(1)", False),
        ("attacks/naive.py", "torch.randperm(9)", True),
        ("attacks/naive.py", "torch.randperm(9, generator=g)", False),
    ],
)
def test_global_randomness_is_found(path: str, source: str, found: bool) -> None:
    assert bool(list(global_randomness(path, source))) is found
