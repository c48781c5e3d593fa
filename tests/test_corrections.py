"""Biases and batch-norm statistics of a quantized network, put right on calibration data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.formats import parse_scheme
from mpq.core.problem import Allocation
from mpq.nn.batch_norm import batch_statistics, reestimated
from mpq.nn.divergence import OutputDivergence
from mpq.nn.graph import build_graph
from mpq.nn.input_means import input_means, with_added_biases
from mpq.nn.patch import quantized
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.shipping import ship
from mpq.nn.weights import layer_modules
from mpq.nn.workload import Workload
from mpq.store.store import Store, open_store
from sensitivity.alone import alone
from sensitivity.calls import Calls
from sensitivity.changes import Change
from tests.builders import Decoder, conv_net, mlp, schemes
from tests.builders import workload as make_workload
from tests.oracles_pipeline import mean_output_change

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear of tokens": (nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "conv": (nn.Conv2d(3, 5, 3, padding=1), (3, 3, 7, 6)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, dilation=2, bias=False), (3, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=2), (3, 4, 5, 5)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (3, 2, 5, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (3, 3, 4, 4)),
    "conv1d": (nn.Conv1d(3, 4, 5, padding="same"), (3, 3, 9)),
}


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_the_mean_output_is_that_of_the_original(name: str) -> None:
    layer, shape = LAYERS[name]
    model = nn.Sequential(filled(copy.deepcopy(layer))).eval()
    torch.manual_seed(1)
    batches = [torch.randn(n, *shape[1:]) + 1.0 for n in (3, 5)]
    graph = build_graph(model, batches[0])
    means, why_not = input_means(model, graph, tuple(batches))
    assert not why_not
    int3 = {"0": parse_scheme("int3")}
    axis = 1 if name == "transposed" else 0
    own = layer_weight(model)
    stored = WeightQuantizer().fake_quantize("w", own, int3["0"].weights, axis)
    with torch.no_grad():
        before = model(batches[0])
        with quantized(model, int3):
            plain = model(batches[0])
        with quantized(model, int3, means=means):
            corrected = model(batches[0])
    moved = (corrected - plain).double()
    axis = -1 if name.startswith("linear") else 1
    per_channel = moved.movedim(axis, -1).reshape(-1, moved.shape[axis])
    expected = mean_output_change(model[0], stored, batches)
    torch.testing.assert_close(per_channel[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(per_channel, expected.expand_as(per_channel), rtol=1e-4, atol=1e-4)
    assert float(expected.abs().max()) > 1e-2
    assert not torch.allclose(before, corrected)


def layer_weight(model: nn.Module) -> torch.Tensor:
    return model[0].weight.detach()  # type: ignore[index]


def test_biases_come_back_as_the_same_objects() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3, bias=False)).eval()
    batch = torch.rand(4, 6)
    means, _ = input_means(model, build_graph(model, batch), (batch,))
    bias, state = model[0].bias, copy.deepcopy(model.state_dict())
    chosen = {"0": parse_scheme("int2"), "1": parse_scheme("int2")}
    seen = []

    def breaks() -> None:
        seen.extend((model[0].bias is bias, model[1].bias is None))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), quantized(model, chosen, means=means):
        breaks()
    assert seen == [False, False]
    assert model[0].bias is bias
    assert model[1].bias is None
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with quantized(model, {"0": parse_scheme("fp32"), "1": parse_scheme("fp32:int8")}, means=means):
        assert model[0].bias is bias  # nothing was rounded
        assert model[1].bias is None


def test_masked_positions_do_not_count() -> None:
    model = Decoder(tied=False).eval()
    ids = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    graph = build_graph(model, {"input_ids": ids})
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    means, _ = input_means(model, graph, ({"input_ids": ids, "attention_mask": mask},))
    handle.remove()
    expected = seen[0][mask.bool()].mean(0, keepdim=True)
    torch.testing.assert_close(means["lm_head"], expected)
    assert not torch.allclose(means["lm_head"], seen[0].reshape(-1, 8).mean(0))


def test_what_has_no_bias_to_correct_is_told() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(100, 2))
    batch = torch.randn(2, 4, 4, 4)
    means, why_not = input_means(model.eval(), build_graph(model, batch), (batch,))
    assert means.keys() == {"2"}
    assert why_not == {"0": "a transposed convolution in groups"}


def test_added_biases_count_as_bytes() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3, bias=False)).eval()
    batch = torch.rand(4, 6)
    graph = build_graph(model, batch)
    means, _ = input_means(model, graph, (batch,))
    more = with_added_biases(model, graph, means)
    assert more.fixed_bytes == graph.fixed_bytes + 3 * 4
    assert more.unsearched[-1].name == "1.bias"


def corrected_workload(
    model: nn.Module, batches: list[Any], texts: tuple[str, ...], **options: Any
) -> Workload:
    workload = make_workload(model, batches, texts, **options)
    means, _ = input_means(model, workload.graph, tuple(batches))
    return replace(workload, input_means=means)


@pytest.mark.parametrize("base", [None, "int3", "int4:int4"])
@pytest.mark.parametrize("of", ["mlp", "conv"])
def test_scores_replay_corrected_layers(of: str, base: str | None) -> None:
    """The change of a layer alone is what the corrected network's layer really gives."""
    torch.manual_seed(0)
    model = mlp().eval() if of == "mlp" else conv_net().eval()
    batch = torch.randn(5, 6) + 1 if of == "mlp" else torch.randn(5, 3, 8, 8) + 1
    texts = ("fp32", "int2", "int3", "int4:int4", "fp32:int4")
    workload = corrected_workload(model, [batch], texts)
    modules, layers = layer_modules(model, workload.graph), workload.graph.by_name
    choices = schemes(*texts)
    with Calls(workload) as calls, torch.no_grad():
        model(batch)
    for name, module in modules.items():
        (inputs,) = calls._inputs[name]
        own = None if base is None else parse_scheme(base)
        change = Change(workload, layers[name], module, choices, own)
        found = dict(change.outputs(inputs))

        for number, scheme in enumerate(choices):
            expected = _output(workload, name, scheme, inputs) - _output(
                workload, name, own, inputs
            )
            got = found.get(number, torch.zeros_like(expected))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            gradient = torch.randn(2, *expected.shape)
            inner = change.inner(inputs, gradient, 5)[number]
            products = (gradient * expected).reshape(2, 5, -1).sum(2).T
            torch.testing.assert_close(inner, products, rtol=1e-3, atol=1e-3)


