"""Functions of tensors as CUDA graphs: one launch for all kernels of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, final

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Result = TypeVar("Result")

# The libraries choose their algorithms and workspaces in the first runs, which no graph may hold.
_WARM_UPS = 3
# More streams gained nothing, and each holds a class's activations.
_STREAMS = 5


@final
class Captured:
    """``function`` of tensors, as a CUDA graph for each set of shapes; a plain call on a CPU.

    function: depends on nothing but its inputs, ``state`` and constants, and reads no value back
    to the CPU. state: tensors that it reads or changes in place. The answers are valid until the
    next call.
    """

    def __init__(self, function: Function, state: Sequence[Tensor] = ()) -> None:
        self._function, self._state = function, state
        self._graphs: dict[tuple[object, ...], _Graph] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if inputs[0].device.type != "cuda":
            return self._function(*inputs)
        shapes = tuple((each.shape, each.dtype) for each in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = _Graph(self._function, self._state, inputs)
        return self._graphs[shapes].replay(inputs)


@final
class _Graph:
    """One captured graph with the buffers that it reads and writes."""

    def __init__(
        self, function: Function, state: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> None:
        self._inputs = [each.detach().clone() for each in inputs]
        kept = [each.detach().clone() for each in state]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                function(*self._inputs)
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)
        with torch.no_grad():
            for own, value in zip(state, kept, strict=True):
                own.copy_(value)

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
        self._graph.replay()
        return self._outputs


def side_by_side(tasks: Sequence[Callable[[], Result]], device: torch.device) -> list[Result]:
    """The results of ``tasks``, which do not depend on each other, in order.

    On a GPU they run on several streams: a task with a few images does not fill it.
    """
    if device.type != "cuda":
        return [task() for task in tasks]
    current = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in range(min(_STREAMS, len(tasks)))]
    for stream in streams:
        stream.wait_stream(current)
    results = []
    for number, task in enumerate(tasks):
        with torch.cuda.stream(streams[number % len(streams)]):
            results.append(task())
    for stream in streams:
        current.wait_stream(stream)
    return results
