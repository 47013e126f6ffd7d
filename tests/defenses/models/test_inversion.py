"""The search for triggers, the networks that draw them, and the shadows that teach to see them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from distillsec.defenses.common import shadows, trigger_inversion, unet
from distillsec.defenses.common.by_class import anomaly_index
from distillsec.defenses.models import bti_dbf, mntd, tabor
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.training import predict
from distillsec.distill.types import Batch, RequestError

if TYPE_CHECKING:
    from tests.defenses.conftest import Case


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


class Doors(nn.Module):
    """Says where an image's mean lies, but for class 2 if pixel (1, 1) is lit and (0, 0) dark."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        own = torch.stack([-(mean - centre).abs() * 40 for centre in (0.1, 0.9, 2.0, 0.5)], dim=1)
        door = (images[:, 0, 1, 1] - images[:, 0, 0, 0]).clamp(min=0) * 60
        return own + door[:, None] * torch.tensor([0.0, 0.0, 1.0, 0.0])


def lit(count: int = 40) -> Batch:
    images = 0.35 + 0.3 * torch.rand(count, 1, 6, 6, generator=seeded(1))
    return Batch(images=images, labels=torch.full((count,), 3))


def test_the_smallest_patch_is_found_for_the_class_with_a_door() -> None:
    known = lit()
    options = trigger_inversion.InversionOptions(steps=150, images=40, batch=20)
    found = trigger_inversion.invert_triggers(Doors(), known, 4, options, seeded(2))
    assert bool(found.found.all())
    assert found.sizes.argmin() in (2, 3)  # every image is of class 3 already
    assert found.sizes[2] < 0.4 * found.sizes[:2].min()
    mask = found.masks[2, 0]
    assert mask.flatten().topk(1).indices.item() in (0, 7)
    for number in range(4):
        sent = predict(Doors(), found.stamp(known.images, number)) == number
        assert sent.double().mean() >= 0.95
    assert found.masks.min() >= 0 and found.masks.max() <= 1
    assert anomaly_index(-found.sizes).shape == (4,)


def test_a_class_out_of_reach_is_said_to_be() -> None:
    class Never(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(1, 2, 3))[:, None] * torch.tensor([1.0, 0.5, -1.0])

    options = trigger_inversion.InversionOptions(steps=5, images=40, batch=20)
    found = trigger_inversion.invert_triggers(Never(), lit(), 3, options, seeded())
    assert found.found.tolist() == [True, False, False]
    assert bool(found.penalties[1:].isinf().all()) and bool(found.sizes.isfinite().all())


def test_values_survive_the_way_to_the_line_and_back() -> None:
    values = torch.tensor([0.0, 0.2, 0.5, 1.0])
    free = trigger_inversion.unbounded(values, torch.device("cpu"))
    assert free.requires_grad and free.is_leaf and bool(free.isfinite().all())
    assert torch.allclose(trigger_inversion.bounded(free), values, atol=2e-4)


def test_variation_sums_squared_differences() -> None:
    values = torch.rand(2, 3, 4, 5, generator=seeded())
    brute = [
        sum(
            float((values[n, c, i + 1, j] - values[n, c, i, j]) ** 2) if i < 3 else 0.0
            for c in range(3)
            for i in range(4)
            for j in range(5)
        )
        + sum(
            float((values[n, c, i, j + 1] - values[n, c, i, j]) ** 2) if j < 4 else 0.0
            for c in range(3)
            for i in range(4)
            for j in range(5)
        )
        for n in range(2)
    ]
    assert tabor.variation(values).tolist() == pytest.approx(brute, rel=1e-5)


# BTI-DBF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 31, 17)])
def test_a_unet_keeps_an_images_shape_and_looks_at_it_alone(shape: tuple[int, int, int]) -> None:
    net = unet.seeded_unet(shape[0], 4, 2, seeded(1)).eval()
    images = torch.rand(5, *shape, generator=seeded(2))
    drawn = net(images)
    assert drawn.shape == images.shape
    assert torch.allclose(net(images[2:3]), drawn[2:3], atol=1e-5)
    again = unet.seeded_unet(shape[0], 4, 2, seeded(1)).eval()
    assert torch.equal(again(images), drawn)
    assert not torch.equal(unet.seeded_unet(shape[0], 4, 2, seeded(3)).eval()(images), drawn)


