"""Rules of activations and softmax: a function as a linear one, and a rest that absorbs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sensitivity.relevance.ledger import Ledger


def element(
    ledger: Ledger, x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return function(x) of each element: relevance passes as it is (AttnLRP's identity rule).

    A constant f(0) absorbs first, so that nothing is divided by zero: the slope is that of the
    secant, (f(x) - f(0)) / x. Where f(0) is not finite (log) it is that of the tangent.
    """
    seen = x.detach()
    value = function(seen.clone())
    wide = seen.to(torch.promote_types(seen.dtype, torch.float32))
    info = torch.finfo(wide.dtype)
    step = info.eps ** (1 / 3)
    around = function(wide.new_tensor([-step, 0.0, step]))
    origin = around[1]
    if torch.isfinite(origin):
        near = wide.abs() < info.eps**0.5
        at_zero = torch.nan_to_num((around[2] - around[0]) / (2 * step))
        secant = (value.to(wide.dtype) - origin) / torch.where(near, torch.ones_like(wide), wide)
        slope, rest = torch.where(near, at_zero, secant), origin
    else:
        slope = _tangent(wide, function)
        rest = value.to(wide.dtype) - slope * wide
    return ledger.expanded(x, value, rest, lambda gradient: gradient * slope, "activations")


def _tangent(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(point.clone()).sum(), point)
    return slope


def softmax(ledger: Ledger, x: torch.Tensor, value: torch.Tensor, dim: int) -> torch.Tensor:
    """Return softmax(x), expanded to first order around x (AttnLRP's rule for softmax).

    R_i = x_i (R_i - s_i sum_j R_j), with the constant term s - J x that absorbs. Scores of minus
    infinity have s = 0 and take no part.
    """
    weighted = torch.where(value == 0, torch.zeros_like(value), value * x.detach().to(value))
    rest = value - weighted + value * weighted.sum(dim, keepdim=True)

    def pull(gradient: torch.Tensor) -> torch.Tensor:
        arrived = value * gradient
        return arrived - value * arrived.sum(dim, keepdim=True)

    return ledger.expanded(x, value, rest, pull, "softmax")


def log_softmax(ledger: Ledger, x: torch.Tensor, value: torch.Tensor, dim: int) -> torch.Tensor:
    """Return log softmax(x), expanded to first order around x; the constant term absorbs."""
    s, seen = value.exp(), x.detach().to(value)
    weighted = torch.where(s == 0, torch.zeros_like(s), s * seen)
    rest = torch.where(s == 0, value, value - seen) + weighted.sum(dim, keepdim=True)

    def pull(gradient: torch.Tensor) -> torch.Tensor:
        return gradient - s * gradient.sum(dim, keepdim=True)

    return ledger.expanded(x, value, rest, pull, "softmax")


SOFTMAXES = {"softmax": softmax, "log_softmax": log_softmax}
