"""Blocks of floats as torchao and compressed-tensors quantize them."""

from __future__ import annotations

import pytest
import torch

from mpq.core.formats import parse_format
from mpq.nn.quantizers import grid_of, quantize_weight
from tests.test_export_torchao import run_beside

pytestmark = pytest.mark.slow

TORCHAO = """
import warnings
warnings.simplefilter("ignore")
import torch
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from mpq.core.formats import parse_format
from mpq.nn.quantizers import fake_quantize_activation, quantize_weight

kinds = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6_e2m3": DTYPE_FP6_E2M3,
    "mxfp6_e3m2": DTYPE_FP6_E3M2,
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
}
weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) ** 3
weight[3] = 0.0
for text, kind in kinds.items():
    stored = quantize_weight(weight, parse_format(text))
    theirs = MXTensor.to_mx(weight, kind, 32)  # scales rounded down, as OCP has it
    assert torch.equal(theirs.dequantize(), stored.dequantize()), text
    scales = theirs.scale.view(torch.uint8).reshape(-1).clamp_min(1)  # of zeros theirs is 2^-127
    assert torch.equal(scales, stored.pack()["scales"]), text
    seen = fake_quantize_activation(weight, parse_format(text, "activations"))
    assert torch.equal(seen, stored.dequantize()), text

weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
stored = quantize_weight(weight, parse_format("nvfp4"))
shared = per_tensor_amax_to_scale(weight.abs().amax())
theirs = NVFP4Tensor.to_nvfp4(weight, 16, shared)
assert torch.equal(shared, stored.extra["tensor_scale"])
assert torch.equal(theirs.scale.view(torch.uint8).reshape(-1), stored.pack()["scales"])
# They multiply by a reciprocal, so that a number within an ulp of a tie may go the other way.
off = (theirs.dequantize(torch.float32) - stored.dequantize()).abs()
scaled = (weight.reshape(stored.codes.shape) / stored.scales).abs().reshape(weight.shape)
ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
tied = ((scaled[..., None] - ties).abs() < 1e-6 * ties).any(-1)
assert off[~tied].max() <= 1.2e-7 * weight.abs().max(), off[~tied].max()
assert tied.float().mean() < 0.01
print("equal", len(kinds) + 1)
"""


def test_blocks_are_those_of_torchao() -> None:
    assert run_beside(TORCHAO).splitlines()[-1] == "equal 6"


def test_elements_and_scales_are_those_of_compressed_tensors() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP6_E2M3_DATA
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    rng = torch.Generator().manual_seed(0)
    halves = torch.arange(-240, 241) / 32
    for text, cast in (
        ("fp4_e2m1", FP4_E2M1_DATA.cast_to_fp4),
        ("fp6_e2m3", FP6_E2M3_DATA.cast_to_fp6),
    ):
        values = torch.cat([halves, torch.randn(5000, generator=rng) * 3])
        grid, fmt = grid_of(parse_format(text)), parse_format(text)
        assert grid is not None
        assert torch.equal(cast(values.clone()), grid.grid.nearest(values.clone(), None, fmt))

    weight = torch.randn(64, 512, generator=rng)
    blocks = weight.reshape(-1, 16)
    stored = quantize_weight(weight, parse_format("nvfp4"))
    args = quantization.QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        scale_dtype=torch.float8_e4m3fn,
    )
    shared = generate_gparam(weight.min(), weight.max())
    scale, _ = calculate_qparams(blocks.amin(1), blocks.amax(1), args, shared)
    torch.testing.assert_close(1 / shared[0], stored.extra["tensor_scale"])
    found = stored.pack()["scales"].view(torch.float8_e4m3fn).float()
    assert torch.equal(scale.float(), found)

    # Theirs rounds the largest weight to the mantissa of elements first: from 1.75 2^e on, that
    # is from 7 in elements whose largest is 6, the scale is twice the OCP's.
    largest = weight.reshape(-1, 32).abs().amax(1)
    theirs = generate_mx_scales(largest, 4) - 127
    ours = quantize_weight(weight, parse_format("mxfp4")).scales.reshape(-1)
    up = largest / torch.exp2(torch.floor(torch.log2(largest))) >= 1.75
    assert torch.equal(torch.exp2(theirs), ours * torch.where(up, 2.0, 1.0))
    assert 0 < int(up.sum()) < len(up)
