"""The stopwatch on a machine whose true speed, drift and noise are known."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from hw_cost_models.measured.alone import measuring_alone
from hw_cost_models.measured.protocol import LEAST_ROUNDS, Op, Stopwatch
from mpq.core.errors import InvalidInputError
from mpq.core.latency import KernelCase, KernelLatency

DURATIONS_S = {"slow": 3e-3, "middle": 1e-3, "fast": 2e-4}


class FakeMachine:
    """A clock that kernels move: duration * slowness(now) * lognormal noise."""

    def __init__(
        self, seed: int, noise: float = 0.0, slowness: Callable[[float], float] = lambda s: 1.0
    ) -> None:
        self.now_s = 0.0
        self.runs: list[str] = []
        self._rng = np.random.default_rng(seed)
        self._noise, self._slowness = noise, slowness

    def clock(self) -> int:
        return round(self.now_s * 1e9)

    def op(self, name: str, seconds: float, runs: int = 1) -> Op:
        def run() -> None:
            self.runs.append(name)
            noise = math.exp(self._noise * self._rng.standard_normal())
            self.now_s += seconds * runs * self._slowness(self.now_s) * noise

        return Op(KernelCase("fake", name, "shape"), run, runs)

    def measure(self, **settings: object) -> dict[str, KernelLatency]:
        watch = Stopwatch(clock=self.clock, **settings)  # type: ignore[arg-type]
        ops = [self.op(name, seconds) for name, seconds in DURATIONS_S.items()]
        found = watch.measure(ops, self.op("reference", 5e-4), "fake device")
        return {latency.case.kernel: latency for latency in found}


def half_width(latency: KernelLatency) -> float:
    return math.log(latency.high_s / latency.low_s) / 2


def test_a_quiet_machine_is_measured_exactly_and_soon() -> None:
    machine = FakeMachine(0)
    found = machine.measure(budget_s=2.0)
    for name, seconds in DURATIONS_S.items():
        assert found[name].median_s == pytest.approx(seconds, rel=1e-5)
        assert found[name].low_s < seconds < found[name].high_s
        assert not found[name].noisy
        assert found[name].device == "fake device"
    assert 0.5 <= machine.now_s < 0.9  # a quarter of the budget, plus the warm-up


def test_a_run_of_several_kernels_counts_each() -> None:
    machine = FakeMachine(0)
    watch = Stopwatch(clock=machine.clock, budget_s=0.1)
    (found,) = watch.measure([machine.op("x", 1e-3, runs=4)], machine.op("r", 1e-3), "d")
    assert found.median_s == pytest.approx(1e-3, rel=1e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Independent noise only, no allowance for drift: 95 % of 200 seeds, and not by being wide."""
    covered, errors, halves = [], [], []
    for seed in range(200):
        found = FakeMachine(seed, noise=0.08).measure(
            inner=0, budget_s=0.25, min_rounds=36, drift_sd=0.0, target=1e-9, seed=seed
        )
        for name, seconds in DURATIONS_S.items():
            errors.append(math.log(found[name].median_s / seconds))
            halves.append(half_width(found[name]))
            covered.append(abs(errors[-1]) <= halves[-1])
    standard_error = math.sqrt(0.95 * 0.05 / 200)
    assert np.mean(covered) >= 0.95 - 3 * standard_error
    # Twice the ideal width is the price of looking for drift that is not there.
    assert np.median(halves) <= 2 * 1.96 * np.std(errors)


def wandering(seed: int, sd: float, correlation_s: float) -> Callable[[float], float]:
    """An Ornstein-Uhlenbeck speed, sampled on a grid: as slow as the measurement is long."""
    rng = np.random.default_rng(10_000 + seed)
    step_s = correlation_s / 50
    keep = math.exp(-step_s / correlation_s)
    levels = [sd * rng.standard_normal()]

    def slowness(now_s: float) -> float:
        while len(levels) <= now_s / step_s:
            levels.append(keep * levels[-1] + sd * math.sqrt(1 - keep**2) * rng.standard_normal())
        return math.exp(levels[int(now_s / step_s)])

    return slowness


@pytest.mark.parametrize(("sd", "correlation_s"), [(0.01, 2.0), (0.03, 0.3), (0.05, 0.05)])
def test_two_measurements_agree_though_the_machine_drifts(sd: float, correlation_s: float) -> None:
    agreed = []
    for seed in range(40):
        pair = [
            FakeMachine(s, noise=0.05, slowness=wandering(s, sd, correlation_s)).measure(
                budget_s=1.0, seed=s
            )
            for s in (seed, seed + 1000)
        ]
        for name in DURATIONS_S:
            a, b = (found[name] for found in pair)
            apart = abs(math.log(a.median_s / b.median_s))
            agreed.append(apart <= math.hypot(half_width(a), half_width(b)))
    assert np.mean(agreed) >= 0.9


