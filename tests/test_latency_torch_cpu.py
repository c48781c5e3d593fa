"""Real kernels of torch on this processor: right numbers, and what emulates is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from hw_cost_models import get_cost_model, get_kernels, is_local
from hw_cost_models.latency import MeasuredLatency
from hw_cost_models.measured import torch_cpu
from hw_cost_models.measured.protocol import Stopwatch
from hw_cost_models.measured.torch_capability import kernel_for, saturates, why_not
from hw_cost_models.measured.torch_cpu import TorchCpu, _Turn
from hw_cost_models.measured.torch_kernels import make_kernel, packed_kernel
from hw_cost_models.measured.torch_modules import Steps, quiet
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.latency import KernelLatency
from mpq.core.layers import Convolution, Layer
from mpq.core.tables import Cells
from mpq.nn.graph import build_graph
from mpq.nn.quantizers import fake_quantize_activation
from tests.test_latency_kernels import (
    CONVS,
    LINEAR,
    OF_KIND,
    WORDS,
    layer_of,
    reference,
    worst,
)
from tests.test_latency_table import FP32, CountingStopwatch, network

pytestmark = pytest.mark.skipif(
    torch_cpu.ENGINE not in torch.backends.quantized.supported_engines,
    reason="torch without the x86 quantized engine",
)
INT7 = parse_scheme("int8:int7")


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def quantized_dynamically(x: np.ndarray, bits: int) -> np.ndarray:
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("text", ["int8:int7", "int8t:int7", "int8:int8"])
def test_dynamic_int8_computes_the_exact_product_of_7_bit_activations(text: str) -> None:
    x, weight = gaussian(9, 256), gaussian(96, 256)
    limit = weight.abs().amax(dim=None if "t" in text[4] else 1, keepdim=True)
    codes = torch.round(weight / (limit / 127)).numpy()
    seen = quantized_dynamically(x.numpy(), 7)
    found = make_kernel(LINEAR, parse_scheme(text), weight)(x).numpy()
    assert worst(found, seen @ (codes * (limit / 127).numpy()).T) < 1e-5
    eight = quantized_dynamically(x.numpy(), 8) @ (codes * (limit / 127).numpy()).T
    assert worst(found, eight) > 1e-4


def test_dynamic_int8_does_not_saturate() -> None:
    """All 8 bits of activations and signed weights would, on processors without VNNI."""
    x, weight = 3 + 0.01 * gaussian(9, 256).abs(), 2 + 0.01 * gaussian(96, 256).abs()
    found = make_kernel(LINEAR, INT7, weight)(x)
    assert worst(found.numpy(), (x @ weight.T).numpy()) < 0.01


@pytest.mark.parametrize("text", ["int8:int7static", "int8t:int7sstatic", "int8:int8static"])
def test_static_products_are_those_of_integers(text: str) -> None:
    """Values beyond the range stay in it; 8 bits are refused where they would saturate."""
    scheme, layer = parse_scheme(text), LINEAR
    if scheme.activations.bits == 8 and saturates(layer):
        assert "write int8:int7static" in why_not(layer, scheme)
        return
    x, weight = 2 * gaussian(9, 256), gaussian(96, 256)
    limit = weight.abs().amax(dim=None if "t" in text[4] else 1, keepdim=True)
    codes = torch.round(weight / (limit / 127)).numpy() * (limit / 127).numpy()
    seen = fake_quantize_activation(x, scheme.activations, (-4.0, 4.0)).numpy()
    found = make_kernel(layer, scheme, weight)(x).numpy()
    assert worst(found, seen @ codes.T) < 1e-5
    kernel = kernel_for(layer, scheme)
    assert kernel is not None
    assert "q_dq_qweight_dq_output_fp32" in kernel.kernel


def test_half_weights_meet_fp32_activations() -> None:
    x, weight = gaussian(9, 256), gaussian(96, 256)
    found = make_kernel(LINEAR, parse_scheme("fp16"), weight)(x).numpy()
    assert worst(found, (x @ weight.half().float().T).numpy()) < 1e-5
    assert worst(found, (x @ weight.T).numpy()) > 1e-5


STATIC = {name: layer for name, layer in CONVS.items() if layer.kind != "conv_transpose2d"}
STATIC["ends"] = replace(
    layer_of("conv2d", (8, 4, 4, 4), (2, 4, 10, 10), padding=2),
    convolution=Convolution(
        kernel=(4, 4), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_end=(2, 2)
    ),
)
LIMITS = (-3.0, 4.0), (-30.0, 20.0)
VNNI = not saturates(CONVS["plain"])
EIGHT = "int8:int8" if VNNI else "int8:int7"


def integer_convolution(
    layer: Layer, text: str, codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor
) -> np.ndarray:
    """The definition in float64: codes of the input times codes of the weight, rounded again."""
    scheme, conv = parse_scheme(text), layer.convolution
    assert conv is not None
    low, high = LIMITS[0]
    top = 2**scheme.activations.bits - 1
    scale, zero = (high - low) / top, np.rint(-low / ((high - low) / top))
    if scheme.activations.symmetric:
        scale, zero = max(-low, high) / (top // 2), (top + 1) // 2
    seen = np.clip(np.rint(x.double().numpy() / scale) + zero, 0, top) - zero
    ends = conv.padding_end or conv.padding
    sides = [
        side for pair in zip(reversed(conv.padding), reversed(ends), strict=True) for side in pair
    ]
    padded = torch.nn.functional.pad(torch.from_numpy(seen), sides)
    function = torch.nn.functional.conv1d if len(conv.kernel) == 1 else torch.nn.functional.conv2d
    spans = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    sums = function(padded, codes.double(), **spans).numpy() * scale
    channels = (-1,) + (1,) * len(conv.kernel)
    product = sums * scales.double().numpy().reshape(channels)
    low, high = LIMITS[1]
    step = (high - low) / 255
    zero = np.rint(-low / step)
    return (np.clip(np.rint(product / step) + zero, 0, 255) - zero) * step


@pytest.mark.parametrize(
    "text", ["int8:int7", "int8t:int7", "int8:int7s", "int8:int8", "int8:int8s"]
)
@pytest.mark.parametrize("name", STATIC)
def test_static_convolutions_are_those_of_integers(name: str, text: str) -> None:
    """Equal but where a sum is in the middle of two output codes; some inputs are clipped."""
    layer, scheme = STATIC[name], parse_scheme(text)
    if why_not(layer, scheme):
        pytest.skip("saturates on this processor")
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(-128, 128, layer.weight_shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(1 if "t" in text[4] else len(codes), generator=generator) / 256
    x = 2 * gaussian(*layer.input_shape)
    kernel = packed_kernel(layer, scheme, codes, scales, limits=LIMITS)
    found = kernel(x)
    assert found.is_contiguous()
    expected = integer_convolution(layer, text, codes, scales, x)
    step = (LIMITS[1][1] - LIMITS[1][0]) / 255
    off = np.abs(found.numpy() - expected)
    assert off.max() < 1.01 * step
    assert (off > 0.01 * step).mean() < 0.01


def test_a_bias_is_added_before_the_output_is_rounded() -> None:
    layer, bias = CONVS["plain"], torch.linspace(-4, 4, 16)
    codes, scales = torch.zeros(layer.weight_shape, dtype=torch.int8), torch.ones(16)
    kernel = packed_kernel(layer, INT7, codes, scales, bias, LIMITS)
    found = kernel(gaussian(*layer.input_shape))
    step = (LIMITS[1][1] - LIMITS[1][0]) / 255
    assert float((found[0, :, 0, 0] - bias).abs().max()) <= step / 2 + 1e-5


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_steps_are_those_of_the_search(bits: int, symmetric: bool) -> None:
    fmt = replace(parse_scheme("int8:int8").activations, bits=bits, symmetric=symmetric)
    x = 3 * gaussian(1000)
    for limits in ((-1.0, 2.0), (0.0, 3.0), (-2.5, 0.0), (0.0, 0.0)):
        steps = Steps.over(limits, fmt)
        codes = np.clip(np.rint(x.numpy() / np.float32(steps.scale)) + steps.zero, 0, steps.top)
        found = (codes - steps.zero) * np.float32(steps.scale)
        assert np.allclose(found, fake_quantize_activation(x, fmt, limits), atol=1e-6), limits


SATURATING = """
import os, sys
import hw_cost_models.measured.torch_modules as modules, torch
modules.ENGINE = "fbgemm"
import hw_cost_models.measured.torch_capability as capability
capability.ENGINE = "fbgemm"
from mpq.core.formats import parse_scheme
from tests.test_latency_kernels import CONVS
layer = CONVS[sys.argv[1]]
print(capability.saturates(layer))
print([str(scheme) for scheme in capability.default_schemes(layer)])
print(capability.why_not(layer, parse_scheme("int8:int8")))
"""


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no FBGEMM")
@pytest.mark.parametrize("name", ["plain", "stride", "depthwise", "sequence"])
def test_a_processor_that_saturates_is_found_out_and_gets_seven_bits(name: str) -> None:
    """FBGEMM told to do without VNNI is what torch runs on a processor that has none."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SATURATING, name],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"},
    )
    saturated, offered, reason = found.stdout.strip().splitlines()
    assert (saturated, offered) == ("True", "['fp32', 'int8:int7']")
    assert "overflows on this processor" in reason
    assert reason.endswith("write int8:int7")


