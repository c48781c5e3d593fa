"""Where a layer's weight is: in a module of a known kind, or a parameter that stands for itself."""

from __future__ import annotations

import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.formats import ChannelAxis, Format
from mpq.core.layers import LayerGraph, LayerName
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.shapes import attention_of

# The projections whose output a cache keeps, by the name of the cache beside them.
PROJECTIONS = {
    "k_cache": ("k_proj", "key", "k", "to_k", "wk", "k_lin"),
    "v_cache": ("v_proj", "value", "v", "to_v", "wv", "v_lin"),
}
INPUT = "input"  # "fc.input" is what enters "fc"


class ExpertWeight(nn.Module):
    """The weights of experts, one 3-D parameter, as a layer: its input is 1, its output the weight.

    How the module that holds the parameter uses it is not known, so what is asked of a layer's
    output is asked of the parameter. Never called: it is made around a parameter when needed.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class CacheOf(nn.Module):
    """What a KV cache keeps of a projection's output, as a layer that reads and gives that output.

    Never called: it is made around a projection when needed.
    """

    def __init__(self, projection: nn.Linear, head_dim: int) -> None:
        super().__init__()
        self.projection = projection
        self._head_dim = head_dim

    def kept(self, values: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Return the output (..., heads * head_dim) as it reads back from a cache in a format.

        Each vector of a token and head has scales of its own, those of its smallest and largest
        element: nothing is known of it before it is there.
        """
        vectors = values.detach().reshape(-1, self._head_dim)
        stored = WeightQuantizer().fake_quantize("", vectors, fmt, 0)
        return stored.reshape(values.shape)


def layer_module(model: nn.Module, name: LayerName) -> nn.Module:
    """Return the module of a layer; for experts one that holds the parameter of that name.

    Of an input searched apart it is the module that reads it, of a KV cache one that stands for it.
    Raises InvalidInputError where the model has neither.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        parameter = model.get_submodule(owner)._parameters.get(leaf)
        if parameter is not None:
            return ExpertWeight(parameter)
        holder = model.get_submodule(owner)
        if leaf in holder._modules or leaf not in (INPUT, *PROJECTIONS):
            return model.get_submodule(name)
        return holder if leaf == INPUT else _cache(model, holder, leaf)
    except AttributeError:
        raise InvalidInputError(
            "other_model", f"this model has no layer {name!r}: give the one that was searched"
        ) from None


def _cache(model: nn.Module, holder: nn.Module, leaf: str) -> CacheOf:
    attention, _ = attention_of(model, 1)
    for child in PROJECTIONS[leaf]:
        projection = holder._modules.get(child)
        if attention is not None and isinstance(projection, nn.Linear):
            return CacheOf(projection, attention.head_dim)
    raise AttributeError(leaf)


def layer_modules(model: nn.Module, graph: LayerGraph) -> dict[LayerName, nn.Module]:
    """Return the module of every searched layer."""
    return {name: layer_module(model, name) for unit in graph.units for name in unit.layers}


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the parameter that holds the weight of a layer's module."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def channel_axis_of(module: nn.Module) -> ChannelAxis:
    """Return `Layer.channel_axis` of a layer's module."""
    if isinstance(module, ExpertWeight):
        return tuple(range(module.weight.ndim - 1))
    return 1 if isinstance(module, nn.ConvTranspose2d) else 0
