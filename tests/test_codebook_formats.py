from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.format_parts import SCALES_BLOCK, count_of
from mpq.core.formats import Format, PerGroup, PerTensor, parse_format
from mpq.nn.quantizers import (
    LayerData,
    StoredWeight,
    WeightQuantizer,
    fake_quantize_activation,
    family_of,
    quantize_weight,
)
from mpq.nn.quantizers.codebook import BITSANDBYTES_FLOATS, BNB4, NF4, NORMAL_FLOATS
from mpq.nn.quantizers.kmeans import KMeans
from mpq.nn.quantizers.largest import mask_of_largest
from mpq.nn.quantizers.rows import channels_of, rows_of
from tests.oracles_codebooks import (
    half,
    least_dual_error,
    least_kmeans_error,
    slow_codebook,
    slow_double_scales,
    slow_largest,
    slow_lloyd,
    slow_log,
    slow_nearest,
    slow_residual,
    slow_salience,
    slow_starts,
    slow_ternary,
    weighted_error,
)
from tests.test_export_torchao import run_beside

SHAPES = {
    "one": ((1, 1), 0),
    "row": ((1, 32), 0),
    "linear": ((3, 96), 0),
    "odd": ((5, 7), 0),
    "conv": ((3, 5, 3, 3), 0),
    "transposed": ((4, 3, 2, 2), 1),
    "experts": ((2, 3, 8), (0, 1)),
}
ANYWHERE = [
    *("nf4", "nf4t", "nf4d", "nf4td", "bnb4", "bnb4d", "ternary", "ternaryt", "ternary_median"),
    *("binary", "binaryt", "residual_binary2", "residual_binary8", "residual_binary3t"),
    *("dual_binary", "dual_binaryt", "partial_binary10%", "partial_binary0.5%t"),
    *("partial_binary99%", "kmeans1", "kmeans3", "kmeans8", "kmeans4o0.5%", "kmeans2o50%"),
]
GROUPED = [
    *("nf4g32", "nf4g32d", "nf4g8d", "bnb4g16", "ternaryg8", "ternary_mediang32", "binaryg8"),
    *("residual_binary3g32", "dual_binaryg8", "partial_binary10%g8"),
]
CASES = [(t, s) for t in ANYWHERE for s in SHAPES] + [
    (t, s) for t in GROUPED for s in ("row", "linear", "experts") if "g8" in t or s != "experts"
]
SIZES = {"normal": 0.1, "zeros": 0.0, "tiny": 1e-38, "small": 1e-7, "huge": 1e38}


