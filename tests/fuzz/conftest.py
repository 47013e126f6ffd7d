"""How samples are made and judged: mutations of bytes, JSON, tensors; limits of time and memory."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from distillsec.distill.files.safe import INFO_KEY
from distillsec.distill.types import RequestError, RunError

SECONDS_ALLOWED = 10.0
BYTES_ALLOWED = 2**30
_LONGEST_MESSAGE = 2000

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**30, 10**400),
    *(0.5, -0.5, 1e30, 1e308, -1e308, 5e-324, float("nan"), float("inf")),
    *("", "x" * 10_000, "\x1b[2J\n", "0", "1e5", "nowhere:Evil", "../../x", "/dev/zero", "\u202e"),
    *(
        "patch",
        "blend",
        "additive",
        "warp",
        "generator",
        "unbounded",
        "pixel",
        "all-to-all",
        "one-to-one",
        "foo_bar",
    ),
    *([], {}, [[]], {"a": {}}, list(range(1000)), [None], {"": None}),
)
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
)


@dataclass(frozen=True)
class Canary:
    """Makes a folder when it is unpickled."""

    place: str

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.place,))


@dataclass(frozen=True)
class Mutations:
    """Random changes to bytes, JSON values and tensors."""

    rng: random.Random

    def content(self, content: bytes) -> bytes:
        """``content`` with a few bytes changed, cut, repeated or moved."""
        changed = bytearray(content)
        for _ in range(self.rng.randint(1, 6)):
            place = self.rng.randrange(len(changed) + 1)
            length = self.rng.choice((1, 1, 1, 2, 4, 8, 64, 1000))
            part = bytes(changed[place : place + length])
            changed[place : place + length] = self.rng.choice(
                (
                    self.rng.randbytes(len(part)),
                    b"\xff" * len(part),
                    b"\x00" * len(part),
                    b"",
                    part * 3,
                    self.rng.choice((b'"', b"[", b"{", b",", b"-", b"9" * 50, b"\n")),
                )
            )
        return bytes(changed[: self.rng.randrange(len(changed) + 1)] if self.often(9) else changed)

    def often(self, sides: int) -> bool:
        """True once in ``sides``."""
        return self.rng.randrange(sides) == 0

    def value(self, value: Any) -> Any:
        """A JSON value with one to three of its parts changed, removed or added."""
        changed = copy.deepcopy(value)
        for _ in range(self.rng.randint(1, 3)):
            changed = self._one(changed)
        return changed

    def _one(self, value: Any) -> Any:
        if not isinstance(value, (dict, list)) or not value or self.often(12):
            return self.hostile()
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = self.rng.choice(keys)
        kind = self.rng.randrange(6)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[self.rng.choice(("new", "", "x" * 300, f"{key} "))] = self.hostile()
        elif kind == 2 and isinstance(value, list):
            value.extend(value * self.rng.choice((1, 100)))
        else:
            value[key] = self._one(value[key])
        return value

    def hostile(self) -> Any:
        """A value that some reader may not expect."""
        if self.often(15):
            value: Any = []
            for _ in range(self.rng.choice((50, 200, 900))):
                value = [value] if self.often(2) else {"a": value}
            return value
        return copy.deepcopy(self.rng.choice(HOSTILE))

    def tensor(self, tensor: Tensor) -> Tensor:
        """A tensor of another type or shape, or with other values."""
        kind = self.rng.randrange(5)
        if kind == 0:
            return tensor.to(self.rng.choice(DTYPES))
        if kind == 1:
            shape = list(tensor.shape) or [1]
            side = self.rng.randrange(len(shape))
            shape[side] = self.rng.choice((0, 1, shape[side] + 1, shape[side] * 2, 5000))
            return torch.zeros(shape, dtype=tensor.dtype)
        if kind == 2:
            moved = tensor.flatten() if self.often(2) else tensor[None]
            return moved.contiguous()
        if kind == 3:
            return tensor.transpose(0, -1).contiguous() if tensor.ndim else tensor[None]
        changed = tensor.clone()
        wrong = self.rng.choice((float("nan"), float("inf"), 1e30, -1e30, -1, 0, 5, 1e5))
        if not changed.is_floating_point():
            wrong = self.rng.choice((-1, 0, 1, 10, 100, -(2**31)))
        if not changed.numel():
            return changed
        flat = changed.view(-1)
        flat[self.rng.randrange(len(flat)) if self.often(2) else slice(None)] = torch.tensor(
            wrong
        ).to(changed.dtype)
        return changed

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named tensors of which one or two are changed, renamed, removed or added."""
        changed = dict(tensors)
        for _ in range(self.rng.randint(1, 2)):
            name = self.rng.choice(sorted(changed) or ["images"])
            kind = self.rng.randrange(6)
            tensor = changed.pop(name, torch.zeros(2, 2))
            if kind == 0:
                changed[name + self.rng.choice(("x", ".0", " ", ".exp_avg"))] = tensor
            elif kind == 1:
                changed |= {name: tensor, self.rng.choice(("initial", "new", "zca.mean")): tensor}
            elif kind > 2:
                changed[name] = self.tensor(tensor)
        return changed


def rewrite(path: Path, tensors: Mapping[str, Tensor], info: Any) -> None:
    """A safetensors file with any tensors and any metadata."""
    from safetensors.torch import save_file

    text = info if isinstance(info, str) else json.dumps(info)
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={INFO_KEY: text})


@pytest.fixture
def mutations() -> Callable[[str], Mutations]:
    """Mutations from a seed."""
    return lambda seed: Mutations(random.Random(seed))


@pytest.fixture
def canary() -> type[Canary]:
    return Canary


@pytest.fixture
def write_safetensors() -> Callable[[Path, Mapping[str, Tensor], Any], None]:
    return rewrite


def _memory(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def judge() -> Callable[[Callable[[], object]], bool]:
    """Runs a reader within the limits; whether it accepted its input."""

    def run(read: Callable[[], object]) -> bool:
        _forget_peak()
        before, began = _memory("VmRSS"), time.monotonic()
        accepted = True
        with _alarm(SECONDS_ALLOWED):
            try:
                read()
            except (RequestError, RunError) as error:
                accepted = False
                assert "\n" not in str(error), "more than one line"
                assert len(str(error)) <= _LONGEST_MESSAGE, "a very long line"
        assert time.monotonic() - began < SECONDS_ALLOWED
        grown = _memory("VmHWM") - before
        assert grown < BYTES_ALLOWED, f"{grown} bytes above the baseline"
        return accepted

    return run
