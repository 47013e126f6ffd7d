"""Pickles of plain values and tensors, interpreted without running code of theirs.

``torch.load(weights_only=True)`` runs no foreign code, but a pickle of a hundred bytes may still
fill the memory there: it allows ``bytearray(10**11)``, ``_codecs.encode`` to hexadecimal digits
again and again, and tensors of a terabyte with strides of 0. Here the opcodes only build lists,
dicts, numbers and descriptions of tensors; a tensor's own bytes are read when it is wanted.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, final

import torch
from torch import Tensor

PICKLE_CAP: Final = 16 * 2**20
"""The most bytes of a pickle."""

_OPCODES_CAP: Final = 1_000_000
_LARGEST_RANK: Final = 8


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Storage:
    """The numbers that tensors of a file share: their type and count, and how to read them."""

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor:
    """A dense tensor in a file, not read yet. offset, stride: in elements of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        return self.storage.dtype

    @property
    def count(self) -> int:
        """How many elements it has, at most as many as its storage."""
        return math.prod(self.shape)

    def load(self) -> Tensor:
        """Its values, on the CPU. Raises ValueError where the file holds fewer than it says."""
        if not self.count:
            return torch.empty(self.shape, dtype=self.dtype)
        content = bytearray(self.storage.read())
        if len(content) < self.storage.count * self.dtype.itemsize:
            raise ValueError("a tensor is truncated")
        numbers = torch.frombuffer(content, dtype=self.dtype, count=self.storage.count)
        return numbers.as_strided(self.shape, self.stride, self.offset).clone()


class MoreThanTensors(Exception):
    """The pickle asks for something that no file of tensors needs."""


@final
class _Mark:
    """Where the items of a container begin on the stack."""


@final
class _Nothing:
    """In the place of numpy scalars: only accuracies beside the images are such."""


@final
@dataclass(frozen=True, kw_only=True)
class _Function:
    """A function that a pickle may call, with a description of a value as its result."""

    call: Callable[..., Any]


def _nothing(*_arguments: object) -> _Nothing:
    return _Nothing()


def _tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: object,
    _hooks: object,
    metadata: object = None,
) -> StoredTensor:
    """The arguments are those of torch's ``_rebuild_tensor_v2``."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or not all(type(number) is int for number in numbers):
        raise ValueError("a tensor has no storage or no shape")
    if metadata:
        raise MoreThanTensors("a tensor that is negated or conjugated when it is read")
    if min(numbers) < 0 or len(shape) != len(stride) or len(shape) > _LARGEST_RANK:
        raise ValueError(f"a tensor has the shape {shape!r:.60}, the strides {stride!r:.60}")
    count = math.prod(shape)
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    if count > storage.count:
        raise ValueError(f"a tensor's {count} elements are stored as {storage.count}")
    if count and last >= storage.count:
        raise ValueError(f"a tensor's last element is number {last} of {storage.count}")
    return StoredTensor(storage=storage, offset=offset, shape=shape, stride=stride)


_DTYPES: Final = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
# torch names _rebuild_tensor_v3 for exotic types only: the type is refused by its own name.
_NAMES: Final[Mapping[str, Any]] = {
    **{f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch._utils._rebuild_tensor_v2": _Function(call=_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(call=_nothing),
    "torch._utils._rebuild_parameter": _Function(call=lambda tensor, *_: tensor),
    "collections.OrderedDict": _Function(call=lambda *_: {}),
    "numpy.dtype": _Function(call=_nothing),
    "numpy.core.multiarray.scalar": _Function(call=_nothing),  # numpy 1
    "numpy._core.multiarray.scalar": _Function(call=_nothing),  # numpy 2
    "_codecs.encode": _Function(call=_nothing),  # a numpy scalar's bytes
}

_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS: Final = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@final
class PickleMachine:
    """The opcodes of pickles that hold plain values and tensors; all others are refused."""

    def __init__(
        self, stream: BytesIO, storage: Callable[[str, torch.dtype, int], Storage]
    ) -> None:
        self.item_sizes: dict[str, int] = {}
        self._stream, self._storage = stream, storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the next pickle in the stream."""
        self._stack, self._memo = [], {}
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self._stream)):
            if number > _OPCODES_CAP:
                raise ValueError(f"its pickle has more than {_OPCODES_CAP} opcodes")
            self._do(opcode.name, argument)
        return self._stack.pop()

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        else:
            self._do_other(name, argument)

    def _do_other(self, name: str, argument: Any) -> None:
        stack, memo = self._stack, self._memo
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_Mark())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                items = self._since_mark()
                stack.append({})
                self._set(items)
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._since_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(_named(f"{module}.{last}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_function(function).call(*arguments))
            case "BUILD":
                self._build()
            case "BINPERSID":
                stack.append(self._stored(*stack.pop()))
            case _:
                raise MoreThanTensors(f"its pickle has the opcode {name}")

    def _since_mark(self) -> list[Any]:
        """The items since the last mark, taken off the stack with it."""
        items = []
        while not isinstance(item := self._stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise MoreThanTensors("items for something that is no list")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        keys, values = items[::2], items[1::2]
        if not isinstance(target, dict) or not all(isinstance(key, (str, int)) for key in keys):
            raise MoreThanTensors("a mapping with keys that are no names")
        target.update(zip(keys, values, strict=True))

    def _build(self) -> None:
        """The state of a numpy scalar's type, or of a dict's attributes: dropped."""
        self._stack.pop()
        if not isinstance(self._stack[-1], (_Nothing, dict)):
            raise MoreThanTensors("an object with a state")

    def _stored(
        self, kind: str, dtype: torch.dtype, key: str, _device: str, count: int, *view: object
    ) -> Storage:
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
            raise MoreThanTensors("a reference that is no storage")
        if type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError("a storage without a count")
        self.item_sizes[key] = dtype.itemsize
        return self._storage(key, dtype, count)


def _named(name: str) -> Any:
    if name not in _NAMES:
        raise MoreThanTensors(f"it names {name:.100}")
    return _NAMES[name]


def _function(found: object) -> _Function:
    if not isinstance(found, _Function):
        raise MoreThanTensors("a call of what is no function")
    return found
