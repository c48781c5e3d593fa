"""Expert weights in 3-D parameters: found, quantized, stored, searched and put back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpq
from hw_cost_models.memory import stored_bytes
from mpq.choices import make_cells
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_format, parse_scheme
from mpq.core.problem import Allocation, BudgetText
from mpq.export.packed import read_packed, write_packed
from mpq.nn.graph import build_graph
from mpq.nn.patch import quantized
from mpq.nn.quantizers import WeightQuantizer, quantize_weight
from mpq.store.store import open_store
from tests.builders import schemes
from tests.contracts import borrowed_state, same_state
from tests.mixtures import (
    batches,
    experts_of,
    mixtral,
    network,
    words,
)

# --- found -----------------------------------------------------------------------------------


def test_experts_are_layers_named_after_their_parameter() -> None:
    model = network()
    graph = build_graph(model, torch.randn(7, 6))
    assert [(la.name, la.kind, la.weight_id) for la in graph.layers] == [
        ("stem", "linear", "stem.weight"),
        ("moe.router", "linear", "moe.router.weight"),
        ("moe.up", "experts", "moe.up"),
        ("moe.down", "experts", "moe.down"),
        ("head", "linear", "head.weight"),
    ]
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    total = sum(p.numel() for p in model.parameters())
    assert graph.coverage == pytest.approx(1 - biases / total)
    assert experts_of(graph) == {"moe.up": 7 * 3 * 6 * 4, "moe.down": 7 * 3 * 4 * 6}
    assert [graph.by_name[name].calls for name in experts_of(graph)] == [1, 3]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_multiplications_of_routed_experts_are_those_of_their_tokens(implementation: str) -> None:
    graph = build_graph(mixtral(implementation), words(1)[0])
    tokens, chosen = 3 * 6, 2
    assert experts_of(graph) == {
        f"model.layers.{layer}.mlp.experts.{name}": tokens * chosen * macs
        for layer in range(2)
        for name, macs in (("gate_up_proj", 64 * 16), ("down_proj", 16 * 32))
    }
    left = {part.name for part in graph.unsearched if "norm" not in part.name}
    gates = {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    assert left == gates | {"model.embed_tokens.weight"}


USES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "matmul": lambda x, w: (x @ w.transpose(1, 2)).sum(0),
    "bmm": lambda x, w: torch.bmm(x.expand(2, -1, -1), w.mT).sum(0),
    "selected": lambda x, w: F.linear(x, w[torch.tensor([1, 0])][0]),
    "unbound": lambda x, w: F.linear(x, w.unbind(0)[1]),
    "converted": lambda x, w: F.linear(x.double(), w[0].double()).float(),
    "vector": lambda x, w: torch.stack([w[1] @ row for row in x]),
    "einsum": lambda x, w: torch.einsum("ni,eoi->neo", x, w).sum(1),
}


class Uses(nn.Module):
    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stem, self.weight, self.use = nn.Linear(5, 4), nn.Parameter(torch.randn(2, 3, 4)), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.stem(x), self.weight)


@pytest.mark.parametrize("name", USES)
def test_any_matrix_product_with_a_slice_is_seen(name: str) -> None:
    graph = build_graph(Uses(USES[name]), torch.randn(6, 5))
    experts = 2 if name in ("matmul", "bmm", "einsum") else 1
    assert experts_of(graph) == {"weight": experts * 6 * 3 * 4}


NO_USES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "added": lambda x, w: x + w[0, 0],
    "added before a product": lambda x, w: (x + w[0, :1]) @ torch.ones(4, 2),
    "a bias": lambda x, w: torch.baddbmm(w, x[:6].reshape(2, 3, 4), torch.ones(2, 4, 4)),
    "a kernel": lambda x, w: F.conv1d(x[:, None].expand(-1, 3, -1), w[:, :, :1]),
    "unused": lambda x, w: x,
}


@pytest.mark.parametrize("name", NO_USES)
def test_other_3d_parameters_stay_as_they_are(name: str) -> None:
    model = Uses(NO_USES[name])
    graph = build_graph(model, torch.randn(6, 5))
    assert not experts_of(graph)
    (part,) = [part for part in graph.unsearched if part.name == "weight"]
    assert part.reason == "3-d parameter of Uses: no stack of matrices that a product reads"


def test_a_single_matrix_in_3d_is_no_stack_of_experts() -> None:
    model = Uses(USES["matmul"])
    model.weight = nn.Parameter(torch.randn(1, 3, 4))
    assert not experts_of(build_graph(model, torch.randn(6, 5)))


def test_gate_and_up_experts_share_a_scheme() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Parameter(torch.randn(2, 3, 5)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = (torch.einsum("nd,ehd->neh", x, w) for w in (self.gate_proj, self.up_proj))
            return (F.silu(gate) * up).sum(1)

    (unit,) = build_graph(Gated(), torch.randn(4, 5)).units
    assert (unit.layers, unit.reason) == (("gate_proj", "up_proj"), "fused gate/up")


def test_experts_can_be_skipped_and_must_be_finite() -> None:
    model = network()
    graph = build_graph(model, torch.randn(2, 6), skip=["moe.u*"])
    assert "moe.up" not in {name for unit in graph.units for name in unit.layers}
    reasons = {part.name: part.reason for part in graph.unsearched}
    assert reasons["moe.up"] == "skipped as asked (moe.u*)"
    with torch.no_grad():
        model.moe.down[1, 2, 3] = float("nan")
    with pytest.raises(InvalidInputError, match=r"'moe.down' has 1 .*the first at \[1, 2, 3\]"):
        build_graph(model, torch.randn(2, 6))


# --- quantized and stored --------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int4", "int4a", "int3t", "int4g2", "int2g4a", "int1"])
def test_a_row_of_an_expert_is_quantized_as_a_row_of_a_matrix(text: str) -> None:
    weight, fmt = torch.randn(3, 5, 8), parse_format(text)
    stack, matrix = quantize_weight(weight, fmt, (0, 1)), quantize_weight(weight.flatten(0, 1), fmt)
    assert torch.equal(stack.dequantize(), matrix.dequantize().reshape(3, 5, 8))
    assert fmt.num_scales((3, 5, 8), (0, 1)) == fmt.num_scales((15, 8)) == stack.scales.numel()
    assert fmt.storage_bits((3, 5, 8), (0, 1)) == fmt.storage_bits((15, 8))


def test_one_row_changes_its_own_scale_only() -> None:
    weight = torch.randn(2, 3, 4)
    larger = weight.clone()
    larger[1, 2] *= 100
    before, after = (quantize_weight(w, parse_format("int4"), (0, 1)) for w in (weight, larger))
    assert (before.scales != after.scales).nonzero()[:, 0].tolist() == [5]


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("text", ["int4", "int2g2a", "int3t", "bf16"])
def test_packed_experts_read_back_as_they_are_scored(
    text: str, clip: mpq.core.jobs.Clip, tmp_path: Path
) -> None:
    model = network()
    graph = build_graph(model, batches()[0])
    scheme, quantizer = parse_scheme(text), WeightQuantizer(clip)
    allocation = Allocation({unit.name: scheme for unit in graph.units})
    packed = write_packed(tmp_path / "m.safetensors", model, graph, allocation, quantizer)
    searched = sum(stored_bytes(graph.by_name[u.name], scheme.weights) for u in graph.units)
    assert packed.tensor_bytes == searched + graph.fixed_bytes
    read = read_packed(packed.path, graph)
    names = {name: scheme for unit in graph.units for name in unit.layers}
    with quantized(model, names, quantizer=quantizer):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert state.keys() == read.keys()
    assert all(torch.equal(state[name], read[name].float()) for name in state)


def test_patching_takes_experts_anywhere_and_gives_them_back() -> None:
    model = network()
    (x,) = batches(1)
    before = borrowed_state(model)
    with quantized(model, {"moe.up": parse_scheme("int4")}), torch.no_grad():
        inside, patched = model(x), model.moe.up.detach()
    assert same_state(before, borrowed_state(model))
    slow = copy.deepcopy(model)
    flat = model.moe.up.detach().flatten(0, 1)
    expected = quantize_weight(flat, parse_format("int4")).dequantize().reshape(3, 6, 4)
    assert torch.equal(patched, expected)
    slow.moe.up = nn.Parameter(expected)
    assert torch.equal(inside, slow(x))


@pytest.mark.parametrize("name", ["moe.upp", "mo.up", "moe.router.bias.x", "nothing"])
def test_a_name_that_is_neither_layer_nor_experts_is_refused(name: str) -> None:
    with (
        pytest.raises(InvalidInputError, match=f"this model has no layer '{name}'"),
        quantized(network(), {name: parse_scheme("int4")}),
    ):
        pass


def test_activations_of_experts_are_refused_not_ignored() -> None:
    model = network()
    with (
        pytest.raises(InvalidInputError, match=r"int8:int8 quantizes activations, .*'moe.up'"),
        quantized(model, {"moe.up": parse_scheme("int8:int8")}),
    ):
        pass
    graph = build_graph(model, batches()[0])
    with pytest.raises(InvalidInputError, match=r"experts 'moe.up' has no input of its own"):
        make_cells(graph, lambda _: schemes("int4"), {"moe.up": "int8:int8"})


# --- searched --------------------------------------------------------------------------------


def logged(result: mpq.SearchResult) -> list[str]:
    return [event.message for event in result.store.events(result.run_id)]


@pytest.mark.parametrize(
    ("make", "data"),
    [(network, lambda count: batches(count)), (mixtral, words)],
    ids=["small", "mixtral"],
)
def test_a_search_weighs_what_it_predicts_and_only_borrows(
    make: Callable[[], nn.Module], data: Callable[[int], list[object]], tmp_path: Path
) -> None:
    model = make()
    before = borrowed_state(model)
    result = mpq.search(
        model,
        data(2),
        budgets=["memory <= 45%"],
        schemes=["fp32", "int8", "int4", "int8:int8"],
        held_out=data(1),
        executor="serial",
        storage=f"sqlite:///{tmp_path}/runs.db",
    )
    assert same_state(before[1:], borrowed_state(model)[1:])  # the generator apart
    names = list(experts_of(result.graph))
    assert names
    assert set(names) <= set(result.allocation)
    assert all(result.allocation[name].activations.is_native for name in names)
    for split in ("calibration", "held_out"):
        (chosen,) = [e for e in result.evaluation if (e.candidate, e.split) == ("chosen", split)]
        if split == "calibration":
            assert chosen.predicted_bytes == chosen.measured_bytes
            assert chosen.measured_bytes <= 0.45 * result.graph.native_bytes
    assert [m for m in logged(result) if f"{names[0]}: int8:int8: a layer of kind 'experts'" in m]
    with result.apply(model):
        narrow = [n for n in names if result.allocation[n].weights.bits < 32]
        for name in narrow:
            rows = model.get_parameter(name).detach().flatten(0, 1)
            assert (
                max(len(row.unique()) for row in rows) <= 2 ** result.allocation[name].weights.bits
            )
        assert narrow
    assert same_state(before[1:], borrowed_state(model)[1:])


def test_under_a_latency_budget_experts_stay_as_they_are(tmp_path: Path) -> None:
    result = mpq.search(
        network(),
        batches(),
        budgets=["latency <= 1 s"],
        schemes=["int8:int8", "int4"],
        skip=["stem", "moe.router"],
        executor="serial",
        latency_seconds=0.5,
        storage=f"sqlite:///{tmp_path}/runs.db",
    )
    assert {str(result.allocation[name]) for name in ("moe.up", "moe.down")} == {"fp32"}
    assert str(result.allocation["head"]) == "int8:int8"
    told = logged(result)
    assert "moe.up: nothing asked for is left, it stays as it is" in told
    assert "moe.up: no ONNX Runtime kernel for a layer of kind 'experts'" in told


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, {"fp32", "int8g32", "int4", "int4g32", "int2g32a"}),
        (torch.bfloat16, {"int8g32", "int4", "int4g32", "int2g32a"}),
    ],
)
def test_without_a_list_experts_are_offered_weights_only_schemes(
    dtype: torch.dtype, expected: set[str], tmp_path: Path
) -> None:
    from mpq.core.jobs import JobSpec
    from mpq.costing import Hardware
    from mpq.progress import Silent

    model = Uses(USES["bmm"]).to(dtype)
    model.weight = nn.Parameter(torch.randn(2, 3, 32).to(dtype))
    model.stem = nn.Linear(5, 32, dtype=dtype)
    graph = build_graph(model, torch.randn(6, 5).to(dtype))
    store = open_store(f"sqlite:///{tmp_path}/runs.db")
    spec = JobSpec(model="m", calibration="m:c", budgets=("memory <= 50%",))
    offered = Hardware(spec, [], store, Silent()).schemes(graph.by_name["weight"])
    assert {str(scheme) for scheme in offered} == expected
    timed = Hardware(spec, [BudgetText.parse("latency <= 1 s")], store, Silent())
    (kept,) = timed.schemes(graph.by_name["weight"])
    assert str(kept) == graph.by_name["weight"].native_family
    assert graph.by_name["weight"].native_family == {2: "bf16", 4: "fp32"}[dtype.itemsize]
