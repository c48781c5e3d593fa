"""Latency profiles: one network served in several shapes, each with a budget of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import mpq
from hw_cost_models import get_hardware
from hw_cost_models.latency import MeasuredLatency
from mpq.cli import app
from mpq.core.deployment import Deployment
from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.jobs import JobSpec, RunState
from mpq.core.latency import REST_INCLUDED
from mpq.core.profiles import given_profiles, weighted_latency
from mpq.core.tables import CostTable
from mpq.jobfile import load_job, parse_job
from mpq.nn.graph import build_graph
from mpq.nn.resized import resized
from mpq.referee.compare import compare_job, compare_metrics
from mpq.result import SearchResult
from mpq.store.store import Store, open_store
from mpq.terminal import print_run
from tests.builders import cells
from tests.oracles import brute_force, slow_mean_table, slow_resized

Profile = mpq.Profile
PI = "roofline:RaspberryPi5"
TWO = {"prefill": Profile(tokens=512), "decode": Profile(tokens=1, weight=64.0)}
JOB = {"model": "a:b", "calibration": "a:c", "budgets": ["memory <= 60%"]}
HERE = "tests.test_profiles"


class Words(nn.Module):
    """Token ids (N, T) to logits; five linear layers, one of them for long sequences only."""

    def __init__(self, width: int = 128, long: bool = False, most: int = 600) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.register_buffer("places", torch.randn(most, width), persistent=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.more = nn.Linear(width, width)
        self.long = nn.Linear(width, width) if long else None
        self.head = nn.Linear(width, 11)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        count = input_ids.shape[1]
        x = self.embed(input_ids) + self.places[:count]
        x = self.more(self.down(self.up(x).relu()).relu())
        if self.long is not None and count > 2:
            x = self.long(x)
        return self.head(x.relu())


def make_words() -> nn.Module:
    torch.manual_seed(0)
    return Words().eval()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (8, 6), generator=generator)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def one_token() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def search(store: Store, model: Any = None, calibration: Any = None, **options: Any) -> Any:
    asked: dict[str, Any] = {
        "budgets": ["decode <= 80%", "prefill <= 60%"],
        "schemes": ["fp32", "int8:int8", "int4g32"],
        "profiles": TWO,
        "hardware": PI,
        "executor": "serial",
        "refine": 0,
        "num_probes": 1,
    }
    return mpq.search(
        make_words() if model is None else model,
        batches() if calibration is None else calibration,
        storage=store,
        **(asked | options),
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchResult]:
    """A run of entry points on a modelled machine; for reading."""
    with open_store(str(tmp_path_factory.mktemp("profiles") / "runs.db")) as opened:
        yield search(
            opened,
            f"{HERE}:make_words",
            f"{HERE}:batches",
            profiles={**TWO, "decode": Profile(sample=f"{HERE}:one_token", weight=64)},
        )


def same(one: CostTable, other: CostTable) -> bool:
    """Tell whether two tables hold the same, their names aside."""
    arrays = all(np.array_equal(getattr(one, p), getattr(other, p)) for p in ("values", "low"))
    plain = ("unit", "cells", "fixed", "baseline", "weights", "provenance")
    return arrays and all(getattr(one, name) == getattr(other, name) for name in plain)


# --- what a profile is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profiles", "says"),
    [
        (["prefill"], "profiles is {name: Profile}"),
        (
            {"decode": {"token": 1}},
            "profile 'decode': unknown profile key 'token': did you mean 'to",
        ),
        ({"decode": {"batch": 0}}, "profile 'decode': batch: a whole number from 1 on, got 0"),
        (
            {"decode": {"tokens": 1.5}},
            "profile 'decode': tokens: a whole number from 1 on, got 1.5",
        ),
        ({"decode": {"tokens": True}}, "profile 'decode': tokens: a whole number from 1 on"),
        ({"decode": {"weight": 0}}, "profile 'decode': weight: a positive number, got 0"),
        ({"decode": {"weight": -1.0}}, "profile 'decode': weight: a positive number, got -1.0"),
        ({"decode": {"weight": math.inf}}, "profile 'decode': weight: a positive number, got inf"),
        ({"decode": {"weight": "2"}}, "profile 'decode': weight: a positive number, got '2'"),
        ({"decode": {"sample": 3}}, "profile 'decode': sample: an entry point"),
        ({"decode": 1}, "profile 'decode': a Profile, or a table of sample, batch, tokens, weight"),
        ({"memory": {}}, "a profile cannot have the name of a cost, 'memory'"),
        ({"latency": {"tokens": 1}}, "a profile cannot have the name of a cost, 'latency'"),
        ({"minimised": {}}, "a profile cannot have the name of a cost, 'minimised'"),
        (
            {"": {}},
            "a profile's name is of letters, digits, - and _, to be used in budgets, got ''",
        ),
        ({"to decode": {}}, "a profile's name is of letters, digits, - and _"),
        ({1: {}}, "a profile's name is of letters, digits, - and _"),
    ],
)
def test_a_bad_profile_is_one_line_in_a_job_and_in_python(profiles: Any, says: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_job({**JOB, "profiles": profiles}, "job.toml")
    assert str(caught.value).startswith(f"job.toml: {says}")
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInputError) as direct:
        JobSpec(model="a:b", calibration="a:c", budgets=(), profiles=profiles)
    assert str(direct.value).startswith(says)


def test_a_profile_in_python_checks_its_numbers() -> None:
    with pytest.raises(InvalidInputError, match="batch: a whole number from 1 on, got 0"):
        Profile(batch=0)
    with pytest.raises(InvalidInputError, match="weight: a positive number, got nan"):
        Profile(weight=math.nan)
    made = Profile(batch=np.int64(3), weight=np.float32(2.0))
    assert (type(made.batch), type(made.weight)) == (int, float)


def test_a_job_file_with_profiles_is_read_kept_and_read_again(store: Store, tmp_path: Path) -> None:
    text = 'model = "a:b"\ncalibration = "a:c"\nbudgets = ["decode <= 20 ms"]\n'
    text += '[profiles.prefill]\ntokens = 512\n[profiles.decode]\nsample = "a:d"\nweight = 64\n'
    (tmp_path / "job.toml").write_text(text)
    spec = load_job(tmp_path / "job.toml")
    assert spec.profiles == {
        "prefill": Profile(tokens=512),
        "decode": Profile(sample="a:d", weight=64.0),
    }
    assert store.run(store.create_run(spec)).spec == spec
    assert parse_job(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
    assert parse_job(JOB).profiles == {}


def test_a_batch_that_was_passed_is_only_named_in_the_job() -> None:
    spec = JobSpec(
        model="a:b", calibration="a:c", budgets=(), profiles={"decode": Profile(sample=one_token())}
    )
    assert spec.profiles == {"decode": Profile(sample="<live dict>")}
    live = given_profiles({"decode": Profile(sample=one_token())})
    assert not isinstance(live["decode"].sample, str)


# --- batches of another shape ----------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    samples=st.none() | st.integers(1, 9),
    tokens=st.none() | st.integers(1, 9),
)
def test_a_batch_is_cut_or_repeated_from_its_beginning(
    shape: tuple[int, int], samples: int | None, tokens: int | None
) -> None:
    ids = torch.arange(shape[0] * shape[1]).reshape(shape)
    batch = {"ids": ids, "mask": ids > 2, "soft": torch.randn(shape[0], 3), "scale": 2.0}
    found = resized(batch, samples=samples, tokens=tokens)
    for name in ("ids", "mask"):
        assert torch.equal(found[name], slow_resized(batch[name], samples, tokens))  # type: ignore[arg-type]
    assert torch.equal(found["soft"], slow_resized(batch["soft"], samples, None))  # type: ignore[arg-type]
    assert found["scale"] == 2.0
    assert torch.equal(resized(ids, samples=samples, tokens=tokens), found["ids"])
    pair = resized((ids, batch["soft"]), samples=samples, tokens=tokens)
    assert torch.equal(pair[0], found["ids"])
    assert torch.equal(pair[1], found["soft"])


def test_what_is_as_long_as_something_else_keeps_its_length() -> None:
    batch = {"ids": torch.zeros(2, 6, dtype=torch.long), "heads": torch.ones(2, 1, 6, 6).long()}
    found = resized(batch, tokens=3)
    assert [list(part.shape) for part in found.values()] == [[2, 3], [2, 1, 6, 6]]


def test_tokens_of_a_batch_without_any_are_refused_by_profile(store: Store) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(InvalidInputError) as caught:
        search(store, model, [torch.randn(4, 6)])
    assert str(caught.value) == (
        "profile 'prefill': tokens are the second axis of integer tensors and the sample ([1, 6]) "
        "has none: give a sample of that shape instead of tokens = 512"
    )


# --- tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", [PI, "bitplanes:a=1e-6,c=1e-12"])
def test_each_profile_has_the_table_of_its_shape_and_latency_is_their_mean(
    store: Store, hardware: str
) -> None:
    found = search(
        store,
        hardware=hardware,
        schemes=["int8:int8", "int4:int4"],
        budgets=["latency <= 1 s"],
        profiles={**TWO, "batch": Profile(batch=3, sample=batches()[0], weight=0.5)},
    )
    costs, of = found.problem.costs, found.problem.cells
    model, batch = make_words(), batches()[0]
    shapes = {
        "prefill": resized(batch, samples=1, tokens=512),
        "decode": resized(batch, samples=1, tokens=1),
        "batch": resized(batch, samples=3),
    }
    for name, sample in shapes.items():
        expected = get_hardware(hardware).table(build_graph(model, sample), of)
        assert costs[name].provenance == expected.provenance
        assert np.array_equal(costs[name].values, expected.values)
        assert costs[name].fixed == expected.fixed
        assert (costs[name].unit, costs[name].name) == ("s", name)
    weights = {"prefill": 1.0, "decode": 64.0, "batch": 0.5}
    slow = slow_mean_table({name: costs[name] for name in weights}, weights)
    assert costs["latency"].values.tolist() == pytest.approx(slow["values"])
    assert costs["latency"].fixed == pytest.approx(slow["fixed"])
    assert costs["latency"].baseline == pytest.approx(slow["baseline"], nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_latency_is_the_weighted_mean_with_all_that_a_table_has(
    weights: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    of = cells()
    tables = {}
    for number in range(len(weights)):
        low, mid, high = np.sort(rng.uniform(0, 1, (3, len(of))), axis=0)
        tables[f"p{number}"] = CostTable(
            name=f"p{number}",
            unit="s",
            cells=of,
            values=mid,
            low=low,
            high=high,
            fixed=rng.uniform(),
            baseline=rng.uniform(),
            provenance="measured on made",
        )
    named = dict(zip(tables, weights, strict=True))
    found, slow = weighted_latency(tables, named), slow_mean_table(tables, named)
    for part in ("values", "low", "high", "fixed", "baseline"):
        assert getattr(found, part) == pytest.approx(slow[part])
    assert (found.name, found.unit, found.provenance) == ("latency", "s", "measured on made")
    if len(weights) == 1:
        assert same(found, tables["p0"])


def test_the_mean_says_where_the_rest_of_the_network_is_in_some_profiles_only() -> None:
    one = CostTable.exact("a", "s", cells(), np.ones(9), provenance="measured on here")
    other = replace(one, name="b", provenance=f"measured on here, {REST_INCLUDED}")
    found = weighted_latency({"a": one, "b": other}, {"a": 1.0, "b": 1.0})
    assert found.provenance == (
        "measured on here, in some profiles with the rest of the network in fp32"
    )


def test_one_profile_of_the_samples_shape_gives_the_tables_of_the_sample(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured, too: what is known is not timed again, however uncertain."""
    monkeypatch.setattr("hw_cost_models.latency._WIDE", math.inf)
    for hardware, budgets in ((PI, ["latency <= 1 s"]), ("local", ["latency <= 500%"])):
        options = {"hardware": hardware, "latency_seconds": 0.5, "budgets": budgets}
        plain = search(store, profiles=None, **options)
        served = search(store, profiles={"served": Profile()}, **options)
        costs = served.problem.costs
        assert same(costs["served"], plain.problem.costs["latency"])
        assert same(costs["latency"], plain.problem.costs["latency"])
        assert plain.problem.costs.keys() == costs.keys() - {"served"}
        assert dict(served.allocation) == dict(plain.allocation)
        assert REST_INCLUDED in costs["served"].provenance or hardware == PI


