"""Named, independent random streams from one seed.

A stream is stateless: the generator for (seed, name, key) is made afresh from their hash, so a
resumed run needs no generator state, a step's randomness does not depend on how many numbers
an earlier step used, and an attack that draws more than its clean twin disturbs no other stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch

StreamName = Literal["init", "draw", "network", "augment", "expert", "attack", "victim", "defense"]
STREAMS: tuple[str, ...] = get_args(StreamName)


@final
@dataclass(frozen=True)
class Streams:
    """The random streams of one distillation seed."""

    seed: int

    def generator(self, name: StreamName, *key: int | str) -> torch.Generator:
        """A fresh CPU generator for stream ``name`` at ``key`` (an iteration, a victim's number,
        a defense's name).

        Draws are made on the CPU and moved, so that every device sees the same numbers.
        """
        generator = torch.Generator()
        generator.manual_seed(self.integer(name, *key))
        return generator

    def integer(self, name: StreamName, *key: int | str) -> int:
        """A 63-bit seed that depends on (seed, name, key) and on nothing else."""
        if name not in STREAMS:
            raise KeyError(f"no random stream {name!r}; there are {', '.join(STREAMS)}")
        text = "/".join(str(part) for part in (self.seed, name, *key))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Within, PyTorch's default initialisation is drawn from ``seed`` alone, on the CPU.

    The global generators are left as they were.
    """
    # torch.manual_seed would reseed the accelerators too, and fork_rng saves the CPU's state alone.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
