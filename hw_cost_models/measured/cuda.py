"""The CUDA backend: torch's kernels on an NVIDIA GPU, timed by events. Untested on hardware."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from hw_cost_models.measured.backend import REFERENCE, NetworkSize, checked_threads
from hw_cost_models.measured.capability import linear_rows, shape_text, why_no_integers
from hw_cost_models.measured.device import device_fingerprint
from hw_cost_models.measured.protocol import Op
from hw_cost_models.measured.torch_kernels import kernel_input, native_module
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, PerGroup, Scheme, parse_scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import Layer

BACKEND = "cuda"
Kernel = Callable[[torch.Tensor], torch.Tensor]
_DEFAULT = {"linear": ("fp32", "bf16", "int8:int8s", "int4g128a", "int4g32a")}
_KINDS = ("linear", "embedding", "conv1d", "conv2d", "conv_transpose2d")
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCKS = (32, 64, 128, 256)
_K_TILES = 8  # of 16 inputs, in the innermost axis of packed 4-bit weights
_LEAST_ROWS = 17  # of torch._int_mm on CUDA
_MACS_PER_S = 50e12  # only to guess how long a kernel takes


class Event(Protocol):
    """A moment on the device, as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None:
        """Take the moment when all that was launched before is done."""

    def synchronize(self) -> None:
        """Wait for it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return milliseconds from here to another event."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Where kernels run and what times them. `sm` is the compute capability, such as (8, 0)."""

    name: str
    sm: tuple[int, int]
    cuda: str
    event: Callable[[], Event]
    place: str = "cuda"

    @classmethod
    def here(cls) -> Gpu:
        """Return this machine's first; raises InvalidInputError (`no_cuda`) without one."""
        if not torch.cuda.is_available():
            raise InvalidInputError(
                "no_cuda",
                "local:cuda needs an NVIDIA GPU and a torch built for CUDA, and torch.cuda is not "
                "available here: use hardware='local' or a model such as 'roofline:H100'",
            )
        return cls(
            name=torch.cuda.get_device_name(),
            sm=torch.cuda.get_device_capability(),
            cuda=str(torch.version.cuda),
            event=partial(torch.cuda.Event, enable_timing=True),
        )


