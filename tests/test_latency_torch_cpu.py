"""Real kernels of torch on this processor: right numbers, and what emulates is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from hw_cost_models import get_cost_model, get_kernels, is_local
from hw_cost_models.latency import MeasuredLatency
from hw_cost_models.measured import torch_cpu
from hw_cost_models.measured.protocol import Stopwatch
from hw_cost_models.measured.torch_capability import kernel_for, saturates, why_not
from hw_cost_models.measured.torch_cpu import TorchCpu, _Turn
from hw_cost_models.measured.torch_kernels import make_kernel
from hw_cost_models.measured.torch_modules import quiet
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.latency import KernelLatency
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
    integer = "int8:int7" if saturates(OF_KIND["conv2d"]) else "int8:int8"
    offered = {kind: [str(s) for s in backend.schemes(layer)] for kind, layer in OF_KIND.items()}
    assert offered == {
        "linear": ["fp32", "fp16", "int8:int7"],
        "conv2d": ["fp32", integer],
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
