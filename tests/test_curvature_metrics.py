"""Metrics of curvature against exact Hessians, Gauss-Newton matrices and per-sample gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.tables import SensitivityTable
from mpq.nn.divergence import Kind, OutputDivergence
from mpq.nn.fingerprint import batches_digest, model_digest
from mpq.nn.patch import evaluating, frozen
from mpq.nn.quantizers import fake_quantize_activation
from mpq.nn.workload import Workload
from sensitivity import get_metric
from tests.builders import Block, Decoder, Recurrent, schemes, tokens, workload
from tests.oracles import exact_hessian, slow_root

WEIGHTS = ("int2", "int4t", "fp32")
WEIGHTS_ONLY = ("fisher", "hessian_top", "hessian_quadratic")
METRICS = ("gauss_newton_trace", "hessian_trace", *WEIGHTS_ONLY)


def made(
    model: nn.Module, batches: Sequence[Any], texts: tuple[str, ...] = WEIGHTS, **changes: Any
) -> Workload:
    keys = {"key": model_digest(model), "batch_keys": batches_digest(tuple(batches))}
    return workload(model, batches, texts, **(keys | changes))


def partials(name: str, of: Workload) -> list[Any]:
    metric = get_metric(name)
    return [metric.run(of, task) for task in metric.tasks(of)]


def table(name: str, of: Workload) -> SensitivityTable:
    return get_metric(name).combine(of.cells, partials(name, of)).sensitivity


def change_of_weight(of: Workload, unit: str, scheme: Any) -> dict[str, torch.Tensor]:
    """Return Q(W) - W of every stored weight of a unit, by the name of the parameter."""
    (layers,) = (of.graph.stored_layers(u) for u in of.graph.units if u.name == unit)
    parameters = dict(of.model.named_parameters())
    found = {}
    for layer in layers:
        weight = parameters[layer.weight_id].detach()
        stored = of.quantizer.fake_quantize(
            layer.weight_id, weight, scheme.weights, layer.channel_axis
        )
        found[layer.weight_id] = stored - weight
    return found


def small_cnn() -> nn.Module:
    """Return a network that is piecewise linear in each weight, with batch norm that did learn."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 3, stride=2, groups=1, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(2, 2, 2),
        nn.Flatten(),
        nn.Linear(18, 3),
    ).double()
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
    return model.eval()


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def with_labels(samples: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, *shape).double(), torch.randint(0, 3, (samples,))


def cross_entropy(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(output, batch[1])


# --- gauss_newton_trace ----------------------------------------------------------------------


def root_jacobian(
    of: Workload, x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], at: Any
) -> torch.Tensor:
    """Return S^T J of one sample, J the Jacobian of h(z) with respect to `at`."""
    head = of.divergence.head(of.model(x))[0].detach()
    jacobian = torch.func.jacrev(function)(at.detach())
    root = slow_root(of.divergence.kind, head.reshape(-1, head.shape[-1]))
    return root @ jacobian.reshape(head.numel(), at.numel())


def slow_gauss_newton_omega(of: Workload) -> np.ndarray:
    """Return omega of each cell and sample by explicit Jacobians; every unit is one layer."""
    parameters = dict(of.model.named_parameters())
    modules = dict(of.model.named_modules())
    found = []
    with evaluating(of.model), frozen(of.model):
        for unit, scheme in of.cells:
            ((name, delta),) = change_of_weight(of, unit, scheme).items()
            row = []
            for x in of.calibration[0].split(1):

                def from_weight(w: torch.Tensor) -> torch.Tensor:
                    return of.divergence.head(functional_call(of.model, {name: w}, (x,)))[0]  # noqa: B023

                trace = root_jacobian(of, x, from_weight, parameters[name]).square().sum()
                value = float(trace * delta.square().sum() / delta.numel())
                seen: list[torch.Tensor] = []
                handle = modules[unit].register_forward_pre_hook(lambda _, a: seen.append(a[0]))  # noqa: B023
                of.model(x)
                handle.remove()
                changed = fake_quantize_activation(seen[0], scheme.activations)

                def from_input(a: torch.Tensor) -> torch.Tensor:
                    handle = modules[unit].register_forward_pre_hook(lambda _, __: (a,))  # noqa: B023
                    head = of.divergence.head(of.model(x))[0]  # noqa: B023
                    handle.remove()
                    return head

                trace = root_jacobian(of, x, from_input, seen[0]).square().sum()
                value += float(trace * (changed - seen[0]).square().sum() / seen[0].numel())
                row.append(value)
            found.append(row)
    return np.array(found)


