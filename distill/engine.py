"""How the passes of networks run: plainly, or compiled, in less precision and as CUDA graphs.

The plain path is the reference: tests compare the fast one with it.
"""

from __future__ import annotations

import copy
import importlib
import shutil
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional

from .batch_norm import batch_norm_layers
from .captured import Captured, Function
from .fast_layers import with_fast_layers
from .notices import warn

Speed = Literal["plain", "fast"]
Precision = Literal["float32", "tf32", "bf16"]

_MOST_SHAPES = 64
_COMPILERS = ("c++", "g++", "clang++", "cl")


@final
class Engine:
    """Runs passes of networks with this ``speed`` and ``precision``.

    precision: of products on a GPU; bf16 is for first-order passes (compiled ones) only, all else
    is in tf32 then. compiles: whether first-order passes are compiled where ``speed`` is fast.
    """

    def __init__(
        self, speed: Speed = "plain", precision: Precision = "float32", *, compiles: bool = True
    ) -> None:
        self.speed, self.precision = speed, precision
        self._compiles = compiles
        self._static: dict[Hashable, StaticNetwork] = {}

    def apply(self) -> None:
        """Set the process's precision of products on a GPU, and let it look for fast algorithms."""
        reduced = self.precision != "float32"
        torch.backends.cudnn.allow_tf32 = reduced
        torch.backends.cuda.matmul.allow_tf32 = reduced
        if self.speed == "fast":
            torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()

    def static(self, network: nn.Module) -> StaticNetwork | None:
        """The network that stands in for ``network`` on the fast path, with its weights now.

        ``None`` where passes run plainly: at plain speed, for a user's own network, and while the
        stand-in is reserved for another one.
        """
        if self.speed == "plain":
            return None
        kind = getattr(network, "kind", None)
        if kind is None:
            own = type(getattr(network, "body", network)).__name__
            warn(f"network {own} runs plainly: the fast path is for those of `list networks`")
            return None
        device = next(network.parameters()).device
        if (kind, device) not in self._static:
            self._static[kind, device] = StaticNetwork(network, self.precision, self._compiles)
        found = self._static[kind, device]
        if found.is_reserved:
            return None
        found.load(network)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self


PLAIN = Engine()


