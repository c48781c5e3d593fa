"""The referee: its statistics against slow ones, its verdicts against measurements."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.auto import known_metrics
from mpq.cli import main
from mpq.core.evaluation import CHOSEN
from mpq.core.problem import Budget, Problem
from mpq.core.protocols import Scores, Task
from mpq.jobfile import parse_job
from mpq.referee.compare import compare_job
from mpq.referee.peak_memory import peak_bytes
from mpq.referee.random_allocations import random_allocations
from mpq.referee.ranks import kendall, ranks, spearman
from mpq.referee.told import print_referee
from mpq.store.store import Store, open_store
from sensitivity import METRICS
from sensitivity.kl import Kl
from sensitivity.tasks import refuse_activations
from tests.builders import cells, cost
from tests.test_pipeline import make_images, make_net

SCHEMES = ["int2", "int3", "int4", "int6", "int8"]
BUDGETS = ["memory <= uniform int3", "memory <= uniform int4"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def compare(store: Store, **options: Any) -> mpq.RefereeReport:
    settings: dict[str, Any] = {
        "budgets": BUDGETS,
        "schemes": SCHEMES,
        "executor": "serial",
        "metrics": ["gauss_newton", "kl"],
    }
    return mpq.compare_metrics(make_net(), make_images(3, 0), storage=store, **(settings | options))


# --- rank correlation ------------------------------------------------------------------------


def slow_rank(values: list[float], one: float) -> float:
    return 1 + sum(v < one for v in values) + (sum(v == one for v in values) - 1) / 2


def slow_kendall(x: list[float], y: list[float]) -> float:
    pairs = [(a, b) for a in range(len(x)) for b in range(a)]
    signs = [(np.sign(x[a] - x[b]), np.sign(y[a] - y[b])) for a, b in pairs]
    untied_x, untied_y = (sum(s[i] != 0 for s in signs) for i in (0, 1))
    return float(sum(s * t for s, t in signs)) / math.sqrt(untied_x * untied_y)


def test_correlations_are_the_slow_ones_ties_included() -> None:
    generator = np.random.default_rng(0)
    for count in (5, 8, 13):
        groups = [
            (generator.integers(0, 6, count).tolist(), generator.integers(0, 6, count).tolist())
            for _ in range(3)
        ]
        for x, _ in groups:
            np.testing.assert_allclose(ranks(x), [slow_rank(x, one) for one in x])
        rho, tau = spearman(groups), kendall(groups)
        assert rho is not None
        assert tau is not None
        rhos = [np.corrcoef(ranks(x), ranks(y))[0, 1] for x, y in groups]
        assert rho.value == pytest.approx(np.mean(rhos))
        assert tau.value == pytest.approx(np.mean([slow_kendall(x, y) for x, y in groups]))


def test_error_bars_of_correlations_cover_the_truth() -> None:
    generator = np.random.default_rng(1)
    trials, groups, n = 400, 3, 12
    for r in (0.0, 0.6, 0.9):
        # exact expectations of normal pairs: Moran 1948 for rho, Greiner's relation for tau
        rho = 6 / (math.pi * (n + 1)) * (math.asin(r) + (n - 2) * math.asin(r / 2))
        tau = 2 / math.pi * math.asin(r)
        covered = np.zeros(2)
        for _ in range(trials):
            x, noise = generator.standard_normal((2, groups, n))
            y = r * x + math.sqrt(1 - r**2) * noise
            pairs = list(zip(x, y, strict=True))
            for i, (found, truth) in enumerate([(spearman(pairs), rho), (kendall(pairs), tau)]):
                assert found is not None
                covered[i] += abs(found.value - truth) <= 2 * found.stderr
        assert (covered / trials > 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5 - 0.03).all(), r


def test_few_pairs_have_no_correlation_and_constants_have_none() -> None:
    assert spearman([([1, 2, 3, 4], [1, 2, 3, 4])]) is None
    flat = spearman([([1] * 6, range(6))])
    assert flat is not None
    assert flat.value == 0.0
    nan_last = spearman([([*range(5), 9], [*range(5), math.nan])])
    assert nan_last is not None
    assert nan_last.value == pytest.approx(1.0)


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a peak that can be reset")
def test_peak_memory_is_what_the_work_held_at_once() -> None:
    size = 2**26
    held = torch.ones(2**24)  # what is there before does not count

    def work() -> None:
        for _ in range(3):  # one after the other
            torch.ones(size, dtype=torch.uint8)

    found = peak_bytes(work)
    assert found is not None
    assert 0.98 * size < found < 1.5 * size  # the system counts pages in lots
    nothing = peak_bytes(lambda: held.sum())
    assert nothing is not None
    assert nothing < 0.2 * size


# --- random allocations ----------------------------------------------------------------------


def test_random_allocations_fit_use_the_budget_and_differ() -> None:
    of = cells(30, ("int2", "int3", "int4", "int8"))
    size = np.array([float(scheme.weights.bits) for _, scheme in of])
    table = mpq.CostTable.exact("memory", "bytes", of, size)
    budgets = [Budget("memory", 30 * 4.0)]
    found = random_allocations(of, {"memory": table}, budgets, 20, seed=3)
    assert len(set(found)) == 20
    problem = Problem(
        sensitivity=mpq.SensitivityTable(
            metric="none", cells=of, values=np.zeros(len(of)), stderr=np.zeros(len(of))
        ),
        costs={"memory": table},
        budgets=tuple(budgets),
    )
    assert all(problem.fits(allocation) for allocation in found)
    assert all(problem.total("memory", a.choice(of)) > 0.97 * 120 for a in found)
    of_unit = np.array([[scheme.weights.bits for scheme in a.values()] for a in found])
    assert (np.ptp(of_unit, axis=0) >= 2).all()  # no unit has the same bits in all of them
    assert found == random_allocations(of, {"memory": table}, budgets, 20, seed=3)
    assert found != random_allocations(of, {"memory": table}, budgets, 20, seed=4)


def test_where_nothing_is_to_choose_there_are_few_random_allocations() -> None:
    of = cells(1, ("int2", "int4"))
    found = random_allocations(of, {"memory": cost(of)}, [Budget("memory", 1.5)], 5, seed=0)
    assert len(found) == 1


# --- verdicts --------------------------------------------------------------------------------


def test_verdicts_are_recomputed_from_what_the_run_keeps(store: Store) -> None:
    report = compare(store)
    evaluations = [e for e in store.evaluations(report.run_id) if e.candidate != CHOSEN]
    assert len(evaluations) == report.num_measured
    measured = {e.allocation: e.mean for e in evaluations}
    assert len(measured) == report.num_measured  # none twice
    assert {v.metric for v in report.verdicts} >= {"gauss_newton", "kl"}
    assert report.picked == report.verdicts[0].metric
    assert [v.regret for v in report.verdicts] == sorted(v.regret for v in report.verdicts)
    for verdict in report.verdicts[-2:]:
        again = mpq.search(
            make_net(),
            make_images(3, 0),
            storage=store,
            metric=verdict.metric,
            schemes=SCHEMES,
            budgets=BUDGETS[:1],
            executor="serial",
            refine=0,
        )
        scores = again.problem.sensitivity
        regrets, rhos = [], []
        for number, (budgets, best) in enumerate(zip(report.budgets, report.best, strict=True)):
            problem = again.problem.with_budgets(budgets)
            fitting = [mean for a, mean in measured.items() if problem.fits(a)]
            assert best == min(fitting)
            own = mpq.solve(problem).allocation
            assert own is not None
            regrets.append(measured[own] / min(fitting) - 1)
            drawn = random_allocations(scores.cells, problem.costs, budgets, 12, number)
            predicted = [problem.score(a.choice(scores.cells)) for a in drawn]
            rhos.append(np.corrcoef(ranks(predicted), ranks([measured[a] for a in drawn]))[0, 1])
        assert verdict.regrets == pytest.approx(tuple(regrets))
        assert verdict.regret == pytest.approx(np.mean(regrets))
        assert verdict.spearman == pytest.approx(np.mean(rhos))
        assert verdict.ratio is not None
        assert verdict.seconds > 0
        assert verdict.peak_bytes is not None or sys.platform != "linux"


def test_nothing_is_measured_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import mpq.evaluate

    real, ran = mpq.evaluate.run_candidate, []

    def counting(bench: Any, work: Any) -> Any:
        candidate, number = work
        ran.append((candidate.name, number))
        return real(bench, work)

    monkeypatch.setattr("mpq.evaluate.run_candidate", counting)
    first = compare(store)
    assert len(ran) == len(set(ran))
    assert len({name for name, _ in ran}) == first.num_measured
    assert first.num_random > 15
    before = len(ran)
    second = compare(store)
    assert len(ran) == before
    assert second.verdicts == first.verdicts  # seconds and memory are those of the first time


def test_a_report_is_a_run_that_can_be_shown_and_solved(store: Store) -> None:
    report = compare(store, name="which")
    result = mpq.SearchResult(store, report.run_id)
    assert result.problem.sensitivity.metric == report.picked
    assert result.problem.with_budgets(report.budgets[0]).fits(result.unit_allocation)
    (chosen,) = [e for e in result.evaluation if e.candidate == CHOSEN]
    assert chosen.mean == report.best[0]
    assert result.solve(["memory <= 25%"]).allocation is not None
    lines = [e.message for e in store.events(report.run_id) if e.kind == "referee"]
    assert any(line.startswith("kl: regret") for line in lines)


class Refusing(Kl):
    """A metric for weights only."""

    name = "refusing"

    def tasks(self, load: Any) -> Any:
        refuse_activations(self.name, load)
        return super().tasks(load)


class Broken(Kl):
    """A metric whose tasks fail."""

    name = "broken"

    def run(self, load: Any, task: Task) -> Any:
        raise ZeroDivisionError("by zero")


@pytest.fixture
def _failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "refusing", Refusing)
    monkeypatch.setitem(METRICS, "broken", Broken)


INPUTS_TOO = {"schemes": ["int3", "int8:int8"], "budgets": ["memory <= 50%"]}


@pytest.mark.usefixtures("_failing")
def test_what_cannot_be_scored_is_listed_with_its_reason(store: Store) -> None:
    report = compare(store, metrics=["refusing", "broken", "kl"], **INPUTS_TOO)
    assert [v.metric for v in report.verdicts] == ["kl"]
    assert "refusing scores weights only" in report.refused["refusing"]
    assert "by zero" in report.refused["broken"]


@pytest.mark.usefixtures("_failing")
def test_without_any_metric_the_first_reason_is_raised(store: Store) -> None:
    with pytest.raises(mpq.InvalidInputError, match="scores weights only"):
        compare(store, metrics=["refusing", "broken"], **INPUTS_TOO)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["kll"]}, "unknown metric 'kll': did you mean 'kl'"),
        ({"metrics": []}, r"metrics is a list, got \[\]"),
        ({"metrics": "kl"}, "metrics is a list, got 'kl': write"),
        ({"budgets": []}, "budgets is a list"),
        ({"budgets": "memory <= 40%"}, "budgets is a list, got 'memory <= 40%'"),
        ({"budgets": ["memory <= 40%", "bops <= 20%"]}, "'memory <= 40%' does, but not"),
        ({"budgets": ["memory <= 40%", []]}, r"each of budgets is a text such as .*, got \[\]"),
        ({"allocations": 4}, "a whole number from 5 on, got 4"),
        ({"seconds": 0}, "a positive number of seconds, got 0"),
        ({"seconds": math.nan}, "a positive number of seconds, got nan"),
        ({"seconds": "a"}, "a positive number of seconds, got 'a'"),
        ({"seconds": None}, "a positive number of seconds, got None"),
        ({"metrics": ["kl", ""]}, r"each of metrics is a name, got \['kl', ''\]"),
        ({"metrics": ["kl", 3]}, r"each of metrics is a name, got \['kl', 3\]"),
        ({"metrics": 3}, "metrics is a list, got 3: write"),
        ({"budgets": 3}, "budgets is a list, got 3: write"),
        ({"budgets": [3]}, "each of budgets is a text such as .*, got 3"),
        ({"budgets": [[]]}, r"each of budgets is a text such as .*, got \[\]"),
        ({"budgets": [[3]]}, "a budget is a text such as .*, got 3"),
        ({"metric": "kl"}, "compare_metrics makes no use of 'metric'"),
        ({"clipp": "mse"}, "compare_metrics: unknown job key 'clipp': did you mean 'clip'"),
    ],
)
def test_bad_input_is_one_line(store: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(mpq.InvalidInputError, match=message) as caught:
        compare(store, **options)
    assert "\n" not in str(caught.value)


def test_a_budget_that_nothing_meets_is_told(store: Store) -> None:
    with pytest.raises(mpq.InfeasibleError, match="no allocation fits"):
        compare(store, budgets=["memory <= uniform int3", "memory <= 1%"])


# --- made-up metrics -------------------------------------------------------------------------


class Changed(Kl):
    """`kl` with its values changed by a function of (values, unit numbers)."""

    def __init__(self, name: str, change: Any) -> None:
        self.name = name
        self.change = change

    def combine(self, of: Any, partials: Any) -> Scores:
        found = super().combine(of, partials)
        units = np.repeat(np.arange(len(of.units)), np.diff(of.offsets))
        values = self.change(found.sensitivity.values, units)
        table = mpq.SensitivityTable(
            metric=self.name, cells=of, values=values, stderr=np.zeros(len(values))
        )
        return Scores(sensitivity=table)


def offer(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    for name, change in changes.items():
        monkeypatch.setitem(METRICS, name, lambda name=name, change=change: Changed(name, change))


def test_a_metric_that_is_upside_down_is_found_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, upside_down=lambda values, units: -values, larger=lambda v, u: 1e6 * v)
    report = compare(store, metrics=["upside_down", "larger", "kl"])
    of = {verdict.metric: verdict for verdict in report.verdicts}
    assert of["upside_down"].spearman == pytest.approx(-(of["kl"].spearman or 0))
    assert (of["upside_down"].kendall or 0) < 0
    assert of["upside_down"].regret > of["kl"].regret
    assert of["larger"].regrets == of["kl"].regrets
    assert of["larger"].ratio is None  # nobody said that it is a divergence
    assert report.picked != "upside_down"


def test_two_metrics_that_each_see_half_are_better_together(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        return np.where(hidden, 1e-6 * values, values)

    offer(
        monkeypatch,
        first_half=lambda v, u: blind(v, u >= 2),
        second_half=lambda v, u: 1e3 * blind(v, u < 2),
    )
    report = compare(store, metrics=["first_half", "second_half"])
    assert report.picked == "first_half + second_half" or report.picked == (
        "second_half + first_half"
    )
    blend, *halves = report.verdicts
    assert all(blend.regret < half.regret for half in halves)
    assert blend.seconds == pytest.approx(sum(half.seconds for half in halves))
    assert mpq.SearchResult(store, report.run_id).problem.sensitivity.metric == report.picked


class Slow(Kl):
    """A metric whose hundred tasks take a fifth of a second each."""

    name = "slow"
    ran = 0

    def tasks(self, load: Any) -> list[Task]:
        return [Task(f"slow {number}", (0,)) for number in range(100)]

    def run(self, load: Any, task: Task) -> Any:
        Slow.ran += 1
        time.sleep(0.2)
        return super().run(load, task)


def test_what_would_take_too_long_is_left_out_after_one_task(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "slow", Slow)
    Slow.ran = 0
    report = compare(store, metrics=["gauss_newton", "slow"], seconds=10.0)
    assert [v.metric for v in report.verdicts] == ["gauss_newton"]
    assert report.refused["slow"].startswith("would take about ")
    assert Slow.ran == 1


def test_stored_predictions_are_what_was_solved_where_scores_are_negative(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, kl=lambda values, units: np.where(units == 0, -values, values))
    report = compare(store, metrics=["kl"])
    result = mpq.SearchResult(store, report.run_id)
    assert (store.sensitivity(report.run_id).values < 0).any()
    for e in result.evaluation:
        assert e.allocation is not None
        choice = e.allocation.choice(result.problem.cells)
        assert e.predicted == pytest.approx(result.problem.score(choice))


class Squares:
    """A loss that is an object, whose key is another at each call."""

    def __call__(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        return output.square().mean()


def test_time_is_known_where_the_loss_has_no_fixed_key(store: Store) -> None:
    report = compare(store, metrics=["kl", "taylor"], loss=Squares())
    assert {v.metric for v in report.verdicts} >= {"kl", "taylor"}
    assert all(v.seconds > 0 for v in report.verdicts)


def test_what_only_a_search_does_is_ignored_and_told(store: Store) -> None:
    spec = parse_job(
        {
            "model": "tests.test_pipeline:make_net",
            "calibration": "tests.test_referee:batches",
            "held_out": "tests.test_referee:no_such_function",
            "quality": {"fidelity": "kl"},
            "limits": ["fidelity >= 1e9"],
            "budgets": BUDGETS[:1],
            "schemes": SCHEMES,
            "executor": "serial",
        }
    )
    report = compare_job(spec, metrics=["kl"], allocations=5, storage=store)
    (line,) = [e.message for e in store.events(report.run_id) if e.kind == "ignored"]
    assert line == "the job's held_out, quality, limits: not for comparing metrics"
    kept = store.run(report.run_id).spec
    assert (kept.held_out, kept.quality, kept.limits) == (None, {}, ())


def test_why_there_is_no_rank_correlation_is_told(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    report = compare(store, metrics=["kl"], budgets=["memory <= uniform int2"])
    assert report.verdicts[0].spearman is None
    print_referee(report)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "no rank correlation" in x]
    assert "leave 1 different random allocations, 5 at one of them are needed" in line


# --- metric "auto" ---------------------------------------------------------------------------


def auto_search(store: Store, **options: Any) -> mpq.SearchResult:
    settings: dict[str, Any] = {
        "budgets": BUDGETS[:1],
        "schemes": SCHEMES,
        "executor": "serial",
        "metric": "auto",
    }
    return mpq.search(make_net(), make_images(3, 0), storage=store, **(settings | options))


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in known_metrics():
        if name not in names:
            monkeypatch.delitem(METRICS, name)


def test_auto_keeps_the_scores_of_the_metric_that_measured_best(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "gauss_newton", "kl")
    offer(monkeypatch, upside_down=lambda values, units: -values)
    result = auto_search(store)
    calibration = {e.candidate: e for e in result.evaluation if e.split == "calibration"}
    optima = {
        name: calibration[f"optimum of {name}"].mean
        for name in ("gauss_newton", "kl", "upside_down")
    }
    picked = result.problem.sensitivity.metric
    assert optima[picked] == min(optima.values())
    assert optima["upside_down"] > optima[picked]
    assert calibration[CHOSEN].mean <= min(optima.values())
    assert result.problem.responses is not None  # pairs of layers are still tried
    alone = auto_search(store, metric="gauss_newton", refine=0)
    (best_alone,) = [
        e.mean for e in alone.evaluation if e.candidate == CHOSEN and e.split == "calibration"
    ]
    assert calibration[CHOSEN].mean <= best_alone


def test_auto_out_of_time_still_scores_its_first_metric(store: Store) -> None:
    result = auto_search(store, metric_seconds=1e-6, refine=0)
    assert result.problem.sensitivity.metric == "gauss_newton"
    lines = [e.message for e in store.events(result.run_id) if e.kind == "metric"]
    assert lines[0].startswith("picked gauss_newton")
    assert sum("left out" in line for line in lines) == len(METRICS) - 1


@pytest.mark.usefixtures("_failing")
def test_auto_takes_what_it_can_score(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "gauss_newton", "refusing")
    result = auto_search(store, refine=0, **INPUTS_TOO)
    assert result.problem.sensitivity.metric == "gauss_newton"
    assert any(
        e.message.startswith("refusing left out: refusing scores weights only")
        for e in store.events(result.run_id)
    )


# --- the command line ------------------------------------------------------------------------


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int | None, str, str]:
    monkeypatch.setattr(sys, "argv", ["mpq", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPQ_STORAGE", str(tmp_path / "runs.db"))
    job = tmp_path / "job.toml"
    job.write_text(
        'model = "tests.test_pipeline:make_net"\ncalibration = "tests.test_referee:batches"\n'
        f'executor = "serial"\nbudgets = {BUDGETS[:1]}\nschemes = {SCHEMES}\n'
    )
    run = partial(command, monkeypatch, capsys)
    code, out, err = run("referee", str(job), "--metrics", "gauss_newton, kl", "--json")
    assert code == 0
    view = json.loads(out)
    assert {v["metric"] for v in view["verdicts"]} >= {"gauss_newton", "kl"}
    assert len(view["budgets"]) == len(view["best"]) == 4  # the job's, and three around it
    assert f"run {view['run_id']} is stored" in err
    code, out, err = run("referee", str(job), "--metrics", "gauss_newton,kl", "--seconds", "20")
    for text in ("Spearman", "Kendall", "mean regret", "picked: ", "memory <= uniform int3"):
        assert text in out
    code, out, err = run("show", view["run_id"])
    assert code == 0
    assert "uniform int3" in out
    assert "random 1" not in out
    code, out, err = run("referee", str(job), "--metrics", "kll")
    assert (code, out) == (2, "")
    assert "did you mean 'kl'" in err


def batches() -> list[torch.Tensor]:
    return make_images(3, 0)


def test_the_network_stays_as_it_was(store: Store) -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    mpq.compare_metrics(
        net,
        make_images(2, 0),
        budgets=BUDGETS,
        schemes=SCHEMES,
        storage=store,
        executor="serial",
        metrics=["gauss_newton", "kl"],
    )
    assert isinstance(net, nn.Module)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
