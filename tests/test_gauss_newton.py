"""The response sketch against explicit Jacobians, and on awkward models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from mpq.core.formats import Scheme, parse_scheme
from mpq.core.problem import Allocation
from mpq.core.tables import Cells
from mpq.nn.batches import Batch
from mpq.nn.divergence import Kind, OutputDivergence
from mpq.nn.fingerprint import batches_digest, model_digest
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating, quantized
from mpq.nn.workload import Workload
from sensitivity.calls import parts
from sensitivity.gauss_newton import GaussNewton
from sensitivity.responses import responses_of_batch

SCHEMES = tuple(map(parse_scheme, ("int2", "int4g2a", "int3:int4", "fp32")))


def make_workload(
    model: nn.Module,
    batches: Sequence[Batch],
    kind: Kind = "kl",
    probes: int = 2,
    schemes: tuple[Scheme, ...] = SCHEMES,
    embeddings: bool = False,
) -> Workload:
    graph = build_graph(model, batches[0], embeddings=embeddings)
    return Workload(
        model=model,
        graph=graph,
        cells=Cells(
            units=tuple(u.name for u in graph.units), schemes=(schemes,) * len(graph.units)
        ),
        calibration=tuple(batches),
        held_out=(),
        divergence=OutputDivergence(kind),
        num_probes=probes,
        key=model_digest(model),
        batch_keys=batches_digest(tuple(batches)),
    )


def responses(workload: Workload) -> np.ndarray:
    metric = GaussNewton()
    partials = [metric.run(workload, task) for task in metric.tasks(workload)]
    scores = metric.combine(workload.cells, partials)
    assert scores.responses is not None
    return scores.responses.vectors.astype(np.float64)


def exact_changes(workload: Workload, kind: Kind) -> torch.Tensor:
    """Return S^T J d of every cell and sample by explicit Jacobians, (cells, samples, outputs).

    d is the change of the layer's output on the original network's own input of the layer.
    """
    model, batch = workload.model, workload.calibration[0]
    modules = dict(model.named_modules())
    rows = []
    with evaluating(model):
        for unit, scheme in workload.cells:
            (layer,) = next(u.layers for u in workload.graph.units if u.name == unit)
            per_sample = []
            for n in range(len(batch)):
                x = batch[n : n + 1]
                seen: dict[str, torch.Tensor] = {}

                def keep(_: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
                    seen["in"], seen["out"] = args[0].detach(), out.detach()  # noqa: B023

                handle = modules[layer].register_forward_hook(keep)
                output = model(x)
                handle.remove()
                with quantized(model, {layer: scheme}):
                    changed = modules[layer](seen["in"])
                change = (changed - seen["out"]).detach()

                def to_head(delta: torch.Tensor) -> torch.Tensor:
                    hook = modules[layer].register_forward_hook(lambda m, a, out: out + delta)  # noqa: B023
                    head = OutputDivergence(kind).head(model(x))  # noqa: B023
                    hook.remove()
                    return head

                moved = torch.autograd.functional.jvp(to_head, torch.zeros_like(change), change)[1]
                head = OutputDivergence(kind).head(output).detach()
                if kind == "kl":
                    p = head.softmax(-1)
                    moved = p.sqrt() * (moved - (p * moved).sum(-1, keepdim=True))
                if kind == "mse":
                    moved = moved * math.sqrt(2 / head.numel())
                per_sample.append(moved.flatten())
            rows.append(torch.stack(per_sample))
    return torch.stack(rows).double()


def small_cnn(inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(4, 4, 3, groups=2, stride=2),
        nn.ReLU(inplace=inplace),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(2 * 2 * 2, 3),
    ).eval()


@pytest.mark.parametrize("kind", ["kl", "cosine", "mse"])
def test_scores_and_pairs_agree_with_explicit_jacobians(kind: Kind) -> None:
    workload = make_workload(small_cnn(), [torch.randn(3, 2, 4, 4)], kind, probes=600)
    u = responses(workload)
    exact = exact_changes(workload, kind)
    # every pair of cells, cells with themselves included, within its own error over the probes
    for n in range(u.shape[1]):
        products = np.einsum("ik,jk->ijk", u[:, n], u[:, n])
        truth = (exact[:, n] @ exact[:, n].T).numpy()
        error = products.std(axis=2, ddof=1) / math.sqrt(u.shape[2])
        off = np.abs(products.mean(axis=2) - truth)
        assert (off <= 5 * error + 1e-9).all()


def test_in_place_activations_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    plain = small_cnn()
    in_place = small_cnn(inplace=True)
    in_place.load_state_dict(plain.state_dict())
    batch = [torch.randn(3, 2, 4, 4)]
    np.testing.assert_allclose(
        responses(make_workload(plain, batch)), responses(make_workload(in_place, batch)), rtol=1e-5
    )


def test_a_layer_called_twice_sums_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.shared(self.shared(x).tanh()))

    class Unrolled(nn.Module):
        def __init__(self, source: Twice) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), source.head
            self.first.load_state_dict(source.shared.state_dict())
            self.second.load_state_dict(source.shared.state_dict())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x).tanh()))

    twice = Twice()
    batch = [torch.randn(4, 3)]
    schemes = (parse_scheme("int2"), parse_scheme("int4"))
    together = responses(make_workload(twice, batch, schemes=schemes))
    apart = responses(make_workload(Unrolled(twice), batch, schemes=schemes))
    np.testing.assert_allclose(together[:2], apart[:2] + apart[2:4], rtol=1e-4, atol=1e-7)


def test_a_tied_embedding_moves_with_its_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(ids).mean(1))

    model = Tied()
    batch = [torch.randint(0, 5, (64, 3))]
    scheme = (parse_scheme("int8"),)
    workload = make_workload(model, batch, schemes=scheme, probes=64, embeddings=True)
    u = responses(workload)
    predicted = 0.5 * np.square(u).mean()
    with torch.no_grad(), quantized(model, workload.layer_schemes({"{embedding,head}": scheme[0]})):  # type: ignore[arg-type]
        changed = model(batch[0])
    with torch.no_grad():
        measured = OutputDivergence("kl").between(model(batch[0]), changed).mean()
    error = 0.5 * np.square(u).mean(axis=2).std() / math.sqrt(u.shape[1])
    assert abs(predicted - float(measured)) < 4 * error + 0.1 * float(measured)


def test_a_layer_that_does_not_reach_the_output_scores_zero() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            return self.used(x)

    workload = make_workload(Unused(), [torch.randn(4, 3)], schemes=(parse_scheme("int2"),))
    u = responses(workload)
    by_unit = dict(zip(workload.cells.units, u, strict=True))
    assert not by_unit["unused"].any()
    assert by_unit["used"].any()


def test_layers_that_mix_samples_are_scored_one_sample_at_a_time() -> None:
    class Positions(nn.Module):
        """A layer whose first axis is not samples: position embeddings shared by the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(2, 3)
            self.head = nn.Linear(3, 2)
            self.register_buffer("positions", torch.randn(1, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + self.project(self.positions))

    torch.manual_seed(1)
    model = Positions()
    workload = make_workload(
        model, [torch.randn(3, 3)], probes=400, schemes=(parse_scheme("int2"),)
    )
    u = responses(workload)
    exact = exact_changes(workload, "kl")
    for cell in range(len(u)):
        squares = np.square(u[cell])
        error = squares.std(axis=1, ddof=1) / math.sqrt(squares.shape[1])
        truth = exact[cell].square().sum(1).numpy()
        assert (np.abs(squares.mean(axis=1) - truth) <= 5 * error + 1e-9).all()


def test_the_model_is_only_borrowed() -> None:
    model = small_cnn().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    responses(make_workload(model, [torch.randn(3, 2, 4, 4)]))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_same_seed_same_numbers_and_keys_follow_the_inputs() -> None:
    model, batch = small_cnn(), [torch.randn(3, 2, 4, 4)]
    first, second = make_workload(model, batch), make_workload(model, batch)
    assert np.array_equal(responses(first), responses(second))
    metric = GaussNewton()
    (key,) = [task.key for task in metric.tasks(first)]
    assert key == metric.tasks(second)[0].key
    with torch.no_grad():
        next(iter(model.parameters()))[0] += 1e-3
    assert key != metric.tasks(make_workload(model, batch))[0].key


def test_around_a_quantized_network_the_slopes_are_those_of_the_divergence() -> None:
    """Compare g of a tiny change of each layer with a finite difference of the divergence."""
    torch.manual_seed(0)
    model = small_cnn().double()
    batch = torch.randn(2, 2, 4, 4).double()
    near = (parse_scheme("int3"), parse_scheme("int8t"), parse_scheme("int8"))
    workload = make_workload(model, [batch], schemes=near)
    base = Allocation(dict.fromkeys(workload.cells.units, near[2]))
    found = responses_of_batch(workload, 0, base)
    with torch.no_grad():
        original = model(batch)

        def divergence(allocation: Allocation) -> torch.Tensor:
            with quantized(model, workload.layer_schemes(allocation)):
                return workload.divergence.between(original, model(batch))

        for number, (unit, scheme) in enumerate(workload.cells):
            if scheme == near[2]:
                assert not found.g[number].any()
                assert not found.u[number].any()
            elif scheme == near[1]:
                moved = divergence(Allocation({**base, unit: scheme})) - divergence(base)
                curved = 0.5 * np.square(found.u[number]).mean(axis=1)
                np.testing.assert_allclose(
                    found.g[number] + curved, moved.numpy(), atol=3 * curved.max() + 1e-9
                )


def test_around_quantized_activations_gradients_pass_the_rounding() -> None:
    torch.manual_seed(0)
    model = small_cnn()
    batch = torch.randn(4, 2, 4, 4)
    plain, rounded, coarse = map(parse_scheme, ("int8", "int8:int8", "int3"))
    workload = make_workload(model, [batch], schemes=(plain, rounded, coarse), probes=64)
    units = workload.cells.units
    slopes = []
    for base in (plain, rounded):
        found = responses_of_batch(workload, 0, Allocation(dict.fromkeys(units, base)))
        slopes.append(np.square(found.u).mean(axis=(1, 2)))
    coarse_cells = [workload.cells.index((unit, coarse)) for unit in units]
    # 8-bit activations hardly move the network, so coarse weights matter as much as without them
    ratio = slopes[1][coarse_cells] / slopes[0][coarse_cells]
    assert (ratio > 1 / 4).all()
    assert (ratio < 4).all()


@pytest.mark.parametrize("positions", [1, 20])
def test_weight_gradients_and_replays_give_the_same_inner_products(positions: int) -> None:
    from sensitivity.changes import Change

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    workload = make_workload(model, [torch.randn(3, positions, 6)], "mse")
    layer = workload.graph.layers[0]
    change = Change(workload, layer, model[0], SCHEMES, None)
    inputs, gradient = torch.randn(3, positions, 6), torch.randn(2, 3, positions, 5)
    changed = [0, 1]
    ghost = change._ghost(inputs, gradient, 3, changed)
    for place, i in enumerate(changed):
        delta = nn.functional.linear(inputs, change._stored[i] - layer_weight(model))
        slow = torch.einsum("knto,nto->nk", gradient, delta)
        torch.testing.assert_close(ghost[place], slow, rtol=1e-4, atol=1e-5)


def layer_weight(model: nn.Sequential) -> torch.Tensor:
    weight = model[0].weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


def test_layers_that_read_time_first_are_scored_sample_by_sample() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x.transpose(0, 1)).tanh()).mean(0)

    class BatchFirst(TimeFirst):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x).tanh()).mean(1)

    torch.manual_seed(0)
    first, second = TimeFirst(), BatchFirst()
    second.load_state_dict(first.state_dict())
    schemes = (parse_scheme("int2"), parse_scheme("int3:int4"))
    batch = [torch.randn(4, 8, 3)]  # 4 samples divide 8 steps: shapes alone would not tell
    scores = [
        np.square(responses(make_workload(model, batch, probes=200, schemes=schemes))).mean(
            axis=(1, 2)
        )
        for model in (first, second)
    ]
    lossy = scores[1] > 0
    np.testing.assert_allclose(scores[0][lossy], scores[1][lossy], rtol=0.5)


@pytest.mark.parametrize("kind", ["kl", "cosine", "mse"])
def test_however_the_samples_are_cut_into_batches_the_numbers_are_the_same(kind: Kind) -> None:
    torch.manual_seed(0)
    model, samples = small_cnn(), torch.randn(6, 2, 4, 4)
    found = [
        responses(make_workload(model, torch.split(samples, sizes), kind))
        for sizes in ([6], [2, 4], [1, 2, 3])
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-7)


def test_a_batch_that_is_too_large_is_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    workload = make_workload(small_cnn(), [torch.randn(7, 2, 4, 4)])
    whole = responses(workload)
    monkeypatch.setattr("sensitivity.calls._HELD_BYTES", 5_000)
    sizes = [part.samples for part in parts(workload, 0, 2)]
    assert sum(sizes) == 7
    assert 1 < len(sizes) < 7
    np.testing.assert_allclose(responses(workload), whole, rtol=1e-4, atol=1e-7)
