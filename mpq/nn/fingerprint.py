"""Content keys: the same inputs give the same key on any machine, a changed one never does."""

from __future__ import annotations

import dis
import hashlib
import math
import sysconfig
import uuid
from collections.abc import Mapping
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
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
    """Return the key of a function: its name, code, constants, defaults, closure and globals.

    Of the globals that its code reads, data is followed, and functions in turn, unless they come
    with Python, `mpq` or an installed package: those, modules and classes are named. Any other
    object (a dataset, a logger) stands for its type and the data in its attributes, one object
    deep: what it holds beyond that may change unseen. What is not a plain function, or closes over
    more than data and functions, never has the same key twice: nothing stale is served.
    """
    return _function_digest(function, {})


_Seen = dict[int, tuple[int, object]]  # by id, in the order of meeting; holds on to the objects
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


def _function_digest(function: object, seen: _Seen) -> str:
    if function is None:
        return ""
    if not isinstance(function, FunctionType):
        return uuid.uuid4().hex
    code = function.__code__
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    held += [function.__defaults__, function.__kwdefaults__]
    name = f"{function.__module__}.{function.__qualname__}"
    values = [_data_digest(value, seen) for value in held]
    known = function.__globals__
    used = sorted(_global_names(code) & known.keys()) if _is_users(function) else []
    found = [(key, _global_digest(known[key], seen)) for key in used]
    return digest(name, code.co_code.hex(), repr(code.co_names), _constants(code), values, found)


def _is_users(function: FunctionType) -> bool:
    package = str(function.__module__).partition(".")[0]
    return package != "mpq" and not function.__code__.co_filename.startswith(_INSTALLED)


def _global_names(code: CodeType) -> set[str]:
    """Return the globals that code reads, inner functions included."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = (_global_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return names.union(*inner)


def _global_digest(value: object, seen: _Seen, attributes: bool = True) -> str:
    """Return the key of any object without end or chance: see `function_digest`."""
    if _is_plain(value):
        return digest(value)
    if id(value) in seen:
        return digest("again", seen[id(value)][0])
    seen[id(value)] = (len(seen), value)
    if isinstance(value, FunctionType) and _is_users(value):
        return _function_digest(value, seen)
    if isinstance(value, ModuleType):
        return digest("module", value.__name__)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return digest("named", f"{value.__module__}.{value.__qualname__}")
    if isinstance(value, nn.Module):
        return model_digest(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    held: list[Any] = []
    if isinstance(value, list | tuple):
        held = [_global_digest(item, seen, attributes) for item in value]
    elif isinstance(value, dict):
        held = [(repr(k), _global_digest(v, seen, attributes)) for k, v in value.items()]
    elif isinstance(value, set | frozenset):
        held = sorted(_global_digest(item, seen, attributes) for item in value)
    elif attributes:
        inside = getattr(value, "__dict__", {})
        held = [(k, _global_digest(inside[k], seen, False)) for k in sorted(inside)]
    return digest(kind, held)


def _is_plain(value: object) -> bool:
    plain = bool | int | float | complex | str | bytes | torch.Tensor | np.ndarray | np.generic
    return value is None or isinstance(value, plain | torch.dtype | torch.device | PurePath)


def _data_digest(value: object, seen: _Seen) -> str:
    if _is_plain(value):
        return digest(value)
    if id(value) in seen:
        return digest("again", seen[id(value)][0])
    seen[id(value)] = (len(seen), value)
    if isinstance(value, list | tuple):
        return digest([_data_digest(item, seen) for item in value])
    if isinstance(value, dict):
        return digest([(repr(key), _data_digest(item, seen)) for key, item in value.items()])
    return _function_digest(value, seen)


def _constants(code: CodeType) -> list[str]:
    """Return constants as texts; inner functions by their code, not by their address."""
    return [
        digest(c.co_code.hex(), repr(c.co_names), _constants(c))
        if isinstance(c, CodeType)
        else repr(c)
        for c in code.co_consts
    ]


def batches_digest(batches: tuple[Batch, ...]) -> tuple[str, ...]:
    """Return the key of each batch."""
    return tuple(digest(batch) for batch in batches)
