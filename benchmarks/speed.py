"""Seconds of the published step, the plain path and the fast path, in one process.

    python benchmarks/speed.py OUT.json                     # all that suits this machine's device
    python benchmarks/speed.py OUT.json --case dc --case victim --rounds 3
    python benchmarks/speed.py OUT.json --quick             # guarded cases, small; fails if slow

On a GPU seconds are wall time with the device synchronised; on a CPU they are CPU seconds of one
thread. Images are random: only times matter. Each figure is the median of the rounds after the
first, which compiles and captures and is given on its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch
from published_step import PublishedRun, PublishedSettings
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distillsec.attacks.base import DataInfo
from distillsec.attacks.doorping import Doorping
from distillsec.distill.backends import BACKENDS
from distillsec.distill.core.hooks import Hook
from distillsec.distill.core.loop import distil
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.engine import Engine
from distillsec.distill.memory import keep_freed_memory
from distillsec.distill.networks.makers import NetworkMaker
from distillsec.distill.networks.registry import NetworkSpec
from distillsec.distill.preprocessing import Preprocessing
from distillsec.distill.randomness import Streams
from distillsec.distill.training import fit, predict
from distillsec.distill.types import Batch, Recipe

SPACE = Preprocessing((0.2861,), (0.353,))  # Fashion-MNIST's
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the measured work is."""

    width: int = 128
    side: int = 28
    classes: int = 10
    ipc: int = 10
    rows: int = 6000
    test: int = 10_000
    epochs: int = 300


QUICK = Size(width=32, classes=3, ipc=2, rows=100, test=1000, epochs=20)
# The most that one way may take, as a multiple of another: wide margins, for `make bench-quick`.
GUARDS = (
    ("dc", "plain", "published", 1.8),
    ("dc", "fast", "plain", 1.3),
    ("dm", "fast", "plain", 1.2),
    ("victim", "fast", "plain", 1.2),
    ("test pass", "fast", "plain", 1.2),
)


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every case needs: sizes, device, rounds."""

    size: Size
    device: str
    rounds: int

    def task(self, engine: Engine, iterations: int, folder: Path) -> Task:
        size = self.size
        shape = (1, size.side, size.side)
        count = size.classes * size.rows
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(count) % size.classes
        real = Batch(
            images=torch.rand(count, *shape, generator=generator),
            labels=labels,
            index=torch.arange(count),
        )
        network = NetworkMaker(
            spec=NetworkSpec(width=size.width),
            image_shape=shape,
            classes=size.classes,
            preprocessing=SPACE,
            device=self.device,
            engine=engine,
        )
        return Task(
            real=real.to(self.device),
            classes=size.classes,
            ipc=size.ipc,
            iterations=iterations,
            init="noise",
            clip_pixels=False,
            recipe=Recipe(preprocessing=SPACE, epochs=size.epochs),
            network=network,
            streams=Streams(0),
            scratch=folder,
            engine=engine,
        )


@final
class Stopwatch(Observer):
    """Times of iterations and of experts' epochs."""

    def __init__(self, device: str) -> None:
        self._device, self.iterations, self.epochs = device, [now(device)], [now(device)]

    def on_iteration(self, *_: Any) -> None:
        self.iterations.append(now(self._device))

    def on_expert(self, done: int, total: int) -> None:
        self.epochs.append(now(self._device))
        self.iterations = [self.epochs[-1]]


