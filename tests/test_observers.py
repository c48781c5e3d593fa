"""Static ranges: every observer, and ranges of a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.nn.calibrate import histograms, with_input_ranges
from mpq.nn.graph import build_graph
from mpq.nn.observers import OBSERVERS, Histogram, get_observer
from tests.builders import conv_net, mlp
from tests.oracles_pipeline import kl_of_range, outside, rounded, squared_error

SHARES = [i / 64 for i in range(64, 0, -1)]


def histogram(values: np.ndarray, bins: int = 256) -> Histogram:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    counts, _ = np.histogram(values, bins, (low, high))
    return Histogram(torch.from_numpy(counts.astype(np.float64)), low, high)


def heavy_tails(seed: int = 0, rectified: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).standard_t(2, 4000)
    return np.maximum(values, 0) if rectified else values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "values",
    [heavy_tails(), heavy_tails(1, rectified=True), -heavy_tails(2, True), np.zeros(5), np.ones(3)],
    ids=["two-sided", "rectified", "negative", "zeros", "one value"],
)
@pytest.mark.parametrize("name", [*sorted(OBSERVERS), "percentile(99)"])
def test_a_range_holds_zero_and_is_inside(name: str, values: np.ndarray, bits: int) -> None:
    seen = histogram(values)
    low, high = get_observer(name)(seen, bits)
    assert seen.low <= low <= 0.0 <= high <= seen.high
    assert (low, high) == get_observer(name)(seen, bits)


@pytest.mark.parametrize("percent", [80.0, 99.0, 99.9, 100.0])
def test_percentile_leaves_so_many_outside(percent: float) -> None:
    values = heavy_tails()
    seen = histogram(values, 20000)
    low, high = get_observer(f"percentile({percent})")(seen, 8)
    below, above = outside(values, low, high)
    step = 1 / len(values)
    assert below == pytest.approx(1 - percent / 100, abs=3 * step)
    assert above == pytest.approx(1 - percent / 100, abs=3 * step)
    if percent == 100:
        assert (low, high) == pytest.approx((seen.low, seen.high))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("rectified", [False, True])
def test_mse_is_the_best_of_all_it_tries(bits: int, rectified: bool) -> None:
    values = np.random.default_rng(3).laplace(size=400)
    values = np.maximum(values, 0) if rectified else values
    seen = histogram(values, 100)
    centres, counts = seen.centres.numpy(), seen.counts.numpy()
    data = np.repeat(centres, counts.astype(int)).tolist()

    def best(ranges: list[tuple[float, float]]) -> tuple[float, float]:
        return min(ranges, key=lambda limits: squared_error(data, *limits, bits))

    low, high = best([(seen.low * s, seen.high * s) for s in SHARES])
    low, high = best([*((low, seen.high * s) for s in SHARES), (low, high)])
    low, high = best([*((seen.low * s, high) for s in SHARES), (low, high)])
    found = get_observer("mse")(seen, bits)
    assert squared_error(data, *found, bits) == pytest.approx(
        squared_error(data, low, high, bits), rel=1e-4
    )
    assert squared_error(data, *found, bits) < 0.9 * squared_error(data, seen.low, seen.high, bits)


def test_mse_error_is_that_of_the_values() -> None:
    """The histogram's error is close to that of the data it was made of."""
    values = heavy_tails(4)
    found = get_observer("mse")(histogram(values, 2048), 4)
    data = values.tolist()
    own = min(
        squared_error(data, values.min() * s, values.max() * s, 4) for s in SHARES
    )  # the first of its three searches
    assert squared_error(data, *found, 4) <= 1.05 * own


@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("rectified", [False, True])
def test_kl_is_the_least_divergence(bits: int, rectified: bool) -> None:
    seen = histogram(heavy_tails(5, rectified), 128)
    counts = seen.counts.tolist()
    found = get_observer("kl")(seen, bits)
    divergences = {}
    for share in SHARES:
        first = round((seen.low * share - seen.low) / seen.width)
        stop = round((seen.high * share - seen.low) / seen.width)
        if stop - first < 2**bits:
            break
        limits = seen.low * share, seen.high * share
        divergences[limits] = kl_of_range(counts, first, stop, 2**bits)
    assert found in divergences
    assert divergences[found] == pytest.approx(min(divergences.values()), rel=1e-9)
    assert found != (seen.low, seen.high)


def test_zero_stands_for_its_bin() -> None:
    seen = Histogram(torch.tensor([5.0, 1.0]).double(), 0.0, 1.0)
    assert seen.centres.tolist() == [0.0, 0.75]


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_ranges_of_a_network(name: str) -> None:
    torch.manual_seed(0)
    model = conv_net().eval()
    batches = [torch.randn(4, 3, 8, 8) * scale for scale in (1.0, 5.0)]
    graph = build_graph(model, batches[0])
    plain = with_input_ranges(model, graph, batches, ["10"]).input_ranges
    found = with_input_ranges(model, graph, batches, ["10"], observer=name).input_ranges
    assert found.keys() == plain.keys() == {"0", "3", "4", "6", "10"}
    assert all(
        p[0] <= f[0] <= 0 <= f[1] <= p[1]
        for f, p in zip(found.values(), plain.values(), strict=True)
    )
    assert (found == plain) == (name == "minmax")
    again = with_input_ranges(model, graph, batches, ["10"], observer=name).input_ranges
    assert found == again


def test_histograms_are_streamed() -> None:
    torch.manual_seed(0)
    model = mlp().eval()
    batches = [torch.randn(n, 6) for n in (50, 7)]
    found = histograms(model, {"0": (-4.0, 4.0), "2": (0.0, 0.0)}, batches)
    together = torch.cat(batches).reshape(-1).numpy()
    expected, _ = np.histogram(together, 2048, (-4.0, 4.0))
    assert found["0"].counts.sum() == expected.sum()
    assert np.abs(np.cumsum(expected) - found["0"].counts.cumsum(0).numpy()).max() <= 1
    assert found["2"].counts.sum() == 0


def test_fewer_bits_cut_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    batches = [torch.randn(400, 6) ** 3]
    graph = build_graph(model, batches[0])
    widths = []
    for bits in (3, 8):
        found = with_input_ranges(model, graph, batches, ["0"], observer="mse", bits={"0": bits})
        low, high = found.input_ranges["0"]
        widths.append(high - low)
        values = batches[0].reshape(-1).tolist()
        plain = float(batches[0].min()), float(batches[0].max())
        assert squared_error(values, low, high, bits) <= squared_error(values, *plain, bits)
    assert widths[0] < widths[1]


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("percentil", "unknown_observer", "did you mean 'percentile'"),
        ("percentile(40)", "observer", "above 50"),
        ("mse(3)", "observer", "too many settings"),
        ("kl()x", "observer", "got 'kl\\(\\)x'"),
    ],
)
def test_what_is_no_observer_is_refused(text: str, code: str, told: str) -> None:
    with pytest.raises(InvalidInputError, match=told) as error:
        get_observer(text)
    assert error.value.code == code


def test_the_oracle_rounds_as_the_formats_do() -> None:
    assert rounded(0.31, -1.0, 1.0, 2) == pytest.approx(2 / 3 * round(0.31 * 1.5))
    assert rounded(9.0, -1.0, 1.0, 2) == pytest.approx(2 / 3)
