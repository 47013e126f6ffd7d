"""Defenses of a model's channels against their official codes, on the same weights and inputs.

Weights and images are sines, so that any version of torch makes the same. The numbers come from the
authors' functions run on them: csdongxian/ANP_backdoor ec7b179 (``optimize_mask_cifar.py``,
``mask_train``), bboylyg/RNP eeae192 (``main.py``, ``train_step_unlearning`` and
``train_step_recovering``), rkteddy/channel-Lipschitzness-based-pruning 5209c83 (``defense.py``,
``CLP``), xuxiong0214/BTIDBF e680dda (``pretrain.py``, ``btidbf.py``, ``models/unet_model.py``) and
naiyeleo/ABS 3c9410c (``abs.py``, ``find_min_max``).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distillsec.defenses import DEFENSES
from distillsec.defenses.base import Repairer
from distillsec.defenses.common import unet
from distillsec.defenses.common.channels import channels, convolutions
from distillsec.defenses.models import abs as abs_
from distillsec.defenses.models import anp, bti_dbf, clp, rnp
from distillsec.distill.networks.layers import Normalise
from distillsec.distill.networks.registry import Network
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch, Recipe

if TYPE_CHECKING:
    from tests.defenses.conftest import Case

LABELS = torch.arange(12) % 3
RECIPE = Recipe(preprocessing=Preprocessing((0.5,), (0.3,)), epochs=1)


def waves(shape: tuple[int, ...] | torch.Size, number: int, scale: float = 0.5) -> Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (steps * 0.7 + number).sin().mul(scale).reshape(shape)


def known() -> Batch:
    steps = torch.arange(12 * 64, dtype=torch.float64)
    return Batch(images=((steps * 0.37).sin() + 1).div(2).reshape(12, 1, 8, 8), labels=LABELS)


def made() -> Network:
    """Two convolutions with batch norms and a linear layer, in float64."""
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    trunk = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        first,
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        second,
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
    )
    network = Network(Normalise(Preprocessing((0.5,), (0.3,))), trunk, nn.Linear(16, 3)).double()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(waves(parameter.shape, number))
        for norm in (first, second):
            assert norm.running_var is not None and norm.running_mean is not None
            norm.weight.add_(1)
            norm.running_var.copy_(waves((4,), 3) + 1)
            norm.running_mean.copy_(waves((4,), 4))
    return network.eval()


def listed(masks: dict[str, Tensor]) -> list[float]:
    return torch.cat(list(masks.values())).tolist()


# ANP and RNP -------------------------------------------------------------------------------------


def test_anp_learns_the_official_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps; the perturbation starts at half the budget, and reaches 1.5 of it."""
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), 0.75))
    monkeypatch.setattr(torch, "randint", lambda *args, generator: torch.arange(12))
    options, generator = anp.AnpOptions(iterations=3), torch.Generator()
    pushes: list[Any] = []
    worst = anp.perturbations

    def spied(*args: Any) -> Any:
        pushes.append(worst(*args))
        return pushes[-1]

    monkeypatch.setattr(anp, "perturbations", spied)
    masks = anp.learn_masks(made(), known(), RECIPE, options, generator)
    wanted = [1.0, 0.999514, 1.0, 0.990166, 0.95003, 1.0, 0.97854, 0.929957]
    assert listed(masks) == pytest.approx(wanted, abs=2e-5)
    weights, biases = pushes[-1]
    wanted = [-0.2, -0.2, -0.2, -0.2, 0.6, -0.2, -0.2, 0.6]
    assert listed(weights) == pytest.approx(wanted, abs=1e-6)
    wanted = [0.6, 0.6, 0.6, 0.6, 0.6, -0.2, 0.6, -0.2]
    assert listed(biases) == pytest.approx(wanted, abs=1e-6)


def test_anp_draws_its_mini_batches_with_replacement() -> None:
    """128 images out of 12, as the official sampler does."""
    seen: list[int] = []
    network = made()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    anp.learn_masks(network, known(), RECIPE, anp.AnpOptions(iterations=2), torch.Generator())
    assert set(seen) == {128} and len(seen) == 2 * 3