@final
class StaticNetwork:
    """One network whose weights stay in the same memory, for all networks of its kind.

    Graphs read and write its weights in place; ``load`` and ``store`` copy those of another one.
    ``module`` has faster layers; ``first_order`` and ``embed`` are compiled, in the engine's
    precision, and can be differentiated once. ``velocity`` is SGD's momentum.
    """

    def __init__(self, like: nn.Module, precision: Precision, compiles: bool) -> None:
        _load_forward_derivatives()
        self.module = with_fast_layers(copy.deepcopy(like))
        self.weights: list[Tensor] = list(self.module.parameters())
        self._names = [name for name, _ in self.module.named_parameters()]
        self._tensors = [*self.weights, *self.module.buffers()]
        self.velocity = [torch.zeros_like(weight) for weight in self.weights]
        self.is_reserved = False
        self._captured: dict[Hashable, Captured] = {}
        self._precision = precision
        self._mode: tuple[bool, ...] = ()
        compiles = compiles and _can_compile(self.device)
        self._forward = _Compiled(self.module) if compiles else self.module
        self._along = _Compiled(self._derivative) if compiles else self._derivative
        embed: Any = getattr(self.module, "embed", None)
        self._embed = _Compiled(embed) if compiles and embed else embed

    @property
    def sees_batches(self) -> bool:
        """Whether an image's answer depends on the others of its batch."""
        return bool(batch_norm_layers(self.module))

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @torch.no_grad()
    def load(self, network: nn.Module) -> None:
        """Take the weights of ``network``, its modes, and whether its weights need gradients."""
        given = list(network.parameters())
        torch._foreach_copy_(self._tensors, [*given, *network.buffers()])
        for own, other in zip(self.module.modules(), network.modules(), strict=True):
            own.training = other.training
        for weight, theirs in zip(self.weights, given, strict=True):
            weight.requires_grad_(theirs.requires_grad)
        modes = [module.training for module in self.module.modules()]
        self._mode = (*modes, *(weight.requires_grad for weight in self.weights))

    @torch.no_grad()
    def store(self, network: nn.Module) -> None:
        """Give ``network`` the weights."""
        torch._foreach_copy_([*network.parameters(), *network.buffers()], self._tensors)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Within, the weights are of one network only."""
        self.is_reserved = True
        try:
            yield
        finally:
            self.is_reserved = False

    def first_order(self, images: Tensor) -> Tensor:
        """Logits ``float32 (N, classes)`` of ``images``."""
        with self._reduced():
            logits: Tensor = self._forward(images)
        return logits.float()

    def embed(self, images: Tensor) -> Tensor:
        """What enters the head, ``float32 (N, features)``."""
        with self._reduced():
            features: Tensor = self._embed(images)
        return features.float()

    def along(self, images: Tensor, labels: Tensor, direction: Sequence[Tensor]) -> Tensor:
        """The derivative of the mean cross-entropy on ``images`` along ``direction``.

        direction: as the weights. The answer can be differentiated at the images and the weights:
        that is a second derivative of the loss, which ``torch.compile`` has no other way to.
        Not for networks that keep statistics of batches.
        """
        answer: Tensor = self._along(images, labels, *self.weights, *direction)
        return answer

    def _derivative(self, images: Tensor, labels: Tensor, *tensors: Tensor) -> Tensor:
        weights, direction = tensors[: len(self._names)], tensors[len(self._names) :]

        def loss(*values: Tensor) -> Tensor:
            named = dict(zip(self._names, values, strict=True))
            logits: Tensor = functional_call(self.module, named, (images,))
            return functional.cross_entropy(logits, labels)

        found: Tensor = jvp(loss, weights, direction)[1]
        return found

    def captured(
        self, name: Hashable, function: Function, state: Sequence[Tensor] = ()
    ) -> Captured:
        """``function``, captured once under this ``name`` and the network's mode.

        The function may read and change the network's tensors, and ``state``.
        """
        key = (name, self._mode)
        if key not in self._captured:
            self._captured[key] = Captured(function, [*self._tensors, *state])
        return self._captured[key]

    def _reduced(self) -> AbstractContextManager[Any]:
        if self._precision != "bf16":
            return nullcontext()
        # Without the cache: a graph must not use a weight that was cast outside of it.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)


class _Compiled:
    """``function``, compiled; itself where that fails, which a warning says."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        # One entry for each shape of a batch and each mode; 8 are allowed otherwise.
        torch._dynamo.config.recompile_limit = _MOST_SHAPES
        self._plain = function
        self._chosen: Callable[..., Tensor] = torch.compile(function, dynamic=False)

    def __call__(self, *inputs: Tensor) -> Tensor:
        try:
            return self._chosen(*inputs)
        except RuntimeError as error:
            if not _is_of_compiling(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            warn(f"passes run without being compiled: {type(error).__name__}: {reason:.200}")
            self._chosen = self._plain
            return self._plain(*inputs)


def _is_of_compiling(error: RuntimeError) -> bool:
    """Whether compiling failed: no headers of Python, a full disk."""
    from torch._dynamo.exc import TorchDynamoException  # a second to import, so only here

    return isinstance(error, TorchDynamoException)


@cache
def _load_forward_derivatives() -> None:
    """Import torch's rules for ``jvp``, which it does at the first use, with a warning of its own
    about its own scripting."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _can_compile(device: torch.device) -> bool:
    """Whether passes on ``device`` can be compiled; a warning says if a compiler is missing."""
    if device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
        warn("there is no C++ compiler here: passes run without being compiled")
        return False
    return device.type in ("cpu", "cuda")
