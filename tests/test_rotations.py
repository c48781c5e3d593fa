"""Rotations: the matrices, the fast transform, and what they do in networks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from mpq.core.formats import parse_scheme
from mpq.nn.batches import call
from mpq.nn.graph import build_graph
from mpq.nn.input_transform import observe_arriving
from mpq.nn.patch import quantized
from mpq.nn.transforms import reports_of, transformed
from mpq.nn.transforms.hadamard import OnlineRotation
from mpq.nn.transforms.rotation import paley, rotation
from sensitivity.calls import Calls
from sensitivity.changes import Change
from tests.builders import mlp
from tests.builders import workload as make_workload
from tests.transformed_networks import make, samples


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 32, 44, 48])
def test_paley_matrices_are_hadamard(order: int) -> None:
    found = paley(order)
    assert found is not None
    assert set(found.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 16, 28, 36])
def test_other_orders_have_none(order: int) -> None:
    assert paley(order) is None


@pytest.mark.parametrize("size", [1, 2, 64, 12, 24, 384, 20, 3, 14, 50, 97])
def test_a_rotation_is_orthogonal_and_fast_is_dense(size: int) -> None:
    of = rotation(size, 3)
    assert of is not None
    assert of.size == size
    matrix = of.rotated(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )
    walsh = torch.ones(1, 1, dtype=torch.float64)
    while len(walsh) < of.power:
        walsh = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), walsh)
    dense = torch.kron(walsh / of.power**0.5, of.block)
    torch.testing.assert_close(matrix, dense, rtol=0, atol=1e-12)
    rows = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(of.rotated(rows), rows @ dense, rtol=0, atol=1e-11)


def test_384_and_768_are_hadamard_matrices() -> None:
    for size in (384, 768, 1536):
        of = rotation(size)
        assert of is not None
        entries = of.rotated(torch.eye(size, dtype=torch.float64)).abs() * size**0.5
        torch.testing.assert_close(entries, torch.ones_like(entries))


def test_large_prime_sizes_have_no_rotation() -> None:
    assert rotation(1021) is None
    model = nn.Sequential(nn.Linear(521, 2)).eval()
    (report,) = reports_of(transformed(model, [torch.randn(2, 521)], ["hadamard"]))
    assert report.changed == ()
    assert "no rotation" in report.unchanged["0"]


def test_outliers_are_spread() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    batch = torch.randn(16, 64)
    batch[:, 5] *= 100
    other = transformed(model, [batch], ["hadamard"])
    seen: list[torch.Tensor] = []
    with observe_arriving(other[0], lambda _, args: seen.append(args[0])):
        rotated = other(batch)
    torch.testing.assert_close(seen[0].square().sum(1), batch.square().sum(1))
    assert float(seen[0].abs().max()) < 0.3 * float(batch.abs().max())
    int4 = {"0": parse_scheme("fp32:int4")}
    with torch.no_grad(), quantized(other, int4):
        spread = (other(batch) - rotated).square().mean()
    with torch.no_grad(), quantized(model, int4):
        plain = (model(batch) - rotated).square().mean()
    assert float(spread) < 0.5 * float(plain)


def test_heads_are_rotated_in_the_weights() -> None:
    model = make("vit")
    other = transformed(model, samples(), ["hadamard"])
    (report,) = reports_of(other)
    out = "blocks.0.attn.out_proj"
    assert out in report.changed
    assert out not in report.costs
    assert not other.blocks[0].attn.out_proj._forward_pre_hooks
    assert "additions" in report.costs["blocks.0.attn.v_proj"]
    attention = other.blocks[0].attn
    q, k, v = (
        next(iter(module._forward_pre_hooks.values()))
        for module in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    assert q is k is v
    again = pickle.loads(pickle.dumps(other)).blocks[0].attn
    hooks = [next(iter(m._forward_pre_hooks.values())) for m in (again.q_proj, again.k_proj)]
    assert isinstance(hooks[0], OnlineRotation)
    assert hooks[0] is hooks[1]


def test_blocks_that_are_stored_count_and_are_seeded() -> None:
    model, batch = mlp(7, 8, 3).eval(), torch.randn(4, 7)
    one, two = (transformed(model, [batch], ["hadamard"], seed=seed) for seed in (0, 1))
    assert one[0].rotation_block.shape == (7, 7)
    assert not torch.equal(one[0].rotation_block, two[0].rotation_block)
    own, more = build_graph(model, batch), build_graph(one, batch)
    assert more.fixed_bytes == own.fixed_bytes + 7 * 7 * 4
    with torch.no_grad():
        torch.testing.assert_close(one(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_a_rotation_is_computed_once_for_its_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    other = transformed(make("gated"), samples(), ["hadamard"])
    calls: list[str] = []
    own = OnlineRotation.transformed

    def counted(self: OnlineRotation, module: nn.Module, values: torch.Tensor) -> torch.Tensor:
        calls.append(str(module))
        return own(self, module, values)

    monkeypatch.setattr(OnlineRotation, "transformed", counted)
    batch = samples()[0]
    with torch.no_grad():
        expected = other(batch)
        assert len(calls) == 3  # first, gate and up together, down
        other(batch.clone().mul_(2))
        batch += 1.0  # written to in place: not what was remembered
        assert not torch.equal(other(batch), expected)
    with torch.enable_grad():
        for _ in range(2):
            other(batch.requires_grad_()).sum().backward()


def test_scores_replay_what_the_layer_sees() -> None:
    """Around a quantized network too, the remembered input is rotated and not yet quantized."""
    batch = samples()[0]
    other = transformed(make("gated"), [batch], ["hadamard"])
    workload = make_workload(other, [batch], ("int4", "int4:int4"))
    base = {
        name: parse_scheme("int8:int8") for unit in workload.graph.units for name in unit.layers
    }
    with quantized(other, base), Calls(workload) as calls, torch.no_grad():
        other(batch)
    module, layer = other.up_proj, workload.graph.by_name["up_proj"]
    (inputs,) = calls._inputs["up_proj"]
    choices = [parse_scheme("int4"), parse_scheme("int4:int4")]
    change = dict(Change(workload, layer, module, choices).outputs(inputs))
    hooks, module._forward_pre_hooks = module._forward_pre_hooks, type(module._forward_pre_hooks)()
    try:
        with torch.no_grad():
            for number, scheme in enumerate(choices):
                before = module(inputs)
                with quantized(other, {"up_proj": scheme}):
                    moved = module(inputs) - before
                torch.testing.assert_close(change[number], moved, rtol=1e-4, atol=1e-5)
    finally:
        module._forward_pre_hooks = hooks


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def test_llama_of_transformers_with_grouped_queries() -> None:
    from tests.test_lrp import tiny

    model = tiny("llama", "eager")
    batch = {"input_ids": torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))}
    other = transformed(model, [batch], ["smooth", "hadamard"])
    report = reports_of(other)[-1]
    assert set(report.unchanged) == set()
    assert "model.layers.0.self_attn.o_proj" not in report.costs
    assert "model.layers.0.mlp.down_proj" in report.costs
    with torch.no_grad():
        assert relative(call(other, batch), call(model, batch)) < 1e-5
    assert build_graph(other, batch).units == build_graph(model, batch).units


def test_mamba_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False
    )
    model = transformers.MambaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))}
    other = transformed(model, [batch], ["hadamard"])
    (report,) = reports_of(other)
    mixer = "backbone.layers.0.mixer"
    assert {f"{mixer}.in_proj", f"{mixer}.x_proj", f"{mixer}.out_proj"} <= set(report.changed)
    with torch.no_grad():
        assert relative(call(other, batch), call(model, batch)) < 1e-5
    assert len(build_graph(other, batch).units) == len(build_graph(model, batch).units)
    assert copy.deepcopy(other)(**batch).logits.shape == (2, 6, 50)
