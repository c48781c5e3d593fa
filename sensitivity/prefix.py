"""Exact prefix caching: a pass of a network starts where it first differs from a remembered one.

Where only some weights or layer inputs are changed, every module call that ended before the
first of them is used gives what it gave before. Such a call returns a copy of its remembered
output instead of running, the outermost call where several are nested. A call always runs where
a copy could differ from what running it does: it writes to its inputs, returns a part of them,
changes state of its own (tensors, attributes), draws random numbers, holds modules with hooks, or
returns what cannot be copied with its memory layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_HELD_BYTES = 2**30  # of remembered outputs
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)

Run = Callable[[], torch.Tensor]
Forward = Callable[..., Any]


@dataclass(slots=True)
class _Output:
    """What a call returned: the leaves of any nesting, copied whenever they are handed out."""

    leaves: list[Any]
    nesting: pytree.TreeSpec

    @classmethod
    def of(cls, output: Any, inputs: Sequence[torch.Tensor]) -> _Output | None:
        """Return a copy of an output, None where a copy may not stand for it."""
        leaves, nesting = pytree.tree_flatten(output)
        tensors = _unique([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        if not tensors or not all(isinstance(leaf, _PLAIN) for leaf in others):
            return None
        if not all(map(_is_simple, [*tensors, *inputs])):
            return None
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        shared = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        if len(set(places)) < len(places) or shared & set(places):
            return None  # writing to one tensor would change another
        copy = cls(leaves, nesting)._cloned()
        same_layout = all(
            old.stride() == new.stride()
            for old, new in zip(leaves, copy.leaves, strict=True)
            if isinstance(old, torch.Tensor)
        )
        return copy if same_layout else None

    def _cloned(self) -> _Output:
        copies: dict[int, torch.Tensor] = {}
        for leaf in self.leaves:
            if isinstance(leaf, torch.Tensor) and id(leaf) not in copies:
                copies[id(leaf)] = leaf.detach().clone()
        return _Output([copies.get(id(leaf), leaf) for leaf in self.leaves], self.nesting)

    def handed_out(self) -> Any:
        """Return the output as a new object that may be written to."""
        return pytree.tree_unflatten(self._cloned().leaves, self.nesting)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in _unique([x for x in self.leaves if hasattr(x, "nbytes")]))


@dataclass(slots=True)
class _Call:
    """One module call; times count beginnings and ends of calls."""

    module: nn.Module
    began: int
    ended: int = 0
    stop: int = 0  # the number of the first call after it and those inside it
    output: _Output | None = None
    has_effects: bool = False  # on more than its output: those around it must run as well
    holds_watched: bool = False


class Prefix:
    """Remembers one pass of `model`; `watched` modules are those whose weight or input changes.

    `record` runs a pass and remembers it, `start_of` says up to when a pass with other weights is
    the same, `replay` runs such a pass from there. Results are those of plain passes bit for bit
    as long as `in_step`: the network called its modules in the remembered order.
    """

    def __init__(self, model: nn.Module, watched: Sequence[nn.Module]) -> None:
        self._model = model
        self._watched = {id(module) for module in watched}
        self._calls: list[_Call] = []
        self._open: list[_Call] = []
        self._clock = 0
        self._held = 0
        self.overflowed = False
        self.in_step = True

    def record(self, run: Run) -> torch.Tensor:
        """Return `run()`, remembering what every module call in it returns."""
        with self._forwards(self._recorded):
            return run()

    def start_of(self, modules: Sequence[nn.Module]) -> int:
        """Return when the first of `modules` was called; 0 where one of them never was."""
        first: dict[int, int] = {}
        for call in self._calls:
            first.setdefault(id(call.module), call.began - 1)
        return min((first.get(id(module), 0) for module in modules), default=0)

    def replay(self, run: Run, start: int) -> torch.Tensor:
        """Return `run()` in which what ended until `start` is remembered instead of run."""
        if start == 0 or not self._calls:
            return run()
        place = 0

        def replayed(module: nn.Module, forward: Forward) -> Forward:
            def instead(*args: Any, **kwargs: Any) -> Any:
                nonlocal place
                if place < 0:
                    return forward(*args, **kwargs)
                call = self._calls[place] if place < len(self._calls) else None
                if call is None or call.module is not module:
                    self.in_step, place = False, -1
                elif call.began > start:
                    place = -1  # from here on everything runs
                elif call.output is not None and call.ended <= start:
                    place = call.stop
                    return call.output.handed_out()
                else:
                    place += 1
                return forward(*args, **kwargs)

            return instead

        with self._forwards(replayed):
            return run()

    def release(self, start: int) -> None:
        """Forget what no replay from `start` or later hands out."""
        place = 0
        while place < len(self._calls):
            call = self._calls[place]
            if call.output is None or call.ended > start:
                place += 1
                continue
            self._forget(place + 1, call.stop)
            place = call.stop

    def _forget(self, first: int, stop: int) -> None:
        for call in self._calls[first:stop]:
            if call.output is not None:
                self._held -= call.output.nbytes
                call.output = None

    def _recorded(self, module: nn.Module, forward: Forward) -> Forward:
        def instead(*args: Any, **kwargs: Any) -> Any:
            inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            versions, state = list(map(_version, inputs)), _state(module)
            self._clock += 1
            number, call = len(self._calls), _Call(module, self._clock)
            call.holds_watched = id(module) in self._watched
            self._calls.append(call)
            self._open.append(call)
            try:
                output = forward(*args, **kwargs)
            finally:
                self._open.pop()
            self._clock += 1
            call.ended, call.stop = self._clock, len(self._calls)
            call.has_effects |= state != _state(module)
            if not call.has_effects and versions == list(map(_version, inputs)):
                self._remember(number, _Output.of(output, inputs))
            if self._open:
                around = self._open[-1]
                around.holds_watched |= call.holds_watched
                around.has_effects |= call.has_effects or _has_hooks(module)
            return output

        return instead

    def _remember(self, number: int, output: _Output | None) -> None:
        if output is None:
            return
        call = self._calls[number]
        if not call.holds_watched:  # it is always skipped whole
            self._forget(number + 1, call.stop)
        if self._held + output.nbytes > _HELD_BYTES:
            self.overflowed = True
            return
        self._held += output.nbytes
        call.output = output

    @contextmanager
    def _forwards(self, replaced: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
        """Put another `forward` in every module but the outermost, and back."""
        own: list[tuple[nn.Module, Forward | None]] = []
        try:
            for module in self._model.modules():
                if module is self._model or isinstance(module, torch.jit.ScriptModule):
                    continue
                own.append((module, module.__dict__.get("forward")))
                forward = module.forward
                module.__dict__["forward"] = functools.wraps(forward)(replaced(module, forward))
            yield
        finally:
            for module, before in own:
                del module.__dict__["forward"]
                if before is not None:
                    module.__dict__["forward"] = before


def used_elsewhere(model: nn.Module, run: Run) -> set[int]:
    """Return the ids of parameters that `run` reads outside the calls of modules that hold them.

    Such a weight acts before its layer is called: `F.linear(x, self.layer.weight)`. Under a torch
    function mode, which may switch fused kernels off, so its output is no reference.
    """
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    inside: list[int] = [id(model)]
    found: set[int] = set()

    class Reads(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result)):
                for leaf in pytree.tree_leaves((args, kwargs)):
                    if inside[-1] not in holders.get(id(leaf), {inside[-1]}):
                        found.add(id(leaf))
            return result

    def noted(module: nn.Module, forward: Forward) -> Forward:
        def instead(*args: Any, **kwargs: Any) -> Any:
            inside.append(id(module))
            try:
                return forward(*args, **kwargs)
            finally:
                inside.pop()

        return instead

    with Prefix(model, ())._forwards(noted), Reads():
        run()
    return found


def _unique(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _is_simple(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not tensor.is_inference()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _state(module: nn.Module) -> list[tuple[object, ...]]:
    """Return what a call can change besides its output: attributes, tensors, the generator.

    Contents of attributes are not read, their sizes are.
    """
    tensors = [*module._parameters.values(), *module._buffers.values()]
    attributes = [_Same(value) for name, value in module.__dict__.items() if name != "forward"]
    sizes = [len(v) for v in module.__dict__.values() if isinstance(v, Sized)]
    versions = [None if t is None else (id(t), _version(t)) for t in tensors]
    generator = torch.get_rng_state().numpy().tobytes()
    return [tuple(attributes), tuple(sizes), tuple(versions), (generator,)]


@dataclass(slots=True, eq=False)
class _Same:
    """Equal only where the very same object is held; keeps it alive, so that ids stay unique."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