@pytest.mark.parametrize("kind", ["kl", "cosine", "mse"])
def test_the_exact_trace_is_that_of_explicit_jacobians(kind: Kind) -> None:
    of = made(
        small_cnn(),
        [torch.randn(4, 2, 5, 5).double()],
        ("int2", "int3:int4", "fp32:int3", "fp32"),
        divergence=OutputDivergence(kind),
    )
    slow = slow_gauss_newton_omega(of)
    (found,) = partials("gauss_newton_trace", of)
    np.testing.assert_allclose(found["scores"], slow, rtol=1e-9, atol=1e-15)
    scores = table("gauss_newton_trace", of)
    np.testing.assert_allclose(scores.values, slow.mean(1), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(scores.stderr, slow.std(1, ddof=1) / 2, rtol=1e-9, atol=1e-15)


def test_of_a_piecewise_linear_network_it_is_the_hessian_trace_of_the_loss() -> None:
    model = small_cnn()
    batch = with_labels(6, 2, 5, 5)
    of = made(model, [batch])
    values = table("gauss_newton_trace", of)
    for unit, scheme in of.cells:
        ((name, delta),) = change_of_weight(of, unit, scheme).items()

        def loss(weight: torch.Tensor) -> torch.Tensor:
            return cross_entropy(functional_call(model, {name: weight}, (batch[0],)), batch)  # noqa: B023

        weight = dict(model.named_parameters())[name]
        exact = exact_hessian(loss, weight).trace() / weight.numel() * delta.square().sum()
        assert values[unit, scheme] == pytest.approx(float(exact), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("kind", ["kl", "cosine", "mse"])
def test_probes_estimate_the_exact_trace(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    of = made(
        small_cnn(),
        [torch.randn(4, 2, 5, 5).double(), torch.randn(300, 2, 5, 5).double()],
        ("int2", "int3:int4"),
        divergence=OutputDivergence(kind),
    )
    exact = np.concatenate([p["scores"] for p in partials("gauss_newton_trace", of)], axis=1)
    monkeypatch.setattr("sensitivity.gauss_newton_trace._MOST_COLUMNS", 2)
    probed = np.concatenate([p["scores"] for p in partials("gauss_newton_trace", of)], axis=1)
    off = probed - exact
    error = off.std(1, ddof=1) / math.sqrt(off.shape[1])
    assert (error > 0).all()
    rounding = 1e-12 * exact.mean(1)  # of squared error probes of the last layer are exact
    assert (np.abs(off.mean(1)) <= 4 * error + rounding).all()


def test_a_sequence_with_a_mask_is_averaged_over_its_real_positions() -> None:
    torch.manual_seed(0)
    model = Decoder(words=4).double()
    batch = {key: value % 4 if key == "input_ids" else value for key, value in tokens(3, 5).items()}
    of = made(model, [batch], ("int3", "int8"))
    exact = table("gauss_newton_trace", of).values  # 20 outputs a sample: all columns
    for number, (unit, scheme) in enumerate(of.cells):
        total = 0.0
        for name, delta in change_of_weight(of, unit, scheme).items():
            weight = dict(model.named_parameters())[name]
            with torch.no_grad():
                original = model(**batch)["logits"]

            def divergence(weight: torch.Tensor) -> torch.Tensor:
                output = functional_call(model, {name: weight}, (), batch)["logits"]  # noqa: B023
                mask = batch["attention_mask"]
                return of.divergence.between(original, output, mask).mean()  # noqa: B023

            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                exactly = exact_hessian(divergence, weight).trace() / weight.numel()
            total += float(exactly * delta.square().sum())
        assert exact[number] == pytest.approx(total, rel=1e-6)


# --- fisher ----------------------------------------------------------------------------------


def test_fisher_squares_the_gradient_of_each_sample_alone() -> None:
    model = small_cnn()
    batches = [with_labels(5, 2, 5, 5), with_labels(3, 2, 5, 5)]
    of = made(model, batches, loss=cross_entropy)
    scores = table("fisher", of)
    for unit, scheme in of.cells:
        ((name, delta),) = change_of_weight(of, unit, scheme).items()
        weight = dict(model.named_parameters())[name]
        slow = []
        for images, labels in batches:
            for n in range(len(images)):
                loss = nn.functional.cross_entropy(model(images[n : n + 1]), labels[n : n + 1])
                (gradient,) = torch.autograd.grad(loss, weight)
                slow.append(float((gradient.square() * delta.square()).sum()))
        assert scores[unit, scheme] == pytest.approx(np.mean(slow), rel=1e-9, abs=1e-15)
        error = scores.stderr[of.cells.index((unit, scheme))]
        assert error == pytest.approx(np.std(slow, ddof=1) / math.sqrt(8), rel=1e-9, abs=1e-15)


def test_fisher_without_a_loss_is_the_diagonal_of_the_gauss_newton_matrix() -> None:
    model = small_mlp()
    samples = torch.randn(400, 4).double()
    of = made(model, [samples], ("int2", "int4"), num_probes=4)
    found = partials("fisher", of)[0]["scores"]
    parameters = dict(model.named_parameters())
    for number, (unit, scheme) in enumerate(of.cells):
        ((name, delta),) = change_of_weight(of, unit, scheme).items()
        exact = []
        for x in samples.split(1):

            def from_weight(w: torch.Tensor) -> torch.Tensor:
                return functional_call(model, {name: w}, (x,))[0]  # noqa: B023

            rows = root_jacobian(of, x, from_weight, parameters[name])
            exact.append(float(rows.detach().square().sum(0) @ delta.square().flatten()))
        off = found[number] - np.array(exact)
        assert abs(off.mean()) <= 4 * off.std(ddof=1) / math.sqrt(len(off))


# --- hessian_quadratic -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::mpq.core.errors.MpqWarning")  # an untrained network
@pytest.mark.parametrize("with_loss", [True, False])
def test_the_quadratic_form_is_that_of_the_exact_hessian(with_loss: bool) -> None:
    torch.manual_seed(3)
    model = small_mlp()
    batches = [with_labels(6, 4), with_labels(3, 4), with_labels(3, 4)]
    of = made(model, batches, loss=cross_entropy if with_loss else None)
    scores = table("hessian_quadratic", of)
    for unit, scheme in of.cells:
        ((name, delta),) = change_of_weight(of, unit, scheme).items()
        weight = dict(model.named_parameters())[name]
        forms = []
        for batch in batches:

            def loss(weight: torch.Tensor) -> torch.Tensor:
                output = functional_call(model, {name: weight}, (batch[0],))  # noqa: B023
                if with_loss:
                    return cross_entropy(output, batch)  # noqa: B023
                return of.divergence.between(model(batch[0]).detach(), output).mean()  # noqa: B023

            d = delta.flatten()
            forms.append(float(0.5 * d @ exact_hessian(loss, weight) @ d))
        mean = np.average(forms, weights=[6, 3, 3])
        assert scores[unit, scheme] == pytest.approx(mean, rel=1e-9, abs=1e-15)
        shares = np.array([0.5, 0.25, 0.25])
        spread = math.sqrt(1.5 * float(shares**2 @ (np.array(forms) - mean) ** 2))
        error = scores.stderr[of.cells.index((unit, scheme))]
        assert error == pytest.approx(spread, rel=1e-9, abs=1e-15)


def test_layers_of_a_unit_move_together() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(4).double(), nn.Linear(4, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(x).mean(1))

    torch.manual_seed(0)
    model, x = Attention(), torch.randn(3, 5, 4).double()
    of = made(model, [x], ("int3",))
    fused = next(u.name for u in of.graph.units if len(u.layers) == 3)
    (scheme,) = schemes("int3")
    deltas = change_of_weight(of, fused, scheme)
    weights = {name: dict(model.named_parameters())[name].detach() for name in deltas}

    def along(step: torch.Tensor) -> torch.Tensor:
        moved = {name: weights[name] + step * delta for name, delta in deltas.items()}
        return of.divergence.between(model(x).detach(), functional_call(model, moved, (x,))).mean()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        second = exact_hessian(along, torch.zeros(1, dtype=torch.float64))
    assert table("hessian_quadratic", of)[fused, scheme] == pytest.approx(
        0.5 * float(second), rel=1e-6
    )


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    of = made(model, [torch.randn(4, 3).double()], ("int2",), loss=lambda output, _: output.mean())
    for name in ("hessian_trace", "hessian_quadratic", "hessian_top"):
        assert not table(name, of).values.any()


# --- hessian_top -----------------------------------------------------------------------------


def test_the_top_eigenvalue_is_that_of_the_exact_hessian() -> None:
    torch.manual_seed(3)
    model = small_mlp()
    batches = [with_labels(6, 4), with_labels(3, 4)]
    of = made(model, batches, ("int2",), loss=cross_entropy)
    scores = table("hessian_top", of)
    for number, (unit, scheme) in enumerate(of.cells):
        ((name, delta),) = change_of_weight(of, unit, scheme).items()
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

        def loss(weight: torch.Tensor) -> torch.Tensor:
            output = functional_call(model, {name: weight}, (images,))  # noqa: B023
            return cross_entropy(output, (images, labels))  # noqa: B023

        values = torch.linalg.eigvalsh(exact_hessian(loss, dict(model.named_parameters())[name]))
        top = values[values.abs().argmax()]
        exact = float(top * delta.square().sum())
        assert scores.values[number] == pytest.approx(exact, rel=0.03)
        assert 0 < scores.stderr[number] <= 1.01e-3 * abs(scores.values[number])


# --- all of them -----------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is called twice, one tied to it, and one that does not reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = Recurrent(width=3)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        return self.recurrent(x)


@pytest.mark.parametrize("name", METRICS)
def test_a_weight_that_is_used_three_times_counts_once_and_an_unused_one_not(name: str) -> None:
    torch.manual_seed(5)
    model = Twice().double()
    x = torch.randn(40, 3).double()
    of = made(model, [x], ("int2",), num_probes=40)
    scores = table(name, of)
    assert scores["unused", *schemes("int2")] == 0
    tied = next(u.name for u in of.graph.units if len(u.layers) == 2)
    ((weight, delta),) = change_of_weight(of, tied, *schemes("int2")).items()

    def divergence(value: torch.Tensor) -> torch.Tensor:
        output = functional_call(model, {weight: value}, (x,), tie_weights=True)
        return of.divergence.between(model(x).detach(), output).mean()

    hessian = exact_hessian(divergence, dict(model.named_parameters())[weight])
    squares, flat = delta.square().flatten(), delta.flatten()
    exact = {
        "gauss_newton_trace": hessian.trace() / delta.numel() * squares.sum(),
        "hessian_trace": hessian.trace() / delta.numel() * squares.sum(),
        "fisher": hessian.diagonal() @ squares,
        "hessian_top": torch.linalg.eigvalsh(hessian).abs().max() * squares.sum(),
        "hessian_quadratic": 0.5 * flat @ hessian @ flat,
    }[name]
    random = {"hessian_trace", "fisher"}
    margin = 4 * scores.stderr[of.cells.index((tied, *schemes("int2")))] if name in random else 0
    near = {"hessian_top": 0.03}.get(name, 1e-7)
    assert abs(scores[tied, *schemes("int2")] - float(exact)) <= margin + near * abs(float(exact))


@pytest.mark.parametrize("name", METRICS)
def test_the_model_is_only_borrowed_and_the_numbers_repeat(name: str) -> None:
    model = small_cnn().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    of = made(model, [torch.randn(3, 2, 5, 5).double()])
    first, second = table(name, of), table(name, of)
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.stderr, second.stderr)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", METRICS)
def test_keys_follow_what_the_numbers_depend_on(name: str) -> None:
    batch = with_labels(3, 2, 5, 5)
    of = made(small_cnn(), [batch], loss=cross_entropy)
    others = [
        of,
        replace(of, key="other model"),
        replace(of, batch_keys=("other data",)),
        made(of.model, [batch], ("int2", "int8"), loss=cross_entropy),
    ]
    if name != "gauss_newton_trace":  # which needs no loss
        others.append(replace(of, loss=lambda output, batch: 2 * cross_entropy(output, batch)))
    keys = [{task.key for task in get_metric(name).tasks(other)} for other in others]
    assert len(set.union(*keys)) == sum(map(len, keys))
    assert keys[0] == {task.key for task in get_metric(name).tasks(of)}


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_metrics_of_weights_refuse_activations(name: str) -> None:
    of = made(small_mlp(), [torch.randn(3, 4).double()], ("int8", "int8:int8"))
    with pytest.raises(InvalidInputError, match=f"{name} scores weights only, but int8:int8"):
        get_metric(name).tasks(of)


@pytest.mark.parametrize("name", ["hessian_trace", "hessian_quadratic", "hessian_top"])
def test_negative_curvature_keeps_its_sign_and_is_told(name: str) -> None:
    model = small_mlp()
    of = made(
        model,
        [torch.randn(5, 4).double()],
        ("int2", "int8"),
        loss=lambda output, _: -output.square().mean(),  # a maximum, not a minimum
    )
    with pytest.warns(MpqWarning, match=f"{name} is negative for .* of 2 units.*: .*2"):
        scores = table(name, of)
    assert scores["2", *schemes("int2")] < 0


@pytest.mark.parametrize("name", METRICS)
def test_half_precision_and_padded_sequences_give_finite_scores(name: str) -> None:
    torch.manual_seed(0)
    of = made(Decoder().to(torch.bfloat16), [tokens(), tokens()], ("int3",))
    scores = table(name, of)
    assert (scores.values > 0).all()
    assert np.isfinite(scores.stderr).all()
