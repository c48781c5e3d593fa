"""Content keys: the same inputs give the same key on any machine, a changed one never does."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping
from types import CodeType
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

    The code of a module is named, not read: see `output_digest` for what it does.
    """
    structure = [
        (name, f"{type(module).__module__}.{type(module).__qualname__}", module.extra_repr())
        for name, module in model.named_modules()
    ]
    return digest(structure, dict(model.state_dict()), torch.__version__)


def output_digest(output: torch.Tensor) -> str:
    """Return the key of what a network does: its output, to three digits of the largest value.

    Changed code with the same weights gives another output. Coarse, so that another number of
    threads does not.
    """
    largest = output.detach().abs().max().clamp_min(1e-30)
    return digest((output.detach() / largest).double().round(decimals=3) + 0.0)


def function_digest(function: Callable[..., Any] | None) -> str:
    """Return the key of a function: its name, code, constants and defaults.

    What it calls is not followed. A callable without code of its own never has the same key
    twice, so nothing stale is served for it.
    """
    if function is None:
        return ""
    code = getattr(function, "__code__", None)
    if code is None:
        return uuid.uuid4().hex
    name = f"{function.__module__}.{function.__qualname__}"
    closed = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    defaults = (repr(function.__defaults__), repr(function.__kwdefaults__))
    return digest(name, code.co_code.hex(), repr(code.co_names), _constants(code), closed, defaults)


def _constants(code: CodeType) -> list[str]:
    """Return constants as texts; inner functions by their code, not by their address."""
    return [
        digest(c.co_code.hex(), _constants(c)) if isinstance(c, CodeType) else repr(c)
        for c in code.co_consts
    ]


def batches_digest(batches: tuple[Batch, ...]) -> tuple[str, ...]:
    """Return the key of each batch."""
    return tuple(digest(batch) for batch in batches)
