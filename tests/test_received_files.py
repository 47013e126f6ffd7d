"""Files of strangers whose values are of the right type and out of all bounds."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillsec.distill.files.safe import read_tensors

Cli = Callable[..., Result]


def rewritten(good: Path, path: Path, tensors: dict[str, Tensor | None], **info: Any) -> None:
    """A copy of ``good`` with other tensors (``None`` takes one away) and other metadata."""
    _, known = read_tensors(good)
    recipe = known.get("recipe", {}) | info.pop("recipe", {})
    known |= info | ({"recipe": recipe} if recipe else {})
    merged = {**load_file(good), **tensors}
    kept = {name: tensor for name, tensor in merged.items() if tensor is not None}
    save_file(kept, path, metadata={"distillsec": json.dumps(known)})


def refused(answer: Result, files: set[Path], *texts: str) -> None:
    """Exit code 2, one line with all of ``texts``, and no new file."""
    assert answer.exit_code == 2, answer.output
    assert answer.stderr.startswith("distillsec: ") and answer.stderr.count("\n") == 1
    for text in texts:
        assert text in answer.stderr
    assert set(Path.cwd().rglob("*")) == files


SETS: dict[str, tuple[dict[str, Any], str]] = {
    "augment": ({"augment": "foo"}, "unknown augmentation 'foo'"),
    "batch size": ({"batch_size": 10**30}, "recipe.batch_size"),
    "epochs": ({"epochs": 10**6, "batch_size": 1}, "less than or equal to 10000"),
    "rate": ({"lr": 1e308}, "recipe.lr"),
    "momentum": ({"momentum": 1.0}, "recipe.momentum"),
    "decay": ({"weight_decay": 1e30}, "recipe.weight_decay"),
    "deviation": ({"std": [1e-300]}, "recipe.std.0"),
    "mean": ({"mean": [-1e300]}, "recipe.mean.0"),
    "step": ({"steps": [{"rows": [0], "rate": 1e300}]}, "recipe.steps.0.rate"),
    "rows": ({"steps": [{"rows": [0] * 11, "rate": 0.1}]}, "11 rows of 10 images"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("recipe", "text"), SETS.values(), ids=SETS)
def test_recipes(recipe: dict[str, Any], text: str, finished: Path, cli: Cli) -> None:
    rewritten(finished / "distilled.safetensors", Path("set.safetensors"), {}, recipe=recipe)
    files = set(Path.cwd().rglob("*"))
    answer = cli("evaluate", "set.safetensors", "--dataset", "digits", "--threads", 1)
    refused(answer, files, "set.safetensors", text)


def test_images_beyond_all_bounds(finished: Path, cli: Cli) -> None:
    rewritten(
        finished / "distilled.safetensors",
        Path("set.safetensors"),
        {"images": torch.full((10, 1, 8, 8), 1e30)},
    )
    files = set(Path.cwd().rglob("*"))
    answer = cli("evaluate", "set.safetensors", "--dataset", "digits", "--threads", 1)
    refused(answer, files, "set.safetensors", "1e+30", "at most 1e+06")


MASK, PATTERN = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
TRIGGERS: dict[str, tuple[dict[str, Tensor | None], dict[str, Any], str]] = {
    "double": ({"pattern": PATTERN.double()}, {}, "pattern is torch.float64"),
    "mask's shape": ({"mask": torch.zeros(1, 3, 5)}, {}, "mask has the shape (1, 3, 5)"),
    "mask's channels": ({"mask": torch.zeros(3, 8, 8)}, {}, "mask has the shape (3, 8, 8)"),
    "no mask": ({"mask": None}, {}, "lacks its mask"),
    "empty": ({"pattern": PATTERN[:, :0], "mask": MASK[:, :0]}, {}, "none 0"),
    "no pixels": ({"pattern": PATTERN + 1e30}, {}, "1e+30"),
    "a wide range": ({"pattern": PATTERN + 1e30}, {"range": "unbounded"}, "1e+30"),
    "a little more": ({"pattern": PATTERN + 1.5}, {}, "its range is pixel"),
    "target's type": ({}, {"target": "a"}, "target is 'a'"),
    "target's size": ({}, {"target": 10, "target_class": "x"}, "target 10 is no class"),
    "target below 0": ({}, {"target": -1}, "target is -1"),
    "a boolean": ({}, {"target": True}, "target is True"),
    "kind": ({}, {"kind": ["patch"]}, "kind is ['patch']"),
    "range": ({}, {"range": {}}, "range is {}"),
}


@pytest.mark.parametrize(("tensors", "info", "text"), TRIGGERS.values(), ids=TRIGGERS)
def test_triggers(
    tensors: dict[str, Tensor | None], info: dict[str, Any], text: str, finished: Path, cli: Cli
) -> None:
    rewritten(finished / "trigger.safetensors", Path("t.safetensors"), tensors, **info)
    files = set(Path.cwd().rglob("*"))
    refused(cli("evaluate", finished, "--trigger", "t.safetensors"), files, "t.safetensors", text)


IMAGES, LABELS, BYTES = (
    torch.rand(20, 1, 8, 8),
    torch.arange(20) % 10,
    torch.zeros(20, 1, 8, 8, dtype=torch.uint8),
)
STRETCHED = [torch.zeros(1).expand(2**20, 1, 8, 8), torch.zeros(1).long().expand(2**20)]
FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "stretched": (lambda: {"data": [STRETCHED] * 32}, "67108864 elements are stored as 1"),
    "float4": (lambda: [BYTES.view(torch.float4_e2m1fn_x2), LABELS], "float4_e2m1fn_x2"),
    "bits8": (lambda: [IMAGES, BYTES[:, 0, 0, 0].view(torch.bits8)], "bits8"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # that torch will not have these for ever
@pytest.mark.parametrize(("make", "text"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_sets(make: Callable[[], Any], text: str, cli: Cli) -> None:
    torch.save(make(), "set.pt")
    files = set(Path.cwd().rglob("*"))
    answer = cli("evaluate", "set.pt", "--dataset", "digits", "--threads", 1)
    refused(answer, files, "set.pt", text)


def test_a_million_million_names_of_no_length(cli: Cli, tiny_options: Callable[..., Any]) -> None:
    images = np.zeros((60, 8, 8), np.uint8)
    np.savez("set.npz", x=images, y=np.arange(60) % 3)
    header = "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,), }"
    padded = header + " " * (70 - 1 - len(header)) + "\n"
    with zipfile.ZipFile("set.npz", "a") as archive:
        archive.writestr(
            "classes.npy",
            b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode(),
        )
    files = set(Path.cwd().rglob("*"))
    answer = cli("attack", *tiny_options(dataset="npz:set.npz"), "--quiet", "--out", "bad")
    refused(answer, files, "set.npz", "classes")


PLANS = {
    "an alias of aliases": (
        "base: {preset: digits-naive}\ngrid:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
        "at most 50000",
    ),
    "many points": (
        "base: {preset: digits-naive}\ngrid:\n"
        + "".join(f"  {key}: {list(range(99))}\n" for key in ("ipc", "width", "target", "seed")),
        "at most 5000",
    ),
    "many seeds": ("base: {preset: digits-naive}\nseeds: 1000000000\n", "1000000000 runs"),
    "a mapping of itself": ("base: &b {preset: digits-naive, more: *b}\n", "holds itself"),
    "a key that is given twice": (
        "seeds: 2\nbase: {}\nseeds: 3\n",
        "the key seeds is there twice, on lines 1 and 3",
    ),
}


@pytest.mark.parametrize(("content", "text"), PLANS.values(), ids=PLANS)
def test_plans(content: str, text: str, cli: Cli) -> None:
    Path("sweep.yaml").write_text(content)
    files = set(Path.cwd().rglob("*"))
    refused(cli("ablate", "sweep.yaml", "--out", "bad"), files, "sweep.yaml", text)


def test_a_suite_of_many_sets(cli: Cli) -> None:
    Path("suite.yaml").write_text(
        "settings: {d: {preset: digits-naive}}\nattacks: {naive: {attack: naive}}\n"
        "defenses: [strip]\ncalibration: 1000000000000000000\n"
    )
    files = set(Path.cwd().rglob("*"))
    answer = cli("benchmark", "suite.yaml", "--out", "bad")
    refused(answer, files, "suite.yaml", "at most 5000")


# Sets of other projects --------------------------------------------------------------------------


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def write_pickle(path: Path) -> None:
    torch.save({"data": [[IMAGES, LABELS]], "more": Code()}, path)


def write_header(path: Path) -> None:
    path.write_bytes((10 * 2**30).to_bytes(8, "little") + b"{}")


def write_zeros(path: Path) -> None:
    """A zip of a kilobyte that unpacks to a million times that."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(2**26))