def test_kernels_stay_comparable_when_the_speed_jumps_in_the_middle() -> None:
    machine = FakeMachine(3, noise=0.02, slowness=lambda s: 1.0 if s < 0.9 else 1.3)
    found = machine.measure(budget_s=2.0)
    for name, seconds in DURATIONS_S.items():
        ratio = found[name].median_s / found["slow"].median_s
        assert ratio == pytest.approx(seconds / DURATIONS_S["slow"], rel=0.01)


def test_kernels_that_wait_for_memory_get_wider_intervals() -> None:
    machine = FakeMachine(0)
    watch = Stopwatch(clock=machine.clock, budget_s=0.1, drift_sd=0.01, memory_drift_sd=0.05)
    ops = [
        Op(KernelCase("fake", str(share), ""), machine.op("x", 1e-3).run, read_s=share * 1e-3)
        for share in (0.0, 0.5, 3.0)
    ]
    found = watch.measure(ops, machine.op("r", 1e-3), "d")
    expected = [1.96 * math.hypot(0.01, 0.05 * share) for share in (0.0, 0.5, 1.0)]
    assert [half_width(latency) for latency in found] == pytest.approx(expected, rel=1e-3)
    assert [latency.noisy for latency in found] == [False, True, True]


def test_a_noisy_machine_uses_the_whole_budget_and_is_marked() -> None:
    machine = FakeMachine(1, noise=0.6)
    found = machine.measure(budget_s=1.0, inner=0)
    assert all(latency.noisy for latency in found.values())
    assert 1.0 <= machine.now_s < 1.1
    assert all(half_width(latency) > 0.03 for latency in found.values())


def test_a_disturbance_that_only_adds_is_left_out_by_the_fastest_of_several_runs() -> None:
    rng = np.random.default_rng(5)
    machine = FakeMachine(5, slowness=lambda s: 3.0 if rng.random() < 0.2 else 1.0)
    found = machine.measure(budget_s=1.0)
    for name, seconds in DURATIONS_S.items():
        assert found[name].median_s == pytest.approx(seconds, rel=0.01)


def test_kernels_longer_than_the_budget_still_get_the_least_rounds() -> None:
    machine = FakeMachine(2, noise=0.01)
    watch = Stopwatch(clock=machine.clock, budget_s=1.0, inner=0)
    (found,) = watch.measure([machine.op("huge", 5.0)], machine.op("r", 1e-3), "d")
    assert found.rounds == LEAST_ROUNDS
    assert found.low_s < 5.0 < found.high_s


def test_rounds_interleave_all_kernels_with_the_reference_on_both_sides() -> None:
    machine = FakeMachine(0)
    machine.measure(budget_s=0.2, inner=0)
    rounds = machine.runs[2 * 4 :]  # after the warm-up
    per_round = [rounds[i : i + 5] for i in range(0, len(rounds), 5)]
    assert all(r[0] == r[-1] == "reference" and set(r[1:-1]) == set(DURATIONS_S) for r in per_round)
    assert len({tuple(r) for r in per_round}) > 1  # in changing order


def test_the_same_seed_on_the_same_machine_gives_the_same_table() -> None:
    first, second = (FakeMachine(9, noise=0.1).measure(budget_s=0.5, seed=4) for _ in range(2))
    assert first == second


def test_progress_grows_to_one() -> None:
    seen: list[float] = []
    machine = FakeMachine(0)
    watch = Stopwatch(clock=machine.clock, budget_s=0.5)
    watch.measure([machine.op("x", 1e-3)], machine.op("r", 1e-3), "d", seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert watch.measure([], machine.op("r", 1e-3), "d") == []


def test_garbage_collection_comes_back_after_an_error() -> None:
    state: list[bool] = []

    def failing() -> None:
        state.append(gc.isenabled())
        if len(state) > 20:
            raise RuntimeError("kernel broke")

    op = Op(KernelCase("fake", "broken", "shape"), failing)
    with pytest.raises(RuntimeError, match="kernel broke"):
        Stopwatch(budget_s=1.0).measure([op], FakeMachine(0).op("r", 1e-3), "d")
    assert state[-1] is False
    assert gc.isenabled()


@pytest.mark.parametrize("settings", [{"inner": -1}, {"budget_s": 0.0}, {"target": -1.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="inner >= 0"):
        Stopwatch(**settings)  # type: ignore[arg-type]


_HOLD = """
import sys, time
from hw_cost_models.measured.alone import measuring_alone
with measuring_alone():
    print("held", flush=True)
    sys.stdin.readline()
    print(time.time(), flush=True)
"""


def test_measurements_of_several_processes_wait_for_each_other() -> None:
    """One that ends without letting go, as a killed process does, holds nobody up."""
    command = [sys.executable, "-c", _HOLD]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        threading.Timer(0.2, lambda: (other.stdin.write("\n"), other.stdin.flush())).start()
        with measuring_alone():
            now = time.time()
        assert now >= float(other.stdout.readline())
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.kill()
        with measuring_alone():
            pass
