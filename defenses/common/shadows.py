"""A zoo of shadow networks: half of them are clean, the others each have their own backdoor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ...distill.files.safe import fault, read_tensors, write_tensors
from ...distill.networks.makers import NetworkMaker
from ...distill.training import fit
from ...distill.types import Batch, Recipe
from ..base import DefenseOptions
from .sgd import cross_entropy_step, mini_batches

_SIZES = (2, 3, 4, 5)  # sides of patches; one in five covers the whole image
_BACKDOORED = "zoo.backdoored"


@final
class ShadowOptions(DefenseOptions):
    """The paper's code, jumbo learning.

    optimiser: ``adam`` trains without augmentation, as the code does; ``sgd`` trains by the set's
    recipe, with these epochs, batch and learning rate.
    """

    pairs: int = Field(2304, ge=2, description="clean shadows, and as many backdoored ones")
    epochs: int = Field(100, ge=1, description="training epochs of a shadow")
    batch: int = Field(100, ge=2, description="images in a mini-batch")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    optimiser: Literal["adam", "sgd"] = Field("adam", description="optimiser of the shadows")


@final
@dataclass(frozen=True, eq=False)
class Zoo:
    """Networks of one architecture.

    states: their parameters and buffers, ``(M, …)`` by name. backdoored: ``bool (M,)``.
    description: architecture and training, in values that JSON can hold.
    """

    states: dict[str, Tensor]
    backdoored: Tensor
    description: dict[str, Any]

    def __len__(self) -> int:
        return len(self.backdoored)

    def logits(self, network: nn.Module, rows: Tensor, images: Tensor) -> Tensor:
        """Logits ``(R, N, classes)`` of the shadows ``rows`` on ``images``, which get gradients.

        network: any network of the zoo's architecture, in evaluation mode.
        """

        def of_one(state: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(network, state, (images,))
            return logits

        found: Tensor = vmap(of_one)({name: values[rows] for name, values in self.states.items()})
        return found

    def save(self, path: Path) -> None:
        """Write the zoo to a safetensors file."""
        tensors = {**self.states, _BACKDOORED: self.backdoored}
        write_tensors(path, tensors, {"zoo": self.description})


def load_zoo(path: Path, network: NetworkMaker) -> Zoo:
    """The zoo in ``path``. Its shadows must have the architecture of ``network``.

    Errors: ``RequestError`` naming the file if it is damaged, holds no zoo or another architecture.
    """
    tensors, info = read_tensors(path, device=network.device)
    description = info.get("zoo")
    if not isinstance(description, dict) or _BACKDOORED not in tensors:
        raise fault(path, "holds no zoo of shadow networks")
    for key, value in _architecture(network).items():
        if description.get(key) != value:
            raise fault(
                path,
                f"a zoo of networks with {key} {description.get(key)}, expected {value}: "
                "`distillsec shadows` makes one",
            )
    backdoored = tensors.pop(_BACKDOORED).bool()
    shapes = {name: tuple(value.shape) for name, value in network(0).state_dict().items()}
    if {name: tuple(value.shape[1:]) for name, value in tensors.items()} != shapes:
        raise fault(path, "its networks have another architecture")
    if any(len(value) != len(backdoored) for value in tensors.values()):
        raise fault(path, "the number of labels is not the number of networks")
    return Zoo(tensors, backdoored, description)


def train_zoo(
    network: NetworkMaker,
    clean: Batch,
    recipe: Recipe,
    options: ShadowOptions,
    draw: Callable[[int], torch.Generator],
    *,
    unfinished: Zoo | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Zoo:
    """Train ``options.pairs`` clean shadows on ``clean``, and as many with backdoors (jumbo).

    A clean shadow trains on the images, a backdoored one also on poisoned copies with its own
    random trigger. recipe: used if ``options.optimiser`` is ``sgd``. draw: the generator (CPU) of
    the shadow with this number, the only source of its randomness; so an ``unfinished`` zoo of
    fewer pairs is continued to the same result. progress: called with the number of shadows done
    and the total.
    """
    states: list[Mapping[str, Tensor]] = []
    total, first = 2 * options.pairs, len(unfinished) if unfinished else 0
    for number in range(first, total):
        generator = draw(number)
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        batch = poisoned(clean, network.classes, generator) if number % 2 else clean
        shadow = _trained(network(seed), batch, recipe, options, generator)
        states.append(shadow.state_dict())
        progress(number + 1, total)
    stacked = {
        name: torch.stack([state[name] for state in states]) for name in network(0).state_dict()
    }
    if unfinished:
        stacked = {n: torch.cat([unfinished.states[n], value]) for n, value in stacked.items()}
    backdoored = torch.arange(total, device=clean.labels.device) % 2 == 1
    return Zoo(stacked, backdoored, describe_zoo(network, clean, options))


def _trained(
    network: nn.Module,
    batch: Batch,
    recipe: Recipe,
    options: ShadowOptions,
    generator: torch.Generator,
) -> nn.Module:
    """``network`` trained in place on ``batch``, in evaluation mode."""
    if options.optimiser == "sgd":
        recipe = recipe.by_epochs(epochs=options.epochs, batch_size=options.batch, lr=options.lr)
        return fit(network, batch, recipe, generator)
    optimiser, device = torch.optim.Adam(network.parameters(), lr=options.lr), batch.labels.device
    network.train()
    for _ in range(options.epochs):
        for rows in mini_batches(len(batch), options.batch, generator, device):
            cross_entropy_step(network, optimiser, batch.images[rows], batch.labels[rows])
    return network.eval()


def describe_zoo(network: NetworkMaker, clean: Batch, options: ShadowOptions) -> dict[str, Any]:
    """The description of a zoo that its file holds."""
    return {**_architecture(network), "images": len(clean), **options.model_dump()}


def poisoned(clean: Batch, classes: int, generator: torch.Generator) -> Batch:
    """``clean``, and poisoned copies of 5 to 50 % of it with one random trigger and target."""
    mask, pattern = random_trigger(tuple(clean.images.shape[1:]), generator)
    device = clean.images.device
    target = int(torch.randint(classes, (), generator=generator))
    share = _between(0.05, 0.5, generator)
    count = max(1, int(share * len(clean)))
    rows = torch.randperm(len(clean), generator=generator)[:count].to(device)
    mask, pattern = mask.to(device), pattern.to(device)
    copies = (1 - mask) * clean.images[rows] + mask * pattern
    labels = torch.full((count,), target, device=device)
    return Batch(images=torch.cat([clean.images, copies]), labels=torch.cat([clean.labels, labels]))


def random_trigger(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A jumbo trigger for images ``(C, H, W)``: its opacity ``(1, H, W)`` and pattern ``shape``.

    A square of side 2 to 5 with an opacity of 0.2 to 0.5 or of 1, anywhere but at the last row and
    column (as in the code); with probability 1/5 the whole image at 0.05 to 0.2. Grey patterns are
    black and white, with at least one pixel of each; others have any colour.
    """
    channels, height, width = shape
    sizes = [(size, size) for size in _SIZES if size < min(height, width)]
    choice = int(torch.randint(len(sizes) + 1, (), generator=generator))
    patch = choice < len(sizes)
    tall, wide = sizes[choice] if patch else (height, width)
    opacity = _between(0.2, 0.6, generator) if patch else _between(0.05, 0.2, generator)
    opacity = 1.0 if opacity > 0.5 else opacity
    top = int(torch.randint(max(1, height - tall), (), generator=generator))
    left = int(torch.randint(max(1, width - wide), (), generator=generator))
    mask, pattern = torch.zeros(1, height, width), torch.zeros(shape)
    mask[:, top : top + tall, left : left + wide] = opacity
    drawn = (
        _lit(tall, wide, generator) if channels == 1 else _coloured(channels, tall, wide, generator)
    )
    pattern[:, top : top + tall, left : left + wide] = drawn
    return mask, pattern


def _lit(tall: int, wide: int, generator: torch.Generator) -> Tensor:
    """A black patch with white pixels at random places: from one to all but one."""
    many = int(torch.randint(1, tall * wide, (), generator=generator))
    flat = torch.zeros(tall * wide)
    flat[torch.randperm(tall * wide, generator=generator)[:many]] = 1
    return flat.view(1, tall, wide)


def _coloured(channels: int, tall: int, wide: int, generator: torch.Generator) -> Tensor:
    """Uniform noise from a range of width 1 to 3 around [0, 1], clipped to [0, 1]."""
    beyond = _between(0.0, 1.0, generator)
    noise = torch.rand(channels, tall, wide, generator=generator)
    return ((1 + 2 * beyond) * noise - beyond).clamp(0, 1)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _architecture(network: NetworkMaker) -> dict[str, Any]:
    """What shadows and victim must have in common."""
    space = network.preprocessing
    found = {
        "network": network.spec.model_dump(mode="json"),
        "image_shape": list(network.image_shape),
        "classes": network.classes,
        "mean": list(space.mean),
        "std": list(space.std),
        "zca": space.zca and space.zca.describe(),
    }
    normal: dict[str, Any] = json.loads(json.dumps(found))
    return normal
