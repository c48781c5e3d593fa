"""Expert weights in 3-D parameters: found, scored, quantized, stored and put back."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpq
from hw_cost_models.memory import stored_bytes
from mpq.choices import make_cells
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_format, parse_scheme
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation, BudgetText
from mpq.export.packed import read_packed, write_packed
from mpq.nn.divergence import OutputDivergence
from mpq.nn.fingerprint import batches_digest, model_digest
from mpq.nn.graph import build_graph
from mpq.nn.patch import quantized
from mpq.nn.quantizers import WeightQuantizer, quantize_weight
from mpq.nn.shipping import ship
from mpq.nn.workload import Workload
from mpq.store.store import open_store
from sensitivity import METRICS, get_metric
from sensitivity.calls import parts
from sensitivity.responses import responses_of_batch
from tests.builders import schemes, workload
from tests.contracts import borrowed_state, metric_contract, same_state

TEXTS = ("fp32", "int2", "int3t", "int4g2a")
REFUSED = {"autoquantize", "mixllm", "lrp", "lrp_importance"}


class Mixture(nn.Module):
    """Every token through every expert, weighed by a router; parts of a residual block."""

    def __init__(self, width: int = 4, hidden: int = 6, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        hidden = F.silu(torch.einsum("nd,ehd->neh", x, self.up))
        out = [F.linear(hidden[:, e], self.down[e]) for e in range(len(self.down))]
        return x + torch.einsum("ne,end->nd", weights, torch.stack(out))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.moe, self.head = nn.Linear(6, 4), Mixture(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.moe(self.stem(x)))


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().eval()


def batches(count: int = 2, samples: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(samples, 6, generator=generator) for _ in range(count)]


def moe_workload(model: nn.Module, data: list[torch.Tensor], **changes: object) -> Workload:
    keys = {"key": model_digest(model), "batch_keys": batches_digest(tuple(data))}
    return workload(model, data, TEXTS, **(keys | changes))


def mixtral(implementation: str = "grouped_mm") -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    return model


def words(count: int, samples: int = 3, length: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    shape = (samples, length)
    return [{"input_ids": torch.randint(0, 32, shape, generator=generator)} for _ in range(count)]


def experts_of(graph: LayerGraph) -> dict[str, int]:
    return {la.name: la.macs for la in graph.layers if la.kind == "experts"}


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


# --- scored ----------------------------------------------------------------------------------


def on_parameters(of: Workload, head: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the change of head(output) to first order for each cell and sample of batch 0.

    By forward differentiation at the parameters, one sample and cell at a time.
    """
    rows = []
    for unit, scheme in of.cells:
        layer = of.graph.by_name[unit]
        own = of.model.get_parameter(layer.weight_id).detach()
        flat = own.flatten(0, -2)
        delta = of.quantizer.fake_quantize("", flat, scheme.weights).reshape(own.shape) - own
        changes = []
        for sample in of.calibration[0]:

            def output(weight: torch.Tensor) -> torch.Tensor:
                given = {layer.weight_id: weight}  # noqa: B023
                return head(torch.func.functional_call(of.model, given, (sample[None],)))  # noqa: B023

            changes.append(torch.autograd.functional.jvp(output, (own,), (delta,))[1].flatten())
        rows.append(torch.stack(changes))
    return torch.stack(rows).detach().double()


def fisher_root(output: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return S^T of the KL divergence at one sample's output."""
    p = output.softmax(-1)
    return lambda change: p.sqrt() * (change - (p * change).sum(-1, keepdim=True))


def exact_changes(of: Workload) -> torch.Tensor:
    """Return S^T J dW of every cell and sample of batch 0, (cells, samples, outputs)."""
    moved = on_parameters(of, lambda z: z)
    with torch.no_grad():
        roots = [fisher_root(of.model(x[None])) for x in of.calibration[0]]
    return torch.stack([root(moved[:, n]) for n, root in enumerate(roots)], 1).double()


def test_scores_and_pairs_agree_with_explicit_jacobians() -> None:
    of = moe_workload(network(), batches(1), num_probes=600)
    u = responses_of_batch(of, 0).u.astype(np.float64)
    exact = exact_changes(of)
    for n in range(u.shape[1]):
        products = np.einsum("ik,jk->ijk", u[:, n], u[:, n])
        truth = (exact[:, n] @ exact[:, n].T).numpy()
        error = products.std(axis=2, ddof=1) / math.sqrt(u.shape[2])
        assert (np.abs(products.mean(axis=2) - truth) <= 5 * error + 1e-9).all()
    of_experts = [i for i, (unit, s) in enumerate(of.cells) if "." in unit and str(s) != "fp32"]
    assert np.square(u[of_experts]).mean(axis=2).min() > 0


def test_experts_are_scored_one_sample_at_a_time_however_batches_are_cut() -> None:
    model, (data,) = network(), batches(1, 6)
    whole = moe_workload(model, [data])
    assert [part.samples for part in parts(whole, 0, 2)] == [1] * 6
    u = responses_of_batch(whole, 0).u
    cut = moe_workload(model, [data[:2], data[2:]])
    together = np.concatenate([responses_of_batch(cut, n).u for n in range(2)], axis=1)
    np.testing.assert_allclose(together, u, rtol=1e-4, atol=1e-7)


def test_one_parameter_in_two_modules_is_one_layer_that_counts_both_uses() -> None:
    class Tied(Network):
        def __init__(self) -> None:
            super().__init__()
            self.second = Mixture()
            self.second.up = self.moe.up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.moe(self.stem(x))))

    torch.manual_seed(3)
    model = Tied().eval()
    of = moe_workload(model, batches(1), num_probes=400)
    assert of.graph.by_name["moe.up"].calls == 2
    assert "second.up" not in of.graph.by_name
    squares = np.square(responses_of_batch(of, 0).u.astype(np.float64))
    error = squares.std(axis=2, ddof=1) / math.sqrt(squares.shape[2])
    truth = exact_changes(of).square().sum(2).numpy()
    assert (np.abs(squares.mean(axis=2) - truth) <= 5 * error + 1e-9).all()
    with quantized(model, {"moe.up": parse_scheme("int2")}):
        assert model.second.up is model.moe.up


