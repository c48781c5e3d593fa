from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_format
from mpq.core.problem import Allocation
from mpq.nn.batches import call
from mpq.nn.calibrate import with_input_ranges
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating, frozen, quantized
from mpq.nn.quantizers import WeightQuantizer, fake_quantize_activation, quantize_weight
from tests.builders import CASES, Decoder, Recurrent, case, conv_net, mlp, schemes, workload

INT4, INT8, INT2 = schemes("int4", "int8:int8", "int2:int4s")


def state(model: nn.Module) -> tuple[object, ...]:
    """Everything that borrowing a model must leave as it was."""
    named = [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
    hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]
    orders = [list(m._parameters) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return named, hooks, orders, modes, torch.get_rng_state().tolist()


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def searched(model: nn.Module, sample: object) -> list[str]:
    return [name for unit in build_graph(model, sample).units for name in unit.layers]


@pytest.mark.parametrize("scheme", [INT4, INT8, INT2, *schemes("bf16", "fp32")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_model_comes_back_bit_for_bit(name: str, scheme: object) -> None:
    model, sample = case(name)
    layers = searched(model, sample)
    before, values = state(model), contents(model)
    with evaluating(model), frozen(model), quantized(model, dict.fromkeys(layers, scheme)):
        call(model, sample)
        torch.rand(3)
    assert state(model) == before
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_the_model_comes_back_after_an_error(name: str) -> None:
    model, sample = case(name)
    layers = dict.fromkeys(searched(model, sample), INT8)
    before = state(model)
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        evaluating(model),
        frozen(model),
        quantized(model, layers),
    ):
        torch.rand(3)
        raise ZeroDivisionError
    assert state(model) == before


def test_the_model_comes_back_after_an_error_half_way_in() -> None:
    model = mlp()
    before = state(model)
    both = dict(zip(("0", "2"), schemes("int8:int8", "int4g5"), strict=True))
    with pytest.raises(InvalidInputError, match="group size 5"), quantized(model, both):
        pass
    assert state(model) == before


def test_modes_come_back_module_by_module() -> None:
    model = conv_net().train()
    model[1].eval()
    before = state(model)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert state(model) == before


def test_frozen_parameters_stay_frozen_afterwards() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    before = state(model)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert state(model) == before


def test_random_numbers_drawn_while_evaluating_are_not_missed_later() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with evaluating(mlp()):
        pass
    torch.manual_seed(4)
    with evaluating(nn.Dropout()):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


def test_weights_read_back_from_their_format_inside() -> None:
    model = mlp()
    expected = quantize_weight(model[0].weight, parse_format("int4")).dequantize()
    with quantized(model, {"0": INT4}):
        assert torch.equal(model[0].weight, expected)
        assert not model[0].weight.requires_grad


def test_layers_that_are_not_named_keep_their_weights() -> None:
    model = mlp()
    other = model[2].weight
    with quantized(model, {"0": INT4}):
        assert model[2].weight is other


def test_the_output_is_that_of_a_model_with_quantized_weights() -> None:
    model, sample = case("conv")
    model.eval()
    layers = searched(model, sample)
    copied = conv_net().eval()
    copied.load_state_dict(model.state_dict())
    for name in layers:
        module = copied.get_submodule(name)
        axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        stored = quantize_weight(module.weight, parse_format("int4"), axis)
        module.weight = nn.Parameter(stored.dequantize())
    with quantized(model, dict.fromkeys(layers, INT4)):
        assert torch.equal(call(model, sample), call(copied, sample))


def test_inputs_are_quantized_sample_by_sample() -> None:
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6)
    with quantized(model, {"0": schemes("fp32:int4")[0]}):
        seen = fake_quantize_activation(x, parse_format("int4", "activations"))
        assert torch.equal(model(x), nn.functional.linear(seen, model[0].weight, model[0].bias))


def test_inputs_with_limits_are_quantized_in_them() -> None:
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6)
    with quantized(model, {"0": schemes("fp32:int4static")[0]}, limits={"0": (-0.5, 0.5)}):
        seen = fake_quantize_activation(x, parse_format("int4", "activations"), (-0.5, 0.5))
        assert torch.equal(model(x), nn.functional.linear(seen, model[0].weight, model[0].bias))


