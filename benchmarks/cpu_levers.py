"""The speed-up of each CPU optimisation, in gradient and test passes of a ConvNet.

    python benchmarks/cpu_levers.py benchmarks/results/cpu-levers.json

Each is timed against the plain path (one batch of 256, contiguous, glibc's own memory policy) in
the same process, in alternation; the result is the median ratio. The memory policy cannot be
reset, so it is measured last.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from distillsec.distill.memory import keep_freed_memory
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.preprocessing import Preprocessing

ROUNDS = 7
IMAGES = 256


def gradient(network: nn.Module, images: Tensor, labels: Tensor, size: int) -> None:
    """The gradient of the summed loss, in chunks of ``size``."""
    weights = list(network.parameters())
    for chunk, truth in zip(images.split(size), labels.split(size), strict=True):
        loss = functional.cross_entropy(network(chunk), truth, reduction="sum")
        torch.autograd.grad(loss, weights)


def forward(network: nn.Module, images: Tensor, labels: Tensor, size: int) -> None:
    """The test pass in chunks of ``size``."""
    with torch.no_grad():
        for chunk in images.split(size):
            network(chunk)


def seconds(work: Callable[[], None]) -> float:
    """The time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(plain: Callable[[], None], lever: Callable[[], None]) -> dict[str, float]:
    """Median seconds of both, and the median ratio plain / optimised over alternating rounds."""
    plain()
    lever()
    pairs = [(seconds(plain), seconds(lever)) for _ in range(ROUNDS)]
    return {
        "plain_seconds": statistics.median(a for a, _ in pairs),
        "lever_seconds": statistics.median(b for _, b in pairs),
        "speedup": statistics.median(a / b for a, b in pairs),
    }


def network_of(width: int) -> nn.Module:
    """The literature's ConvNet on 28×28 grey images."""
    spec = NetworkSpec(width=width)
    return build_network(
        spec,
        image_shape=(1, 28, 28),
        classes=10,
        preprocessing=Preprocessing((0.3,), (0.35,)),
        seed=0,
    )


def measure(width: int) -> dict[str, dict[str, float]]:
    """All optimisations for one network width on 28×28 images."""
    network, last = network_of(width), network_of(width).to(memory_format=torch.channels_last)
    images, labels = torch.rand(IMAGES, 1, 28, 28), torch.arange(IMAGES) % 10
    found = {}
    for name, work in (("gradient", gradient), ("test pass", forward)):
        plain = partial(work, network, images, labels, IMAGES)
        for size in (16, 32, 64):
            lever = partial(work, network, images, labels, size)
            found[f"{name}, pieces of {size}"] = compare(plain, lever)
        lever = partial(work, last, images, labels, 32)
        found[f"{name}, channels_last, pieces of 32"] = compare(plain, lever)
    pieces = partial(gradient, network, images, labels, 32)
    before = statistics.median(seconds(pieces) for _ in range(ROUNDS))
    keep_freed_memory()
    pieces()
    after = statistics.median(seconds(pieces) for _ in range(ROUNDS))
    found["gradient, pieces of 32, freed memory kept"] = {
        "plain_seconds": before,
        "lever_seconds": after,
        "speedup": before / after,
    }
    return found


def main() -> None:
    """Measure one width, since the memory policy stays changed in a process; print and write."""
    out, width = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 32
    torch.set_num_threads(1)
    found = measure(width)
    for name, row in found.items():
        print(f"{name:45} {row['speedup']:.2f}×")
    known = json.loads(out.read_text()) if out.exists() else {}
    known[f"width {width}"] = found
    known["machine"] = {"cpu": platform.processor() or platform.machine(), "threads": 1}
    known["command"] = "python benchmarks/cpu_levers.py benchmarks/results/cpu-levers.json WIDTH"
    known["torch"] = torch.__version__
    out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
