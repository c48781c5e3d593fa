from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import (
    arguments,
    call,
    check_batches,
    checked_call,
    cut,
    describe,
    num_samples,
    output_tensor,
    position_mask,
)
from tests.builders import Decoder, mlp, tokens

X, Y = torch.arange(12.0).reshape(4, 3), torch.arange(4)


class TwoInputs(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return scale * (a + b)


def test_a_tensor_is_the_only_argument() -> None:
    args, kwargs = arguments(mlp(), X)
    assert args[0] is X
    assert (len(args), kwargs) == (1, {})


@pytest.mark.parametrize("pair", [(X, Y), [X, Y]], ids=["tuple", "list"])
def test_what_follows_the_input_of_a_tuple_is_a_target(pair: object) -> None:
    args, _ = arguments(mlp(3), pair)
    assert len(args) == 1
    assert call(mlp(3), pair).shape == (4, 3)


def test_a_forward_of_two_inputs_takes_two() -> None:
    torch.testing.assert_close(call(TwoInputs(), (X, X, Y)), 4 * X)


def test_a_tuple_of_one_tensor_is_enough() -> None:
    assert len(arguments(mlp(), (X,))[0]) == 1


@pytest.mark.parametrize("label", ["labels", "label", "targets", "target"])
def test_a_mapping_gives_keywords_without_labels(label: str) -> None:
    args, kwargs = arguments(Decoder(), {**tokens(), label: Y})
    assert (args, list(kwargs)) == ((), ["input_ids", "attention_mask"])


def test_a_batch_encoding_is_a_mapping() -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({**tokens(), "labels": Y})
    assert call(Decoder(), batch).shape == (2, 5, 11)
    assert num_samples(batch) == 2
    assert cut(batch, 0, 1)["input_ids"].shape == (1, 5)
    assert position_mask(batch, torch.zeros(2, 5, 11)) is not None


@pytest.mark.parametrize("batch", [None, 3, "text", (), []])
def test_anything_else_is_no_batch(batch: object) -> None:
    with pytest.raises(InvalidInputError, match="a batch is a tensor") as caught:
        arguments(mlp(), batch)
    assert type(batch).__name__ in str(caught.value)


@dataclasses.dataclass
class Named:
    loss: torch.Tensor
    logits: torch.Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    loss: torch.Tensor
    logits: torch.Tensor


Pair = namedtuple("Pair", ["loss", "logits"])
LOSS, LOGITS = torch.zeros(()), torch.ones(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        Named(LOSS, LOGITS),
        Slotted(LOSS, LOGITS),
        Pair(LOSS, LOGITS),
        {"loss": LOSS, "logits": LOGITS},
        OrderedDict(logits=LOGITS),
        {"hidden": LOGITS, "more": LOSS},
        (LOGITS, LOSS),
        [None, LOGITS],
    ],
    ids=lambda output: type(output).__name__,
)
def test_the_output_is_the_logits_or_the_first_tensor(output: object) -> None:
    assert output_tensor(output) is LOGITS


def test_a_transformers_output_is_its_logits() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    found = outputs.SequenceClassifierOutput(loss=LOSS, logits=LOGITS)
    assert output_tensor(found) is LOGITS


@pytest.mark.parametrize("output", [None, "text", 3.0, (), {}, {"a": 3}, [None]])
def test_an_output_without_a_tensor_is_refused(output: object) -> None:
    with pytest.raises(InvalidInputError, match="no tensor in the output") as caught:
        output_tensor(output)
    assert type(output).__name__ in str(caught.value)


@pytest.mark.parametrize("batch", [X, (X, Y), {"x": X, "labels": Y}, {"scale": 2.0, "x": X}])
def test_samples_are_counted_on_the_first_tensor(batch: object) -> None:
    assert num_samples(batch) == 4


@pytest.mark.parametrize("batch", [torch.tensor(1.0), (), {}, {"a": 3}, ("text",)])
def test_a_batch_without_samples_is_refused(batch: object) -> None:
    with pytest.raises(InvalidInputError, match="at least one tensor with a sample axis"):
        num_samples(batch)


def test_cutting_a_tensor_takes_samples() -> None:
    torch.testing.assert_close(cut(X, 1, 3), X[1:3])


def test_cutting_a_tuple_takes_samples_of_every_tensor() -> None:
    inputs, targets = cut((X, Y), 1, 3)
    torch.testing.assert_close(inputs, X[1:3])
    torch.testing.assert_close(targets, Y[1:3])


def test_cutting_passes_on_what_has_no_sample_axis() -> None:
    batch = {"x": X, "table": torch.zeros(7, 3), "scale": torch.tensor(2.0), "name": "a"}
    part = cut(batch, 0, 2)
    assert part["x"].shape == (2, 3)
    assert all(part[key] is batch[key] for key in ("table", "scale", "name"))


def test_samples_put_together_again_are_the_batch() -> None:
    batch = tokens(3)
    parts = [cut(batch, i, i + 1) for i in range(3)]
    for key, value in batch.items():
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), value)


def test_the_attention_mask_tells_real_positions_of_token_outputs() -> None:
    batch = tokens()
    assert position_mask(batch, torch.zeros(2, 5, 11)) is batch["attention_mask"]


@pytest.mark.parametrize("shape", [(2, 11), (2, 6, 11), (2, 5, 4, 4)])
def test_other_outputs_have_no_position_mask(shape: tuple[int, ...]) -> None:
    assert position_mask(tokens(), torch.zeros(shape)) is None


@pytest.mark.parametrize("batch", [X, (X, Y), {"input_ids": X}])
def test_batches_without_a_mask_have_no_position_mask(batch: object) -> None:
    assert position_mask(batch, torch.zeros(4, 3, 2)) is None


@pytest.mark.parametrize("batches", [[], (), [torch.zeros(0, 3)]])
def test_an_empty_list_of_batches_is_refused(batches: list) -> None:
    with pytest.raises(InvalidInputError, match="calibration is empty") as caught:
        check_batches("calibration", batches)
    assert caught.value.code == "no_batches"


@pytest.mark.parametrize("batch", [X, tokens(), "package:batches"])
def test_a_batch_alone_is_no_list_of_batches(batch: object) -> None:
    with pytest.raises(InvalidInputError, match=r"is a list of batches, got a .*: write \[it\]"):
        check_batches("calibration", batch)  # type: ignore[arg-type]


def test_batches_may_come_from_a_generator() -> None:
    assert len(check_batches("calibration", (x for x in (X, X)))) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "text"),
    [(X, "[4, 3]"), ((X, Y), "[4, 3], [4]"), ({"x": X, "n": 1}, "x [4, 3]")],
)
def test_a_batch_is_described_by_its_shapes(batch: object, text: str) -> None:
    assert describe(batch) == text


@pytest.mark.parametrize("batch", [torch.zeros(2, 5), {"x": X}, (torch.zeros(2, 5), Y)])
def test_a_batch_that_does_not_fit_is_named_with_its_shapes(batch: object) -> None:
    with pytest.raises(InvalidInputError, match="cannot run calibration batch 3") as caught:
        checked_call(mlp(3), batch, "calibration batch 3")
    assert caught.value.code == "batch_mismatch"
    assert describe(batch) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_that_is_not_finite_is_refused_by_batch() -> None:
    with pytest.raises(InvalidInputError, match=r"calibration batch 3.* is not finite") as caught:
        checked_call(mlp(3), X * float("nan"), "calibration batch 3")
    assert caught.value.code == "output_not_finite"


def test_a_batch_that_fits_gives_its_output() -> None:
    model = mlp(3)
    assert torch.equal(checked_call(model, X, "batch"), model(X))
