"""KV caches as units: scores against forward differentiation, bytes by hand, searches, exports."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from hw_cost_models import get_cost_model
from hw_cost_models.kv_cache import cached_bytes
from mpq.core.errors import InfeasibleError, InvalidInputError, MpqWarning
from mpq.core.formats import parse_format
from mpq.core.jobs import JobSpec
from mpq.core.layers import Layer, LayerGraph
from mpq.core.problem import Allocation
from mpq.core.tables import Cells
from mpq.export import EXPORTERS
from mpq.nn.caches import caches_of, with_caches
from mpq.nn.divergence import OutputDivergence
from mpq.nn.graph import build_graph
from mpq.nn.patch import quantized
from mpq.nn.workload import Workload
from mpq.store.store import open_store
from sensitivity import METRICS, get_metric
from sensitivity.responses import responses_of_batch
from solvers import solve
from tests.builders import mlp, schemes
from tests.contracts import metric_contract
from tests.llamas import llama, words

pytest.importorskip("transformers")

CACHES = schemes("fp16", "int8", "int4g4", "int3")
WEIGHTS = schemes("int8", "int4")
WEIGHTS_ONLY = {
    "fisher",
    "gauss_newton_trace",
    "hessian_quadratic",
    "hessian_top",
    "hessian_trace",
    "higgs",
    "weight_error",
}


def cached(model: nn.Module, batch: Any, context: int = 100, size: int = 2) -> LayerGraph:
    return with_caches(build_graph(model, batch), caches_of(model, context, size))


def cells_of(graph: LayerGraph) -> Cells:
    named = graph.by_name
    return Cells(
        units=tuple(unit.name for unit in graph.units),
        schemes=tuple(CACHES if named[u.layers[0]].is_cache else WEIGHTS for u in graph.units),
    )


def work(model: nn.Module, batch: Any, **changes: Any) -> Workload:
    graph = cached(model, batch)
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


def projection_of(cache: str) -> str:
    return cache.replace("k_cache", "k_proj").replace("v_cache", "v_proj")


def slow_kept(output: torch.Tensor, head_dim: int, bits: int, group: int) -> torch.Tensor:
    """Round one vector of one token and head after the other, group by group."""
    rows = output.detach().float().reshape(-1, head_dim).clone()
    for row in rows:
        for start in range(0, head_dim, group):
            part = row[start : start + group]
            scale = (part.abs().max() / (2 ** (bits - 1) - 1)).half().float()
            codes = (part / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            row[start : start + group] = codes * scale
    return rows.reshape(output.shape).to(output.dtype)


def keep(scheme: str) -> Callable[[torch.Tensor], torch.Tensor]:
    bits, group = {"int8": (8, 8), "int4g4": (4, 4), "int3": (3, 8)}.get(scheme, (0, 0))
    if not bits:
        return lambda output: output.half().to(output.dtype)
    return lambda output: slow_kept(output, 8, bits, group)


@contextmanager
def hooked(model: nn.Module, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def measured(of: Workload, unit: str, scheme: str) -> float:
    """The divergence with one cache rounded by the slow oracle and nothing else changed."""
    with torch.no_grad():
        before = of.output(0, of.calibration[0])
        with hooked(of.model, projection_of(unit), keep(scheme)):
            after = of.output(0, of.calibration[0])
    return float(of.divergence.between(before, after, None).mean())


def cache_cells(of: Workload) -> list[tuple[int, str, str]]:
    return [
        (number, unit, str(scheme))
        for number, (unit, scheme) in enumerate(of.cells)
        if unit.endswith("_cache")
    ]


def test_each_cache_is_a_unit_beside_the_projections() -> None:
    model, batch = llama(), words()
    plain, graph = build_graph(model, batch), cached(model, batch)
    names = [unit.name for unit in graph.units if unit not in plain.units]
    assert names == [
        f"model.layers.{block}.self_attn.{kind}_cache" for block in range(2) for kind in "kv"
    ]
    layer = graph.by_name[names[1]]
    assert (layer.kind, layer.source) == ("kv_cache", "model.layers.0.self_attn.v_proj")
    assert layer.weight_shape == (2 * 100 * 2, 8)  # batch, context, heads of keys and values
    assert (layer.native_family, layer.weight_bytes) == ("fp16", 2 * 2 * 100 * 2 * 8)
    assert layer.why_weights_only
    assert graph.layers == plain.layers
    for same in ("searched_weights", "native_bytes", "coverage", "fixed_bytes", "input_ranges"):
        assert getattr(graph, same) == getattr(plain, same)
    assert graph.without_apart == plain


def test_what_a_bfloat16_network_caches_is_bfloat16() -> None:
    model = llama().bfloat16()
    assert {layer.native_family for layer in caches_of(model, 10, 1).layers} == {"bf16"}


def test_one_rounded_cache_scores_what_it_measures() -> None:
    of = work(llama(), words())
    metric = get_metric("kl")
    scores = metric.combine(of.cells, [metric.run(of, task) for task in metric.tasks(of)])
    for number, unit, scheme in cache_cells(of):
        expected = measured(of, unit, scheme)
        assert scores.sensitivity.values[number] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert scheme == "fp16" or expected > 1e-8


def test_responses_are_those_of_forward_differentiation() -> None:
    model, batch = llama(attn_implementation="eager").double(), words(3, 7)
    of = work(model, batch, num_probes=400)
    found = responses_of_batch(of, 0).u
    with torch.no_grad():
        root = of.output(0, batch).softmax(-1).sqrt()
    tokens = root.shape[1]
    pairs = []
    for number, unit, scheme in cache_cells(of):
        change = keep(scheme)

        def output(
            step: torch.Tensor,
            name: str = projection_of(unit),
            change: Callable[[torch.Tensor], torch.Tensor] = change,
        ) -> torch.Tensor:
            def moved(y: torch.Tensor) -> torch.Tensor:
                return y + step * (change(y.detach()) - y.detach())

            with hooked(model, name, moved):
                return of.output(0, batch)

        zero = torch.zeros((), dtype=torch.float64)
        _, slope = torch.autograd.functional.jvp(output, (zero,), (torch.ones_like(zero),))
        seen = root * (slope - (root.square() * slope).sum(-1, keepdim=True))
        exact = 0.5 * seen.square().sum((1, 2)) / tokens
        own = 0.5 * np.square(found[number].astype(np.float64))
        error = own.std(axis=1, ddof=1) / math.sqrt(own.shape[1])
        pairs.append((own.mean(axis=1) - exact.numpy()) / error)
    off = np.concatenate(pairs)
    assert np.abs(off).max() < 5
    assert np.sqrt(np.square(off).mean()) < 1.6


def test_scores_of_caches_rank_and_size_them_as_measured() -> None:
    of = work(llama(3), words(8), num_probes=64)
    metric = get_metric("gauss_newton")
    scores = metric.combine(of.cells, [metric.run(of, task) for task in metric.tasks(of)])
    cells = cache_cells(of)
    expected = np.array([measured(of, unit, scheme) for _, unit, scheme in cells])
    found = scores.sensitivity.values[[number for number, _, _ in cells]]
    ranks = [np.argsort(np.argsort(x)) for x in (found, expected)]
    assert np.corrcoef(*ranks)[0, 1] > 0.97  # Spearman
    small = (expected > 1e-9) & (expected < 1e-3)
    assert small.sum() >= 6
    assert np.abs(found[small] / expected[small] - 1).max() < 0.3


def test_around_a_base_single_changes_are_predicted() -> None:
    of = work(llama(), words(), num_probes=256)
    base = Allocation(
        {unit: chosen[1] for unit, chosen in zip(of.cells.units, of.cells.schemes, strict=True)}
    )
    found = responses_of_batch(of, 0, base)
    predicted = found.g.mean(1) + 0.5 * np.square(found.u).mean((1, 2))

    def loss(allocation: Allocation) -> float:
        with torch.no_grad():
            before = of.output(0, of.calibration[0])
            with of.quantized_as(allocation):
                after = of.output(0, of.calibration[0])
        return float(of.divergence.between(before, after, None).mean())

    start = loss(base)
    for number, unit, scheme in cache_cells(of):
        if scheme == str(base[unit]):
            assert predicted[number] == 0
        elif scheme == "int3":
            change = loss(Allocation({**base, unit: schemes(scheme)[0]})) - start
            assert predicted[number] == pytest.approx(change, rel=0.5)


def test_the_model_comes_back_and_gradients_pass_through() -> None:
    model, batch = llama(), words()
    before = model(**batch).logits
    name = "model.layers.1.self_attn.v_cache"
    with quantized(model, {name: schemes("int3")[0]}):
        inside = model(**batch).logits
        inside.sum().backward()
    grad = model.get_submodule("model.layers.1.self_attn.v_proj").weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0
    assert not torch.equal(before, inside)
    assert torch.equal(before, model(**batch).logits)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_scores_caches_or_refuses_by_name(metric: str) -> None:
    of = work(llama(), words(2, 5), num_probes=1, loss=None)
    if metric == "loss":
        of = replace(of, loss=lambda output, batch: output.float().square().mean())
    scores = metric_contract(get_metric(metric), of)
    assert (scores is None) == (metric in WEIGHTS_ONLY)
    if scores is None:
        with pytest.raises(InvalidInputError, match=f"{metric} .*k_cache.*KV cache"):
            get_metric(metric).tasks(of)
    else:
        lossy = [number for number, _, scheme in cache_cells(of) if scheme == "int3"]
        assert np.count_nonzero(scores.sensitivity.values[lossy]) == len(lossy)


# --- bytes -----------------------------------------------------------------------------------


def cache(rows: int = 7 * 3 * 2, head_dim: int = 20, **changes: Any) -> Layer:
    (layer, *_) = caches_of(llama(head_dim=head_dim), 7, 3).layers
    assert layer.weight_shape == (7 * 3 * 2, head_dim)
    return replace(layer, weight_shape=(rows, head_dim), **changes)


@pytest.mark.parametrize(
    ("text", "of_vector"),
    [
        ("fp16", 40),
        ("bf16", 40),
        ("int8", 20 + 2),  # 20 codes, a scale of 16 bits
        ("int8a", 20 + 2 + 1),  # and a zero point
        ("int4", 10 + 2),
        ("int3", 10),  # 60 + 16 bits are 9.5 bytes
        ("int4g5", 10 + 4 * 2),
        ("int4g10a", 10 + 2 * 2 + 1),  # two zero points of 4 bits
        ("int3g10a", 13),  # 60 + 2 * (16 + 3) = 98 bits
    ],
)
def test_bytes_are_those_counted_by_hand(text: str, of_vector: int) -> None:
    assert cached_bytes(cache(), parse_format(text)) == 7 * 3 * 2 * of_vector


def test_groups_that_do_not_divide_a_vector_and_wide_or_shared_scales_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"k_cache' holds vectors of 20: int4g8 has groups"):
        cached_bytes(cache(), parse_format("int4g8"))
    with pytest.raises(InvalidInputError, match=r"token by token, int4t has to see all"):
        cached_bytes(cache(), parse_format("int4t"))
    with pytest.raises(InvalidInputError, match=r"16-bit numbers: leave fp32 out"):
        cached_bytes(cache(), parse_format("fp32"))


@pytest.mark.parametrize("scheme", CACHES)
def test_twice_the_context_or_batch_is_twice_the_bytes(scheme: Any) -> None:
    model, batch = llama(), words()

    def table(context: int, size: int) -> Any:
        graph = cached(model, batch, context, size)
        return get_cost_model("kv_cache").table(graph, cells_of(graph))

    one, longer, more = table(333, 3), table(666, 3), table(333, 6)
    for twice in (longer, more):
        assert np.array_equal(twice.values, 2 * one.values)
        assert (twice.baseline, twice.fixed) == (2 * one.baseline, 0)
    weights = [number for number, (unit, _) in enumerate(one.cells) if "cache" not in unit]
    assert not one.values[weights].any()
    assert one.baseline == 2 * 2 * 333 * 3 * 2 * 8 * 2  # blocks, k and v, tokens, heads, bytes
    assert (
        one["model.layers.0.self_attn.k_cache", scheme]
        == 333
        * 3
        * 2
        * {
            "fp16": 16,
            "int8": 10,
            "int4g4": 8,
            "int3": 5,
        }[str(scheme)]
    )


def test_a_window_bounds_what_is_kept() -> None:
    model = llama()
    model.config.sliding_window = 5  # type: ignore[union-attr]
    model.config.layer_types = ["sliding_attention", "full_attention"]  # type: ignore[union-attr]
    rows = [layer.weight_shape[0] for layer in caches_of(model, 50, 3).layers]
    assert rows == [5 * 3 * 2, 5 * 3 * 2, 50 * 3 * 2, 50 * 3 * 2]


def test_caches_are_in_resident_and_peak_bytes_and_in_no_other_cost() -> None:
    model, batch = llama(), words()
    graph = cached(model, batch)
    cells, plain = cells_of(graph), build_graph(model, batch)
    memory, cache_ = (get_cost_model(n).table(graph, cells) for n in ("memory", "kv_cache"))
    resident = get_cost_model("resident", cache_bytes=7).table(graph, cells)
    assert np.array_equal(resident.values, memory.values + cache_.values)
    assert (resident.fixed, resident.weights) == (memory.fixed, memory.weights)
    assert resident.baseline == memory.baseline + cache_.baseline
    peak = get_cost_model("peak", cache_bytes=7, activation_bytes=5).table(graph, cells)
    assert np.array_equal(peak.values, resident.values)
    assert peak.fixed == resident.fixed + 5
    few = Cells(units=tuple(u.name for u in plain.units), schemes=(WEIGHTS,) * len(plain.units))
    for name in ("memory", "bops", "macs", "energy", "luts"):
        with_, without = (
            get_cost_model(name).table(of, axis) for of, axis in ((graph, cells), (plain, few))
        )
        assert np.array_equal(with_.values[: len(few)], without.values)
        assert not with_.values[len(few) :].any()
        assert (with_.fixed, with_.baseline) == (without.fixed, without.baseline)
        assert with_.weights == without.weights


def test_fused_projections_are_told_and_counted_as_they_are(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=3, n_head=2, tie_word_embeddings=False)
    ).eval()
    caches = caches_of(model, 10, 2)
    assert not caches.layers
    (note,) = caches.notes
    assert "3 layers is not searched: 'transformer.h.0.attn.c_attn' computes queries" in note
    given: dict[str, Any] = {
        "kv_cache": True,
        "executor": "serial",
        "schemes": ["int8", "int4"],
        "storage": f"sqlite:///{tmp_path}/mpq.db",
        "refine": 0,
    }
    with pytest.warns(MpqWarning, match="c_attn"):
        result = mpq.search(model, [words(2, 9)], budgets=["memory <= 100%"], **given)
    table = result.problem.costs["kv_cache"]
    assert table.fixed == table.baseline == 3 * 2 * 16 * 9 * 1 * 2  # one sample of nine tokens
    assert any("c_attn" in event.message for event in result.store.events(result.run_id))
    with pytest.raises(InfeasibleError), pytest.warns(MpqWarning):
        mpq.search(model, [words(2, 9)], budgets=["kv_cache <= 50%"], **given)


def test_networks_without_a_cache_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="Sequential does not say that it generates"):
        caches_of(mlp(), 10, 1)
    graph = build_graph(mlp(), torch.zeros(2, 6))
    axis = Cells(units=tuple(u.name for u in graph.units), schemes=(WEIGHTS,) * 2)
    with pytest.raises(InvalidInputError, match="kv_cache=True"):
        get_cost_model("kv_cache").table(graph, axis)


# --- whole searches --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("kv") / "mpq.db"
    return mpq.search(
        llama(),
        [words(), words(seed=2)],
        held_out=[words(seed=3)],
        budgets=["memory <= 25%", "kv_cache <= 45%"],
        schemes=["int8", "int4", "int4g8"],
        kv_cache={"context": 100, "batch": 3},
        executor="serial",
        storage=f"sqlite:///{place}",
        refine=1,
    )


def test_both_budgets_hold_and_no_uniform_choice_is_better(found: Any) -> None:
    totals, problem = found.solution.totals, found.problem.with_budgets(found.solution.budgets)
    assert totals["kv_cache"] <= 0.45 * problem.costs["kv_cache"].baseline
    assert problem.fits(found.unit_allocation)
    assert problem.costs["kv_cache"].baseline == 2 * 2 * 100 * 3 * 2 * 8 * 2
    offered = problem.cells.schemes[problem.cells.unit_number("model.layers.0.self_attn.k_cache")]
    assert list(map(str, offered)) == ["fp16", "int8", "int4g8"]
    uniform = problem.uniform()
    assert "int4 with kv_cache int4g8" in uniform
    assert len(uniform) == 9
    values = {e.candidate: e.mean for e in found.evaluation if e.split == "calibration"}
    fitting = [values[f"uniform {name}"] for name, a in uniform.items() if problem.fits(a)]
    assert fitting
    assert values["chosen"] <= min(fitting)
    exact = solve(problem)
    assert all(
        exact.score <= problem.score(a.choice(problem.cells)) + 1e-12
        for a in uniform.values()
        if problem.fits(a)
    )


def test_a_kept_run_is_read_shown_and_solved_again(found: Any, tmp_path: Path) -> None:
    again = mpq.SearchResult(found.store, found.run_id)
    assert again.graph == found.graph
    assert any(part.is_cache for part in again.graph.apart)
    assert again.allocation == found.allocation
    assert "model.layers.0.self_attn.k_cache" in again.allocation
    free = again.solve(["kv_cache <= 100%", "memory <= 25%"]).totals
    assert free is not None
    assert free["kv_cache"] >= found.solution.totals["kv_cache"]
    pinned = again.solve(["memory <= 25%"], pin={"*.v_cache": "int4g8"})
    assert pinned.allocation is not None
    assert str(pinned.allocation["model.layers.1.self_attn.v_cache"]) == "int4g8"
    assert "k_cache" in again.report(tmp_path / "run.html").read_text()
    evaluated = {e.candidate: e for e in found.evaluation}["chosen"]
    assert evaluated.predicted_bytes == evaluated.measured_bytes == found.solution.totals["memory"]


def test_scores_are_kept_whatever_the_context(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sensitivity import gauss_newton

    def never(*_: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr(gauss_newton, "responses_of_batch", never)
    longer = mpq.search(
        llama(),
        [words(), words(seed=2)],
        budgets=["memory <= 25%", "kv_cache <= 45%"],
        schemes=["int8", "int4", "int4g8"],
        kv_cache={"context": 200, "batch": 3},
        executor="serial",
        storage=found.store,
        refine=0,
    )
    kept = longer.problem.costs["kv_cache"]
    assert np.array_equal(kept.values, 2 * found.problem.costs["kv_cache"].values)


@pytest.mark.parametrize("target", sorted(EXPORTERS))
def test_exports_keep_caches_or_refuse_them_by_name(
    found: Any, target: str, tmp_path: Path
) -> None:
    if target == "mpq":
        path = found.export(target, tmp_path / "allocation.json")
        back = mpq.export.import_allocation(target, path, found.graph)
        assert dict(back) == dict(found.allocation)
        return
    with pytest.raises(InvalidInputError) as error:
        found.export(target, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    caches = replace(
        found.chosen,
        graph=found.graph.only([n for n in found.allocation if n.endswith("cache")]),
        schemes={n: s for n, s in found.allocation.items() if n.endswith("cache")},
        pinned=frozenset(),
    )
    with pytest.raises(InvalidInputError, match=f"_cache' is .*{target} says nothing of KV caches"):
        mpq.export.export_text(target, caches)
    assert "\n" not in str(error.value)


def test_caches_as_they_are_stand_in_no_way_of_an_export(tmp_path: Path) -> None:
    result = mpq.search(
        llama(),
        [words()],
        budgets=["memory <= 30%"],
        schemes=["int4g32"],
        skip=["lm_head"],
        kv_cache=True,
        kv_schemes=["fp16"],
        executor="serial",
        storage=f"sqlite:///{tmp_path}/mpq.db",
        refine=0,
    )
    text = result.export("compressed-tensors", tmp_path / "file.json").read_text()
    assert "k_cache" not in text
    assert str(result.allocation["model.layers.0.self_attn.k_cache"]) == "fp16"


def test_a_deployed_network_keeps_no_cache(found: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"_cache' is int.*'onnxruntime' .*no KV cache"):
        found.deploy("onnxruntime", tmp_path / "x.onnx", model=llama(), calibration=[words()])


def test_skipped_caches_are_fixed_and_the_pattern_may_name_caches_alone(tmp_path: Path) -> None:
    result = mpq.search(
        llama(),
        [words()],
        budgets=["kv_cache <= 85%"],
        schemes=["int8"],
        skip=["*.v_cache", "lm_head"],
        pin={"*.0.self_attn.k_cache": "int8a"},
        kv_cache={"context": 64},
        kv_schemes=["int8", "int4g2"],
        executor="serial",
        storage=f"sqlite:///{tmp_path}/mpq.db",
        refine=0,
    )
    table = result.problem.costs["kv_cache"]
    assert table.fixed == table.baseline / 2 == 2 * 64 * 2 * 8 * 2
    assert str(result.allocation["model.layers.0.self_attn.k_cache"]) == "int8a"
    assert not any(name.endswith("v_cache") for name in result.allocation)


def test_under_a_latency_budget_caches_take_no_time_and_that_is_told(tmp_path: Path) -> None:
    result = mpq.search(
        llama(),
        [words()],
        budgets=["latency <= 100%", "kv_cache <= 60%"],
        schemes=["fp32", "int8:int8"],
        kv_cache=True,
        executor="serial",
        storage=f"sqlite:///{tmp_path}/mpq.db",
        refine=0,
        latency_seconds=2.0,
        risk=0.5,
    )
    table = result.problem.costs["latency"]
    cells = [i for i, (unit, _) in enumerate(table.cells) if unit.endswith("_cache")]
    assert cells
    assert not table.values[cells].any()
    events = result.store.events(result.run_id)
    assert any("formats of KV caches cost none" in event.message for event in events)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kv_cache": {"tokens": 3}}, "in whole numbers, got 'tokens': 3"),
        ({"kv_cache": {"context": 0}}, "got 'context': 0"),
        ({"kv_cache": "yes"}, "kv_cache is true or .* got 'yes'"),
        ({"kv_schemes": ("int8",)}, "kv_schemes needs kv_cache=True"),
        ({"kv_cache": True, "kv_schemes": "int8"}, "kv_schemes is a list of texts, got 'int8'"),
        ({"kv_cache": True, "kv_schemes": ()}, "kv_schemes is a list"),
    ],
)
def test_wrong_options_are_refused_in_one_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        JobSpec(model="m:f", calibration="m:g", budgets=("memory <= 50%",), **given)


def test_a_scheme_that_no_cache_can_have_is_named(tmp_path: Path) -> None:
    def search(**given: Any) -> None:
        mpq.search(
            llama(head_dim=20),
            [words()],
            budgets=["kv_cache <= 50%"],
            schemes=["int8"],
            kv_cache=True,
            executor="serial",
            storage=open_store(f"sqlite:///{tmp_path}/mpq.db"),
            **given,
        )

    with pytest.raises(InvalidInputError, match=r"k_cache' holds vectors of 20: int4g8"):
        search(kv_schemes=["int4g8"])
    with pytest.raises(InvalidInputError, match=r"is a KV cache: write one format, such as int8"):
        search(pin={"*.k_cache": "int8:int8"})
    with pytest.raises(InvalidInputError, match="fp33"):
        search(kv_schemes=["fp33"])
