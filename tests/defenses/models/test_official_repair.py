"""Repairing defenses against their official codes: the same weights and inputs, the same numbers.

The numbers come from the functions named beside them, run in float64 on what the tests make.
Weights and inputs are values of a sine, so that no version of a generator matters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillsec.defenses import DEFENSES
from distillsec.defenses.base import Defense
from distillsec.defenses.common import sgd
from distillsec.defenses.models import fine_pruning, ft_sam, i_bau, nad
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, Recipe

REPAIRERS = ["fine-tuning", "fine-pruning", "nad", "ft-sam", "i-bau"]
RECIPE = Recipe(preprocessing=Preprocessing((0.5,), (0.5,)), lr=0.123)


def wave(count: int, scale: float, shift: float) -> Tensor:
    """``count`` values of a sine."""
    return scale * torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + shift)


def filled(network: nn.Module) -> nn.Module:
    """``network`` in float64, its parameters set to sines."""
    network.double()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(wave(parameter.numel(), 0.8, number).view(parameter.shape))
    return network


def options_of(name: str, **changes: Any) -> Any:
    return DEFENSES[name].Options(**changes)


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # BackdoorBench, config/defense/ft/cifar10.yaml and defense/fp's: 100 epochs of
        # ⌈2500 / 256⌉ = 10 mini-batches.
        ("fine-tuning", {"steps": 1000, "lr": 0.01, "batch": 256, "weight_decay": 5e-4}),
        ("fine-pruning", {"steps": 1000, "lr": 0.01, "batch": 256, "weight_decay": 5e-4}),
        # BackdoorBench, config/defense/ft-sam/cifar10.yaml and defense/ft-sam.py.
        ("ft-sam", {"steps": 1000, "lr": 0.01, "batch": 256, "rho": 2.0, "smoothing": 0.1}),
        # bboylyg/NAD, config.py: 20 epochs of ⌈2500 / 64⌉ = 40 mini-batches.
        ("nad", {"steps": 800, "lr": 0.1, "batch": 64, "weight_decay": 1e-4, "nesterov": True}),
        ("nad", {"teacher_steps": 400, "power": 2.0, "early": 80, "late": 0.1}),
        # YiZeng623/I-BAU, defense.py; the radius is the notebooks'.
        ("i-bau", {"rounds": 5, "steps": 50, "iterations": 5, "lr": 1e-3, "batch": 100}),
        ("i-bau", {"climb": 10.0, "map_step": 0.1, "penalty": 1e-3, "share": 0.01, "radius": 10.0}),
    ],
)
def test_defaults_are_the_official_settings(name: str, wanted: dict[str, Any]) -> None:
    options = options_of(name)
    assert {key: getattr(options, key) for key in wanted} == wanted
    assert name == "i-bau" or (options.momentum, options.augment) == (0.9, "crop")


def test_rates_are_those_of_the_official_schedules() -> None:
    """PyTorch's cosine with ``T_max`` 100, moved every epoch of 10 steps or, by FT-SAM, every
    step; NAD's two epochs of 40 steps at 0.1 (utils/util.py, adjust_learning_rate)."""
    for name, every in (("fine-tuning", 10), ("fine-pruning", 10), ("ft-sam", 1)):
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=100)
        wanted = []
        for number in range(1000):
            wanted.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            if number % every == every - 1:
                schedule.step()
        found = options_of(name).rates(RECIPE)
        assert found == pytest.approx(wanted, abs=1e-9) and len(set(wanted)) >= 100
    assert options_of("ft-sam").rates(RECIPE)[-1] == pytest.approx(0.009997532801828676)
    assert options_of("nad").rates(RECIPE) == pytest.approx([0.1] * 80 + [0.01] * 720)
    # Without a rate of its own it is the set's, and holdout-only has none of its own.
    assert options_of("fine-tuning", lr=None).rates(RECIPE)[0] == RECIPE.lr
    assert options_of("holdout-only").rates(RECIPE)[0] == RECIPE.lr


@pytest.mark.parametrize("name", REPAIRERS)
def test_the_tuned_grid_holds_the_published_setting_and_valid_ones(name: str) -> None:
    kind: type[Defense] = DEFENSES[name]
    made = [kind.Options(**choice) for choice in kind.grid]
    assert 3 <= len(made) <= 6 and kind.Options() in made
    assert all(made.count(one) == 1 for one in made)


# Augmentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augment", "mirrored"), [("", False), ("color_scale", False), ("flip_color", True)]
)
def test_crops_are_padded_with_black_and_mirrored_by_the_recipe(
    augment: str, mirrored: bool
) -> None:
    """Each image is a window of the one padded by 4 of 32 black pixels, all 81 being as likely."""
    images = wave(3 * 32 * 32, 0.4, 0.3).view(1, 3, 32, 32) + 0.5
    recipe = Recipe(preprocessing=Preprocessing((0.5,) * 3, (0.5,) * 3), augment=augment)
    change = sgd.augmentation("crop", recipe, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images[0], (4, 4, 4, 4))
    windows = [padded[:, t : t + 32, s : s + 32] for t in range(9) for s in range(9)]
    if mirrored:
        windows += [window.flip(2) for window in windows]
    shown = change(images.expand(1000, -1, -1, -1))
    known = {
        tuple(window[0, 8:20, 10:14].flatten().tolist()): number
        for number, window in enumerate(windows)
    }
    places = [known[tuple(one[0, 8:20, 10:14].flatten().tolist())] for one in shown]
    assert all(torch.equal(one, windows[at]) for one, at in zip(shown, places, strict=True))
    assert len(set(places)) >= 0.98 * len(windows)
    plain = sgd.augmentation("none", recipe, torch.Generator().manual_seed(0))
    assert plain(images) is images


# FT-SAM ------------------------------------------------------------------------------------------


def test_smoothing_gives_the_rest_to_the_other_classes() -> None:
    """BackdoorBench (f02e353), utils/defense_utils/sam/util.py, smooth_crossentropy: its gradient,
    and its value but for the targets' entropy."""
    logits = wave(12, 2.0, 0.1).view(3, 4).requires_grad_()
    loss = ft_sam.smoothed_cross_entropy(logits, torch.tensor([0, 3, 1]), 0.1)
    loss.backward()
    targets = torch.tensor([0.9] + [0.1 / 3] * 3, dtype=torch.float64)
    entropy = -(targets * targets.log()).sum()
    assert float(loss.detach() - entropy) == pytest.approx(1.7993913442058407, rel=1e-9)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx(
        [-0.25427069593265733, 0.25152454867477714, 0.007458121132215501, -0.004711973874335235]
    )
    # PyTorch's smoothing is another.
    other = nn.functional.cross_entropy(logits, torch.tensor([0, 3, 1]), label_smoothing=0.1)
    assert abs(float((other - loss).detach())) > 1e-3


def test_three_steps_of_ft_sam_are_the_official_ones() -> None:
    """BackdoorBench (f02e353), utils/defense_utils/sam/sam.py, SAM.step with SGD and the cosine of
    defense/ft-sam.py: weights, and running statistics that the second pass doesn't touch."""
    network: Any = filled(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
    ).train()
    images, labels = wave(24, 1.0, 0.3).view(6, 1, 2, 2), torch.tensor([0, 1, 2, 2, 1, 0])
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for rate in options_of("ft-sam").rates(RECIPE)[:3]:
        optimiser.param_groups[0]["lr"] = rate
        ft_sam.sharpness_aware_step(network, optimiser, images, labels, 2.0, 0.1)
    assert network[1].weight[:2].flatten().tolist() == pytest.approx(
        [
            0.0033786102113337554,
            0.7933405233592405,
            -0.20781372728407016,
            -0.7397892141600724,
            0.3953965599681053,
            0.6386922182038575,
            -0.5599805116980309,
            -0.49439140651369323,
        ]
    )
    assert network[4].weight[0].tolist() == pytest.approx(
        [-0.6014674260069173, -0.44865927963355057, 0.7196256156850651]
    )
    assert network[2].weight.tolist() == pytest.approx(
        [0.7241181878361934, -0.42771783539165364, -0.6130980241253186]
    )
    assert network[2].running_mean.tolist() == pytest.approx(
        [0.14441529249542703, 0.20594175360931014, 0.029427384007097983]
    )
    assert network[2].running_var.tolist() == pytest.approx(
        [1.100967713238039, 0.9897750380988082, 0.8436025309033829]
    )
    assert network[2].momentum == 0.1


# NAD ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "wanted"),
    [
        (2.0, [0.1369826634307088, 0.014290137923663281, 1.074492921167055]),
        (1.0, [0.07951553946558806, 0.10844098107860178, 0.7542557755162453]),
    ],
)
def test_attention_loss_is_the_official_one(power: float, wanted: list[float]) -> None:
    """bboylyg/NAD (f17b713), at.py, AT.forward, times 500, 1000 and 1000 (config.py): two images,
    maps of its wide residual network's 32, 16 and 8 pixels."""
    weights = options_of("nad").weights
    mine, theirs = [], []
    for number, side in enumerate((32, 16, 8)):
        shape, size = (2, 2, side, side), 4 * side * side
        mine.append(nad.attention(wave(size, 1.3, number).view(shape), power))
        theirs.append(nad.attention(wave(size, 0.7, number + 0.5).view(shape), power))
    found = nad.attention_distance(mine, theirs, weights)
    assert float(found) == pytest.approx(sum(wanted), rel=1e-9)
    for one, two, weight, value in zip(mine, theirs, weights, wanted, strict=True):
        assert float(nad.attention_distance([one], [two], [weight])) == pytest.approx(value)
    # Fewer maps than weights: the last weights.
    fewer = nad.attention_distance(mine[1:], theirs[1:], weights)
    assert float(fewer) == pytest.approx(wanted[1] + wanted[2], rel=1e-9)