class Cuda:
    """Kernels of torch on a GPU. **Untested on hardware**: tests run it with pretended events.

    fp32: linear, embedding and convolutions of torch, without TF32 unless torch is told so.
    bf16, fp16, linear: weights and activations in that type, and the change of type before and
    after. int8:int8s, linear, weights per channel: activations are quantized at run time with
    one scale, torch._int_mm, rescaled. Unlike torchao's compiled form this is several kernels.
    int4gNa, linear: torch._weight_int4pack_mm (tinygemm) with activations in bf16.
    fp8 (torch._scaled_mm) is not here because no scheme stands for it.

    A run lies between two events: what they count holds the gaps between launches where a
    kernel is shorter than its launch, as a network in torch without CUDA graphs has them.
    Nothing is added to an interval for waiting for memory, whose drift was found on processors.
    """

    def __init__(
        self,
        *,
        num_threads: int = 1,
        network_weights: int = 2**23,
        seed: int = 0,
        gpu: Gpu | None = None,
    ) -> None:
        self._gpu = gpu or Gpu.here()
        host = device_fingerprint(
            checked_threads(num_threads), "torch", engine=f"cuda {self._gpu.cuda}"
        )
        self.device = f"{self._gpu.name} (sm {'.'.join(map(str, self._gpu.sm))}) of {host}"
        self._num_threads = num_threads
        self._network = NetworkSize.of(network_weights)
        self._seed = seed

    def schemes(self, layer: Layer) -> tuple[Scheme, ...]:
        """Return what is worth trying for a layer, none wider than its weights."""
        return tuple(
            scheme
            for scheme in map(parse_scheme, _DEFAULT.get(layer.kind, ("fp32",)))
            if scheme.weights.bits * layer.num_weights <= 8 * layer.weight_bytes
            and not self.why_not(layer, scheme)
        )

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why nothing runs a layer in a scheme, "" where something does."""
        found = _decide(layer, scheme, self._gpu.sm)
        return found if isinstance(found, str) else ""

    def case(self, layer: Layer, scheme: Scheme) -> KernelCase:
        """Return what is timed; raises InvalidInputError (`no_kernel`)."""
        found = _decide(layer, scheme, self._gpu.sm)
        if isinstance(found, str):
            raise InvalidInputError("no_kernel", found)
        return self._network.within(found)

    def op(self, layer: Layer, scheme: Scheme) -> Op:
        """Return the kernel ready to run, with up to 64 MB of weights, or one weight."""
        case = self.case(layer, scheme)
        turns = self._network.rotation(layer, scheme, bytes_per_s=math.inf, macs_per_s=_MACS_PER_S)
        generator = torch.Generator().manual_seed(self._seed)
        first = torch.randn(layer.weight_shape, generator=generator)
        x = kernel_input(layer, generator).to(self._gpu.place)
        kernels = [
            make_kernel(layer, scheme, first.roll(17 * i).to(self._gpu.place))
            for i in range(turns.copies * turns.sets)
        ]
        rotation = itertools.cycle([kernels[i :: turns.sets] for i in range(turns.sets)])
        start, end = self._gpu.event(), self._gpu.event()

        def timed() -> float:
            with torch.inference_mode():
                start.record()
                for kernel in next(rotation):
                    kernel(x)
                end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e6

        return Op(case, timed, turns.copies, turns.sets, turns.read_s, returns_ns=True)

    def reference(self) -> Op:
        """Return the kernel that others are compared with: a small fp32 product."""
        small = Cuda(
            num_threads=self._num_threads, network_weights=2**20, seed=self._seed, gpu=self._gpu
        )
        return small.op(REFERENCE, Scheme(FP32))


def _decide(layer: Layer, scheme: Scheme, sm: tuple[int, int]) -> KernelCase | str:
    if layer.kind not in _KINDS:
        return f"no CUDA kernel here for a layer of kind {layer.kind!r}"
    if not layer.input_shape:
        return f"layer {layer.name!r} is not called on the sample, so its shape is unknown"
    scheme = scheme.as_stored
    if not_integers := why_no_integers(scheme):
        return f"{scheme}: no CUDA kernel here for {not_integers}"
    if scheme == Scheme(FP32):
        return KernelCase(BACKEND, f"aten::{layer.kind} fp32", shape_text(layer))
    if layer.kind != "linear":
        return f"{scheme}: {layer.kind} runs in fp32 here"
    weights, (outputs, inputs) = scheme.weights, layer.weight_shape
    aligned = f"{scheme}: inputs and outputs must be multiples of"
    needs_ampere = f"{scheme}: needs compute capability 8.0, this GPU has {'.'.join(map(str, sm))}"
    if scheme.is_native:
        if weights.family == "bf16" and sm < (8, 0):
            return needs_ampere
        name = f"aten::linear {weights.family}, cast before and after"
    elif str(scheme) == "int8:int8s":
        if linear_rows(layer) < _LEAST_ROWS:
            return f"{scheme}: torch._int_mm takes more than 16 rows, got {linear_rows(layer)}"
        if inputs % 8 or outputs % 8:
            return f"{aligned} 8, got {inputs} and {outputs}"
        name = "quantize, aten::_int_mm, rescale"
    elif scheme.activations == FP32 and weights.family == "int" and weights.bits == 4:
        fmt = weights.granularity
        if not isinstance(fmt, PerGroup) or fmt.size not in _BLOCKS or weights.symmetric:
            return f"{scheme}: 4-bit weights need zero points and groups, for example int4g64a"
        if sm < (8, 0):
            return needs_ampere
        if outputs % 8 or inputs % (16 * _K_TILES) or inputs % fmt.size:
            return f"{aligned} 128 (or the group) and 8, got {inputs} and {outputs}"
        name = f"aten::_weight_int4pack_mm block={fmt.size} bf16, cast before and after"
    else:
        return f"{scheme}: no CUDA kernel here; it runs fp32, bf16, fp16, int8:int8s and int4gNa"
    return KernelCase(BACKEND, name, shape_text(layer))


def make_kernel(layer: Layer, scheme: Scheme, weight: torch.Tensor) -> Kernel:
    """Return the layer as a function of its fp32 input, on a weight of its own.

    `scheme` must have a kernel; the weight is where the kernel shall run.
    """
    if scheme == Scheme(FP32):
        return native_module(layer, weight.clone())
    if scheme.is_native:
        dtype = _HALVES[scheme.weights.family]
        half = weight.to(dtype)
        return lambda x: F.linear(x.to(dtype), half).to(x.dtype)
    if scheme.weights.bits == 8:
        return _int8(weight)
    assert isinstance(scheme.weights.granularity, PerGroup)
    return _int4(weight, scheme.weights.granularity.size)


def _int8(weight: torch.Tensor) -> Kernel:
    scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
    codes = (weight / scales[:, None]).round().to(torch.int8).t()  # columns, as cuBLAS wants them

    def kernel(x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax() / 127).clamp_min(1e-12)
        rounded = (x / scale).round().clamp(-128, 127).to(torch.int8)
        return torch._int_mm(rounded, codes) * (scale * scales)

    return kernel


def _int4(weight: torch.Tensor, block: int) -> Kernel:
    """w ~ (code - 8) * scale + zero, in bf16, with scale and zero of each block side by side."""
    packed, ranges = int4_operands(weight, block)
    tiles = torch._convert_weight_to_int4pack(packed, _K_TILES)
    return lambda x: torch._weight_int4pack_mm(x.bfloat16(), tiles, block, ranges).to(x.dtype)


def int4_operands(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two codes a byte, the first in its high bits, and (blocks, rows, 2) ranges."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // block, block)
    low, high = blocks.amin(2), blocks.amax(2)
    scales = ((high - low) / 15).clamp_min(1e-6)
    codes = ((blocks - low[..., None]) / scales[..., None]).round().clamp(0, 15)
    flat = codes.to(torch.uint8).reshape(rows, columns)
    ranges = torch.stack([scales, low + 8 * scales], dim=2).transpose(0, 1).contiguous()
    return flat[:, ::2] << 4 | flat[:, 1::2], ranges.bfloat16()