def test_around_a_quantized_network_slopes_are_those_of_the_divergence() -> None:
    model = network().double()
    data = [batch.double() for batch in batches(1)]
    near = workload(model, data, ("int3", "int8t", "int8"))
    fine, moved = near.cells.schemes[0][2], near.cells.schemes[0][1]
    base = Allocation(dict.fromkeys(near.cells.units, fine))
    found = responses_of_batch(near, 0, base)
    with torch.no_grad():
        original = model(data[0])

        def divergence(allocation: Allocation) -> torch.Tensor:
            with quantized(model, near.layer_schemes(allocation)):
                return near.divergence.between(original, model(data[0]))

        for unit in ("moe.up", "moe.down"):
            number = near.cells.index((unit, moved))
            change = (divergence(Allocation({**base, unit: moved})) - divergence(base)).numpy()
            curved = 0.5 * np.square(found.u[number]).mean(axis=1)
            np.testing.assert_allclose(
                found.g[number] + curved, change, atol=3 * curved.max() + 1e-9
            )
            assert not found.g[near.cells.index((unit, fine))].any()


def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, batch[:, :3].argmax(1))


@pytest.mark.filterwarnings("ignore:hessian_.* is negative")  # so is this network's curvature
@pytest.mark.parametrize("name", METRICS)
def test_every_metric_scores_experts_or_says_what_to_use(name: str) -> None:
    model = network()
    model.moe.down.requires_grad_(False)  # must come back so
    of = moe_workload(model, batches(), loss=loss)
    scores = metric_contract(get_metric(name), of)
    assert (scores is None) == (name in REFUSED)
    if scores is None:
        with pytest.raises(InvalidInputError, match=r"'moe.up' are a parameter .* 'kl', or leave"):
            get_metric(name).tasks(of)
        outside = build_graph(of.model, of.calibration[0], skip=["moe.up", "moe.down"])
        names = tuple(unit.name for unit in outside.units)
        cells = mpq.Cells(units=names, schemes=of.cells.schemes[: len(names)])
        assert (
            metric_contract(
                get_metric(name),
                moe_workload(of.model, batches(), loss=loss, graph=outside, cells=cells),
            )
            is not None
        )
        return
    lossy = [i for i, (_, scheme) in enumerate(of.cells) if str(scheme) != "fp32"]
    assert (scores.sensitivity.values[lossy] != 0).all()


def of_metric(name: str, of: Workload) -> np.ndarray:
    metric = get_metric(name)
    partials = [metric.run(of, task) for task in metric.tasks(of)]
    return metric.combine(of.cells, partials).sensitivity.values


def sample_gradients(of: Workload, unit: str) -> torch.Tensor:
    """Return the gradient of each sample's loss with respect to a weight."""
    weight = of.model.get_parameter(of.graph.by_name[unit].weight_id)
    found = [
        torch.autograd.grad(loss(of.model(x[None]), x[None]), weight)[0]
        for batch in of.calibration
        for x in batch
    ]
    return torch.stack(found).double()


def test_first_order_metrics_equal_gradients_sample_by_sample() -> None:
    of = moe_workload(network(), batches(), loss=loss)
    taylor, fisher = of_metric("taylor", of), of_metric("fisher", of)
    for number, (unit, scheme) in enumerate(of.cells):
        gradients = sample_gradients(of, unit)
        own = of.model.get_parameter(of.graph.by_name[unit].weight_id).detach()
        flat = of.quantizer.fake_quantize("", own.flatten(0, -2), scheme.weights)
        delta = (flat.reshape(own.shape) - own).double()
        inner = (gradients * delta).flatten(1).sum(1).abs().mean()
        weighed = (gradients.square().mean(0) * delta.square()).sum()
        assert taylor[number] == pytest.approx(float(inner), rel=1e-4, abs=1e-9)
        assert fisher[number] == pytest.approx(float(weighed), rel=1e-4, abs=1e-9)


