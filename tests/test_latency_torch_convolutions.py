"""Integer convolutions of torch: what integers give, and no overflow on any processor."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from hw_cost_models.measured import torch_modules
from hw_cost_models.measured.torch_capability import why_not
from hw_cost_models.measured.torch_kernels import packed_kernel
from hw_cost_models.measured.torch_modules import Steps
from mpq.core.formats import parse_scheme
from mpq.core.layers import Convolution, Layer
from mpq.nn.quantizers import fake_quantize_activation
from tests.test_latency_kernels import CONVS, layer_of
from tests.test_latency_torch_cpu import INT7, gaussian

pytestmark = pytest.mark.skipif(
    torch_modules.ENGINE not in torch.backends.quantized.supported_engines,
    reason="torch without the x86 quantized engine",
)
STATIC = {name: layer for name, layer in CONVS.items() if layer.kind != "conv_transpose2d"}
STATIC["ends"] = replace(
    layer_of("conv2d", (8, 4, 4, 4), (2, 4, 10, 10), padding=2),
    convolution=Convolution(
        kernel=(4, 4), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_end=(2, 2)
    ),
)
LIMITS = (-3.0, 4.0), (-30.0, 20.0)


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
