"""Read a network and one sample into a LayerGraph: layers, units, and what stays outside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.layers import Convolution, Layer, LayerGraph, LayerName, Unsearched
from mpq.core.patterns import matching
from mpq.nn.batches import Batch, call, describe
from mpq.nn.inputs import with_inputs
from mpq.nn.patch import evaluating
from mpq.nn.products import MatrixProducts
from mpq.nn.replay import replay
from mpq.nn.units import group_units
from mpq.nn.weights import ExpertWeight, weight_of

Groups = Literal["auto", "none"] | Sequence[Sequence[str]]

_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.Embedding: "embedding",
    ExpertWeight: "experts",
}
_FAMILIES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def kind_of(module: nn.Module) -> str | None:
    """Return the layer kind of a module, None where it is not one that can be searched."""
    weight = module._parameters.get("weight")
    for cls, kind in _KINDS.items():
        if isinstance(module, cls) and weight is not None and not weight.is_complex():
            return kind
    return None


@dataclass
class _Trace:
    """What one forward pass showed of one module."""

    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    products: list[int] = field(default_factory=list)  # of experts: MACs of each
    order: int = -1
    source: int = -1  # identity of the first input tensor: who reads the same tensor
    returns: str = ""  # the type of an output that is no tensor
    own_forward: bool = False  # computes something else than its kind of layer does


def build_graph(
    model: nn.Module,
    sample: Batch,
    *,
    skip: Sequence[str] = (),
    groups: Groups = "auto",
    embeddings: bool = False,
    inputs: bool = False,
) -> LayerGraph:
    """Return the layer graph of `model` as it runs on `sample` (two forward passes, or three).

    `skip` holds layer names or shell patterns that stay out of the search; embeddings, and
    layers tied to one, stay out unless `embeddings`; `inputs` makes units of layer inputs. A 3-D
    parameter of several matrices that matrix products read (experts) is a layer too. On the meta
    device, where there are no numbers, what needs them is not checked. Raises InvalidInputError
    where nothing can
    be quantized, a pattern matches nothing, a searched weight is not finite, or the model is
    already quantized.
    """
    _refuse_quantized(model)
    modules = {
        name: module for name, module in model.named_modules() if kind_of(module) is not None
    }
    stacks = _stacks(model, modules)
    with evaluating(model), torch.no_grad():
        traces = _trace(model, modules, stacks, sample)
    modules |= {name: ExpertWeight(stacks[name]) for name in stacks if name in traces}
    if not modules:
        seen = sorted({type(module).__name__ for module in model.modules()})
        raise InvalidInputError(
            "nothing_to_quantize",
            f"no {', '.join(sorted(set(_KINDS.values())))} layer with a weight in the model; "
            f"module types seen: {', '.join(seen)}",
        )
    owners = _parameter_names(model)
    layers = {name: _layer(name, module, traces[name], owners) for name, module in modules.items()}
    outside = _unusual(model, traces) | _skipped(layers, skip)
    outside |= {
        name: f"{type(modules[name]).__name__}.forward is not that of a {kind_of(modules[name])}"
        for name, trace in traces.items()
        if trace.own_forward
    }
    reasons = _reasons_outside(layers, outside, embeddings)
    searched = {name: layer for name, layer in layers.items() if name not in reasons}
    if not searched:
        why = "; ".join(sorted(set(reasons.values())))
        raise InvalidInputError("nothing_to_quantize", f"every layer is left out: {why}")
    _refuse_not_finite({name: modules[name] for name in searched})
    in_order = sorted(searched.values(), key=lambda layer: layer.order)
    sources = {name: trace.source for name, trace in traces.items()}
    graph = LayerGraph(
        layers=tuple(sorted(layers.values(), key=lambda layer: (layer.order < 0, layer.order))),
        units=group_units(in_order, sources, groups),
        unsearched=_unsearched(model, searched, layers, reasons),
        sample=describe(sample),
    )
    return with_inputs(graph, sources) if inputs else graph


def _stacks(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the 3-D parameters that hold several matrices and are no module's usual weight."""
    usual = {id(weight_of(module)) for module in modules.values()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and len(parameter) > 1
        and parameter.is_floating_point()
        and id(parameter) not in usual
    }


