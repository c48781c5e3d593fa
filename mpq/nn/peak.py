"""How much memory a forward pass needs beside the weights: tensors that are alive together."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mpq.nn.batches import Batch, call
from mpq.nn.patch import evaluating


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A context that follows the storages which operations make: `now`, and the `peak` of it.

    Views and in-place results share a storage and count once; `known` tensors count nothing. What
    a kernel takes for itself inside is not seen.
    """

    def __init__(self, known: Iterator[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now: int = 0
        self.peak: int = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # alive: identities stay
        self._seen = {id(storage) for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        self.now += storage.nbytes()
        weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


def peak_activation_bytes(model: nn.Module, sample: Batch) -> int:
    """Return the most bytes that a forward pass on `sample` holds beside weights and sample.

    The largest sum over the execution order of the tensors that are alive together, residuals,
    masks and the output included, as torch runs the network operation by operation in its own
    number type. A runtime that fuses operations or writes in place takes less: a conservative
    estimate. Works on the meta device. Cost: one forward pass.
    """
    known = [*model.parameters(), *model.buffers()]
    known += [leaf for leaf in pytree.tree_leaves(sample) if isinstance(leaf, torch.Tensor)]
    with evaluating(model), torch.no_grad(), LiveBytes(iter(known)) as live:
        call(model, sample)
    peak: int = live.peak
    return peak
