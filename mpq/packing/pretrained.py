"""A network of Hugging Face as its config and tensors, and again as a network."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# What transformers has itself; of other names it may fetch code.
_FETCHED = ("backbone", "use_timm_backbone", "use_pretrained_backbone")
_IMPLEMENTATIONS = (None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")


def as_plain(model: nn.Module) -> dict[str, Any] | None:
    """Return what a transformers network is made of again: no class but transformers' own.

    Config, every parameter and buffer, which modules train. None for any other network, also
    one whose modules or settings are not those of its config, or that has hooks.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        return None
    kept = {
        "class": name,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "attention": model.config._attn_implementation,
        "tensors": dict(_tensors(model)),
        "training": [name for name, module in model.named_modules() if module.training],
    }
    try:
        again = _built(kept, "meta")
    except Exception:  # of any kind: its config alone does not make it
        return None
    return kept if _parts(again) == _parts(model) and not _is_changed(model) else None


def from_plain(kept: dict[str, Any]) -> nn.Module:
    """Return the network, bit for bit; its weights are never initialised where avoidable."""
    model = _filled(kept, "meta")
    if any(t.is_meta for module in model.modules() for t in _attributes(module)):
        return _filled(kept, "cpu")  # some tensors follow from the config alone
    return model


def _filled(kept: dict[str, Any], device: str) -> nn.Module:
    model = _built(kept, device)
    for name, tensor in kept["tensors"].items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        table = module._parameters if leaf in module._parameters else module._buffers
        if leaf not in table or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"the network has no tensor {name!r}")
        table[leaf] = tensor  # type: ignore[assignment]
    training = set(kept["training"])
    for name, module in model.named_modules():
        module.training = name in training
    return model


def _built(kept: dict[str, Any], device: str) -> nn.Module:
    import transformers

    found = getattr(transformers, str(kept["class"]), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(f"transformers has no network {kept['class']!r}")
    cls: Any = found
    names = {"attn_implementation": kept["attention"], "class": kept["class"]}
    _check_fetches_nothing({**names, "config": kept["config"]})
    config = cls.config_class.from_dict(dict(kept["config"]))
    with torch.device(device):
        model: nn.Module = cls._from_config(config, attn_implementation=kept["attention"])
    return model


def _check_fetches_nothing(config: object) -> None:
    """Raise ValueError where making a network of a config would load code or weights."""
    for key, value in config.items() if isinstance(config, dict) else ():
        is_foreign = str(key).endswith("_implementation") and value not in _IMPLEMENTATIONS
        is_timm = key in ("model_type", "class") and str(value).lower().startswith("timm")
        if is_foreign or is_timm or (key in _FETCHED and value):
            raise ValueError(f"its config would fetch code or weights: {key} {value!r}")
        _check_fetches_nothing(value)
    for one in config if isinstance(config, list) else ():
        _check_fetches_nothing(one)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _parts(model: nn.Module) -> list[object]:
    """Return all that must be as the config makes it: modules, their settings, shapes."""
    modules: list[object] = [(n, type(m), _settings(m)) for n, m in model.named_modules()]
    return [*modules, *((name, tensor.shape) for name, tensor in _tensors(model))]


def _settings(module: nn.Module) -> dict[str, object]:
    plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    return {k: v for k, v in plain.items() if k not in ("training", "_is_hf_initialized")}


def _is_changed(model: nn.Module) -> bool:
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )


def _attributes(module: nn.Module) -> Iterator[torch.Tensor]:
    tables = (module._parameters, module._buffers, vars(module))
    for value in itertools.chain.from_iterable(table.values() for table in tables):
        if isinstance(value, torch.Tensor):
            yield value
