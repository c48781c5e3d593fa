"""Transforms and observers asked for in a job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mpq
from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.jobs import JobSpec
from mpq.dry_run import dry_run
from mpq.nn.divergence import OutputDivergence
from mpq.nn.transforms import reports_of
from mpq.store.store import Store, open_store
from tests.transformed_networks import make, samples


def make_vit() -> torch.nn.Module:
    return make("vit")


def make_samples() -> list[torch.Tensor]:
    return samples(2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


SETTINGS: dict[str, Any] = {
    "budgets": ("memory <= 60%",),
    "schemes": ("int8:int8static", "int4:int6static"),
    "executor": "serial",
    "refine": 0,
    "divergence": "mse",
}


def search(store: Store, **options: Any) -> mpq.SearchResult:
    return mpq.search(make_vit(), make_samples(), storage=store, **(SETTINGS | options))


def chosen_mean(result: mpq.SearchResult) -> float:
    (found,) = [e for e in result.evaluation if (e.candidate, e.split) == ("chosen", "calibration")]
    return found.mean


@pytest.mark.parametrize("transforms", [("smooth",), ("shift(0.4)", "repq(4)")])
def test_a_job_searches_the_prepared_network(
    store: Store, tmp_path: Path, transforms: tuple[str, ...]
) -> None:
    plain, result = search(store), search(store, transforms=transforms)
    assert (plain.problem.sensitivity.values != result.problem.sensitivity.values).any()
    model = make_vit()
    with (
        pytest.raises(InvalidInputError, match=r"give mpq\.prepared") as error,
        result.apply(model),
    ):
        pass
    assert error.value.code == "transforms"
    network = mpq.prepared(model, make_samples(), transforms)
    divergence = OutputDivergence("mse")
    found = []
    with torch.no_grad():
        for batch in make_samples():
            before = network(batch)
            with result.apply(network):
                found.append(divergence.between(before, network(batch), None))
    assert float(torch.cat(found).mean()) == pytest.approx(chosen_mean(result), rel=1e-4)
    notes = "\n".join(store.notes(result.run_id))
    assert all(f"{text.partition('(')[0]}(" in notes for text in transforms)
    with pytest.warns(MpqWarning, match="transforms .* of the run are not in it"):
        result.export("mpq", tmp_path / "mix.json")


def test_an_observer_changes_ranges_and_scores(store: Store) -> None:
    plain = search(store)
    for observer in ("mse", "percentile(99)", "kl"):
        result = search(store, observer=observer)
        own, found = plain.graph.input_ranges, result.graph.input_ranges
        assert own.keys() == found.keys()
        assert own != found
        for name, (low, high) in found.items():
            assert own[name][0] <= low <= 0 <= high <= own[name][1]
        assert (plain.problem.sensitivity.values != result.problem.sensitivity.values).any()
        assert result.chosen.provenance["observer"] == observer


def test_the_usual_pipeline_is_served_from_the_same_scores(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sensitivity.gauss_newton import GaussNewton

    first = search(store)

    def never(*_: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(GaussNewton, "run", never)
    second = search(store, transforms=(), observer="minmax", corrections=())
    assert first.allocation == second.allocation
    assert "observer" not in second.chosen.provenance


def test_a_job_of_entry_points_is_prepared_in_place(store: Store) -> None:
    spec = JobSpec(
        model="tests.test_calibration_pipeline:make_vit",
        calibration="tests.test_calibration_pipeline:make_samples",
        transforms=("smooth",),
        corrections=("bias",),
        **SETTINGS,
    )
    result = mpq.run_job(spec, store)
    network = mpq.prepared(spec.model, spec.calibration, spec.transforms)
    assert [report.transform for report in reports_of(network)] == ["smooth(0.5)"]
    batch = make_samples()[0]
    with torch.no_grad(), result.apply(network) as applied:  # calibration is the job's
        assert not torch.equal(applied(batch), make_vit()(batch))
    assert dry_run(spec, store).layers == len(result.graph.layers)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"transforms": "smooth"}, "transforms"),
        ({"transforms": ("smoth",)}, "unknown_transform"),
        ({"observer": "kll"}, "unknown_observer"),
        ({"observer": "percentile(3)"}, "observer"),
    ],
)
def test_wrong_names_are_refused(store: Store, options: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        search(store, **options)
    assert error.value.code == code
