"""The notebook in examples/, and the Python code in docs/python.md, run as they are."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distillsec.eval.config import layers
from distillsec.eval.config.presets import load_preset
from distillsec.eval.grid import choose_executor

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


@pytest.fixture
def _no_window() -> Iterator[None]:
    import matplotlib
    from matplotlib import pyplot

    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    pyplot.close("all")
    matplotlib.use(before)


def cells() -> list[str]:
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_has_no_results_and_few_lines() -> None:
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in found)
    assert sum(bool(line.strip()) for code in cells() for line in code.splitlines()) <= 40


@pytest.mark.usefixtures("_no_window")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in cells():
        small = code.replace('"iterations": 300', '"iterations": 3')
        small = small.replace('"victim_epochs": 100', '"victim_epochs": 2')
        exec(compile(small, "notebook", "exec"), names)
    assert names["record"].objects == {
        "attack": ["__main__:Diagonal"],
        "backend": ["__main__:Means"],
    }
    assert list(names["auroc"].index) == ["__main__:Confidence", "scale-up"]
    assert names["auroc"].notna().all().all()


@pytest.mark.usefixtures("_no_window")
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller runs, and stand-ins for the two trackers."""
    monkeypatch.chdir(tmp_path)
    small = {
        "iterations": 1,
        "inner_loop": 1,
        "victims": 1,
        "victim_epochs": 1,
        "ipc": 1,
        "width": 4,
    }

    def smaller(name: str) -> dict[str, Any]:
        preset = load_preset(name)
        return {**preset, "config": {**preset["config"], **small}}

    monkeypatch.setattr(layers, "load_preset", smaller)
    monkeypatch.setattr(choose_executor, "cpu_count", lambda: 1)  # no processes
    board, tracked = Board(), Tracked()
    writers = SimpleNamespace(SummaryWriter=lambda _: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writers)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda project: tracked))
    names: dict[str, Any] = {}
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    for code in re.findall(r"(?ms)^```python\n(.*?)^```", page):
        code = code.replace("[2, 3]}", '[2]}, "seeds": 1')
        exec(compile(code, "docs/python.md", "exec"), names)
    assert len(names["predictions"]) == 10 and names["table"].status == "done"
    assert ("distilling/loss", 1) in board.seen and "distilling the clean twin/loss" in tracked.seen
    assert tracked.summary["attack_success_rate"] == names["record"].mean("attack_success_rate")


class Board:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def add_scalar(self, name: str, value: float, number: int) -> None:
        assert isinstance(value, float)
        self.seen.append((name, number))


class Tracked:
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, values: dict[str, float]) -> None:
        self.seen |= values
