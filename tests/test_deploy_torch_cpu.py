"""Networks in TorchScript: the searched weights to the last bit, the kernels' outputs, refusals."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mpq
from hw_cost_models import get_cost_model
from hw_cost_models.measured import torch_modules
from hw_cost_models.measured.torch_capability import default_schemes, kernel_for
from hw_cost_models.measured.torch_cpu import TorchCpu
from mpq.cli import app
from mpq.core.errors import InvalidInputError, RunFailedError
from mpq.core.formats import FP32, PerTensor, Scheme, parse_scheme
from mpq.core.latency import REST_INCLUDED
from mpq.core.tables import Cells
from mpq.deploy import torch_cpu
from mpq.deploy.network import relative
from mpq.deploy.torch_cpu import TorchNetwork, stored_bytes, traced
from mpq.nn.batches import call, cut
from mpq.nn.calibrate import with_input_ranges
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating, quantized
from mpq.nn.quantizers import WeightQuantizer
from mpq.store.store import open_store
from tests.builders import Recurrent, case, mlp
from tests.oracles import slow_torchscript_weight
from tests.test_deploy import Aside, Branching, Rows, circular, every_layer, made

pytestmark = pytest.mark.skipif(
    torch_modules.ENGINE not in torch.backends.quantized.supported_engines,
    reason="torch without the x86 quantized engine",
)


def deployed(model: nn.Module, sample: Any, text: str, **options: Any) -> Any:
    """The network with every layer in a scheme, in fp32 where no kernel runs that."""
    graph = build_graph(model, sample, **options)
    static = [layer.name for layer in graph.layers] if "static" in text else []
    graph = with_input_ranges(model, graph, [sample], static)
    network = TorchNetwork.export(model.eval(), graph, sample)
    schemes = every_layer(graph, text, kernel_for)
    quantizer = WeightQuantizer()
    return network, network.mixed(schemes, quantizer, [sample]), schemes, quantizer


def said(model: nn.Module, written: Any, batch: Any) -> np.ndarray:
    """What the kernels are said to return: torch computes every rounding of theirs."""
    with evaluating(model), torch.no_grad(), written.as_kernels():
        array: np.ndarray = call(model, batch).numpy()
        return array


INTEGER = ["int8:int7", "int8t:int7", "int8:int8"]
NETS = [(name, text) for name in ("mlp", "conv", "recurrent", "decoder") for text in INTEGER]
NETS += [(n, t) for n in ("mlp", "recurrent") for t in ("int8:int7static", "int8t:int7sstatic")]
NETS += [("mlp", "fp16"), ("convolutions", "int8:int7s"), ("convolutions", "int8t:int7")]


@pytest.mark.parametrize(("name", "text"), NETS)
def test_outputs_are_those_of_the_said_roundings(name: str, text: str) -> None:
    """A number in the middle between two codes may go either way, which few do here."""
    model, sample, options = made(name)
    network, written, schemes, _ = deployed(model, sample, text, **options)
    assert written.placed
    assert relative(written.output(sample), said(model, written, sample)) < 1e-4
    limits = network.graph.input_ranges
    with evaluating(model), torch.no_grad(), quantized(model, schemes, limits=limits):
        searched = call(model, sample).numpy()
    assert relative(written.output(sample), searched) < 0.1
    if name == "mlp" and ":int7" in text:  # one sample, so no other rounding
        assert relative(written.output(sample), searched) < 1e-5


@pytest.mark.parametrize(("name", "text"), NETS)
def test_stored_weights_are_those_of_the_search_bit_for_bit(name: str, text: str) -> None:
    model, sample, options = made(name)
    _, written, schemes, quantizer = deployed(model, sample, text, **options)
    loaded = dict(torch_cpu._Loaded(model, written.serialized)._module.named_modules())
    parameters = dict(model.named_parameters())
    for layer, placed in written.placed.items():
        kernel = loaded[f"model.{layer}.kernel"]
        weight = parameters[placed.layer.weight_id]
        fmt = schemes[layer].weights
        expected = quantizer.fake_quantize(placed.layer.weight_id, weight.detach(), fmt)
        assert torch.equal(torch.from_numpy(slow_torchscript_weight(kernel)), expected), layer


FRESH = """
import sys
for name in ("mpq", "hw_cost_models", "solvers", "sensitivity"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
module = torch.jit.load(sys.argv[1])
with torch.inference_mode():
    torch.save(module(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.parametrize(("name", "text"), [("conv", "int8:int7"), ("mlp", "fp16")])
def test_a_file_loads_where_this_library_is_not(name: str, text: str, tmp_path: Path) -> None:
    model, sample, options = made(name)
    _, written, _, _ = deployed(model, sample, text, **options)
    (tmp_path / "model.pt").write_bytes(written.serialized)
    torch.save(sample, tmp_path / "sample.pt")
    paths = [str(tmp_path / part) for part in ("model.pt", "sample.pt", "found.pt")]
    command = [sys.executable, "-I", "-W", "ignore", "-c", FRESH, *paths]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert np.array_equal(torch.load(tmp_path / "found.pt").numpy(), written.output(sample))


def test_a_file_tells_nothing_of_the_machine_that_wrote_it() -> None:
    model, sample, _ = made("conv")
    _, written, _, _ = deployed(model, sample, "int8:int7")
    with zipfile.ZipFile(io.BytesIO(written.serialized)) as archive:
        for entry in archive.namelist():
            assert b".py" not in archive.read(entry).replace(b"__torch__.py", b""), entry


@pytest.mark.parametrize("text", ["int8:int7", "fp16", "fp32"])
def test_stored_bytes_are_those_of_the_memory_table(text: str) -> None:
    model, sample = mlp(768, 1536, 768), torch.randn(1, 768)
    network, written, _, _ = deployed(model, sample, text)
    graph = network.graph
    names = tuple(unit.name for unit in graph.units)
    cells = Cells(units=names, schemes=((parse_scheme(text),),) * len(names))
    memory = get_cost_model("memory").table(graph, cells)
    predicted = memory.fixed + memory.values.sum()
    assert written.stored_bytes == pytest.approx(predicted, rel=1e-6)
    assert predicted < len(written.serialized) < predicted + 12_000


@pytest.mark.parametrize("text", ["int8:int7", "fp16"])
def test_tied_and_shared_weights_are_stored_once(text: str) -> None:
    model, sample = Recurrent(times=3), torch.randn(1, 4)
    _, written, _, _ = deployed(model, sample, text)
    assert written.placed.keys() == {"cell", "twin", "head"}
    named = dict(model.named_parameters())  # tied ones once
    biases = sum(4 * p.numel() for name, p in named.items() if name.endswith("bias"))
    weights = [p for name, p in named.items() if name.endswith("weight")]
    expected = {
        "int8:int7": sum(p.numel() + 2 * len(p) for p in weights),
        "fp16": sum(2 * p.numel() for p in weights),
    }
    assert written.stored_bytes == expected[text] + biases
    assert relative(written.output(sample), said(model, written, sample)) < 1e-4


def test_what_a_batch_of_another_size_gives() -> None:
    for model, shape, any_batch in (
        (Branching(), (1, 4), False),
        (Rows(), (3, 8), False),
        (mlp(8, 8), (3, 8), True),
    ):
        sample = torch.randn(shape)
        network = TorchNetwork.export(model.eval(), build_graph(model, sample), sample)
        assert network.any_batch is any_batch
    model, sample, _ = made("conv")
    network, written, _, _ = deployed(model, sample, "int8:int7")
    assert network.any_batch
    batch = torch.cat([sample, 0.5 * sample, 0.1 * sample])
    assert relative(written.output(batch), said(model, written, batch)) < 1e-4


def test_deploying_leaves_the_model_as_it_was() -> None:
    model, sample = case("decoder")
    graph = build_graph(model, sample)
    model.train()
    before = {n: (id(m), m.training, set(vars(m))) for n, m in model.named_modules()}
    network = TorchNetwork.export(model, graph, sample)
    network.mixed(every_layer(graph, "int8:int7", kernel_for), WeightQuantizer(), [])
    with pytest.raises(InvalidInputError, match="cannot trace this network: "):
        traced(model, {"input_ids": torch.ones(2, 3)}, {})
    assert {n: (id(m), m.training, set(vars(m))) for n, m in model.named_modules()} == before
    assert torch.backends.quantized.engine != "none"


class Viewed(nn.Module):
    """Reads a convolution's output as one row, which needs torch's own layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(288, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).view(len(x), -1))


def test_a_kernel_returns_the_layout_of_the_layer_that_it_replaces() -> None:
    model, sample = Viewed(), torch.randn(2, 3, 8, 8)
    _, written, _, _ = deployed(model, sample, "int8:int7")
    assert relative(written.output(sample), said(model, written, sample)) < 1e-4


REFUSED: dict[str, tuple[Any, str, tuple[int, ...], str]] = {
    "no kernel": (
        lambda: mlp(16, 16),
        "int4",
        (1, 16),
        "layer '0' cannot be deployed in int4: int4: torch._weight_int4pack_mm_for_cpu",
    ),
    "nearest": (lambda: mlp(16, 16), "int8a:int8", (1, 16), "layer '0' .* use int8:int7"),
    "padding": (circular, "int8:int7", (1, 2, 6, 6), "layer '0' cannot be .* pads otherwise"),
    "half": (lambda: mlp(16, 16).bfloat16(), "int8:int7", (1, 16), "layer '0' is in bf16: torch"),
    "outside": (lambda: Aside(True), "int8:int7", (16, 16), "weight of layer 'used' is read outs"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_deployed_is_refused_by_name(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, text, shape, message = REFUSED[what]
    model, sample = make(), torch.randn(shape)
    if what == "half":  # NumPy has no bf16, so its outputs cannot be compared
        sample = sample.bfloat16()
        monkeypatch.setattr(torch_cpu, "_difference", lambda *_: 0.0)
    graph = with_input_ranges(model, build_graph(model, sample), [sample])
    schemes = {n: parse_scheme(text) for unit in graph.units for n in unit.layers}
    with pytest.raises(InvalidInputError, match=message) as told:
        TorchNetwork.export(model, graph, sample).mixed(schemes, WeightQuantizer(), [sample])
    assert "\n" not in str(told.value)


def test_an_integer_convolution_needs_calibration() -> None:
    model, sample, _ = made("conv")
    graph = build_graph(model, sample)
    network = TorchNetwork.export(model.eval(), graph, sample)
    with pytest.raises(InvalidInputError, match="layer '0' in int8:int7 needs the calibrated ran"):
        network.mixed(every_layer(graph, "int8:int7", kernel_for), WeightQuantizer(), [])


def test_a_weight_that_another_module_has_too_is_refused() -> None:
    """The search takes it to be quantized there as well."""
    model, sample = Recurrent(times=3), torch.randn(1, 4)
    made = torch_cpu.kernels(deployed(model, sample, "int8:int7")[1].placed)
    with pytest.raises(InvalidInputError, match="weight of layer 'cell' is read outside"):
        traced(model, sample, {"cell": made["cell"]})


EXAMPLES = ["digits_vit", "digits_resnet20", pytest.param("minilm", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_deploy_in_a_mix_of_formats(name: str) -> None:
    """Every layer takes another of the formats that it is offered."""
    example = importlib.import_module(f"examples.{name}")
    model, batches = example.make_model(), example.calibration_batches()[:1]
    sample = cut(batches[0], 0, 1)
    graph = with_input_ranges(model, build_graph(model, sample), batches)
    offered = {u: default_schemes(graph.by_name[u.layers[0]]) for u in graph.units}
    schemes = {
        layer: offers[i % len(offers)]
        for i, (unit, offers) in enumerate(offered.items())
        for layer in unit.layers
    }
    network = TorchNetwork.export(model, graph, sample)
    assert network.any_batch
    written = network.mixed(schemes, WeightQuantizer(), batches)
    found, expected = written.output(sample), said(model, written, sample)
    limits = graph.input_ranges
    with evaluating(model), torch.no_grad(), quantized(model, schemes, limits=limits):
        searched = call(model, sample).numpy()
    assert relative(found, expected) < relative(expected, searched) + 0.05
    assert relative(found, searched) < 0.3
    memory = sum(
        schemes[unit.layers[0]].weights.storage_bits(layer.weight_shape, layer.channel_axis) / 8
        for unit in graph.units
        for layer in graph.stored_layers(unit)
    )
    assert written.stored_bytes == pytest.approx(graph.fixed_bytes + memory, rel=2e-4)
    assert len(written.serialized) - written.stored_bytes < 4_000 * len(list(model.modules()))


# --- of runs -----------------------------------------------------------------------------------


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.Flatten(),
        nn.Linear(144, 8),
    ).eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    here = "tests.test_deploy_torch_cpu"
    with open_store(str(tmp_path_factory.mktemp("store") / "runs.db")) as store:
        yield mpq.search(
            f"{here}:make_model",
            f"{here}:batches",
            budgets=["memory <= 60%", "latency <= 500%"],
            hardware="local:torch_cpu",
            executor="serial",
            refine=0,
            latency_seconds=1.0,
            storage=store,
            name="torch",
        )


def test_a_run_deploys_without_anything_else(run: Any, tmp_path: Path) -> None:
    made = run.deploy("torch_cpu", tmp_path / "model.pt", seconds=0.2)
    assert run.deployments[-1] == made
    totals = run.solution.totals
    assert made.file_bytes == (tmp_path / "model.pt").stat().st_size
    assert made.stored_bytes == stored_bytes((tmp_path / "model.pt").read_bytes())
    assert made.predicted_bytes == round(totals["memory"])
    assert made.stored_bytes == pytest.approx(made.predicted_bytes, rel=2e-3)
    assert 0 < made.low_s < made.measured_s < made.high_s
    assert made.device == TorchCpu().device
    assert made.samples == 9
    assert made.unexplained < 0.02
    assert made.any_batch
    assert any(not scheme.is_native for scheme in run.allocation.values())


def test_latency_is_that_of_the_whole_network(run: Any, tmp_path: Path) -> None:
    table = run.problem.costs["latency"]
    device = run.store.run(run.run_id).device
    cases = run.store.kernel_latencies(device)
    (whole,) = (latency for case, latency in cases.items() if case.kernel == "network fp32")
    assert whole.case.backend == "torch_cpu"
    made = run.deploy("torch_cpu", tmp_path / "model.pt", seconds=0.2)
    assert REST_INCLUDED in table.provenance
    assert table.baseline == whole.median_s
    assert made.predicted_s == pytest.approx(run.solution.totals["latency"])


def test_a_kernel_that_computes_something_else_is_refused(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = torch_cpu._Written.output
    monkeypatch.setattr(torch_cpu._Written, "output", lambda *args: 1.5 * output(*args))
    with pytest.raises(RunFailedError, match="TorchScript's outputs differ from those that the"):
        run.deploy("torch_cpu", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_the_command_line_deploys(run: Any, tmp_path: Path) -> None:
    written = ["--out", str(tmp_path / "model.pt"), "--seconds", "0.2", "--json"]
    options = ["--to", "torch_cpu", "--storage", str(run.store.url.database)]
    done = CliRunner().invoke(app, ["deploy", "torch", *written, *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"] == "torch_cpu"


def test_a_torch_without_the_engine_is_told_in_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hw_cost_models.measured.torch_cpu.ENGINE", "abacus")
    with pytest.raises(InvalidInputError, match="needs torch's quantized engine 'abacus'"):
        run.deploy("torch_cpu", tmp_path / "model.pt")


def test_targets_are_told(run: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"unknown target 'torch'.*onnxruntime, torch_cpu"):
        run.deploy("torch", "model.pt")


def test_per_tensor_scales_are_one_number() -> None:
    assert isinstance(parse_scheme("int8t:int7").weights.granularity, PerTensor)
    model, sample, _ = made("mlp")
    _, written, _, _ = deployed(model, sample, "int8t:int7")
    _, wide, _, _ = deployed(model, sample, "int8:int7")
    channels = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    layers = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert wide.stored_bytes - written.stored_bytes == 2 * (channels - layers)
    assert Scheme(FP32) not in {p.scheme for p in written.placed.values()}
