"""AdaRound and FlexRound: lower errors of blocks, never higher ones, the same for a seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq.core.formats import Format, parse_format
from mpq.core.layers import Layer
from mpq.nn.patch import reweighted
from mpq.nn.quantizers import family_of, quantize_weight
from mpq.nn.quantizers.stored import StoredWeight
from mpq.nn.rounding.adaround import AdaRound
from mpq.nn.rounding.blocks import blocks_of
from mpq.nn.rounding.flexround import FlexRound
from mpq.nn.rounding.learned import Make, learned, seen_calls
from mpq.nn.workload import Workload
from tests.builders import workload

MAKES = [AdaRound, FlexRound]


class Block(nn.Module):
    """Two linear layers around a nonlinearity, with a keyword and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        assert scale is not None
        return (x + scale * self.down(torch.relu(self.up(x))),)


class Net(nn.Module):
    """Two blocks and a head over (samples, positions, 16) with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            (x,) = block(x, scale=torch.ones(()))
        mask = attention_mask.unsqueeze(-1).to(x)
        return self.head((x * mask).sum(1) / mask.sum(1))


class Residual(nn.Module):
    """Convolutions with batch norm, as in a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.two(torch.relu(self.one(x)))))


def of_tokens(texts: tuple[str, ...] = ("int3",)) -> Workload:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(16, 16, generator=generator) / 4
    batches = []
    for _ in range(4):
        mask = torch.ones(10, 4, dtype=torch.long)
        mask[::3, 2:] = 0
        x = torch.randn(10, 4, 16, generator=generator) @ mixing
        batches.append({"x": x, "attention_mask": mask})
    return workload(Net().eval(), batches, texts, seed=4)


def of_images() -> Workload:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 1), Residual(), Residual(), nn.Flatten(), nn.Linear(96, 3))
    return workload(net.eval(), [torch.randn(12, 2, 4, 4) for _ in range(2)], ("int3",))


def wanted(of: Workload, *texts: str) -> dict[str, tuple[Layer, list[Format]]]:
    return {one.weight_id: (one, [parse_format(t) for t in texts]) for one in of.graph.layers}


def rounded(
    of: Workload, make: Make, *texts: str, iterations: int = 150
) -> dict[tuple[str, Format], StoredWeight]:
    found = learned(of, wanted(of, *texts), make, iterations)
    return {(name, fmt): stored for name, fmt, stored in found}


def block_error(of: Workload, block: str, weights: dict[str, torch.Tensor]) -> float:
    """Return the mean squared error of a block on inputs of the original network, masked."""
    module = of.model.get_submodule(block)
    total, count = 0.0, 0
    for call in seen_calls(of, module):
        with reweighted(of.model, weights), torch.no_grad():
            output = module(*call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        squared = (output - call.output).square()
        squared = squared if call.mask is None else squared[call.mask]
        total, count = total + float(squared.sum()), count + squared.numel()
    return total / count


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("text", ["int3", "int3g8a", "int2t", "int4a"])
@pytest.mark.parametrize("source", [of_tokens, of_images])
def test_lowers_the_error_of_every_block(make: Make, text: str, source) -> None:  # type: ignore[no-untyped-def]
    if source is of_images and "g" in text:
        pytest.skip("groups do not divide")
    of = source()
    before = {n: p.clone() for n, p in of.model.state_dict().items()}
    found, fmt = rounded(of, make, text), parse_format(text)
    layers = [n for unit in of.graph.units for n in unit.layers]
    parameters = dict(of.model.named_parameters())
    better = 0
    for block in blocks_of(of.model, layers):
        names = [f"{layer}.weight" for layer in block.layers]
        after = {n: found[n, fmt].dequantize() for n in names}
        nearest = {n: quantize_weight(parameters[n].detach(), fmt).dequantize() for n in names}
        errors = [block_error(of, block.name, weights) for weights in (after, nearest)]
        assert errors[0] <= errors[1] * (1 + 1e-5)
        better += errors[0] < 0.97 * errors[1]
    assert better >= 2
    assert all(torch.equal(v, before[k]) for k, v in of.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in parameters.values())


@pytest.mark.parametrize("make", MAKES)
def test_what_is_stored_is_what_is_packed(make: Make) -> None:
    of = of_tokens()
    for (name, fmt), stored in rounded(of, make, "int3g8a", "int4", iterations=60).items():
        shape = tuple(of.model.get_parameter(name).shape)
        back = family_of(fmt).unpack(stored.pack(), fmt, shape)
        assert torch.equal(back.dequantize(), stored.dequantize())
        assert int(stored.codes.max()) < 2**fmt.bits


@pytest.mark.parametrize("make", MAKES)
def test_a_seed_gives_the_same(make: Make) -> None:
    one, two = (rounded(of_tokens(), make, "int3", iterations=60) for _ in range(2))
    for key, stored in one.items():
        assert torch.equal(stored.codes, two[key].codes)
        assert torch.equal(stored.scales, two[key].scales)


@pytest.mark.parametrize("make", MAKES)
def test_begins_at_nearest_and_keeps_it_where_nothing_is_learned(make: Make) -> None:
    of = of_tokens()
    for (name, fmt), stored in rounded(of, make, "int3", iterations=0).items():
        nearest = quantize_weight(of.model.get_parameter(name).detach(), fmt)
        assert torch.equal(stored.codes, nearest.codes)
    w = torch.randn(5, 16)
    for text in ("int3", "int4g8a", "int2t"):
        learning = make(w, parse_format(text), 0, 0.9)
        nearest = quantize_weight(w, parse_format(text), 0, 0.9)
        assert torch.equal(learning.stored().dequantize(), nearest.dequantize())


def test_adaround_starts_at_the_weight_itself() -> None:
    w = torch.randn(6, 8)
    w = w.clamp(-1, 1) * 0.5
    w[:, 0] = 1.0  # so that nothing is cut
    torch.testing.assert_close(
        AdaRound(w, parse_format("int4"), 0, 1.0).weight(), w, rtol=1e-3, atol=1e-5
    )


def test_blocks_are_the_smallest_repeated_containers() -> None:
    net = Net()
    layers = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    found = {block.name: block.layers for block in blocks_of(net, layers)}
    assert found == {
        "blocks.0": ("blocks.0.up", "blocks.0.down"),
        "blocks.1": ("blocks.1.up", "blocks.1.down"),
        "head": ("head",),
    }
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert [block.name for block in blocks_of(plain, ["0", "2"])] == ["0", "2"]
    inner = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2)))
    assert [block.name for block in blocks_of(inner, ["0.0", "1.0"])] == ["0.0", "1.0"]


def test_blocks_of_resnets_and_encoders() -> None:
    from examples import digits_resnet20

    net = digits_resnet20.build_model()
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    names = [block.name for block in blocks_of(net, layers)]
    assert names == ["conv1", *(f"blocks.{i}" for i in range(9)), "fc"]
