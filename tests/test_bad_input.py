"""Every kind of wrong request: exit code 2, one line that helps, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distillsec.distill.data import published as data_published

Cli = Callable[..., Result]
Options = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, and no data but the embedded set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLSEC_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(data_published, "SYSTEM_DIR", tmp_path / "system")
    monkeypatch.setattr(data_published, "_download", lambda *_: "no network in tests")


def check(answer: Result, expected: tuple[str, ...], files: set[Path]) -> None:
    """Exit code 2; one line with all of ``expected``; nothing on stdout; no new file or folder."""
    assert answer.exit_code == 2, answer.output
    assert answer.stdout == ""
    assert answer.stderr.startswith("distillsec: ") and answer.stderr.endswith("\n")
    assert answer.stderr.count("\n") == 1
    assert "Traceback" not in answer.stderr and "Error(" not in answer.stderr
    for text in expected:
        assert text in answer.stderr
    assert present() == files


def present() -> set[Path]:
    """All files and folders but the cache of decoded images."""
    data = Path.cwd() / "data"
    return {path for path in Path.cwd().rglob("*") if not path.is_relative_to(data)}


def refuse(cli: Cli, *words: object, expected: tuple[str, ...]) -> None:
    files = present()
    check(cli(*words, "--quiet", "--out", "bad"), expected, files)


OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dataset": ({"dataset": "digit"}, ("'digit'", "did you mean digits?", "npz:PATH")),
    "backend": ({"backend": "dssa"}, ("'dssa'", "did you mean dsa?")),
    "network": ({"network": "convet"}, ("'convet'", "did you mean convnet?")),
    "attack": ({"attack": "naiv"}, ("'naiv'", "there are naive, doorping", "did you mean naive?")),
    "preset": ({"preset": "digits-naiv"}, ("'digits-naiv'", "did you mean digits-naive?")),
    "objective": ({"attack": "doorping", "objective": "neurn"}, ("'neurn'", "'target-logit'")),
    "another attack's option": ({"objective": "neuron"}, ("objective is an option of doorping",)),
    "norm": ({"norm": "instanc"}, ("'instanc'", "'instance', 'batch', 'layer', 'group'")),
    "victims' network": ({"victim_network": "convnt"}, ("'convnt'", "did you mean convnet?")),
    "too small for it": ({"victim_network": "vgg11"}, ("vgg11", "at least 32 pixels", "8x8")),
    "too deep": ({"depth": 4}, ("depth 4", "at least 16 pixels", "8x8")),
    "width": ({"width": 0}, ("width", "got 0")),
    "ipc": ({"ipc": 0}, ("ipc", "greater than or equal to 1", "got 0")),
    "ipc, no number": ({"ipc": "many"}, ("'--ipc'", "'many'", "--help")),
    "iterations": ({"iterations": 0}, ("iterations", "got 0")),
    "victims": ({"victims": 0}, ("victims", "got 0")),
    "victim epochs": ({"victim_epochs": 0}, ("victim_epochs", "got 0")),
    "image size": ({"image_size": 3}, ("image_size", "greater than or equal to 4", "got 3")),
    "trigger too large": ({"trigger_size": 9}, ("9×9", "8×8", "1 to 7")),
    "trigger size": ({"trigger_size": 0}, ("trigger_size", "got 0")),
    "trigger range": ({"trigger_range": "wide"}, ("'wide'", "'pixel' or 'unbounded'")),
    "target": ({"target": 10}, ("target 10", "from 0 to 9")),
    "target below 0": ({"target": -1}, ("target", "got -1")),
    "poison rate 0": ({"poison_rate": 0}, ("poison_rate", "greater than 0", "got 0.0")),
    "poison rate 1.5": ({"poison_rate": 1.5}, ("poison_rate", "less than or equal to 1", "1.5")),
    "more than the others": ({"poison_rate": 0.95}, ("0.95", "1232 rows", "at most 0.901")),
    "target share": ({"target_share": 1.5}, ("target_share", "less than 1", "got 1.5")),
    "target share, whole set": (
        {"backend": "whole", "iterations": 0, "target_share": 0.5},
        ("target_share 0.5 has no effect", "backend whole", "target_share=null"),
    ),
    "too few real rows": ({"init": "real", "ipc": 200}, ("class 0", "200 images", "--init noise")),
    "too few stamped": ({"init": "poisoned", "ipc": 200}, ("rows to start 200", "--ipc")),
    "init": ({"init": "reel"}, ("'reel'", "'noise', 'real' or 'poisoned'")),
    "seed": ({"seed": -1}, ("seed", "got -1")),
    "seeds": ({"seeds": 0}, ("'--seeds'", "x>=1")),
    "threads": ({"threads": 100_000}, ("threads", "1024")),
    "a numbered cpu": ({"device": "cpu:3"}, ("'cpu:3'", "auto, cpu, cuda, cuda:N or mps")),
    "no experts": ({"buffer": "experts"}, ("--buffer experts", "backend dc trains no experts")),
    "no buffer": ({"buffer": ""}, ("'--buffer'", "got an empty one")),
    "device": ({"device": "tpu"}, ("'tpu'", "auto, cpu, cuda, cuda:N or mps")),
    "no such gpu": ({"device": "cuda:99"}, ("cuda:99", "CUDA devices were found")),
    "no module": ({"attack": "nowhere.at_all:Mine"}, ("nowhere.at_all:Mine", "no module nowhere")),
    "no class": ({"attack": "json:Mine"}, ("json:Mine", "has no Mine")),
    "no attack": ({"attack": "json:JSONDecoder"}, ("json:JSONDecoder", "not a subclass", "Attack")),
    "no backend": ({"backend": "json:loads"}, ("json:loads", "not a subclass", "Backend")),
    "no published set": (
        {"dataset": "cifar10"},
        ("cifar10 not found", "cifar-10-batches-py", "system/cifar10", "no network", "put the"),
    ),
    "no folder": ({"dataset": "folder:nowhere"}, ("nowhere: no such folder",)),
    "no npz": ({"dataset": "npz:nowhere.npz"}, ("nowhere.npz: no such file",)),
    "no path": ({"dataset": "folder:"}, ("lacks the path", "folder:PATH")),
    "a twin and seeds": ({"control_run": "x", "seeds": 2}, ("--control-run", "--seeds")),
    "no twin there": ({"control_run": "nowhere"}, ("nowhere/record.json: no such file",)),
    "config": ({"config": "nowhere.yaml"}, ("nowhere.yaml: no such file",)),
    "config, a folder": ({"config": "."}, (".: is a folder, expected a file",)),
}


@pytest.mark.parametrize(("changes", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_options(
    changes: dict[str, Any], expected: tuple[str, ...], cli: Cli, tiny_options: Options
) -> None:
    refuse(cli, "attack", *tiny_options(**changes), expected=expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("ipcc=3", ("'ipcc'", "did you mean ipc?")),
        ("zzz=3", ("'zzz'", "--print-config lists the keys")),
        ("lr_img", ("--set needs key=value", "'lr_img'")),
        ("=3", ("--set needs key=value", "'=3'")),
        ("lr_img=[1", ("lr_img=[1", "not YAML")),
        ("lr_img=-1", ("lr_img", "greater than 0", "got -1")),
        ("lr_img=.nan", ("lr_img", "got nan")),
        ("lr_img=fast", ("lr_img", "valid number", "'fast'")),
        ("distance=far", ("distance", "'layerwise', 'mse' or 'cos'", "'far'")),
        ("victim_augment=colour", ("'colour'", "did you mean color?")),
        ("trigger_position=middle", ("'middle'", "'center'")),
        ("control=maybe", ("control", "'maybe'")),
    ],
)
def test_settings(setting: str, expected: tuple[str, ...], cli: Cli, tiny_options: Options) -> None:
    refuse(cli, "attack", *tiny_options(), "--set", setting, expected=expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["atack"], ("'atack'", "Did you mean 'attack'?")),
        (["attack", "--iterationz", "3"], ("--iterationz", "--iterations")),
        (["attack", "--ipc"], ("--ipc", "requires an argument")),
        (["attack", "digits"], ("unexpected extra argument", "digits")),
        (["evaluate"], ("SOURCE",)),
        (["list", "attackss"], ("'attackss'", "'attacks'")),
        (["attack", "--out", ""], ("'--out'", "got an empty one")),
        (["attack", "--resume"], ("--resume needs the run's folder: --out FOLDER",)),
        (["attack", "--dataset", "digits"], ("no attack was chosen", "distillsec list attacks")),
    ],
)
def test_commands(words: list[str], expected: tuple[str, ...], cli: Cli) -> None:
    check(cli(*words), expected, set())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- ipc\n- 3\n", "expected a mapping"),
        (b"3", "expected a mapping"),
        (b"", "expected a mapping"),
        (b"ipc: [1", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"ipc: 1\n" * 200_000, "too large: 1400000 bytes, at most 262144"),
        (b"ipc: !!python/object/apply:os.mkdir [ran]", "not YAML"),
    ],
)
def test_configuration_files(
    content: bytes, expected: str, cli: Cli, tiny_options: Options
) -> None:
    Path("c.yaml").write_bytes(content)
    refuse(cli, "attack", *tiny_options(), "--config", "c.yaml", expected=("c.yaml: ", expected))


def arrays(**changes: Any) -> None:
    rows = np.arange(40)
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez("set.npz", **{"x": images, "y": rows % 2, **changes})


def truncated() -> None:
    arrays()
    Path("set.npz").write_bytes(Path("set.npz").read_bytes()[:500])


def images(count: int, classes: str) -> None:
    for name in classes:
        Path("set", name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), 9 * number).save(Path("set", name, f"{number}.png"))


def posing() -> None:
    images(6, "ab")
    Path("set/a/x.jpg").write_text("I am no picture")


DATA: dict[str, tuple[str, Callable[[], None], tuple[str, ...]]] = {
    "objects": ("npz:set.npz", lambda: arrays(x=np.array([None] * 40)), ("x", "Python objects")),
    "nan": ("npz:set.npz", lambda: arrays(x=np.full((40, 8, 8), np.nan)), ("x holds NaN",)),
    "shape": ("npz:set.npz", lambda: arrays(x=np.zeros((40, 9), np.uint8)), ("(40, 9)", "NHWC")),
    "labels": ("npz:set.npz", lambda: arrays(y=np.arange(3)), ("(3,)", "(40,)")),
    "truncated": ("npz:set.npz", truncated, ("not a readable npz file",)),
    "one class": ("folder:set", lambda: images(3, "a"), ("1 class folders", "at least 2")),
    "no picture": ("folder:set", posing, ("set/a/x.jpg", "not a readable image")),
    "too few": ("folder:set", lambda: images(1, "ab"), ("too few images to split",)),
}


@pytest.mark.parametrize(("name", "make", "expected"), DATA.values(), ids=DATA)
def test_data(
    name: str, make: Callable[[], None], expected: tuple[str, ...], cli: Cli, tiny_options: Options
) -> None:
    make()
    refuse(cli, "attack", *tiny_options(dataset=name), expected=(name.partition(":")[2], *expected))


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300])
def test_folders_that_cannot_be_made(out: str, cli: Cli, tiny_options: Options) -> None:
    Path("file").touch()
    answer = cli("attack", *tiny_options(), "--quiet", "--out", out)
    check(answer, (f"cannot use {out}",), {Path.cwd() / "file"})


# Received files ----------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def metadata(good: Path) -> dict[str, Any]:
    with safe_open(good, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["distillsec"])
    return found


def rewritten(good: Path, path: Path, scale: float = 1.0, extra: int = 0) -> None:
    tensors, info = load_file(good), metadata(good)
    info["classes"] += [f"more {number}" for number in range(extra)]
    tensors["images"] *= scale
    save_file(tensors, path, metadata={"distillsec": json.dumps(info)})


PAIR = [torch.randn(10, 1, 8, 8), torch.arange(10)]
SENT: dict[str, tuple[str, Callable[[Path, Path], Any], tuple[str, ...]]] = {
    "truncated": (
        "set.safetensors",
        lambda good, path: path.write_bytes(good.read_bytes()[:300]),
        ("truncated or corrupted",),
    ),
    "empty": ("set.safetensors", lambda _, path: path.touch(), ("not a safetensors file",)),
    "text": ("set.safetensors", lambda _, path: path.write_text("hello"), ("not a safetensors",)),
    "nan": ("set.safetensors", lambda g, path: rewritten(g, path, float("nan")), ("NaN",)),
    "classes": (
        "set.safetensors",
        lambda good, path: rewritten(good, path, extra=2),
        ("12 classes", "don't fit digits", "10 classes"),
    ),
    "a trigger": (
        "set.safetensors",
        lambda good, path: path.write_bytes(good.with_name("trigger.safetensors").read_bytes()),
        ("holds the tensors mask, pattern",),
    ),
    "empty .pt": ("set.pt", lambda _, path: path.touch(), ("not a PyTorch file",)),
    "code in a .pt": (
        "set.pt",
        lambda _, path: torch.save({"data": [PAIR], "more": Trap()}, path),
        ("refused unread", "posix.mkdir"),
    ),
    "a bare pickle": (
        "set.pt",
        lambda _, path: path.write_bytes(pickle.dumps(Trap())),
        ("refused unread",),
    ),
    "a folder": ("set", lambda _, path: path.mkdir(), ("set: is no run folder and holds no set",)),
}


@pytest.mark.parametrize(("name", "make", "expected"), SENT.values(), ids=SENT)
def test_damaged_files_are_refused(
    name: str,
    make: Callable[[Path, Path], Any],
    expected: tuple[str, ...],
    finished: Path,
    cli: Cli,
) -> None:
    make(finished / "distilled.safetensors", Path(name))
    refuse(cli, "evaluate", name, "--dataset", "digits", "--threads", 1, expected=(name, *expected))


def test_evaluating_without_a_set_or_data_is_refused(finished: Path, cli: Cli) -> None:
    refuse(cli, "evaluate", "nowhere", expected=("nowhere: no such run folder or file",))
    file = finished / "distilled.safetensors"
    refuse(cli, "evaluate", file, expected=(str(file), "--dataset NAME"))
    for trigger, expected in (
        ("nowhere", "no such file"),
        (file, "no trigger: its metadata lacks"),
    ):
        refuse(cli, "evaluate", finished, "--trigger", trigger, expected=(str(trigger), expected))
