"""Content keys: equal inputs have equal keys, changed ones do not."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from mpq.nn.fingerprint import _global_names, digest, function_digest, model_digest, output_digest


def test_a_digest_sees_type_shape_order_and_nesting() -> None:
    values = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        [1, [2, 3]],
        [[1, 2], 3],
        {"a": 1, "b": 2},
        {"b": 2, "a": 1},
        "1",
        1,
        1.0,
        None,
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(torch.ones(3)) == digest(torch.ones(3).clone())


def test_a_model_digest_follows_weights_buffers_and_settings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2))
    first = model_digest(model)
    assert model_digest(model) == first
    model[1].running_mean += 1
    second = model_digest(model)
    model[0].padding = (0, 0)
    assert len({first, second, model_digest(model)}) == 3


def test_an_output_digest_ignores_rounding_and_sees_other_code() -> None:
    output = torch.linspace(-1, 1, 101)
    assert output_digest(output) == output_digest(output * (1 + 1e-7))
    assert output_digest(output) != output_digest(output.relu())
    assert output_digest(output) != output_digest(output * 5)


def test_a_function_digest_follows_code_constants_and_closure() -> None:
    def scaled(factor: float):  # type: ignore[no-untyped-def]
        return lambda x: x * factor

    keys = [
        function_digest(f)
        for f in (
            lambda x: x * 2,
            lambda x: x * 3,
            lambda x: x + 2,
            lambda x: [y * 2 for y in x],
            lambda x: [y * 3 for y in x],
            scaled(1.0),
            scaled(2.0),
            None,
        )
    ]
    assert len(set(keys)) == len(keys)
    assert function_digest(scaled(1.0)) == function_digest(scaled(1.0))
    assert function_digest(nn.MSELoss()) != function_digest(nn.MSELoss())
    assert function_digest(nn.MSELoss().forward) != function_digest(nn.MSELoss().forward)
    weights = [scaled(torch.arange(5000.0)), scaled(torch.arange(5000.0).flip(0))]  # type: ignore[arg-type]
    assert function_digest(weights[0]) != function_digest(weights[1])


class Setting:
    """A live object with data in it."""

    def __init__(self, level: float) -> None:
        self.level = level
        self.itself = self


LABEL: object = 1.0


def label() -> object:
    return LABEL


def reads_a_global() -> object:
    return LABEL


def reads_through_a_function() -> object:
    return [label() for _ in range(2)], reads_through_itself


def reads_through_itself(times: int = 1) -> object:
    return (lambda: LABEL)() if times else reads_through_itself(times - 1)


@pytest.mark.parametrize(
    "function", [reads_a_global, reads_through_a_function, reads_through_itself]
)
def test_a_function_digest_follows_globals(
    function: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    itself: list[object] = [1]
    itself.append(itself)
    values: list[Callable[[], object]] = [
        lambda: 1.0,
        lambda: 2.0,
        lambda: "1.0",
        lambda: [1, {"a": 2}],
        lambda: [1, {"a": 3}],
        lambda: {3, 4},
        lambda: torch.ones(2),
        lambda: torch.zeros(2),
        lambda: np.ones(2),
        lambda: itself,
        lambda: Setting(1.0),
        lambda: Setting(2.0),
        lambda: Setting,
        lambda: nn.Linear(1, 1, bias=False).requires_grad_(False).apply(_ones),
        lambda: logging.getLogger("made"),
        lambda: torch.nn.functional.relu,
        lambda: torch.nn.functional.cross_entropy,
        lambda: math,
        lambda: math.sqrt,
        lambda: _ones,
    ]
    keys = []
    for make in values:
        monkeypatch.setattr(sys.modules[__name__], "LABEL", make())
        keys.append(function_digest(function))
        monkeypatch.setattr(sys.modules[__name__], "LABEL", make())  # another, but equal
        assert function_digest(function) == keys[-1]
    assert len(set(keys)) == len(keys)


def _ones(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.fill_(1.0)


def test_functions_of_packages_are_not_searched() -> None:
    assert function_digest(torch.nn.functional.cross_entropy) == function_digest(
        torch.nn.functional.cross_entropy
    )
    assert _global_names(reads_through_itself.__code__) == {"LABEL", "reads_through_itself"}
