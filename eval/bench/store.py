"""A cache of trained victims: each is trained once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import final

import torch
from torch import nn

from ...distill.files.safe import fault, read_tensors, write_tensors
from ...distill.networks.makers import NetworkMaker
from ...distill.preprocessing import digest
from ...distill.randomness import Streams
from ...distill.types import DistilledSet
from ..run.victims import train_victim


@final
class VictimStore:
    """A folder of victims, by a hash of set, recipe, architecture, seed and number.

    Attacks with the same clean twin share its victims, and so do defenses that return the same set.
    Without ``keep`` the store is only read.
    """

    def __init__(self, folder: Path, *, keep: bool = True) -> None:
        self._folder, self._keep = folder, keep

    def victim(
        self, distilled: DistilledSet, network: NetworkMaker, streams: Streams, number: int
    ) -> nn.Module:
        """Victim ``number`` of ``distilled``, frozen, in evaluation mode; trained if it is missing.

        Errors: ``RequestError`` naming a file that is damaged.
        """
        path = self._folder / f"{_key(distilled, network, streams, number)}.safetensors"
        if path.exists():
            victim = _read(path, network).eval()
        else:
            victim = train_victim(distilled, network, streams, number)
            if self._keep:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_tensors(path, victim.state_dict(), {})
        return victim.requires_grad_(False)


def _read(path: Path, network: NetworkMaker) -> nn.Module:
    victim = network(0)
    tensors, _ = read_tensors(path, device=network.device)
    try:
        victim.load_state_dict(tensors)
    except RuntimeError as error:
        raise fault(path, "is no victim of this architecture") from error
    return victim


def _key(distilled: DistilledSet, network: NetworkMaker, streams: Streams, number: int) -> str:
    """A digest of everything that the weights of a victim depend on."""
    space = network.preprocessing
    parts = {
        "set": digest(distilled.batch.images, distilled.batch.labels),
        "recipe": distilled.recipe.describe(),
        "network": network.spec.model_dump(),
        "normalisation": [space.mean, space.std, space.zca and space.zca.describe()],
        "device": network.device,
        "threads": torch.get_num_threads(),
        "seed": streams.integer("victim", number),
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
