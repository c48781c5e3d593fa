"""Content keys: equal inputs have equal keys, changed ones do not."""

from __future__ import annotations

import torch
from torch import nn

from mpq.nn.fingerprint import digest, function_digest, model_digest, output_digest


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
