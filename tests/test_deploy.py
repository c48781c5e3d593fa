"""Deployed models: the searched weights to the last bit, the kernels' outputs, and refusals."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hw_cost_models import get_cost_model
from hw_cost_models.measured.capability import default_schemes, kernel_for
from mpq.core.deployment import Deployment
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme, parse_scheme
from mpq.core.layers import LayerGraph, LayerName
from mpq.core.tables import Cells
from mpq.deploy.marked import export_marked
from mpq.deploy.network import OnnxNetwork, relative
from mpq.deploy.onnx_model import stored_bytes
from mpq.deploy.onnxruntime import Session
from mpq.deploy.placed import Placed, markable
from mpq.deploy.rounding import as_kernels
from mpq.deploy.served import feeds
from mpq.nn.batches import call, cut
from mpq.nn.calibrate import with_input_ranges
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating
from mpq.nn.quantizers import WeightQuantizer
from tests.builders import Decoder, Recurrent, Shuffled, case, conv_net, mlp, tokens
from tests.oracles import slow_deployed_weights

LINEAR = ["int8:int8", "int8t:int8", "int8a:int8"]
STATIC = ["int8:int8static", "int8t:int8sstatic", "int8a:int8static"]
LINEAR += ["int8g16", "int8g32a", "int4g16a", "int4g32", "int4g64a", "int2g32", "int2g32a"]


def deployed(
    model: nn.Module, sample: Any, text: str, **options: Any
) -> tuple[OnnxNetwork, bytes, dict[LayerName, Placed], WeightQuantizer]:
    """The network with every layer in a scheme, in fp32 where no kernel runs that."""
    graph = build_graph(model, sample, **options)
    static = [layer.name for layer in graph.layers] if "static" in text else []
    graph = with_input_ranges(model, graph, [sample], static)
    network = OnnxNetwork.export(model.eval(), graph, sample)
    quantizer = WeightQuantizer()
    schemes = every_layer(graph, text)
    serialized, placed = network.mixed(schemes, quantizer, [sample])
    assert any(not p.scheme.is_native for p in placed.values()) or text == "fp32"
    return network, serialized, placed, quantizer


def every_layer(graph: LayerGraph, text: str, runs: Any = kernel_for) -> dict[LayerName, Scheme]:
    wanted, layers = parse_scheme(text), graph.by_name
    return {
        name: wanted if runs(layers[name], wanted) else Scheme(FP32)
        for unit in graph.units
        for name in unit.layers
    }


def outputs(
    network: OnnxNetwork,
    serialized: bytes,
    placed: dict[LayerName, Placed],
    quantizer: WeightQuantizer,
    batch: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the runtime returns, what its kernels are said to, and what the search assumes."""
    schemes = {name: p.scheme for name, p in placed.items()}
    found = Session(serialized).output(feeds(network.model, batch))
    with evaluating(network.model), torch.no_grad(), as_kernels(network.model, placed, quantizer):
        said = call(network.model, batch).numpy()
    return found, said, network.fake_quantized_output(schemes, quantizer, batch)


def made(name: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    torch.manual_seed(3)
    if name == "mlp":
        return mlp(64, 128, 32), torch.randn(1, 64), {}
    if name == "convolutions":
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)
        return nn.Sequential(*layers), torch.randn(2, 3, 8, 8), {}
    if name == "embedded":  # a head tied to an embedding that is searched
        return Decoder(width=32), tokens(1), {"embeddings": True}
    return (*case(name), {})


NETS = [("mlp", text) for text in LINEAR]
NETS += [("embedded", text) for text in ("int8g16", "int4g32a", "int8g32a")]
NETS += [("conv", text) for text in LINEAR[:3]]
NETS += [("convolutions", "int8:int8s")]  # a linear layer has no symmetric kernel
NETS += [("mlp", text) for text in STATIC]
NETS += [("convolutions", "int8:int8static"), ("recurrent", "int8:int8static")]
NETS += [("recurrent", "int8:int8"), ("untied", "int8a:int8")]


@pytest.mark.parametrize(("name", "text"), NETS)
def test_deployed_weights_are_those_of_the_search_bit_for_bit(name: str, text: str) -> None:
    model, sample, options = made(name)
    _, serialized, placed, quantizer = deployed(model, sample, text, **options)
    found = slow_deployed_weights(onnx.load_from_string(serialized))
    quantized = {p.layer.weight_id: p for p in placed.values() if not p.scheme.is_native}
    assert found.keys() == quantized.keys()
    parameters = dict(model.named_parameters())
    for weight, p in quantized.items():
        fmt, axis = p.scheme.weights, p.layer.channel_axis
        searched = quantizer.fake_quantize(weight, parameters[weight], fmt, axis).detach().numpy()
        assert np.array_equal(found[weight], searched), weight


