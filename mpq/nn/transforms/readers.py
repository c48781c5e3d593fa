"""Which linear layers read the output of which norm, and what else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from mpq.core.layers import LayerName
from mpq.nn.batches import Batch, arguments
from mpq.nn.patch import evaluating

# Functions whose result has the same channels as their argument where its last axis is as long.
_VIEWS = ("view", "reshape", "flatten", "contiguous", "to", "unsqueeze", "__getitem__", "mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """A norm and the linear layers that read its output; with `why_not` something else does."""

    norm: str
    linears: tuple[LayerName, ...]
    why_not: str = ""


def norm_readers(model: nn.Module, batch: Batch) -> tuple[Readers, ...]:
    """Return the readers of every norm whose output its affine scales, in execution order.

    A norm is a module with a vector `weight` (and perhaps a `bias`) for which f(r weight, r bias)
    = r f(weight, bias) on the last axis; that is tried, not read from its name. One forward pass.
    """
    with evaluating(model), torch.no_grad(), _Reads(model) as reads:
        args, kwargs = arguments(model, batch)
        output = model(*args, **kwargs)
    for leaf in pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if id(leaf) in reads.followed:
            reads.refused.setdefault(reads.followed[id(leaf)], "the network returns its output")
    return tuple(reads.found())


def free_linears(model: nn.Module) -> tuple[dict[LayerName, nn.Linear], dict[LayerName, str]]:
    """Return the linear layers whose weights nothing shares, and why the others are not free."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    free, shared = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        own = module._parameters.get("weight")
        if own is None:
            shared[name] = "its weight is computed, not stored"
        elif owners[id(own)] > 1:
            shared[name] = "its weight is shared with another module"
        elif module.bias is not None and owners[id(module.bias)] > 1:
            shared[name] = "its bias is shared with another module"
        else:
            free[name] = module
    return free, shared


class _Reads(TorchFunctionMode):
    """Follows the outputs of norms through one pass and notes every function that takes one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        free, shared = free_linears(model)
        self._linears = {id(module.weight): name for name, module in free.items()}
        modules = dict(model.named_modules())
        self._shared = {id(modules[n].weight): n for n in shared}
        self._norms = {name: module for name, module in modules.items() if _may_be_norm(module)}
        self._readers: dict[str, list[LayerName]] = {}
        self._elsewhere: set[LayerName] = set()
        self._versions: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # so that identities stay unique
        self._handles: list[RemovableHandle] = []
        self.followed: dict[int, str] = {}
        self.refused: dict[str, str] = {}

    def __enter__(self) -> _Reads:
        for name, module in self._norms.items():
            self._handles.append(module.register_forward_hook(self._starts(name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, result)
        return result

    def found(self) -> list[Readers]:
        """Return the readers of each norm that was called."""
        several = {
            name: sum(name in readers for readers in self._readers.values())
            for readers in self._readers.values()
            for name in readers
        }
        found = []
        for norm, readers in self._readers.items():
            why_not = self.refused.get(norm, "")
            for name in readers:
                if name in self._elsewhere or several[name] > 1:
                    why_not = why_not or f"{name} reads something else as well"
            if not readers:
                why_not = why_not or "no linear layer reads its output"
            found.append(Readers(norm=norm, linears=tuple(readers), why_not=why_not))
        return found

    def _starts(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name not in self._readers:
                if not _scales_with_its_affine(module, args, output):
                    return
                self._readers[name] = []
            self._follow(output, name)

        return hook

    def _follow(self, tensor: torch.Tensor, norm: str) -> None:
        self._versions[id(tensor)] = tensor._version
        self.followed[id(tensor)] = norm
        self._alive.append(tensor)

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        called = getattr(func, "__name__", str(func))
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            name = self._linears.get(id(weight))
            if name is not None and (not args or id(args[0]) not in self.followed):
                self._elsewhere.add(name)
        for leaf in pytree.tree_leaves((args, dict(kwargs))):
            norm = self.followed.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
            if norm is None:
                continue
            if leaf._version != self._versions[id(leaf)]:
                self.refused.setdefault(norm, f"{called} writes to its output")
            elif called == "__setitem__":
                self.refused.setdefault(norm, f"{called} reads its output")
            elif not outputs or any(output is leaf for output in outputs):
                continue  # a shape or a number of it, or the tensor itself
            elif func is F.linear and args and args[0] is leaf:
                self._reads_linear(norm, args[1] if len(args) > 1 else kwargs.get("weight"))
            elif called in _VIEWS and outputs[0].shape[-1:] == leaf.shape[-1:]:
                self._follow(outputs[0], norm)
            else:
                self.refused.setdefault(norm, f"{called} reads its output")

    def _reads_linear(self, norm: str, weight: object) -> None:
        name = self._linears.get(id(weight))
        if name is None:
            of = self._shared.get(id(weight))
            why = "a linear product that is no layer reads its output"
            if of is not None:
                why = f"{of} reads its output, and its weight is shared"
            self.refused.setdefault(norm, why)
        elif name not in self._readers[norm]:
            self._readers[norm].append(name)


def _may_be_norm(module: nn.Module) -> bool:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    return (
        weight is not None
        and weight.ndim == 1
        and own.keys() <= {"weight", "bias"}
        and not any(True for _ in module.children())
        and all(p.shape == weight.shape for p in own.values())
    )


def _scales_with_its_affine(module: nn.Module, args: tuple[Any, ...], output: Any) -> bool:
    """Tell whether the output is scaled channel by channel where weight and bias are."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    if not isinstance(output, torch.Tensor) or not args or output.shape[-1:] != weight.shape:
        return False
    ratio = torch.linspace(0.5, 2.0, len(weight), dtype=weight.dtype, device=weight.device)
    own = [(p, p.detach().clone()) for p in (weight, bias) if p is not None]
    try:
        for parameter, value in own:
            parameter.copy_(value * ratio)
        scaled = module.forward(*args)
    finally:
        for parameter, value in own:
            parameter.copy_(value)
    expected, found = (output * ratio).double(), scaled.double()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * largest)
