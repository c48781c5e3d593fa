"""The parts of a network whose outputs a learned rounding keeps: repeated blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mpq.core.layers import LayerName


@dataclass(frozen=True, slots=True)
class Block:
    """A module that is called as one, and the layers in it."""

    name: str
    layers: tuple[LayerName, ...]


def blocks_of(model: nn.Module, layers: Iterable[LayerName]) -> tuple[Block, ...]:
    """Return the smallest repeated containers of the layers, in the order of the layers.

    A container is repeated where it stands in a list or sequence (nn.ModuleList, nn.Sequential)
    with another of its class, and counts where it holds two of the layers or more: a layer of a
    transformer, a residual block. A layer in none is a block of its own.
    """
    layers = list(layers)
    found: dict[str, list[LayerName]] = {}
    for layer in layers:
        found.setdefault(_container(model, layer, layers), []).append(layer)
    return tuple(Block(name, tuple(inside)) for name, inside in found.items())


def _container(model: nn.Module, layer: LayerName, layers: list[LayerName]) -> str:
    name = layer.rpartition(".")[0]
    while name:
        above = name.rpartition(".")[0]
        parent, module = model.get_submodule(above), model.get_submodule(name)
        repeated = isinstance(parent, nn.ModuleList | nn.Sequential) and (
            sum(type(child) is type(module) for child in parent.children()) > 1
        )
        inside = sum(other.startswith(f"{name}.") for other in layers)
        if repeated and inside > 1 and type(module).forward is not nn.Module.forward:
            return name
        name = above
    return layer
