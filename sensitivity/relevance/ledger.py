"""Where relevance ends: at inputs, in constants, or in operations without a rule.

The functions here compute what the operation they stand for computes; their backward passes carry
the messenger gradient g, so that relevance at a tensor x is x * g, and book what stays behind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function

_Tensor = torch.Tensor
_Rule = Callable[[_Tensor], _Tensor]  # the output's messenger gradient -> the input's


class Ledger:
    """The books of one backward pass; all amounts are sums over samples and elements.

    `inputs[i]` is the relevance of each element of the i-th source; `absorbed` what biases, other
    constants, constant terms of softmax and activations, and stabilisers took; `unexplained` what
    operations without a rule took (positive) or made (negative), by their names.
    """

    def __init__(self) -> None:
        self.inputs: dict[int, _Tensor] = {}
        self.absorbed: defaultdict[str, float] = defaultdict(float)
        self.unexplained: defaultdict[str, float] = defaultdict(float)
        self._sources = 0

    @property
    def total(self) -> float:
        """All relevance that the books know of; that of the output, if every rule conserves it."""
        arrived = sum(float(relevance.double().sum()) for relevance in self.inputs.values())
        return arrived + sum(self.absorbed.values()) + sum(self.unexplained.values())

    def source(self, tensor: _Tensor) -> _Tensor:
        """Return the tensor as an input of the network: relevance that arrives there is kept."""
        number, self._sources = self._sources, self._sources + 1

        def book(gradient: _Tensor, seen: _Tensor) -> None:
            arrived = relevance_at(seen, gradient)
            self.inputs[number] = arrived + self.inputs.get(number, 0)

        return self._booked(_leaf(tensor), book)

    def constant(self, tensor: _Tensor, kind: str = "constants") -> _Tensor:
        """Return the tensor as something that keeps its relevance: a bias, a mask, a position."""

        def book(gradient: _Tensor, seen: _Tensor) -> None:
            self.absorbed[kind] += _sum(relevance_at(seen, gradient))

        return self._booked(_leaf(tensor), book)

    def probe(self, tensor: _Tensor, operation: str, sign: float) -> _Tensor:
        """Return the tensor; relevance passing here counts as unexplained, times `sign`."""

        def book(gradient: _Tensor, seen: _Tensor) -> None:
            self.unexplained[operation] += sign * _sum(relevance_at(seen, gradient))

        return self._booked(tensor, book)

    def expanded(
        self, x: _Tensor, value: _Tensor, rest: _Tensor, pull: _Rule, kind: str
    ) -> _Tensor:
        """Return `value`, known to be A x + rest with A' g = pull(g): the rest absorbs."""
        rest = rest.detach()

        def backward(gradient: _Tensor) -> _Tensor:
            self.absorbed[kind] += _sum(relevance_at(rest.expand_as(gradient), gradient))
            return pull(gradient).to(x.dtype)

        return _call(x, value.detach(), backward)

    def surrogate(self, z: _Tensor, value: _Tensor, epsilon: float) -> _Tensor:
        """Return `value` and share its relevance as if it were z: R_z = z R / (z + eps sign z).

        The stabiliser absorbs the difference. Where z is zero and epsilon too, it absorbs all.
        """
        seen = z.detach()
        sign = torch.where(seen >= 0, 1.0, -1.0).to(seen.dtype)
        stable = seen + epsilon * sign
        factor = torch.where(stable == 0, torch.zeros_like(seen), value.detach() / stable)
        left = torch.where(stable == 0, value.detach(), factor * epsilon * sign)

        def backward(gradient: _Tensor) -> _Tensor:
            self.absorbed["stabilisers"] += _sum(relevance_at(left, gradient))
            return gradient * factor

        return _call(z, value.detach(), backward)

    @staticmethod
    def shared(value: _Tensor, operands: int) -> _Tensor:
        """Return a product of `operands`; each gets an equal part of its relevance."""
        return _call(value, value.detach(), lambda gradient: gradient / operands)

    @staticmethod
    def _booked(tensor: _Tensor, book: Callable[[_Tensor, _Tensor], None]) -> _Tensor:
        seen = tensor.detach()

        def backward(gradient: _Tensor) -> _Tensor:
            book(gradient, seen)
            return gradient

        return _call(tensor, seen, backward)


def relevance_at(x: _Tensor, gradient: _Tensor) -> _Tensor:
    """Return x * g; 0 where nothing arrives, also at a mask's minus infinity."""
    product = (
        (gradient.conj() * x).real if x.is_complex() or gradient.is_complex() else gradient * x
    )
    return torch.where(gradient == 0, torch.zeros_like(product), product)


def _sum(relevance: _Tensor) -> float:
    return float(relevance.sum(dtype=torch.float64))


def _leaf(tensor: _Tensor) -> _Tensor:
    return tensor.detach().requires_grad_()


class _Ruled(Function):
    """A value, and how its messenger gradient becomes that of the tensor it came from."""

    @staticmethod
    def forward(ctx: Any, x: _Tensor, value: _Tensor, backward: _Rule) -> _Tensor:
        ctx.rule = backward
        return value.clone()  # may be changed in place later

    @staticmethod
    def backward(ctx: Any, *gradients: _Tensor) -> tuple[_Tensor, None, None]:
        (gradient,) = gradients
        return ctx.rule(gradient), None, None


def _call(x: _Tensor, value: _Tensor, backward: _Rule) -> _Tensor:
    result: _Tensor = _Ruled.apply(x, value, backward)  # type: ignore[no-untyped-call]
    return result