def now(device: str) -> float:
    """Seconds: wall time of a GPU that has done its work, else CPU time."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def spans(times: list[float]) -> dict[str, Any]:
    """The first span, and the median of the others."""
    found = [after - before for before, after in pairwise(times)]
    return {
        "seconds": statistics.median(found[1:] or found),
        "first": found[0],
        "rounds": [round(each, 5) for each in found],
    }


def repeated(bench: Bench, work: Callable[[], object]) -> dict[str, Any]:
    """``spans`` of ``rounds`` + 1 calls of ``work``."""
    times = [now(bench.device)]
    for _ in range(bench.rounds + 1):
        work()
        times.append(now(bench.device))
    return spans(times)


# Cases: from a bench and an engine to a figure ---------------------------------------------------


def distillation(bench: Bench, engine: Engine, name: str, **options: Any) -> Stopwatch:
    """Iterations of a backend with published options; ``hook`` among the options is an attack."""
    hooks: list[Hook] = [options.pop("hook")] if "hook" in options else []
    with tempfile.TemporaryDirectory() as folder:
        task = bench.task(engine, options.pop("iterations", bench.rounds + 1), Path(folder))
        backend = BACKENDS[name]
        made = backend(backend.Options(**options), ipc=task.ipc, recipe=task.recipe)
        watch = Stopwatch(bench.device)
        distil(task, made, hooks, observer=watch)
    return watch


def dc(bench: Bench, engine: Engine) -> dict[str, Any]:
    """An iteration of ``dc``."""
    return spans(distillation(bench, engine, "dc").iterations)


def dc_doorping(bench: Bench, engine: Engine) -> dict[str, Any]:
    """An iteration of ``dc`` with Doorping at its defaults."""
    size = bench.size
    info = DataInfo(
        image_shape=(1, size.side, size.side),
        classes=size.classes,
        mean=SPACE.mean,
        std=SPACE.std,
        device=torch.device(bench.device),
    )
    attack = Doorping(Doorping.Options(), info)
    return spans(distillation(bench, engine, "dc", hook=attack).iterations)


def dsa(bench: Bench, engine: Engine) -> dict[str, Any]:
    """An iteration of ``dsa``."""
    augment = "color_crop_cutout_scale_rotate"
    return spans(distillation(bench, engine, "dsa", augment=augment).iterations)


def dm(bench: Bench, engine: Engine) -> dict[str, Any]:
    """An iteration of ``dm``."""
    augment = "color_crop_cutout_scale_rotate"
    watch = distillation(bench, engine, "dm", augment=augment, iterations=10 * bench.rounds)
    return spans(watch.iterations)


def _mtt(bench: Bench, engine: Engine) -> Stopwatch:
    options: dict[str, Any] = {
        "experts": 1,
        "train_epochs": 3,
        "max_start_epoch": 1,
        "expert_epochs": 2,
    }
    options |= {"augment": "color_crop_cutout_scale_rotate", "student_steps": 20, "lr_rate": 0}
    return distillation(bench, engine, "mtt", **options)


def mtt_expert(bench: Bench, engine: Engine) -> dict[str, Any]:
    """An epoch of an expert of ``mtt`` on all training images."""
    return spans(_mtt(bench, engine).epochs)


def mtt_student(bench: Bench, engine: Engine) -> dict[str, Any]:
    """An iteration of ``mtt`` with a student of 20 steps."""
    return spans(_mtt(bench, engine).iterations)


def victim(bench: Bench, engine: Engine) -> dict[str, Any]:
    """A victim's training on a distilled set."""
    task = bench.task(engine, 1, Path())
    chosen = task.real.rows(torch.arange(task.classes * task.ipc, device=bench.device))

    def work() -> nn.Module:
        return fit(task.network(0), chosen, task.recipe, torch.Generator(), engine)

    return repeated(bench, work)


def test_pass(bench: Bench, engine: Engine) -> dict[str, Any]:
    """The test images through a network."""
    task = bench.task(engine, 1, Path())
    images = task.real.images[: bench.size.test]
    network = task.network(0)
    return repeated(bench, lambda: predict(network, images, engine))


CASES: dict[str, Callable[[Bench, Engine], dict[str, Any]]] = {
    "dc": dc,
    "dc, doorping": dc_doorping,
    "dsa": dsa,
    "dm": dm,
    "mtt, expert epoch": mtt_expert,
    "mtt, iteration": mtt_student,
    "victim": victim,
    "test pass": test_pass,
}