def _trace(
    model: nn.Module,
    modules: Mapping[LayerName, nn.Module],
    stacks: Mapping[str, nn.Parameter],
    sample: Batch,
) -> dict[LayerName, _Trace]:
    """Return what a pass shows of each module, and of each stack that a matrix product reads."""
    traces = {name: _Trace() for name in modules}
    first_calls: list[LayerName] = []
    alive: list[torch.Tensor] = []  # keeps inputs alive, so that identities stay unique

    def record(name: LayerName) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            if not args:
                raise InvalidInputError(
                    "keyword_call",
                    f"layer {name!r} gets its input as a keyword argument: pass it by position",
                )
            trace = traces[name]
            if not isinstance(output, torch.Tensor):
                trace.returns = type(output).__name__
                output = _first_tensor(output)
            if trace.order < 0:
                trace.order = len(first_calls)
                trace.source = id(args[0])
                first_calls.append(name)
                alive.append(args[0])
                trace.own_forward = not _computes_as_its_kind(modules[name], args[0], output)
            trace.inputs.append(tuple(args[0].shape))
            trace.outputs.append(tuple(output.shape))

        return modules[name].register_forward_hook(hook)

    def product(name: LayerName, macs: int) -> None:
        if name not in traces:
            traces[name] = _Trace(order=len(first_calls))
            first_calls.append(name)
        traces[name].products.append(macs)

    handles = [record(name) for name in modules]
    try:
        with MatrixProducts(stacks, product) if stacks else nullcontext():
            first = call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    if stacks:  # under the context a product may be computed in another way
        first = call(model, sample)
    _warn_if_not_repeatable(first, call(model, sample))
    return traces


