"""What a layer does to its own input before it is quantized, as a forward pre-hook."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[[nn.Module, tuple[Any, ...]], Any]


class InputTransform:
    """A picklable pre-hook that changes the input of a layer; quantization sees what it gives.

    One object may serve all layers that read one tensor: they get the very same result, so that
    they are seen to read one tensor still, and it is computed once.
    """

    def __init__(self) -> None:
        """Begin without a remembered result."""
        self._last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None

    @abstractmethod
    def transformed(self, module: nn.Module, values: torch.Tensor) -> torch.Tensor:
        """Return what a layer reads in place of `values`."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a call with the first one transformed."""
        values, *rest = args
        version = -1 if values.is_inference() else values._version
        if self._last is not None:
            of, seen, result = self._last
            if of() is values and seen == version and version >= 0:
                return (result, *rest)
        result = self.transformed(module, values)
        # not one with a graph, which a backward pass frees
        self._last = None if result.requires_grad else (weakref.ref(values), version, result)
        return (result, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def observe_arriving(module: nn.Module, hook: Hook) -> RemovableHandle:
    """Register a pre-hook after the layer's own input transforms and before all others."""
    handle: RemovableHandle = module.register_forward_pre_hook(hook)
    hooks = module._forward_pre_hooks
    for key, other in list(hooks.items()):
        if key != handle.id and not isinstance(other, InputTransform):
            hooks[key] = hooks.pop(key)
    return handle