def test_input_ranges_are_those_of_convolutions_and_hold_zero() -> None:
    model, sample = case("conv")
    graph = build_graph(model, sample)
    before = state(model)
    ranges = with_input_ranges(model, graph, [sample.abs() + 1, sample.abs() + 2]).input_ranges
    assert ranges["0"] == (0.0, float((sample.abs() + 2).max()))
    assert set(ranges) == {"0", "3", "4", "6"}
    assert state(model) == before


def test_a_workload_runs_as_an_allocation_with_its_ranges() -> None:
    model, sample = case("conv")
    given = workload(model, [sample])
    given = replace(given, graph=with_input_ranges(model, given.graph, [sample / 4]))
    allocation = Allocation(dict.fromkeys(given.cells.units, INT8))
    with evaluating(model):
        plain = call(model, sample)
        with given.quantized_as(Allocation({})):
            assert torch.equal(call(model, sample), plain)
        layers, ranges = given.layer_schemes(allocation), given.graph.input_ranges
        with quantized(model, layers, limits=ranges):
            expected = call(model, sample)
        with given.quantized_as(allocation):
            assert torch.equal(call(model, sample), expected)
        with quantized(model, layers):
            assert not torch.equal(call(model, sample), expected)


def test_a_tied_weight_is_replaced_everywhere() -> None:
    model = Recurrent()
    with quantized(model, {"cell": INT4}):
        assert model.twin.weight is model.cell.weight
        assert not model.twin.weight.requires_grad
    assert model.twin.weight is model.cell.weight


def test_a_head_tied_to_an_embedding_is_replaced_in_both() -> None:
    model = Decoder()
    expected = quantize_weight(model.embed.weight, parse_format("int4")).dequantize()
    with quantized(model, {"lm_head": INT4}):
        assert torch.equal(model.embed.weight, expected)
        assert model.embed.weight is model.lm_head.weight


def test_blocks_nest() -> None:
    model, x = mlp(), torch.randn(4, 6)
    plain = model(x)
    with quantized(model, {"0": INT4}):
        outer = state(model)
        once = model(x)
        with quantized(model, {"0": INT2, "2": INT8}):
            assert not torch.equal(model(x), once)
        assert state(model) == outer
        assert torch.equal(model(x), once)
    assert torch.equal(model(x), plain)


def test_a_wide_native_scheme_changes_nothing() -> None:
    model = mlp()
    weight = model[0].weight
    with quantized(model, {"0": schemes("fp32")[0]}):
        assert model[0].weight is weight


def test_a_half_model_keeps_its_dtype() -> None:
    model, sample = case("half")
    with torch.no_grad(), quantized(model, dict.fromkeys(("0", "2"), INT8)):
        assert model(sample).dtype == model[0].weight.dtype == torch.bfloat16


def test_a_shared_quantizer_remembers_its_ranges() -> None:
    model, quantizer = mlp(), WeightQuantizer("mse")
    with quantized(model, {"0": INT4, "2": INT4}, quantizer=quantizer):
        pass
    assert {name for name, _ in quantizer.factors} == {"0.weight", "2.weight"}


def test_an_unknown_layer_is_named() -> None:
    with (
        pytest.raises(InvalidInputError, match="no layer 'absent'"),
        quantized(mlp(), {"absent": INT4}),
    ):
        pass


def test_modes_and_buffers_come_back_whatever_is_done_inside() -> None:
    model = conv_net().eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with evaluating(model):
        model.train()
        model(torch.randn(2, 3, 8, 8))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
