"""A recipe in a set's file: learned steps, a whitening, initial weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distillsec.distill.files.artifact import load_set, save_set
from distillsec.distill.files.safe import read_tensors, write_tensors
from distillsec.distill.preprocessing import Preprocessing, Zca, fit_zca
from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError, Step

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]
SHAPE = (1, 2, 2)
IMAGES, LABELS = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
STEPS = (Step(rows=(0, 1), rate=0.1), Step(rows=(1,), rate=1 / 3), Step(rows=(0, 1), rate=1e-9))


def recipe(zca: Zca | None = None, **changes: Any) -> Recipe:
    return Recipe(preprocessing=Preprocessing((0.5,), (0.2,), zca), **changes)


def make_set(**changes: Any) -> DistilledSet:
    batch = Batch(images=torch.randn(2, *SHAPE, generator=rng()), labels=LABELS)
    return DistilledSet(batch=batch, classes=("a", "b"), recipe=recipe(**changes))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def whitening() -> Zca:
    return fit_zca(torch.rand(20, *SHAPE, generator=rng()))


INITIAL = torch.linspace(-1, 1, 37)
EXTRAS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, set()),
    "steps": ({"steps": STEPS}, set()),
    "zca": ({"zca": whitening()}, {"zca.mean", "zca.matrix", "zca.inverse"}),
    "initial": ({"steps": STEPS, "initial": INITIAL}, {"initial"}),
    "all": (
        {"steps": STEPS, "initial": INITIAL, "zca": whitening()},
        {"zca.mean", "zca.matrix", "zca.inverse", "initial"},
    ),
}


@pytest.mark.parametrize(("extras", "names"), EXTRAS.values(), ids=EXTRAS)
def test_a_recipe_comes_back_whole(tmp_path: Path, extras: dict[str, Any], names: set[str]) -> None:
    path, again = tmp_path / "set.safetensors", tmp_path / "again.safetensors"
    distilled = make_set(**extras)
    save_set(path, distilled)
    found = load_set(path)
    assert found.recipe == distilled.recipe
    assert found.recipe.steps == extras.get("steps", ())
    for field in dataclasses.fields(Recipe):
        ours, theirs = getattr(distilled.recipe, field.name), getattr(found.recipe, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    zca = found.recipe.preprocessing.zca
    if zca is not None:
        for part in ("mean", "matrix", "inverse"):
            assert torch.equal(getattr(zca, part), getattr(extras["zca"], part))
    tensors, info = read_tensors(path)
    assert set(tensors) == {"images", "labels"} | names
    assert info["recipe"]["steps"] == [
        {"rows": list(step.rows), "rate": step.rate} for step in extras.get("steps", ())
    ]
    save_set(again, found)
    assert again.read_bytes() == path.read_bytes()


def test_two_recipes_that_differ_in_a_bit_are_not_equal() -> None:
    nudged = INITIAL.clone()
    nudged[3] += 1e-7
    assert recipe(initial=INITIAL) == recipe(initial=INITIAL.clone())
    assert recipe(initial=INITIAL) != recipe(initial=nudged)
    assert recipe(steps=STEPS) != recipe(steps=STEPS[:2])
    assert recipe(zca=whitening()) != recipe()
    assert len({recipe(steps=STEPS), recipe(steps=STEPS), recipe()}) == 2
    json.dumps(recipe(steps=STEPS, zca=whitening(), initial=INITIAL).describe())


# Hostile files -----------------------------------------------------------------------------------


def info_with(steps: Any = ()) -> dict[str, Any]:
    own = {"mean": [0.5], "std": [0.2], "epochs": 3, "lr": 0.1, "momentum": 0.9, "augment": ""}
    own |= {"weight_decay": 0.0, "batch_size": 2, "steps": steps}
    return {"format_version": 1, "classes": ["a", "b"], "image_shape": list(SHAPE), "recipe": own}


def step(rows: Any = (0,), rate: Any = 0.1, **more: Any) -> dict[str, Any]:
    return {"rows": rows, "rate": rate, **more}


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ([step([0, 2])], "steps train on row 2 of 2 images"),
        ([step([0]), step([10**9])], "steps train on row 1000000000 of 2 images"),
        ([step([-1])], "metadata recipe.steps.0.rows.0"),
        ([step([])], "metadata recipe.steps.0.rows"),
        ([step([0.0])], "metadata recipe.steps.0.rows.0"),
        ([step([True])], "metadata recipe.steps.0.rows.0"),
        ([step([10**30])], "row"),
        ([step("01")], "metadata recipe.steps.0.rows"),
        ([step([0], -0.1)], "metadata recipe.steps.0.rate"),
        ([step([0], 0.0)], "metadata recipe.steps.0.rate"),
        ([step([0], "0.1")], "metadata recipe.steps.0.rate"),
        ([step([0], 10**400)], "metadata recipe.steps.0.rate"),
        ([step([0], None)], "metadata recipe.steps.0.rate"),
        ([step([0], batch=3)], "metadata recipe.steps.0.batch"),
        ([{"rows": [0]}], "metadata recipe.steps.0.rate"),
        ([[0]], "metadata recipe.steps.0"),
        ({}, "metadata recipe.steps"),
        (None, "metadata recipe.steps"),
    ],
)
def test_impossible_steps_are_refused(
    refused: Refused, tmp_path: Path, steps: Any, fault: str
) -> None:
    path = tmp_path / "set.safetensors"
    write_tensors(path, {"images": IMAGES, "labels": LABELS}, info_with([step([1, 0])]))
    assert load_set(path).recipe.steps == (Step(rows=(1, 0), rate=0.1),)
    write_tensors(path, {"images": IMAGES, "labels": LABELS}, info_with(steps))
    with refused(path, fault):
        load_set(path)


def parts(**changes: Tensor | None) -> dict[str, Tensor]:
    zca = whitening()
    tensors = {"zca.mean": zca.mean, "zca.matrix": zca.matrix, "zca.inverse": zca.inverse}
    tensors |= {"initial": INITIAL}
    own = {key.replace("zca_", "zca."): value for key, value in changes.items()}
    return {key: value for key, value in {**tensors, **own}.items() if value is not None}


NAN, BIG = torch.tensor(float("nan")), torch.tensor(float("inf"))


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        (parts(zca_mean=torch.zeros(4)), "zca.mean is torch.float32 (4,), expected torch.float32"),
        (parts(zca_mean=torch.zeros(1, 5)), "zca.mean is torch.float32 (1, 5)"),
        (parts(zca_matrix=torch.zeros(4, 3)), "zca.matrix is torch.float32 (4, 3)"),
        (parts(zca_matrix=torch.zeros(4, 4).double()), "zca.matrix is torch.float64"),
        (parts(zca_inverse=torch.zeros(5, 5)), "zca.inverse is torch.float32 (5, 5)"),
        (parts(zca_inverse=torch.full((4, 4), BIG.item())), "zca.inverse holds NaN or infinite"),
        (parts(zca_matrix=None), "a distilled set has images, labels"),
        (parts(zca_mean=None, zca_matrix=None), "holds the tensors images, initial, labels"),
        (parts(zca_trigger=torch.zeros(4)), "a distilled set has images, labels"),
        (parts(initial=torch.full((5,), NAN.item())), "initial holds NaN or infinite values"),
        (parts(initial=torch.zeros(5, 1)), "initial is torch.float32 (5, 1)"),
        (parts(initial=torch.zeros(5).long()), "initial is torch.int64 (5,)"),
        (parts(initial=torch.zeros(())), "initial is torch.float32 ()"),
        (parts(trigger=IMAGES), "a distilled set has images, labels"),
    ],
)
def test_tensors_that_do_not_fit_the_recipe_are_refused(
    refused: Refused, tmp_path: Path, tensors: dict[str, Tensor], fault: str
) -> None:
    path = tmp_path / "set.safetensors"
    write_tensors(path, {"images": IMAGES, "labels": LABELS, **parts()}, info_with([step()]))
    assert load_set(path).recipe.initial is not None
    write_tensors(path, {"images": IMAGES, "labels": LABELS, **tensors}, info_with([step()]))
    with refused(path, fault):
        load_set(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": (Step(rows=(0, 2), rate=0.1),)},
        {"steps": (Step(rows=(0,), rate=-0.1),)},
        {"steps": (Step(rows=(0,), rate=float("nan")),)},
        {"initial": torch.full((3,), float("nan"))},
        {"zca": fit_zca(torch.rand(20, 1, 3, 3, generator=rng()))},
    ],
)
def test_a_set_that_would_be_refused_is_never_written(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "set.safetensors"
    with pytest.raises((RequestError, ValueError)) as refused:
        save_set(path, make_set(**changes))
    assert isinstance(refused.value, RequestError), refused.value
    assert not list(tmp_path.iterdir())


def test_a_file_without_steps_is_an_older_one_of_the_same_version(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    info = info_with()
    del info["recipe"]["steps"]
    write_tensors(path, {"images": IMAGES, "labels": LABELS}, info)
    assert load_set(path).recipe.steps == ()
