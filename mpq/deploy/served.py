"""A network as a function of the tensors of a batch, which is what runtimes take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mpq.nn.batches import Batch, arguments, call, cut, num_samples


class Served(nn.Module):
    """The network as a function of tensors, in the order of the batch, to its one output."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model = model
        self._args, self._keywords = arguments(model, batch)
        positional = {f"input{i}" if i else "input": a for i, a in enumerate(self._args)}
        given = {**positional, **self._keywords}
        inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        self.names, self.tensors = tuple(inputs), tuple(inputs.values())
        samples = num_samples(batch)
        self.batched = [n for n, v in inputs.items() if v.ndim and v.shape[0] == samples]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return the output tensor, the given tensors in place of the batch's."""
        left = iter(tensors)

        def taken(value: Any) -> Any:
            return next(left) if isinstance(value, torch.Tensor) else value

        args = tuple(taken(value) for value in self._args)
        keywords: Mapping[str, Any] = {key: taken(v) for key, v in self._keywords.items()}
        return call(self.model, keywords if keywords else args)


def feeds(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the batch as the model's inputs, arrays by name."""
    served = Served(model, batch)
    return {
        name: tensor.detach().contiguous().numpy()
        for name, tensor in zip(served.names, served.tensors, strict=True)
    }


def of_another_size(batch: Batch) -> Batch:
    """Return one sample of a batch of several, or a single one twice."""
    if num_samples(batch) > 1:
        return cut(batch, 0, 1)

    def part(value: Any) -> Any:
        is_samples = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 1
        return torch.cat([value, value]) if is_samples else value

    if isinstance(batch, torch.Tensor):
        return part(batch)
    if isinstance(batch, Mapping):
        return {key: part(value) for key, value in batch.items()}
    return tuple(part(value) for value in batch)
