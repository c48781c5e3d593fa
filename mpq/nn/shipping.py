"""Send a workload to other processes once: weights as plain arrays that are never copied."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpq.nn.workload import Workload


@dataclass(frozen=True, slots=True)
class ShippedWorkload:
    """A workload whose network is a skeleton without storage, and the bytes that fill it.

    An object store keeps numpy arrays outside the pickle and maps them into every process, so
    any number of workers shares one copy of the weights.
    """

    skeleton: Workload
    contents: tuple[npt.NDArray[np.uint8], ...]

    def unpack(self) -> Workload:
        """Return a workload over the shared bytes; its weights must not be written to."""
        model = self.skeleton.model
        memo = {
            id(empty): _filled(empty, content)
            for empty, content in zip(_tensors(model), self.contents, strict=True)
        }
        return replace(self.skeleton, model=copy.deepcopy(model, memo))


def ship(workload: Workload) -> ShippedWorkload:
    """Take a workload apart; the original network is left as it was."""
    tensors = _tensors(workload.model)
    memo = {id(tensor): _empty(tensor) for tensor in tensors}
    skeleton = copy.deepcopy(workload.model, memo)
    contents = tuple(
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors
    )
    return ShippedWorkload(replace(workload, model=skeleton), contents)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]  # tied ones once


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _filled(empty: torch.Tensor, content: npt.NDArray[np.uint8]) -> torch.Tensor:
    with warnings.catch_warnings():  # the shared bytes are read-only, and nothing writes to them
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        flat = torch.from_numpy(content) if content.size else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(empty.dtype).reshape(empty.shape)
    if isinstance(empty, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=empty.requires_grad)
    return tensor.clone()  # a forward pass may write to its buffers
