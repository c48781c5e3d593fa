"""Integer convolutions compute their batch norm and ReLU, and pass codes on as they are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mpq.core.formats import FP32, Scheme, parse_scheme
from mpq.deploy.network import OnnxNetwork, relative
from mpq.deploy.tails import Tail
from mpq.nn.calibrate import with_input_ranges
from mpq.nn.graph import build_graph
from mpq.nn.quantizers import WeightQuantizer
from tests.oracles import slow_deployed_weights
from tests.test_deploy import deployed, outputs


class Residual(nn.Module):
    """Two convolutions with batch norms around a shortcut, one more before and a head."""

    def __init__(self, seed: int = 0, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8)
        self.one, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8)
        self.two, self.last = nn.Conv2d(8, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # some channels are turned
                module.weight.data = torch.randn(8) + 0.5
                module.bias.data = torch.randn(8) / 2
                module.running_mean = torch.randn(8) / 4
                module.running_var = torch.rand(8) + 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.norm(self.one(x)))
        y = torch.relu(self.last(self.two(y)) + x)
        return self.head(y.mean((2, 3)))


def nodes(serialized: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(serialized).graph.node)


def sample() -> torch.Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("text", ["int8:int8", "int8t:int8", "int8:int8s"])
def test_outputs_are_those_of_the_said_roundings(text: str, bias: bool) -> None:
    made = deployed(Residual(bias=bias), sample(), text)
    found, said, searched = outputs(*made, sample())
    assert relative(found, said) < 1e-4
    assert relative(found, searched) < 0.05
    assert nodes(made[1])["BatchNormalization"] == 0


def test_codes_are_passed_on_where_the_next_layer_reads_them() -> None:
    """Of three convolutions only the first rounds its input; the shortcut and the sum read numbers.

    A convolution that reads symmetric codes rounds for itself.
    """
    _, serialized, placed, _ = deployed(Residual(), sample(), "int8:int8")
    found = nodes(serialized)
    assert (found["QuantizeLinear"], found["DequantizeLinear"], found["QLinearConv"]) == (1, 2, 3)
    assert placed["stem"].output_limits == placed["one"].input_limits
    assert found["Relu"] == 1
    _, serialized, _, _ = deployed(Residual(), sample(), "int8:int8s")
    assert nodes(serialized)["QuantizeLinear"] == 3


def test_between_formats_numbers_are_passed_on() -> None:
    model = Residual()
    graph = with_input_ranges(model, build_graph(model.eval(), sample()), [sample()])
    network = OnnxNetwork.export(model, graph, sample())
    schemes = {name: Scheme(FP32) for name in ("stem", "two", "head")}
    schemes["one"] = parse_scheme("int8:int8")
    quantizer = WeightQuantizer()
    serialized, placed = network.mixed(schemes, quantizer, [sample()])
    counted = nodes(serialized)
    assert counted["BatchNormalization"] == 2
    assert counted["QuantizeLinear"] == counted["DequantizeLinear"] == 1
    found, said, _ = outputs(network, serialized, placed, quantizer, sample())
    assert relative(found, said) < 1e-5


def test_weights_and_norms_are_those_of_the_search() -> None:
    model = Residual()
    _, serialized, placed, quantizer = deployed(model, sample(), "int8:int8")
    found = slow_deployed_weights(onnx.load_from_string(serialized))
    for name in ("stem", "one", "two"):
        weight = dict(model.named_parameters())[f"{name}.weight"]
        searched = quantizer.fake_quantize(weight=weight, name="", fmt=placed[name].scheme.weights)
        assert np.array_equal(found[f"{name}.weight"], searched.detach().numpy())
    names = {tensor.name for tensor in onnx.load_from_string(serialized).graph.initializer}
    assert {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"} <= names


@pytest.mark.parametrize("what", ["dead channel", "read twice", "called twice"])
def test_a_tail_that_integers_do_not_hold_stays_outside(what: str) -> None:
    model = Residual()
    if what == "dead channel":
        model.norm.weight.data[3] = 0.0
    if what == "read twice":

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = model.one(model.stem(x))
            return (model.norm(y) + y).mean((2, 3))

        model.forward = forward  # type: ignore[method-assign]
    if what == "called twice":

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = model.norm(model.one(model.stem(x)))
            return torch.relu(model.last(model.one(y))).mean((2, 3))

        model.forward = forward  # type: ignore[method-assign]
    made = deployed(model, sample(), "int8:int8")
    found, said, _ = outputs(*made, sample())
    assert relative(found, said) < 1e-4
    assert nodes(made[1])["BatchNormalization"] > 0
    assert (made[2]["one"].tail is None) == (what != "read twice")


def test_what_a_tail_does_it_can_undo() -> None:
    rng = np.random.default_rng(0)
    factor, offset = rng.normal(size=(2, 6)).astype(np.float32)
    tail = Tail(factor=factor, offset=offset, held=offset, output="y")
    values = torch.from_numpy(rng.normal(size=(3, 6, 2)).astype(np.float32))
    assert torch.allclose(tail.undone(tail.applied(values)), values, atol=1e-4)
    held = tail.within(np.full(6, 1e-3, np.float32))
    assert held is not None
    assert np.abs(held.held - offset).max() <= 1e-3 * np.abs(factor).max() / 2 + 1e-6
    assert tail.within(np.full(6, 1e-12, np.float32)) is None