@pytest.mark.parametrize("name", STATIC)
def test_what_is_taken_never_saturates(name: str) -> None:
    """The largest activations and weights: every sum is right, whichever instructions run it."""
    layer = STATIC[name]
    for text in ("int8:int7", "int8:int8"):
        scheme = parse_scheme(text)
        if why_not(layer, scheme):
            continue
        codes = torch.full(layer.weight_shape, 127, dtype=torch.int8)
        full = 127 * float(np.prod(layer.weight_shape[1:]))  # activations of 1
        limits = (0.0, 1.0), (0.0, full)
        kernel = packed_kernel(layer, scheme, codes, torch.ones(len(codes)), limits=limits)
        found = kernel(torch.ones(layer.input_shape))
        assert float(found.max()) == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("name", CONVS)
def test_fp32_convolutions(name: str) -> None:
    layer = CONVS[name]
    x, weight = gaussian(*layer.input_shape), gaussian(*layer.weight_shape)
    found = make_kernel(layer, FP32, weight)(x).numpy()
    assert worst(found, reference(layer, x.numpy(), weight.numpy())) < 1e-5


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch: it copies the input
def test_an_even_kernel_that_keeps_the_size_runs() -> None:
    module = torch.nn.Conv2d(4, 8, (4, 3), padding="same", bias=False)
    x = gaussian(1, 4, 9, 9)
    layer = build_graph(torch.nn.Sequential(module), x).layers[0]
    with torch.no_grad():
        assert torch.allclose(make_kernel(layer, FP32, module.weight)(x), module(x), atol=1e-5)


