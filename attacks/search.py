"""How a moving trigger is searched: one function an objective, one Adam loop for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..distill.core.hooks import Moment
from ..distill.networks.makers import embed
from ..distill.networks.registry import penultimate_linear
from ..distill.types import RequestError

ObjectiveName = Literal["neuron", "neuron-reference", "target-logit", "student"]

_BETAS = (0.9, 0.99)  # the reference code's
_REFERENCE_STOP = 0.5  # mean squared error below which the reference code stops


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SearchSpace:
    """Where a search may move a pattern ``(C, H, W)``.

    mask: ``(1, H, W)``, 1 where the pattern may change, 0 elsewhere. shift, scale: ``(C, 1, 1)``;
    Adam moves (pattern − shift) / scale. project: onto the allowed patterns, after every step;
    ``None`` for all. canvas: ``(C, H, W)``, the image on which ``neuron-reference`` stamps.
    All pixel units.
    """

    mask: Tensor
    shift: Tensor
    scale: Tensor
    project: Callable[[Tensor], Tensor] | None
    canvas: Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Carriers:
    """What a search starts from.

    images: clean images ``(N, C, H, W)`` that the goal is about, targets: ``int64 (N,)``, the
    labels they are to get. pattern: ``(C, H, W)``, in ``space``. stamp: images with a pattern, from
    the pattern and clean images, differentiable in the pattern. owner: equal for carriers that
    differ in images, targets and pattern only.
    """

    images: Tensor
    targets: Tensor
    pattern: Tensor
    space: SearchSpace
    stamp: Callable[[Tensor, Tensor], Tensor]
    owner: Hashable = None


@final
@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """alpha, neurons: of the neuron objectives. lr: Adam's, normalised units."""

    alpha: float
    neurons: int
    lr: float
    steps: int
    students: int


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LivePasses:
    """A live ``network`` with its passes: ``logits`` and ``features`` (what enters its head)."""

    network: nn.Module
    logits: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]


Loss = Callable[[Tensor], Tensor]  # from a pattern (C, H, W), pixel space, to a scalar


def optimise_pattern(
    carriers: Carriers, options: SearchOptions, loss: Loss, stop_below: float
) -> Tensor:
    """Adam on the pixels under the mask, in normalised units; returns the new pattern.

    Stops early once the loss is below ``stop_below``, which losses of 0 or more never are at 0.
    Where the space has a projection, every step ends with it.
    """
    space = carriers.space
    start = (carriers.pattern - space.shift) / space.scale
    moved = start.clone().requires_grad_()
    on_gpu = moved.is_cuda  # there the steps are counted on the GPU too
    optimiser = torch.optim.Adam([moved], lr=options.lr, betas=_BETAS, capturable=on_gpu)
    for _ in range(options.steps):
        value = loss(_pixels(moved, space))
        if stop_below > 0 and value.item() < stop_below:
            break
        (gradient,) = torch.autograd.grad(value, moved)
        moved.grad = gradient * space.mask
        optimiser.step()
        if space.project:
            with torch.no_grad():
                pixels = space.project(_pixels(moved, space))
                moved.copy_((pixels - space.shift) / space.scale)
    found = _pixels(moved.detach(), space) * space.mask
    found = space.project(found) if space.project else found
    # Without a step there is no rounding either: an update that did nothing is recognised by that.
    return torch.where((moved.detach() == start).all(), carriers.pattern, found)


def _pixels(moved: Tensor, space: SearchSpace) -> Tensor:
    return moved * space.scale + space.shift


def _stamped(pattern: Tensor, carriers: Carriers) -> Tensor:
    return carriers.stamp(pattern, carriers.images)


def neuron_reference(moment: Moment, carriers: Carriers, options: SearchOptions) -> Tensor:
    """The reference code's update, reproduced exactly.

    The ``neurons`` units of the hidden linear layer with the largest summed absolute incoming
    weights; the pattern on the space's canvas (a patch: black); their activation (after ReLU)
    driven to ``alpha`` × its first value. A unit that is dead on that canvas gives loss 0, and the
    search stops before its first step: that is the reference's early stop, counted by the attack as
    an idle update.
    """
    network = _network(moment)
    hidden = penultimate_linear(network)
    if hidden is None:
        raise RequestError(
            "objective neuron-reference needs a network with a hidden linear layer before the "
            "head (convnet-baadd, mlp, lenet), as in the reference code; try objective neuron"
        )
    weights = hidden.weight.abs().sum(dim=1)
    units = weights.topk(min(options.neurons, len(weights))).indices

    def activation(pattern: Tensor) -> Tensor:
        return embed(network, carriers.stamp(pattern, carriers.space.canvas.unsqueeze(0)))[:, units]

    with torch.no_grad():
        wanted = options.alpha * activation(carriers.pattern)
    loss = _distance_to(wanted, activation)
    return optimise_pattern(carriers, options, loss, stop_below=_REFERENCE_STOP)


