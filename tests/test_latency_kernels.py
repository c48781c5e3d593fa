"""Real ONNX Runtime kernels: they run, they are the intended ones, and their numbers are right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional as F

from hw_cost_models.measured.capability import default_schemes, kernel_for, why_no_kernel
from hw_cost_models.measured.graphs import input_shape, kernel_model
from hw_cost_models.measured.onnxruntime import OnnxRuntime, session_options
from mpq.core.errors import InvalidInputError
from mpq.core.formats import PerGroup, parse_scheme
from mpq.core.layers import Convolution, Layer
from mpq.nn.graph import build_graph

RNG = np.random.default_rng(0)


def layer_of(kind: str, weight: tuple[int, ...], inputs: tuple[int, ...], **conv: Any) -> Layer:
    """A layer whose output shape torch computes."""
    dims = len(weight) - 2
    geometry = None
    if kind == "linear":
        outputs: tuple[int, ...] = (*inputs[:-1], weight[0])
    elif kind == "embedding":
        outputs = (*inputs, weight[1])
    else:
        full = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | conv
        x, w = torch.zeros(inputs), torch.zeros(weight)
        outputs = tuple(TORCH[kind](x, w, **full).shape)
        span = {k: (v,) * dims for k, v in full.items() if k != "groups"}
        span["output_padding"] = span.get("output_padding", (0,) * dims)
        geometry = Convolution(kernel=weight[2:], groups=full["groups"], **span)
    return Layer(
        name=kind,
        kind=kind,
        weight_shape=weight,
        weight_id="w",
        weight_bytes=4 * int(np.prod(weight)),
        input_shape=inputs,
        output_shape=outputs,
        macs=1000,
        calls=1,
        order=0,
        convolution=geometry,
    )


TORCH: dict[str, Any] = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv_transpose2d": F.conv_transpose2d,
}
LINEAR = layer_of("linear", (96, 256), (1, 9, 256))
WORDS = layer_of("embedding", (50, 64), (2, 6))
CONVS = {
    "plain": layer_of("conv2d", (16, 8, 3, 3), (1, 8, 10, 10), padding=1),
    "stride": layer_of("conv2d", (24, 16, 3, 3), (2, 16, 9, 9), stride=2, padding=1),
    "dilated": layer_of("conv2d", (8, 8, 3, 3), (1, 8, 11, 11), dilation=2),
    "grouped": layer_of("conv2d", (16, 4, 3, 3), (1, 16, 8, 8), groups=4, padding=1),
    "depthwise": layer_of("conv2d", (16, 1, 3, 3), (1, 16, 8, 8), groups=16, padding=1),
    "patches": layer_of("conv2d", (32, 3, 4, 4), (1, 3, 16, 16), stride=4),
    "sequence": layer_of("conv1d", (16, 8, 5), (1, 8, 20), padding=2, stride=2),
    "up": layer_of(
        "conv_transpose2d", (8, 12, 3, 3), (1, 8, 6, 6), stride=2, padding=1, output_padding=1
    ),
}


def run(
    layer: Layer, text: str, x: np.ndarray, weights: list[np.ndarray], **limits: Any
) -> list[np.ndarray]:
    model = kernel_model(layer, parse_scheme(text), weights, **limits)
    session = ort.InferenceSession(model, session_options(1), ["CPUExecutionProvider"])
    return session.run(None, {"x": x.reshape(input_shape(layer))})


def gaussian(shape: tuple[int, ...]) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_fp32_products_use_each_copy_of_the_weight() -> None:
    x, weights = gaussian((9, 256)), [gaussian((96, 256)) for _ in range(3)]
    for found, weight in zip(run(LINEAR, "fp32", x, weights), weights, strict=True):
        assert worst(found, x @ weight.T) < 1e-5


def quantized_dynamically(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear of the ONNX standard, and back."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize("text", ["int8:int8", "int8t:int8"])
def test_dynamic_int8_computes_the_exact_integer_product(text: str) -> None:
    x, weight = gaussian((9, 256)), gaussian((96, 256))
    limit = np.abs(weight).max(axis=None if "t" in text[4] else 1, keepdims=True)
    dequantized = np.rint(weight / (limit / 127)) * (limit / 127)
    (found,) = run(LINEAR, text, x, [weight])
    assert worst(found, quantized_dynamically(x) @ dequantized.T) < 1e-5


def test_dynamic_int8_does_not_saturate() -> None:
    """Signed weights would be wrong by a quarter here on processors without VNNI."""
    x = np.full((9, 256), 3.0, np.float32) + np.abs(gaussian((9, 256))) * 0.01
    weight = np.full((96, 256), 2.0, np.float32) + np.abs(gaussian((96, 256))) * 0.01
    (found,) = run(LINEAR, "int8:int8", x, [weight])
    assert worst(found, x @ weight.T) < 0.01


def dequantized_blocks(weight: np.ndarray, bits: int, block: int, asymmetric: bool) -> np.ndarray:
    """Element by element, the slow way."""
    out = np.empty_like(weight)
    for r in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            w = weight[r, start : start + block].astype(np.float64)
            if asymmetric:
                low, high = min(w.min(), 0.0), max(w.max(), 0.0)
                scale = np.float32((high - low) / (2**bits - 1))
                zero = round(-low / scale)
            else:
                scale = np.float32(np.abs(w).max() / max(2 ** (bits - 1) - 1, 1))
                zero = 2 ** (bits - 1)
            codes = np.clip(
                np.rint(weight[r, start : start + block] / scale) + zero, 0, 2**bits - 1
            )
            out[r, start : start + block] = (codes - zero) * scale
    return out


BLOCKWISE = [
    f"int{bits}g{block}{a}"
    for bits, blocks in {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 64, 256)}.items()
    for block in blocks
    for a in ("", "a")
]


@pytest.mark.parametrize("text", BLOCKWISE)
def test_blockwise_products_are_the_format_with_8_bit_activations(text: str) -> None:
    x, weight = gaussian((9, 256)), gaussian((96, 256))
    fmt = parse_scheme(text).weights
    assert isinstance(fmt.granularity, PerGroup)
    dequantized = dequantized_blocks(weight, fmt.bits, fmt.granularity.size, text.endswith("a"))
    (found,) = run(LINEAR, text, x, [weight])
    error = worst(found, x @ dequantized.T)
    assert error < 0.015
    assert error > 1e-4  # the slow kernels, which unpack to fp32, would be exact


@pytest.mark.parametrize("name", CONVS)
def test_fp32_convolutions(name: str) -> None:
    layer = CONVS[name]
    x, weight = gaussian(layer.input_shape), gaussian(layer.weight_shape)
    (found,) = run(layer, "fp32", x, [weight])
    assert worst(found, reference(layer, x, weight)) < 1e-5


def reference(layer: Layer, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    conv = layer.convolution
    assert conv is not None
    named = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    if layer.kind == "conv_transpose2d":
        named["output_padding"] = conv.output_padding
    function = TORCH[layer.kind]
    return function(
        torch.from_numpy(x), torch.from_numpy(weight), groups=conv.groups, **named
    ).numpy()


def static(x: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    scale = (limits[1] - limits[0]) / 255
    zero = np.rint(-limits[0] / scale)
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


@pytest.mark.parametrize("text", ["int8:int8", "int8t:int8"])
@pytest.mark.parametrize("name", [name for name in CONVS if name != "up"])
def test_integer_convolutions_are_right_to_one_output_step(name: str, text: str) -> None:
    layer = CONVS[name]
    x, weight = gaussian(layer.input_shape), gaussian(layer.weight_shape)
    axes = None if "t" in text[4] else tuple(range(1, weight.ndim))
    scale = np.abs(weight).max(axis=axes, keepdims=True) / 127
    seen, dequantized = static(x, (-4.0, 4.0)), (np.rint(weight / scale) * scale)
    exact = reference(layer, seen, dequantized.astype(np.float32))
    limits = (float(exact.min()), float(exact.max()))
    (found,) = run(layer, text, x, [weight], input_limits=(-4.0, 4.0), output_limits=limits)
    step = (limits[1] - limits[0]) / 255
    assert np.abs(found - exact).max() < 1.01 * step


@pytest.mark.parametrize("name", ["plain", "depthwise", "sequence"])
def test_a_symmetric_static_range_is_the_same_kernel(name: str) -> None:
    layer = CONVS[name]
    x, weight = gaussian(layer.input_shape), gaussian(layer.weight_shape)
    scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / 127
    seen = np.clip(np.rint(x / (3.0 / 127)), -128, 127) * (3.0 / 127)  # 3 of [-2, 3]
    dequantized = (np.rint(weight / scale) * scale).astype(np.float32)
    exact = reference(layer, seen.astype(np.float32), dequantized)
    limits = (float(exact.min()), float(exact.max()))
    found, other = (
        run(layer, text, x, [weight], input_limits=(-2.0, 3.0), output_limits=limits)[0]
        for text in ("int8:int8s", "int8:int8")
    )
    step = (limits[1] - limits[0]) / 255
    assert np.abs(found - exact).max() < 1.01 * step
    assert np.abs(other - exact).max() > 1.01 * step
    assert kernel_for(layer, parse_scheme("int8:int8s")) == kernel_for(
        layer, parse_scheme("int8:int8")
    )


@pytest.mark.parametrize("text", ["int8:int8static", "int8t:int8sstatic"])
def test_static_products_are_right_and_do_not_saturate(text: str) -> None:
    weight = gaussian(LINEAR.weight_shape)
    x = gaussian(LINEAR.input_shape).reshape(-1, LINEAR.weight_shape[1])
    per_row = None if text.startswith("int8t") else 1
    scale = np.abs(weight).max(axis=per_row, keepdims=True) / 127
    exact = static(x, (-2.0, 3.0)) @ (np.rint(weight / scale) * scale).T
    if "sstatic" in text:
        codes = np.clip(np.rint(x / (3.0 / 127)), -128, 127) * (3.0 / 127)
        exact = codes @ (np.rint(weight / scale) * scale).T
    (found,) = run(LINEAR, text, x, [weight], input_limits=(-2.0, 3.0))
    assert worst(found, exact) < 1e-5
    (found,) = run(
        LINEAR, text, np.full_like(x, 3.0), [np.full_like(weight, 2.0)], input_limits=(0.0, 3.0)
    )
    assert worst(found, np.full(found.shape, 6.0 * x.shape[1])) < 0.01


@pytest.mark.parametrize("text", ["int8:int8", "int8:int8s"])
@pytest.mark.parametrize("name", ["plain", "stride", "grouped", "depthwise", "sequence"])
def test_integer_convolutions_do_not_saturate(name: str, text: str) -> None:
    """Signed weights lose half of this output on processors without VNNI."""
    layer = CONVS[name]
    x = np.full(layer.input_shape, 3.0, np.float32)
    weight = np.full(layer.weight_shape, 2.0, np.float32)
    exact = reference(layer, x, weight)
    limits = {"input_limits": (0.0, 3.0), "output_limits": (0.0, float(exact.max()))}
    (found,) = run(layer, text, x, [weight], **limits)
    assert worst(found, exact) < 0.01


@pytest.mark.parametrize("text", ["fp32", "int8g64", "int8g16a", "int4g32", "int4g16a"])
def test_embeddings_are_looked_up(text: str) -> None:
    indices, weight = RNG.integers(0, 50, (2, 6)), gaussian((50, 64))
    expected = weight
    if text != "fp32":
        fmt = parse_scheme(text).weights
        assert isinstance(fmt.granularity, PerGroup)
        expected = dequantized_blocks(weight, fmt.bits, fmt.granularity.size, text.endswith("a"))
    (found,) = run(WORDS, text, indices, [weight])
    assert worst(found, expected[indices.reshape(-1)]) < 1e-6


@pytest.mark.parametrize(
    ("layer", "text", "kernels"),
    [
        (LINEAR, "fp32", {"MatMul": 4}),
        (LINEAR, "int8:int8", {"DynamicQuantizeMatMul": 4}),
        (LINEAR, "int8:int8static", {"QuantizeLinear": 4, "MatMulIntegerToFloat": 4}),
        (LINEAR, "int4g32", {"MatMulNBits": 4}),
        (CONVS["plain"], "fp32", {"Conv": 4}),
        (
            CONVS["plain"],
            "int8:int8",
            {"QuantizeLinear": 4, "QLinearConv": 4, "DequantizeLinear": 4},
        ),
        (WORDS, "int4g32", {"GatherBlockQuantized": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_optimized_graph_still_runs_every_copy_of_the_kernel(
    layer: Layer, text: str, kernels: dict[str, int], tmp_path: Path
) -> None:
    options = session_options(1)
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    weights = [gaussian(layer.weight_shape) for _ in range(4)]
    model = kernel_model(layer, parse_scheme(text), weights)
    session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
    kind = np.int64 if layer.kind == "embedding" else np.float32
    session.run(None, {"x": np.ones(input_shape(layer), kind)})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = Counter(
        event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")
    )
    assert {name: ran[name] for name in kernels} == kernels
    others = set(ran) - set(kernels)
    # Channels are innermost in integer convolutions and blocked in fp32 ones.
    assert others <= {"ReorderInput", "ReorderOutput", "Transpose"}


NO_KERNEL = {
    ("linear", "int3g64"): "no ONNX Runtime kernel for int3: MatMulNBits runs 2, 4 and 8 bits",
    ("linear", "int4"): "MatMulNBits needs groups, for example int4g64",
    ("linear", "int4g48"): "runs groups of 16, 32, 64, 128, 256",
    ("linear", "int2g16"): "use int2g32",
    ("linear", "int2g256a"): "unpacks 2-bit groups of 256 in every call",
    ("linear", "int4:int8"): "8-bit weights only; use int8:int8",
    ("linear", "int8g64:int8"): "one scale per channel or tensor",
    ("linear", "int8:int8s"): "write int8:int8",
    ("linear", "int8:int4"): "asymmetric 8-bit activations",
    ("linear", "bf16"): "computes on this CPU in fp32 only",
    ("linear", "fp32:int8"): "fp32 weights and integer activations",
    ("conv2d", "int4g32"): "no kernel quantizes the weights of conv2d alone; use int8:int8",
    ("conv2d", "int8"): "no kernel quantizes the weights of conv2d alone",
    ("conv_transpose2d", "int8:int8"): "no integer kernel for conv_transpose2d; it runs in fp32",
    ("embedding", "int8:int8"): "no integer kernel for embedding",
    ("embedding", "int2g32"): "4 and 8 bits only",
}
OF_KIND = {
    "linear": LINEAR,
    "conv2d": CONVS["plain"],
    "conv_transpose2d": CONVS["up"],
    "embedding": WORDS,
}


@pytest.mark.parametrize(("kind", "text"), NO_KERNEL)
def test_a_scheme_without_a_kernel_has_a_reason_and_no_time(kind: str, text: str) -> None:
    layer, scheme = OF_KIND[kind], parse_scheme(text)
    assert kernel_for(layer, scheme) is None
    assert NO_KERNEL[kind, text] in why_no_kernel(layer, scheme)
    with pytest.raises(InvalidInputError):
        OnnxRuntime().op(layer, scheme)


def test_groups_must_divide_the_inputs() -> None:
    odd = layer_of("linear", (8, 48), (1, 48))
    assert "groups of 32 do not divide the 48 inputs" in why_no_kernel(odd, parse_scheme("int4g32"))


def test_a_layer_that_is_never_called_has_no_kernel() -> None:
    unused = layer_of("linear", (8, 64), ())
    assert "not called" in why_no_kernel(unused, parse_scheme("fp32"))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (LINEAR, ["fp32", "int8:int8", "int8g64", "int4g128", "int4g32", "int2g32a"]),
        (
            layer_of("linear", (8, 64), (1, 64)),
            ["fp32", "int8:int8", "int8g64", "int4g64", "int4g32", "int2g32a"],
        ),
        (layer_of("linear", (8, 48), (1, 48)), ["fp32", "int8:int8", "int8g16", "int4g16"]),
        (layer_of("linear", (8, 50), (1, 50)), ["fp32", "int8:int8"]),
        (CONVS["plain"], ["fp32", "int8:int8"]),
        (CONVS["sequence"], ["fp32", "int8:int8"]),
        (CONVS["up"], ["fp32"]),
        (WORDS, ["fp32", "int8g64", "int4g32"]),
    ],
)
def test_default_schemes_all_have_kernels(layer: Layer, expected: list[str]) -> None:
    found = default_schemes(layer)
    assert [str(scheme) for scheme in found] == expected
    assert all(why_no_kernel(layer, scheme) == "" for scheme in found)


def test_cases_name_all_that_changes_the_time() -> None:
    case = kernel_for(LINEAR, parse_scheme("int4g32a"))
    assert case is not None
    assert case.backend == "onnxruntime"
    assert case.kernel == "MatMulNBits bits=4 block=32 accuracy_level=4 zero_points"
    assert case.shape == "linear 9x256->96"
    texts = {name: kernel_for(layer, parse_scheme("fp32")) for name, layer in CONVS.items()}
    assert texts["stride"].shape == "conv2d 2x16x9x9->24 k3x3 s2x2 p1x1 d1x1 g1"
    assert texts["sequence"].shape == "conv1d 1x8x20->16 k5 s2 p2 d1 g1"
    assert texts["up"].shape == "conv_transpose2d 1x8x6x6->12 k3x3 s2x2 p1x1 d1x1 o1x1 g1"
    assert kernel_for(WORDS, parse_scheme("fp32")).shape == "embedding 12 of 50x64"


@pytest.mark.parametrize(
    ("text", "network_weights", "weights"),
    [
        ("fp32", 1, 12),  # never fewer than the copies of a run
        ("int8:int8", 32 * 96 * 256, 43),  # 2^20 weights: as many of these as the network holds
        ("int4g32", 2**40, 128),
    ],
)
def test_an_op_rotates_over_the_weights_of_a_network(
    text: str, network_weights: int, weights: int
) -> None:
    backend = OnnxRuntime(network_weights=network_weights)
    op = backend.op(LINEAR, parse_scheme(text))
    assert op.case == backend.case(LINEAR, parse_scheme(text))
    assert op.runs == 12
    assert op.rotation == -(-weights // 12)
    for _ in range(op.rotation + 1):
        op.run()


def test_the_size_of_the_network_is_part_of_the_case() -> None:
    scheme = parse_scheme("fp32")
    shapes = [
        OnnxRuntime(network_weights=weights).case(LINEAR, scheme).shape
        for weights in (10_600_000, 8_000_000, 270_000, 2**31)
    ]
    assert shapes == [
        f"linear 9x256->96 in a network of {size} weights"
        for size in ("8Mi", "8Mi", "256Ki", "1Gi")
    ]


def test_huge_weights_are_not_copied() -> None:
    scheme = parse_scheme("int8:int8")
    op = OnnxRuntime().op(layer_of("linear", (4096, 4096), (1, 4096)), scheme)
    assert (op.runs, op.rotation) == (1, 1)  # 2^23 weights in all


def test_threads_are_part_of_the_device() -> None:
    one, two = OnnxRuntime(num_threads=1), OnnxRuntime(num_threads=2)
    assert one.device != two.device
    assert ort.__version__ in one.device
    with pytest.raises(InvalidInputError, match="threads are counted from 1"):
        OnnxRuntime(num_threads=0)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch: it copies the input
@pytest.mark.parametrize("kernel", [(4, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("text", ["fp32", "int8:int8"])
def test_an_even_kernel_that_keeps_the_size_runs(kernel: tuple[int, int], text: str) -> None:
    module = torch.nn.Conv2d(4, 8, kernel, padding="same", bias=False)
    x = gaussian((1, 4, 9, 9))
    layer = build_graph(torch.nn.Sequential(module), torch.from_numpy(x)).layers[0]
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    weight = module.weight.detach().numpy()
    ends = (float(expected.min()), float(expected.max()))
    limits = {"input_limits": (float(x.min()), float(x.max())), "output_limits": ends}
    (found,) = run(layer, text, x, [weight], **limits)
    assert worst(found, expected) < (1e-5 if text == "fp32" else 0.03)
