"""The CUDA backend without a GPU: pretended events, and the arithmetic on the processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from hw_cost_models import get_kernels
from hw_cost_models.latency import MeasuredLatency
from hw_cost_models.measured import cuda
from hw_cost_models.measured.cuda import Cuda, Gpu, int4_operands, make_kernel
from hw_cost_models.measured.protocol import LEAST_ROUNDS, Stopwatch
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.layers import Layer
from tests.test_latency_kernels import CONVS, layer_of

LINEAR = layer_of("linear", (96, 256), (1, 32, 256))
FP32, BF16, INT8, INT4 = map(parse_scheme, ("fp32", "bf16", "int8:int8s", "int4g64a"))


@dataclass
class Device:
    """Launches are queued at once and done later: only events see how long they take."""

    host_ns: int = 0
    done_ms: float = 0.0
    waited: int = 0
    launched: list[float] = field(default_factory=list)

    def clock(self) -> int:
        self.host_ns += 1000  # a look at it takes a microsecond, whatever the device does
        return self.host_ns

    def launch(self, milliseconds: float) -> None:
        self.launched.append(milliseconds)
        self.done_ms += milliseconds


@dataclass
class FakeEvent:
    device: Device
    moment_ms: float | None = None
    is_known: bool = False

    def record(self) -> None:
        self.moment_ms, self.is_known = self.device.done_ms, False

    def synchronize(self) -> None:
        self.device.waited += 1
        self.is_known = True

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert end_event.is_known, "read before the device was waited for"
        assert self.moment_ms is not None
        assert end_event.moment_ms is not None
        return end_event.moment_ms - self.moment_ms


def gpu(device: Device, sm: tuple[int, int] = (8, 0)) -> Gpu:
    return Gpu("Pretended GPU", sm, "12.8", lambda: FakeEvent(device), place="cpu")


def test_times_are_those_of_events_and_not_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    takes_ms = {FP32: 0.5, BF16: 0.2, INT8: 0.125}

    def pretended(layer: Layer, scheme: object, weight: torch.Tensor) -> Callable[..., None]:
        return lambda x: device.launch(takes_ms[scheme])  # type: ignore[index]

    monkeypatch.setattr(cuda, "make_kernel", pretended)
    backend = Cuda(gpu=gpu(device), network_weights=2**20)
    ops = [backend.op(LINEAR, scheme) for scheme in takes_ms]
    watch = Stopwatch(clock=device.clock, budget_s=1e-3, min_rounds=LEAST_ROUNDS)
    found = watch.measure(ops, backend.reference(), backend.device)
    assert [latency.median_s for latency in found] == pytest.approx([0.5e-3, 0.2e-3, 0.125e-3])
    assert all(latency.low_s < latency.median_s < latency.high_s for latency in found)
    assert not any(latency.noisy for latency in found)
    assert {latency.device for latency in found} == {backend.device}
    assert device.waited * ops[0].runs == len(device.launched)  # every run was waited for


def test_weights_take_turns_and_no_time_is_added_for_memory() -> None:
    op = Cuda(gpu=gpu(Device()), network_weights=2**20).op(LINEAR, BF16)
    assert (op.runs, op.rotation, op.read_s) == (12, 4, 0.0)  # 43 of these weights
    assert op.returns_ns
    large = replace(layer_of("linear", (1024, 1024), (1, 512, 1024)), macs=2**29)
    op = Cuda(gpu=gpu(Device())).op(large, BF16)
    assert op.runs * op.rotation >= 8  # never the same weight again from a cache


def test_int8_is_the_exact_integer_product() -> None:
    x, weight = torch.randn(32, 256), torch.randn(96, 256)
    scale, scales = x.abs().max() / 127, weight.abs().amax(1, keepdim=True) / 127
    seen, stored = (x / scale).round() * scale, (weight / scales).round() * scales
    found = make_kernel(LINEAR, INT8, weight)(x)
    assert torch.allclose(found, seen @ stored.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("text", ["bf16", "fp16"])
def test_halves_round_weights_and_activations(text: str) -> None:
    x, weight = torch.randn(32, 256), torch.randn(96, 256)
    found = make_kernel(LINEAR, parse_scheme(text), weight)(x)
    assert found.dtype == torch.float32
    assert 1e-5 < float((found - x @ weight.T).norm() / (x @ weight.T).norm()) < 1e-2


def test_int4_operands_read_back_as_the_weight() -> None:
    weight = torch.randn(16, 128)
    packed, ranges = int4_operands(weight, 32)
    codes = torch.stack([packed >> 4, packed & 15], dim=2).reshape(16, 4, 32).float()
    scale, zero = ranges.float().transpose(0, 1).unbind(2)
    read = (codes - 8) * scale[..., None] + zero[..., None]
    assert (read.reshape(16, 128) - weight).abs().max() < 0.55 * scale.max()


@pytest.mark.parametrize(
    ("layer", "text", "sm", "says"),
    [
        (LINEAR, "int4g64a", (7, 5), "needs compute capability 8.0, this GPU has 7.5"),
        (LINEAR, "bf16", (7, 5), "needs compute capability 8.0"),
        (LINEAR, "int4g64", (8, 0), "zero points and groups, for example int4g64a"),
        (LINEAR, "int4a", (8, 0), "zero points and groups"),
        (LINEAR, "int8:int8", (8, 0), "no CUDA kernel here; it runs"),
        (LINEAR, "int8", (8, 0), "no CUDA kernel here; it runs"),
        (layer_of("linear", (8, 64), (1, 16, 64)), "int8:int8s", (8, 0), "more than 16 rows"),
        (layer_of("linear", (9, 64), (1, 32, 64)), "int8:int8s", (8, 0), "multiples of 8"),
        (layer_of("linear", (8, 64), (1, 32, 64)), "int4g64a", (8, 0), "128 (or the group) and 8"),
        (CONVS["plain"], "bf16", (8, 0), "conv2d runs in fp32 here"),
        (layer_of("linear", (8, 64), ()), "fp32", (8, 0), "not called on the sample"),
    ],
)
def test_what_has_no_kernel_has_a_reason(
    layer: Layer, text: str, sm: tuple[int, int], says: str
) -> None:
    backend = Cuda(gpu=gpu(Device(), sm))
    assert says in backend.why_not(layer, parse_scheme(text))
    with pytest.raises(InvalidInputError):
        backend.op(layer, parse_scheme(text))


def test_what_is_offered_depends_on_the_gpu() -> None:
    offered = {
        sm: [str(s) for s in Cuda(gpu=gpu(Device(), sm)).schemes(LINEAR)] for sm in ((7, 5), (8, 0))
    }
    assert offered == {
        (7, 5): ["fp32", "int8:int8s"],
        (8, 0): ["fp32", "bf16", "int8:int8s", "int4g128a", "int4g32a"],
    }
    assert [str(s) for s in Cuda(gpu=gpu(Device())).schemes(CONVS["plain"])] == ["fp32"]


def test_the_device_tells_gpu_library_and_cuda() -> None:
    one, other = Cuda(gpu=gpu(Device())), Cuda(gpu=gpu(Device(), (9, 0)))
    assert one.device.startswith("Pretended GPU (sm 8.0) of ")
    assert f"torch {torch.__version__} engine cuda 12.8" in one.device
    assert one.device != other.device


def test_without_a_gpu_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for make in (get_kernels, lambda text: MeasuredLatency(hardware=text)):
        with pytest.raises(InvalidInputError, match=r"torch\.cuda is not available here") as e:
            make("local:cuda")
        assert "\n" not in str(e.value)