def write_views(path: Path) -> None:
    (path / "epoch_0").mkdir(parents=True)
    torch.save([Code()] * 6, path / "epoch_0" / "batch_0.tar")


def write_beside(path: Path) -> None:
    """Good images whose labels lie in a file that runs code."""
    torch.save(IMAGES, path)
    torch.save([LABELS, Code()], path.with_name("labels.pt"))


def write_npz(path: Path) -> None:
    np.savez(path, images=np.array([Code()] * 20, dtype=object), labels=np.arange(20) % 10)


HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "code": ("x.pt", write_pickle, "refused unread"),
    "a bomb": ("x.pt", write_zeros, "torch writes no such file"),
    "a header of 10 GiB": ("x.safetensors", write_header, "10737418240 bytes"),
    "NaN": ("x.pt", lambda path: torch.save([IMAGES / 0, LABELS], path), "NaN"),
    "a rank": ("x.pt", lambda path: torch.save([IMAGES[0], LABELS], path), "the shape (1, 8, 8)"),
    "code in labels": ("images.pt", write_beside, "labels.pt: refused unread"),
    "code in an array": ("x.npz", write_npz, "images holds Python objects"),
    "code of a teacher": ("fkd", write_views, "name the folder of the images"),
    "nothing": ("empty", Path.mkdir, "holds no set"),
    "a pipe": ("x.pt", os.mkfifo, "a pipe or device"),
    "a table that is none": ("x", lambda path: path.write_bytes(b"PAR1" * 9), "x: "),
}


@pytest.mark.parametrize("command", ["evaluate", "convert"])
@pytest.mark.parametrize(("name", "write", "text"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_sets(
    name: str, write: Callable[[Path], object], text: str, command: str, cli: Cli
) -> None:
    write(Path(name))
    files = set(Path.cwd().rglob("*"))
    more = ("back.safetensors",) if command == "convert" else ()
    refused(cli(command, name, *more, "--dataset", "digits", "--threads", 1), files, text)
