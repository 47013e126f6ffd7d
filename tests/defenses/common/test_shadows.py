"""The zoo of shadow networks: its triggers, its training and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from distillsec.defenses.common import shadows
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.types import RequestError

if TYPE_CHECKING:
    from tests.defenses.conftest import Case


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_shadow_triggers_are_the_documented_ones() -> None:
    whole = 0
    for number in range(200):
        mask, pattern = shadows.random_trigger((1, 28, 28), seeded(number))
        assert mask.shape == (1, 28, 28) and set(pattern.unique().tolist()) <= {0.0, 1.0}
        opacity = mask.max().item()
        if bool((mask > 0).all()):
            whole += 1
            assert 0.05 <= opacity <= 0.2
            continue
        rows, columns = mask[0].any(dim=1), mask[0].any(dim=0)
        assert rows.sum() == columns.sum() and 2 <= rows.sum() <= 5
        assert (mask > 0).sum() == rows.sum() * columns.sum()
        assert opacity == 1 or 0.2 <= opacity <= 0.5
    assert 20 <= whole <= 65  # one in five
    _, colours = shadows.random_trigger((3, 8, 8), seeded())
    assert colours.shape == (3, 8, 8) and len(colours.unique()) > 100


def test_poisoned_copies_are_added_to_the_clean_images(honest: Case) -> None:
    clean = honest.view.holdout
    for number in range(20):
        poisoned = shadows.poisoned(clean, 10, seeded(number))
        more = len(poisoned) - len(clean)
        assert 0.04 * len(clean) <= more <= 0.5 * len(clean)
        assert torch.equal(poisoned.images[: len(clean)], clean.images)
        assert len(poisoned.labels[len(clean) :].unique()) == 1
        assert not torch.equal(poisoned.images[len(clean) :], clean.images[:more])


@pytest.fixture(scope="module")
def zoo(honest: Case) -> shadows.Zoo:
    torch.set_num_threads(1)
    view = honest.view
    options = shadows.ShadowOptions(pairs=3, epochs=2, batch=50)
    calls: list[tuple[int, int]] = []
    found = shadows.train_zoo(
        view.network,
        view.holdout,
        view.distilled.recipe,
        options,
        seeded,
        progress=lambda *args: calls.append(args),
    )
    assert calls == [(number, 6) for number in range(1, 7)]
    return found


def test_the_logits_of_a_zoo_are_those_of_its_networks(zoo: shadows.Zoo, honest: Case) -> None:
    images, maker = honest.clean.images[:5], honest.view.network
    assert len(zoo) == 6 and zoo.backdoored.tolist() == [False, True] * 3
    rows = torch.tensor([4, 1])
    found = zoo.logits(maker(0).eval(), rows, images)
    for row, logits in zip(rows.tolist(), found, strict=True):
        network = maker(0)
        network.load_state_dict({name: values[row] for name, values in zoo.states.items()})
        assert torch.allclose(network.eval()(images), logits, atol=1e-5)
    assert not torch.allclose(found[0], found[1])


def test_a_zoo_is_saved_and_loaded(zoo: shadows.Zoo, honest: Case, tmp_path: Path) -> None:
    file, maker = tmp_path / "zoo.safetensors", honest.view.network
    zoo.save(file)
    again = shadows.load_zoo(file, maker)
    assert torch.equal(again.backdoored, zoo.backdoored) and again.description == zoo.description
    assert all(torch.equal(again.states[name], value) for name, value in zoo.states.items())


def test_a_wrong_zoo_is_refused_in_one_line(zoo: shadows.Zoo, honest: Case, tmp_path: Path) -> None:
    file, maker = tmp_path / "zoo.safetensors", honest.view.network
    zoo.save(file)
    wider = replace(maker, spec=NetworkSpec(network="convnet", width=8, depth=2, norm="batch"))
    with pytest.raises(RequestError, match=r"zoo\.safetensors.*expected .*`distillsec shadows`"):
        shadows.load_zoo(file, wider)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match=r"zoo\.safetensors"):
        shadows.load_zoo(file, maker)
    for states, backdoored, fault in (
        (dict(list(zoo.states.items())[1:]), zoo.backdoored, "another architecture"),
        (zoo.states, zoo.backdoored[:4], "number of labels"),
    ):
        shadows.Zoo(states, backdoored, zoo.description).save(file)
        with pytest.raises(RequestError, match=fault):
            shadows.load_zoo(file, maker)
    with pytest.raises(RequestError, match=r"nowhere\.safetensors"):
        shadows.load_zoo(tmp_path / "nowhere.safetensors", maker)