def test_the_perturbation_may_take_its_budget_in_steps() -> None:
    network, batch = made(), known()
    masks = {layer.layer: torch.ones(layer.count) for layer in channels(network)}
    options = anp.AnpOptions(steps=4)
    generator = torch.Generator().manual_seed(1)
    network.requires_grad_(False)
    weights, biases = anp.perturbations(
        network, masks, batch.images, batch.labels, options, generator
    )
    ended = torch.tensor(listed(weights) + listed(biases))
    generator.manual_seed(1)
    starts = torch.cat([2 * torch.rand(4, generator=generator) - 1 for _ in range(4)]) * 0.4
    steps = (ended - starts) / 0.1
    assert torch.allclose(steps, steps.round(), atol=1e-4) and steps.abs().max() <= 4.001


def test_rnp_unlearns_and_recovers_as_the_official_code() -> None:
    """Six epochs of four steps, the rate falling after the second and the fourth."""
    options = rnp.RnpOptions(unlearning_epochs=6, drops=(2, 4), recovering_epochs=3)
    empty = rnp.unlearn_clean(made(), known(), RECIPE, options, torch.Generator())
    sums = [float(parameter.detach().sum()) for parameter in empty.parameters()]
    wanted = [0.018343, 1.274865, 4.129468, -1.132481, -0.155959]
    wanted += [-0.331987, 5.021971, 1.411152, 0.816405, -0.343674]
    assert sums == pytest.approx(wanted, abs=2e-6)
    masks = rnp.recover(empty, known(), RECIPE, options, torch.Generator())
    wanted = [0.99761, 0.999061, 1.0, 1.0, 0.74072, 1.0, 0.812396, 0.763794]
    assert listed(masks) == pytest.approx(wanted, abs=2e-5)


def test_rnp_stops_by_the_accuracy_during_the_epoch() -> None:
    """It is a third in every epoch here: above the floor of 0.2, and at one of 0.34."""
    steps: list[int] = []
    for floor in (0.2, 0.34):
        seen: list[Any] = []
        network = made()
        network.register_forward_pre_hook(lambda *args, seen=seen: seen.append(args))
        options = rnp.RnpOptions(unlearning_epochs=3, floor=floor)
        rnp.unlearn_clean(network, known(), RECIPE, options, torch.Generator())
        steps.append(len(seen))
    assert steps == [12, 4]


def test_published_settings_are_among_those_of_the_tuned_budget(badnets: Case) -> None:
    for name, option in (("anp", "threshold"), ("rnp", "threshold"), ("clp", "deviations")):
        kind = DEFENSES[name]
        published = getattr(kind.Options(), option)
        assert published in [setting[option] for setting in kind.grid]
        pruned = []
        few = {"anp": {"iterations": 10}, "rnp": {"recovering_epochs": 3}, "clp": {}}[name]
        view = badnets.fresh()
        for setting in kind.grid:
            defense = kind(kind.Options(**few, **setting))
            assert isinstance(defense, Repairer)
            states = defense.repair(view).state_dict()
            weights = [states[f"{layer.layer}.weight"] for layer in channels(view.victim)]
            pruned.append(sum(int((weight == 0).sum()) for weight in weights))
        assert pruned == sorted(pruned)


@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_masks_need_batch_norm_or_no_norm(
    name: str, badnets: Case, cases: Callable[..., Case]
) -> None:
    kind = DEFENSES[name]
    defense = kind(kind.Options())
    assert defense.not_applicable_because(badnets.view) is None
    for norm, reason in (
        ("none", None),
        ("instance", "needs batch norm or no norm, the network has GroupNorm"),
        ("layer", "needs batch norm or no norm, the network has LayerNorm"),
    ):
        view = cases(poisoned=True, norm=norm, epochs=1, width=4).view
        assert defense.not_applicable_because(view) == reason