@pytest.mark.parametrize(
    ("spec", "sides"),
    [
        ({"network": "convnet"}, [32, 16, 8]),
        ({"network": "resnet18"}, [32, 16, 8, 4]),
        ({"network": "alexnet"}, [32, 16, 8]),
        ({"network": "vgg11"}, [32, 16, 8, 4, 2]),
        ({"network": "convnet", "pooling": "none"}, [32]),
    ],
)
def test_attention_is_taken_before_the_size_changes(spec: dict[str, Any], sides: list[int]) -> None:
    maker = NetworkMaker(
        spec=NetworkSpec(**spec),
        image_shape=(3, 32, 32),
        classes=4,
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    with torch.no_grad():
        maps, _ = nad.attention_maps(maker(0).eval(), torch.rand(1, 3, 32, 32), 2.0)
    found = nad.groups(maps)
    assert [one.shape[-1] for one in found] == sides
    assert found[-1] is maps[-1]


# I-BAU -------------------------------------------------------------------------------------------


def test_a_round_of_i_bau_is_the_official_one() -> None:
    """YiZeng623/I-BAU (d4bfa52), defense.py's losses and loop on two mini-batches of three images
    with hypergrad.py's fixed_point and GradientDescent: the perturbation, both hypergradients (the
    map always on the first mini-batch), the weights after two steps of Adam."""
    network: Any = filled(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    ).eval()
    pieces = [
        Batch(images=wave(12, 0.5, 0.3).view(3, 1, 2, 2) + 0.5, labels=torch.tensor([0, 1, 2])),
        Batch(images=wave(12, 0.5, 1.1).view(3, 1, 2, 2) + 0.5, labels=torch.tensor([2, 0, 1])),
    ]
    options = options_of("i-bau", climbs=2)
    push = i_bau.find_perturbation(network, [piece.images for piece in pieces], options)
    assert push.flatten().tolist() == pytest.approx(
        [-3.445805958503667, -0.16119473269252377, 3.4873440661374064, -0.7374554325794249]
    )
    first, last = [], []
    optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
    for piece, carriers in zip(pieces, ([False, True, False], [True, False, True]), strict=True):
        gradients = i_bau.hypergradient(
            partial(i_bau.outer_loss, network, piece, torch.tensor(carriers)),
            partial(i_bau.inner_loss, network, pieces[0], options.penalty),
            push,
            list(network.parameters()),
            options.map_step,
            options.iterations,
        )
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        first.append(gradients[0][0].tolist())
        last.append(gradients[3].tolist())
    assert first[0] == pytest.approx(
        [0.06432063400017027, 0.04167464670769193, 0.03516941276255575, 0.05949172721090439]
    )
    assert first[1] == pytest.approx(
        [-0.637329266259353, 0.07650506082173074, 0.7067675869644761, -0.16948002723720243]
    )
    assert last[0] == pytest.approx(
        [0.17749272796865337, -0.11981359407769068, -0.057679133890962735]
    )
    assert last[1] == pytest.approx(
        [0.2974303214565522, -0.16874081608709013, -0.12868950536946203]
    )
    assert network[1].weight[0].tolist() == pytest.approx(
        [-0.0003268688471090289, 0.791357893964321, -0.20620938437732245, -0.7411714045873471]
    )
    assert network[3].bias.tolist() == pytest.approx(
        [0.11091367613715174, -0.7979439621283029, 0.09519241093327217]
    )


@pytest.mark.parametrize(
    ("count", "share", "wanted"), [(100, 0.01, 1), (256, 0.01, 2), (50, 0.01, 1), (7, 1.0, 7)]
)
def test_a_share_of_a_mini_batch_is_perturbed(count: int, share: float, wanted: int) -> None:
    """Rounded down, as the code has it, but never to none."""
    generator = torch.Generator().manual_seed(0)
    found = [i_bau.perturbed_images(count, share, generator) for _ in range(5)]
    assert all(int(one.sum()) == wanted and len(one) == count for one in found)
    assert wanted == count or not all(torch.equal(one, found[0]) for one in found)


# Fine-pruning ------------------------------------------------------------------------------------


def small_network(pooling: str) -> tuple[fine_pruning.SplitAtReader, nn.Module, Batch]:
    """Eight channels, of which 1 and 4 are dead, and 2 and 7 equal; labels are its own answers."""
    maker = NetworkMaker(
        spec=NetworkSpec.model_validate(
            {"network": "convnet", "width": 8, "depth": 1, "norm": "none", "pooling": pooling}
        ),
        image_shape=(1, 4, 4),
        classes=4,
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    network: Any = filled(maker(0)).eval()
    images = 0.5 + wave(40 * 16, 0.5, 0.2).view(40, 1, 4, 4)
    with torch.no_grad():
        filters = network.trunk[0]
        filters.bias[[1, 4]] = -50.0
        filters.weight[7], filters.bias[7] = filters.weight[2], filters.bias[2]
        network.head.bias.sub_(network(images).mean(dim=0))
        labels = network(images).argmax(dim=1)
    cut = fine_pruning.split_at_reader(network)
    return cut, network, Batch(images=images, labels=labels)


@pytest.mark.parametrize(
    ("pooling", "accuracies"),
    [
        ("avg", [1.0, 1.0, 1.0, 0.95, 1.0, 0.925, 0.625, 0.525]),
        ("max", [1.0, 1.0, 1.0, 0.85, 0.95, 0.9, 0.55, 0.525]),
    ],
)
def test_channels_are_pruned_in_the_official_order(pooling: str, accuracies: list[float]) -> None:
    """kangliucn/Fine-pruning-defense (4f181c1), face/conv_output_prune.py: its order 1, 4, 6, 2, 7,
    5, 3, 0, dead channels first, and the accuracy with so many filters emptied. BackdoorBench's
    masks on the linear layer's columns (defense/fp.py) give the same accuracies."""
    order = [1, 4, 6, 2, 7, 5, 3, 0]
    seen = set()
    for loss in (0.0, 0.04, 0.06, 0.1, 0.2, 0.46, 0.9):
        cut, network, clean = small_network(pooling)
        idle = fine_pruning.prune_inactive(cut, clean, loss)
        # It stops before the first that costs too much, and keeps the most active one.
        wanted = next((n - 1 for n in range(8) if accuracies[n] < 1 - loss - 1e-9), 7)
        assert idle.nonzero()[:, 0].tolist() == sorted(order[:wanted])
        with torch.no_grad():
            right = (network(clean.images).argmax(dim=1) == clean.labels).double().mean()
        assert float(right) == accuracies[wanted]
        seen.add(wanted)
    assert {2, 5, 7} <= seen


def test_activity_is_measured_after_pooling() -> None:
    """A peak of 4 among 15 zeros is 0.25 on average, but 1 behind pooling by maxima: more than a
    plain 0.5, which the answers rest on here, so that nothing can go."""
    images = torch.zeros(4, 3, 4, 4)
    images[:, 0, 0, 0], images[:, 2] = 4.0, 5.0
    images[:, 1] = torch.tensor([0.4, 0.6, 0.4, 0.6]).view(4, 1, 1)
    reader = nn.Linear(12, 2, bias=True)
    with torch.no_grad():
        reader.weight.zero_()
        reader.weight[1, 4:8] = 1.0
        reader.bias.copy_(torch.tensor([2.0, 0.0]))
    front = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
    cut = fine_pruning.SplitAtReader(
        front=front, tail=nn.Sequential(reader), reader=reader, channels=3
    )
    clean = Batch(images=images, labels=torch.tensor([0, 1, 0, 1]))
    assert not fine_pruning.prune_inactive(cut, clean, 0.04).any()
    assert fine_pruning.prune_inactive(cut, clean, 0.6).tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "lenet", "convnet-baadd", "vgg11"])
def test_a_pruned_channel_has_no_effect_in_any_architecture(name: str) -> None:
    """Behind a shortcut, too: the logits no longer depend on the channel's maps."""
    maker = NetworkMaker(
        spec=NetworkSpec(network=name),
        image_shape=(1, 32, 32),
        classes=4,
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    network = maker(0).eval()
    cut = fine_pruning.split_at_reader(network)
    images = wave(2 * 1024, 0.5, 0.1).view(2, 1, 32, 32).float() + 0.5
    with torch.no_grad():
        read = cut.front(images)
        assert torch.allclose(cut.tail(read), network(images), atol=1e-5)
        busiest = int(read.view(2, cut.channels, -1).sum(dim=(0, 2)).argmax())
        idle = torch.arange(cut.channels) == busiest
        fine_pruning.disconnect(cut, idle)
        emptied = read.view(2, cut.channels, -1) * ~idle[:, None]
        assert torch.allclose(cut.tail(emptied.flatten(1)), network(images), atol=1e-5)
        assert bool((emptied.flatten(1) != read).any())
