"""Content keys: the same inputs give the same key on any machine, a changed one never does."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Mapping
from types import CodeType, FunctionType
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
    values = output.detach().double()
    largest = float(values.abs().max().clamp_min(1e-300))
    return digest((values / largest).round(decimals=3) + 0.0, round(math.log10(largest), 3))


def function_digest(function: object) -> str:
    """Return the key of a function: its name, code, constants, defaults and closure.

    Globals that it uses are named, not followed. What is not a plain function, or closes over
    more than data and functions, never has the same key twice: nothing stale is served.
    """
    if function is None:
        return ""
    if not isinstance(function, FunctionType):
        return uuid.uuid4().hex
    code = function.__code__
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    held += [function.__defaults__, function.__kwdefaults__]
    name = f"{function.__module__}.{function.__qualname__}"
    values = [_data_digest(value) for value in held]
    return digest(name, code.co_code.hex(), repr(code.co_names), _constants(code), values)


def _data_digest(value: object) -> str:
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return digest(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return digest(value)
    if isinstance(value, list | tuple):
        return digest([_data_digest(item) for item in value])
    if isinstance(value, dict):
        return digest([(repr(key), _data_digest(item)) for key, item in value.items()])
    return function_digest(value)


def _constants(code: CodeType) -> list[str]:
    """Return constants as texts; inner functions by their code, not by their address."""
    return [
        digest(c.co_code.hex(), _constants(c)) if isinstance(c, CodeType) else repr(c)
        for c in code.co_consts
    ]


def batches_digest(batches: tuple[Batch, ...]) -> tuple[str, ...]:
    """Return the key of each batch."""
    return tuple(digest(batch) for batch in batches)