@pytest.mark.parametrize(("name", "text"), [*NETS, *((name, "fp32") for name in ("conv", "mlp"))])
def test_outputs_are_those_of_the_said_roundings(name: str, text: str) -> None:
    """A number in the middle between two codes may go either way, which few do here."""
    model, sample, options = made(name)
    found, said, _ = outputs(*deployed(model, sample, text, **options), sample)
    assert relative(found, said) < 1e-4


@pytest.mark.parametrize("text", LINEAR[:3])
def test_dynamic_int8_of_one_sample_is_what_the_search_assumes(text: str) -> None:
    model, sample = mlp(64, 128, 32), torch.randn(1, 64)
    found, _, searched = outputs(*deployed(model, sample, text), sample)
    assert relative(found, searched) < 1e-5


@pytest.mark.parametrize("text", STATIC)
def test_static_int8_is_what_the_search_assumes_whatever_the_batch(text: str) -> None:
    model, sample = mlp(64, 128, 32), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    network, serialized, placed, quantizer = deployed(model, sample, text)
    others = torch.cat([3 * sample, sample[:2]])  # beyond the calibrated range, too
    found, _, searched = outputs(network, serialized, placed, quantizer, others)
    assert relative(found, searched) < 1e-5


@pytest.mark.parametrize("text", LINEAR[3:])
def test_blockwise_kernels_differ_by_no_more_than_their_activation_rounding(text: str) -> None:
    """Each output by at most the sum over blocks of max|x| / 254 * sum |w|."""
    torch.manual_seed(0)
    model, sample = nn.Sequential(nn.Linear(64, 32)), torch.randn(7, 64)
    network, serialized, placed, quantizer = deployed(model, sample, text)
    found, _, searched = outputs(network, serialized, placed, quantizer, sample)
    weight = quantizer.fake_quantize("0.weight", model[0].weight, placed["0"].scheme.weights)
    block = parse_scheme(text).weights.granularity.size  # type: ignore[union-attr]
    bound = np.zeros(searched.shape)
    for start in range(0, 64, block):
        largest = sample[:, start : start + block].abs().amax(1, keepdim=True) / 254
        sums = weight[:, start : start + block].abs().sum(1)
        bound += (largest * sums).detach().numpy()
    assert (np.abs(found - searched) <= bound + 1e-5).all()
    assert np.abs(found - searched).max() > 1e-5  # the kernel does round


def test_shared_layers_run_at_every_call_and_tied_weights_are_stored_once() -> None:
    model, sample = Recurrent(times=3), torch.randn(1, 4)
    _, serialized, _, _ = deployed(model, sample, "int8:int8")
    loaded = onnx.load_from_string(serialized)
    products = [n.name for n in loaded.graph.node if n.op_type == "DynamicQuantizeMatMul"]
    calls = ("cell/1", "cell/2", "cell/3", "twin/1", "head/1")
    assert [name.rpartition("/")[0] for name in products] == list(calls)
    codes = [t.name for t in loaded.graph.initializer if t.name.endswith(".codes")]
    assert codes == ["cell.weight.codes", "head.weight.codes"]


@pytest.mark.parametrize("text", ["fp32", "int4g32a", "int8g16"])
def test_an_embedding_tied_to_a_head_is_stored_once(text: str) -> None:
    model, sample, options = made("embedded")
    _, serialized, placed, _ = deployed(model, sample, text, **options)
    assert placed["embed"].weight is placed["lm_head"].weight
    stored = [t for t in onnx.load_from_string(serialized).graph.initializer if "embed" in t.name]
    ends = {"fp32": {""}, "int8g16": {".codes", ".scales", ".shape"}}
    expected = ends.get(text, ends["int8g16"] | {".zero_points"})
    assert {t.name.removeprefix("embed.weight") for t in stored} == expected