def published(bench: Bench) -> dict[str, Any]:
    """An iteration of the published gradient matching."""
    size = bench.size
    task = bench.task(Engine(), 1, Path())
    backend = BACKENDS["dc"](BACKENDS["dc"].Options(), ipc=task.ipc, recipe=task.recipe)
    inner: int = backend._inner  # type: ignore[attr-defined]
    settings = PublishedSettings(
        classes=size.classes, ipc=size.ipc, outer=backend.steps(), inner=inner
    )
    real = task.real.replace(images=SPACE.normalise(task.real.images))

    def make() -> nn.Module:
        network: Any = task.network(0)
        return nn.Sequential(network.trunk, network.head)

    return repeated(bench, PublishedRun(real, make, settings).iteration)


def published_test(bench: Bench) -> dict[str, Any]:
    """The test images through a network, 256 at a time, answers read after each."""
    task = bench.task(Engine(), 1, Path())
    network, images = task.network(0).eval(), task.real.images[: bench.size.test]

    def work() -> None:
        with torch.no_grad():
            for piece in images.split(256):
                network(piece).cpu().numpy().argmax(axis=-1)

    return repeated(bench, work)


# What a GPU does meanwhile -----------------------------------------------------------------------


def watched(bench: Bench, engine: Engine) -> dict[str, Any]:
    """Launches, synchronisations and busy seconds of the GPU in one iteration of ``dc``.

    The profiler slows the iteration: the busy share is the busy seconds over those of ``dc``.
    """

    class Watch(Observer):
        def __init__(self) -> None:
            self.found: dict[str, Any] = {}
            self._profile: Any = None

        def on_iteration(self, iteration: int, *_: Any) -> None:
            torch.cuda.synchronize()
            if iteration == 2:
                self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
                self._profile.__enter__()
                self._began = time.perf_counter()
            elif iteration == 3:
                wall = time.perf_counter() - self._began
                self._profile.__exit__(None, None, None)
                self.found = _counted(self._profile, wall)

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        task = bench.task(engine, 3, Path(folder))
        backend = BACKENDS["dc"](BACKENDS["dc"].Options(), ipc=task.ipc, recipe=task.recipe)
        torch.cuda.reset_peak_memory_stats()
        distil(task, backend, observer=watch)
    return {**watch.found, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}


def _counted(found: Any, wall: float) -> dict[str, Any]:
    events = list(found.events())
    names = [event.name for event in events]
    on_gpu = [e.time_range for e in events if e.device_type.name == "CUDA"]
    busy, end = 0.0, 0.0
    for span in sorted(on_gpu, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return {
        "launches": sum(name in LAUNCHES for name in names),
        "graph_launches": sum(name == "cudaGraphLaunch" for name in names),
        "synchronisations": sum(name in SYNCHRONISATIONS for name in names),
        "busy_s": busy / 1e6,
        "profiled_wall_s": wall,
    }


def floor(bench: Bench) -> dict[str, Any]:
    """Operations and bytes of an iteration of ``dc``: less than this no version can do.

    What a pass keeps (outputs of convolutions, poolings and the head) is written and read once. A
    pass with its derivatives counts three times, one with a second derivative six times.
    """
    from torch.utils.flop_counter import FlopCounterMode

    size = bench.size
    network = replace(bench, device="cpu").task(Engine(), 1, Path()).network(0)
    made: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: made.append(out.numel()))
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.AvgPool2d | nn.Linear)
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(1, 1, size.side, size.side))
    for hook in hooks:
        hook.remove()
    backend = BACKENDS["dc"](
        BACKENDS["dc"].Options(), ipc=size.ipc, recipe=Recipe(preprocessing=SPACE)
    )
    outer, inner = backend.steps(), backend._inner  # type: ignore[attr-defined]
    images = size.classes * (
        outer * (min(256, size.rows) + 2 * size.ipc) + (outer - 1) * inner * size.ipc
    )
    return {
        "tflop": 3 * images * counter.get_total_flops() / 1e12,
        "gigabytes": 3 * images * 2 * 4 * sum(made) / 1e9,
    }


