"""Peak memory and time of a student's gradient against its steps: exact, recompute, TESLA.

    python benchmarks/unroll_memory.py benchmarks/results/unroll-memory [--device cuda]

One trajectory-matching gradient (ConvNet of width 32, depth 3, 100 images of 28×28) for each number
of steps, each in a new process. On a CPU the result is the rise of the peak resident memory above
that of one step, on CUDA that of the memory allocated by torch. Writes ``.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from distillsec.distill import weights as flat
from distillsec.distill.backends.matching import trajectory_distance
from distillsec.distill.backends.unroll import GradientName, StudentStep, unroll
from distillsec.distill.networks.registry import NetworkSpec, build_network
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.types import Batch

STEPS = (1, 5, 10, 20, 40, 80)
IMAGES = 100


def measure(gradient: GradientName, steps: int, device: str) -> dict[str, float]:
    """Peak MiB of one gradient, and its seconds."""
    torch.set_num_threads(2)
    network = build_network(
        NetworkSpec(width=32),
        image_shape=(1, 28, 28),
        classes=10,
        preprocessing=Preprocessing((0.29,), (0.35,)),
        seed=0,
        device=device,
    )
    start = flat.laid_out(network)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 1, 28, 28, generator=generator).to(device).requires_grad_()
    synthetic = Batch(images=images, labels=(torch.arange(IMAGES) % 10).to(device))
    rate = torch.tensor(0.01, device=device, requires_grad=True)
    target = start + 0.01 * torch.randn(start.shape, generator=generator).to(device)
    plan = [StudentStep(rows=torch.arange(IMAGES, device=device))] * steps
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    last = unroll(network, start, synthetic, plan, rate.expand(steps), gradient)
    trajectory_distance(last, start, target).backward()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if device != "cpu":
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20, "seconds": seconds}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"peak_mib": peak, "seconds": seconds}


def apart(gradient: str, steps: int, device: str) -> dict[str, float]:
    """``measure`` in a new process, whose peak memory has no other cause."""
    command = [sys.executable, __file__, "-", "--one", gradient, str(steps), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def picture(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Memory and time against steps."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, key, title in zip(
        axes, ("rise_mib", "seconds"), ("peak memory, rise [MiB]", "time [s]"), strict=True
    ):
        for name, rows in found.items():
            axis.plot(list(rows), [row[key] for row in rows.values()], "o-", label=name)
        axis.set_xlabel("student steps")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure all, print and write; or one, for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="the files, without their endings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=2)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]), given.device)))
        return
    found: dict[str, dict[int, dict[str, float]]] = {}
    for gradient in get_args(GradientName):
        rows = {steps: apart(gradient, steps, given.device) for steps in STEPS}
        for row in rows.values():
            row["rise_mib"] = row["peak_mib"] - rows[STEPS[0]]["peak_mib"]
        found[gradient] = rows
        for steps, row in rows.items():
            print(
                f"{gradient:10} {steps:3} steps {row['rise_mib']:6.0f} MiB {row['seconds']:6.2f} s"
            )
    out = Path(given.out)
    machine: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": 2}
    if given.device != "cpu":
        machine = {"gpu": torch.cuda.get_device_name(given.device)}
    command = "python benchmarks/unroll_memory.py benchmarks/results/unroll-memory"
    whole = {"command": command, "machine": machine, "torch": torch.__version__, "found": found}
    out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    picture(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