@pytest.mark.parametrize("text", ["int4g32", "int4g128a", "int8:int8", "int2g32a", "fp32"])
def test_stored_bytes_are_those_of_the_memory_table(text: str) -> None:
    model, sample = mlp(768, 1536, 768), torch.randn(1, 768)
    network, serialized, _, _ = deployed(model, sample, text)
    graph = network.graph
    names = tuple(unit.name for unit in graph.units)
    cells = Cells(units=names, schemes=((parse_scheme(text),),) * len(names))
    memory = get_cost_model("memory").table(graph, cells)
    predicted = memory.fixed + memory.values.sum()
    assert stored_bytes(serialized) == pytest.approx(predicted, rel=1e-3)
    assert len(serialized) == pytest.approx(predicted, rel=2e-3)


class Rows(nn.Module):
    """Counts its samples while it is traced, so that its graph fits one batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + torch.ones(int(x.shape[0]), 8)).reshape(int(x.shape[0]), 2, 2)


def test_any_batch_size_runs_where_the_network_allows_it() -> None:
    model, sample = conv_net(), torch.randn(1, 3, 8, 8)
    network, serialized, placed, quantizer = deployed(model, sample, "int8:int8")
    assert network.marked.any_batch
    found, said, _ = outputs(network, serialized, placed, quantizer, torch.randn(5, 3, 8, 8))
    assert relative(found, said) < 1e-4
    network, serialized, placed, quantizer = deployed(Rows(), torch.randn(3, 8), "int8:int8")
    assert not network.marked.any_batch
    found, said, _ = outputs(network, serialized, placed, quantizer, torch.randn(3, 8))
    assert relative(found, said) < 1e-4


def test_exporting_leaves_the_model_as_it_was() -> None:
    model, sample = case("decoder")
    model.train()
    before = {n: (id(m), m.training, set(vars(m))) for n, m in model.named_modules()}
    names = markable(model, build_graph(model, sample))
    export_marked(model, sample, names)
    with pytest.raises(InvalidInputError, match="cannot write this network as ONNX: "):
        export_marked(model, {"input_ids": torch.ones(2, 3)}, names)
    assert {n: (id(m), m.training, set(vars(m))) for n, m in model.named_modules()} == before


def test_a_layer_that_is_not_called_is_told_by_name() -> None:
    with pytest.raises(InvalidInputError, match="layer 'never' is not called on the sample"):
        export_marked(Shuffled(), torch.randn(1, 6), ["first", "never"])


class Aside(nn.Module):
    """One layer's output is dropped, one weight is read by a function as well."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.used, self.dropped = nn.Linear(16, 16), nn.Linear(16, 16)
        self.outside = outside

    def forward(self, x: torch.Tensor) -> Any:
        if self.outside:
            return self.dropped(self.used(x)) + x * self.used.weight
        return self.used(x), self.dropped(x)


def circular() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Flatten())


