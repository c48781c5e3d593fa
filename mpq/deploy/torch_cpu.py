"""torch on this processor as a target: one TorchScript file, which loads without this library."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hw_cost_models.measured.protocol import Op
from hw_cost_models.measured.torch_capability import BACKEND, why_not
from hw_cost_models.measured.torch_cpu import TorchCpu, threads
from hw_cost_models.measured.torch_kernels import OUTPUT, packed_kernel
from hw_cost_models.measured.torch_modules import REDUCED_BITS, engine, quiet
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme
from mpq.core.layers import LayerGraph, LayerName
from mpq.deploy.network import FAITHFUL, relative
from mpq.deploy.placed import Placed, is_static, place, writes_codes
from mpq.deploy.rounding import as_kernels
from mpq.deploy.served import Served, of_another_size
from mpq.deploy.target import NUM_THREADS, Array
from mpq.nn.batches import Batch, call
from mpq.nn.calibrate import output_ranges
from mpq.nn.patch import evaluating, quantized
from mpq.nn.quantizers import StoredWeight, WeightQuantizer, fake_quantize_activation
from mpq.nn.weights import weight_of

_RUNTIME = "torch"
_OUTSIDE = "read outside of its layers too, where no kernel can take its place: pin it to fp32"


@dataclass(frozen=True)
class _Loaded:
    """A network that was stored and loaded back."""

    model: nn.Module
    serialized: bytes

    @cached_property
    def _module(self) -> Any:
        with engine(), quiet():
            loaded: Any = torch.jit.load(io.BytesIO(self.serialized))  # type: ignore[no-untyped-call]
        return loaded

    def output(self, batch: Batch) -> Array:
        found: Array = self._run(Served(self.model, batch).tensors).numpy()
        return found

    def runner(self, batch: Batch) -> Callable[[], object]:
        tensors = Served(self.model, batch).tensors
        return lambda: self._run(tensors)

    def _run(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with threads(NUM_THREADS), torch.inference_mode():
            found: torch.Tensor = self._module(*tensors)
            return found


@dataclass(frozen=True)
class _Written(_Loaded):
    placed: Mapping[LayerName, Placed]
    quantizer: WeightQuantizer

    @property
    def stored_bytes(self) -> int:
        return stored_bytes(self.serialized)

    def as_kernels(self) -> AbstractContextManager[nn.Module]:
        return as_kernels(
            self.model,
            self.placed,
            self.quantizer,
            input_rounding=_input_rounding,
            output_rounding=_output_rounding,
        )


@dataclass(frozen=True, kw_only=True)
class TorchNetwork:
    """A network that TorchScript can trace, and its fp32 form, which computes as torch does."""

    model: nn.Module
    graph: LayerGraph
    sample: Batch
    fp32: _Loaded
    any_batch: bool

    @classmethod
    def export(cls, model: nn.Module, graph: LayerGraph, sample: Batch) -> TorchNetwork:
        """Trace the network on the sample.

        Raises InvalidInputError (`no_torchscript`) where it cannot be traced, or returns something
        else than torch.
        """
        loaded = _Loaded(model, traced(model, sample, {}))
        off = _difference(loaded, sample)
        if not off <= FAITHFUL:
            raise InvalidInputError(
                "no_torchscript",
                f"the traced network is not the network: its outputs differ by {off:.2g}",
            )
        try:
            any_batch = _difference(loaded, of_another_size(sample)) <= FAITHFUL
        except Exception:  # whatever a trace does that holds the sample's shape
            any_batch = False
        return cls(model=model, graph=graph, sample=sample, fp32=loaded, any_batch=any_batch)

    def neighbours(self) -> Sequence[tuple[LayerName, LayerName]]:
        """Return none: every kernel reads and writes numbers."""
        return ()

    def mixed(
        self,
        schemes: Mapping[LayerName, Scheme],
        quantizer: WeightQuantizer,
        calibration: Sequence[Batch],
    ) -> _Written:
        """Return the network in which each layer's kernel runs its scheme; fp32 layers stay.

        Ranges of the outputs of integer convolutions come from the calibration batches. Raises
        InvalidInputError naming the layer (`no_kernel`, `no_range`, `no_node`).
        """
        layers, limits = self.graph.by_name, self.graph.input_ranges
        chosen = {name: scheme for name, scheme in schemes.items() if scheme != Scheme(FP32)}
        static = [name for name, scheme in chosen.items() if writes_codes(layers[name], scheme)]
        ranges: Mapping[LayerName, tuple[float, float]] = {}
        if static and calibration:
            with quantized(self.model, schemes, quantizer=quantizer, limits=limits):
                ranges = output_ranges(self.model, static, calibration)
        placed = place(
            self.model, self.graph, chosen, quantizer, ranges, why_not=why_not, runtime=_RUNTIME
        )
        serialized = traced(self.model, self.sample, kernels(placed))
        return _Written(self.model, serialized, placed, quantizer)


class TorchCpuTarget:
    """TorchScript with the kernels of torch's x86 quantized engine, on one thread."""

    title, backend = "TorchScript", BACKEND

    def __init__(self) -> None:
        self._kernels = TorchCpu(num_threads=NUM_THREADS)

    @property
    def device(self) -> str:
        """The fingerprint of this machine and the library."""
        return self._kernels.device

    def export(self, model: nn.Module, graph: LayerGraph, sample: Batch) -> TorchNetwork:
        """Return the network as TorchScript; raises InvalidInputError where it cannot be traced."""
        return TorchNetwork.export(model, graph, sample)

    def reference(self) -> Op:
        """Return a small fp32 product."""
        return self._kernels.reference()


