"""Bad input gets one clear line that names the value and the fix, and loses nothing."""

from __future__ import annotations

import math
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import InfeasibleError, InvalidInputError, MpqError, MpqWarning
from mpq.core.jobs import JobSpec, RunState
from mpq.listed import print_page
from mpq.store.store import Store, open_store
from mpq.terminal import print_run, print_solution


class Tiny(nn.Module):
    """Three linear layers with a dropout; `width` is the input size."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, 8)
        self.second = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.first(x).relu())
        return self.head(self.second(hidden).relu())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def batches(count: int = 2, size: int = 4, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, width, generator=generator) for _ in range(count)]


def search(store: Store, model: Any = None, calibration: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "budgets": ["memory <= 70%"],
        "schemes": ["int2", "int4", "int8"],
        "executor": "serial",
        "refine": 1,
    }
    return mpq.search(
        Tiny() if model is None else model,
        batches() if calibration is None else calibration,
        storage=store,
        **(settings | options),
    )


def refused(
    store: Store, *says: str, error: type[MpqError] = InvalidInputError, **given: Any
) -> str:
    """Return the one line of the refusal after checking that it says all of `says`."""
    with pytest.raises(error) as caught:
        search(store, **given)
    line = str(caught.value)
    assert "\n" not in line
    for text in says:
        assert text in line, line
    return line


# 1: weights that are not finite


def test_weights_that_are_not_finite_are_refused_by_layer_count_and_place(store: Store) -> None:
    model = Tiny()
    with torch.no_grad():
        model.second.weight[2, 5] = float("nan")
    refused(store, "'second'", "1 weights", "[2, 5]", "skip=['second']", model=model)
    assert not store.runs()


# 2: layers without weights


def test_a_layer_without_parameters_is_listed_and_never_divided_by(store: Store) -> None:
    model = Tiny()
    model.identity = nn.Identity()
    model.empty = nn.Embedding(0, 4)
    result = search(store, model=model)
    assert {part.name for part in result.graph.unsearched} >= {"empty.weight"}
    assert "empty" not in result.allocation


# 3 and 4: tied weights, shared modules


def test_tied_weights_are_one_choice_counted_once_and_named(store: Store) -> None:
    model = Tiny()
    model.third = nn.Linear(8, 8, bias=False)
    model.third.weight = model.second.weight
    model.forward = lambda x: model.head(model.third(model.second(model.first(x))).relu())  # type: ignore[method-assign]
    result = search(store, model=model)
    (unit,) = [unit for unit in result.graph.units if "second" in unit.layers]
    assert unit.layers == ("second", "third")
    assert unit.reason == "tied weights"
    stored = sum(p.numel() for p in model.parameters()) * 4
    assert result.graph.native_bytes == stored


def test_a_shared_module_called_twice_is_one_choice(store: Store) -> None:
    model = Tiny()
    model.forward = lambda x: model.head(model.second(model.second(model.first(x))))  # type: ignore[method-assign]
    result = search(store, model=model)
    (layer,) = [layer for layer in result.graph.layers if layer.name == "second"]
    assert layer.calls == 2
    assert layer.macs == 2 * 8 * 8


# 5: infeasible budgets


def test_an_infeasible_budget_is_told_before_anything_is_scored(store: Store) -> None:
    line = refused(store, "memory <= 1 B", "int2", error=InfeasibleError, budgets=["memory <= 1 B"])
    assert re.search(r"smallest possible is [\d.]+ \w*B", line)
    (run,) = store.runs()
    assert run.state == RunState.FAILED
    assert run.error_message == line


# 6: budgets that are no budgets


@pytest.mark.parametrize(
    "text",
    [
        "memory <= 0 MB",
        "memory <= -3 MB",
        "memory <= nan MB",
        "memory <= inf %",
        "memory < 3 MB",
        "",
    ],
)
def test_a_budget_that_is_no_positive_number_is_refused(store: Store, text: str) -> None:
    refused(store, repr(text), budgets=[text])


def test_decimal_and_binary_units_differ_and_the_limit_is_shown(store: Store) -> None:
    decimal = search(store, budgets=["memory <= 0.5 kB"]).solution.budgets[0].limit
    binary = search(store, budgets=["memory <= 0.5 KiB"]).solution.budgets[0].limit
    assert (decimal, binary) == (500.0, 512.0)


def test_an_unknown_unit_names_the_near_one(store: Store) -> None:
    refused(store, "'Mb'", "did you mean 'MB'?", budgets=["memory <= 3 Mb"])


# 9 and 10: candidate schemes


@pytest.mark.parametrize(
    ("schemes", "says"),
    [
        ([], "empty"),
        (["int0"], "got 0 in 'int0'"),
        (["int33"], "got 33 in 'int33'"),
        ([4], "got 4"),
        ([4.5], "got 4.5"),
        (["in4"], "'in4'"),
        (["int4:int9"], "got 9"),
        ("int4", "'int4'"),
    ],
)
def test_schemes_that_are_no_schemes_are_refused(store: Store, schemes: Any, says: str) -> None:
    refused(store, says, schemes=schemes)


def test_schemes_listed_twice_collapse_with_a_warning(store: Store) -> None:
    with pytest.warns(MpqWarning, match="more than once: int4"):
        result = search(store, schemes=["int4", "int4", "int8"])
    assert all(len(schemes) == 2 for schemes in result.problem.cells.schemes)
    assert any("more than once" in event.message for event in store.events(result.run_id))


def test_a_single_scheme_is_allowed(store: Store) -> None:
    result = search(store, schemes=["int4"])
    assert set(map(str, result.allocation.values())) == {"int4"}


# 11: groups that do not divide


def test_groups_that_do_not_divide_name_the_layer_and_the_ways_out(store: Store) -> None:
    refused(store, "group size 4", "'first'", "skip=['first']", schemes=["int4g4"])


# 12 and 13: calibration batches


@pytest.mark.parametrize("calibration", [[], (), [torch.randn(0, 6)]])
def test_an_empty_calibration_set_is_refused(store: Store, calibration: Any) -> None:
    refused(store, "calibration is empty", calibration=calibration)


def test_one_tensor_in_place_of_a_list_of_batches_is_refused(store: Store) -> None:
    refused(store, "list of batches", "[it]", calibration=torch.randn(4, 6))


def test_a_batch_that_does_not_fit_is_named_and_what_was_scored_is_kept(store: Store) -> None:
    wrong = [*batches(), torch.randn(4, 5)]
    refused(store, "calibration batch 2", ", 5]", "forward takes (x:", calibration=wrong)
    (run,) = store.runs()
    assert run.state == RunState.FAILED
    with closing(sqlite3.connect(str(store.url.database))) as connection:
        assert connection.execute("select count(*) from partials").fetchone() == (2,)


def test_a_batch_of_the_wrong_type_is_named(store: Store) -> None:
    refused(store, "the sample", "[1, 6]", calibration=[torch.zeros(4, 6, dtype=torch.int64)])


def test_a_batch_that_gives_nan_is_named(store: Store) -> None:
    bad = [*batches(), torch.full((4, 6), math.nan)]
    refused(store, "calibration batch 2", "not finite", calibration=bad)


# 17 and 18: training mode, dropout, models that are not deterministic


def test_a_model_in_training_mode_is_scored_in_eval_mode_and_given_back(store: Store) -> None:
    torch.manual_seed(0)
    model = Tiny().train()
    result = search(store, model=model)
    assert model.training
    assert model.dropout.training
    assert any("training mode" in event.message for event in store.events(result.run_id))
    again = search(store, model=model.eval())
    assert result.problem.sensitivity.values.tolist() == again.problem.sensitivity.values.tolist()


def test_a_model_that_is_not_deterministic_is_told(store: Store) -> None:
    model = Tiny()
    model.forward = lambda x: model.head(model.first(x + torch.randn_like(x) * 0.1))  # type: ignore[method-assign]
    with pytest.warns(MpqWarning, match="not deterministic.*differ by up to"):
        result = search(store, model=model)
    assert any("not deterministic" in event.message for event in store.events(result.run_id))


# 19: double backward is tested with the Hessian metric; 20: unused parameters


def test_a_layer_without_effect_counts_as_free_and_is_told(store: Store) -> None:
    model = Tiny()
    model.forward = lambda x: (model.second(model.first(x)), model.head(model.first(x)))[1]  # type: ignore[method-assign]
    with pytest.warns(MpqWarning, match="no effect.*second"):
        result = search(store, model=model)
    assert result.problem.sensitivity["second", mpq.parse_scheme("int2")] == 0.0


@pytest.mark.parametrize("metric", ["gauss_newton", "hessian_trace"])
def test_unused_and_frozen_parameters_do_not_crash(store: Store, metric: str) -> None:
    model = Tiny()
    model.unused = nn.Linear(3, 3)
    for parameter in model.first.parameters():  # 22
        parameter.requires_grad_(False)
    result = search(store, model=model, metric=metric)
    assert not model.first.weight.requires_grad
    assert model.second.weight.requires_grad
    (part,) = [p for p in result.graph.unsearched if p.name == "unused.weight"]
    assert "not called" in part.reason


# 23 and 24: models with nothing to quantize


def test_a_quantized_model_is_refused(store: Store) -> None:
    model = Tiny()
    model.config = type("Config", (), {"quantization_config": {"quant_method": "gptq"}})()
    refused(store, "already quantized", "gptq", model=model)


def test_a_model_without_known_layers_lists_what_it_has(store: Store) -> None:
    refused(store, "LayerNorm", model=nn.Sequential(nn.LayerNorm(6), nn.ReLU()))


# 25 and 26: patterns and names


@pytest.mark.parametrize(
    "given",
    [{"skip": ["secnd"]}, {"pin": {"secnd": "int8"}}, {"groups": [["first", "secnd"]]}],
)
def test_a_pattern_that_matches_nothing_names_the_near_one(store: Store, given: Any) -> None:
    refused(store, "'secnd'", "did you mean 'second'?", **given)


def test_a_pattern_too_long_is_refused_at_once(store: Store) -> None:
    refused(store, "1 to 500 characters", skip=["*a" * 400])


def test_any_layer_name_will_do(store: Store) -> None:
    names = ["a-b", "a_b", "with space", "ünïcode ☃", "x" * 500]
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(6, 6))
    result = search(store, model=model)
    assert list(result.allocation) == names
    again = store.problem(result.run_id)
    assert list(again.cells.units) == names


# 45: nothing matters


def test_zero_sensitivity_everywhere_takes_the_cheapest_and_says_so(store: Store) -> None:
    model = Tiny()
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.warns(MpqWarning, match="every sensitivity is zero"):
        result = search(store, model=model, skip=["head"])
    assert set(map(str, result.allocation.values())) == {"int2"}


# names with a near match, and kinds that are wrong


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ({"metric": "hesian_trace"}, "hessian_trace"),
        ({"solver": "ilpp"}, "ilp"),
        ({"budgets": ["memry <= 3 MB"]}, "memory"),
        ({"executor": "serail"}, "serial"),
    ],
)
def test_an_unknown_name_gets_its_near_match(store: Store, given: Any, near: str) -> None:
    refused(store, f"did you mean {near!r}?", **given)


def test_nothing_else_warns(store: Store) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(store)


# names that look like something else


def test_names_that_look_like_markup_are_printed_as_they_are(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential()
    for name in ("a [/b]", "[red]b", ":smile:</script>"):
        model.add_module(name, nn.Linear(6, 6))
    result = search(store, model=model, name="job [/b]")
    print_run(store, result.run_id)
    print_solution(result.graph, result.problem, result.solve(["memory <= 80%"]))
    print_page(store.run_page(limit=3))
    printed = capsys.readouterr().out
    assert printed.count("job [/b]") == 2
    for name in model._modules:
        assert printed.count(name) >= 2
    failed = store.create_run(store.run(result.run_id).spec)
    store.set_state(failed, RunState.RUNNING)
    store.set_state(failed, RunState.FAILED, InvalidInputError("x", "no [/such] layer"))
    print_run(store, failed)
    assert "no [/such] layer" in capsys.readouterr().out


# 16-bit models without a word about schemes


def half_net() -> nn.Sequential:
    layers = nn.ConvTranspose2d(6, 4, 2), nn.Flatten(1), nn.Linear(72, 3)
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.Unflatten(2, (2, 5)), *layers).to(torch.bfloat16)


def test_a_16_bit_model_is_offered_nothing_wider_than_it_is(store: Store) -> None:
    inputs = [torch.randn(4, 4, 12, dtype=torch.bfloat16)]
    cells = search(store, model=half_net(), calibration=inputs, schemes=None).problem.cells
    offered = {u: list(map(str, ss)) for u, ss in zip(cells.units, cells.schemes, strict=True)}
    assert offered == {"0": ["int8:int8"], "2": ["int8"], "4": ["int8:int8"]}


def test_a_16_bit_layer_without_a_kernel_names_the_way_out(store: Store) -> None:
    given = {"model": half_net(), "calibration": [torch.randn(4, 4, 12, dtype=torch.bfloat16)]}
    budgets = ["latency <= 90%"]
    refused(store, "'2'", "conv_transpose2d", "skip", schemes=None, budgets=budgets, **given)


# answers that would look right and are not


def test_an_allocation_that_overflows_never_wins(store: Store) -> None:
    class Divides(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            row = self.head.weight[0]
            spread = row.abs().max() - row.abs().min()  # one bit leaves none: 0 / 0
            return super().forward(x) + spread / spread - 1

    model = Divides()
    result = search(store, model=model, schemes=["int1", "int8"], refine=0)
    (chosen,) = [e for e in result.evaluation if e.candidate == "chosen"]
    assert math.isfinite(chosen.mean)


def test_a_changed_forward_is_scored_again(store: Store) -> None:
    class Scaled(Tiny):
        factor = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.factor

    torch.manual_seed(0)
    model = Scaled().eval()
    first = search(store, model=model).problem.sensitivity.values
    model.factor = 5.0
    assert (search(store, model=model).problem.sensitivity.values > 2 * first).any()


def test_every_candidate_is_scored_in_one_number(store: Store) -> None:
    torch.manual_seed(0)
    result = search(store, refine=3)
    bound = result.solutions["additive"].bound
    for name, solution in result.solutions.items():
        assert solution.allocation is not None
        choice = solution.allocation.choice(result.problem.cells)
        assert solution.score == pytest.approx(result.problem.score(choice)), name
        assert math.isfinite(solution.gap)
        assert solution.score >= bound - 1e-12


def test_an_output_without_a_sample_axis_is_refused(store: Store) -> None:
    model = Tiny()
    model.forward = lambda x: model.head(model.first(x)).reshape(-1)  # type: ignore[method-assign]
    refused(store, "first axis of the output", "[3]", model=model)


@pytest.mark.parametrize("metric", ["fisher", "hessian_quadratic", "hessian_top"])
def test_metrics_of_weights_refuse_activations(store: Store, metric: str) -> None:
    refused(store, "weights only", "int8:int8", metric=metric, schemes=["int8:int8"])


def test_names_are_checked_before_any_work(store: Store) -> None:
    refused(store, "did you mean 'pairs'?", solver="pair")
    refused(store, "did you mean 'gauss_newton'?", metric="gaus_newton")
    assert not store.runs()


def test_held_out_batches_that_do_not_fit_are_named_before_scoring(store: Store) -> None:
    refused(store, "held-out batch 1", held_out=[*batches(1), torch.randn(4, 5)])
    assert not store.runs()


@pytest.mark.parametrize("calibration", [None, [1, 2], 7])
def test_what_is_no_list_of_batches_is_refused(store: Store, calibration: Any) -> None:
    with pytest.raises(InvalidInputError, match="calibration"):
        mpq.search(Tiny(), calibration, budgets=["memory <= 70%"], storage=store)


@pytest.mark.parametrize(
    "given", [{"skip": "first"}, {"groups": ["first", "second"]}, {"pin": ["first"]}]
)
def test_a_text_in_place_of_a_list_is_refused(store: Store, given: Any) -> None:
    refused(store, "got", **given)


def test_an_optional_input_in_a_tuple_is_told(store: Store) -> None:
    class Two(Tiny):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x if mask is None else x * mask)

    pairs = [(batch, torch.ones_like(batch)) for batch in batches()]
    with pytest.warns(MpqWarning, match="forward also takes mask"):
        search(store, model=Two(), calibration=pairs)


def test_without_held_out_data_the_metrics_are_still_measured(store: Store) -> None:
    result = search(store, evaluate=lambda model: {"weights": float(model.head.weight.sum())})
    measured = {e.candidate: e.metrics for e in result.evaluation if e.metrics}
    assert {"chosen", "unquantized"} <= set(measured)


def test_any_error_of_the_model_ends_the_run_in_one_line(store: Store) -> None:
    class Asserts(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.abs().max() < 100, "too large"
            return super().forward(x)

    bad = [*batches(), torch.full((4, 6), 1e3)]
    refused(store, "calibration batch 2", "too large", model=Asserts(), calibration=bad)


def test_an_embedding_keeps_to_weights_only_schemes(store: Store) -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 3)).eval()
    words = [torch.randint(0, 9, (4, 2), generator=torch.Generator().manual_seed(0))]
    result = search(
        store, model=model, calibration=words, embeddings=True, schemes=["int4", "int8:int8"]
    )
    assert str(result.allocation["0"]) == "int4"
    assert any("reads indices" in event.message for event in store.events(result.run_id))


# modules and directories that cannot be loaded


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("x = 1\ndef make(:\n", "line 2: invalid syntax"),
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        ("\nimport no_such_module_anywhere\n", "line 2: No module named 'no_such_module"),
        ("raise ValueError('one\\ntwo')\n", "line 1: ValueError: one two"),
    ],
)
def test_a_module_that_cannot_be_imported_names_file_and_line(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, says: str
) -> None:
    (tmp_path / "broken_module.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    refused(store, "'broken_module'", f"broken_module.py, {says}", model="broken_module:make")


@pytest.mark.parametrize("config", ['{"model_type": "nosuch"}', "{}", "{"])
def test_a_directory_that_is_no_known_model_is_one_line(
    store: Store, tmp_path: Path, config: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    line = refused(store, f"cannot load {tmp_path}: ", model=str(tmp_path))
    assert len(line) < 500


# pins of a stored run


class Fused(nn.Module):
    """Three layers in one unit and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("q_proj", "k_proj")})
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn["q_proj"](x) * self.attn["k_proj"](x))


