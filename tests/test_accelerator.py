"""What runs on a GPU, over a device that is not there but refuses what a GPU refuses."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.problem import Allocation
from mpq.evaluate import Candidate, run_candidate
from mpq.nn.accelerator import placed, placed_on_gpu
from mpq.nn.quality import QUALITIES
from mpq.tasks import Bench
from sensitivity import METRICS, get_metric
from sensitivity.responses import responses_of_batch
from tests.builders import schemes
from tests.fake_gpu import FAKE, fake_gpu
from tests.test_metrics_contract import BOTH, WEIGHTS, net


def test_the_fake_refuses_what_a_gpu_refuses() -> None:
    with fake_gpu():
        there, here = torch.ones(3).to("cuda"), torch.ones(3)
        assert there.device.type == "cuda"
        assert (there + there).device.type == "cuda"
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert there.cpu().numpy().sum() == 3
        layer = nn.Linear(3, 2).to("cuda")
        assert layer(there).device.type == "cuda"
        with pytest.raises(RuntimeError, match="two devices"):
            layer(here)


@pytest.mark.parametrize(
    ("name", "texts", "with_loss"),
    [
        ("mlp", WEIGHTS, True),
        ("mlp", BOTH, False),
        pytest.param("conv", BOTH, False, marks=pytest.mark.slow),
        pytest.param("conv", WEIGHTS, True, marks=pytest.mark.slow),
        pytest.param("untied decoder", WEIGHTS, False, marks=pytest.mark.slow),
        pytest.param("untied decoder", BOTH, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("metric", sorted(METRICS))
def test_a_metric_finds_the_same_there(
    metric: str, name: str, texts: tuple[str, ...], with_loss: bool
) -> None:
    workload = net(name, texts, with_loss)
    try:
        tasks = get_metric(metric).tasks(workload)
    except InvalidInputError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MpqWarning)
        here = [get_metric(metric).run(workload, task) for task in tasks]
        with fake_gpu():
            there = placed(replace(workload, model=copy.deepcopy(workload.model)), FAKE)
            found = [get_metric(metric).run(there, task) for task in tasks]
    for one, other in zip(here, found, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"operations"}:
            np.testing.assert_allclose(other[key], one[key], rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "conv", "untied decoder"])
def test_measuring_and_linearising_again_find_the_same_there(name: str) -> None:
    workload = replace(net(name, WEIGHTS), qualities={"cosine": QUALITIES["cosine"]})
    chosen = Allocation(dict.fromkeys(workload.cells.units, schemes("int4a")[0]))
    candidate = Candidate(name="x", split="calibration", allocation=chosen)
    here = run_candidate(Bench(workload), (candidate, (0, 1)))
    around = responses_of_batch(workload, 0, chosen)
    with fake_gpu():
        there = placed(replace(workload, model=copy.deepcopy(workload.model)), FAKE)
        found = run_candidate(Bench(there), (candidate, (0, 1)))
        also = responses_of_batch(there, 0, chosen)
    for key in here.keys() - {"seconds"}:
        np.testing.assert_allclose(found[key], here[key], rtol=1e-6)
    np.testing.assert_allclose(also.u, around.u, rtol=1e-6)
    np.testing.assert_allclose(also.g, around.g, rtol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_that_finds_no_gpu_names_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "node-7")
    with pytest.raises(
        InvalidInputError, match=r"^a worker on node node-7 was given a GPU"
    ) as told:
        placed_on_gpu(net("mlp", WEIGHTS))
    assert told.value.code == "no_gpu"
    assert "\n" not in str(told.value)
