"""Which classes and functions a kept object may name: torch's modules, and those of trust."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mpq.core.errors import InvalidInputError
from mpq.trust import TRUSTED, trusted_modules, trusted_text

_TORCH = "torch.nn.modules"
_ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus"),
    *("tanh", "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "softmax", "log_softmax"),
)


def name_of(thing: type | Callable[..., Any], at: str) -> str:
    """Return "module:name" of a class or function that another process can import.

    Raises InvalidInputError (`not_importable`) for those of a script, a function or nowhere.
    """
    for name, function in _functions().items():
        if thing is function:
            return name
    module = str(getattr(thing, "__module__", None))
    path = str(getattr(thing, "__qualname__", None))
    if module == "__main__" or "<" in path or _found(module, path, is_imported=True) is not thing:
        raise InvalidInputError(
            "not_importable",
            f"{at}: another process cannot import {path!r} of {module!r}: put it into a module, "
            f"or give an entry point, 'package.module:factory'",
        )
    return f"{module}:{path}"


def named(text: str) -> Any:
    """Return the class or function that "module:name" names, importing only what is trusted.

    Raises InvalidInputError (`untrusted`) for anything else, before it is imported.
    """
    if text in _functions():
        return _functions()[text]
    module, _, path = text.partition(":")
    if not _within(module, (_TORCH, *trusted_modules())):
        raise _untrusted(text, module)
    found = _found(module, path)
    is_own = getattr(found, "__module__", None) == module
    if not isinstance(found, type | FunctionType) or not is_own:
        raise InvalidInputError(
            "untrusted", f"the object names {text!r}, which is no class or function of {module}"
        )
    is_network = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_network and not _within(module, trusted_modules()):
        raise _untrusted(text, module)
    return found


def is_of_torch(name: str) -> bool:
    """Tell whether what is named so needs no trust."""
    return name in _functions() or _within(name.partition(":")[0], (_TORCH,))


def _within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def _untrusted(text: str, module: str) -> InvalidInputError:
    known = trusted_text([module])
    return InvalidInputError(
        "untrusted",
        f"the object names {text!r}, which is not trusted here: set {TRUSTED}={known} for the "
        f"process that drives the run, if you trust that module",
    )


def _found(module: str, path: str, *, is_imported: bool = False) -> Any:
    """Return what a path names: a module's own attribute, then those of classes; else None."""
    try:
        here: Any = sys.modules.get(module) if is_imported else importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the module is somebody's: anything may happen
        raise InvalidInputError(
            "entry_point", f"cannot import {module!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    for part in path.split("."):
        if not isinstance(here, ModuleType | type):
            return None
        here = vars(here).get(part)
        if isinstance(here, ModuleType):
            return None
    return here


@functools.cache
def _functions() -> dict[str, Any]:
    """Return the functions that need no trust, by name: activations, kept as attributes."""
    found = {f"torch.nn.functional:{name}": getattr(functional, name) for name in _ACTIVATIONS}
    return found | {f"torch:{name}": getattr(torch, name) for name in ("relu", "tanh", "sigmoid")}
