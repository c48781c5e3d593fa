"""How far a network's activations are from the statistics its batch norms remember."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch, call

_EPSILON = 1e-6


class NormStatistics:
    """Sums over batch norms what their inputs are away from mean mu and deviation sigma.

    sum_l |mean_l - mu_l|^2 + |std_l - sigma_l|^2 over channels (ZeroQ, section 3.1), std =
    sqrt(var + 1e-6). With `per_sample` the statistics are of each sample over its positions and
    the sum is a mean over samples; where a sample has one position, and without it, they are of
    the whole batch. A context manager: its hooks are on the network inside it.
    Raises InvalidInputError (`no_batch_norm`) where the network tracks no statistics.
    """

    def __init__(self, model: nn.Module, source: str, *, per_sample: bool) -> None:
        self._model, self._source, self._per_sample = model, source, per_sample
        self._norms = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        self._terms: list[torch.Tensor] = []
        self._handles: list[RemovableHandle] = []
        if not self._norms:
            raise self._none("has")

    def __enter__(self) -> Self:
        self._handles = [norm.register_forward_pre_hook(self._seen) for norm in self._norms]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def distance(self, batch: Batch, values: torch.Tensor) -> torch.Tensor:
        """Run the network on a batch and return the sum, `values` (mean 0, std 1) included."""
        self._terms = []
        call(self._model, batch)
        if not self._terms:
            raise self._none("runs")
        zeros = values.new_zeros(values.shape[1])
        own = _distance(values, zeros, zeros + 1, per_sample=self._per_sample)
        return torch.stack([own, *self._terms]).sum()

    def _seen(self, norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        sigma = (norm.running_var + _EPSILON).sqrt()
        found = _distance(args[0], norm.running_mean, sigma, per_sample=self._per_sample)
        self._terms.append(found)

    def _none(self, verb: str) -> InvalidInputError:
        return InvalidInputError(
            "no_batch_norm",
            f"{self._source} matches the statistics of batch norms, and "
            f"{type(self._model).__name__} {verb} none that tracks them: give calibration batches, "
            f"or calibration='random_tokens' for a language model",
        )


def _distance(
    values: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, *, per_sample: bool
) -> torch.Tensor:
    seen = values.flatten(2) if values.ndim > 2 else values.unsqueeze(2)
    if not per_sample or seen.shape[2] == 1:
        seen = seen.transpose(0, 1).flatten(1).unsqueeze(0)
    var, middle = torch.var_mean(seen, dim=2, correction=0)
    away = (middle - mean).square() + ((var + _EPSILON).sqrt() - std).square()
    return away.sum(1).mean()
