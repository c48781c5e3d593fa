"""Layers that read a concatenation: split exactly, then quantized each in its own range."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpq
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.nn.batches import call
from mpq.nn.calibrate import with_input_ranges
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating, quantized
from mpq.nn.transforms import reports_of
from mpq.nn.transforms.split_shortcut import SplitInput, split_shortcuts
from tests.contracts import borrowed_state, same_state
from tests.tiny_unet import sample_loop, tiny_unet


def images(dtype: torch.dtype = torch.float32, samples: int = 4) -> dict[str, torch.Tensor]:
    x = torch.randn(samples, 2, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {"x": x, "timestep": torch.tensor(3)}


def away(one: nn.Module, other: nn.Module, batch: object) -> float:
    with evaluating(one), evaluating(other), torch.no_grad():
        expected = call(one, batch)
        return float((call(other, batch) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_split_network_computes_the_same(dtype: torch.dtype, most: float) -> None:
    model = tiny_unet().to(dtype).train()
    before = borrowed_state(model)
    split, found = split_shortcuts(model, [images(dtype)])
    assert same_state(before, borrowed_state(model))
    assert found == [("up", 4), ("out", 4)]
    assert away(model, split, images(dtype, 6)) < most
    assert split.training
    state = split.state_dict()
    assert state["up.first.weight"].shape == state["up.second.weight"].shape == (4, 4, 3, 3)
    assert "up.first.bias" in state
    assert "up.second.bias" not in state
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in split.parameters()) == parameters


class Joins(nn.Module):
    """Every kind of layer and every way from a concatenation to it, and what stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3, padding=1)
        self.transposed = nn.ConvTranspose2d(6, 3, 2, stride=2)
        self.line = nn.Conv1d(7, 3, 3, padding_mode="circular", padding=1)
        self.linear, self.twice = nn.Linear(9, 3), nn.Linear(9, 3, bias=False)
        self.grouped = nn.Conv2d(6, 6, 1, groups=2)
        self.tied, self.tie = nn.Linear(9, 3), nn.Linear(9, 3)
        self.tie.weight = self.tied.weight
        self.along = nn.Linear(3, 2)
        self.three = nn.Linear(9, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([a, b], 1)  # 2 and 4 channels
        x = self.conv(F.silu(self.norm(joined)))
        y = self.transposed(torch.concat((a, b), dim=-3)).mean((2, 3))
        line = self.line(torch.concatenate([x.flatten(2), y[:, :, None].repeat(1, 1, 64)], axis=1))
        v, w = line.mean(2).repeat(1, 2), y
        nine = torch.cat(tensors=(v, w), dim=-1)
        out = self.linear(torch.relu(nine)) + self.twice(nine) + self.twice(nine.flip(1))
        out = out + self.grouped(joined).mean((2, 3))[:, :3] + self.tied(nine) + self.tie(nine)
        out = out + self.three(torch.cat([v[:, :3], v[:, 3:], w], dim=1))
        return out + self.along(torch.cat([w, out], 0))[: len(out)].sum(1, keepdim=True)


def test_every_kind_is_split_where_channels_were_joined() -> None:
    torch.manual_seed(0)
    model = Joins().double()
    batch = (torch.randn(3, 2, 8, 8).double(), torch.randn(3, 4, 8, 8).double())
    split, found = split_shortcuts(model, [batch])
    assert found == [("conv", 2), ("transposed", 2), ("line", 4), ("linear", 6)]
    assert away(model, split, batch) < 1e-12
    for name, _ in found:
        assert isinstance(split.get_submodule(name), SplitInput)
    for whole in ("twice", "grouped", "tied", "tie", "along", "three"):
        assert not isinstance(split.get_submodule(whole), SplitInput)


def test_a_network_without_shortcuts_is_a_plain_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    split, found = split_shortcuts(model, [torch.ones(2, 3)])
    assert found == []
    assert split is not model
    assert away(model, split, torch.ones(2, 3)) == 0


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([x, x], 1)) * self.linear.weight.sum()


def test_code_that_reads_the_weight_is_told() -> None:
    model = ReadsWeight()
    with pytest.raises(InvalidInputError, match="linear split") as caught:
        split_shortcuts(model, [torch.ones(1, 2)])
    assert caught.value.code == "split"
    assert isinstance(model.linear, nn.Linear)


class TwoRanges(nn.Module):
    """Two inputs, joined; the second is a hundred times larger, with weights as much smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 5, 3, padding=1)
        with torch.no_grad():
            self.conv.weight[:, 4:] /= 100

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([a, b], 1))


def error_in(model: nn.Module, batch: object, scheme: str) -> float:
    """Mean squared error of every layer in a scheme, with ranges calibrated on the batch."""
    graph = with_input_ranges(model, build_graph(model, batch), [batch])
    schemes = {name: parse_scheme(scheme) for unit in graph.units for name in unit.layers}
    with evaluating(model), torch.no_grad():
        exact = call(model, batch)
        with quantized(model, schemes, limits=graph.input_ranges):
            return float((call(model, batch) - exact).square().mean())


@pytest.mark.parametrize("scheme", ["int4", "int8:int8", "int4:int8"])
def test_parts_have_their_own_ranges_and_lose_less(scheme: str) -> None:
    torch.manual_seed(0)
    model = TwoRanges()
    batch = (torch.randn(8, 4, 6, 6), 100 * torch.randn(8, 4, 6, 6))
    split, found = split_shortcuts(model, [batch])
    assert found == [("conv", 4)]
    graph = with_input_ranges(split, build_graph(split, batch), [batch])
    ranges = graph.input_ranges
    assert ranges["conv.first"] == (float(batch[0].min()), float(batch[0].max()))
    assert ranges["conv.second"] == (float(batch[1].min()), float(batch[1].max()))
    assert {unit.layers for unit in graph.units} == {("conv.first",), ("conv.second",)}
    assert error_in(split, batch, scheme) < 0.2 * error_in(copy.deepcopy(model), batch, scheme)


def test_parts_are_layers_of_a_search(tmp_path: Path) -> None:
    model = tiny_unet()
    found = mpq.timestep_calibration(model, sample_loop, samples=8)
    split, layers = split_shortcuts(model, found.batches)
    result = mpq.search(
        split,
        found.batches,
        held_out=found.batches,
        budgets=["memory <= 40%"],
        schemes=["int2", "int4", "int8"],
        divergence="mse",
        executor="serial",
        refine=0,
        storage=str(tmp_path / "runs.db"),
    )
    for name, _ in layers:
        assert {f"{name}.first", f"{name}.second"} <= set(result.allocation)
        assert name not in result.allocation


def test_a_job_names_the_split_as_a_transform() -> None:
    model = tiny_unet()
    before = borrowed_state(model)
    network = mpq.prepared(model, [images()], ["split_shortcuts"])
    assert same_state(before, borrowed_state(model))
    expected, _ = split_shortcuts(model, [images()])
    assert network.state_dict().keys() == expected.state_dict().keys()
    assert away(model, network, images(samples=6)) < 1e-5
    (report,) = reports_of(network)
    assert report.changed == ("up", "out")
    assert report.transform == "split_shortcuts"
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(report.unchanged) == linears - set(report.changed)
    with pytest.raises(InvalidInputError, match="has 1 settings, split_shortcuts takes none"):
        mpq.prepared(model, [images()], ["split_shortcuts(1)"])
