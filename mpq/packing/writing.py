"""An object as a skeleton of JSON and the bytes of its tensors, in one safetensors file."""

from __future__ import annotations

import base64
import copyreg
import enum
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.packing.trusted import is_of_torch, name_of

SKELETON, FORMAT = "skeleton", 1
_ALIGNED = 16  # bytes: no element is larger


def write(path: Path, value: Any, at: str, *, classes: bool = True) -> tuple[str, ...]:
    """Write an object and return the modules, other than torch's, whose classes it has.

    Containers, numbers, texts, tensors and arrays, and, with `classes`, networks and what they
    hold. Tensors that are one, or share their memory, still do when read; strides, dtypes and
    `requires_grad` stay, gradients do not. The same object gives the same bytes. Raises
    InvalidInputError (`not_kept`, `not_importable`) naming what cannot be kept, as `at`.
    """
    import safetensors.torch

    writer = _Writer(classes)
    try:
        plain = writer.plain(value, at)
    except RecursionError as error:
        raise InvalidInputError("not_kept", f"{at} is nested too deeply to be kept") from error
    tensors, storages = _laid_out(writer.tensors)
    skeleton = {
        "format": FORMAT,
        "value": plain,
        "objects": writer.objects,
        "order": writer.order,
        "tensors": tensors,
    }
    text = json.dumps(skeleton, separators=(",", ":"), allow_nan=False).encode()
    parts = {str(number): storage for number, storage in enumerate(storages)}
    head = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    safetensors.torch.save_file({SKELETON: head, **parts}, path)
    return tuple(sorted(writer.modules))


class _Writer:
    """Turns objects into what JSON holds; what is met twice is kept once."""

    def __init__(self, classes: bool) -> None:
        self._classes = classes
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is given twice
        self.tensors: list[torch.Tensor] = []
        self.objects: list[dict[str, Any]] = []
        self.order: list[int] = []  # in which objects get their state: parts before the whole
        self.modules: set[str] = set()

    def plain(self, value: Any, at: str) -> Any:
        """Return the JSON of any value; what JSON has not is {kind: content}."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind in _SIMPLE:
            return {kind.__name__: _SIMPLE[kind](value)}
        if kind in (list, tuple, torch.Size):
            return {kind.__name__: [self.plain(v, f"{at}[{i}]") for i, v in enumerate(value)]}
        if kind in (set, frozenset):
            return {kind.__name__: sorted((self.plain(v, at) for v in value), key=json.dumps)}
        if kind in (dict, OrderedDict):
            return {kind.__name__: self._pairs(value.items(), at)}
        if kind is slice:
            return {"slice": self.plain([value.start, value.stop, value.step], at)}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensor(value, at)}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
            # A copy: numpy's memory may be read-only or of the other byte order.
            array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
            return {"array": [self._tensor(torch.from_numpy(array), at), kind is not np.ndarray]}
        if not self._classes:
            raise _refused(at, value, "a batch holds tensors, numbers and texts")
        if isinstance(value, enum.Enum):
            return {"enum": [self._name(kind, at), value.name]}
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            return {"named": self._name(value, at)}
        return {"object": self._object(value, at)}

    def _pairs(self, items: Any, at: str) -> list[list[Any]]:
        return [[self.plain(k, at), self.plain(v, f"{at}.{k}")] for k, v in items]

    def _name(self, thing: Any, at: str) -> str:
        name = name_of(thing, at)
        if not is_of_torch(name):
            self.modules.add(name.partition(":")[0])
        return name

    def _tensor(self, tensor: torch.Tensor, at: str) -> int:
        if id(tensor) in self._seen:
            return self._seen[id(tensor)]
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            raise _refused(at, tensor, "only plain tensors are kept")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InvalidInputError(
                "not_kept",
                f"{at} is a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}: only "
                f"dense ones with values are kept",
            )
        self._alive.append(tensor)
        self._seen[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        return self._seen[id(tensor)]

    def _object(self, value: Any, at: str) -> int:
        if id(value) in self._seen:
            return self._seen[id(value)]
        cls = type(value)
        try:
            function, (of, *given), *rest = value.__reduce_ex__(2)
        except Exception as error:  # of any kind: the class is somebody's
            raise _refused(at, value, " ".join(str(error).split())) from error
        if function is not getattr(copyreg, "__newobj__") or of is not cls:  # noqa: B009
            raise _refused(at, value, "it makes itself by a function of its own")
        name = self._name(cls, at)
        number = self._seen[id(value)] = len(self.objects)
        self._alive.append(value)
        kept: dict[str, Any] = {"class": name}
        self.objects.append(kept)
        state, items, pairs = (*rest, None, None, None)[:3]
        kept["args"] = self.plain(tuple(given), at)
        kept["state"] = self._state(state, at)
        kept["items"] = [] if items is None else self.plain(list(items), at)["list"]
        kept["pairs"] = [] if pairs is None else self._pairs(pairs, at)
        self.order.append(number)
        return number

    def _state(self, state: Any, at: str) -> Any:
        if isinstance(state, dict):
            self._alive.append(state)
        return self.plain(state, at)


_SIMPLE: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: [repr(value.real), repr(value.imag)],
    bytes: lambda value: base64.b64encode(value).decode(),
    range: lambda value: [value.start, value.stop, value.step],
    torch.dtype: lambda value: str(value).removeprefix("torch."),
    torch.device: str,
}


def _refused(at: str, value: object, why: str) -> InvalidInputError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return InvalidInputError(
        "not_kept",
        f"{at} is a {kind}, which cannot be kept ({why}): leave it out, or give an entry point, "
        f"'package.module:factory'",
    )


def _laid_out(tensors: list[torch.Tensor]) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Return where each tensor is, and of each memory that they share the part in use."""
    plain = [tensor.detach().resolve_conj().resolve_neg() for tensor in tensors]
    used: dict[int, tuple[int, int, int]] = {}  # memory -> its number, first and last byte + 1
    for tensor in plain:
        key, (low, high) = _memory(tensor), _extent(tensor)
        number, first, last = used.get(key, (len(used), low, high))
        used[key] = (number, min(first, low), max(last, high))
    storages: dict[int, torch.Tensor] = {}
    told = []
    for tensor, original in zip(plain, tensors, strict=True):
        number, first, last = used[_memory(tensor)]
        first -= first % _ALIGNED
        if number not in storages:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            whole = whole.set_(tensor.untyped_storage())
            storages[number] = whole[first:last].cpu()
        told.append(
            {
                "storage": number,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "size": list(tensor.shape),
                "stride": list(tensor.stride()),
                "offset": tensor.storage_offset() - first // tensor.element_size(),
                "parameter": isinstance(original, nn.Parameter),
                "requires_grad": original.requires_grad and original.is_leaf,
            }
        )
    return told, [storages[number] for number in sorted(storages)]


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its memory, and the one after its last."""
    start, width = int(tensor.storage_offset()), tensor.element_size()
    if tensor.numel() == 0:
        return start * width, start * width
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((int(n) - 1) * int(step) for n, step in steps)
    return start * width, (start + reach + 1) * width
