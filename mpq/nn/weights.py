"""Where a layer's weight is: in a module of a known kind, or a parameter that stands for itself."""

from __future__ import annotations

from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.formats import ChannelAxis
from mpq.core.layers import LayerGraph, LayerName


class ExpertWeight(nn.Module):
    """The weights of experts, one 3-D parameter, as a layer: its input is 1, its output the weight.

    How the module that holds the parameter uses it is not known, so what is asked of a layer's
    output is asked of the parameter. Never called: it is made around a parameter when needed.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def layer_module(model: nn.Module, name: LayerName) -> nn.Module:
    """Return the module of a layer; for experts one that holds the parameter of that name.

    Raises InvalidInputError where the model has neither.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        parameter = model.get_submodule(owner)._parameters.get(leaf)
        return model.get_submodule(name) if parameter is None else ExpertWeight(parameter)
    except AttributeError:
        raise InvalidInputError(
            "other_model", f"this model has no layer {name!r}: give the one that was searched"
        ) from None


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
