"""Weights made of calibration data: searched, resumed, applied and read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpq
import mpq.making
from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import CHOSEN
from mpq.core.formats import parse_format
from mpq.export.packed import read_packed, write_packed
from mpq.nn.batches import call
from mpq.nn.divergence import OutputDivergence
from mpq.nn.quantizers import FAMILIES
from mpq.nn.shipping import ship
from mpq.progress import Silent
from mpq.result import SearchResult
from mpq.store.store import Store, open_store
from tests.builders import Decoder, tokens, workload

SCHEMES = ["int3", "int3@gptq", "int4@gptq"]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def batches(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=generator)
    return [torch.randn(16, 12, generator=generator) @ mixing for _ in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def search(store: Store, **options: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "budgets": ["memory <= uniform int4@gptq"],
        "schemes": SCHEMES,
        "held_out": batches(2, 1),
        "executor": "serial",
    }
    return mpq.search(network(), batches(3, 0), storage=store, **(settings | options))


@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_a_search_over_roundings_ends_with_what_it_measured(
    store: Store, clip: str, tmp_path: Path
) -> None:
    result = search(store, clip=clip, budgets=["memory <= 15%"], schemes=["int2@gptq", "int4@gptq"])
    assert {str(s) for s in result.allocation.values()} <= {"int2@gptq", "int4@gptq"}
    (chosen,) = [e for e in result.evaluation if e.candidate == CHOSEN and e.split == "held_out"]
    divergence, model, found = OutputDivergence("kl"), network().eval(), []
    for batch in batches(2, 1):
        with torch.no_grad():
            original = call(model, batch)
            with result.apply(model):
                found.append(divergence.between(original, call(model, batch)))
    assert float(torch.cat(found).mean()) == pytest.approx(chosen.mean, rel=1e-6)
    assert chosen.measured_bytes == chosen.predicted_bytes
    path = tmp_path / "packed.safetensors"
    write_packed(path, model, result.graph, result.unit_allocation, result.quantizer)
    back = read_packed(path, result.graph)
    with result.apply(model):
        for name, weight in model.named_parameters():
            assert torch.equal(back[name], weight)


def test_gptq_measures_better_than_nearest(store: Store) -> None:
    result = search(store)
    uniform = {e.candidate: e.mean for e in result.evaluation if e.split == "calibration"}
    assert uniform["uniform int3@gptq"] < uniform["uniform int3"]


def test_the_best_uniform_scheme_is_kept_with_the_run(store: Store) -> None:
    result = search(
        store, budgets=["memory <= uniform int3@gptq"], schemes=["int2@gptq", "int3@gptq"]
    )
    formats = {fmt for _, fmt in result.quantizer.made}
    assert parse_format("int3@gptq") in formats
    for layer in result.graph.layers:
        assert (layer.weight_id, parse_format("int3@gptq")) in result.quantizer.made


def test_an_interrupted_search_goes_on_with_the_same_weights(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    real = mpq.making.make_ahead

    def remembered(*args: Any) -> None:
        real(*args)
        kept.append({k: dict(v) for k, v in args[0].quantizer.made.items()})

    monkeypatch.setattr("mpq.prepare.make_ahead", remembered)
    with monkeypatch.context() as broken:
        broken.setattr("mpq.pipeline.choose", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            search(store)
    asked = []
    original = store.put_partial
    monkeypatch.setattr(
        store, "put_partial", lambda key, *rest: (asked.append(key), original(key, *rest))
    )
    result = search(store)
    first, second = kept
    assert first.keys() == second.keys()
    assert first
    for key, arrays in first.items():
        assert all(torch.equal(array, second[key][part]) for part, array in arrays.items())
    again = len(asked)
    other = search(store)
    assert len(asked) == again  # scores and measurements were there
    assert other.allocation == result.allocation


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_scores_depend_on_all_batches_only_where_weights_are_made(store: Store) -> None:
    from mpq.core.formats import parse_scheme
    from mpq.core.jobs import JobSpec
    from mpq.intake import graph_of, load, make_workload

    def key(texts: list[str], data: list[torch.Tensor]) -> str:
        spec = JobSpec(model="<live>", calibration="<live>", budgets=("memory <= 50%",))
        given = load(network(), data)
        schemes = [parse_scheme(text) for text in texts]
        return make_workload(spec, given, graph_of(spec, given), lambda _: schemes).key

    few, more = batches(3, 0)[:2], batches(3, 0)
    assert key(["int3", "int4"], few) == key(["int3", "int4"], more)
    assert key(["int3", "int3@gptq"], few) != key(["int3", "int3@gptq"], more)
    assert key(["int3", "int3@gptq"], more) == key(["int3", "int3@gptq"], more)


def test_made_weights_travel_to_other_processes() -> None:
    of = workload(network(), batches(2, 0), tuple(SCHEMES))
    mpq.making.make_ahead(of, Silent())
    assert len(of.quantizer.made) == 6
    arrived = ship(of).unpack()
    name, fmt = next(iter(of.quantizer.made))
    weight = dict(of.model.named_parameters())[name].detach()
    expected = of.quantizer.fake_quantize(name, weight, fmt)
    assert torch.equal(arrived.quantizer.fake_quantize(name, weight, fmt), expected)


@pytest.mark.slow
def test_workers_of_a_cluster_find_the_same(store: Store) -> None:
    serial = search(store)
    with open_store("sqlite://") as other:
        ray = search(other, executor="ray", num_workers=1)
        assert ray.allocation == serial.allocation


def test_deploying_takes_the_kept_weights(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = search(store, schemes=["int8@gptq:int8", "int8:int8"], budgets=["memory <= 60%"])
    deployment = result.deploy(
        "onnxruntime",
        tmp_path / "model.onnx",
        model=network(),
        calibration=batches(3, 0),
        seconds=0.05,
    )
    assert deployment.unexplained < 1e-3


@pytest.mark.parametrize(
    ("model", "batch", "scheme", "text"),
    [
        ("decoder", "tokens", "int4@gptq", "embedding 'embed' reads indices"),
        ("mlp", "rows", "fp4_e2m1@adaround", "adaround rounds integers"),
        ("mlp", "rows", "int1@flexround", "flexround rounds integers"),
        ("mlp", "rows", "kmeans4@gptq", "gptq rounds weights on one grid"),
    ],
)
def test_what_cannot_be_rounded_is_refused_by_name_before_any_work(
    store: Store, model: str, batch: str, scheme: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq.pipeline.prepare", _interrupt)
    if parse_format(scheme).family not in FAMILIES and scheme.endswith("gptq"):
        pytest.skip("no such family")
    nets = {"decoder": Decoder, "mlp": network}
    data = {"tokens": [tokens()], "rows": batches(1, 0)}[batch]
    with pytest.raises(InvalidInputError, match=text) as error:
        mpq.search(
            nets[model](),
            data,
            budgets=["memory <= 50%"],
            schemes=[scheme, "int8"],
            embeddings=True,
            storage=store,
            executor="serial",
        )
    plain = scheme.partition("@")[0]
    assert error.value.code == "rounding"
    assert f"use '{plain}' there" in str(error.value)


def test_convolutions_and_depthwise_ones_are_rounded() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.Flatten(2)
    net = nn.Sequential(*layers, nn.Conv1d(8, 3, 2), nn.Flatten())
    of = workload(net, [torch.randn(4, 2, 6, 6)], ("int3@gptq", "int3@adaround"))
    mpq.making.make_ahead(of, Silent())
    assert len(of.quantizer.made) == 2 * len(of.graph.layers) == 6


def test_a_rounding_that_was_not_made_is_told() -> None:
    of = workload(network(), batches(1, 0), ("int3@gptq",))
    with pytest.raises(InvalidInputError, match="was not rounded ahead"):
        of.quantizer.fake_quantize("0.weight", torch.randn(3, 3), parse_format("int3@gptq"))
