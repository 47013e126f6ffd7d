"""What a user gets: one name in site-packages, all of the package, nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest

import distillsec

CHECKOUT = Path(__file__).resolve().parents[1]
FOLDERS = ("attacks", "commands", "defenses", "distill", "eval")
BESIDE = ("tests", "benchmarks", "sweeps", "docs")
JUNK = shutil.ignore_patterns("__pycache__", ".*")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))


def package_files(root: Path) -> set[str]:
    """The files below ``root`` that belong to the package, as paths inside it."""
    inside = [path for name in FOLDERS for path in (root / name).rglob("*")]
    paths = [*root.glob("*.py"), root / "py.typed", *inside]
    wanted = {".py", ".yaml", ".j2", ".json", ".typed"}
    return {path.relative_to(root).as_posix() for path in paths if path.suffix in wanted}


def test_only_the_installed_package_is_imported() -> None:
    """No file of the checkout came in under another name (as pytest's packages would)."""
    home = Path(distillsec.__path__[0]).resolve()
    elsewhere = (CHECKOUT / "tests", CHECKOUT / "examples", Path(sys.prefix))
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        if name.split(".")[0] == "distillsec":
            assert path.resolve().is_relative_to(home), f"{name} is {path}, not below {home}"
        elif path.is_relative_to(CHECKOUT) and not any(map(path.is_relative_to, elsewhere)):
            pytest.fail(f"{path} was imported a second time, as {name!r}")


def test_every_folder_with_modules_is_listed(pyproject: dict[str, Any]) -> None:
    listed = set(pyproject["tool"]["setuptools"]["packages"])
    there = {Path("distillsec", file).parent for file in package_files(CHECKOUT)}
    assert listed == {".".join(folder.parts) for folder in there}


def test_no_dependency_is_pinned(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    for requirement in (*project["dependencies"], *(line for extra in extras for line in extra)):
        assert "==" not in requirement
        assert "<" not in requirement
        assert "@" not in requirement


def test_tests_are_no_package() -> None:
    assert not list((CHECKOUT / "tests").rglob("__init__.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, in a folder whose name is no identifier."""
    copy = tmp_path_factory.mktemp("wheel") / "a-b"
    copy.mkdir()
    for path in CHECKOUT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    for name in (*FOLDERS, *BESIDE):
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, copy / name, ignore=JUNK)
    pip = [sys.executable, "-P", "-m", "pip", "wheel", "--no-deps", "--no-index"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(copy.parent), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy.parent, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = copy.parent.glob("*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    packed = {name for name in names if not name.startswith(f"{info}/")}
    assert packed == {f"distillsec/{file}" for file in package_files(CHECKOUT)}
    assert {f"{info}/entry_points.txt", f"{info}/licenses/LICENSE"} <= names


@pytest.mark.slow
def test_a_wheel_says_what_it_needs(wheel: Path, pyproject: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Name"] == "distillsec"
    assert metadata["License-Expression"] == "MIT"
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(needed) == len(pyproject["project"]["dependencies"])
