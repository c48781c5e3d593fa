"""Every registered metric on every unusual network: scored by the rules, or refused clearly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.protocols import Scores
from mpq.core.tables import Cells
from mpq.nn.batches import Batch, cut, num_samples
from mpq.nn.divergence import OutputDivergence
from mpq.nn.fingerprint import batches_digest, model_digest
from mpq.nn.graph import build_graph
from mpq.nn.workload import Workload
from sensitivity import METRICS, get_metric
from tests.builders import Decoder, Recurrent, conv_net, mlp, schemes, tokens
from tests.contracts import metric_contract

WEIGHTS = ("int2", "int4a", "fp32")
BOTH = ("int3:int4", "int8:int8", "int4", "fp32")


class Branches(nn.Module):
    """One branch is computed and thrown away, one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.lost, self.never = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lost(x)
        return self.head(torch.tanh(self.used(x)))


class TimeFirst(nn.Module):
    """The inner layer sees time on its first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x.transpose(0, 1)).tanh()).mean(0)


def in_place() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU6(inplace=True),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 3)).train()


NETS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "mlp": lambda: (mlp(), torch.randn(4, 6)),
    "conv": lambda: (conv_net(), torch.randn(3, 3, 8, 8)),
    "decoder with embeddings": lambda: (Decoder(), tokens(2, 3)),
    "untied decoder": lambda: (Decoder(tied=False), tokens(2, 3)),
    "called twice": lambda: (Recurrent(), torch.randn(3, 4)),
    "bfloat16": lambda: (mlp().bfloat16(), torch.randn(4, 6).bfloat16()),
    "float16": lambda: (mlp().half(), torch.randn(4, 6).half()),
    "float64": lambda: (mlp().double(), torch.randn(4, 6).double()),
    "dropout in train mode": lambda: (dropping(), torch.randn(4, 6)),
    "unused branches": lambda: (Branches(), torch.randn(4, 6)),
    "in place": lambda: (in_place(), torch.randn(3, 3, 8, 8)),
    "time first": lambda: (TimeFirst(), torch.randn(3, 5, 3)),
    "one sample": lambda: (mlp(), torch.randn(1, 6)),
}


def to_first_class(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    rows = output.reshape(-1, output.shape[-1]).float()
    return F.cross_entropy(rows, rows.new_zeros(len(rows), dtype=torch.long))


def net(name: str, texts: tuple[str, ...], with_loss: bool = True) -> Workload:
    torch.manual_seed(7)
    model, batch = NETS[name]()
    samples = num_samples(batch)
    middle = samples // 2
    halves = ((0, middle), (middle, samples)) if middle else ((0, samples),)
    batches = tuple(cut(batch, start, stop) for start, stop in halves)
    graph = build_graph(model, batches[0], embeddings="embeddings" in name)
    return Workload(
        model=model,
        graph=graph,
        cells=Cells(
            units=tuple(unit.name for unit in graph.units),
            schemes=(schemes(*texts),) * len(graph.units),
        ),
        calibration=batches,
        held_out=(),
        divergence=OutputDivergence("kl"),
        loss=to_first_class if with_loss else None,
        num_probes=1,
        key=model_digest(model),
        batch_keys=batches_digest(batches),
    )


@cache
def scored(metric: str, name: str, texts: tuple[str, ...], with_loss: bool = True) -> Scores | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MpqWarning)
        return metric_contract(get_metric(metric), net(name, texts, with_loss))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("metric", METRICS)
def test_weights_of_any_network(metric: str, name: str) -> None:
    scored(metric, name, WEIGHTS)


@pytest.mark.parametrize("name", ["mlp", "conv", "untied decoder", "called twice"])
@pytest.mark.parametrize("metric", METRICS)
def test_weights_and_activations_or_a_refusal(metric: str, name: str) -> None:
    scored(metric, name, BOTH)


@pytest.mark.parametrize("metric", METRICS)
def test_without_a_loss(metric: str) -> None:
    scores = scored(metric, "conv", WEIGHTS, with_loss=False)
    assert (scores is None) == (metric == "loss")


@pytest.mark.parametrize("name", ["mlp", "conv", "untied decoder", "called twice", "float64"])
@pytest.mark.parametrize("metric", METRICS)
def test_plain_networks_are_never_refused(metric: str, name: str) -> None:
    scores = scored(metric, name, WEIGHTS)
    assert scores is not None
    table = scores.sensitivity
    lossy = [number for number, (_, scheme) in enumerate(table.cells) if str(scheme) != "fp32"]
    assert np.count_nonzero(table.values[lossy]) > len(lossy) / 2


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"weight_error"}))  # it needs no output
def test_what_never_reaches_the_output_scores_zero(metric: str) -> None:
    scores = scored(metric, "unused branches", WEIGHTS)
    assert scores is not None
    table = scores.sensitivity
    lost = [number for number, (unit, _) in enumerate(table.cells) if unit == "lost"]
    assert not table.values[lost].any()


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_for_weights_only_names_the_scheme_it_refuses(metric: str) -> None:
    if scored(metric, "mlp", BOTH) is None:
        with pytest.raises(InvalidInputError, match=f"{metric} .*int3:int4"):
            get_metric(metric).tasks(net("mlp", BOTH))


def test_the_contract_notices_a_model_that_is_not_given_back() -> None:
    class Careless:
        name = "kl"
        inner = get_metric("kl")
        tasks, combine = inner.tasks, inner.combine

        def run(self, workload: Workload, task: object) -> object:
            workload.model.train()
            return self.inner.run(workload, task)  # type: ignore[arg-type]

    workload = net("mlp", WEIGHTS)
    workload.model.eval()
    with pytest.raises(AssertionError):
        metric_contract(Careless(), workload)  # type: ignore[arg-type]


def test_the_contract_notices_keys_that_do_not_follow_the_seed() -> None:
    class Stale:
        name = "kl"
        inner = get_metric("kl")
        run, combine = inner.run, inner.combine

        def tasks(self, workload: Workload) -> object:
            return self.inner.tasks(replace(workload, seed=0))

    with pytest.raises(AssertionError):
        metric_contract(Stale(), net("mlp", WEIGHTS))  # type: ignore[arg-type]