def test_masks_are_learned_once_for_all_thresholds(
    badnets: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    learn = anp.learn_masks

    def spied(*args: Any) -> Any:
        calls.append(1)
        return learn(*args)

    monkeypatch.setattr(anp, "learn_masks", spied)
    view = badnets.fresh()
    for threshold in (0.1, 0.9):
        anp.Anp(anp.AnpOptions(iterations=2, threshold=threshold)).repair(view)
    anp.Anp(anp.AnpOptions(iterations=3)).repair(view)
    assert len(calls) == 2


# CLP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deviations", "wanted"), [(1.8, []), (1.6, []), (1.5, [3]), (1.0, [3]), (0.9, [3, 4])]
)
def test_clp_prunes_the_official_channels(
    deviations: float, wanted: list[int], badnets: Case
) -> None:
    """1.6 and 1.0 tell the unbiased deviation from the other, which would prune one more."""
    norm = nn.BatchNorm2d(6)
    trunk = nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.Flatten())
    network = Network(
        Normalise(Preprocessing((0.0, 0.0), (1.0, 1.0))), trunk, nn.Linear(6 * 36, 10)
    ).eval()
    source = trunk[0].weight
    assert isinstance(source, Tensor) and norm.running_var is not None
    with torch.no_grad():
        source.copy_(waves(source.shape, 0))
        source[3] *= 2.5
        norm.weight.copy_(waves((6,), 1) + 1)
        norm.bias.fill_(1)
        norm.running_var.copy_(waves((6,), 2) + 0.51)
    bounds = clp.lipschitz(network, convolutions(network)[0])
    assert bounds is not None
    official = [2.1672496, 2.6342800, 3.2414506, 12.0372219, 9.5236301, 1.9312229]
    assert bounds.tolist() == pytest.approx(official, rel=1e-5)
    before = copy.deepcopy(network.state_dict())
    repaired = clp.Clp(clp.ClpOptions(deviations=deviations)).repair(badnets.fresh(victim=network))
    after = repaired.state_dict()
    for name in ("trunk.1.weight", "trunk.1.bias"):
        assert (after[name] == 0).nonzero().flatten().tolist() == wanted
    assert torch.equal(after["trunk.0.weight"], before["trunk.0.weight"])


# BTI-DBF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "width", "levels", "values", "total"),
    [
        ((3, 32, 32), 4, 4, [-0.141526, -0.229288, -0.205419, -0.186387], 20.68266),
        ((1, 8, 8), 2, 2, [0.268902, 0.254716, 0.254727, 0.255015], 34.87716),
    ],
)
def test_the_unet_is_the_official_one(
    shape: tuple[int, int, int], width: int, levels: int, values: list[float], total: float
) -> None:
    network = unet.UNet(shape[0], width, levels).double()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(waves(parameter.shape, number, 0.3))
        drawn = network(waves((2, *shape), 5, 1.0))
    assert drawn.flatten()[::37][:4].tolist() == pytest.approx(values, abs=2e-6)
    assert float(drawn.sum()) == pytest.approx(total, rel=1e-6)


def test_the_published_unet_has_11_million_weights() -> None:
    options = bti_dbf.BtiDbfOptions()
    with torch.device("meta"):
        network = unet.UNet(3, options.width, options.levels)
    assert sum(parameter.numel() for parameter in network.parameters()) == 10_987_011


@pytest.mark.parametrize(
    ("side", "wanted"), [(8, 2), (16, 3), (17, 4), (28, 4), (32, 4), (64, 4), (3, 1)]
)
def test_the_unet_is_as_deep_as_an_image_allows(side: int, wanted: int) -> None:
    assert unet.fitting_levels(side, 4) == wanted
    network = unet.seeded_unet(1, 4, wanted, torch.Generator().manual_seed(0)).train()
    assert network(torch.rand(2, 1, side, side + 1)).shape == (2, 1, side, side + 1)


def changed(scale: float) -> tuple[Tensor, Tensor]:
    """Normalised images, and the same changed."""
    images = (known().images - 0.5) / 0.3
    return images, images + waves(images.shape, 9, scale)


