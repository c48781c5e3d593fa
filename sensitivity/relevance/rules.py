"""How a linear or convolutional layer shares relevance among its inputs.

Every rule is R_i = sum_j x_i rho(w)_ij / z_j R_j with its own rho and z = sum_i x_i rho(w)_ij
(Montavon et al. 2019, "Layer-wise relevance propagation: an overview", table 1). It is written
here as the surrogate z, whose ordinary gradient is that sharing. A bias is one more contribution
to z and absorbs its part, or, with `bias_absorbs=False`, is left out of z and absorbs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch

from sensitivity.relevance.ledger import Ledger

Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (input, weight) -> output


class Rule(Protocol):
    """Shares the relevance of a layer's output."""

    def share(
        self,
        ledger: Ledger,
        operation: Operation,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return operation(x, weight) + bias, with the rule in its backward pass.

        `bias` broadcasts against the output.
        """


@dataclass(frozen=True, slots=True)
class Epsilon:
    """LRP-epsilon: contributions as they are, z moved away from zero by epsilon.

    With epsilon = 0 and a bias that absorbs it is LRP-0, input times gradient, and cannot divide
    by zero: nothing is divided.
    """

    epsilon: float = 0.0
    bias_absorbs: bool = True

    def share(
        self,
        ledger: Ledger,
        operation: Operation,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the layer's output (see Rule)."""
        z = operation(x, weight)
        value = z if bias is None else z.detach() + bias
        if bias is not None and self.bias_absorbs:
            z = z + ledger.constant(bias, "biases")
        if self.epsilon == 0 and (bias is None or self.bias_absorbs):
            return z
        return ledger.surrogate(z, value, self.epsilon)


@dataclass(frozen=True, slots=True)
class Gamma:
    """LRP-gamma: positive weights count 1 + gamma times; meant for inputs that are not negative.

    Large gamma comes near ZPlus. z can be near zero: relevance may grow beyond all bounds there.
    """

    gamma: float = 0.25
    epsilon: float = 1e-9
    bias_absorbs: bool = True

    def share(
        self,
        ledger: Ledger,
        operation: Operation,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the layer's output (see Rule)."""
        value = _plain(operation, x, weight, bias)
        z = operation(x, weight + self.gamma * weight.clamp(min=0))
        if bias is not None and self.bias_absorbs:
            z = z + ledger.constant(bias + self.gamma * bias.clamp(min=0), "biases")
        return ledger.surrogate(z, value, self.epsilon)


@dataclass(frozen=True, slots=True)
class ZPlus:
    """LRP-z+ (alpha 1, beta 0): only positive contributions, of inputs of either sign."""

    epsilon: float = 1e-9
    bias_absorbs: bool = True

    def share(
        self,
        ledger: Ledger,
        operation: Operation,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the layer's output (see Rule)."""
        z = operation(x.clamp(min=0), weight.clamp(min=0))
        if bool((x.detach() < 0).any()):
            z = z + operation(x.clamp(max=0), weight.clamp(max=0))
        if bias is not None and self.bias_absorbs:
            z = z + ledger.constant(bias.clamp(min=0), "biases")
        return ledger.surrogate(z, _plain(operation, x, weight, bias), self.epsilon)


@dataclass(frozen=True, slots=True)
class ZBox:
    """LRP-z^B for inputs that lie in a box [low, high], as images do (Montavon et al. 2017).

    R_i = sum_j (x_i w_ij - low w+_ij - high w-_ij) / z_j R_j. Without limits the box is that of
    the input at hand. The relevance of the box's corners is booked as arriving at inputs: that of
    the layer's input is the sum of the three. The bias absorbs nothing.
    """

    low: float | None = None
    high: float | None = None
    epsilon: float = 1e-6

    def share(
        self,
        ledger: Ledger,
        operation: Operation,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the layer's output (see Rule)."""
        seen = x.detach()
        low = torch.full_like(seen, float(seen.min()) if self.low is None else self.low)
        high = torch.full_like(seen, float(seen.max()) if self.high is None else self.high)
        # as (x - low) w+ + (x - high) w-, whose terms have one sign: nothing cancels
        z = operation(x - ledger.source(low), weight.clamp(min=0))
        z = z + operation(x - ledger.source(high), weight.clamp(max=0))
        return ledger.surrogate(z, _plain(operation, x, weight, bias), self.epsilon)


def _plain(
    operation: Operation, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    with torch.no_grad():
        value = operation(x, weight)
        return value if bias is None else value + bias


@dataclass(frozen=True, slots=True)
class Composite:
    """Which rule each kind of layer takes.

    `rules` are (kind, rule), the first match wins: "first" is the first convolution or linear
    layer that runs, "folded" a batch norm right after a layer, "conv", "linear" and "batch_norm"
    are what they say, "any" is the rest.
    """

    rules: tuple[tuple[str, Rule], ...] = ()

    def rule(self, kinds: Collection[str]) -> Rule:
        """Return the rule of a layer of some kinds; LRP-0 where none is named."""
        return next(
            (rule for kind, rule in self.rules if kind in kinds or kind == "any"), Epsilon()
        )


TRANSFORMER = Composite()
# A batch norm after a convolution passes relevance as it is, as if folded into it: LRP-0 would
# multiply what arrives by scale x / output, layer after layer. Elsewhere (after an addition) the
# quotient by x would have nothing to cancel it, and LRP-0 stays bounded.
CNN = Composite(
    (
        ("first", ZBox()),
        ("conv", ZPlus(bias_absorbs=False)),
        ("folded", Epsilon(1e-3, bias_absorbs=False)),
        ("linear", Epsilon(1e-6)),
    )
)
