"""Inputs of layers as units: scores against tied schemes, BOPs against brute force, searches."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from hw_cost_models import get_cost_model
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme
from mpq.core.jobs import JobSpec
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation, Budget, Problem
from mpq.core.tables import Cells
from mpq.export import import_allocation
from mpq.nn.divergence import OutputDivergence
from mpq.nn.graph import build_graph
from mpq.nn.patch import quantized
from mpq.nn.workload import Workload
from sensitivity import METRICS, get_metric
from sensitivity.responses import responses_of_batch
from solvers import solve
from tests.builders import Decoder, conv_net, mlp, schemes, tokens
from tests.contracts import metric_contract
from tests.oracles import brute_force

WEIGHTS = ("fp32", "int8", "int4")
INPUTS = ("fp32", "fp32:int8", "fp32:int4")
WEIGHTS_ONLY = {"fisher", "hessian_quadratic", "hessian_top", "higgs", "weight_error"}


def cells_of(graph: LayerGraph) -> Cells:
    named = graph.by_name
    kinds = {True: schemes(*INPUTS), False: schemes(*WEIGHTS)}
    return Cells(
        units=tuple(unit.name for unit in graph.units),
        schemes=tuple(kinds[named[unit.layers[0]].is_input] for unit in graph.units),
    )


def work(model: nn.Module, batch: Any, *, apart: bool = True, **changes: Any) -> Workload:
    torch.manual_seed(0)
    graph = build_graph(model, batch, groups="none", inputs=apart)
    given = {
        "model": model,
        "graph": graph,
        "cells": cells_of(graph),
        "calibration": (batch,),
        "held_out": (),
        "divergence": OutputDivergence("kl"),
        "batch_keys": ("batch",),
    }
    return Workload(**(given | changes))


def problem_of(of: Workload) -> Problem:
    metric = get_metric("gauss_newton")
    scores = metric.combine(of.cells, [metric.run(of, task) for task in metric.tasks(of)])
    costs = {name: get_cost_model(name).table(of.graph, of.cells) for name in ("memory", "bops")}
    return Problem(
        sensitivity=scores.sensitivity, costs=costs, budgets=(), responses=scores.responses
    )


@pytest.fixture
def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    return mlp(), torch.randn(16, 6)


def test_layers_that_read_one_tensor_share_its_unit() -> None:
    graph = build_graph(Decoder(tied=False), tokens(), inputs=True)
    units = {unit.name: unit for unit in graph.units}
    same = units["blocks.0.{q_proj,k_proj,v_proj}.input"]
    assert same.layers == tuple(f"blocks.0.{name}_proj.input" for name in "qkv")
    assert same.reason == "one tensor that several layers read"
    assert units["blocks.1.q_proj.input"].layers == ("blocks.1.q_proj.input",)  # cross attention
    assert units["blocks.1.{k_proj,v_proj}.input"]
    assert not any("embed" in name for name in units)
    part = graph.by_name["blocks.0.o_proj.input"]
    assert (part.source, part.kind, part.is_input) == ("blocks.0.o_proj", "linear", True)
    plain = build_graph(Decoder(tied=False), tokens())
    for same_in_both in ("searched_weights", "native_bytes", "coverage", "layers"):
        assert getattr(graph, same_in_both) == getattr(plain, same_in_both)
    assert graph.without_apart == plain


def test_schemes_are_merged_for_the_layer_and_taken_apart_again() -> None:
    graph = build_graph(mlp(), torch.zeros(2, 6), inputs=True)
    apart = dict(zip(("0", "0.input", "2"), schemes("int4", "fp32:int8", "int8"), strict=True))
    merged = graph.merged(apart)
    assert merged == dict(zip(("0", "2"), schemes("int4:int8", "int8"), strict=True))
    alone = graph.merged({"2.input": schemes("fp32:int4")[0]})
    assert alone == {"2": Scheme(FP32, schemes("int4:int4")[0].activations)}
    assert graph.merged(graph.expanded(merged)) == merged
    assert graph.expanded(merged) == {**apart, "2.input": Scheme(FP32)}


@pytest.mark.parametrize("make", [mlp, conv_net])
def test_the_response_of_an_input_is_that_of_a_scheme_that_rounds_it_alone(make: Any) -> None:
    torch.manual_seed(1)
    model = make().eval()
    batch = torch.randn(5, 6) if make is mlp else torch.randn(3, 3, 8, 8)
    apart = work(model, batch)
    tied = work(model, batch, apart=False)
    axis = Cells(units=tied.cells.units, schemes=(schemes(*INPUTS),) * len(tied.cells.units))
    expected = responses_of_batch(
        Workload(**{**{f: getattr(tied, f) for f in tied.__dataclass_fields__}, "cells": axis}), 0
    )
    found = responses_of_batch(apart, 0).u
    for unit in axis.units:
        for scheme in schemes(*INPUTS):
            one = found[apart.cells.index((f"{unit}.input", scheme))]
            assert np.array_equal(one, expected.u[axis.index((unit, scheme))])
            assert one.any() == (not scheme.is_native)


def test_around_a_base_the_other_half_of_a_scheme_stays(
    network: tuple[nn.Module, torch.Tensor],
) -> None:
    model, batch = network
    of = work(model.double(), batch.double(), num_probes=1)
    texts = {"0": "int4", "2": "int8", "0.input": "fp32:int8", "2.input": "fp32:int4"}
    base = Allocation.from_text(texts)
    found = responses_of_batch(of, 0, base)
    limits = of.graph.input_ranges

    def loss(merged: dict[str, str]) -> torch.Tensor:
        given = {name: schemes(text)[0] for name, text in merged.items()}
        with torch.no_grad(), quantized(model, given, limits=limits):
            return model(of.calibration[0])

    # the last layer's change is linear in the output: g is <grad D, change> exactly
    start = {"0": "int4:int8", "2": "int8:int4"}
    original = of.divergence.head(model(of.calibration[0]).detach())
    z = of.divergence.head(loss(start)).clone().requires_grad_()
    of.divergence.between_heads(original, z, None).sum().backward()
    for cell, text in {("2", "int4"): "int4:int4", ("2.input", "fp32:int8"): "int8:int8"}.items():
        number = of.cells.index((cell[0], schemes(cell[1])[0]))
        change = of.divergence.head(loss({**start, "2": text})) - z.detach()
        assert z.grad is not None
        expected = (z.grad * change).sum(1).numpy()
        np.testing.assert_allclose(found.g[number], expected, rtol=1e-4, atol=1e-9)
        assert np.abs(expected).max() > 1e-8


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_scores_inputs_or_refuses_by_name(
    metric: str, network: tuple[nn.Module, torch.Tensor]
) -> None:
    model, batch = network
    loss = (lambda output, _: output.square().mean()) if metric == "loss" else None
    of = work(model, batch, loss=loss)
    scores = metric_contract(get_metric(metric), of)
    assert (scores is None) == (metric in WEIGHTS_ONLY)
    if scores is None:
        with pytest.raises(InvalidInputError, match=rf"{metric} .*'0.input' is the input of"):
            get_metric(metric).tasks(of)
    else:
        table = scores.sensitivity
        assert table[("0.input", schemes("fp32:int4")[0])] != 0


def test_bops_of_every_choice_are_those_of_its_merged_schemes(
    network: tuple[nn.Module, torch.Tensor],
) -> None:
    of = work(*network)
    table = get_cost_model("bops").table(of.graph, of.cells)
    macs = {"0": 6 * 8 * 16, "2": 8 * 3 * 16}
    assert table.baseline == sum(macs.values()) * 32 * 32
    for choice in itertools.product(*of.cells.schemes):
        chosen = Allocation(dict(zip(of.cells.units, choice, strict=True)))
        expected = sum(
            macs[name] * scheme.weights.bits * scheme.activations.bits
            for name, scheme in of.layer_schemes(chosen).items()
        )
        assert table.total(chosen.choice(of.cells)) == expected


def test_memory_is_that_of_the_weights(network: tuple[nn.Module, torch.Tensor]) -> None:
    of, tied = work(*network), work(*network, apart=False)
    apart, plain = (get_cost_model("memory").table(w.graph, w.cells) for w in (of, tied))
    assert np.array_equal(apart.values[: len(tied.cells)], plain.values)
    assert not apart.values[len(tied.cells) :].any()
    assert (apart.fixed, apart.baseline) == (plain.fixed, plain.baseline)
    assert apart.weights == plain.weights


def test_more_pairs_than_a_solver_can_look_at_are_refused(
    network: tuple[nn.Module, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = work(*network)
    monkeypatch.setattr("hw_cost_models.bops._MOST_PAIRS", 11)
    with pytest.raises(InvalidInputError, match="are 12 pairs of cells: offer fewer"):
        get_cost_model("bops").table(of.graph, of.cells)


@pytest.mark.parametrize("share", [0.04, 0.08, 0.2, 0.5])
def test_the_optimum_is_proven_and_never_worse_than_tied_schemes(
    share: float, network: tuple[nn.Module, torch.Tensor]
) -> None:
    of = work(*network, num_probes=4)
    plain = problem_of(of)
    bops, memory = plain.costs["bops"], plain.costs["memory"]
    problem = plain.with_budgets(
        [Budget("bops", share * bops.baseline), Budget("memory", 0.6 * memory.baseline)]
    )
    found = solve(problem)
    assert found.allocation is not None
    assert problem.fits(found.allocation)
    exact = brute_force(problem)
    assert found.score == pytest.approx(exact, rel=1e-9)
    fitting = 0
    for tied in itertools.product(WEIGHTS, ("fp32", "int8", "int4")):
        merged = dict.fromkeys(("0", "2"), schemes(":".join(tied))[0])
        choice = Allocation(of.graph.expanded(merged)).choice(of.cells)
        if problem.meets(choice):
            fitting += 1
            assert found.score <= problem.score(choice) + 1e-12
    assert fitting
    texts = {str(key) for key in plain.uniform()}
    assert texts == {str(schemes(f"{w}:{a}")[0]) for w in WEIGHTS for a in ("fp32", "int8", "int4")}


def test_a_uniform_budget_may_name_the_tied_scheme(
    network: tuple[nn.Module, torch.Tensor],
) -> None:
    of = work(*network)
    costs = {"bops": get_cost_model("bops").table(of.graph, of.cells)}
    found = mpq.core.problem.BudgetText.parse("bops <= uniform int4:int8").resolve(costs)
    assert found.limit == (6 * 8 + 8 * 3) * 16 * 4 * 8
    with pytest.raises(InvalidInputError, match="int3"):
        mpq.core.problem.BudgetText.parse("bops <= uniform int3").resolve(costs)


# --- whole searches --------------------------------------------------------------------------


def search(place: Path, **given: Any) -> mpq.SearchResult:
    torch.manual_seed(5)
    batches = [torch.randn(12, 6) for _ in range(2)]
    usual: dict[str, Any] = {
        "budgets": ["bops <= 6%", "memory <= 70%"],
        "schemes": list(WEIGHTS),
        "activations": "apart",
        "executor": "serial",
        "storage": f"sqlite:///{place}/mpq.db",
        "refine": 2,
    }
    result: mpq.SearchResult = mpq.search(mlp(), batches, **(usual | given))
    return result


def test_a_search_shows_merged_schemes_and_units(tmp_path: Path) -> None:
    result = search(tmp_path, activation_schemes=["int8", "int4", "fp32"])
    assert set(result.allocation) == {"0", "2"}
    assert set(result.unit_allocation) == {"0", "2", "0.input", "2.input"}
    for name, scheme in result.allocation.items():
        assert scheme.weights == result.unit_allocation[name].weights
        assert scheme.activations == result.unit_allocation[f"{name}.input"].activations
    totals = result.solution.totals
    assert totals is not None
    macs = {"0": 6 * 8, "2": 8 * 3}
    bops = sum(macs[n] * s.weights.bits * s.activations.bits for n, s in result.allocation.items())
    assert totals["bops"] == bops <= 0.06 * sum(macs.values()) * 32 * 32
    again = mpq.SearchResult(result.store, result.run_id)
    assert again.graph == result.graph
    values = {e.candidate: e.mean for e in result.evaluation if e.split == "calibration"}
    problem = result.problem.with_budgets(result.solution.budgets)
    tied = [values[f"uniform {s}"] for s, a in problem.uniform().items() if problem.fits(a)]
    assert tied
    assert values["chosen"] <= min(tied)
    path = result.export("mpq", tmp_path / "chosen.json")
    back = import_allocation("mpq", path, result.graph)
    assert dict(back) == dict(result.unit_allocation)
    assert "0.input" in result.report(tmp_path / "page.html").read_text()
    pinned = again.solve(["bops <= 50%"], pin={"2.input": "int8"}).allocation
    assert pinned is not None
    assert str(pinned["2.input"]) == "fp32:int8"
    model = mlp()
    with result.apply(model), torch.no_grad():
        model(torch.randn(2, 6))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_pins_and_static_inputs(tmp_path: Path) -> None:
    result = search(
        tmp_path,
        budgets=["memory <= 100%"],
        pin={"0.input": "int8static", "2": "int4"},
        activation_schemes=["int8static", "int4"],
    )
    assert str(result.allocation["0"]).endswith(":int8static")
    assert str(result.unit_allocation["2"]) == "int4"
    assert result.graph.by_name["0"].input_range == result.graph.by_name["0.input"].input_range
    assert result.graph.by_name["0"].input_range is not None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"budgets": ["latency <= 90%"]}, "latency is that of a kernel"),
        ({"budgets": ["energy <= 90%"]}, "energy is that of a kernel"),
        ({"budgets": ["memory <= 90%"], "hardware": "roofline:H100"}, "always times kernels"),
        ({"schemes": ["int8:int8"]}, "schemes are of weights alone, got int8:int8: write 'int8'"),
        ({"pin": {"0": "int8:int8"}}, r"pin '0' to int8 and '0.input' to the other"),
        ({"pin": {"0.input": "int8:int8"}}, r"'0.input' is the input of a layer"),
        ({"activation_schemes": ["int9"]}, "int9"),
        ({"metric": "fisher"}, "'0.input' is the input of a layer"),
    ],
)
def test_what_needs_both_formats_is_refused_by_name(
    given: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=told):
        search(tmp_path, **given)


def test_options_without_apart_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="activation_schemes needs activations='apart'"):
        JobSpec(
            model="m:f",
            calibration="m:g",
            budgets=("memory <= 50%",),
            activation_schemes=("int8",),
        )


def test_caches_and_inputs_together(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.llamas import llama, words

    result = mpq.search(
        llama(),
        [words()],
        budgets=["memory <= 40%", "kv_cache <= 60%", "bops <= 10%"],
        schemes=["int8", "int4"],
        kv_cache=True,
        activations="apart",
        activation_schemes=["int8", "int4"],
        executor="serial",
        storage=f"sqlite:///{tmp_path}/mpq.db",
        refine=0,
    )
    assert str(result.allocation["model.layers.0.self_attn.q_proj"]).count(":") == 1
    assert "int4:int8 with kv_cache int8" in result.problem.uniform()
