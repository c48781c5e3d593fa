"""What the product shows on real models; slow, and each a line of the README."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import mpq
from benchmarks.sections.sketch import compare
from examples import digits_diffusion, digits_vit
from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.jobfile import load_job
from mpq.searching import run_job

EXAMPLES = ["digits_diffusion", "digits_resnet20", "digits_vit", "minilm"]
SCHEMES = ["int2", "int3", "int4", "int5", "int6", "int7", "int8"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_job_of_an_example_is_a_job(name: str) -> None:
    spec = load_job(Path("examples") / f"{name}.toml")
    assert spec.name == name
    example = importlib.import_module(f"examples.{name}")
    for entry in (spec.model, spec.calibration, spec.held_out, spec.evaluate):
        assert entry is not None
        assert callable(getattr(example, entry.partition(":")[2]))


def test_the_denoiser_denoises_and_its_batches_are_of_many_timesteps() -> None:
    assert digits_diffusion.evaluate(digits_diffusion.make_model())["noise error"] < 0.17
    found = digits_diffusion.chosen_batches("calibration")
    assert list(found.counts.values()) == [6] * 10
    assert found.timesteps == tuple(range(199, 0, -20))


def test_the_job_with_profiles_is_a_job() -> None:
    spec = load_job(Path("examples") / "minilm_profiles.toml")
    assert spec.profiles == {
        "query": mpq.Profile(tokens=16, weight=20.0),
        "passage": mpq.Profile(tokens=128),
    }
    assert {text.partition(" ")[0] for text in spec.budgets} == {"memory", *spec.profiles}


def test_the_job_for_the_least_memory_is_a_job() -> None:
    spec = load_job(Path("examples") / "digits_vit_least.toml")
    assert (spec.minimise, spec.budgets, spec.limits) == ("memory", (), ("accuracy drop <= 1%",))
    assert spec.evaluate == "examples.digits_vit:evaluate_both"
    found = digits_vit.evaluate_both(digits_vit.make_model())
    assert found["accuracy"] > found["test accuracy"] > 0.96  # as trained


def held_out(name: str, uniform: str, folder: Path, **options: object) -> list[Evaluation]:
    """Return the chosen mix at the bytes of a uniform scheme, and that scheme, on new data."""
    with mpq.open_store(str(folder / "runs.db")) as store:
        result = mpq.search(
            f"examples.{name}:make_model",
            f"examples.{name}:calibration_batches",
            held_out=f"examples.{name}:held_out_batches",
            budgets=[f"memory <= uniform {uniform}"],
            schemes=SCHEMES,
            groups="none",
            executor="serial",
            storage=store,
            **options,  # type: ignore[arg-type]
        )
        found = {e.candidate: e for e in result.evaluation if e.split == "held_out"}
        memory = result.problem.costs["memory"]
        limit = result.solution.budgets[0].limit
        assert limit == memory.fixed + sum(
            memory[unit, mpq.parse_scheme(uniform)] for unit in memory.cells.units
        )
    return [found[CHOSEN], found[f"uniform {uniform}"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_resnet20", "digits_vit"])
def test_at_three_bits_the_mix_halves_the_divergence_on_new_data(name: str, tmp_path: Path) -> None:
    chosen, uniform = held_out(name, "int3", tmp_path)
    assert chosen.divergence == "kl"
    assert chosen.mean <= 0.5 * uniform.mean


@pytest.mark.slow
def test_a_percent_of_accuracy_takes_a_tenth_off_the_memory_of_the_best_uniform_scheme(
    tmp_path: Path,
) -> None:
    spec = load_job(Path("examples") / "digits_vit_least.toml", {"executor": "serial", "refine": 1})
    with mpq.open_store(str(tmp_path / "runs.db")) as store:
        result = run_job(spec, store)
        found = {e.candidate: e for e in result.evaluation if e.split == "calibration"}
        least = 0.99 * found["unquantized"].metrics["accuracy"]
        met = {name: e for name, e in found.items() if e.metrics["accuracy"] >= least}
        memory = {
            name: result.problem.total("memory", e.allocation.choice(result.problem.cells))
            for name, e in met.items()
            if e.allocation
        }
        uniform = min(m for name, m in memory.items() if name.startswith("uniform "))
    assert memory[CHOSEN] == min(memory.values()) <= 0.9 * uniform


@pytest.mark.slow
def test_minilm_at_four_bits_gains_a_hundredth_of_cosine_on_new_data(tmp_path: Path) -> None:
    chosen, uniform = held_out("minilm", "int4", tmp_path, refine=0)
    assert chosen.divergence == "cosine"
    assert (1 - chosen.mean) >= (1 - uniform.mean) + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_resnet20", "digits_vit"])
def test_the_sketch_agrees_with_measuring_every_cell_in_a_fraction_of_its_time(name: str) -> None:
    row = compare(name, num_batches=2)
    assert row["spearman"] >= 0.95
    assert row["ratio"] >= 7  # ten and more where nothing else runs: benchmarks/sections/sketch.py
