"""What holds for the weights of every family of formats."""

from __future__ import annotations

import pytest
import torch

from mpq.core.errors import InvalidInputError
from mpq.core.format_grammar import examples
from mpq.core.formats import parse_format
from mpq.core.granularity import PerGroup, matrix_of
from mpq.nn.quantizers import FAMILIES, WeightQuantizer, family_of, grid_of, quantize_weight

TEXTS = [t for t in examples("weights") if parse_format(t).family in FAMILIES]
MORE = ["fp3_e1m1", "fp8_e5m2t", "fp5_e2m2g3", "fp7_e3m3", "fp8_e7m0", "bipolar1", "bipolar3t"]
MORE += ["bipolar8g3", "bfp8", "bfp4t", "bfp6g3", "bfp5g3r", "bfp4r", "fixed(3)", "fixed(8,-1)"]
MORE += ["fixed(5,9)", "mxfp6_e3m2", "mxfp8_e5m2", "uint3g3", "uint4t"]
ALL = [*TEXTS, *MORE]
SHAPES: dict[str, tuple[tuple[int, ...], int | tuple[int, ...]]] = {
    "one": ((1, 1), 0),
    "one channel": ((1, 32), 0),
    "three channels": ((3, 96), 0),
    "odd": ((5, 7), 0),
    "groups": ((4, 384), 0),
    "convolution": ((3, 5, 3, 3), 0),
    "convolution in blocks": ((3, 32, 2, 2), 0),
    "transposed": ((5, 3, 3, 3), 1),
    "transposed in blocks": ((32, 3, 2, 2), 1),
    "two axes": ((2, 64, 3), (0, 2)),
}
CASES = [
    (text, kind)
    for text in ALL
    for kind, (shape, axis) in SHAPES.items()
    if not isinstance(parse_format(text).granularity, PerGroup)
    or matrix_of(shape, axis)[1] % parse_format(text).granularity.size == 0
]


def weights(kind: str) -> tuple[torch.Tensor, int | tuple[int, ...]]:
    shape, axis = SHAPES[kind]
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1, axis


def test_every_format_has_a_case() -> None:
    assert {text for text, _ in CASES} == set(ALL)


@pytest.mark.parametrize(("text", "kind"), CASES)
def test_packed_arrays_read_back_the_same_and_have_the_bits_of_the_parts(
    text: str, kind: str
) -> None:
    weight, axis = weights(kind)
    fmt, shape = parse_format(text), tuple(weight.shape)
    stored = quantize_weight(weight, fmt, axis)
    arrays = stored.pack()
    sizes = {name: array.numel() * array.element_size() for name, array in arrays.items()}
    assert sizes == {name: -(-bits // 8) for name, bits in fmt.parts(shape, axis).items()}
    back = family_of(fmt).unpack(arrays, fmt, shape, axis)
    assert torch.equal(back.dequantize(), stored.dequantize())
    assert back.dequantize().shape == weight.shape
    again = back.pack()
    assert all(torch.equal(again[name], array) for name, array in arrays.items())


@pytest.mark.parametrize(("text", "kind"), CASES)
@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_fake_quantization_is_what_is_stored(text: str, kind: str, clip: str) -> None:
    weight, axis = weights(kind)
    before, fmt = weight.clone(), parse_format(text)
    quantizer = WeightQuantizer(clip)  # type: ignore[arg-type]
    found = quantizer.fake_quantize("w", weight, fmt, axis)
    assert torch.equal(found, quantizer.store("w", weight, fmt, axis).dequantize())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("text", TEXTS)
def test_a_large_weight_is_rounded_in_parts_as_in_one(text: str) -> None:
    weight = torch.randn(300, 384, generator=torch.Generator().manual_seed(1))
    fmt = parse_format(text)
    found = family_of(fmt).fake_quantize(weight, fmt, 0)
    assert torch.equal(found, quantize_weight(weight, fmt).dequantize())


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(text: str, dtype: torch.dtype) -> None:
    weight = weights("groups")[0].to(dtype)
    fmt = parse_format(text)
    found = WeightQuantizer().fake_quantize("w", weight, fmt)
    assert found.dtype == dtype
    assert torch.equal(found, quantize_weight(weight.float(), fmt).dequantize().to(dtype))


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-8, 1e4, 1e30])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_zeros_tiny_and_huge_weights_stay_finite(text: str, size: float, clip: str) -> None:
    weight = weights("groups")[0] * size
    weight[0] = 0.0
    quantizer = WeightQuantizer(clip)  # type: ignore[arg-type]
    fmt = parse_format(text)
    found = quantizer.fake_quantize("w", weight, fmt)
    assert found.isfinite().all()
    stored = quantizer.store("w", weight, fmt)
    back = family_of(fmt).unpack(stored.pack(), fmt, tuple(weight.shape), 0)
    assert torch.equal(back.dequantize(), stored.dequantize())


@pytest.mark.parametrize(
    "text", [t for t in ALL if isinstance(parse_format(t).granularity, PerGroup)]
)
def test_groups_that_do_not_divide_are_refused_with_both_sizes(text: str) -> None:
    fmt = parse_format(text)
    assert isinstance(fmt.granularity, PerGroup)
    says = f"group size {fmt.granularity.size} does not divide the 7 "
    for function in (quantize_weight, family_of(fmt).fake_quantize):
        with pytest.raises(InvalidInputError, match=says) as caught:
            function(torch.ones(5, 7), fmt, 0)
        assert caught.value.code == "group_size"


@pytest.mark.parametrize("text", [t for t in ALL if grid_of(parse_format(t)) is not None])
def test_clipping_that_was_searched_is_never_worse(text: str) -> None:
    weight = torch.randn(60, 384 * 6, generator=torch.Generator().manual_seed(2))
    weight[::7, ::50] *= 6
    fmt = parse_format(text)
    squares = []
    for clip in ("mse", "minmax"):
        quantizer = WeightQuantizer(clip)  # type: ignore[arg-type]
        off = quantizer.fake_quantize("w", weight, fmt) - weight
        squares.append(float(off.double().square().sum()))
    assert squares[0] <= squares[1] * (1 + 1e-6)


@pytest.mark.parametrize("text", [t for t in ALL if grid_of(parse_format(t)) is not None])
def test_a_level_is_nearest_to_itself_and_has_one_code(text: str) -> None:
    fmt, grid = parse_format(text), grid_of(parse_format(text))
    assert grid is not None
    lowest = grid.grid.lowest_code(fmt)
    codes = torch.arange(lowest, lowest + 2**fmt.bits, dtype=torch.int16)
    zero = None if fmt.symmetric else torch.full((1,), 3.0)
    levels = grid.grid.levels(codes, zero, fmt)
    nearest = grid.grid.nearest(levels.clone(), zero, fmt)
    made = nearest == levels  # false of NaN, infinities and what is left out
    assert made.sum() >= 2**fmt.bits - 8
    again = grid.grid.codes(nearest, zero, fmt)
    same = (again == codes) | (levels == 0)  # a second zero has the code of the first
    assert same[made].all()
    assert torch.equal(grid.grid.levels(again[made], zero, fmt), levels[made])
