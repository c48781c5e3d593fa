"""The torch backend: kernels of torch's x86 quantized engine, and torch's own in fp32."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from hw_cost_models.measured.backend import REFERENCE, NetworkSize, checked_threads
from hw_cost_models.measured.capability import linear_rows, shape_text
from hw_cost_models.measured.device import device_fingerprint
from hw_cost_models.measured.protocol import Op
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, PerGroup, PerTensor, Scheme, parse_scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import Layer

BACKEND, ENGINE = "torch_cpu", "x86"
Kernel = Callable[[torch.Tensor], torch.Tensor]

_FP32 = {
    "linear": "linear",
    "embedding": "embedding",
    "conv1d": "conv1d",
    "conv2d": "conv2d",
    "conv_transpose2d": "conv_transpose2d",
}
_DEFAULT = {"linear": ("fp32", "fp16", "int8:int7")}
# What executes, but is no evidence of a format's time: 0.01 to 0.6 of the speed of fp32 with
# AVX2, and with VNNI and AVX512_BF16 the loops of the last two lines still take 0.01 to 0.14.
_NO_EVIDENCE = {
    "bf16": "torch.nn.functional.{kind} in bf16 rounds activations too, and only emulates bf16 "
    "without AMX or AVX512_BF16",
    "fp16": "torch.nn.functional.{kind} in fp16 rounds activations too, and only emulates fp16 "
    "without AVX512_FP16",
    "symmetric": "torch._int_mm quantizes no activations and is a reference loop without VNNI",
    "int8": "torch._weight_int8pack_mm is a reference loop in fp32",
    "int4": "torch._weight_int4pack_mm_for_cpu and torch._dyn_quant_matmul_4bit are reference "
    "loops in fp32",
}


def why_not(layer: Layer, scheme: Scheme) -> str:
    """Return why no real kernel of torch runs `layer` in `scheme`, "" where one does.

    fp32: linear, embedding, conv1d, conv2d, conv_transpose2d of torch, with MKL and oneDNN.
    fp16, linear: quantized::linear_dynamic_fp16, weights in fp16, all else in fp32.
    int8:int7, linear (weights per channel or tensor): quantized::linear_dynamic, signed 8-bit
    weights; the activations of the whole tensor are quantized at run time, with reduce_range to
    7 bits, so that the 16-bit multiply-add of x86 without VNNI does not saturate. The same
    kernel is what torch calls int8 dynamic: it is taken for int8:int8 too, whose activations it
    rounds twice as coarsely as the scheme says.
    """
    found = _decide(layer, scheme)
    return found if isinstance(found, str) else ""


def kernel_for(layer: Layer, scheme: Scheme) -> KernelCase | None:
    """Return the kernel that runs `layer` in `scheme`, None where there is no real one."""
    found = _decide(layer, scheme)
    return found if isinstance(found, KernelCase) else None


class TorchCpu:
    """Kernels of torch on this processor with a fixed number of threads.

    A run calls the kernel several times, each time with other weights; runs rotate over weights
    as those of ONNX Runtime do. A call has the overhead of an operator that Python calls, some
    microseconds, as a layer of a network in torch has it; a run adds under 3 microseconds, shared
    by its calls. The input stays in place, the output
    is allocated in every call. Raises InvalidInputError (`no_engine`) where torch is built
    without the engine.
    """

    def __init__(
        self, *, num_threads: int = 1, network_weights: int = 2**23, seed: int = 0
    ) -> None:
        engines = torch.backends.quantized.supported_engines
        if ENGINE not in engines:
            raise InvalidInputError(
                "no_engine",
                f"local:{BACKEND} needs torch's quantized engine {ENGINE!r}, which this torch "
                f"lacks (it has {', '.join(engines) or 'none'}): use hardware='local'",
            )
        self.num_threads = checked_threads(num_threads)
        self.device = device_fingerprint(num_threads, "torch", ENGINE)
        self._network = NetworkSize.of(network_weights)
        self._seed = seed

    def schemes(self, layer: Layer) -> tuple[Scheme, ...]:
        """Return what is worth trying for a layer, none wider than its weights."""
        offered = map(parse_scheme, _DEFAULT.get(layer.kind, ("fp32",)))
        return tuple(
            scheme
            for scheme in offered
            if scheme.weights.bits * layer.num_weights <= 8 * layer.weight_bytes
            and not why_not(layer, scheme)
        )

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why nothing runs a layer in a scheme, "" where something does."""
        return why_not(layer, scheme)

    def case(self, layer: Layer, scheme: Scheme) -> KernelCase:
        """Return what is timed; raises InvalidInputError (`no_kernel`)."""
        case = kernel_for(layer, scheme)
        if case is None:
            raise InvalidInputError("no_kernel", why_not(layer, scheme))
        return self._network.within(case)

    def op(self, layer: Layer, scheme: Scheme) -> Op:
        """Return the kernel ready to run; up to 64 MB of weights, or one weight."""
        case, turns = self.case(layer, scheme), self._network.rotation(layer, scheme)
        generator = torch.Generator().manual_seed(self._seed)
        first = torch.randn(layer.weight_shape, generator=generator)
        x = kernel_input(layer, generator)
        kernels = [
            make_kernel(layer, scheme, first.roll(17 * i))  # other values, cheaply
            for i in range(turns.copies * turns.sets)
        ]
        sets = [kernels[i :: turns.sets] for i in range(turns.sets)]
        rotation = itertools.cycle(sets)

        def run() -> None:
            with _threads(self.num_threads), torch.inference_mode():
                for kernel in next(rotation):
                    kernel(x)

        return Op(case, run, turns.copies, turns.sets, turns.read_s)

    def reference(self) -> Op:
        """Return the kernel that others are compared with: a small fp32 product."""
        small = TorchCpu(num_threads=self.num_threads, network_weights=2**20, seed=self._seed)
        return small.op(REFERENCE, Scheme(FP32))