def _computes_as_its_kind(module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> bool:
    """Tell whether a layer's output is that of nn.Linear, nn.Conv2d, ... on its weight.

    Subclasses may scale or standardise; scores would be of another layer then.
    """
    bias = module._parameters.get("bias")
    expected = replay(module, inputs, weight_of(module), bias)
    if expected.shape != output.shape or output.is_meta:
        return expected.shape == output.shape
    return torch.allclose(expected.double(), output.double(), rtol=1e-2, atol=1e-4, equal_nan=True)


def _first_tensor(output: Any) -> torch.Tensor:
    parts = output.values() if isinstance(output, Mapping) else output
    found = (part for part in parts if isinstance(part, torch.Tensor))
    return next(found, torch.empty(0))


def _warn_if_not_repeatable(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.is_meta or torch.equal(first.nan_to_num(), second.nan_to_num()):
        return
    if first.shape == second.shape:
        found = f"differ by up to {float((first - second).abs().max()):.3g}"
    else:
        found = f"have shapes {list(first.shape)} and {list(second.shape)}"
    warnings.warn(
        f"the model is not deterministic: the outputs of two passes over the same sample "
        f"{found}; scores will carry that noise",
        MpqWarning,
        stacklevel=4,
    )


def _layer(name: LayerName, module: nn.Module, trace: _Trace, owners: Mapping[int, str]) -> Layer:
    kind = kind_of(module)
    weight = weight_of(module)
    assert kind is not None
    output = trace.outputs[0] if trace.outputs else ()
    return Layer(
        name=name,
        kind=kind,
        weight_shape=tuple(weight.shape),
        weight_id=owners[id(weight)],
        weight_bytes=weight.numel() * weight.element_size(),
        input_shape=trace.inputs[0] if trace.inputs else (),
        output_shape=output,
        macs=sum(trace.products)
        + sum(_macs(kind, weight, i, o) for i, o in zip(trace.inputs, trace.outputs, strict=True)),
        calls=len(trace.inputs) + len(trace.products),
        order=trace.order,
        convolution=_convolution(module),
        native_family=_FAMILIES.get(weight.dtype, "fp32"),
    )


def _macs(
    kind: str, weight: torch.Tensor, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> int:
    """Return multiply-accumulates of one call: each output (input, if transposed) position."""
    if kind == "embedding":
        return 0
    if kind == "linear":
        return math.prod(outputs) * weight.shape[1]
    through = inputs if kind == "conv_transpose2d" else outputs
    return math.prod(through) * math.prod(weight.shape[1:])


def _convolution(module: nn.Module) -> Convolution | None:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
        return None
    padding = module.padding
    padding_end: tuple[int, ...] = ()
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if padding == "valid":
            spans = [0] * len(spans)
        padding = tuple(span // 2 for span in spans)
        if any(span % 2 for span in spans):  # an even kernel: one more at the end
            padding_end = tuple(span - span // 2 for span in spans)
    return Convolution(
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=tuple(padding),
        padding_end=padding_end,
        dilation=tuple(module.dilation),
        groups=module.groups,
        output_padding=tuple(module.output_padding),
    )


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}  # the first name of tied ones


def _unusual(model: nn.Module, traces: Mapping[LayerName, _Trace]) -> dict[LayerName, str]:
    reasons = {
        name: f"its forward returns a {trace.returns}, not a tensor"
        for name, trace in traces.items()
        if trace.returns
    }
    for name, module in model.named_modules():
        projection = f"{name}.out_proj".lstrip(".")
        if isinstance(module, nn.MultiheadAttention) and traces[projection].order < 0:
            reasons[projection] = "run by MultiheadAttention without being called"
    return reasons


def _skipped(layers: Mapping[LayerName, Layer], patterns: Sequence[str]) -> dict[LayerName, str]:
    return {
        name: f"skipped as asked ({pattern})"
        for pattern in patterns
        for name in matching("skip", pattern, layers)
    }


def _reasons_outside(
    layers: Mapping[LayerName, Layer], skipped: Mapping[LayerName, str], embeddings: bool
) -> dict[LayerName, str]:
    reasons = dict(skipped)
    for name, layer in layers.items():
        if name in reasons:
            continue
        if layer.num_weights == 0:
            reasons[name] = "it has no weights"
        elif layer.calls == 0:
            reasons[name] = "not called on the sample"
        elif layer.kind == "embedding" and not embeddings:
            reasons[name] = "embeddings are searched only when asked (embeddings=True)"
    tied_outside = {layers[name].weight_id: name for name in reasons}
    for name, layer in layers.items():
        if name not in reasons and layer.weight_id in tied_outside:
            reasons[name] = f"tied to {tied_outside[layer.weight_id]}, which is left out"
    return reasons


def _unsearched(
    model: nn.Module,
    searched: Mapping[LayerName, Layer],
    layers: Mapping[LayerName, Layer],
    reasons: Mapping[LayerName, str],
) -> tuple[Unsearched, ...]:
    weights = {layer.weight_id for layer in searched.values()}
    # Of tied layers the first reason: "tied to ..." comes last.
    why = {layers[name].weight_id: reason for name, reason in [*reasons.items()][::-1]}
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}

    def reason(name: str, tensor: torch.Tensor, is_buffer: bool) -> str:
        owner, _, leaf = name.rpartition(".")
        if name in why:
            return why[name]
        if is_buffer:
            return f"buffer of {kinds[owner]}"
        if tensor.ndim == 1:
            return f"{leaf} vector of {kinds[owner]}, kept as it is"
        if tensor.ndim == 3:
            return f"3-d parameter of {kinds[owner]}: no stack of matrices that a product reads"
        return f"{tensor.ndim}-d parameter of {kinds[owner]}: no layer kind that can be searched"

    persistent = set(model.state_dict(keep_vars=True))
    stored: list[tuple[str, torch.Tensor, bool]] = [
        (n, p, False) for n, p in model.named_parameters() if n not in weights
    ]
    stored += [(n, b, True) for n, b in model.named_buffers() if n in persistent]
    return tuple(
        Unsearched(
            name=name,
            elements=tensor.numel(),
            bytes=tensor.numel() * tensor.element_size(),
            reason=reason(name, tensor, is_buffer),
        )
        for name, tensor, is_buffer in stored
    )


def _refuse_quantized(model: nn.Module) -> None:
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    integer = [
        name
        for name, p in model.named_parameters()
        if not (p.is_floating_point() or p.is_complex())
        or type(p) not in (nn.Parameter, torch.Tensor)
    ]
    integer += [n for n, m in model.named_modules() if "quantized" in type(m).__module__.split(".")]
    if method or integer:
        found = f"quantization_config {method}" if method else f"{integer[0]!r}"
        raise InvalidInputError(
            "already_quantized",
            f"the model is already quantized ({found}): give the original floating-point model",
        )


def _refuse_not_finite(modules: Mapping[LayerName, nn.Module]) -> None:
    for name, module in modules.items():
        if weight_of(module).is_meta:
            continue
        bad = ~torch.isfinite(weight_of(module).detach())
        if bad.any():
            first = [int(i) for i in bad.nonzero()[0]]
            raise InvalidInputError(
                "weights_not_finite",
                f"layer {name!r} has {int(bad.sum())} weights that are NaN or infinite, the first "
                f"at {first}: repair it or leave it out with skip=[{name!r}]",
            )
