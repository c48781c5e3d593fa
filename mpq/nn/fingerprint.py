"""Content keys: the same inputs give the same key on any machine, a changed one never does."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mpq.nn.batches import Batch


def digest(*parts: object) -> str:
    """Return a 32-digit key of texts, numbers, arrays and tensors, nested in any way."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        _feed(state, part)
    return state.hexdigest()


def _feed(state: Any, part: object) -> None:
    if isinstance(part, torch.Tensor):
        tensor = part.detach().cpu().contiguous()
        state.update(f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(part, np.ndarray):
        state.update(f"array {part.dtype} {part.shape};".encode())
        state.update(np.ascontiguousarray(part).data)
    elif isinstance(part, Mapping):
        state.update(f"mapping {len(part)};".encode())
        for key in part:
            _feed(state, str(key))
            _feed(state, part[key])
    elif isinstance(part, list | tuple):
        state.update(f"sequence {len(part)};".encode())
        for item in part:
            _feed(state, item)
    else:
        text = repr(part).encode()
        state.update(f"{type(part).__name__} {len(text)};".encode())
        state.update(text)


def model_digest(model: nn.Module) -> str:
    """Return the key of a network: its module types, their settings and every stored tensor.

    Two modules of one type may compute differently only through what `extra_repr` shows, their
    tensors, and the code of the class; the code is named, not read.
    """
    structure = [
        (name, f"{type(module).__module__}.{type(module).__qualname__}", module.extra_repr())
        for name, module in model.named_modules()
    ]
    return digest(structure, dict(model.state_dict()), torch.__version__)


def batches_digest(batches: tuple[Batch, ...]) -> tuple[str, ...]:
    """Return the key of each batch."""
    return tuple(digest(batch) for batch in batches)
