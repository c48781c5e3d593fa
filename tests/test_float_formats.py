"""Minifloats, fixed point, bipolar numbers and blocks, against slow loops and ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format, parse_format
from mpq.nn.quantizers import fake_quantize_activation, grid_of, quantize_weight
from mpq.nn.quantizers.exponents import floor_log2, power_of_two
from tests.oracles_formats import (
    slow_block_scales,
    slow_blocks,
    slow_levels,
    slow_nearest,
    slow_one_scale,
)

MINIFLOATS = [f"fp{b}_e{e}m{b - 1 - e}" for b in range(3, 9) for e in range(1, b)]
GRIDS = [*MINIFLOATS, "fixed(4,2)", "fixed(8)", "bipolar1", "bipolar3", "bipolar8", "uint3"]
GRIDS += ["bfp2", "bfp5", "mxint8", "mxfp4", "mxfp8_e5m2", "nvfp4"]
KNOWN = {
    "fp8_e4m3": (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn, 448.0),
    "fp8_e5m2": (ml_dtypes.float8_e5m2, torch.float8_e5m2, 57344.0),
    "fp6_e2m3": (ml_dtypes.float6_e2m3fn, None, 7.5),
    "fp6_e3m2": (ml_dtypes.float6_e3m2fn, None, 28.0),
    "fp4_e2m1": (ml_dtypes.float4_e2m1fn, None, 6.0),
    "fp8_e3m4": (ml_dtypes.float8_e3m4, None, None),  # has infinities, so only inside
}
BLOCKS = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "nvfp4"]
BLOCKS += ["bfp4g16", "bfp8g8", "bfp2g4"]


def near(values: torch.Tensor, fmt: Format) -> torch.Tensor:
    grid = grid_of(fmt)
    assert grid is not None
    return grid.grid.nearest(values.clone(), None, fmt)


def probes(fmt: Format) -> torch.Tensor:
    """Return levels, the numbers halfway between them and beside those, and random ones."""
    levels = torch.tensor(sorted(slow_levels(fmt).values()))
    halfway = (levels[1:] + levels[:-1]) / 2
    around = [torch.nextafter(halfway, halfway + side) for side in (-1.0, 1.0)]
    rng = torch.Generator().manual_seed(4)
    spread = torch.randn(200, generator=rng) * levels.max() * torch.rand(200, generator=rng) ** 6
    beyond = torch.tensor([1.01, 1.5, -1.2, 1e6, -1e6]) * levels.max()
    values = torch.cat([levels, halfway, *around, spread, beyond, torch.zeros(1)])
    return values[(values == 0) | (values.abs() >= torch.finfo(torch.float32).tiny)]


@pytest.mark.parametrize("text", GRIDS)
def test_the_nearest_level_is_that_of_a_slow_search(text: str) -> None:
    fmt = parse_format(text)
    levels, values = slow_levels(fmt), probes(fmt)
    expected = [slow_nearest(float(v), fmt, levels) for v in values]
    np.testing.assert_array_equal(near(values, fmt).numpy(), np.array(expected, np.float32))


@pytest.mark.parametrize("text", GRIDS)
def test_double_precision_is_rounded_alike(text: str) -> None:
    fmt = parse_format(text)
    values = probes(fmt)
    assert torch.equal(near(values.double(), fmt), near(values, fmt).double())


@pytest.mark.parametrize("text", GRIDS)
def test_every_code_stands_for_the_level_of_its_bits(text: str) -> None:
    fmt, grid = parse_format(text), grid_of(parse_format(text))
    assert grid is not None
    levels = slow_levels(fmt)
    codes = torch.tensor(list(levels), dtype=torch.int16)
    expected = torch.tensor(list(levels.values()))
    assert torch.equal(grid.grid.levels(codes, None, fmt), expected)
    assert torch.equal(grid.grid.codes(expected, None, fmt), codes)
    assert torch.equal(near(expected, fmt), expected)


@pytest.mark.parametrize("text", KNOWN)
def test_minifloats_are_cast_as_ml_dtypes_and_torch_cast_them(text: str) -> None:
    fmt = parse_format(text)
    kind, of_torch, largest = KNOWN[text]
    top = float(ml_dtypes.finfo(kind).max)
    assert largest in (top, None)
    values = torch.cat([probes(fmt), torch.randn(50_000) * top / 4])
    values = values[values.abs() <= top]
    found = near(values, fmt)
    cast = values.numpy().astype(kind)
    np.testing.assert_array_equal(found.numpy(), cast.astype(np.float32))
    grid = grid_of(fmt)
    assert grid is not None
    codes = grid.grid.codes(found, None, fmt).numpy()
    bits = cast.view(np.uint8)
    np.testing.assert_array_equal(codes[found != 0], bits[found != 0])  # -0 is stored as 0
    if of_torch is not None:
        assert torch.equal(found, values.to(of_torch).float())


@pytest.mark.parametrize("text", ["fp8_e4m3", "fp8_e5m2"])
def test_codes_that_are_no_number_are_never_made(text: str) -> None:
    grid, fmt = grid_of(parse_format(text)), parse_format(text)
    assert grid is not None
    values = torch.tensor([3e38, -3e38, torch.inf, -torch.inf, 1e5, 460.0, -480.0])
    found = near(values, fmt)
    assert found.abs().max() == KNOWN[text][2]
    assert grid.grid.levels(grid.grid.codes(found, None, fmt), None, fmt).isfinite().all()
    codes = torch.tensor([0x7F, 0xFF], dtype=torch.int16)
    assert not grid.grid.levels(codes, None, fmt).isfinite().any()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", ["fixed({})", "bipolar{}", "bfp{}", "bfp{}g16r", "uint{}"])
def test_more_bits_have_less_error(family: str, bits: int) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    weight = weight.abs() if family == "uint{}" else weight
    if bits == 2:
        return
    off = [
        float(
            (quantize_weight(weight, parse_format(family.format(b))).dequantize() - weight).norm()
        )
        for b in (bits - 1, bits)
    ]
    assert off[1] < off[0]


@pytest.mark.parametrize("exponent", range(1, 5))
def test_more_mantissa_bits_have_less_error(exponent: int) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    off = []
    for mantissa in range(2 if exponent == 1 else 1, 8 - exponent):
        fmt = parse_format(f"fp{1 + exponent + mantissa}_e{exponent}m{mantissa}")
        off.append(float((quantize_weight(weight, fmt).dequantize() - weight).norm()))
    assert len(off) >= 3
    assert off == sorted(off, reverse=True)


# Not here: nvfp4, whose scales of blocks follow a largest weight that was itself rounded, and
# bfp4g16r, whose order follows norms of columns that were.
REPEATED = [*MINIFLOATS, "fixed(8,2)", "fixed(8)", "fixed(3)", "bipolar2", "bipolar8", "uint4"]
REPEATED += ["bfp4", "bfp4g16", "bfp8t", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"]
REPEATED += ["mxfp8_e4m3", "mxfp8_e5m2", "mxint8"]


@pytest.mark.parametrize("text", REPEATED)
@pytest.mark.parametrize("size", [1e-3, 0.05, 3.0])
def test_what_was_read_back_reads_back_the_same(text: str, size: float) -> None:
    fmt = parse_format(text)
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)) * size
    once = quantize_weight(weight, fmt).dequantize()
    assert torch.equal(quantize_weight(once, fmt).dequantize(), once)


@pytest.mark.parametrize("text", ["fp8_e5m2", "fp8_e4m3", "fp8_e7m0", "fp4_e2m1"])
def test_scales_of_small_weights_lose_no_bits(text: str) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    small = quantize_weight(weight * 2.0**-9, parse_format(text)).dequantize()
    assert torch.equal(small * 2.0**9, quantize_weight(weight, parse_format(text)).dequantize())


def test_fixed_point_is_the_formula_and_stores_codes_only() -> None:
    weight = torch.randn(3, 7) * 3
    stored = quantize_weight(weight, parse_format("fixed(6,2)"))
    expected = (weight * 16).round().clamp(-32, 31) / 16
    assert torch.equal(stored.dequantize(), expected)
    assert list(stored.pack()) == ["codes"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1e-3, 0.3, 5.0])
def test_a_searched_exponent_has_the_least_error_of_all(bits: int, size: float) -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(bits)) ** 3 * size
    searched = quantize_weight(weight, parse_format(f"fixed({bits})")).dequantize()
    half = 2 ** (bits - 1)
    errors = []
    for exponent in range(-40, 12):
        step = 2.0**exponent
        back = (weight / step).round().clamp(-half, half - 1) * step
        errors.append(float((back - weight).double().square().sum()))
    assert float((searched - weight).double().square().sum()) <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_of_a_weight_read_back_as_a_slow_loop_says(text: str) -> None:
    fmt = parse_format(text)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(7)) ** 3
    stored = quantize_weight(weight, fmt)
    size = stored.codes.shape[1]
    rows = weight.reshape(-1, size).numpy()
    scales = np.array(slow_block_scales(rows, fmt))
    np.testing.assert_array_equal(stored.scales.reshape(-1).numpy(), scales)
    back = stored.dequantize().reshape(-1, size).numpy()
    np.testing.assert_array_equal(back, slow_blocks(rows, fmt))


def test_the_bytes_of_microscaling_are_biased_exponents() -> None:
    weight = torch.zeros(3, 32)
    weight[0, 0], weight[1, 5] = 6.0, -0.75
    arrays = quantize_weight(weight, parse_format("mxfp4")).pack()
    assert arrays["scales"].tolist() == [127, 127 - 1 - 2, 1]


def test_reordered_blocks_put_outliers_together_and_columns_back() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    weight[:, ::16] *= 100  # an outlier in every block of 16
    plain, sorted_ = (
        quantize_weight(weight, parse_format(text)) for text in ("bfp4g16", "bfp4g16r")
    )
    small = weight.abs() < 10
    off = [(s.dequantize() - weight)[small].norm() for s in (plain, sorted_)]
    assert off[1] < 0.7 * off[0]  # of 60 small columns 12 share a block with outliers, not all
    norms = weight.norm(dim=0)[sorted_.extra["order"]]
    assert torch.equal(norms, norms.sort(descending=True).values)


def test_exponents_are_exact() -> None:
    exponent = torch.arange(-126, 128)
    powers = power_of_two(exponent)
    assert powers.double().tolist() == [2.0**e for e in range(-126, 128)]
    assert torch.equal(floor_log2(powers), exponent.int())
    assert torch.equal(floor_log2(torch.nextafter(powers[1:], torch.zeros(1))), exponent[:-1].int())


ONE_SCALE = ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp4_e2m1", "fp5_e1m3", "bipolar4", "bipolar1"]


@pytest.mark.parametrize("limits", [None, (-1.5, 0.75)], ids=["dynamic", "static"])
@pytest.mark.parametrize("text", [*ONE_SCALE, "uint4"])
def test_activations_with_one_scale_equal_a_slow_loop(
    text: str, limits: tuple[float, float] | None
) -> None:
    fmt = parse_format(text, "activations")
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(8))
    found = fake_quantize_activation(values, fmt, limits).numpy()
    for sample, own in zip(found, values.numpy(), strict=True):
        low, high = limits or (own.min(), own.max())
        largest = high if text == "uint4" else max(-low, high)
        np.testing.assert_array_equal(sample, slow_one_scale(own, fmt, largest))


def test_activations_in_fixed_point_take_an_exponent_of_their_own() -> None:
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(8))
    values[1] *= 1000
    given = fake_quantize_activation(values, parse_format("fixed(8,2)", "activations"))
    assert torch.equal(given, (values * 64).round().clamp(-128, 127) / 64)
    fmt = parse_format("fixed(6)", "activations")
    found = fake_quantize_activation(values, fmt)
    for sample, own in zip(found, values, strict=True):
        weight = quantize_weight(own.reshape(4, 5), parse_format("fixed(6)"))
        assert torch.equal(sample, weight.dequantize())
    covered = fake_quantize_activation(values, fmt, (-1.5, 3.9))  # 31/8 < 3.9 <= 31/4
    assert torch.equal(covered, (values * 4).round().clamp(-32, 31) / 4)


@pytest.mark.parametrize("text", [t for t in BLOCKS if t != "bfp4g16r"])
def test_activations_in_blocks_equal_a_slow_loop(text: str) -> None:
    fmt = parse_format(text, "activations")
    values = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(8)) ** 3
    found = fake_quantize_activation(values, fmt).numpy()
    size = quantize_weight(torch.ones(1, 64), parse_format(text)).codes.shape[1]
    for sample, own in zip(found, values.numpy(), strict=True):
        expected = slow_blocks(own.reshape(-1, size), fmt)
        np.testing.assert_array_equal(sample.reshape(-1, size), expected)


ACTIVATIONS = [*ONE_SCALE, "uint4", "fixed(8,2)", "fixed(8)", *BLOCKS]


@pytest.mark.parametrize("text", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_activations_keep_their_dtype_and_values(text: str, dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 32).to(dtype)
    before, fmt = values.clone(), parse_format(text, "activations")
    found = fake_quantize_activation(values, fmt)
    assert (found.dtype, found.shape) == (dtype, values.shape)
    assert torch.equal(values, before)
    if dtype != torch.float64:
        assert torch.equal(found, fake_quantize_activation(values.float(), fmt).to(dtype))


@pytest.mark.parametrize("text", ACTIVATIONS)
def test_samples_do_not_see_each_other_and_zeros_stay_finite(text: str) -> None:
    fmt = parse_format(text, "activations")
    values = torch.randn(3, 4, 32)
    together = fake_quantize_activation(values, fmt)
    values[1] *= 1000
    assert torch.equal(fake_quantize_activation(values, fmt)[[0, 2]], together[[0, 2]])
    zeros = fake_quantize_activation(torch.zeros(2, 32), fmt)
    assert zeros.abs().max() <= 2.0**-126
    assert fake_quantize_activation(values * 1e30, fmt).isfinite().all()


@pytest.mark.parametrize("text", ["fixed(8,2)", "fixed(8)", *(t for t in BLOCKS if t != "nvfp4")])
def test_activations_on_powers_of_two_are_rounded_once(text: str) -> None:
    fmt = parse_format(text, "activations")
    once = fake_quantize_activation(torch.randn(3, 4, 32) ** 3, fmt)
    assert torch.equal(fake_quantize_activation(once, fmt), once)


@pytest.mark.parametrize("text", ["fp8_e4m3", "fp4_e2m1", "bipolar4", "uint4"])
def test_activations_with_a_real_scale_are_rounded_once_but_for_the_scale(text: str) -> None:
    fmt = parse_format(text, "activations")
    once = fake_quantize_activation(torch.randn(3, 4, 32), fmt)
    twice = fake_quantize_activation(once, fmt)
    torch.testing.assert_close(twice, once, rtol=2.0**-22, atol=0)  # (s x top) / top is not s


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_that_do_not_divide_the_last_axis_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"blocks of \d+ .* the 30 activations") as caught:
        fake_quantize_activation(torch.ones(2, 64, 30), parse_format(text, "activations"))
    assert caught.value.code == "group_size"