def _output(workload: Workload, name: str, scheme: Any, inputs: torch.Tensor) -> torch.Tensor:
    module = layer_modules(workload.model, workload.graph)[name]
    used = {} if scheme is None else {name: scheme}
    with torch.no_grad(), workload.quantized_layers(used):
        return module(inputs)


def test_the_cheaper_way_to_inner_products_is_corrected_too() -> None:
    """Many positions: inner products through the weight's gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).eval()
    batch = torch.randn(3, 40, 6) + 1
    workload = corrected_workload(model, [batch], ("int2", "int3", "int4", "int5", "int6"))
    layer = workload.graph.by_name["0"]
    change = Change(workload, layer, model[0], workload.cells.schemes[0])
    gradient = torch.randn(1, 3, 40, 5)
    assert change._ghost_is_cheaper(batch, gradient, 3, 5)
    found = change.inner(batch, gradient, 3)
    for number, moved in change.outputs(batch):
        products = (gradient * moved).reshape(1, 3, -1).sum(2).T
        torch.testing.assert_close(found[number], products, rtol=1e-4, atol=1e-4)


def test_cells_alone_are_corrected() -> None:
    torch.manual_seed(0)
    model, batch = mlp().eval(), torch.randn(5, 6) + 1
    workload = corrected_workload(model, [batch], ("int2", "int8"))

    def gap(original: torch.Tensor, changed: torch.Tensor, _: object) -> torch.Tensor:
        return (changed - original).square().sum(1)

    found = alone(workload, 0, {"gap": gap})["gap"]
    with torch.no_grad():
        before = model(batch)
        for row, (unit, scheme) in enumerate(workload.cells):
            with quantized(model, {unit: scheme}, means=workload.input_means):
                expected = gap(before, model(batch), None)
            torch.testing.assert_close(torch.from_numpy(found[row]).float(), expected)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.later = nn.Linear(4, 3)
        self.last = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.later(self.norm(self.conv(x)).relu().mean((2, 3))))


def normed() -> nn.Module:
    torch.manual_seed(0)
    model = Normed()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 2, 6, 6) + 1)
    return model.eval()


def images(*sizes: int) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.randn(size, 2, 6, 6) + 1 for size in sizes]


def test_statistics_are_those_of_the_quantized_network() -> None:
    model, batches = normed(), images(8, 3)
    with torch.no_grad(), quantized(model, {"conv": parse_scheme("int2")}):
        found = batch_statistics(model, batches)
        outputs = [model.conv(batch) for batch in batches]
    for which, of_batch in enumerate(
        [
            [out.mean((0, 2, 3)) for out in outputs],
            [out.movedim(1, 0).flatten(1).var(1) for out in outputs],
        ]
    ):
        expected = (8 * of_batch[0] + 3 * of_batch[1]) / 11
        torch.testing.assert_close(found["norm"][which], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["norm"][0], model.norm.running_mean, rtol=1e-3)


def test_reestimated_statistics_are_borrowed() -> None:
    model, batches = normed(), images(8)
    model.last.train()
    state = copy.deepcopy(model.state_dict())
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    generator = torch.get_rng_state()
    seen = []

    def breaks() -> None:
        same = torch.equal(model.norm.running_mean, state["norm.running_mean"])
        seen.extend((same, model.norm.training))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), reestimated(model, batches):
        breaks()
    assert seen == [False, False]
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert (model.norm.training, model.last.training) == (False, True)
    assert (model.norm.momentum, model.last.momentum) == (0.3, 0.1)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="Sequential has no batch norm") as error:
        batch_statistics(mlp(), [torch.randn(3, 6)])
    assert error.value.code == "no_batch_norm"


def test_a_workload_estimates_once_for_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = normed(), images(8, 8)
    workload = make_workload(model, batches, ("int2", "int3", "int8"))
    workload = replace(workload, reestimate=True)
    calls: list[int] = []
    own = Normed.forward

    def counted(self: Normed, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return own(self, x)

    monkeypatch.setattr(Normed, "forward", counted)
    units = [unit.name for unit in workload.graph.units]
    two, three = (Allocation(dict.fromkeys(units, parse_scheme(text))) for text in ("int2", "int3"))
    with torch.no_grad():
        for allocation in (two, three, two):
            for batch in batches:
                with workload.quantized_as(allocation) as network:
                    network(batch)
        assert len(calls) == 2 * len(batches) + 6  # once for each allocation
        with quantized(model, workload.layer_schemes(two)), reestimated(model, batches):
            expected = model(batches[0])
        with workload.quantized_as(two):
            assert torch.equal(model(batches[0]), expected)
        before = model(batches[0])
        with workload.quantized_as(Allocation({})):
            assert torch.equal(model(batches[0]), before)
    mixes = [
        Allocation({**two, units[0]: parse_scheme(a), units[1]: parse_scheme(b)})
        for a in ("int2", "int3", "int8")
        for b in ("int2", "int3", "int8")
    ]
    for mix in mixes:
        with workload.quantized_as(mix):
            pass
    assert len(workload.statistics) == 4


def test_a_shipped_workload_corrects_as_well() -> None:
    model, batches = normed(), images(8)
    workload = corrected_workload(model, batches, ("int2", "int3"))
    workload = replace(workload, reestimate=True)
    there = ship(workload).unpack()
    two = Allocation({u.name: parse_scheme("int2") for u in workload.graph.units})
    with torch.no_grad(), workload.quantized_as(two), there.quantized_as(two):
        assert torch.equal(model(batches[0]), there.model(batches[0]))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def search(store: Store, **options: Any) -> mpq.SearchResult:
    settings: dict[str, Any] = {
        "budgets": ["memory <= uniform int3"],
        "schemes": ["int2", "int3", "int8"],
        "held_out": images(4),
        "executor": "serial",
        "refine": 1,
        "divergence": "mse",
    }
    return mpq.search(normed(), images(8, 8), storage=store, **(settings | options))


@pytest.mark.parametrize("corrections", [("bias",), ("batch_norm",), ("bias", "batch_norm")])
def test_a_search_measures_and_applies_corrected_networks(
    store: Store, corrections: tuple[Any, ...]
) -> None:
    result = search(store, corrections=corrections)
    model, batches = normed(), images(8, 8)
    measured = {(e.candidate, e.split): e for e in result.evaluation}
    chosen = measured["chosen", "held_out"]
    held_out = images(4)[0]
    with torch.no_grad():
        before = model(held_out)
        with result.apply(model, batches):
            after = model(held_out)
        assert torch.equal(model(held_out), before)
    divergence = OutputDivergence("mse").between(before, after, None)
    assert float(divergence.mean()) == pytest.approx(chosen.mean, rel=1e-4)
    sizes = measured["chosen", "calibration"]
    assert sizes.predicted_bytes == sizes.measured_bytes
    with pytest.raises(InvalidInputError, match="pass calibration=") as error, result.apply(model):
        pass
    assert error.value.code == "corrections"


def test_corrections_change_scores_and_are_not_served_stale(store: Store) -> None:
    plain = search(store)
    biases = search(store, corrections=("bias",))
    both = [result.problem.sensitivity.values for result in (plain, biases)]
    assert (both[0] != both[1]).any()
    assert both[1].sum() < both[0].sum()  # what the mean is moved by is taken back


def test_what_cannot_hold_corrections_says_so(store: Store, tmp_path: Path) -> None:
    result = search(store, corrections=("bias",))
    with pytest.raises(InvalidInputError, match=r"corrections \['bias'\]") as error:
        result.deploy("onnxruntime", tmp_path / "net.onnx", model=normed(), calibration=images(8))
    assert error.value.code == "corrections"
    with pytest.warns(MpqWarning, match=r"corrections \['bias'\] of the run are not in it"):
        result.export("mpq", tmp_path / "mix.json")
    assert '"bias"' in (tmp_path / "mix.json").read_text()


def test_wrong_corrections_are_refused(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="did you mean 'bias'") as error:
        search(store, corrections=("biass",))
    assert error.value.code == "unknown_correction"
    with pytest.raises(InvalidInputError, match="write \\[it\\]"):
        search(store, corrections="bias")
    with pytest.raises(InvalidInputError, match="no batch norm"):
        mpq.search(
            mlp().eval(),
            [torch.randn(4, 6)],
            budgets=["memory <= 90%"],
            executor="serial",
            corrections=("batch_norm",),
            storage=store,
        )
