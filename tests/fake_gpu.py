"""A device that is not there: its tensors refuse to meet those of the processor, as a GPU's do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

FAKE = torch.device("cuda")
_MAY_MEET = {"copy_", "type_as", "set_", "__set__", "__get__", "_has_compatible_shallow_copy_type"}
_DEVICE = torch.Tensor.device.__get__


class OnFake(torch.Tensor):
    """A tensor on the device; what is computed from it stays there."""


class FakeGpu(TorchFunctionMode):
    """While it is entered, "cuda" stands for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, OnFake) for x in tensors)
        if there and func == _DEVICE:
            return FAKE
        if name == "cpu":
            return _plain(args[0])
        if name == "to":
            return _moved(func, args, kwargs)
        if str(kwargs.get("device", "")).startswith("cuda"):
            return func(*args, **{**kwargs, "device": "cpu"}).as_subclass(OnFake)
        if name in ("numpy", "__array__") and there:
            raise TypeError(f"can't convert a tensor on {FAKE} to numpy: use Tensor.cpu()")
        others = [x for x in tensors if not isinstance(x, OnFake) and x.ndim]
        if there and others and name not in _MAY_MEET:
            raise RuntimeError(f"{name}: tensors on two devices, {FAKE} and cpu")
        return func(*args, **kwargs)


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Do `tensor.to(...)`: another tensor or a device says where to, anything else stays."""
    value, *rest = args
    asked = [*rest, *kwargs.values()]
    where = next((x for x in asked if isinstance(x, str | torch.device | torch.Tensor)), None)
    stays = isinstance(value, OnFake)
    goes = stays
    if isinstance(where, torch.Tensor):
        goes = isinstance(where, OnFake)
        rest, kwargs = [where.dtype], {}
    elif where is not None:
        goes = str(where).startswith("cuda")
        rest = ["cpu" if x is where else x for x in rest]
        kwargs = {key: "cpu" if x is where else x for key, x in kwargs.items()}
    if goes == stays:
        return func(value, *rest, **kwargs)
    if goes:
        return func(value, *rest, **kwargs).clone().as_subclass(OnFake)
    return func(_plain(value), *rest, **kwargs)


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.as_subclass(torch.Tensor)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Let there be the device; modules that move there get new parameters."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeGpu():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