@pytest.mark.parametrize(("scale", "wanted"), [(0.1, 0.96955549), (2.0, 206.28446650)])
def test_bti_dbf_copies_with_the_official_loss(scale: float, wanted: float) -> None:
    model = bti_dbf.split_victim(made())
    loss = bti_dbf.copying_loss(model, *changed(scale))
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("scale", "bound", "wanted"),
    [
        (0.1, 3.0, -0.0049769819),
        (0.5, 3.0, -0.1165328332),
        (2.0, 3.0, 1.9993924336),  # pixels changed too much
        (0.5, 0.001, 0.1249620271),  # benign features changed too much
    ],
)
def test_bti_dbf_learns_triggers_with_the_official_loss(
    scale: float, bound: float, wanted: float
) -> None:
    model = bti_dbf.split_victim(made())
    mask = waves((1, 4, 4, 4), 2, 1.0).tanh() / 2 + 0.5
    options = bti_dbf.BtiDbfOptions(feature_bound=bound)
    loss = bti_dbf.trigger_loss(model, mask, *changed(scale), options)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_bti_dbf_finds_the_official_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps in training mode: the batch norms' running means have moved as well."""
    monkeypatch.setattr(torch, "randn", lambda shape, generator: waves(shape, 2, 1.0))
    model = bti_dbf.split_victim(made())
    supply = bti_dbf.KnownBatches(known(), RECIPE, 128, torch.Generator())
    mask = bti_dbf.benign_features(model, supply, bti_dbf.BtiDbfOptions(mask_steps=5))
    wanted = [0.847934, 0.846081, 0.868693, 0.866945, 0.840028, 0.837829, 0.835539, 0.846612]
    assert mask.flatten()[::9].tolist() == pytest.approx(wanted, abs=2e-6)
    assert float(mask.sum()) == pytest.approx(32.55393271, rel=1e-6)
    means = model.network.state_dict()["trunk.5.running_mean"].tolist()
    assert means == pytest.approx([-0.405233, -0.382564, -0.16813, 0.14222], abs=2e-6)
    assert not model.network.training


def test_bti_dbf_takes_the_official_number_of_steps() -> None:
    """2,500 images (5 % of CIFAR-10) in mini-batches of 128 are 20 steps an epoch."""
    options = bti_dbf.BtiDbfOptions()
    per_epoch = math.ceil(options.images / options.batch)
    epochs = [count / per_epoch for count in (options.mask_steps, options.copy_steps)]
    assert [*epochs, options.steps / per_epoch] == [20, 50, 30]


# ABS ---------------------------------------------------------------------------------------------


def official_logits(block: int, channel: int) -> Tensor:
    """Eight images' logits at five levels: most neurons move one class, in part just about."""
    logits = waves((5, 8, 4), block * 7 + channel, 0.4)
    logits[1:, :, (block + channel) % 4] += 1 + 0.3 * math.sin(5 * block + channel)
    return logits


@pytest.mark.parametrize("top", [4, 8])
def test_abs_chooses_the_official_neurons(top: int) -> None:
    """``top_n_neurons`` of the official code gives one more than it says."""
    labels, found = torch.arange(8) % 4, []
    for block, channel in itertools.product(range(3), range(6)):
        label, votes, lead = abs_.most_raised_class(official_logits(block, channel), labels)
        if votes >= 8 - abs_.AbsOptions().missing:
            found.append(abs_.CandidateNeuron(block, channel, label, lead))
    chosen = [(some.block, some.channel, some.label) for some in abs_.strongest(found, top + 1)]
    wanted = [(0, 2, 2), (1, 4, 1), (2, 4, 2), (2, 3, 1), (0, 1, 1)]
    wanted += [(1, 2, 3), (1, 3, 0), (2, 5, 3), (1, 1, 2)]
    assert chosen == wanted[: top + 1]


def test_half_of_the_candidates_are_at_most_three_of_a_block() -> None:
    suspects = [
        abs_.CandidateNeuron(block, channel, 0, 10.0 - block - channel / 10)
        for block in (0, 1)
        for channel in range(8)
    ]
    chosen = [(some.block, some.channel) for some in abs_.strongest(suspects, 9)]
    first = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert chosen == [*first, (0, 3), (0, 4), (0, 5), (0, 6)]


