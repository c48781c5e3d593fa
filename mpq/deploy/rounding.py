"""What kernels round that the search does not: a network that computes as they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mpq.core.formats import Format, PerGroup, Scheme
from mpq.core.layers import LayerName
from mpq.deploy.placed import Placed, is_static, without_bias, writes_codes
from mpq.nn.patch import quantized
from mpq.nn.quantizers import WeightQuantizer, fake_quantize_activation

Rounding = Callable[[Placed], Callable[..., Any]]


@contextmanager
def as_kernels(
    model: nn.Module,
    placed: Mapping[LayerName, Placed],
    quantizer: WeightQuantizer,
    *,
    input_rounding: Rounding | None = None,
    output_rounding: Rounding | None = None,
) -> Iterator[nn.Module]:
    """Run the model with its stored weights and every rounding of the deployed kernels.

    Roundings make the hooks of a layer: those of ONNX Runtime where none are given.
    Beside `mpq.nn.patch.quantized`: MatMulNBits rounds its input to 8 bits, symmetric, in the
    blocks of its weights; DynamicQuantizeMatMul gives all samples of a batch one range;
    QLinearConv rounds what is behind its tail to 8 bits of a static range. A block x moves by at
    most max|x| / 254 an element, so an output of MatMulNBits by at most the sum over its blocks of
    that times the sum of |w|.
    """
    stored = {name: Scheme(p.scheme.weights) for name, p in placed.items()}
    with ExitStack() as restore:
        restore.enter_context(quantized(model, stored, quantizer=quantizer))
        for name, p in placed.items():
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook((input_rounding or _input_rounding)(p))
            restore.callback(hook.remove)
            if writes_codes(p.layer, p.scheme):
                output_hook = (output_rounding or _output_rounding)(p)
                restore.callback(module.register_forward_hook(output_hook).remove)
        yield model


def _input_rounding(placed: Placed) -> Callable[..., Any]:
    scheme, granularity = placed.scheme, placed.scheme.weights.granularity

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values, *rest = args
        if is_static(placed.layer, scheme):
            values = fake_quantize_activation(values, scheme.activations, placed.input_limits)
        elif not scheme.activations.is_native:
            values = fake_quantize_activation(values[None], scheme.activations)[0]
        elif placed.layer.kind == "linear" and isinstance(granularity, PerGroup):
            values = in_blocks(values, granularity.size)
        return (values, *rest)

    return hook


def in_blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """Return values rounded to s q, q in [-127, 127], s = max|x| / 127 of each block."""
    blocks = values.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scales).round() * scales).reshape(values.shape)


def _output_rounding(placed: Placed) -> Callable[..., Any]:
    fmt = Format(family="int", bits=8, symmetric=False)

    def hook(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        bare = without_bias(module, output)
        written = bare if placed.tail is None else placed.tail.applied(bare)
        rounded = fake_quantize_activation(written, fmt, placed.output_limits)
        # The modules of the tail come after this hook and make of it what was written.
        before = rounded if placed.tail is None else placed.tail.undone(rounded)
        return before + (output - bare)

    return hook