def test_embeddings_are_looked_up() -> None:
    indices, weight = torch.tensor([3, 0, 49]), gaussian(50, 64)
    assert torch.equal(make_kernel(WORDS, FP32, weight)(indices), weight[indices])


NO_KERNEL = {
    ("linear", "bf16"): "linear in bf16 rounds activations too, and only emulates bf16 without",
    ("linear", "int8"): "torch._weight_int8pack_mm is a reference loop",
    ("linear", "int8g64"): "torch._weight_int8pack_mm is a reference loop",
    ("linear", "int4g64"): "torch._weight_int4pack_mm_for_cpu and torch._dyn_quant_matmul_4bit are",
    ("linear", "int2g32"): "no kernel of torch here quantizes the weights of linear so",
    ("linear", "int8:int8s"): "torch._int_mm quantizes no activations and is a reference loop",
    ("linear", "int4:int8"): "8-bit weights and 7- or 8-bit dynamic activations; use int8:int7",
    ("linear", "int8:int4"): "8-bit weights and 7- or 8-bit dynamic activations; use int8:int7",
    ("linear", "fp32:int8"): "8-bit weights and 7- or 8-bit dynamic activations; use int8:int7",
    ("linear", "int8g64:int8"): "one scale per channel or tensor",
    ("linear", "int8a:int8"): "symmetric weights",
    ("conv2d", "int4:int8"): "quantized::conv2d takes 8-bit weights and 7- or 8-bit activations",
    ("conv2d", "int8g4:int7"): "one scale per channel or tensor",
    ("conv2d", "int8a:int7"): "quantized::conv2d takes symmetric weights",
    ("conv_transpose2d", "int8:int7"): "no integer kernel of torch here for conv_transpose2d",
    ("embedding", "int8:int7"): "no integer kernel of torch here for embedding",
    ("conv2d", "fp16"): "torch.nn.functional.conv2d in fp16 rounds activations too",
    ("conv2d", "int8"): "quantizes the weights of conv2d so",
    ("embedding", "int8g64"): "quantizes the weights of embedding so",
}