def test_a_neuron_is_set_to_equal_steps_up_to_the_layers_largest() -> None:
    """0, 1.6, 3.2, 4.8 and 6.4 times: ``samp_k`` 8, ``n_samples`` 5."""
    outputs = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    outputs[0, 2, 1, 1] = 2.0
    seen: list[Tensor] = []

    class Rest(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            seen.append(values)
            return values.mean(dim=(2, 3))

    abs_.stimulated(Rest(), outputs, 1, abs_.AbsOptions())
    assert [float(values[:, 1].unique()) for values in seen] == pytest.approx(
        [0.0, 3.2, 6.4, 9.6, 12.8]
    )
    assert all(torch.equal(values[:, [0, 2]], outputs[:, [0, 2]]) for values in seen)


@pytest.mark.parametrize(("pixels", "times"), [(64, 0), (65, 1), (100, 1), (101, 2)])
def test_the_penalty_of_a_mask_depends_on_its_pixels(pixels: int, times: int) -> None:
    """Of 32×32 pixels: free up to 64, then 500 and beyond (8 + 2)² pixels 1,000 times its sum."""
    mask = torch.full((1, 1, 32, 32), 0.009)
    mask.view(-1)[:pixels] = 0.5
    cost = abs_.size_penalty(mask, 64 / 1024, 500.0)
    assert cost.tolist() == pytest.approx([500 * times * float(mask.sum())], rel=1e-5)


def test_the_search_starts_at_the_official_square() -> None:
    start = abs_.corner((32, 32), 64 / 1024)[0, 0].tanh() / 2 + 0.5
    assert float(start[:8, :8].min()) == pytest.approx(0.98201379)
    assert float(start.sum()) == pytest.approx(64 * 0.98201379 + 960 * 0.01798621, rel=1e-5)


def test_abs_searches_on_a_third_of_the_seed_images() -> None:
    """Of 50 seed images 16 in the official code: here 17, of each class one or two."""
    labels = torch.arange(100) % 10
    seeds = abs_.in_turn(Batch(images=torch.rand(100, 1, 2, 2), labels=labels), 5)
    assert seeds.labels.tolist() == list(range(10)) * 5


def test_a_search_excites_its_channel_before_and_after_the_activation() -> None:
    """One step along the gradient of the official loss, from the same start, by Adam."""
    network = made().float()
    normalise = network.normalise
    pieces = [nn.Sequential(*list(network.trunk.children())[:3])]
    images = known().images.float()[:4]
    options = abs_.AbsOptions(steps=1, size=0.1)
    suspects = [abs_.CandidateNeuron(0, 2, 1, 1.0)]
    generator = torch.Generator().manual_seed(3)
    masks, patterns = abs_.excite(pieces, normalise, images, suspects, options, generator)
    noise = torch.randn(1, 1, 8, 8, generator=generator.manual_seed(3)).requires_grad_()
    free = abs_.corner((8, 8), 0.1).requires_grad_()
    mask = free.tanh() / 2 + 0.5
    entered = pieces[0][:2]((1 - mask) * normalise(images) + mask * noise)
    left = functional.relu(entered)
    wanted = [values[:, 2].sum() for values in (entered, left)]
    others = [values.sum() - own for values, own in zip((entered, left), wanted, strict=True)]
    pixels = int((mask > 0.01).sum())
    assert pixels == 64  # the start is above 0.01 everywhere, so that the mask is too large
    loss = 1e-4 * sum(others) - sum(wanted) + 2 * 500 * mask.sum()
    slopes = torch.autograd.grad(loss, [free, noise])
    stepped = free.detach() - 0.1 * slopes[0].sign()
    assert torch.allclose(masks, stepped.tanh() / 2 + 0.5, atol=1e-3)
    moved = (noise.detach() - 0.1 * slopes[1].sign()) * 0.3 + 0.5
    assert torch.allclose(patterns, moved.clamp(0, 1), atol=1e-3)
