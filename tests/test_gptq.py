"""GPTQ against a slow one, and never worse than nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_format
from mpq.nn.quantizers import FAMILIES, clip_factor, family_of, grid_of, quantize_weight
from mpq.nn.quantizers.stored import LayerData
from mpq.nn.rounding.gptq import gptq, squared_change
from tests.oracles_rounding import plain_gptq

TEXTS = (
    *("int3", "int4a", "int2g16", "int4g48a", "int3t", "int5of8", "uint4", "int1"),
    *("fp4_e2m1", "fp6_e3m2g32", "nf4g48", "mxfp4", "nvfp4", "bipolar3", "ternaryg16"),
)
ON_GRID = [
    text for text in TEXTS if parse_format(text).family in FAMILIES and grid_of(parse_format(text))
]


def inputs(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) / n**0.5 + 0.5 * torch.eye(n)
    return torch.randn(rows, n, generator=generator) @ mixing


def weight(channels: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(channels, n, generator=torch.Generator().manual_seed(seed))


def errors(w: torch.Tensor, back: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    return squared_change(back - w, gram)


@pytest.mark.parametrize("text", ["int3", "int4a", "int2g16", "int4g48a", "int3g240"])
@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_equals_the_slow_one_of_single_inputs(text: str, factor: float) -> None:
    w, x = weight(24, 240), inputs(500, 240)
    gram, fmt = x.T @ x, parse_format(text)
    grid = grid_of(fmt)
    assert grid is not None
    size = 240 if "g" not in text else int(text.partition("g")[2].rstrip("a"))
    slow = plain_gptq(w, gram, fmt, grid, size, factor)
    nearest = grid.fake_quantize(w, fmt, 0, factor)
    better = errors(w, slow, gram) < errors(w, nearest, gram)
    expected = torch.where(better.unsqueeze(1), slow.float(), nearest)
    found = gptq(w, fmt, 0, factor, LayerData(gram=gram)).dequantize()
    # A number in the middle of two levels may fall to either side, and its channel goes on from it.
    off = (found - expected).abs().amax(1) > 1e-5
    assert off.sum() <= 1
    assert better.float().mean() > 0.9


@pytest.mark.parametrize("text", ON_GRID)
def test_lowers_the_change_of_the_outputs_on_every_grid(text: str) -> None:
    fmt, w, x = parse_format(text), weight(24, 192), inputs(400, 192)
    gram = x.T @ x
    stored = gptq(w, fmt, 0, 1.0, LayerData(gram=gram))
    back, nearest = stored.dequantize(), quantize_weight(w, fmt).dequantize()
    assert errors(w, back, gram).sum() < 0.9 * errors(w, nearest, gram).sum()
    again = family_of(fmt).unpack(stored.pack(), fmt, tuple(w.shape)).dequantize()
    assert torch.equal(again, back)
    sizes = {name: array.numel() * array.element_size() for name, array in stored.pack().items()}
    assert sizes == {k: -(-bits // 8) for k, bits in fmt.parts(tuple(w.shape)).items()}


@pytest.mark.parametrize("text", ["int3", "int3g16", "int4a"])
def test_independent_inputs_are_rounded_to_nearest(text: str) -> None:
    fmt, w = parse_format(text), weight(5, 32)
    found = gptq(w, fmt, 0, 1.0, LayerData(gram=3 * torch.eye(32)))
    assert torch.equal(found.dequantize(), quantize_weight(w, fmt).dequantize())


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    x = inputs(90, 20)
    x[:, [0, 7, 19]] = 0
    fmt, w = parse_format("int3"), weight(6, 20)
    found = gptq(w, fmt, 0, 1.0, LayerData(gram=x.T @ x)).dequantize()
    nearest = quantize_weight(w, fmt).dequantize()
    assert torch.equal(found[:, [0, 7, 19]], nearest[:, [0, 7, 19]])
    assert not torch.equal(found, nearest)
    none = gptq(w, fmt, 0, 1.0, LayerData(gram=torch.zeros(20, 20))).dequantize()
    assert torch.equal(none, nearest)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    rank=st.integers(0, 40),
    text=st.sampled_from(["int2", "int3g4", "int4a", "int2t"]),
    spread=st.sampled_from([0.0, 3.0, 8.0]),
)
def test_no_channel_is_ever_worse_than_nearest(
    seed: int, n: int, rank: int, text: str, spread: float
) -> None:
    n = 4 * n if "g" in text else n
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, n, generator=generator)
    x = x * torch.exp(spread * torch.randn(n, generator=generator))
    gram, w, fmt = x.T @ x, weight(3, n, seed), parse_format(text)
    after = errors(w, gptq(w, fmt, 0, 1.0, LayerData(gram=gram)).dequantize(), gram)
    before = errors(w, quantize_weight(w, fmt).dequantize(), gram)
    assert (after <= before).all()


def test_groups_of_a_convolution_are_layers_of_their_own() -> None:
    fmt, w = parse_format("int3"), weight(8, 18).reshape(8, 2, 3, 3)
    grams = torch.stack([(x.T @ x) for x in (inputs(99, 18, s) for s in range(4))])
    together = gptq(w, fmt, 0, 1.0, LayerData(gram=grams)).dequantize()
    for g, gram in enumerate(grams):
        own = w[2 * g : 2 * g + 2].reshape(2, 18)
        alone = gptq(own, fmt, 0, 1.0, LayerData(gram=gram)).dequantize()
        torch.testing.assert_close(together[2 * g : 2 * g + 2].reshape(2, 18), alone)


def test_clipping_is_kept_for_each_row() -> None:
    fmt, w, x = parse_format("int2"), weight(9, 64), inputs(200, 64)
    factor = clip_factor(w, fmt)
    stored = gptq(w, fmt, 0, factor, LayerData(gram=x.T @ x))
    assert torch.equal(stored.scales, quantize_weight(w, fmt, 0, factor).scales)
    assert not torch.equal(stored.scales, quantize_weight(w, fmt).scales)


def test_needs_a_gram() -> None:
    with pytest.raises(InvalidInputError, match="int3@gptq: int3 needs the Gram"):
        gptq(weight(2, 4), parse_format("int3@gptq"), 0, 1.0, None)