REFUSED = {
    "no kernel": (lambda: mlp(16, 16), "int4", (1, 16), "layer '0' .* int4: MatMulNBits needs gro"),
    "padding": (circular, "int8:int8", (1, 2, 6, 6), "layer '0' cannot be .* pads otherwise"),
    "half": (lambda: mlp(16, 16).bfloat16(), "int8:int8", (1, 16), "layer '0' is in bf16: ONNX"),
    "dropped": (lambda: Aside(False), "int8:int8", (1, 16), "'dropped' has no ONNX node"),
    "outside": (lambda: Aside(True), "int8:int8", (16, 16), "of layer 'used' is read outside"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_deployed_is_refused_by_name(what: str) -> None:
    make, text, shape, message = REFUSED[what]
    model, sample = make(), torch.randn(shape)
    sample = sample.bfloat16() if what == "half" else sample
    graph = with_input_ranges(model, build_graph(model, sample), [sample])
    schemes = {n: parse_scheme(text) for unit in graph.units for n in unit.layers}
    with pytest.raises(InvalidInputError, match=message):
        OnnxNetwork.export(model, graph, sample).mixed(schemes, WeightQuantizer(), [sample])


def test_an_integer_convolution_needs_calibration() -> None:
    model, sample = conv_net(), torch.randn(1, 3, 8, 8)
    graph = build_graph(model, sample)
    network = OnnxNetwork.export(model, graph, sample)
    with pytest.raises(InvalidInputError, match="layer '0' in int8:int8 needs the calibrated ran"):
        network.mixed(every_layer(graph, "int8:int8"), WeightQuantizer(), [])


def test_padding_that_no_node_has_stays_in_fp32() -> None:
    model, sample = circular(), torch.randn(1, 2, 6, 6)
    graph = build_graph(model, sample)
    network = OnnxNetwork.export(model, graph, sample)
    serialized, placed = network.mixed({"0": Scheme(FP32)}, WeightQuantizer(), [])
    assert placed == {}
    expected = model(sample).detach().numpy()
    assert relative(Session(serialized).output(feeds(model, sample)), expected) < 1e-5


class Decomposed(nn.Module):
    """Does what ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(self.linear(x))[1]


def test_a_network_that_torch_cannot_export_is_told_in_one_line() -> None:
    model, sample = Decomposed(), torch.randn(2, 4, 4)
    with pytest.raises(
        InvalidInputError, match="torch cannot write this network as ONNX: "
    ) as told:
        OnnxNetwork.export(model, build_graph(model, sample), sample)
    assert "\n" not in str(told.value)


class Branching(nn.Module):
    """Takes another path for other batches, which a trace does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (1.0 if x.shape[0] == 1 else 2.0)


def test_a_trace_that_is_wrong_for_other_batches_is_for_that_of_the_sample_alone() -> None:
    model, sample = Branching(), torch.randn(1, 4)
    network = OnnxNetwork.export(model, build_graph(model, sample), sample)
    assert not network.marked.any_batch


def record(**changes: Any) -> Deployment:
    values: dict[str, Any] = {
        "target": "onnxruntime",
        "path": "model.onnx",
        "file_bytes": 1100,
        "stored_bytes": 1000,
        "predicted_bytes": 1000,
        "samples": 4,
        "difference": 0.02,
        "rounding": 0.01,
        "unexplained": 0.001,
        "quantization": 0.1,
        "device": "here",
        "measured_s": 2e-3,
        "low_s": 1.9e-3,
        "high_s": 2.1e-3,
        "fp32_s": 3e-3,
        "fp32_low_s": 2.9e-3,
        "fp32_high_s": 3.1e-3,
        "predicted_s": 2.2e-3,
        "any_batch": True,
    }
    return Deployment(**(values | changes))


def test_a_deployment_reads_back_and_tells_what_it_is() -> None:
    kept = record()
    assert Deployment.from_text(kept.text()) == kept
    assert kept.speed_up == pytest.approx(1.5)
    assert kept.latency_error == pytest.approx(0.1)
    told = "\n".join(kept.lines())
    for text in ("predicted 1.0 kB", "+10.0%", "1.50 times as fast as fp32", "any batch size"):
        assert text in told
    blind = record(predicted_s=None, predicted_bytes=None, any_batch=False)
    assert blind.latency_error is None
    assert "predicted" not in "\n".join(blind.lines())
    assert Deployment.from_text(blind.text()) == blind


def test_fp32_products_and_activations_keep_their_names() -> None:
    """Somebody who opens the file finds the parameters of the network."""
    model, sample = case("decoder")
    _, serialized, _, _ = deployed(model, sample, "int8:int8")
    names = {t.name for t in onnx.load_from_string(serialized).graph.initializer}
    assert {"embed.weight", "blocks.0.norm.weight", "blocks.0.q_proj.weight.codes"} <= names


def test_padding_of_the_same_size_is_that_of_torch() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    same = nn.Conv2d(2, 3, 3, padding="same", bias=False)
    same.weight = nn.Parameter(w)
    network, serialized, _, _ = deployed(nn.Sequential(same, nn.Flatten()), x, "fp32")
    found = Session(serialized).output(feeds(network.model, x))
    expected = F.conv2d(x, w, padding=1).flatten(1).numpy()
    assert relative(found, expected) < 1e-5


EXAMPLES = ["digits_vit", "digits_resnet20", pytest.param("minilm", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_deploy_in_a_mix_of_formats(name: str) -> None:
    """Every layer takes another of the formats that it is offered."""
    example = importlib.import_module(f"examples.{name}")
    model, batches = example.make_model(), example.calibration_batches()[:1]
    sample = cut(batches[0], 0, 1)
    graph = with_input_ranges(model, build_graph(model, sample), batches)
    names = [layer for unit in graph.units for layer in unit.layers]
    offered = {layer: default_schemes(graph.by_name[layer]) for layer in names}
    schemes = {n: offers[i % len(offers)] for i, (n, offers) in enumerate(offered.items())}
    network, quantizer = OnnxNetwork.export(model, graph, sample), WeightQuantizer()
    assert network.marked.any_batch
    serialized, placed = network.mixed(schemes, quantizer, batches)
    assert placed.keys() == set(names)
    found, said, searched = outputs(network, serialized, placed, quantizer, sample)
    assert relative(found, said) < relative(said, searched) + 1e-3 < 0.1