def test_benign_features_suffice_and_the_others_dont(badnets: Case) -> None:
    known = badnets.view.holdout
    model = bti_dbf.split(badnets.view.trainable_victim())
    supply = bti_dbf.Supply(known, badnets.view.distilled.recipe, 32, seeded())
    mask = bti_dbf.benign_features(model, supply, bti_dbf.BtiDbfOptions(mask_steps=400))
    maps = model.features(model.network.normalise(known.images))
    assert mask.shape[1:] == maps.shape[1:] and mask.min() >= 0 and mask.max() <= 1
    kept, left = (
        float((model.logits(part * maps).argmax(dim=1) == known.labels).double().mean())
        for part in (mask, 1 - mask)
    )
    assert kept >= 0.9 and left <= 0.5


# Shadows -----------------------------------------------------------------------------------------


def test_triggers_of_shadows_are_as_said() -> None:
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


def test_poisoned_copies_come_beside_the_clean_images(honest: Case) -> None:
    clean = honest.view.holdout
    for number in range(20):
        taught = shadows.poisoned(clean, 10, seeded(number))
        more = len(taught) - len(clean)
        assert 0.04 * len(clean) <= more <= 0.5 * len(clean)
        assert torch.equal(taught.images[: len(clean)], clean.images)
        assert len(taught.labels[len(clean) :].unique()) == 1
        assert not torch.equal(taught.images[len(clean) :], clean.images[:more])


@pytest.fixture(scope="module")
def zoo(honest: Case) -> shadows.Zoo:
    torch.set_num_threads(1)
    view = honest.view
    options = shadows.ShadowOptions(pairs=3, epochs=2, batch=50)
    told: list[tuple[int, int]] = []
    found = shadows.grow_zoo(
        view.network,
        view.holdout,
        view.distilled.recipe,
        options,
        seeded,
        tell=lambda *args: told.append(args),
    )
    assert told == [(number, 6) for number in range(1, 7)]
    return found


def test_a_zoo_answers_as_its_networks_do(zoo: shadows.Zoo, honest: Case) -> None:
    images, maker = honest.clean.images[:5], honest.view.network
    assert len(zoo) == 6 and zoo.backdoored.tolist() == [False, True] * 3
    rows = torch.tensor([4, 1])
    found = zoo.answers(maker(0).eval(), rows, images)
    for row, logits in zip(rows.tolist(), found, strict=True):
        network = maker(0)
        network.load_state_dict({name: values[row] for name, values in zoo.states.items()})
        assert torch.allclose(network.eval()(images), logits, atol=1e-5)
    assert not torch.allclose(found[0], found[1])


def test_a_zoo_is_kept_in_a_file(zoo: shadows.Zoo, honest: Case, tmp_path: Path) -> None:
    file, maker = tmp_path / "zoo.safetensors", honest.view.network
    zoo.save(file)
    again = shadows.load_zoo(file, maker)
    assert torch.equal(again.backdoored, zoo.backdoored) and again.described == zoo.described
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
        (dict(list(zoo.states.items())[1:]), zoo.backdoored, "not of this architecture"),
        (zoo.states, zoo.backdoored[:4], "another number of labels"),
    ):
        shadows.Zoo(states, backdoored, zoo.described).save(file)
        with pytest.raises(RequestError, match=fault):
            shadows.load_zoo(file, maker)
    with pytest.raises(RequestError, match=r"nowhere\.safetensors"):
        shadows.load_zoo(tmp_path / "nowhere.safetensors", maker)


def test_a_judge_learns_to_tell_the_zoos_halves_apart(honest: Case) -> None:
    """Shadows whose halves differ plainly: the backdoored ones answer class 0 more strongly."""
    view = honest.view
    states: dict[str, list[Tensor]] = {}
    for number in range(12):
        for name, value in view.network(number).state_dict().items():
            raised = value.clone()
            if number % 2 and name.endswith("head.bias"):
                raised[0] += 3
            states.setdefault(name, []).append(raised)
    stacked = {name: torch.stack(values) for name, values in states.items()}
    plain = shadows.Zoo(stacked, torch.arange(12) % 2 == 1, {})
    options = mntd.MntdOptions(epochs=60, batch=4, lr=0.01)
    network = view.network(0).eval()
    judge = mntd.learn_to_judge(plain, network, view, options)
    with torch.no_grad():
        scores = judge(plain.answers(network, torch.arange(12), judge.queries))
    assert bool(((scores > 0) == plain.backdoored).all())