# Measuring all -----------------------------------------------------------------------------------


@contextmanager
def reported(found: dict[str, Any], out: Path, name: str, way: str) -> Iterator[dict[str, Any]]:
    """Keep the figure that the block writes; an error is kept in its place."""
    row: dict[str, Any] = {}
    began = time.perf_counter()
    try:
        yield row
    except Exception as error:  # one case that can't run hides none of the others
        row["failed"] = f"{type(error).__name__}: {error}"[:500]
    row["whole"] = round(time.perf_counter() - began, 1)
    found.setdefault(name, {})[way] = row
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{name:20} {way:12}",
        json.dumps({k: v for k, v in row.items() if k != "rounds"}),
        flush=True,
    )


def ways(device: str) -> dict[str, Callable[[], Engine]]:
    """The engines that are compared, by name."""
    if device == "cpu":
        return {"plain": Engine, "fast": lambda: Engine("fast")}
    return {
        "plain": lambda: Engine("plain", "tf32"),
        "fast tf32": lambda: Engine("fast", "tf32"),
        "fast bf16": lambda: Engine("fast", "bf16"),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--way", action="append", help="plain, fast tf32, …; default: all")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--watch-plain", action="store_true", help="profile the plain path too")
    parser.add_argument("--quick", action="store_true")
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"default: {value}")
    given = parser.parse_args()
    size = QUICK if given.quick else Size()
    changes = {name: getattr(given, name) for name in vars(size) if getattr(given, name)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(size=replace(size, **changes), device=device, rounds=given.rounds)
    torch.set_num_threads(1)
    keep_freed_memory()
    found: dict[str, Any] = {
        "machine": {
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "seconds": "wall" if device == "cuda" else "CPU, one thread",
            "size": vars(bench.size),
        },
        "floor": floor(bench),
    }
    guarded = [case for case in CASES if case in {guard[0] for guard in GUARDS}]
    chosen = given.case or (guarded if given.quick else list(CASES))
    if "dc" in chosen:
        Engine("plain", "tf32" if device == "cuda" else "float32").apply()
        with reported(found, given.out, "dc", "published") as row:
            row.update(published(bench))
    if "test pass" in chosen:
        with reported(found, given.out, "test pass", "published") as row:
            row.update(published_test(bench))
    for way, make in ways(device).items():
        if given.way and way not in given.way:
            continue
        engine = make()
        engine.apply()
        for name in chosen:
            with reported(found, given.out, name, way) as row:
                row.update(CASES[name](bench, engine))
        if device == "cuda" and "dc" in chosen and (engine.speed == "fast" or given.watch_plain):
            with reported(found, given.out, "dc, watched", way) as row:
                row.update(watched(bench, engine))
    if given.quick and (slow := too_slow(found)):
        raise SystemExit("\n".join(slow))


@cache
def can_compile() -> bool:
    """Whether ``torch.compile`` works here; it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(torch.square, dynamic=False)(torch.ones(2))
    except Exception as error:
        print("no guard of the fast path: nothing can be compiled here:", type(error).__name__)
        return False
    return True


def too_slow(found: dict[str, Any]) -> list[str]:
    """A line for each case of ``GUARDS`` that failed or takes longer than it may."""
    lines = []
    for case, way, other, most in GUARDS:
        if way == "fast" and not can_compile():
            continue
        ours, theirs = found.get(case, {}).get(way, {}), found.get(case, {}).get(other, {})
        if not ours or not theirs:
            continue
        if "failed" in {**ours, **theirs}:
            lines.append(f"{case}: {ours.get('failed') or theirs.get('failed')}")
        elif ours["seconds"] > most * theirs["seconds"]:
            ratio = ours["seconds"] / theirs["seconds"]
            lines.append(f"{case}: {way} takes {ratio:.2f} times as long as {other}, over {most}")
    return lines


if __name__ == "__main__":
    main()
