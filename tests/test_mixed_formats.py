"""Shares in a wider format, low-rank branches, and the leading bits of int8."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpq.core.errors import InvalidInputError
from mpq.core.format_parts import count_of
from mpq.core.formats import parse_format
from mpq.nn.quantizers import LayerData, WeightQuantizer, family_of, quantize_weight
from mpq.nn.quantizers.integer import leading_bits

SHAPES = {
    "linear": ((24, 64), 0),
    "odd": ((7, 48), 0),
    "one": ((1, 16), 0),
    "conv": ((6, 4, 2, 2), 0),
}
SHAPES["transposed"] = ((4, 6, 2, 2), 1)
TEXTS = ["int4+r1", "fixed", "int4g16a+10%int8", "int4+50%int8", "int2g8a+25%groups_int4g8a"]
TEXTS = [t for t in TEXTS if t != "fixed"] + [f"int{bits}of8" for bits in range(2, 9)]


def weight_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def data_of(columns: int, channels: int) -> LayerData:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(200, columns, generator=generator) * torch.rand(
        columns, generator=generator
    )
    return LayerData(gram=inputs.T @ inputs, outputs=torch.rand(channels, generator=generator))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_stored_weighs_what_its_parts_say_and_reads_back(text: str, name: str) -> None:
    shape, axis = SHAPES[name]
    weight, fmt = weight_of(shape), parse_format(text)
    channels = shape[axis]
    for data in (None, data_of(math.prod(shape) // channels, channels)):
        stored = quantize_weight(weight, fmt, axis, 1.0, data)
        arrays, parts = stored.pack(), fmt.parts(shape, axis)
        assert arrays.keys() == parts.keys()
        for part, bits in parts.items():
            assert arrays[part].numel() * arrays[part].element_size() == math.ceil(bits / 8)
        back = stored.dequantize()
        assert (back.shape, back.isfinite().all()) == (weight.shape, True)
        assert torch.equal(family_of(fmt).unpack(arrays, fmt, shape, axis).dequantize(), back)


@pytest.mark.parametrize("text", TEXTS)
def test_without_data_a_weight_is_faked_as_it_is_stored(text: str) -> None:
    weight, fmt = weight_of((24, 64)), parse_format(text)
    assert torch.equal(
        WeightQuantizer().fake_quantize("w", weight, fmt), quantize_weight(weight, fmt).dequantize()
    )


def slow_salience(weight: np.ndarray, back: np.ndarray, data: LayerData) -> list[float]:
    """Return outputs_c sum_ij d_ci G_ij d_cj of each channel, number by number."""
    off, gram, outputs = back - weight, data.gram.numpy(), data.outputs.numpy()
    return [
        float(
            outputs[c] * sum(d[i] * gram[i, j] * d[j] for i in range(len(d)) for j in range(len(d)))
        )
        for c, d in enumerate(off)
    ]


def test_the_channels_of_most_salience_are_in_the_wider_format() -> None:
    weight, data = weight_of((12, 8)), data_of(8, 12)
    fmt = parse_format("int3+25%int8")
    low = quantize_weight(weight, parse_format("int3")).dequantize()
    high = quantize_weight(weight, parse_format("int8")).dequantize()
    back = quantize_weight(weight, fmt, 0, 1.0, data).dequantize()
    salience = slow_salience(weight.numpy(), low.numpy(), data)
    wide = sorted(range(12), key=lambda c: -salience[c])[:3]
    for channel in range(12):
        expected = high if channel in wide else low
        assert torch.equal(back[channel], expected[channel])


def test_the_groups_of_most_salience_are_in_the_wider_format() -> None:
    weight, data = weight_of((3, 8)), data_of(8, 3)
    fmt = parse_format("int2g4+50%groups_int8g4")
    low = quantize_weight(weight, parse_format("int2g4")).dequantize()
    high = quantize_weight(weight, parse_format("int8g4")).dequantize()
    back = quantize_weight(weight, fmt, 0, 1.0, data).dequantize()
    off, salience = (low - weight).numpy(), {}
    for channel in range(3):
        for place in range(2):
            own = slice(4 * place, 4 * place + 4)
            d, gram = off[channel, own], data.gram.numpy()[own, own]
            salience[channel, place] = float(data.outputs[channel]) * float(d @ gram @ d)
    wide = sorted(salience, key=lambda key: -salience[key])[:3]
    for channel, place in salience:
        own = slice(4 * place, 4 * place + 4)
        expected = high if (channel, place) in wide else low
        assert torch.equal(back[channel, own], expected[channel, own])


def test_without_data_groups_of_the_widest_range_are_in_the_wider_format() -> None:
    weight = torch.tensor([[0.0, 1, 0, 9], [5, 5, 1, 2]])
    back = quantize_weight(weight, parse_format("int2g2+25%groups_int8g2")).dequantize()
    wide = quantize_weight(weight, parse_format("int8g2")).dequantize()
    assert torch.equal(back[0, 2:], wide[0, 2:])


@pytest.mark.parametrize("share", [1, 10, 25, 50, 99])
def test_a_wider_share_has_less_error_and_its_exact_count(share: int) -> None:
    weight = weight_of((24, 64))
    low = (quantize_weight(weight, parse_format("int3")).dequantize() - weight).square().sum()
    fmt = parse_format(f"int3+{share}%int8")
    off = (quantize_weight(weight, fmt).dequantize() - weight).square().sum()
    assert off <= low
    parts = fmt.parts((24, 64))
    high = count_of(share, 24)
    assert parts.get("high.codes", 0) == high * 64 * 8
    assert parts["low.codes"] == (24 - high) * 64 * 3
    assert parts["mask"] == 24


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_branch_lowers_the_error_of_a_weight_with_few_directions(rank: int) -> None:
    generator = torch.Generator().manual_seed(6)
    few = torch.randn(24, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    weight = 5 * few + weight_of((24, 64))
    alone = (quantize_weight(weight, parse_format("int4")).dequantize() - weight).norm()
    fmt = parse_format(f"int4+r{rank}")
    off = (quantize_weight(weight, fmt).dequantize() - weight).norm()
    assert off < alone
    assert (
        fmt.storage_bits((24, 64)) == parse_format("int4").storage_bits((24, 64)) + 16 * rank * 88
    )


def test_a_branch_with_data_is_the_best_of_weighted_inputs() -> None:
    """The branch in 16 bits is within rounding of the best one (Eckart, Young)."""
    weight, data = weight_of((24, 64)), data_of(64, 24)
    stored = quantize_weight(weight, parse_format("int4+r4"), 0, 1.0, data)
    scale = data.gram.diagonal().sqrt()
    branch = stored.extra["left"].float() @ stored.extra["right"].float()
    off = ((weight - branch) * scale).norm()
    values = torch.linalg.svdvals(weight * scale)
    torch.testing.assert_close(off, values[4:].norm(), rtol=1e-3, atol=0)


def test_a_branch_of_a_rank_that_no_weight_has_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match=r"int4\+r9: a weight of shape \[8, 64\] has rank 8"
    ):
        quantize_weight(weight_of((8, 64)), parse_format("int4+r9"))


@pytest.mark.parametrize("bits", range(2, 9))
def test_leading_bits_are_those_of_the_int8_tensor(bits: int) -> None:
    weight = weight_of((6, 32))
    wide = quantize_weight(weight, parse_format("int8"))
    narrow = quantize_weight(weight, parse_format(f"int{bits}of8"))
    ratio, half = 2 ** (8 - bits), 2 ** (bits - 1)
    expected = (wide.codes.float() / ratio).round().clamp(-half, half - 1)
    assert torch.equal(narrow.codes.float(), expected)
    assert torch.equal(narrow.scales, wide.scales * ratio)
    if bits == 8:
        assert torch.equal(narrow.dequantize(), wide.dequantize())


@pytest.mark.parametrize("where", ["", "t", "g16"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_one_stored_tensor_yields_every_narrower_one(bits: int, where: str) -> None:
    weight = weight_of((6, 32))
    wide = quantize_weight(weight, parse_format(f"int8{where}"))
    narrow = quantize_weight(weight, parse_format(f"int{bits}of8{where}"))
    found = leading_bits(wide, bits)
    assert (found.fmt, found.shape) == (narrow.fmt, narrow.shape)
    assert torch.equal(found.codes, narrow.codes)
    assert torch.equal(found.dequantize(), narrow.dequantize())


@pytest.mark.parametrize(("text", "bits"), [("int8", 1), ("int8", 9), ("int8a", 4), ("int6", 4)])
def test_what_is_no_int8_tensor_yields_nothing(text: str, bits: int) -> None:
    stored = quantize_weight(weight_of((6, 32)), parse_format(text))
    with pytest.raises(InvalidInputError, match=f"got {bits} of {text}"):
        leading_bits(stored, bits)


@pytest.mark.parametrize("bits", range(2, 8))
def test_leading_bits_are_off_by_a_step_and_a_rounding_at_most(bits: int) -> None:
    weight = weight_of((6, 32))
    stored = quantize_weight(weight, parse_format(f"int{bits}of8"))
    ratio = 2 ** (8 - bits)
    fine = stored.scales / ratio
    inside = (weight / stored.scales).round().abs() < 2 ** (bits - 1) - 1  # not clipped
    off = (stored.dequantize() - weight).abs()
    assert (off <= fine * (ratio / 2 + 0.5) * 1.001)[inside].all()


BAD = {
    "int4t+10%int8": "a scale of the whole tensor cannot be shared",
    "int4g64a+10%groups_int8g32": "groups of the same size",
    "int4+0%int8": "between 0 and 100",
    "int4+10%bf16": "plain formats rounded to nearest",
    "int4@gptq+10%int8": "unknown rounding",
    "int4+10%int8@gptq": "plain formats rounded to nearest",
    "int4+r0": "a branch is written last and alone",
    "int4+r4@gptq": "a branch is written last and alone",
    "int4@nearst": "unknown rounding",
}


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_put_together_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(InvalidInputError, match=BAD[text]) as caught:
        parse_format(text)
    assert "\n" not in str(caught.value)