def test_kernels_of_all_profiles_are_timed_together_and_none_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Words().eval()
    graphs = {str(n): build_graph(model, torch.zeros(1, n, dtype=torch.long)) for n in (1, 4, 5)}
    graphs["again"] = graphs["4"]
    names = tuple(unit.name for unit in graphs["1"].units)
    of = mpq.Cells(units=names, schemes=((mpq.parse_scheme("fp32"),),) * len(names))
    timed: list[list[str]] = []

    def measure(self: Any, ops: Any, reference: Any, device: str, progress: Any) -> list[Any]:
        timed.append([op.case.shape for op in ops])
        from mpq.core.latency import KernelLatency

        return [
            KernelLatency(device=device, case=op.case, median_s=s, low_s=s, high_s=s, rounds=6)
            for op in ops
            for s in (float(op.case.shape.partition("x")[0].split()[-1]),)
        ]

    monkeypatch.setattr("hw_cost_models.measured.protocol.Stopwatch.measure", measure)
    tables = MeasuredLatency().tables(graphs, of)
    assert len(timed) == 1
    assert len(timed[0]) == len(set(timed[0])) == 3 * 5
    assert [tables[name].values.tolist() for name in graphs] == [[n] * 4 for n in (1, 4, 5, 4)]
    assert [table.name for table in tables.values()] == list(graphs)


