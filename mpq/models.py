"""Where models, batches and functions come from: live objects, entry points, directories."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.errors import InvalidInputError, unknown

_IMPORTING = re.compile(r"^<frozen importlib|[/\\]importlib[/\\]__init__\.py$")
_HUB = "hf:"
_LONGEST = 300  # characters of somebody else's error that are told


def load_entry_point(text: str, what: str) -> Any:
    """Return the object that "package.module:name" names; the working directory is searched too.

    Raises InvalidInputError naming what could not be found.
    """
    module_name, colon, name = text.partition(":")
    if not colon or not module_name or not name:
        raise InvalidInputError(
            "entry_point", f"{what} is written 'package.module:name', got {text!r}"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's: anything may happen
        raise InvalidInputError(
            "entry_point", f"{what} {text!r}: cannot import {module_name!r}: {_told(error)}"
        ) from error
    if not hasattr(module, name):
        known = [n for n in vars(module) if not n.startswith("_")]
        raise InvalidInputError("entry_point", f"{what} {text!r}: {unknown('name', name, known)}")
    return getattr(module, name)


def _told(error: BaseException) -> str:
    """Return what went wrong in an import, with the file and line of the user's that did it."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    said = _one_line(error)
    if not isinstance(error, ImportError):
        said = f"{type(error).__name__}: {said}"
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is our own call
    theirs = [frame for frame in frames if not _IMPORTING.search(frame.filename)]
    return f"{theirs[0].filename}, line {theirs[0].lineno}: {said}" if theirs else said


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def called(function: Callable[[], Any], what: str) -> Any:
    """Call a user's factory; its own error is told in one line with what it was for."""
    try:
        return function()
    except Exception as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(
            "factory_failed", f"{what} failed: {type(error).__name__}: {_one_line(error)}"
        ) from error


def load_model(source: nn.Module | str) -> nn.Module:
    """Return the network: itself, what an entry point makes, or that of Hugging Face.

    "package.module:factory@weights.safetensors" gives the network that the factory makes the
    weights of a file; "hf:organisation/name" is the id of a Hugging Face model, which transformers
    downloads unless it is in its cache, a directory one that is here.
    """
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str):
        raise InvalidInputError(
            "model",
            f"a model is an nn.Module, 'package.module:factory' or a directory, "
            f"got {type(source).__name__}",
        )
    if source.startswith(_HUB):
        return _from_hub(source.removeprefix(_HUB))
    if Path(source).is_dir():
        return _from_directory(Path(source))
    factory, at, weights = source.partition("@")
    model = called(load_entry_point(factory, "model"), f"model {factory!r}")
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            "model", f"{factory!r} returned a {type(model).__name__}, not an nn.Module"
        )
    return _with_weights(model, weights) if at else model


def _with_weights(model: nn.Module, path: str) -> nn.Module:
    """Load a safetensors file into a network; tied weights may be stored once."""
    import safetensors.torch

    if not path.endswith(".safetensors"):
        raise InvalidInputError(
            "model", f"weights are a .safetensors file, got {path!r}: others may run code"
        )
    try:
        safetensors.torch.load_model(model, path, strict=True)
    except Exception as error:  # a missing or broken file, or that of another network
        raise InvalidInputError("model", f"cannot load {path}: {_one_line(error)}") from error
    return model


def load_shapes(source: nn.Module | str) -> nn.Module:
    """Return a network for its shapes alone: one of a Hugging Face config has no weights (meta).

    A directory needs its config.json only; an entry point may return a config or a network.
    """
    if isinstance(source, str) and Path(source).is_dir():
        return _on_meta(_read_config(Path(source)), source)
    if isinstance(source, str) and ":" in source:
        made = called(load_entry_point(source, "model"), f"model {source!r}")
        if not isinstance(made, nn.Module) and hasattr(made, "model_type"):
            return _on_meta(made, source)
        if isinstance(made, nn.Module):
            return made
        raise InvalidInputError(
            "model", f"{source!r} returned a {type(made).__name__}, not a config or an nn.Module"
        )
    return load_model(source)


def _on_meta(config: Any, source: str) -> nn.Module:
    """Build what a config describes on the meta device, in the config's own number type."""
    transformers = _transformers()
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    dtype = getattr(config, "dtype", None) or torch.float32
    options = {"dtype": dtype, "attn_implementation": "eager"}
    try:
        with torch.device("meta"):
            model: nn.Module = (
                cls._from_config(config, **options)
                if cls is not None
                else transformers.AutoModelForCausalLM.from_config(config, **options)
            )
    except Exception as error:
        raise InvalidInputError("model", f"cannot build {source}: {_one_line(error)}") from error
    return model.eval()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InvalidInputError(
            "model", "Hugging Face directories need transformers: pip install transformers"
        ) from error
    return transformers


def _read_config(directory: Path) -> Any:
    if not (directory / "config.json").exists():
        raise InvalidInputError(
            "model", f"{directory} has no config.json: not a Hugging Face model directory"
        )
    try:
        return _transformers().AutoConfig.from_pretrained(directory, local_files_only=True)
    except InvalidInputError:
        raise
    except Exception as error:  # of many kinds: unknown model types, broken files
        raise InvalidInputError("model", f"cannot load {directory}: {_one_line(error)}") from error


def _from_directory(directory: Path) -> nn.Module:
    return _pretrained(_read_config(directory), directory, local_files_only=True)


def _from_hub(name: str) -> nn.Module:
    """Return a model by its id; HF_HUB_OFFLINE=1 keeps to what is in the cache."""
    try:
        config = _transformers().AutoConfig.from_pretrained(name, trust_remote_code=False)
    except InvalidInputError:
        raise
    except Exception as error:  # of many kinds: unknown ids, no network, private models
        raise InvalidInputError("model", f"cannot load {_HUB}{name}: {_one_line(error)}") from error
    return _pretrained(config, name)


def _pretrained(config: Any, source: str | Path, **options: Any) -> nn.Module:
    transformers = _transformers()
    architectures = getattr(config, "architectures", None) or []
    try:
        cls = getattr(transformers, architectures[0], None) if architectures else None
        # Written-out attention differentiates twice on any device; remote code is never run.
        model: nn.Module = (cls or transformers.AutoModel).from_pretrained(
            source, attn_implementation="eager", trust_remote_code=False, **options
        )
    except Exception as error:  # of many kinds: missing or broken files
        raise InvalidInputError("model", f"cannot load {source}: {_one_line(error)}") from error
    return model


def load_batches(source: Any, what: str) -> Any:
    """Return batches: themselves, or what an entry point makes."""
    if isinstance(source, str):
        return called(load_entry_point(source, what), f"{what} {source!r}")
    return source


def load_function(source: Any, what: str) -> Any:
    """Return a function or None: itself, or what an entry point names."""
    found = load_entry_point(source, what) if isinstance(source, str) else source
    if found is not None and not callable(found):
        raise InvalidInputError("entry_point", f"{what} {source!r} is not callable")
    return found
