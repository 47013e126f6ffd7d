"""Random changes to every kind of file that is read: each is read, or refused in one line.

``pytest tests/fuzz`` takes the seconds of ``--fuzz-seconds`` (5) for all kinds together;
``--fuzz-samples 10000`` makes that many samples instead. A sample is a kind, ``--fuzz-seed`` and a
number: a failure names it, and the same names give the same sample again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import RandomSampler

from distillsec.attacks import goal_from, trigger_from
from distillsec.attacks.triggers.generator import fresh_weights
from distillsec.attacks.triggers.warp import identity_grid
from distillsec.distill.backends.experts import open_buffer
from distillsec.distill.core.backend import Backend
from distillsec.distill.core.loop import distil
from distillsec.distill.core.resume import LoopState
from distillsec.distill.core.run import Observer
from distillsec.distill.core.start import start_run
from distillsec.distill.core.task import Task
from distillsec.distill.data.registry import load_dataset
from distillsec.distill.files.artifact import load_set, load_trigger, save_set, save_trigger
from distillsec.distill.files.formats import labelled, read_received
from distillsec.distill.files.formats.stored_set import received
from distillsec.distill.files.safe import read_json_lines, read_tensors, write_tensors
from distillsec.distill.preprocessing import Preprocessing, fit_zca
from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError, RunError, Step
from distillsec.eval.config.layers import by_owner, gather
from distillsec.eval.config.schema import configure
from distillsec.eval.grid.ledger import Ledger
from distillsec.eval.grid.suite import read_suite
from distillsec.eval.grid.sweep import read_sweep
from distillsec.eval.report.load import load_experiment
from distillsec.eval.results.record import Record, read_record
from distillsec.eval.run.reading import ReadingOptions, read_set
from distillsec.eval.run.setup import prepare

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

SHAPE = (1, 8, 8)
SPACE = Preprocessing((0.5,), (0.25,))
CLASSES = tuple("abcdefghij")


@dataclass(frozen=True)
class Kind:
    """A kind of input. make: a good one in an empty folder. change: it into a sample, with
    mutations. read: what a user's command does with it first."""

    make: Callable[[Path], None]
    change: Callable[[Path, Any], None]
    read: Callable[[Path], object]


@dataclass(frozen=True)
class Tools:
    """The fixtures that the kinds need."""

    task: Callable[..., Task]
    backend: Callable[..., Backend]
    rewrite: Callable[[Path, Mapping[str, Tensor], Any], None]
    canary: Callable[[str], Any]
    cli: Callable[..., Result]
    finished: Path


def good_set(**recipe: Any) -> DistilledSet:
    batch = Batch(images=torch.rand(10, *SHAPE), labels=torch.arange(10))
    return DistilledSet(
        batch=batch, classes=CLASSES, recipe=Recipe(preprocessing=SPACE, epochs=3, **recipe)
    )


def change_bytes(path: Path, mutations: Any) -> None:
    path.write_bytes(mutations.content(path.read_bytes()))


def change_json(path: Path, mutations: Any) -> None:
    if mutations.often(3):
        change_bytes(path, mutations)
    else:
        path.write_text(json.dumps(mutations.value(json.loads(path.read_text()))))