def kernels(placed: Mapping[LayerName, Placed]) -> dict[LayerName, nn.Module]:
    """Return what stands in the place of each layer; a weight that several share is stored once."""
    tied = Counter(p.layer.weight_id for p in placed.values())
    made: dict[Any, nn.Module] = {}
    found: dict[LayerName, nn.Module] = {}
    for name, p in placed.items():
        bias = None if p.bias is None else torch.from_numpy(p.bias)
        # Packed weights hold the bias, so that of layers which share a weight is added after it.
        shares = p.layer.kind == "linear" and not p.scheme.activations.static
        after = tied[p.layer.weight_id] > 1 and shares
        key = p.layer.weight_id if after else name
        if key not in made:
            made[key] = _packed(p, None if after else bias)
        found[name] = _Kernel(name, made[key], bias if after else None)
    return found


def _packed(placed: Placed, bias: torch.Tensor | None) -> nn.Module:
    limits = None
    if placed.input_limits is not None:
        limits = placed.input_limits, placed.output_limits
    stored = placed.weight
    if isinstance(stored, StoredWeight):
        codes = stored.codes.to(torch.int8).reshape(placed.layer.weight_shape)
        scales = stored.scales.reshape(-1)
        kernel = packed_kernel(placed.layer, placed.scheme, codes, scales, bias, limits)
    else:
        kernel = packed_kernel(placed.layer, placed.scheme, torch.from_numpy(stored), bias=bias)
    with quiet():
        return torch.jit.script(kernel).eval()


def traced(model: nn.Module, sample: Batch, kernels: Mapping[LayerName, nn.Module]) -> bytes:
    """Return the network as TorchScript, some layers replaced; the model is only borrowed.

    Weights that are replaced are not stored. Raises InvalidInputError (`no_torchscript`) where the
    network cannot be traced, (`no_node`) where it reads a replaced weight by itself.
    """
    served, stream = Served(model, sample), io.BytesIO()
    with ExitStack() as stack:
        for context in (evaluating(model), torch.no_grad(), engine(), _quiet()):
            stack.enter_context(context)
        stack.enter_context(_replaced(served, kernels))
        try:
            found = torch.jit.trace(  # type: ignore[no-untyped-call]
                served, served.tensors, check_trace=False
            )
            torch.jit.save(found, stream)
        except InvalidInputError:
            raise
        except Exception as error:  # of many kinds: whatever a network does while it is traced
            lines = str(error).strip().splitlines() or [repr(error)]
            raise InvalidInputError(
                "no_torchscript", f"torch cannot trace this network: {lines[0]}"
            ) from error
    return _without_sources(stream)


def _without_sources(stream: io.BytesIO) -> bytes:
    """Leave out which line of which local file an operator came from, up to a third of a file."""
    slim = io.BytesIO()
    with zipfile.ZipFile(stream) as whole, zipfile.ZipFile(slim, "w") as kept:
        for entry in whole.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                kept.writestr(entry, whole.read(entry))
    return slim.getvalue()


class _Kernel(nn.Module):
    """Stands where a layer was."""

    def __init__(self, name: LayerName, kernel: nn.Module, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._name, self.kernel = name, kernel
        self.register_buffer("added", bias)

    def forward(self, x: torch.Tensor) -> Any:
        return self.kernel(x) if self.added is None else self.kernel(x) + self.added

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise InvalidInputError("no_node", f"the {name} of layer {self._name!r} is {_OUTSIDE}")
        return super().__getattr__(name)


@contextmanager
def _replaced(served: Served, kernels: Mapping[LayerName, nn.Module]) -> Iterator[None]:
    """Put kernels in the place of layers, wherever those are.

    Raises InvalidInputError (`no_node`) where another module has a weight that is replaced.
    """
    layers = {name: served.model.get_submodule(name) for name in kernels}
    others = {id(layers[name]): kernel for name, kernel in kernels.items()}
    weights = {id(weight_of(module)): name for name, module in layers.items()}
    for module in served.modules():
        for parameter in module._parameters.values():
            if id(module) not in others and id(parameter) in weights:
                name = weights[id(parameter)]
                raise InvalidInputError("no_node", f"the weight of layer {name!r} is {_OUTSIDE}")
    with ExitStack() as restore:
        for module in list(served.modules()):
            for key, child in list(module._modules.items()):
                if id(child) in others:
                    restore.callback(module._modules.__setitem__, key, child)
                    module._modules[key] = others[id(child)]
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what tracing says of Python values, and what a network says when it is looked into."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def stored_bytes(serialized: bytes) -> int:
    """Return the bytes of all tensors that a TorchScript file stores."""
    with zipfile.ZipFile(io.BytesIO(serialized)) as archive:
        parts = [(entry.filename.split("/"), entry.file_size) for entry in archive.infolist()]
    return sum(size for path, size in parts if path[1:-1] in (["data"], ["constants"]))


def _difference(loaded: _Loaded, batch: Batch) -> float:
    with evaluating(loaded.model), torch.no_grad():
        expected = call(loaded.model, batch).numpy()
    return relative(loaded.output(batch), expected)


def _input_rounding(placed: Placed) -> Callable[..., Any]:
    """linear_dynamic rounds to 7 bits, with one range for all samples of a batch."""
    fmt = placed.scheme.activations

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values, *rest = args
        if is_static(placed.layer, placed.scheme):
            values = fake_quantize_activation(values, fmt, placed.input_limits)
        elif not fmt.is_native:
            reduced = replace(fmt, bits=REDUCED_BITS)
            values = fake_quantize_activation(values[None], reduced)[0]
        return (values, *rest)

    return hook


def _output_rounding(placed: Placed) -> Callable[..., Any]:
    """Integer convolutions round their outputs, biases included, to 8 bits of a static range."""

    def hook(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return fake_quantize_activation(output, OUTPUT, placed.output_limits)

    return hook