def test_layers_units_and_patterns_can_be_pinned_again(store: Store) -> None:
    result = search(store, model=Fused(), groups=[["attn.q_proj", "attn.k_proj"]])
    (unit,) = [unit for unit in result.graph.units if len(unit.layers) == 2]
    for name in (unit.name, "attn.k_proj", "attn.*"):
        for scheme in ("int2", "int4"):
            again = result.solve(["memory <= 90%"], pin={name: scheme})
            assert str(again.allocation[unit.name]) == scheme
    both = result.solve(["memory <= 90%"], pin={"head": "int4", "*": "int2"})  # a name beats *
    assert both.allocation.text() == {unit.name: "int2", "head": "int4"}


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        ({"hed": "int4"}, "did you mean 'head'?"),
        ({"9*": "int4"}, "matches no layer"),
        (["head=int4"], "pin is a mapping"),
        ({"attn.q_proj": "int4", "attn.k_proj": "int2"}, "pinned to int2 and int4"),
        ({"head": "int5"}, "int5"),
    ],
)
def test_a_pin_that_cannot_be_is_one_line(store: Store, pin: Any, says: str) -> None:
    result = search(store, model=Fused(), groups=[["attn.q_proj", "attn.k_proj"]])
    with pytest.raises(InvalidInputError, match=re.escape(says)):
        result.solve(["memory <= 90%"], pin=pin)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (0.5, "evaluate returns a float, 0.5: return {name: number}"),
        (None, "evaluate returns a NoneType"),
        ({"accuracy": "high"}, "a str, 'high', for 'accuracy'"),
        ({"accuracy": "0.5"}, "a str, '0.5', for 'accuracy'"),
        ({"accuracy": torch.ones(2)}, "a Tensor"),
        ({1: 0.5}, "the name 1"),
        ({"sqnr": 0.5}, "'sqnr', which is the name of a quality as well"),
        ({"accuracy": float("-inf")}, "-inf for 'accuracy' of the unquantized network"),
    ],
)
def test_what_evaluate_returns_is_checked_before_anything_is_scored(
    store: Store, monkeypatch: pytest.MonkeyPatch, returned: Any, says: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("scored before evaluate was checked")

    monkeypatch.setattr("sensitivity.gauss_newton.GaussNewton.run", never)
    refused(store, says, evaluate=lambda model: returned, quality={"sqnr": "sqnr"})


def test_evaluate_may_return_nan_and_tensors_of_one_number(store: Store) -> None:
    result = search(store, evaluate=lambda model: {"a": float("nan"), "b": torch.ones(1)})
    (whole,) = [e for e in result.evaluation if e.candidate == "unquantized"]
    assert math.isnan(whole.metrics["a"])
    assert whole.metrics["b"] == 1.0


BAD_WORDS = {
    "clip": ("mes", "unknown clip 'mes': did you mean 'mse'"),
    "on_indivisible": ("chanel", "unknown on indivisible 'chanel': did you mean 'channel'"),
    "activations": ("appart", "unknown activations 'appart': did you mean 'apart'"),
    "corrections": (("bias", "bias"), "corrections: 'bias' is there twice"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_a_word_that_a_key_does_not_know_is_told_with_those_it_does(name: str) -> None:
    value, told = BAD_WORDS[name]
    with pytest.raises(InvalidInputError, match=told):
        JobSpec(model="m:m", calibration="m:c", budgets=("memory <= 50%",), **{name: value})


@pytest.mark.parametrize("name", ["corrections", "transforms", "skip", "limits"])
def test_a_list_that_is_none_is_told(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{name} is a list, got None"):
        mpq.search(torch.nn.Linear(2, 2), [], budgets=["memory <= 50%"], **{name: None})
