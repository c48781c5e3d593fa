"""Borrow a model: everything changed inside a `with` block is back, bit for bit, after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme
from mpq.core.layers import LayerName
from mpq.nn.quantizers import WeightQuantizer, fake_quantize_activation
from mpq.nn.weights import CacheOf, ExpertWeight, channel_axis_of, layer_module, weight_of

ParameterName = str
Limits = Mapping[LayerName, tuple[float, float]]  # calibrated ranges of layer inputs


@contextmanager
def evaluating(model: nn.Module, seed: int = 0) -> Iterator[nn.Module]:
    """Put every module in eval mode: no dropout, frozen batch norm.

    What the network draws all the same (dropout as a function) begins at `seed`. Modes, the random
    generator and buffers that a forward pass writes to are restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    generator = torch.get_rng_state()
    try:
        model.eval()
        torch.default_generator.manual_seed(seed)
        yield model
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, content in buffers:
                if not buffer.is_meta and not torch.equal(
                    buffer, content
                ):  # versions miss what batch norm writes
                    buffer.copy_(content)
        torch.set_rng_state(generator)


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Switch gradients of all parameters off, and back as they were."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def quantized(
    model: nn.Module,
    schemes: Mapping[LayerName, Scheme],
    *,
    quantizer: WeightQuantizer | None = None,
    limits: Limits | None = None,
) -> Iterator[nn.Module]:
    """Run the model as its layers' schemes would: weights and layer inputs fake-quantized.

    Weights are replaced, never written to, so the originals come back as the same objects, also
    on error; a tied weight is replaced wherever it is used. Under the name of a KV cache what is
    kept of its projection's output is quantized. `limits` gives static ranges of
    layer inputs, for convolutions and what is static by its format; others quantize sample by
    sample. Raises InvalidInputError (`no_range`) for a static format without a range.
    """
    modules = {name: layer_module(model, name) for name in schemes}
    with ExitStack() as restore:
        replaced: dict[int, nn.Parameter] = {}
        quantizer = quantizer or WeightQuantizer()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, scheme in schemes.items():
            module = modules[name]
            if isinstance(module, CacheOf):
                restore.callback(_quantize_cache(module, scheme).remove)
                continue
            weight = weight_of(module)
            if id(weight) not in replaced:
                own = weight.detach()
                axis = channel_axis_of(module)
                stored = quantizer.fake_quantize(names[id(weight)], own, scheme.weights, axis)
                if stored is not own:
                    replaced[id(weight)] = nn.Parameter(stored, requires_grad=False)
            if not scheme.activations.is_native:
                if isinstance(module, ExpertWeight):
                    raise InvalidInputError(
                        "scheme",
                        f"{scheme} quantizes activations, but experts {name!r} are a parameter "
                        f"without an input of its own: give them a weights-only scheme",
                    )
                is_static = scheme.activations.static or not isinstance(module, nn.Linear)
                limit = (limits or {}).get(name) if is_static else None
                if scheme.activations.static and limit is None:
                    raise InvalidInputError(
                        "no_range", f"layer {name!r} in {scheme} needs its calibrated input range"
                    )
                restore.callback(_quantize_input(module, scheme, limit).remove)
        restore.enter_context(_replaced(model, replaced))
        yield model


@contextmanager
def reweighted(
    model: nn.Module, weights: Mapping[ParameterName, torch.Tensor]
) -> Iterator[nn.Module]:
    """Run the model with other tensors for some parameters, wherever those are used."""
    parameters = dict(model.named_parameters())
    others = {
        id(parameters[name]): nn.Parameter(tensor, requires_grad=False)
        for name, tensor in weights.items()
    }
    with _replaced(model, others):
        yield model


@contextmanager
def _replaced(model: nn.Module, others: Mapping[int, nn.Parameter]) -> Iterator[None]:
    """Put others in the place of parameters, by their id; those come back as the same objects."""
    with ExitStack() as restore:
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) in others:
                    restore.callback(module._parameters.__setitem__, key, parameter)
                    module._parameters[key] = others[id(parameter)]
        yield


def _quantize_input(
    module: nn.Module, scheme: Scheme, limit: tuple[float, float] | None
) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values, *rest = args
        seen = fake_quantize_activation(values.detach(), scheme.activations, limit)
        if values.requires_grad:  # straight through: rounding has no gradient of its own
            seen = values + (seen - values).detach()
        return (seen, *rest)

    return module.register_forward_pre_hook(hook)


def _quantize_cache(cache: CacheOf, scheme: Scheme) -> RemovableHandle:
    def hook(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        kept = cache.kept(output, scheme.weights)
        return output + (kept - output).detach() if output.requires_grad else kept

    return cache.projection.register_forward_hook(hook)