# --- budgets ---------------------------------------------------------------------------------


def test_two_budgets_hold_and_bind_and_nothing_is_better(result: SearchResult) -> None:
    problem = result.problem.with_budgets(result.solution.budgets)
    assert [budget.cost for budget in problem.budgets] == ["decode", "prefill"]
    for budget, share in zip(problem.budgets, (0.8, 0.6), strict=True):
        assert budget.limit == pytest.approx(share * problem.costs[budget.cost].baseline)
    assert problem.fits(result.unit_allocation)
    solution = result.solve(["decode <= 66%", "prefill <= 41%"])
    problem = problem.with_budgets(solution.budgets)
    assert solution.allocation is not None
    assert problem.fits(solution.allocation)
    assert solution.score == pytest.approx(brute_force(problem))
    for budget in problem.budgets:
        alone = brute_force(problem.with_budgets([budget]))
        assert alone is not None
        assert alone < 0.99 * solution.score  # without the other it would be better


def test_prices_frontiers_pages_and_the_terminal_know_the_profiles(
    result: SearchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {price.cost for price in result.shadow_prices().budgets} == {"decode", "prefill"}
    kept = result.store.frontier(result.run_id, "decode")
    assert kept == result.frontier("decode")
    assert kept is not None
    totals = [s.totals["decode"] for s in kept.solutions if s.totals]
    assert totals == sorted(totals)
    surface = result.surface(("prefill", "decode"), (4, 4))
    assert surface.costs == ("prefill", "decode")
    assert result.least("decode", score=1.0).totals["decode"] <= totals[0] * (1 + 1e-9)
    at_risk = result.solve(["decode <= 80%"], risk=0.95)
    assert at_risk.quantiles is not None
    assert at_risk.quantiles["decode"] == pytest.approx((at_risk.totals or {})["decode"])
    print_run(result.store, result.run_id)
    shown = capsys.readouterr().out
    assert "decode is modelled (roofline RaspberryPi5)" in " ".join(shown.split())
    page = result.report(tmp_path / "page.html").read_text()
    for text in ("decode (modelled)", "prefill (modelled)", "latency (modelled)"):
        assert text in page


def test_a_budget_record_and_a_minimised_cost_may_be_of_a_profile(store: Store) -> None:
    limit = 0.7 * search(store).problem.costs["decode"].baseline
    found = search(store, budgets=[mpq.Budget("decode", limit)])
    assert found.solution.totals["decode"] <= limit
    assert store.run(found.run_id).spec.budgets == (f"decode <= {limit!r} s",)
    least = search(
        store,
        budgets=None,
        minimise={"decode": 1.0, "prefill": 0.1},
        limits=["cosine <= 0.5"],
    )
    allowed = least.problem.costs["decode"]
    assert least.solution.totals["decode"] < allowed.baseline
    with pytest.raises(InvalidInputError, match="unknown cost 'decode'"):
        search(store, profiles=None, budgets=[mpq.Budget("decode", limit)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budgets": ["decod <= 20 ms"]}, "unknown cost 'decod': did you mean 'decode'"),
        ({"budgets": ["decode <= 20 MB"]}, "decode is counted in s, so write it in s or ms or us"),
        ({"minimise": "prefil", "budgets": None, "limits": ["kl <= 1"]}, "did you mean 'prefill'"),
        ({"profiles": None}, "unknown cost 'decode'"),
        ({"profiles": ["decode"]}, "profiles is {name: Profile}"),
        (
            {"profiles": {"decode": Profile(sample=3)}},
            "profile 'decode': the sample batch 0 is a i",
        ),
        (
            {"profiles": {"decode": Profile(sample="a")}},
            "the sample of profile 'decode' is written",
        ),
        ({"profiles": {"decode": Profile(tokens=601)}}, "the model cannot run profile 'decode'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    store: Store, options: Mapping[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        search(store, **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(run.state == RunState.SUCCEEDED for run in store.runs())


def test_a_profile_in_which_a_searched_layer_is_never_called_is_refused(store: Store) -> None:
    model = Words(long=True).eval()
    with pytest.raises(InvalidInputError) as caught:
        search(store, model)
    assert str(caught.value) == (
        "profile 'decode': layer 'long' is never called on its sample, so it has no time there: "
        "give another sample, or leave the layer out with skip=['long']"
    )
    found = search(store, model, skip=["long"], budgets=["decode <= 90%"])
    costs = found.problem.costs
    assert costs["prefill"].fixed > 0  # that of the layer outside
    fp32 = mpq.parse_scheme("fp32")
    for name in ("prefill", "decode"):
        searched = math.fsum(costs[name][unit, fp32] for unit in found.problem.cells.units)
        assert costs[name].fixed + searched == pytest.approx(costs[name].baseline)


def test_an_impossible_budget_names_what_each_profile_can_reach(store: Store) -> None:
    with pytest.raises(InfeasibleError, match=r"decode <= 1% .*: the smallest possible is"):
        search(store, budgets=["decode <= 1%", "prefill <= 1%"])


# --- hardware --------------------------------------------------------------------------------


def times(path: Path, rows: list[dict[str, Any]]) -> str:
    (path / "times.json").write_text(json.dumps(rows))
    return f"table:{path / 'times.json'}"


def test_a_scheme_that_one_profile_has_no_time_for_is_not_offered(
    store: Store, tmp_path: Path
) -> None:
    shapes = [(128, 256), (256, 128), (128, 128), (128, 11)]
    rows = [
        {"shape": f"linear {n}x{i}->{o}", "scheme": scheme, "latency_us": n * i * o}
        for i, o in shapes
        for n, schemes in ((1, ["int8:int8", "int4:int4"]), (512, ["int8:int8"]))
        for scheme in schemes
    ]
    given = {"schemes": ["int8:int8", "int4:int4"], "budgets": ["decode <= 1 s"]}
    found = search(store, hardware=times(tmp_path, rows), **given)
    assert {str(s) for schemes in found.problem.cells.schemes for s in schemes} == {"int8:int8"}
    left = [e.message for e in store.events(found.run_id) if e.kind == "left out"]
    assert any("linear 512x128->256" in line and "(profile 'prefill')" in line for line in left)
    assert found.problem.costs["decode"].values[0] == pytest.approx(128 * 256e-6)


def test_a_table_that_knows_no_shapes_is_told(store: Store, tmp_path: Path) -> None:
    names = ("up", "down", "more", "head")
    rows = [{"layer": name, "scheme": "int8:int8", "latency_ms": 1} for name in names]
    found = search(
        store,
        hardware=times(tmp_path, rows),
        schemes=["int8:int8"],
        budgets=["latency <= 1 s"],
    )
    notes = [e.message for e in store.events(found.run_id) if e.kind == "latency"]
    assert notes == [
        "prefill and decode take the same time, whatever their shapes, in table times.json"
    ]


def test_profiles_without_a_budget_on_any_time_are_not_timed_here(store: Store) -> None:
    found = search(store, hardware="local", budgets=["memory <= 60%"])
    assert found.problem.costs.keys() == {"memory", "bops"}
    notes = [e.message for e in store.events(found.run_id) if e.kind == "latency"]
    assert notes == ["no time is budgeted: not taken of prefill, decode"]


def test_the_referee_judges_under_budgets_of_profiles(store: Store) -> None:
    options = {"metrics": ["gauss_newton"], "seconds": 5.0, "allocations": 12, "storage": store}
    job = {"schemes": ["int8:int8", "int4g32"], "executor": "serial", "hardware": PI}
    report = compare_metrics(
        make_words(),
        batches(),
        budgets=[[mpq.Budget("decode", 1.0), "prefill <= 90%"]],
        profiles={**TWO, "decode": Profile(sample=one_token())},
        **options,  # type: ignore[arg-type]
        **job,
    )
    assert [b.cost for b in report.budgets[0]] == ["decode", "prefill"]
    named = {"model": f"{HERE}:make_words", "calibration": f"{HERE}:batches"}
    spec = parse_job({**job, **named, "budgets": ["decode <= 90%"], "profiles": TWO})
    assert compare_job(spec, **options).budgets[0][0].cost == "decode"  # type: ignore[arg-type]


def causal() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def test_one_token_of_a_causal_language_model_is_a_decode_profile(store: Store) -> None:
    """With its KV cache on, whose attention no linear layer sees."""
    ids = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    found = search(
        store,
        causal(),
        [{"input_ids": ids}],
        hardware="local",
        latency_seconds=0.5,
        schemes=["fp32", "int8:int8"],
        budgets=["decode <= 500%", "prefill <= 500%"],
        profiles={"prefill": Profile(tokens=32), "decode": Profile(sample=one_token(), weight=16)},
    )
    costs = found.problem.costs
    assert costs["decode"].baseline < costs["prefill"].baseline
    notes = [e.message for e in store.events(found.run_id) if e.kind == "latency"]
    for name in ("prefill", "decode"):
        whole = REST_INCLUDED in costs[name].provenance
        told = any(note.startswith(f"{name}: of the searched layers only") for note in notes)
        assert whole != told


# --- the whole way ---------------------------------------------------------------------------

_JOB = f"""
name = "served"
model = "{HERE}:make_words"
calibration = "{HERE}:batches"
budgets = ["decode <= 80%", "prefill <= 60%"]
schemes = ["fp32", "int8:int8", "int4g32"]
hardware = "{PI}"
executor = "serial"
refine = 0

[profiles.prefill]
tokens = 512

[profiles.decode]
sample = "{HERE}:one_token"
weight = 64.0
"""


def test_a_job_with_profiles_runs_is_shown_and_solved_again(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(_JOB)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    storage = ["--storage", str(tmp_path / "runs.db"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "mpq.cli", "run", "job.toml", "--report", "page.html", *storage],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran = json.loads(done.stdout)
    assert ran["state"] == "SUCCEEDED"
    chosen = ran["chosen"]
    assert chosen["totals"]["decode"] <= chosen["budgets"]["decode"]
    assert chosen["totals"]["prefill"] <= chosen["budgets"]["prefill"]
    mean = (chosen["totals"]["prefill"] + 64 * chosen["totals"]["decode"]) / 65
    assert chosen["totals"]["latency"] == pytest.approx(mean)
    assert ran["costs_from"]["decode"] == PI.replace(":", " ")
    assert "decode (modelled)" in (tmp_path / "page.html").read_text()

    def asked(*arguments: str) -> Any:
        found = CliRunner().invoke(app, [*arguments, *storage])
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)

    assert asked("show", "served")["chosen"] == chosen
    again = asked("solve", "served", "--budget", "decode <= 70%")
    assert again["totals"]["decode"] < again["budgets"]["decode"] < chosen["budgets"]["decode"]
    assert asked("frontier", "served", "--cost", "decode")


def deployed(store: Store, tmp_path: Path, **options: Any) -> tuple[SearchResult, Deployment]:
    given = {
        "hardware": "local",
        "latency_seconds": 0.5,
        "schemes": ["fp32", "int8:int8"],
        "budgets": ["decode <= 500%"],
        "profiles": {"many": Profile(batch=3), "decode": Profile(tokens=1, weight=4.0)},
    }
    found = search(store, f"{HERE}:make_words", f"{HERE}:batches", **(given | options))
    return found, found.deploy("onnxruntime", tmp_path / "model.onnx", seconds=0.1)


def test_a_deployment_times_every_profile_beside_its_prediction(
    store: Store, tmp_path: Path
) -> None:
    found, made = deployed(store, tmp_path)
    assert [(time.name, time.in_file) for time in made.profiles] == [
        ("many", True),
        ("decode", False),
    ]
    totals = found.solution.totals or {}
    for time in made.profiles:
        table = found.problem.costs[time.name]
        whole = REST_INCLUDED in table.provenance
        expected = totals[time.name] + (0.0 if whole else time.fp32_s - table.baseline)
        assert time.predicted_s == pytest.approx(expected)
        assert 0 < time.low_s < time.measured_s < time.high_s
        assert time.speed_up == pytest.approx(time.fp32_s / time.measured_s)
    assert made.predicted_s is None  # latency is the profiles' mean, not the sample's
    many, decode = (line for line in made.lines() if line.startswith(("many", "decode")))
    assert "(predicted " in many
    assert "the file does not run" not in many
    assert decode.endswith("exported for this shape, which the file does not run")
    assert Deployment.from_text(made.text()) == made == found.deployments[-1]
    assert made.view()["profiles"][1]["speed_up"] == decode_of(made).speed_up
    json.dumps(made.view())


def decode_of(made: Deployment) -> Any:
    return next(time for time in made.profiles if time.name == "decode")


def test_a_deployment_predicts_the_sample_where_a_profile_has_its_shape_and_asks_for_objects(
    store: Store, tmp_path: Path
) -> None:
    profiles = {"same": Profile(), "live": Profile(sample=one_token())}
    found, made = deployed(store, tmp_path, profiles=profiles, budgets=["same <= 500%"])
    assert made.predicted_s is not None
    assert [time.name for time in made.profiles] == ["same"]
    assert made.untimed == (
        "live is not timed: its sample, <live dict>, is not kept, pass profiles={name: "
        "Profile(sample=...)}",
    )
    again = found.deploy(
        "onnxruntime",
        tmp_path / "model.onnx",
        profiles={"live": Profile(sample=one_token())},
        seconds=0.1,
    )
    assert [time.name for time in again.profiles] == ["same", "live"]
    assert not again.untimed
    with pytest.raises(InvalidInputError, match="unknown profile 'life': did you mean 'live'"):
        found.deploy("onnxruntime", tmp_path / "model.onnx", profiles={"life": Profile()})


@pytest.mark.slow
def test_measured_profiles_of_a_sentence_encoder_hold_their_budgets(
    store: Store, tmp_path: Path
) -> None:
    from examples import minilm

    calibration = minilm.calibration_batches()[:1]
    found = search(
        store,
        minilm.make_model(),
        calibration,
        hardware="local",
        schemes=None,
        latency_seconds=20.0,
        budgets=["query <= 90%", "passage <= 85%"],
        profiles={"query": Profile(tokens=16, weight=8.0), "passage": Profile(tokens=128)},
    )
    totals, costs = found.solution.totals, found.problem.costs
    for budget in found.solution.budgets:
        assert totals[budget.cost] <= budget.limit
        assert REST_INCLUDED in costs[budget.cost].provenance
    assert costs["query"].baseline < costs["passage"].baseline
    mean = (8 * totals["query"] + totals["passage"]) / 9
    assert totals["latency"] == pytest.approx(mean)