def test_gauss_newton_traces_are_those_of_explicit_jacobians() -> None:
    of = moe_workload(network(), batches(1))
    found = of_metric("gauss_newton_trace", of)
    for number, (unit, scheme) in enumerate(of.cells):
        layer = of.graph.by_name[unit]
        own = of.model.get_parameter(layer.weight_id).detach()
        traces = []
        for x in of.calibration[0]:

            def output(weight: torch.Tensor) -> torch.Tensor:
                given = {layer.weight_id: weight}  # noqa: B023
                return torch.func.functional_call(of.model, given, (x[None],))[0]  # noqa: B023

            jacobian = torch.func.jacrev(output)(own).detach().flatten(1)
            root = fisher_root(output(own).detach())
            traces.append(sum(float(root(column).square().sum()) for column in jacobian.T))
        flat = own.flatten(0, -2)
        squared = (of.quantizer.fake_quantize("", flat, scheme.weights) - flat).square().sum()
        expected = np.mean(traces) / own.numel() * float(squared)
        assert found[number] == pytest.approx(expected, rel=1e-4, abs=1e-12)


class Elsewhere(nn.Module):
    """Reads the experts of a module that it never calls, after one that it does call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.holder, self.last = nn.Linear(6, 4), Mixture(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.linear(self.first(x), self.holder.up[1]))


@pytest.mark.parametrize("make", [network, Elsewhere])
def test_one_cell_at_a_time_is_what_whole_passes_measure(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    of = moe_workload(make().eval(), batches())
    found = of_metric("kl", of)
    with torch.no_grad():
        for number, (unit, scheme) in enumerate(of.cells):
            per_sample = []
            for batch in of.calibration:
                original = of.model(batch)
                with quantized(of.model, {unit: scheme}):
                    changed = of.model(batch)
                per_sample.append(OutputDivergence("kl").between(original, changed))
            mean = float(torch.cat(per_sample).mean())
            assert found[number] == pytest.approx(mean, rel=1e-12)


def test_what_precedes_the_experts_is_not_run_again_for_them() -> None:
    runs: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(len(x))
            return super().forward(x)

    model = network()
    model.stem = Counted(6, 4)
    of = moe_workload(model, batches(1))
    runs.clear()
    of_metric("kl", of)
    lossy_stem = sum(scheme.weights.bits < 32 for scheme in of.cells.schemes[0])
    others = sum(str(scheme) != "fp32" for _, scheme in of.cells) - lossy_stem
    assert lossy_stem < sum(size > 1 for size in runs) < lossy_stem + others


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_routed_experts_of_transformers_are_scored(implementation: str) -> None:
    """Scores of 8-bit cells are the divergences that they really cause, to second order."""
    model = mixtral(implementation)
    data = words(1, 2)
    of = workload(model, data, ("int8", "int7"), num_probes=200, batch_keys=("a",))
    u = responses_of_batch(of, 0).u.astype(np.float64)
    predicted = 0.5 * np.square(u).mean(axis=2)
    error = 0.5 * np.square(u).std(axis=2, ddof=1) / math.sqrt(u.shape[2])
    model.set_experts_implementation("eager")  # the others take no float64
    double = model.double()
    with torch.no_grad():
        original = double(**data[0]).logits
        for number, (unit, scheme) in enumerate(of.cells):
            if "experts" in unit:
                with quantized(double, {unit: scheme}):
                    changed = double(**data[0]).logits
                measured = of.divergence.between(original, changed).numpy()
                off = np.abs(predicted[number] - measured)
                assert (off <= 5 * error[number] + 0.1 * measured + 1e-9).all()


def test_workers_get_experts_and_find_the_same() -> None:
    of = moe_workload(network(), batches())
    travelled = pickle.loads(pickle.dumps(ship(of))).unpack()
    assert model_digest(travelled.model) == model_digest(of.model)
    for n in range(2):
        found, own = responses_of_batch(travelled, n), responses_of_batch(of, n)
        assert np.array_equal(found.u, own.u)


def test_changed_experts_change_the_keys() -> None:
    model = network()
    keys = [model_digest(model)]
    with torch.no_grad():
        model.moe.up[2, 0, 0] += 1e-3
    assert model_digest(model) not in keys


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
    spec = JobSpec(model="m", calibration="c", budgets=("memory <= 50%",))
    offered = Hardware(spec, [], store, Silent()).schemes(graph.by_name["weight"])
    assert {str(scheme) for scheme in offered} == expected
    timed = Hardware(spec, [BudgetText.parse("latency <= 1 s")], store, Silent())
    (kept,) = timed.schemes(graph.by_name["weight"])
    assert str(kept) == graph.by_name["weight"].native_family
    assert graph.by_name["weight"].native_family == {2: "bf16", 4: "fp32"}[dtype.itemsize]
