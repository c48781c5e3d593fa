"""Read what `write` wrote: no pickle, and nothing is called but the fixed steps below.

A file may come from anybody who can write to the database. Names are looked up by
`trusted.named` alone; objects are made by `cls.__new__` and get their state, classes of torch
only as `nn.Module` does it; there is no call of a function that a file names.
"""

from __future__ import annotations

import base64
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.errors import MpqError, StorageError
from mpq.packing.trusted import is_of_torch, named
from mpq.packing.writing import FORMAT, SKELETON


def read(path: Path, *, classes: bool = True) -> Any:
    """Return the object in a file; with `classes` False one of containers and tensors only.

    Raises InvalidInputError (`untrusted`) for a class or function that is not trusted here,
    StorageError (`artifact_format`) for a file that no `write` made.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            skeleton = json.loads(file.get_tensor(SKELETON).numpy().tobytes())
            if skeleton["format"] != FORMAT:
                raise ValueError(f"its format is {skeleton['format']!r}, known is {FORMAT}")
            names = set(file.keys()) - {SKELETON}
            # Copies: aligned memory that may be written to, and not a file that goes away.
            storages = {name: file.get_tensor(name).clone() for name in names}
        return _Reader(skeleton, storages, classes).value()
    except MpqError:
        raise
    except Exception as error:  # of any kind: the file may hold anything
        said = " ".join(str(error).split())[:300]
        raise StorageError(
            "artifact_format", f"cannot read a kept object: {type(error).__name__}: {said}"
        ) from error


class _Reader:
    def __init__(
        self, skeleton: dict[str, Any], storages: dict[str, torch.Tensor], classes: bool
    ) -> None:
        self._skeleton = skeleton
        self._classes = classes
        self._tensors = [_tensor(told, storages) for told in skeleton["tensors"]]
        self._objects: list[Any] = []
        self._kinds: dict[str, Callable[[Any], Any]] = {
            "float": float,
            "complex": lambda told: complex(float(told[0]), float(told[1])),
            "bytes": base64.b64decode,
            "range": lambda told: range(*told),
            "dtype": _dtype,
            "device": torch.device,
            "list": self._values,
            "tuple": lambda told: tuple(self._values(told)),
            "Size": lambda told: torch.Size(self._values(told)),
            "set": lambda told: set(self._values(told)),
            "frozenset": lambda told: frozenset(self._values(told)),
            "dict": lambda told: dict(self._pairs(told)),
            "OrderedDict": lambda told: OrderedDict(self._pairs(told)),
            "slice": lambda told: slice(*self._of(told)),
            "tensor": lambda told: self._tensors[told],
            "array": self._array,
        }
        if classes:
            self._kinds |= {
                "enum": _member,
                "named": named,
                "object": lambda told: self._objects[told],
            }

    def value(self) -> Any:
        objects = self._skeleton["objects"] if self._classes else []
        for told in objects:  # first all of them, as they may hold each other
            self._objects.append(_made(told["class"], self._of(told["args"])))
        for number in self._skeleton["order"] if self._classes else []:
            told = objects[number]
            one = self._objects[number]
            _fill(one, self._of(told["state"]), is_of_torch(told["class"]))
            if told["items"]:
                list.extend(one, self._values(told["items"]))
            if told["pairs"]:
                dict.update(one, self._pairs(told["pairs"]))
        return self._of(self._skeleton["value"])

    def _of(self, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        ((kind, content),) = told.items()
        return self._kinds[kind](content)

    def _values(self, told: list[Any]) -> list[Any]:
        return [self._of(one) for one in told]

    def _pairs(self, told: list[list[Any]]) -> list[tuple[Any, Any]]:
        return [(self._of(key), self._of(one)) for key, one in told]

    def _array(self, told: list[Any]) -> Any:
        array = self._tensors[told[0]].numpy()
        return array[()] if told[1] else array


def _made(name: str, given: tuple[Any, ...]) -> Any:
    cls = named(name)
    if not isinstance(cls, type) or issubclass(cls, type):
        raise ValueError(f"{name!r} is no class of objects")
    if is_of_torch(name):
        return object.__new__(cls)
    return cls.__new__(cls, *given)


def _fill(one: Any, state: Any, is_of_torch: bool) -> None:
    """Give an object its state as pickle does; slots only those that its class has."""
    if isinstance(one, nn.Module) and not isinstance(state, dict):
        raise ValueError(f"the state of a {type(one).__name__} is no table")
    if is_of_torch or hasattr(one, "__setstate__"):
        one.__setstate__(state)
        return
    slots = {}
    if isinstance(state, tuple):
        state, slots = state
    if state:
        one.__dict__.update(state)
    known = {name for cls in type(one).__mro__ for name in getattr(cls, "__slots__", ())}
    for name, value in (slots or {}).items():
        if name not in known or name.startswith("__"):
            raise ValueError(f"a {type(one).__name__} has no slot {name!r}")
        object.__setattr__(one, name, value)


def _member(told: list[str]) -> Any:
    import enum

    cls = named(told[0])
    if not isinstance(cls, type) or not issubclass(cls, enum.Enum):
        raise ValueError(f"{told[0]!r} is no enumeration")
    return cls.__members__[told[1]]


def _dtype(name: str) -> torch.dtype:
    found = vars(torch).get(name)  # no `__getattr__`, which imports
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no type of numbers")
    return found


def _tensor(told: dict[str, Any], storages: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a tensor over a part of its memory; raises ValueError where it reaches beyond."""
    memory, dtype = storages[str(told["storage"])], _dtype(told["dtype"])
    size, stride, offset = told["size"], told["stride"], told["offset"]
    numbers = [*size, *stride, offset]
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor of size {size} and stride {stride} at {offset}")
    reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (offset + reach + 1) * dtype.itemsize > memory.numel():
        raise ValueError(f"a tensor of size {size} at {offset} is larger than its memory")
    tensor = torch.empty(0, dtype=dtype)
    if 0 in size:
        tensor = torch.empty_strided(size, stride, dtype=dtype)
    else:
        tensor.set_(memory.untyped_storage(), offset, size, stride)
    if told["parameter"]:
        return nn.Parameter(tensor, requires_grad=told["requires_grad"])
    return tensor.requires_grad_(told["requires_grad"])