@pytest.mark.parametrize(("kind", "text"), NO_KERNEL)
def test_what_emulates_has_a_reason_and_no_time(kind: str, text: str) -> None:
    layer, scheme = OF_KIND[kind], parse_scheme(text)
    assert kernel_for(layer, scheme) is None
    assert NO_KERNEL[kind, text] in why_not(layer, scheme)
    with pytest.raises(InvalidInputError) as caught:
        TorchCpu().op(layer, scheme)
    assert "\n" not in str(caught.value)


def test_what_is_offered_has_kernels() -> None:
    backend = TorchCpu()
    offered = {kind: [str(s) for s in backend.schemes(layer)] for kind, layer in OF_KIND.items()}
    assert offered == {
        "linear": ["fp32", "fp16", "int8:int7"],
        "conv2d": ["fp32", EIGHT],
        "conv_transpose2d": ["fp32"],
        "embedding": ["fp32"],
    }


@pytest.mark.parametrize(
    ("text", "network_weights", "weights"),
    [("fp32", 1, 12), ("int8:int7", 32 * 96 * 256, 43), ("fp16", 2**40, 128)],
)
def test_an_op_rotates_over_the_weights_of_a_network(
    text: str, network_weights: int, weights: int
) -> None:
    op = TorchCpu(network_weights=network_weights).op(LINEAR, parse_scheme(text))
    assert op.runs == 12
    assert op.rotation == -(-weights // 12)
    for _ in range(op.rotation + 1):
        op.run()


def test_a_run_calls_every_copy_once_a_turn_with_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Recorded(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.number = len(made)
            made.append(weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append((self.number, torch.get_num_threads()))
            return x

    made: list[torch.Tensor] = []
    called: list[tuple[int, int]] = []
    monkeypatch.setattr(torch_cpu, "make_kernel", lambda layer, scheme, weight: Recorded(weight))
    monkeypatch.setattr(torch.jit, "script", lambda module: module)
    before = torch.get_num_threads()
    op = TorchCpu(num_threads=before + 1, network_weights=2**20).op(LINEAR, FP32)
    for _ in range(op.rotation):
        op.run()
    assert sorted(called) == [(i, before + 1) for i in range(op.runs * op.rotation)]
    assert torch.get_num_threads() == before
    assert not any(torch.equal(made[0], other) for other in made[1:])


def test_no_kernel_of_a_run_is_dropped_as_unused() -> None:
    """TorchScript drops what nobody reads."""
    x = torch.randn(64, 256)
    for scheme in (FP32, INT7):
        weights = [gaussian(96, 256).roll(i) for i in range(3)]
        with quiet():
            turn = torch.jit.script(_Turn([make_kernel(LINEAR, scheme, w) for w in weights]))
        with torch.inference_mode():
            for _ in range(3):
                turn(x)
            operators = [node.kind() for node in turn.graph_for(x).nodes()]
        assert int(turn(x)) == 3 * 64 * 96
        assert sum(kind in ("aten::linear", "quantized::linear_dynamic") for kind in operators) == 3


def test_torch_is_left_as_it_was_and_says_nothing() -> None:
    engine, threads = torch.backends.quantized.engine, torch.get_num_threads()
    torch.backends.quantized.engine = "qnnpack"
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not only the first time
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            op = TorchCpu(network_weights=1).op(LINEAR, INT7)
            op.run()
        assert torch.backends.quantized.engine == "qnnpack"
    finally:
        torch.set_warn_always(always)
        torch.backends.quantized.engine = engine
    assert [str(w.message) for w in caught] == []
    assert torch.get_num_threads() == threads


def test_the_device_tells_library_version_and_engine() -> None:
    one, two = TorchCpu(num_threads=1), TorchCpu(num_threads=2)
    assert f"torch {torch.__version__} engine x86 in TorchScript, 1 thread" in one.device
    assert len({one.device, two.device, get_kernels("local").device}) == 3
    with pytest.raises(InvalidInputError, match="threads are counted from 1"):
        TorchCpu(num_threads=0)


def test_a_torch_without_the_engine_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_cpu, "ENGINE", "abacus")
    with pytest.raises(InvalidInputError, match=r"needs torch's quantized engine 'abacus'") as e:
        get_kernels("local:torch_cpu")
    assert "\n" not in str(e.value)


def test_backends_are_chosen_by_name() -> None:
    assert isinstance(get_kernels("local:torch_cpu"), TorchCpu)
    assert get_kernels("local:onnxruntime").device == get_kernels("local").device
    for text in ("local:torch_cpi", "local:"):
        with pytest.raises(InvalidInputError, match="local:torch_cpu"):
            get_kernels(text)
    assert is_local("local:torch_cpu")
    assert not is_local("roofline:H100")


CELLS = Cells(units=("qk", "twice", "mixed"), schemes=((FP32, INT7), (FP32, INT7), (FP32,)))


def test_a_table_of_its_own_kernels_and_device() -> None:
    model = MeasuredLatency(hardware="local:torch_cpu", stopwatch=CountingStopwatch())
    table = model.table(network(), CELLS)
    assert table.provenance == f"measured on {TorchCpu().device}"
    assert {case.backend for case in model.latencies} == {"torch_cpu"}
    known = model.latencies
    assert MeasuredLatency(stopwatch=CountingStopwatch(), known=known).latencies == {}
    cells = Cells(units=("mixed",), schemes=((parse_scheme("int8"),),))
    with pytest.raises(InvalidInputError, match="_weight_int8pack_mm is a reference"):
        model.table(network(), cells)


def test_real_kernels_end_to_end() -> None:
    saved: list[KernelLatency] = []
    model = get_cost_model("latency", hardware="local:torch_cpu", budget_s=1.0, save=saved.append)
    table = model.table(network(), CELLS)
    assert (table.values > 1e-7).all()
    assert (table.values < 1e-2).all()
    assert (table.low < table.values).all()
    assert (table.values < table.high).all()
    assert 0 < table.fixed < table.baseline
    assert all(latency.rounds >= 6 for latency in saved)


def test_int8_beats_fp32_where_it_must() -> None:
    """8x1024x4096 is several times faster with a quarter of the bytes; a loose bound on noise."""
    layer = layer_of("linear", (4096, 1024), (1, 8, 1024))
    backend = TorchCpu()
    ops = [backend.op(layer, scheme) for scheme in (FP32, INT7)]
    watch = Stopwatch(budget_s=0.5, min_rounds=6, inner=1)
    slow, fast = watch.measure(ops, backend.reference(), backend.device)
    assert fast.median_s < 0.7 * slow.median_s
