"""Layers that read a concatenation become two, each with ranges and formats of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from mpq.core.errors import InvalidInputError
from mpq.core.layers import LayerName
from mpq.nn.batches import Batch, call, cut
from mpq.nn.patch import evaluating

_CHANNELS_FROM_END = {nn.Linear: 1, nn.Conv1d: 2, nn.Conv2d: 3, nn.ConvTranspose2d: 3}
_CONCATENATE = ("cat", "concat", "concatenate")
# Functions that keep the place of every channel.
_POINTWISE = {
    *("relu", "relu_", "silu", "gelu", "elu", "leaky_relu", "hardswish", "mish", "tanh", "sigmoid"),
    *("dropout", "dropout2d", "group_norm", "batch_norm", "instance_norm", "interpolate"),
    *("contiguous", "to", "float", "half", "clone"),
}
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class SplitInput(nn.Module):
    """The sum of two layers, one of the first `boundary` input channels, one of the others.

    The bias is in `first`. Channels are the axis `from_end` axes before the end.
    """

    def __init__(self, layer: nn.Module, boundary: int, from_end: int) -> None:
        super().__init__()
        self.boundary, self.from_end = boundary, from_end
        channels = _channels(layer)
        self.first = _part(layer, 0, boundary)
        self.second = _part(layer, boundary, channels)
        self.second._parameters["bias"] = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map an input as the whole layer does."""
        axis = x.ndim - self.from_end
        parts = x.tensor_split([self.boundary], dim=axis)
        summed: torch.Tensor = self.first(parts[0]) + self.second(parts[1])
        return summed


def split_shortcuts(
    model: nn.Module, batches: Sequence[Batch]
) -> tuple[nn.Module, list[tuple[LayerName, int]]]:
    """Return a copy in which each layer that reads two concatenated inputs is two layers.

    W [x1; x2] + b = (W1 x1 + b) + W2 x2 (Li et al., "Q-Diffusion", section 3.3: skip and main path
    of a U-Net have other ranges), so outputs differ by rounding only. A convolution without groups
    or a linear layer is split at the boundary where torch.cat of two tensors along its channels
    leads to it, directly or through functions that keep channels apart (norms, activations,
    interpolation). The parts are called `LAYER.first` and `LAYER.second`. A layer whose weight is
    shared or computed, or whose calls have several boundaries, is left whole. Costs two passes over
    one sample. Raises InvalidInputError (`split`) where the copy computes something else: code
    that reads the layer's weight itself.
    """
    network = copy.deepcopy(model)
    return network, split_layers(network, batches)


def split_layers(model: nn.Module, batches: Sequence[Batch]) -> list[tuple[LayerName, int]]:
    """Split the layers of a network itself, see `split_shortcuts`, and return (layer, boundary)."""
    sample = cut(batches[0], 0, 1)
    with evaluating(model), torch.no_grad():
        with _Boundaries(model) as seen:
            before = call(model, sample)
        found = seen.found()
        replaced = {
            id(layer): SplitInput(layer, boundary, _CHANNELS_FROM_END[type(layer)])
            for layer, boundary in found.values()
        }
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is not None and id(child) in replaced and child is not parent:
                    parent._modules[name] = replaced[id(child)].train(child.training)
        _check_same(model, sample, before, list(found))
    return [(name, boundary) for name, (_, boundary) in found.items()]


def _check_same(
    model: nn.Module, sample: Batch, before: torch.Tensor, names: Sequence[LayerName]
) -> None:
    try:
        after = call(model, sample)
        away = float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
    except Exception as error:  # whatever a user's forward raises
        raise InvalidInputError(
            "split", f"the network cannot run with {', '.join(names)} split: {error}"
        ) from error
    if names and not away <= _ROUNDING.get(before.dtype, 1e-5) * 10:
        raise InvalidInputError(
            "split",
            f"the network with {', '.join(names)} split computes something else (by {away:.1e}): "
            f"it reads the weight of one of them itself",
        )


def _channels(layer: nn.Module) -> int:
    size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert isinstance(size, int)
    return size


def _part(layer: nn.Module, start: int, stop: int) -> nn.Module:
    """Return the layer of some of its input channels."""
    weight = layer._parameters["weight"]
    assert weight is not None
    axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    own = weight.detach().narrow(axis, start, stop - start).clone()
    memo: dict[int, Any] = {id(weight): nn.Parameter(own, requires_grad=weight.requires_grad)}
    bias = layer._parameters.get("bias")
    if bias is not None:
        memo[id(bias)] = bias  # the same one
    part = copy.deepcopy(layer, memo)
    setattr(part, "in_features" if isinstance(layer, nn.Linear) else "in_channels", stop - start)
    return part


class _Boundaries(TorchFunctionMode):
    """Follows concatenated channels through a pass to the layers that read them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if type(module) in _CHANNELS_FROM_END
            and getattr(module, "groups", 1) == 1
            and module._parameters.get("weight") is not None
        }
        owners: dict[int, int] = {}
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None:
                owners[id(weight)] = owners.get(id(weight), 0) + 1
        self._shared = {key for key, count in owners.items() if count > 1}
        self._joined: dict[int, tuple[int, int]] = {}  # tensor: (axis from the end, boundary)
        self._alive: list[torch.Tensor] = []  # so that identities stay unique
        self._calls: dict[LayerName, set[int | None]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Boundaries:
        for name, module in self._layers.items():
            self._handles.append(module.register_forward_pre_hook(self._reads(name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not isinstance(result, torch.Tensor):
            return result
        if name in _CONCATENATE:
            self._note(result, *args, **(kwargs or {}))
        elif name in _POINTWISE and args and id(args[0]) in self._joined:
            from_end, boundary = self._joined[id(args[0])]
            if result.ndim == args[0].ndim and result.shape[-from_end] == args[0].shape[-from_end]:
                self._follow(result, from_end, boundary)
        return result

    def _note(self, result: torch.Tensor, tensors: Any = (), dim: int = 0, **kwargs: Any) -> None:
        tensors = kwargs.get("tensors", tensors)
        axis = kwargs.get("axis", dim)
        if len(tensors) == 2 and isinstance(axis, int) and all(t.ndim for t in tensors):
            axis %= result.ndim
            if 0 < tensors[0].shape[axis] < result.shape[axis]:
                self._follow(result, result.ndim - axis, tensors[0].shape[axis])

    def _follow(self, tensor: torch.Tensor, from_end: int, boundary: int) -> None:
        self._joined[id(tensor)] = (from_end, boundary)
        self._alive.append(tensor)

    def _reads(self, name: LayerName) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            from_end, boundary = self._joined.get(id(args[0]) if args else 0, (0, 0))
            right = from_end == _CHANNELS_FROM_END[type(module)]
            self._calls.setdefault(name, set()).add(boundary if right else None)

        return hook

    def found(self) -> dict[LayerName, tuple[nn.Module, int]]:
        """Return each layer all of whose calls have one boundary."""
        split = {}
        for name, boundaries in self._calls.items():
            module = self._layers[name]
            (boundary, *others) = boundaries
            if boundary is not None and not others and id(module.weight) not in self._shared:
                split[name] = (module, boundary)
        return split