def neuron(moment: Moment, carriers: Carriers, options: SearchOptions) -> Tensor:
    """The same idea on live units and real images, in a few steps.

    Units are ranked by summed absolute incoming weights (where the layer below the head is no
    linear layer: by summed absolute weights into the head) among those that respond to at least
    one carrier; their mean activation is driven to ``alpha`` × its first value.
    """
    return _against_network(moment, carriers, options, _drive_neurons)


def _drive_neurons(live: LivePasses, carriers: Carriers, options: SearchOptions) -> Tensor:
    hidden = penultimate_linear(live.network)
    with torch.no_grad():
        before = live.features(_stamped(carriers.pattern, carriers))
    weights = _head_weights(live.network) if hidden is None else hidden.weight.abs().sum(dim=1)
    alive = before.abs().sum(dim=0) > 0
    ranked = torch.where(alive, weights, -torch.inf)
    units = ranked.topk(min(options.neurons, len(ranked))).indices
    counted = alive[units].to(before.dtype)
    share = counted / counted.sum().clamp(min=1)  # none alive: the loss is 0, and nothing moves

    def activation(pattern: Tensor) -> Tensor:
        return live.features(_stamped(pattern, carriers))[:, units].mean(dim=0)

    wanted = options.alpha * before[:, units].mean(dim=0)

    def loss(pattern: Tensor) -> Tensor:
        return ((activation(pattern) - wanted).square() * share).sum()

    return optimise_pattern(carriers, options, loss, stop_below=0.0)


def target_logit(moment: Moment, carriers: Carriers, options: SearchOptions) -> Tensor:
    """Cross-entropy of stamped carriers to their targets, on the live distilling network."""
    return _against_network(moment, carriers, options, _reach_targets)


def _reach_targets(live: LivePasses, carriers: Carriers, options: SearchOptions) -> Tensor:
    return _lower_cross_entropy([live.logits], carriers, options)


def _against_network(
    moment: Moment,
    carriers: Carriers,
    options: SearchOptions,
    search: Callable[[LivePasses, Carriers, SearchOptions], Tensor],
) -> Tensor:
    """What ``search`` finds on the live network, captured where the engine does that."""
    network = _network(moment)
    static = moment.engine.static(network)
    if static is None:
        plain = LivePasses(network=network, logits=network, features=partial(embed, network))
        return search(plain, carriers, options)
    live = LivePasses(network=static.module, logits=static.first_order, features=static.embed)

    def found(images: Tensor, targets: Tensor, pattern: Tensor) -> tuple[Tensor, ...]:
        given = replace(carriers, images=images, targets=targets, pattern=pattern)
        return (search(live, given, options),)

    captured = static.captured((search, options, carriers.owner), found)
    return captured(carriers.images, carriers.targets, carriers.pattern)[0].clone()


def student(moment: Moment, carriers: Carriers, options: SearchOptions) -> Tensor:
    """Cross-entropy to the targets, averaged over networks trained on the current set."""
    networks = [moment.train_student() for _ in range(options.students)]
    frozen = [network.requires_grad_(False) for network in networks]
    return _lower_cross_entropy(frozen, carriers, options)


def _lower_cross_entropy(
    networks: Sequence[Callable[[Tensor], Tensor]], carriers: Carriers, options: SearchOptions
) -> Tensor:
    targets = carriers.targets

    def loss(pattern: Tensor) -> Tensor:
        images = _stamped(pattern, carriers)
        losses = [functional.cross_entropy(network(images), targets) for network in networks]
        return torch.stack(losses).mean()

    return optimise_pattern(carriers, options, loss, stop_below=0.0)


def _distance_to(wanted: Tensor, activation: Loss) -> Loss:
    return lambda pattern: functional.mse_loss(activation(pattern), wanted)


def _network(moment: Moment) -> nn.Module:
    if moment.network is None:
        raise RequestError("this backend has no live network to optimise a trigger against")
    return moment.network


def _head_weights(network: nn.Module) -> Tensor:
    head = getattr(network, "head", None)
    if not isinstance(head, nn.Linear):
        raise RequestError("objective neuron needs a network whose head is one linear layer")
    return head.weight.abs().sum(dim=0)


@final
@dataclass(frozen=True, kw_only=True)
class Objective:
    """A search with its own defaults: Adam steps, moves of the network per update, and the share
    of the run after which the trigger no longer changes."""

    search: Callable[[Moment, Carriers, SearchOptions], Tensor]
    steps: int
    update_every: int = 1
    freeze_at: float = 1.0


OBJECTIVES: Mapping[ObjectiveName, Objective] = {
    "neuron": Objective(search=neuron, steps=20),
    "neuron-reference": Objective(search=neuron_reference, steps=1000),
    "target-logit": Objective(search=target_logit, steps=20),
    "student": Objective(search=student, steps=100, update_every=20, freeze_at=0.5),
}
