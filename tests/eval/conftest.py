"""Runs and sweeps as reports find them, written by hand: no distillation, any figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distillsec.distill.files.artifact import save_set
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, DistilledSet, Recipe
from distillsec.eval.results.metrics import collect, over_seeds
from distillsec.eval.results.record import Metrics, Record

Run = Callable[..., Path]
Sweep = Callable[..., Path]
PICTURES = ("distilled.png", "trigger.png", "triggered.png", "curves.png")
UNBOUNDED = "unbounded trigger: no camera or file can carry it"


def figures(cta: float, asr: float | None, control: float = 0.01, victims: int = 2) -> Metrics:
    """What ``victims`` scored around these rates."""
    aside = [0.01 * (number - (victims - 1) / 2) for number in range(victims)]
    names = ("clean_test_accuracy", "attack_success_rate")
    ours = [{names[0]: cta + a, **({} if asr is None else {names[1]: asr + a})} for a in aside]
    theirs = [{names[0]: cta + 0.01 + a, names[1]: control + a / 10} for a in aside]
    return collect(ours, None if asr is None else theirs)


def small_set(shift: float = 0.0, classes: Sequence[str] = ("cat", "dog", "owl")) -> DistilledSet:
    """Two grey 8×8 images of each class."""
    labels = torch.arange(2 * len(classes)) // 2
    images = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(len(labels), 1, 1, 1)
    images = images * (1 + labels.view(-1, 1, 1, 1)) / len(classes) + shift
    recipe = Recipe(preprocessing=Preprocessing((0.5,), (0.25,)))
    batch = Batch(images=images, labels=labels)
    return DistilledSet(batch=batch, classes=tuple(classes), recipe=recipe)


def config(**keys: Any) -> dict[str, Any]:
    """Some of a resolved configuration."""
    known = {"attack": "naive", "dataset": "digits", "backend": "dc", "ipc": 2, "iterations": 5}
    return known | {"network": "convnet", "victims": 2, "victim_network": [], "seed": 0} | keys


@pytest.fixture
def make_run() -> Run:
    """A factory: ``make_run(folder, cta=…, asr=…, seed=…, **fields of the record)``."""

    def make(
        path: Path,
        *,
        cta: float = 0.9,
        asr: float | None = 0.7,
        seed: int = 0,
        keys: Mapping[str, Any] | None = None,
        target: str = "cat",
        files: bool = True,
        **fields: Any,
    ) -> Path:
        path.mkdir(parents=True)
        attacked = asr is not None
        known: dict[str, Any] = {
            "kind": "attack" if attacked else "distill",
            "status": "done",
            "config": config(seed=seed, attack="naive" if attacked else None, **(keys or {})),
            "config_key": f"key-{seed}",
            "control_key": "twin",
            "command": f"distillsec attack --preset digits-naive --seed {seed}",
            "environment": {"distillsec": "0.1.0", "commit": "abc123", "versions": {"torch": "3"}},
            "metrics": figures(cta, asr),
            "trigger": None,
        }
        if attacked:
            values = {"min": 1.0, "max": 1.0, "l2": 3.0, "linf": 1.0, "psnr": 12.0, "ssim": 0.8}
            known["trigger"] = {"kind": "patch", "target": 0, "target_class": target, **values}
            known["control"] = {"folder": "control", "key": "twin", "reused": False}
        Record(**(known | fields)).write(path / "record.json")
        if files:
            save_set(path / "distilled.safetensors", small_set(0.1))
            (path / "control").mkdir()
            save_set(path / "control" / "distilled.safetensors", small_set())
            for name in PICTURES:
                Image.new("RGB", (640, 300), "#0072B2").save(path / name)
        return path

    return make


@pytest.fixture
def make_sweep(make_run: Run) -> Sweep:
    """A factory: ``make_sweep(folder, {(("trigger_size", 1),): {seed: asr}})``."""

    def make(
        path: Path,
        points: Mapping[tuple[tuple[str, Any], ...], Mapping[int, float]],
        *,
        labels: Sequence[str] = (),
        files: bool = True,
        cta: float = 0.9,
        networks: Sequence[str] = ("convnet",),
        each: bool = False,
        **fields: Any,
    ) -> Path:
        rows = []
        for number, (values, rates) in enumerate(points.items()):
            for seed, asr in rates.items():
                place = path / "cells" / f"{number}-{seed}"
                make_run(place, asr=asr, cta=cta, seed=seed, files=files, labels=list(labels))
            metrics = over_seeds([figures(cta, asr) for asr in rates.values()]) if rates else {}
            for network in networks:
                row: dict[str, Any] = {
                    "axis": values[0][0] if each else None,
                    "values": dict(values),
                    "config": config(),
                    "network": network,
                    "primary": network == networks[0],
                    "seeds": list(rates),
                    "wanted": [0, 1, 2],
                    "folders": [f"cells/{number}-{seed}" for seed in rates],
                    "labels": list(labels),
                    "metrics": {k: v.model_dump(mode="json") for k, v in metrics.items()},
                }
                rows.append(row)
        table = {
            "schema_version": 1,
            "kind": "ablation",
            "status": "done",
            "sweep": {"description": "a small sweep", "base": {"preset": "digits-naive"}},
            "axes": list(dict.fromkeys(name for values in points for name, _ in values)),
            "environment": {"distillsec": "0.1.0", "commit": None, "dirty": None},
            "command": "distillsec ablate sweep.yaml --out runs/s",
            "rows": rows,
            "failures": [],
        }
        path.mkdir(exist_ok=True)
        (path / "table.json").write_text(json.dumps(table | fields))
        return path

    return make


@pytest.fixture
def small_sweep(make_sweep: Sweep, tmp_path: Path) -> Path:
    """Three trigger sizes, three seeds."""
    rates = {1: (0.1, 0.12, 0.14), 2: (0.5, 0.4, 0.45), 3: (0.9, 0.8, 0.85)}
    points = {(("trigger_size", size),): dict(enumerate(each)) for size, each in rates.items()}
    return make_sweep(tmp_path / "sweep", points)