def change_lines(path: Path, mutations: Any) -> None:
    if mutations.often(3):
        change_bytes(path, mutations)
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [mutations.value(row) if mutations.often(2) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tensor_changer(tools: Tools) -> Callable[[Path, Any], None]:
    def change(path: Path, mutations: Any) -> None:
        if mutations.often(3):
            change_bytes(path, mutations)
            return
        tensors, info = read_tensors(path)
        changed = mutations.tensors(tensors) if mutations.often(2) else tensors
        described = mutations.value(info) if changed is tensors or mutations.often(3) else info
        tools.rewrite(path, changed, described)

    return change


# Sets and triggers -------------------------------------------------------------------------------


def make_set(path: Path) -> None:
    steps = (Step(rows=(0, 1, 2), rate=0.1), Step(rows=(3,), rate=0.2))
    zca = fit_zca(torch.rand(20, *SHAPE))
    space = Preprocessing((0.5,), (0.25,), zca)
    recipe = Recipe(preprocessing=space, epochs=3, steps=steps, initial=torch.rand(7))
    save_set(path / "x", DistilledSet(batch=good_set().batch, classes=CLASSES, recipe=recipe))


def make_trigger(path: Path) -> None:
    mask = torch.zeros(SHAPE)
    mask[:, 5:, 5:] = 1
    info = {"kind": "patch", "target": 0, "range": "pixel", "goal": "all-to-one", "l2": 3.0}
    bound = torch.tensor(0.1, dtype=torch.float64)
    more = {
        "perturbation": 0.1 * torch.rand(SHAPE),
        "linf_bound": bound,
        "grid": 0.9 * identity_grid(SHAPE[1:]),
        "epsilon": torch.full((1, 1, 1), 0.1),
        "example": torch.rand(SHAPE),
        **fresh_weights(1, 4, torch.Generator().manual_seed(0)),
    }
    save_trigger(path / "x", {"pattern": torch.rand(SHAPE), "mask": mask, **more}, info)


def read_trigger(path: Path) -> None:
    tensors, info = load_trigger(path / "x")
    trigger, goal = trigger_from(info, tensors), goal_from(info, len(CLASSES))
    json.dumps({**trigger.describe(), **goal.describe(CLASSES)}, allow_nan=False)
    if trigger.fits(SHAPE):
        assert trigger.stamp(torch.rand(2, *SHAPE)).isfinite().all()
        trigger.picture()


# Files of other projects -------------------------------------------------------------------------


def make_pt(path: Path) -> None:
    pairs = [[torch.rand(10, *SHAPE), torch.arange(10)] for _ in range(3)]
    torch.save({"data": pairs, "accs_all_exps": {"ConvNet": [np.float64(0.5)]}}, path / "x")


def pt_changer(tools: Tools) -> Callable[[Path, Any], None]:
    def change(path: Path, mutations: Any) -> None:
        kind = mutations.rng.randrange(4)
        if kind == 0:
            change_bytes(path, mutations)
        elif kind == 1:  # the pickle alone, in a sound archive
            repack(path, mutations)
        else:
            value = foreign_value(mutations, tools.canary(str(path.parent / "ran")))
            modern = not mutations.often(3)
            try:
                torch.save(value, path, _use_new_zipfile_serialization=modern)
            except (RuntimeError, NotImplementedError, ValueError):  # torch cannot save it
                return

    return change


def repack(path: Path, mutations: Any) -> None:
    packing = zipfile.ZIP_DEFLATED if mutations.often(4) else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    chosen = "data.pkl" if not mutations.often(4) else mutations.rng.choice(sorted(parts))
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in parts.items():
            archive.writestr(name, mutations.content(content) if chosen in name else content)


def foreign_value(mutations: Any, canary: Any) -> Any:
    images, labels = torch.rand(10, *SHAPE), torch.arange(10)
    exotic: tuple[Callable[[], Any], ...] = (
        lambda: mutations.tensor(images),
        lambda: images[:1].expand(mutations.rng.choice((10, 10**6, 10**9)), *SHAPE),
        lambda: torch.as_strided(images, (10**6, *SHAPE), (0, 0, 1, 1)),
        images.to_sparse,
        lambda: images.to("meta"),
        lambda: torch._neg_view(images),
        lambda: images.to(torch.complex64).conj(),
        lambda: torch.quantize_per_tensor(images, 0.1, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([images[0], images[1]]),
        lambda: torch.zeros(10, *SHAPE, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        lambda: torch.nn.Parameter(images),
        lambda: canary,
        lambda: images.numpy(),
        lambda: mutations.hostile(),
    )
    pair = [images, mutations.tensor(labels) if mutations.often(3) else labels]
    pair[0 if not mutations.often(4) else 1] = mutations.rng.choice(exotic)()
    forms = (
        {"data": [pair] * mutations.rng.choice((1, 3, 500, 2000))},
        {"images": pair[0], "labels": pair[1]},
        pair,
        {"data": [[images, labels]], "more": pair[0]},
        {"data": mutations.value([[1, 2], [3, [4]]])},
    )
    return mutations.rng.choice(forms)


def make_separate(path: Path) -> None:
    """Images, labels and a learning rate, a file each, as MTT and DD-Ranking have them."""
    labels = 9.0 * torch.eye(10) - 1
    parts = {"images": torch.rand(10, *SHAPE), "labels": labels, "lr": torch.tensor(0.1)}
    for word, tensor in parts.items():
        torch.save(tensor, path / f"{word}_best.pt")


def make_views(path: Path) -> None:
    """A teacher's labels of two epochs of views, two files each."""
    sampler = RandomSampler(range(10), generator=torch.Generator().manual_seed(42))
    for epoch in range(2):
        folder = path / f"epoch_{epoch}"
        folder.mkdir()
        for number, rows in enumerate(torch.tensor(list(sampler)).split(6)):
            views = [torch.rand(len(rows), 4), torch.zeros(len(rows), dtype=torch.bool)]
            logits = 9 * torch.eye(10)[rows].half()
            torch.save([*views, None, None, None, logits], folder / f"batch_{number}.tar")


def parts_changer(tools: Tools) -> Callable[[Path, Any], None]:
    """Changes to one of several files of ``torch.save``, or to which there are."""

    def change(path: Path, mutations: Any) -> None:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        chosen = mutations.rng.choice(files)
        kind = mutations.rng.randrange(6)
        if kind == 0:
            chosen.unlink()
        elif kind == 1:
            shutil.copy(chosen, chosen.with_name(f"images_{mutations.rng.randrange(9)}.pt"))
        elif kind < 4:
            pt_changer(tools)(chosen, mutations)
        else:
            value = torch.load(chosen, weights_only=True)
            parts = value if isinstance(value, list) else [value]
            place = mutations.rng.randrange(len(parts))
            wrong = mutations.tensor(parts[place]) if torch.is_tensor(parts[place]) else 3
            parts[place] = wrong if mutations.often(2) else mutations.hostile()
            with contextlib.suppress(RuntimeError, ValueError, OverflowError):
                torch.save(parts if isinstance(value, list) else parts[0], chosen)

    return change


def read_label_views(path: Path) -> None:
    stored = received(path, torch.zeros(10, *SHAPE), torch.arange(10))
    labels = labelled(path, stored, 10, path).labels
    assert labels is not None and labels.isfinite().all()


def make_others(path: Path) -> None:
    save_file({"images": torch.rand(10, *SHAPE), "labels": torch.arange(10)}, path / "x")


def change_others(path: Path, mutations: Any) -> None:
    if mutations.often(3):
        change_bytes(path, mutations)
    else:
        tensors = mutations.tensors(load_file(path))
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def make_table(path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, format="PNG")
    images = [{"bytes": buffer.getvalue(), "path": "x"}] * 10
    write_table(path / "x", {"image": images, "label": list(range(10))}, parquet)


def write_table(path: Path, columns: Any, parquet: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table(columns), path)


def change_table(path: Path, mutations: Any) -> None:
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    table = parquet.read_table(path)
    kind = mutations.rng.randrange(4)
    if kind == 0:
        with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    if kind < 2:
        change_bytes(path, mutations)
        return
    columns = table.to_pydict()
    name = mutations.rng.choice(sorted(columns))
    row = mutations.rng.randrange(10)
    others = ({"bytes": b"x"}, {"bytes": None}, [[1, 2], [3]], [0.5] * 10, None, -5, 2**40, "x")
    wrong = mutations.rng.choice(others)
    columns[name] = [wrong] * 10 if mutations.often(2) else [*columns[name][:row], wrong]
    with contextlib.suppress(arrow.ArrowException, OverflowError):  # no table has such columns
        write_table(path, columns, parquet)


def make_npz(path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez(path / "x", x=images, y=np.arange(40) % 2, classes=np.array(["a", "b"]))
    (path / "x.npz").rename(path / "x")


def npz_changer(tools: Tools) -> Callable[[Path, Any], None]:
    def change(path: Path, mutations: Any) -> None:
        if mutations.often(4):
            change_bytes(path, mutations)
            return
        with np.load(path) as good:
            arrays = {name: good[name] for name in good}
        name = mutations.rng.choice(sorted(arrays))
        changed = arrays.pop(name)
        others: tuple[Callable[[], Any], ...] = (
            lambda: changed.astype(mutations.rng.choice(("f4", "f8", "i1", "c8", "O", "U3", "f2"))),
            lambda: np.array([tools.canary(str(path.parent / "ran"))], dtype=object),
            lambda: changed[:: mutations.rng.choice((2, 50))],
            lambda: np.repeat(changed, 3, axis=0),
            lambda: changed.reshape(-1, 1),
            lambda: changed.astype(f"U{mutations.rng.choice((1, 1000))}"),
            lambda: np.zeros((0, *changed.shape[1:]), changed.dtype),
            lambda: changed.astype("f4") * mutations.rng.choice((1e30, np.nan, -1)),
        )
        with np.errstate(all="ignore"), contextlib.suppress(ValueError):  # no numbers of names
            arrays[name + (" " if mutations.often(9) else "")] = mutations.rng.choice(others)()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        path.write_bytes(buffer.getvalue())
        if mutations.often(2):
            rewrite_headers(path, mutations)

    return change


def rewrite_headers(path: Path, mutations: Any) -> None:
    """Another shape or type in an array's header, in a sound archive."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = mutations.rng.choice(sorted(parts))
    for old, new in ((b"(40,", b"(99999999,"), (b"<i8", b"|O8"), (b"'|u1'", b"'<U0'")):
        if mutations.often(2):
            parts[name] = parts[name].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def make_images(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = path / "set" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")


def change_images(path: Path, mutations: Any) -> None:
    files = sorted(path.rglob("*.png"))
    chosen = mutations.rng.choice(files)
    kind = mutations.rng.randrange(6)
    if kind == 0:
        chosen.unlink()
        chosen.symlink_to(mutations.rng.choice(("/dev/zero", chosen.name, "/nowhere", "..")))
    elif kind == 1:
        chosen.rename(chosen.with_suffix(mutations.rng.choice((".jpg", ".PNG", ".txt", ""))))
    elif kind == 2:
        os.mkfifo(chosen.with_name("pipe.png"))
    elif kind == 3:
        chosen.parent.rename(
            chosen.parent.with_name(mutations.rng.choice(("Test", "\x1b", "d" * 250)))
        )
    elif kind == 4:  # a picture that says it is very large
        content = bytearray(chosen.read_bytes())
        content[16:24] = b"\x00\x00\xff\xff" * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        chosen.write_bytes(content)
    else:
        change_bytes(chosen, mutations)


# Runs --------------------------------------------------------------------------------------------


def make_record(path: Path) -> None:
    config = configure(dataset="digits", attack="naive", ipc=1, device="cpu", threads=1)
    Record(
        kind="attack",
        status="done",
        config=config.flat(),
        config_key=config.key(),
        control_key=config.control_key(),
        seeds=[0, 1],
        hooks=[{"name": "naive", "threat_model": "data owner"}],
        control={"folder": "control", "key": "k", "reused": False},
        trigger={
            "kind": "patch",
            "range": "pixel",
            "target": 0,
            "target_class": "0",
            "min": 1.0,
            "max": 1.0,
            "l2": 2.0,
            "linf": 1.0,
        },
    ).write(path / "record.json")
    (path / "progress.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n' * 3)


def run_changer(tools: Tools) -> Callable[[Path, Any], None]:
    """Changes to one file of a run folder."""

    def change(path: Path, mutations: Any) -> None:
        files = [file for file in path.rglob("[!.]*") if file.is_file()]
        chosen = mutations.rng.choice(sorted(files))
        by_ending = {
            ".json": change_json,
            ".jsonl": change_lines,
            ".safetensors": tensor_changer(tools),
        }
        by_ending.get(chosen.suffix, change_bytes)(chosen, mutations)

    return change


def stop(path: Path) -> None:
    """Make a finished run one that was stopped before its victims were trained."""
    record = json.loads((path / "record.json").read_text())
    (path / "record.json").write_text(json.dumps({**record, "status": "running"}))
    for name in ("distilled.safetensors", "checkpoint/victims.json"):
        (path / name).unlink()


def command(tools: Tools, path: Path, *words: object) -> None:
    """A command on the run in ``path / "run"``; its error as the exception that it stands for."""
    done = tools.cli(*words, "--threads", 1, "--quiet")
    if done.exit_code in (1, 2) and isinstance(done.exception, SystemExit):
        raise (RunError if done.exit_code == 1 else RequestError)(done.stderr.rstrip("\n"))
    if done.exception is not None:
        raise done.exception


def make_checkpoint(tools: Tools) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        class Keeper(Observer):
            def on_iteration(self, iteration: int, *arguments: Any) -> None:
                state = arguments[-1]()
                write_tensors(path / "x", state.tensors(), {"iteration": state.iteration})

        task = tools.task(iterations=1, ipc=1, scratch=path / "scratch")
        distil(task, tools.backend("dd", task), observer=Keeper())

    return make


def read_checkpoint(tools: Tools) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        tensors, info = read_tensors(path / "x")
        iteration = info.get("iteration")
        if type(iteration) is not int:
            return  # the run folder's reader refuses it
        try:
            state = LoopState.from_tensors(iteration, tensors)
        except (KeyError, ValueError):
            return
        task = tools.task(iterations=2, ipc=1, scratch=path / "scratch")
        distil(task, tools.backend("dd", task), state=state)

    return read


def make_ledger(path: Path) -> None:
    ledger = Ledger(path)
    for event in ("again", "done", "failed", "lost"):
        ledger.write(event, f"place-{event}", seconds=1.5, reason="why")


def read_ledger(path: Path) -> None:
    ledger = Ledger(path)
    for row in ledger.rows():
        assert row["event"] and row["place"] is not None and row["seconds"] >= 0
    sum(ledger.seconds().values())
    read_json_lines(path / "ledger.jsonl")


def experts_of(tools: Tools, path: Path) -> None:
    task = tools.task(scratch=path / "scratch")
    backend = tools.backend("mtt", task)
    run = start_run(task, backend)
    plan = backend._plan(task)  # type: ignore[attr-defined]
    buffer = open_buffer(run, plan, 0, fresh=True)
    for expert in range(plan.experts):
        assert buffer.weights(expert, plan.epochs).isfinite().all()


def expert_changer(tools: Tools) -> Callable[[Path, Any], None]:
    def change(path: Path, mutations: Any) -> None:
        files = sorted(path.rglob("*.*"))
        chosen = mutations.rng.choice(files)
        if chosen.suffix == ".json":
            change_json(chosen, mutations)
        else:
            tensor_changer(tools)(chosen, mutations)

    return change


# Configurations ----------------------------------------------------------------------------------

SCALARS = (
    *("2024-13-45", "2024-01-01", "1:2:3:4", "'9'", "~", ".inf", ".nan", "!!int x", "!!float ''"),
    *("!!python/object/apply:os.mkdir [ran]", "!!timestamp foo", "!!binary '='", "!!bool maybe"),
    *("!!set {a, b}", "!!omap [a: 1]", "&a [*a]", "*b", "{[1]: 2}", "{{}: 1}", "{a: 1, a: 2}"),
    *("9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 9999, "1e999", "-" * 50, "- " * 999, "? [a]"),
    *("[" * 3000, "{a: " * 3000, "{<<: {a: 1}}", "{<<: 3}", "|\n  text", '"\\x00"', "\t", "%TAG"),
    *("naive", "nowhere:Evil", "os:mkdir", "folder:/", "npz:/dev/zero", "[]", "{}", "x" * 9999),
    "\u202e",
)
SWEEP = """
base: {preset: digits-naive, iterations: 2}
grid: {ipc: [1, 2], poison_rate: [0.1, 0.2]}
zip: {width: [4, 8], depth: [1, 2]}
each: {seed: [0, 1]}
seeds: 2
defenses: [strip]
"""
SUITE = """
settings: {d: {preset: digits-naive, seeds: 1, attacks: {naive: {poison_rate: 0.2}}}}
attacks: {naive: {attack: naive}}
defenses: [strip]
calibration: 1
seeds: 2
"""
CONFIG = "dataset: digits\nattack: naive\nipc: 1\npoison_rate: 0.1\nvictim_network: [convnet]\n"
TEXTS = {"config.yaml": CONFIG, "sweep.yaml": SWEEP, "suite.yaml": SUITE}


def make_yaml(path: Path) -> None:
    for name, text in TEXTS.items():
        (path / name).write_text(text)


def change_yaml(path: Path, mutations: Any) -> None:
    kind = mutations.rng.randrange(4)
    text = path.read_text()
    if kind == 0:
        change_bytes(path, mutations)
    elif kind == 1:
        path.write_text(json.dumps(mutations.value(yaml.safe_load(text))))
    else:
        words = text.split(" ")
        for _ in range(mutations.rng.randint(1, 2)):
            place = mutations.rng.randrange(len(words))
            words[place] = mutations.rng.choice(SCALARS)
        path.write_text(" ".join(words))


def read_yaml_files(path: Path) -> None:
    for name, read in (
        ("config.yaml", lambda file: configure(**gather(file=file))),
        ("sweep.yaml", read_sweep),
        ("suite.yaml", read_suite),
    ):
        text = (path / name).read_bytes()
        if text != TEXTS[name].encode():  # only the changed one: reading a suite takes a while
            read(path / name)


def kinds(tools: Tools) -> dict[str, Kind]:
    """Every kind of input by its name."""
    tensors, x = tensor_changer(tools), "x"

    def at(name: str, change: Callable[[Path, Any], None]) -> Callable[[Path, Any], None]:
        return lambda path, mutations: change(path / name, mutations)

    def one_yaml(path: Path, mutations: Any) -> None:
        change_yaml(path / mutations.rng.choice(sorted(TEXTS)), mutations)

    setup = prepare(configure(dataset="digits", device="cpu", threads=1))
    none = setup.data.train.rows(torch.zeros(0, dtype=torch.int64))

    def imported(path: Path) -> None:
        """The set in ``x`` or else in the folder, as evaluate reads it, without training."""
        source = path / x if (path / x).exists() else path
        found = read_set(source, setup, ReadingOptions(), none)
        assert found.distilled.batch.images.isfinite().all()

    def make_run(path: Path) -> None:
        shutil.copytree(tools.finished, path / "run")

    def make_stopped(path: Path) -> None:
        make_run(path)
        stop(path / "run")

    def evaluate(path: Path) -> None:
        few = ("--victims", 1, "--victim-epochs", 1, "--device", "cpu")
        command(tools, path, "evaluate", path / "run", *few, "--out", path / "out")

    def resume(path: Path) -> None:
        command(tools, path, "attack", "--resume", "--out", path / "run")

    return {
        "set": Kind(make_set, at(x, tensors), lambda path: load_set(path / x)),
        "trigger": Kind(make_trigger, at(x, tensors), read_trigger),
        "pt": Kind(make_pt, at(x, pt_changer(tools)), imported),
        "separate": Kind(make_separate, parts_changer(tools), imported),
        "views": Kind(make_views, parts_changer(tools), read_label_views),
        "others": Kind(make_others, at(x, change_others), imported),
        "arrays": Kind(make_npz, at(x, npz_changer(tools)), lambda path: read_received(path / x)),
        "table": Kind(make_table, at(x, change_table), imported),
        "image set": Kind(make_images, change_images, lambda path: read_received(path / "set")),
        "npz": Kind(make_npz, at(x, npz_changer(tools)), read_npz),
        "images": Kind(make_images, change_images, read_images),
        "record": Kind(
            make_record,
            at("record.json", change_json),
            lambda path: read_record(path / "record.json"),
        ),
        "report": Kind(make_record, at("record.json", change_json), load_experiment),
        "run": Kind(make_run, at("run", run_changer(tools)), evaluate),
        "resume": Kind(make_stopped, at("run", run_changer(tools)), resume),
        "log": Kind(
            make_record,
            at("progress.jsonl", change_lines),
            lambda path: read_json_lines(path / "progress.jsonl"),
        ),
        "ledger": Kind(make_ledger, at("ledger.jsonl", change_lines), read_ledger),
        "checkpoint": Kind(make_checkpoint(tools), at(x, tensors), read_checkpoint(tools)),
        "experts": Kind(
            lambda path: experts_of(tools, path),
            expert_changer(tools),
            lambda path: experts_of(tools, path),
        ),
        "yaml": Kind(make_yaml, one_yaml, read_yaml_files),
    }


def read_npz(path: Path) -> object:
    return load_dataset(f"npz:{path / 'x'}")


def read_images(path: Path) -> object:
    return load_dataset(f"folder:{path / 'set'}", data_dir=path / "cache")


NAMES = (
    *("set", "trigger", "pt", "npz", "images", "record", "report", "log", "ledger", "checkpoint"),
    *("experts", "yaml", "run", "resume", "separate", "views", "others", "arrays", "table"),
    "image set",
)


@pytest.mark.parametrize("name", NAMES)
def test_samples(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    toy_task: Callable[..., Task],
    toy_backend: Callable[..., Backend],
    mutations: Callable[[str], Any],
    write_safetensors: Callable[[Path, Mapping[str, Tensor], Any], None],
    canary: Callable[[str], Any],
    cli: Callable[..., Result],
    finished: Path,
    judge: Callable[[Callable[[], object]], bool],
    record_property: Callable[[str, object], None],
) -> None:
    kind = kinds(Tools(toy_task, toy_backend, write_safetensors, canary, cli, finished))[name]
    samples, seconds, seed = (
        request.config.getoption(f"--fuzz-{option}") for option in ("samples", "seconds", "seed")
    )
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    kind.make(good)
    shutil.copytree(good, bad)
    kind.read(bad)
    shutil.rmtree(bad)
    monkeypatch.chdir(tmp_path)
    number, accepted, began = 0, 0, time.monotonic()
    while (
        number < samples // len(NAMES) + 1
        if samples
        else time.monotonic() - began < seconds / len(NAMES)
    ):
        shutil.copytree(good, bad)
        kind.change(bad, mutations(f"{name} {seed} {number}"))
        try:
            accepted += judge(lambda: kind.read(bad))
        except BaseException as error:
            error.add_note(f"sample: {name}, --fuzz-seed {seed}, number {number}; kept in {bad}")
            raise
        assert not list(tmp_path.rglob("ran")), f"code ran: {name}, seed {seed}, number {number}"
        shutil.rmtree(bad)
        number += 1
    record_property("samples", number)
    print(f"{name}: {number} samples, {accepted} accepted")


# Settings ----------------------------------------------------------------------------------------

KEYS = (
    *("ipc", "seed", "poison_rate", "victim_network", "victim_augment", "attack", "backend"),
    *("network", "dataset", "width", "threads", "victims", "victim_lr", "target"),
)
NESTED = st.recursive(
    st.integers() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
VALUES = st.one_of(
    st.sampled_from(SCALARS),
    st.text(max_size=50),
    st.integers().map(str),
    st.floats().map(repr),
    NESTED.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
)


@settings(max_examples=150)
@given(key=st.sampled_from(KEYS) | st.text(max_size=5), value=VALUES)
def test_settings(key: str, value: str) -> None:
    for read in (
        lambda: configure(**gather(settings=[f"{key}={value}"])),
        lambda: by_owner([f"strip.{key}={value}"]),
    ):
        try:
            read()
        except RequestError as error:
            assert "\n" not in str(error)
