from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mpq.nn.batches import call
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.shipping import ShippedWorkload, ship
from mpq.nn.workload import Workload
from tests.builders import CASES, Decoder, Recurrent, case, mlp, tokens, workload


class Recurrence(nn.Module):
    """Aliases of parameters and buffers outside the registries, as recurrent layers keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.fc = nn.Linear(5, 3)
        self.register_buffer("offset", torch.tensor(2.0))
        self.alias = self.offset
        self.plain = torch.full((3,), 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(x)[0]) * self.alias + self.plain


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is nothing to initialise
            self.none = nn.Linear(3, 0)
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.flags.any()


def model_of(name: str) -> tuple[nn.Module, object]:
    special = {
        "recurrence": lambda: (Recurrence(), torch.randn(2, 4, 6)),
        "empty": lambda: (Empty(), torch.randn(2, 6)),
    }
    return special[name]() if name in special else case(name)


def sent(original: Workload) -> Workload:
    """Send a workload through pickle, its arrays read-only as an object store gives them."""
    shipped: ShippedWorkload = pickle.loads(pickle.dumps(ship(original)))
    for array in shipped.contents:
        array.setflags(write=False)
    return shipped.unpack()


@pytest.mark.parametrize("name", [*CASES, "recurrence", "empty"])
def test_outputs_are_the_same_bit_for_bit(name: str) -> None:
    model, sample = model_of(name)
    model.eval()
    original = workload(model, [sample])
    with torch.no_grad():
        expected = call(model, sample)
        assert torch.equal(call(sent(original).model, sample), expected)
        assert torch.equal(call(model, sample), expected)


@pytest.mark.parametrize("name", [*CASES, "recurrence", "empty"])
def test_every_tensor_arrives_with_its_dtype_and_flags(name: str) -> None:
    model, sample = model_of(name)
    next(model.parameters()).requires_grad_(False)
    arrived = sent(workload(model, [sample])).model
    for named in (nn.Module.named_parameters, nn.Module.named_buffers):
        before, after = dict(named(model)), dict(named(arrived))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor)
            assert after[key].dtype == tensor.dtype
            assert after[key].requires_grad == tensor.requires_grad
            assert type(after[key]) is type(tensor)


def test_tied_weights_stay_tied() -> None:
    arrived = sent(workload(Recurrent(), [torch.randn(3, 4)])).model
    assert arrived.cell.weight is arrived.twin.weight
    decoder = sent(workload(Decoder(), [tokens()])).model
    assert decoder.embed.weight is decoder.lm_head.weight


def test_buffers_stay_persistent_or_not() -> None:
    arrived = sent(workload(Decoder(), [tokens()])).model
    assert torch.equal(arrived.scratch, torch.ones(3))
    assert ("scale" in arrived.state_dict(), "scratch" in arrived.state_dict()) == (True, False)


def test_the_original_is_untouched() -> None:
    model, sample = case("decoder")
    before = [(n, id(p), p.device.type) for n, p in model.named_parameters()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sent(workload(model, [sample]))
    assert [(n, id(p), p.device.type) for n, p in model.named_parameters()] == before
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())


def test_weights_are_neither_copied_nor_in_the_skeleton() -> None:
    model = mlp(hidden=20_000)
    shipped = ship(workload(model, [torch.randn(2, 6)]))
    first = next(model.parameters()).detach().numpy()
    assert np.shares_memory(shipped.contents[0], first)
    assert len(pickle.dumps(shipped.skeleton)) < 20_000
    unpacked = next(shipped.unpack().model.parameters()).detach().numpy()
    assert np.shares_memory(unpacked, first)


def test_unpacking_twice_gives_two_models_over_the_same_bytes() -> None:
    shipped = ship(workload(mlp(), [torch.randn(2, 6)]))
    one, two = shipped.unpack().model, shipped.unpack().model
    assert one is not two
    assert one[0].weight.data_ptr() == two[0].weight.data_ptr()


def test_the_mode_and_the_rest_of_the_workload_arrive() -> None:
    model = mlp().train()
    quantizer = WeightQuantizer("mse")
    original = workload(model, [torch.randn(2, 6)], quantizer=quantizer, seed=9, key="k")
    quantizer.fake_quantize("0.weight", model[0].weight, original.cells.schemes[0][0].weights)
    arrived = sent(original)
    assert (arrived.seed, arrived.key, arrived.model.training) == (9, "k", True)
    assert (arrived.graph, arrived.cells) == (original.graph, original.cells)
    assert arrived.quantizer.factors.keys() == quantizer.factors.keys()
    assert torch.equal(arrived.calibration[0], original.calibration[0])