def normal(shape: tuple[int, ...], seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def data_of(weight: torch.Tensor, axis: int | tuple[int, ...], seed: int = 4) -> LayerData:
    inputs = normal((40, channels_of(weight, axis).shape[1]), seed)
    fisher = normal(tuple(weight.shape), seed + 1).square()
    return LayerData(gram=inputs.T @ inputs, fisher=fisher)


# --- what holds of all of them ---------------------------------------------------------------


@pytest.mark.parametrize(("text", "kind"), CASES)
def test_files_hold_what_was_stored_in_as_many_bits_as_formats_say(text: str, kind: str) -> None:
    shape, axis = SHAPES[kind]
    fmt = parse_format(text)
    assert fmt.text("weights") == text
    for size, data in itertools.product(SIZES.values(), (False, True)):
        weight = normal(shape) * size
        before = weight.clone()
        stored = quantize_weight(weight, fmt, axis, 1.0, data_of(weight, axis) if data else None)
        back = stored.dequantize()
        assert torch.equal(weight, before)
        assert (back.shape, back.dtype) == (weight.shape, torch.float32)
        assert back.isfinite().all()
        if not data:
            family = family_of(fmt)
            assert torch.equal(family.fake_quantize(weight, fmt, axis), back)
        arrays = stored.pack()
        taken = {name: array.numel() * array.element_size() for name, array in arrays.items()}
        assert taken == {name: -(-n // 8) for name, n in fmt.parts(shape, axis).items()}
        again = family_of(fmt).unpack(arrays, fmt, shape, axis)
        assert torch.equal(again.dequantize(), back)
        assert torch.equal(again.codes, stored.codes)
        assert torch.equal(again.scales, stored.scales)
        assert again.extra.keys() == stored.extra.keys()
        assert all(torch.equal(again.extra[name], stored.extra[name]) for name in stored.extra)
        repeated = again.pack()
        assert all(torch.equal(repeated[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("text", ["nf4", "nf4t", "nf4g32", "bnb4", "bnb4g32", "binary", "binaryg8"])
@pytest.mark.parametrize("size", SIZES.values())
def test_what_was_read_back_reads_back_the_same(text: str, size: float) -> None:
    fmt = parse_format(text)
    once = quantize_weight(normal((3, 96)) * size, fmt).dequantize()
    assert torch.equal(quantize_weight(once, fmt).dequantize(), once)


@pytest.mark.parametrize(
    "texts",
    [
        [f"residual_binary{n}" for n in range(2, 9)],
        [f"residual_binary{n}g32" for n in range(2, 9)],
        [f"kmeans{n}" for n in range(1, 9)],
        [f"partial_binary{n}%" for n in (1, 5, 20, 60)],
        [f"kmeans2o{n}%" for n in (0.1, 0.5, 2, 10)],
        ["binary", "ternary", "dual_binary", "nf4"],
    ],
    ids=lambda texts: texts[0],
)
def test_more_bits_have_less_error(texts: list[str]) -> None:
    weight = normal((16, 96))
    errors = [
        float((quantize_weight(weight, parse_format(t)).dequantize() - weight).norm())
        for t in texts
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.2 * errors[-1]


@pytest.mark.parametrize("text", ["nf4", "bnb4g32", "nf4g32d"])
def test_clipping_lowers_the_error_of_what_is_on_a_grid(text: str) -> None:
    weight, fmt = normal((8, 96)), parse_format(text)
    weight[:, ::32] *= 4
    plain, clipped = (
        float((WeightQuantizer(clip).fake_quantize("w", weight, fmt) - weight).norm())  # type: ignore[arg-type]
        for clip in ("minmax", "mse")
    )
    assert clipped < plain


# --- codebooks -------------------------------------------------------------------------------

CODEBOOKS = {"nf4": (NORMAL_FLOATS, NF4, False), "bnb4": (BITSANDBYTES_FLOATS, BNB4, True)}


def test_numbers_are_those_that_were_published() -> None:
    # bitsandbytes, "nf4" and "fp4" of functional.get_4bit_type
    sixteenths = [0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    fp4 = torch.tensor([*sixteenths, *(-n for n in sixteenths)]) / 12
    assert torch.equal(torch.tensor(BNB4), fp4)
    normal_quantiles = [float(n) for n in np.float32(NF4)]
    assert normal_quantiles == list(NF4) == sorted(NF4)
    assert [round(n, 4) for n in NF4] == [
        *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
        *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0),
    ]


@pytest.mark.parametrize("text", CODEBOOKS)
def test_the_nearest_number_is_exact_and_so_are_ties(text: str) -> None:
    family, numbers, symmetric = CODEBOOKS[text]
    levels = sorted({float(n) for n in np.float32(numbers)})
    middles = np.float32([(a + b) / 2 for a, b in itertools.pairwise(levels)])
    tried = [*levels, *middles, *(-middles), 0.0, -0.0, 1.5, -1.5, 3e38, -3e38]
    for step in (-np.inf, np.inf):
        tried += list(np.nextafter(np.float32(tried[:60]), np.float32(step)))
    tried += list(np.random.default_rng(1).uniform(-1.1, 1.1, 3000))
    given_to = torch.tensor(np.float32(tried))
    fmt = parse_format(text)
    found = family.grid.nearest(given_to.clone(), None, fmt)
    # beyond the ends of the levels every distance is the same in float64: they are cut off first
    wanted = [
        slow_nearest(max(-2.0, min(2.0, float(x))), levels, symmetric=symmetric) for x in given_to
    ]
    assert found.tolist() == wanted
    codes = family.grid.codes(found, None, fmt)
    assert torch.equal(family.grid.levels(codes, None, fmt), found)


@pytest.mark.parametrize("text", CODEBOOKS)
def test_every_code_comes_back(text: str) -> None:
    family, numbers, _ = CODEBOOKS[text]
    fmt = parse_format(f"{text}t")
    codes = torch.arange(16, dtype=torch.int16)[None]
    stored = StoredWeight(codes, torch.full((1, 1), 2.0), None, fmt, (1, 16), 0)
    assert stored.dequantize().tolist() == [[2 * float(np.float32(n)) for n in numbers]]
    assert torch.equal(family.unpack(stored.pack(), fmt, (1, 16)).codes, codes)
    again = quantize_weight(stored.dequantize(), fmt).codes
    twice = {"nf4": [], "bnb4": [8]}[text]  # the second zero is not written
    assert again[0].tolist() == [0 if code in twice else code for code in range(16)]


@pytest.mark.parametrize("text", ["nf4", "nf4t", "nf4g8", "bnb4", "bnb4t", "bnb4g8"])
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_codebooks_equal_a_slow_loop(text: str, kind: str) -> None:
    (shape, axis), fmt = SHAPES[kind], parse_format(text)
    if kind == "transposed" and isinstance(fmt.granularity, PerGroup):
        fmt = parse_format(text.replace("g8", "g4"))
    _, numbers, symmetric = CODEBOOKS[text[: 4 if text[0] == "b" else 3]]
    weight = normal(shape)
    rows = rows_of(weight, fmt.granularity, axis)
    levels = [float(n) for n in np.float32(numbers)]
    wanted = []
    for row in rows.tolist():
        scale = half(max(abs(w) for w in row))
        wanted.append(slow_codebook(row, levels, scale, symmetric=symmetric))
    back = quantize_weight(weight, fmt, axis).dequantize()
    assert rows_of(back, fmt.granularity, axis).tolist() == wanted


def test_scales_in_eight_bits_equal_a_slow_loop_and_choose_the_codes() -> None:
    weight = normal((3 * SCALES_BLOCK // 2, 16)) * torch.linspace(0.01, 3, 384)[:, None]
    fmt = parse_format("nf4g8d")
    stored = quantize_weight(weight, fmt)
    rows = weight.reshape(-1, 8)
    wanted = slow_double_scales(rows.abs().amax(1).tolist(), SCALES_BLOCK)
    torch.testing.assert_close(stored.scales[:, 0], torch.tensor(wanted), rtol=2e-7, atol=1e-9)
    step = torch.tensor(wanted).sub(rows.abs().amax(1)).abs()
    second = stored.extra["second_scales"].repeat_interleave(SCALES_BLOCK)[: len(step)]
    assert (step <= second * 0.5001).all()
    chosen = NORMAL_FLOATS.grid.nearest(rows / stored.scales, None, fmt) * stored.scales
    assert torch.equal(stored.dequantize().reshape(-1, 8), chosen)


def test_scales_in_eight_bits_cost_little_error() -> None:
    weight = normal((64, 256))
    errors = [
        float((quantize_weight(weight, parse_format(t)).dequantize() - weight).norm())
        for t in ("nf4g64", "nf4g64d")
    ]
    assert errors[1] < 1.02 * errors[0]


TORCHAO = """
import torch, warnings
warnings.simplefilter("ignore")
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor, to_nf4
from mpq.core.formats import parse_format
from mpq.nn.quantizers import quantize_weight
from mpq.nn.quantizers.codebook import NF4

weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(7))
rows = weight.reshape(-1, 64)
rows[torch.arange(len(rows)), rows.abs().argmax(1)] = rows.abs().amax(1).half().float()
theirs = to_nf4(weight, 64, 256)
assert (theirs.nf4 - torch.tensor(NF4)).abs().max() < 6e-5  # theirs have four digits
plain = quantize_weight(weight, parse_format("nf4g64"))
packed = theirs.quantized_data
codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(plain.codes.shape)
off = (codes.to(torch.int16) - plain.codes).abs()
assert off.max() <= 1
assert off.float().mean() < 1e-3, off.sum()
double = quantize_weight(weight, parse_format("nf4g64d"))
scales = theirs.dequantize_scalers(
    theirs.quantized_scalers, theirs.quantization_factor, theirs.scaler_block_size
)
step = double.extra["second_scales"].repeat_interleave(256)
assert ((scales - double.scales[:, 0]).abs() <= 1.1 * step).all()
print("alike")
"""


@pytest.mark.slow
def test_torchao_chooses_the_same_codes() -> None:
    assert run_beside(TORCHAO).strip() == "alike"


# --- ternary and binary ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ternary", "ternary_median", "ternaryt", "ternaryg8"])
@pytest.mark.parametrize("seed", range(3))
def test_ternary_rows_equal_a_slow_loop(text: str, seed: int) -> None:
    weight, fmt = normal((5, 24), seed), parse_format(text)
    rows = rows_of(weight, fmt.granularity, 0)
    back = rows_of(quantize_weight(weight, fmt).dequantize(), fmt.granularity, 0)
    median = fmt.variant == "median"
    assert back.tolist() == [slow_ternary(row, median=median) for row in rows.tolist()]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=23))
def test_five_ternary_codes_lie_in_a_byte(codes: list[int]) -> None:
    fmt = parse_format("ternaryt")
    shape = (1, len(codes))
    one = torch.ones(1, 1)
    stored = StoredWeight(torch.tensor([codes]).to(torch.int16), one, None, fmt, shape, 0)
    arrays = stored.pack()
    assert arrays["codes"].tolist() == [
        sum(digit * 3**place for place, digit in enumerate(codes[first : first + 5]))
        for first in range(0, len(codes), 5)
    ]
    assert family_of(fmt).unpack(arrays, fmt, shape).codes.tolist() == [codes]
    assert stored.dequantize().tolist() == [[code - 1 for code in codes]]


@pytest.mark.parametrize("text", ["binary", "binaryt", "binaryg8"])
def test_binary_rows_are_signs_times_the_mean_magnitude(text: str) -> None:
    weight, fmt = normal((5, 24)), parse_format(text)
    weight[2, 3] = 0.0
    rows = rows_of(weight, fmt.granularity, 0)
    back = rows_of(quantize_weight(weight, fmt).dequantize(), fmt.granularity, 0)
    for row, its_back in zip(rows.tolist(), back.tolist(), strict=True):
        a = half(sum(abs(w) for w in row) / len(row))
        assert its_back == [a if w >= 0 else -a for w in row]


@pytest.mark.parametrize("text", ["residual_binary2", "residual_binary5g8", "residual_binary8t"])
def test_planes_of_signs_equal_a_slow_loop(text: str) -> None:
    weight, fmt = normal((5, 24)), parse_format(text)
    rows = rows_of(weight, fmt.granularity, 0)
    stored = quantize_weight(weight, fmt)
    back = rows_of(stored.dequantize(), fmt.granularity, 0)
    for row, its_back, scales in zip(rows.tolist(), back.tolist(), stored.scales, strict=True):
        wanted, its_scales = slow_residual(row, fmt.bits)
        assert its_back == wanted
        assert scales.tolist() == its_scales


def test_all_codes_of_planes_come_back() -> None:
    for text in ("residual_binary3t", "dual_binaryt"):
        fmt = parse_format(text)
        codes = torch.arange(2**fmt.bits, dtype=torch.int16)[None]
        scales = torch.tensor([[4.0, -2.0, 0.5][: fmt.bits]])
        stored = StoredWeight(codes, scales, None, fmt, tuple(codes.shape), 0)
        bits = torch.tensor([[(c >> k) & 1 for k in range(fmt.bits)] for c in codes[0].tolist()])
        planes = bits.float() if text.startswith("dual") else 2 * bits.float() - 1
        assert torch.equal(stored.dequantize(), (planes * scales).sum(1)[None])
        assert torch.equal(family_of(fmt).unpack(stored.pack(), fmt, codes.shape).codes, codes)


def dual_error(rows: torch.Tensor) -> torch.Tensor:
    back = quantize_weight(rows, parse_format("dual_binary")).dequantize()
    return (back - rows).double().square().sum(1)


def test_two_planes_of_bits_are_close_to_the_best_of_all() -> None:
    rows = normal((12, 5))
    best = torch.tensor([least_dual_error(row) for row in rows.tolist()]).double()
    found = dual_error(rows)
    slack = 2e-3 * rows.double().square().sum(1)  # scales are rounded to half
    assert (found >= best - 1e-6).all()
    assert (found <= best + slack).double().mean() > 0.5
    assert float(found.sum()) < 2 * float(best.sum())


@pytest.mark.parametrize("start", [(2.0, -1.0), (1.0, -2.0), (2 / 3, 4 / 3), (-2 / 3, -4 / 3)])
def test_two_planes_of_bits_are_never_worse_than_their_start(start: tuple[float, float]) -> None:
    rows = torch.cat([normal((20, 40)), normal((20, 40)).abs(), -normal((20, 40)).abs()])
    scales = rows.abs().mean(1, keepdim=True) * torch.tensor(start)
    levels = torch.cat([scales * 0, scales, scales.sum(1, keepdim=True)], dim=1)
    at_start = (rows[:, :, None] - levels[:, None]).square().amin(2).sum(1)
    assert (dual_error(rows) <= at_start * (1 + 1e-3)).all()


@pytest.mark.parametrize("scales", [(2.0, -1.0), (1.0, 2.5), (-1.0, -1.5), (1.0, -1.5)])
def test_two_planes_of_bits_that_a_weight_consists_of_are_found(
    scales: tuple[float, float],
) -> None:
    bits = torch.randint(0, 2, (8, 64, 2), generator=torch.Generator().manual_seed(1)).float()
    weight = (bits * torch.tensor(scales)).sum(2)
    back = quantize_weight(weight, parse_format("dual_binary")).dequantize()
    torch.testing.assert_close(back, weight, rtol=1e-3, atol=1e-3)


# --- partly binary ---------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 30))
def test_the_largest_are_as_many_as_asked_and_the_first_of_equals(
    numbers: list[int], count: int
) -> None:
    count = min(count, len(numbers))
    found = mask_of_largest(torch.tensor(numbers).float(), count)
    assert found.tolist() == slow_largest(numbers, count)


@pytest.mark.parametrize(
    "text", ["partial_binary10%", "partial_binary7.5%g8", "partial_binary30%t"]
)
@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_salient_weights_equal_a_slow_loop(text: str, with_gram: bool, kind: str) -> None:
    (shape, axis), fmt = SHAPES[kind], parse_format(text)
    weight = normal(shape)
    data = data_of(weight, axis) if with_gram else None
    stored = quantize_weight(weight, fmt, axis, 1.0, data)
    matrix = channels_of(weight, axis)
    salience = matrix.abs().double().numpy()
    if data is not None:
        assert data.gram is not None
        salience = slow_salience(matrix.numpy(), data.gram.numpy())
    salient = slow_largest(salience.reshape(-1).tolist(), count_of(fmt.share, weight.numel()))
    rows = rows_of(weight, fmt.granularity, axis)
    mask = np.array(salient).reshape(rows.shape)
    assert int(mask.sum()) == count_of(fmt.share, weight.numel()) > 0
    back = rows_of(stored.dequantize(), fmt.granularity, axis)
    for row, its_mask, its_back in zip(rows.tolist(), mask, back.tolist(), strict=True):
        low = [abs(w) for w, high in zip(row, its_mask, strict=True) if not high]
        high_ones = [abs(w) for w, high in zip(row, its_mask, strict=True) if high]
        a = half(sum(low) / max(len(low), 1))
        step = half(max(high_ones, default=0.0) / 127)
        for w, high, found in zip(row, its_mask, its_back, strict=True):
            if high:
                assert abs(found - w) <= 0.51 * step + 1e-3 * abs(w)
                assert found / step == pytest.approx(round(found / step), abs=1e-4)
            else:
                assert found == (a if w >= 0 else -a)


def test_known_inputs_choose_other_salient_weights_with_less_error_of_the_output() -> None:
    weight = normal((24, 48))
    inputs = normal((400, 48), 9) * torch.logspace(-1.5, 1, 48)
    data = LayerData(gram=inputs.T @ inputs)
    fmt = parse_format("partial_binary10%")
    errors = [
        float((inputs @ (quantize_weight(weight, fmt, 0, 1.0, d).dequantize() - weight).T).norm())
        for d in (None, data)
    ]
    assert errors[1] < 0.9 * errors[0]


# --- k-means ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_of_each_channel_equals_a_slow_lloyd(bits: int, weighted: bool) -> None:
    rows = normal((6, 40), bits)
    weights = normal((6, 40), 8).square() if weighted else None
    for turns in (0, 1, 50):
        found = KMeans(turns).centroids(rows, weights, 2**bits)
        for n, row in enumerate(rows.tolist()):
            its_weights = [1.0] * 40 if weights is None else weights[n].tolist()
            ends = []
            for start in slow_starts(row, its_weights, 2**bits):
                history = slow_lloyd(row, its_weights, start, turns)
                errors = [weighted_error(row, its_weights, centroids) for centroids in history]
                assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
                ends.append((errors[-1], history[-1]))
            np.testing.assert_allclose(found[n].numpy(), min(ends)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_of_tiny_rows_is_close_to_the_best_of_all_partitions(count: int, seed: int) -> None:
    rows, weights = normal((12, 9), seed), normal((12, 9), seed + 50).square()
    found = KMeans().centroids(rows, weights, count).tolist()
    pairs = list(zip(rows.tolist(), weights.tolist(), strict=True))
    errors = [weighted_error(*pair, its) for pair, its in zip(pairs, found, strict=True)]
    best = [least_kmeans_error(*pair, count) for pair in pairs]
    assert all(e >= b - 1e-9 for e, b in zip(errors, best, strict=True))
    assert sum(e <= b * (1 + 1e-6) for e, b in zip(errors, best, strict=True)) >= 3
    assert sum(errors) < 2.5 * sum(best)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_kmeans_finds_clusters_that_are_apart(bits: int) -> None:
    rows = torch.arange(2**bits).repeat_interleave(5) + 0.02 * normal((7, 5 * 2**bits))
    found = KMeans().centroids(rows, None, 2**bits).tolist()
    for row, its in zip(rows.tolist(), found, strict=True):
        best = sum(
            sum((w - sum(own) / 5) ** 2 for w in own) for own in zip(*[iter(row)] * 5, strict=True)
        )
        assert weighted_error(row, [1.0] * len(row), its) == pytest.approx(best, rel=1e-4)


def test_channels_are_made_alike_in_any_company() -> None:
    weight, fmt = normal((6, 40)), parse_format("kmeans3")
    alone = torch.cat([quantize_weight(row[None], fmt).dequantize() for row in weight])
    torch.testing.assert_close(quantize_weight(weight, fmt).dequantize(), alone, rtol=2e-3, atol=0)


def test_each_weight_takes_the_nearest_centroid() -> None:
    weight, fmt = normal((6, 40)), parse_format("kmeans3")
    stored = quantize_weight(weight, fmt)
    books = stored.extra["codebooks"].float()
    least = (weight[:, :, None] - books[:, None]).abs().amin(2)
    assert torch.equal((stored.dequantize() - weight).abs(), least)


def test_kmeans_with_known_curvature_lowers_the_weighted_error() -> None:
    weight = normal((16, 128))
    data = LayerData(fisher=normal((16, 128), 6).abs().pow(4))
    for text in ("kmeans2", "kmeans3", "kmeans2o1%", "kmeans3o0.45%"):
        fmt = parse_format(text)
        with_data, without = (
            quantize_weight(weight, fmt, 0, 1.0, d).dequantize() - weight for d in (data, None)
        )
        assert data.fisher is not None
        weighed = [float((data.fisher * off**2).sum()) for off in (with_data, without)]
        assert weighed[0] < 0.9 * weighed[1]
        assert float(without.norm()) < float(with_data.norm())


@pytest.mark.parametrize("with_fisher", [False, True])
def test_outliers_stay_in_half_and_lower_the_error(with_fisher: bool) -> None:
    weight = normal((16, 128))
    weight[::3, 5] *= 20
    fisher = normal((16, 128), 6).square() if with_fisher else None
    data = None if fisher is None else LayerData(fisher=fisher)
    plain = quantize_weight(weight, parse_format("kmeans3"), 0, 1.0, data).dequantize()
    fmt = parse_format("kmeans3o0.45%")
    stored = quantize_weight(weight, fmt, 0, 1.0, data)
    size = weight.abs() if fisher is None else fisher.double() * weight.double() ** 2
    count = count_of(0.45, weight.numel())
    mask = torch.tensor(slow_largest(size.reshape(-1).tolist(), count)).reshape(weight.shape)
    assert torch.equal(stored.dequantize()[mask], weight[mask].half().float())
    assert len(stored.extra["outliers"]) == count == 9
    assert stored.extra["row_ends"].tolist() == np.cumsum(mask.sum(1).numpy()).tolist()
    counts = 1.0 if fisher is None else fisher
    errors = [float((counts * (back - weight) ** 2).sum()) for back in (stored.dequantize(), plain)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("text", ["kmeans2", "kmeans2o25%"])
def test_curvature_of_nothing_counts_all_weights_alike(text: str) -> None:
    weight, fmt = normal((3, 16)), parse_format(text)
    data = LayerData(fisher=torch.zeros(3, 16))
    back = quantize_weight(weight, fmt, 0, 1.0, data).dequantize()
    assert float((back - weight).norm() / weight.norm()) < 0.6


# --- activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["log2", "logsqrt2"])
@pytest.mark.parametrize("limits", [None, (0.0, 0.4)])
def test_logarithms_equal_their_formula(
    bits: int, name: str, limits: tuple[float, float] | None
) -> None:
    values = torch.softmax(3 * normal((3, 4, 50)), dim=-1)
    values[:, 0, :5] = 0.0
    values[:, 1, :5] *= -1
    fmt = parse_format(f"{name}_{bits}", "activations")
    found = fake_quantize_activation(values, fmt, limits)
    for sample, its in zip(values, found, strict=True):
        largest = float(sample.max()) if limits is None else float(np.float32(limits[1]))
        for value, got in zip(sample.reshape(-1).tolist(), its.reshape(-1).tolist(), strict=True):
            wanted, exponent = slow_log(value, largest, bits, root=name == "logsqrt2")
            if exponent == float("inf") or abs(exponent % 1 - 0.5) > 1e-4:
                assert got == pytest.approx(wanted, rel=1e-6, abs=0)


@pytest.mark.parametrize("name", ["log2", "logsqrt2"])
def test_every_level_of_a_logarithm_reads_back_the_same(name: str) -> None:
    for bits in (2, 4, 7):
        fmt = parse_format(f"{name}_{bits}", "activations")
        steps = 2 if name == "logsqrt2" else 1
        values = 0.7 * torch.exp2(-torch.arange(2**bits - 1) / steps)
        values = torch.cat([values, torch.zeros(1)])[None]
        once = fake_quantize_activation(values, fmt)
        torch.testing.assert_close(once, values)
        assert len(once.unique()) == 2**bits
        assert torch.equal(fake_quantize_activation(once, fmt), once)


def slow_twin(value: float, negative: float, positive: float, bits: int) -> float:
    top = 2 ** (bits - 1) - 1
    step = np.float32(negative if value < 0 else positive)
    return float(np.float32(max(-top, min(top, round(float(np.float32(value) / step))))) * step)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ((-0.17, 4.25), (4.25 / 16, 4.25)),  # 25 times as long: a step of 1/16
        ((-1.0, 1.0), (1.0, 1.0)),
        ((-4.0, 0.5), (4.0, 4.0 / 8)),
        ((-0.5, 3.999), (3.999 / 4, 3.999)),
        ((0.0, 2.0), (None, 2.0)),
        ((-2.0, 0.0), (2.0, None)),
    ],
)
def test_twin_ranges_are_covered_with_steps_a_power_of_two_apart(
    bits: int, limits: tuple[float, float], steps: tuple[float | None, float | None]
) -> None:
    values = torch.linspace(*limits, 301)[None]
    fmt = parse_format(f"twin{bits}", "activations")
    found = fake_quantize_activation(values, fmt, limits)[0].tolist()
    top = 2 ** (bits - 1) - 1
    negative, positive = (1.0 if step is None else step / top for step in steps)
    wanted = [slow_twin(value, negative, positive, bits) for value in values[0].tolist()]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    assert len(set(found)) <= 2**bits - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_samples_search_steps_of_less_error_than_their_range_has(bits: int) -> None:
    values = torch.nn.functional.gelu(normal((4, 3000)) * torch.tensor([[0.3], [1], [2], [4]]))
    fmt = parse_format(f"twin{bits}", "activations")
    found = fake_quantize_activation(values, fmt)
    for sample, its in zip(values, found, strict=True):
        limits = float(sample.min()), float(sample.max())
        covered = fake_quantize_activation(sample[None], fmt, limits)
        assert float((its - sample).norm()) <= float((covered - sample).norm()) * (1 + 1e-6)
        negative, positive = its[its < 0].unique(), its[its > 0].unique()
        if len(negative) and bits > 2:
            power = np.log2(float(positive[0] / -negative[-1]))
            top = 2 ** (bits - 1) - 1
            assert len(negative) <= top
            assert len(positive) <= top
            assert bits > 6 or power == pytest.approx(round(power), abs=1e-5)
    assert torch.equal(found, torch.cat([fake_quantize_activation(s[None], fmt) for s in values]))


def test_twin_beats_one_uniform_range_after_gelu() -> None:
    values = torch.nn.functional.gelu(normal((1, 4000)))
    errors = [
        float((fake_quantize_activation(values, parse_format(t, "activations")) - values).norm())
        for t in ("twin4", "int4")
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("text", ["log2_4", "logsqrt2_4", "twin4", "twin2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_activations_of_any_size_stay_finite_and_zero_stays_zero(
    text: str, dtype: torch.dtype
) -> None:
    fmt = parse_format(text, "activations")
    for size in (0.0, 1e-7, 1.0, min(float(torch.finfo(dtype).max), 1e38)):
        values = torch.tensor([[0.0, 1.0, -1.0, 0.3], [0.0, 0.5, 0.5, 0.1]], dtype=dtype) * size
        before = values.clone()
        found = fake_quantize_activation(values, fmt)
        assert torch.equal(values, before)
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert (found[:, 0] == 0).all()


def test_fields_of_these_formats_are_as_they_are_written() -> None:
    assert parse_format("nf4g64d") == Format(
        family="nf", bits=4, granularity=PerGroup(64), variant="double"
    )
    assert parse_format("ternary_mediant") == Format(
        family="ternary", bits=2, granularity=PerTensor(), variant="median"
    )
