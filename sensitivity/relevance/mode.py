"""Run a network so that its backward pass carries relevance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sensitivity.relevance.decompositions import DECOMPOSITIONS
from sensitivity.relevance.ledger import Ledger
from sensitivity.relevance.nonlinear import SOFTMAXES, element
from sensitivity.relevance.operations import (
    ADDITIVE,
    ADDITIVE_KEYWORDS,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    LAYERS,
    PLAIN,
    PRODUCTS,
    QUOTIENTS,
    SCALES,
    SQUARES,
)
from sensitivity.relevance.rules import TRANSFORMER, Composite

Function = Callable[..., Any]


@contextmanager
def relevance(model: nn.Module, composite: Composite = TRANSFORMER) -> Iterator[Ledger]:
    """Run `model` in here, then differentiate: relevance at a tensor is itself times its gradient.

    Parameters must not require gradients. Outputs keep their values up to rounding. Read the
    ledger after the backward pass. Embeddings are inputs; other inputs are what `Ledger.source`
    made of them.
    """
    mode = _Mode(composite)
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__module__.startswith(ELEMENTWISE_MODULES):
                _as_one_function(module, mode, stack)
        stack.enter_context(mode)
        yield mode.ledger


class _Mode(TorchFunctionMode):
    """Replaces operations that are not linear in their differentiable operands."""

    def __init__(self, composite: Composite) -> None:
        super().__init__()
        self.ledger = Ledger()
        self._composite = composite
        self._first = True

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place = _name(func)
        live = sum(t.requires_grad for t in _tensors((args, kwargs)))
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in ("embedding", "embedding_bag") and not live:
            return _mapped(self._source, func(*args, **kwargs))
        if name == "batch_norm":
            return self._batch_norm(func, args, kwargs)
        if name in LAYERS:
            return _marked(self._layer(name, func, args, kwargs))
        if name == "clone" and _is_marked(args[0]):  # what a hook made of a layer's output
            return _marked(func(*args, **kwargs))
        if not live or name in PLAIN:
            return func(*args, **kwargs)
        changes = in_place and name not in ADDITIVE and name not in QUOTIENTS
        if changes and hasattr(torch.Tensor, name):
            with self:
                result = getattr(torch.Tensor, name)(args[0].clone(), *args[1:], **kwargs)
            return args[0].copy_(result)
        return self._ruled(name, func, args, kwargs, live)

    def _ruled(
        self, name: str, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], live: int
    ) -> Any:
        """Return what an operation with a rule of its own gives, or one without any."""
        if name in ADDITIVE:
            return self._sum(name, func, args, kwargs)
        if name in PRODUCTS:
            product = func(*args, **kwargs)
            return product if live == 1 else self.ledger.shared(product, live)
        if name in QUOTIENTS and len(args) > 1:
            scale = args[1].detach() if isinstance(args[1], torch.Tensor) else args[1]
            return func(args[0], scale, *args[2:], **kwargs)
        if name in SCALES:
            return func(*args, **kwargs).detach()
        if name in SQUARES:
            return self.ledger.shared(func(*args, **kwargs), 2)
        if name in SOFTMAXES and live == 1 and (dim := _dim(args, kwargs)) is not None:
            value = func(args[0].detach(), *args[1:], **kwargs)
            return SOFTMAXES[name](self.ledger, args[0], value, dim)
        if name in ELEMENTWISE and args and getattr(args[0], "requires_grad", False):
            return self._element(name, func, args, kwargs)
        if name in DECOMPOSITIONS:
            try:
                with self:
                    return DECOMPOSITIONS[name](*args, **kwargs)
            except NotImplementedError:  # a rare option
                return self._without_rule(name, func, args, kwargs)
        return self._without_rule(name, func, args, kwargs)

    def _layer(
        self, name: str, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return a layer's output with the rule that the composite gives its kind."""
        named = dict(zip(("input", "weight", "bias"), args, strict=False))
        named |= {key: kwargs[key] for key in ("input", "weight", "bias") if key in kwargs}
        others = {key: value for key, value in kwargs.items() if key not in named}
        x, weight, bias = named["input"], named["weight"], named.get("bias")

        def operation(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = func(x, weight, None, *args[3:], **others)
            return result

        kinds = ("first", LAYERS[name]) if self._first else (LAYERS[name],)
        self._first = False
        if bias is not None and name != "linear":  # channels are on axis 1, after samples
            bias = bias.reshape(-1, *(1,) * (weight.dim() - 2))
        if weight.requires_grad:
            product = operation(x, weight)
            if x.requires_grad:
                product = self.ledger.shared(product, 2)
            if bias is None:
                return product
            return product + (bias if bias.requires_grad else self.ledger.constant(bias, "biases"))
        if not x.requires_grad:
            return func(*args, **kwargs)
        return self._composite.rule(kinds).share(self.ledger, operation, x, weight, bias)

    def _batch_norm(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return batch norm by running statistics: a layer with one weight a channel."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum")
        named = {**dict(zip((*names, "eps"), args, strict=False)), **kwargs}
        x, mean, variance = named["input"], named["running_mean"], named["running_var"]
        if not x.requires_grad:
            return func(*args, **kwargs)
        if named.get("training") or mean is None:
            return self._without_rule(
                "batch_norm of the batch's own statistics", func, args, kwargs
            )
        scale = (variance + named.get("eps", 1e-5)).rsqrt()
        if named.get("weight") is not None:
            scale = scale * named["weight"]
        shift = -mean * scale
        if named.get("bias") is not None:
            shift = shift + named["bias"]
        shape = (-1, *(1,) * (x.dim() - 2))
        kinds = ("folded", "batch_norm") if _is_marked(x) else ("batch_norm",)
        rule = self._composite.rule(kinds)
        return rule.share(
            self.ledger, torch.mul, x, scale.reshape(shape), shift.reshape(shape).to(x.dtype)
        )

    def _sum(self, name: str, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a sum in which every constant operand keeps the relevance that is its own."""
        dtype = next(t.dtype for t in _tensors((args, kwargs)) if t.requires_grad)
        places = ADDITIVE[name]

        def constant(value: Any) -> Any:
            if isinstance(value, bool | torch.Size) or value is None:
                return value
            if isinstance(value, int | float):
                return self.ledger.constant(torch.tensor(value, dtype=dtype)) if value else value
            if not isinstance(value, torch.Tensor) or value.requires_grad:
                return value
            wide = value if value.is_floating_point() or value.is_complex() else value.to(dtype)
            return self.ledger.constant(wide)

        changed = [_mapped(constant, a) if i in places else a for i, a in enumerate(args)]
        named = {
            key: _mapped(constant, value) if key in ADDITIVE_KEYWORDS else value
            for key, value in kwargs.items()
        }
        return func(*changed, **named)

    def _element(
        self, name: str, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return a function of each element; changed in place where that was asked."""
        x, *rest = args
        if name in ("pow", "float_power") and _is_negative(rest[0] if rest else kwargs):
            return func(*args, **kwargs).detach()
        if _tensors((rest, kwargs)):
            return self._without_rule(f"{name} with tensors", func, args, kwargs)
        # the activations of torch take no other truth value by position
        in_place = kwargs.get("inplace", False) or any(value is True for value in rest)

        def function(values: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = func(values, *rest, **kwargs)
            return result

        result = element(self.ledger, x, function)
        return x.copy_(result) if in_place else result

    def _without_rule(
        self, name: str, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return an operation with its ordinary gradient, and book what that loses or makes."""

        def probed(sign: float) -> Function:
            def probe(value: Any) -> Any:
                live = isinstance(value, torch.Tensor) and value.requires_grad
                return self.ledger.probe(value, name, sign) if live else value

            return probe

        result = func(*_mapped(probed(-1.0), args), **_mapped(probed(-1.0), kwargs))
        return _mapped(probed(1.0), result)

    def _source(self, value: Any) -> Any:
        plain = isinstance(value, torch.Tensor) and value.is_floating_point()
        return self.ledger.source(value) if plain and not value.requires_grad else value

    def element(
        self, x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return function(x) of each element, under its rule."""
        return element(self.ledger, x, function)


def _as_one_function(module: nn.Module, mode: _Mode, stack: ExitStack) -> None:
    """Take a module's forward as one function of each element, whatever it is written in."""
    waiting: list[torch.Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) != 1 or not _tensors(args) or not args[0].requires_grad:
            return None
        waiting.append(args[0])
        return (args[0].detach(),)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return mode.element(waiting.pop(), module.forward) if waiting else output

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)


def _marked(output: torch.Tensor) -> torch.Tensor:
    """Remember that this very tensor is the output of a layer."""
    output._of_layer = True  # type: ignore[attr-defined]
    return output


def _is_marked(x: torch.Tensor) -> bool:
    return getattr(x, "_of_layer", False)


def _name(func: Function) -> tuple[str, bool]:
    """Return an operation's name without its dress, and whether it changes its first operand."""
    name: str = getattr(func, "__name__", str(func))
    if name.startswith("__") and name.endswith("__"):
        bare = name.strip("_")
        in_place = bare.startswith("i") and hasattr(torch.Tensor, f"__{bare[1:]}__")
        return (bare[1:] if in_place else bare), in_place
    return (name.rstrip("_"), True) if name.endswith("_") else (name, False)


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return all tensors in nested sequences and mappings."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _mapped(function: Function, value: Any) -> Any:
    """Return `value` with `function` applied to everything in its nested sequences."""
    if isinstance(value, dict):
        return {key: _mapped(function, part) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(function, part) for part in value]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [_mapped(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return function(value)


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return dim if args and isinstance(args[0], torch.Tensor) and isinstance(dim, int) else None


def _is_negative(exponent: Any) -> bool:
    if isinstance(exponent, dict):
        exponent = exponent.get("exponent")
    return isinstance(exponent, int | float) and exponent < 0