def kernel_input(layer: Layer, generator: torch.Generator) -> torch.Tensor:
    """Return standard normal inputs, or indices, of the shape that the kernel takes."""
    if layer.kind == "embedding":
        rows = (linear_rows(layer),)
        return torch.randint(0, layer.weight_shape[0], rows, generator=generator)
    linear = layer.kind == "linear"
    shape = (linear_rows(layer), layer.weight_shape[1]) if linear else layer.input_shape
    return torch.randn(shape, generator=generator)


def make_kernel(layer: Layer, scheme: Scheme, weight: torch.Tensor) -> Kernel:
    """Return the layer as a function of its input, on packed weights of its own.

    `scheme` must have a kernel.
    """
    if scheme == Scheme(FP32):
        return native_kernel(layer, weight.clone())
    with _engine(), _quiet():
        if scheme.weights.is_native:
            half = torch.ops.quantized.linear_prepack_fp16(weight, None)
            return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, half)
        packed = torch.ops.quantized.linear_prepack(_quantized(weight, scheme), None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True)


def _decide(layer: Layer, scheme: Scheme) -> KernelCase | str:
    if layer.kind not in _FP32:
        return f"no kernel of torch here for a layer of kind {layer.kind!r}"
    if not layer.input_shape:
        return f"layer {layer.name!r} is not called on the sample, so its shape is unknown"
    if scheme == Scheme(FP32):
        return KernelCase(BACKEND, f"aten::{_FP32[layer.kind]} fp32", shape_text(layer))
    weights, activations = scheme.weights, scheme.activations
    if activations == FP32:
        if str(scheme) == "fp16" and layer.kind == "linear":
            name = f"quantized::linear_dynamic_fp16 {ENGINE}"
            return KernelCase(BACKEND, name, shape_text(layer))
        return _weights_alone(layer, scheme)
    if layer.kind != "linear":
        return f"{scheme}: {layer.kind} runs in fp32 here; local has integer convolutions"
    if activations.symmetric:
        return f"{scheme}: {_NO_EVIDENCE['symmetric']}; write int8:int7"
    if (weights.family, weights.bits) != ("int", 8) or activations.bits not in (7, 8):
        return f"{scheme}: quantized::linear_dynamic takes 8-bit weights; use int8:int7"
    if isinstance(weights.granularity, PerGroup) or not weights.symmetric:
        return (
            f"{scheme}: quantized::linear_dynamic takes symmetric weights with one scale per "
            "channel or tensor; use int8:int7"
        )
    scales = "per tensor" if isinstance(weights.granularity, PerTensor) else "per channel"
    name = f"quantized::linear_dynamic {ENGINE} reduce_range s8 weights {scales}"
    return KernelCase(BACKEND, name, shape_text(layer))


def _weights_alone(layer: Layer, scheme: Scheme) -> str:
    family = scheme.weights.text("weights") if scheme.is_native else f"int{scheme.weights.bits}"
    if family not in _NO_EVIDENCE or (layer.kind != "linear" and not scheme.is_native):
        return f"{scheme}: no kernel of torch here quantizes the weights of {layer.kind} so"
    return f"{scheme}: {_NO_EVIDENCE[family].format(kind=layer.kind)}; it is not timed"


def native_kernel(layer: Layer, weight: torch.Tensor) -> Kernel:
    """Return the layer in the type of its weight, which is not copied."""
    if layer.kind == "linear":
        return lambda x: F.linear(x, weight)
    if layer.kind == "embedding":
        return lambda x: F.embedding(x, weight)
    conv = layer.convolution
    assert conv is not None, layer.name
    spans: dict[str, Any] = {
        "stride": conv.stride,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }
    if layer.kind == "conv_transpose2d":
        output = conv.output_padding
        return lambda x: F.conv_transpose2d(
            x, weight, padding=conv.padding, output_padding=output, **spans
        )
    function: Callable[..., torch.Tensor] = F.conv1d if layer.kind == "conv1d" else F.conv2d
    if not conv.padding_end:
        return lambda x: function(x, weight, padding=conv.padding, **spans)
    ends = zip(reversed(conv.padding), reversed(conv.padding_end), strict=True)
    sides = [side for pair in ends for side in pair]
    return lambda x: function(F.pad(x, sides), weight, **spans)


def _quantized(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return a symmetric signed 8-bit tensor, w ~ scale * code."""
    if isinstance(scheme.weights.granularity, PerTensor):
        scale = max(float(weight.abs().max()) / 127, 1e-12)
        return torch.quantize_per_tensor(weight, scale, 0, torch.qint8)
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    return torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)


@contextmanager
def _engine() -> Iterator[None]:
    """Pack weights for the engine; which one runs them is a part of the packed weights."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide that torch will drop its quantized tensors: they are packed here, and not kept."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated")
        yield


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == wanted:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
