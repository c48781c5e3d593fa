"""Metrics of one forward and backward pass against explicit autograd, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme
from mpq.core.tables import Cells, SensitivityTable
from mpq.nn.batches import Batch, call, cut, num_samples
from mpq.nn.divergence import OutputDivergence
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating, quantized
from mpq.nn.workload import Workload
from sensitivity import get_metric
from sensitivity.alone import alone
from sensitivity.calls import Part, probe_seeds
from sensitivity.mixllm import channel_scores
from tests.builders import Decoder, Recurrent, mlp, schemes, tokens

METRICS = ("autoquantize", "taylor", "mixllm")
WEIGHTS = ("int2", "int4a", "fp32")
BOTH = ("int3:int4", "int8:int8", "int4", "fp32")


def loss(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    rows = output.reshape(-1, output.shape[-1])
    return 3 * F.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[1])


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, stride=2),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Flatten(2),
        nn.Conv1d(2, 3, 3),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x.transpose(0, 1)).tanh()).mean(0)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "mlp": (mlp, lambda: torch.randn(4, 6)),
    "images": (images, lambda: torch.randn(3, 2, 4, 4)),
    "tied embedding": (Decoder, lambda: tokens(2, 4)),
    "untied decoder": (lambda: Decoder(tied=False), lambda: tokens(2, 4)),
    "called three times": (lambda: Recurrent(times=3), lambda: torch.randn(3, 4)),
    "time first": (TimeFirst, lambda: torch.randn(3, 5, 3)),
}


def make(name: str, texts: tuple[str, ...] = WEIGHTS, with_loss: bool = True) -> Workload:
    torch.manual_seed(5)
    model, batch = NETS[name][0](), NETS[name][1]()
    graph = build_graph(model, batch, embeddings="embedding" in name)
    samples = num_samples(batch)
    return Workload(
        model=model,
        graph=graph,
        cells=Cells(
            units=tuple(unit.name for unit in graph.units),
            schemes=(schemes(*texts),) * len(graph.units),
        ),
        calibration=(cut(batch, 0, 1), cut(batch, 1, samples)),
        held_out=(),
        divergence=OutputDivergence("kl"),
        loss=loss if with_loss else None,
        num_probes=3,
        key=name,
        batch_keys=("a", "b"),
    )


@dataclass(frozen=True)
class SlowCall:
    """One call of a layer on one sample: its gradients, one for each row, and its change."""

    layer: str
    inputs: torch.Tensor
    gradients: list[torch.Tensor]
    change: torch.Tensor


def slow_calls(of: Workload, scheme: Scheme, unit: int) -> Iterator[list[SlowCall]]:
    """Yield for every sample the calls of a unit's layers, by autograd on that sample alone."""
    modules = dict(of.model.named_modules())
    names = of.graph.units[unit].layers
    first = 0
    for number, batch in enumerate(of.calibration):
        for n in range(num_samples(batch)):
            one = cut(batch, n, n + 1)
            seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

            def keep(
                module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
            ) -> torch.Tensor:
                (name,) = (x for x in names if modules[x] is module)
                output.retain_grad()
                seen.append((name, args[0].detach(), output))  # noqa: B023
                return output + 0

            handles = [modules[name].register_forward_hook(keep) for name in names]
            output = call(of.model, one)
            for handle in handles:
                handle.remove()
            rows: list[list[torch.Tensor]] = []
            for value in values(of, number, one, first, output):
                for _, _, of_call in seen:
                    of_call.grad = None
                value.backward(retain_graph=True)
                rows.append([of_call.grad.clone() for _, _, of_call in seen])  # type: ignore[union-attr]
            yield [
                SlowCall(name, inputs, [row[i] for row in rows], change(of, name, scheme, inputs))
                for i, (name, inputs, _) in enumerate(seen)
            ]
            first += 1


def values(
    of: Workload, number: int, one: Batch, first: int, output: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield what is differentiated: the loss, or <S r, h(z)> of each probe."""
    if of.loss is not None:
        yield of.loss(output, one)
        return
    head = of.divergence.head(output)
    for seed in probe_seeds(of, Part(number, one, first, 1), head):
        yield (seed.detach() * head).sum()


def change(of: Workload, name: str, scheme: Scheme, inputs: torch.Tensor) -> torch.Tensor:
    module = of.model.get_submodule(name)
    with torch.no_grad():
        before = module(inputs)
        with quantized(of.model, {name: scheme}):
            return module(inputs) - before


def slow_table(of: Workload, metric: str) -> np.ndarray:
    """Return (cells, samples)."""
    reduce = {"autoquantize": squares, "taylor": first_order, "mixllm": by_channel}[metric]
    found = []
    with evaluating(of.model):
        for unit, choices in enumerate(of.cells.schemes):
            for scheme in choices:
                calls = slow_calls(of, scheme, unit)
                found.append([reduce(of, of_sample) for of_sample in calls])
    of.model.zero_grad(set_to_none=True)
    return np.array(found)


def squares(of: Workload, calls: list[SlowCall]) -> float:
    total = 0.0
    for one in calls:
        for g in one.gradients:
            total += sum(
                float(a) ** 2 * float(b) ** 2
                for a, b in zip(g.flatten(), one.change.flatten(), strict=True)
            ) / len(one.gradients)
    return total


def first_order(of: Workload, calls: list[SlowCall]) -> float:
    rows = len(calls[0].gradients)
    return (
        sum(
            abs(sum(float((one.gradients[k] * one.change).sum()) for one in calls))
            for k in range(rows)
        )
        / rows
    )


def by_channel(of: Workload, calls: list[SlowCall]) -> float:
    rows = len(calls[0].gradients)
    inner: dict[tuple[int, str, int], float] = {}
    for one in calls:
        layer = of.graph.by_name[one.layer]
        for k in range(rows):
            product = one.gradients[k] * one.change
            for place in np.ndindex(*product.shape):
                if layer.kind == "embedding":
                    channel = int(one.inputs[place[:-1]])
                elif layer.kind == "linear":
                    channel = place[-1]
                else:
                    channel = place[1]
                key = (k, layer.weight_id, channel)
                inner[key] = inner.get(key, 0.0) + float(product[place])
    return sum(abs(s + s * s / 2) for s in inner.values()) / rows


def table(metric: str, of: Workload) -> SensitivityTable:
    made = get_metric(metric)
    return made.combine(of.cells, [made.run(of, task) for task in made.tasks(of)]).sensitivity


@pytest.mark.parametrize("with_loss", [True, False], ids=["loss", "probes"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("metric", METRICS)
def test_weights_agree_with_autograd_sample_by_sample(
    metric: str, name: str, with_loss: bool
) -> None:
    of = make(name, WEIGHTS, with_loss)
    slow = slow_table(of, metric)
    found = table(metric, of)
    np.testing.assert_allclose(found.values, slow.mean(axis=1), rtol=2e-3, atol=1e-7)
    error = slow.std(axis=1, ddof=1) / math.sqrt(slow.shape[1])
    np.testing.assert_allclose(found.stderr, error, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("name", ["mlp", "images", "untied decoder", "called three times"])
@pytest.mark.parametrize("metric", METRICS)
def test_activations_agree_with_autograd_sample_by_sample(metric: str, name: str) -> None:
    of = make(name, BOTH)
    slow = slow_table(of, metric)
    np.testing.assert_allclose(table(metric, of).values, slow.mean(axis=1), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_parts_of_a_batch_give_the_same(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = make("images")
    whole = table(metric, of)
    monkeypatch.setattr("sensitivity.calls._HELD_BYTES", 1)
    parts = table(metric, of)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-4, atol=1e-9)


def test_taylor_is_the_change_of_a_loss_that_is_linear_in_the_network() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5).double()
    graph = build_graph(model, x)
    of = Workload(
        model=model,
        graph=graph,
        cells=Cells(units=("0", "1"), schemes=(schemes(*WEIGHTS),) * 2),
        calibration=(x,),
        held_out=(),
        divergence=OutputDivergence("kl"),
        loss=lambda output, batch: output[:, 0].sum() - 2 * output[:, 1].sum(),
        batch_keys=("a",),
    )
    weigh = torch.tensor([1.0, -2.0, 0.0]).double()
    moved = alone(of, 0, {"moved": lambda o, c, b: ((c - o) @ weigh).abs()})["moved"]
    np.testing.assert_allclose(table("taylor", of).values, moved.mean(axis=1), rtol=1e-5)


def test_autoquantize_without_a_loss_estimates_the_diagonal_of_the_gauss_newton_matrix() -> None:
    torch.manual_seed(2)
    of = replace(make("mlp", ("int2",), with_loss=False), num_probes=8)
    x = torch.cat(list(of.calibration))
    first, act, last = of.model.eval()
    delta = change(of, "0", of.cells.schemes[0][0], x)
    truth = 0.0
    for n in range(len(x)):
        hidden = first(x[n]).detach()
        jacobian = torch.autograd.functional.jacobian(lambda y: last(act(y)), hidden)
        p = last(act(hidden)).softmax(-1).detach()
        fisher = torch.diag(p) - torch.outer(p, p)
        diagonal = torch.diagonal(jacobian.T @ fisher @ jacobian)
        truth += float((diagonal * delta[n].square()).sum()) / len(x)
    draws = [table("autoquantize", replace(of, seed=seed)).values[0] for seed in range(60)]
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - truth) <= 4 * error
    assert error < 0.1 * truth


def test_channels_add_up_to_their_units() -> None:
    of = make("images")
    found = channel_scores(of)
    scores = table("mixllm", of)
    for (unit, scheme), value in zip(of.cells, scores.values, strict=True):
        (layers,) = (u.layers for u in of.graph.units if u.name == unit)
        channels = [found[layer, scheme] for layer in layers if (layer, scheme) in found]
        assert sum(c.sum() for c in channels) == pytest.approx(value, rel=1e-6, abs=1e-12)
        assert bool(channels) == (str(scheme) != "fp32")
    sizes = {layer: len(c) for (layer, _), c in found.items()}
    assert list(sizes.values()) == [4, 4, 2, 3, 3]


def test_channels_of_a_tied_embedding_are_its_tokens() -> None:
    of = make("tied embedding")
    found = channel_scores(of)
    (scheme,) = (s for s in of.cells.schemes[0] if str(s) == "int2")
    assert len(found["embed", scheme]) == 11
    assert ("lm_head", scheme) not in found


def test_a_channel_that_reaches_nothing_scores_zero() -> None:
    of = make("mlp")
    with torch.no_grad():
        of.model[2].weight[:, 3] = 0  # type: ignore[index, union-attr]
    scores = channel_scores(of)["0", of.cells.schemes[0][0]]
    assert scores[3] == 0
    assert np.count_nonzero(scores) > 1


@pytest.mark.parametrize("metric", METRICS)
def test_a_loss_without_gradient_says_what_to_use(metric: str) -> None:
    of = replace(make("mlp"), loss=lambda output, batch: (output.argmax(-1) == 0).float().mean())
    with pytest.raises(InvalidInputError, match=r"no gradient.*metric='loss'"):
        table(metric, of)


@pytest.mark.parametrize("metric", METRICS)
def test_the_model_is_given_back_when_the_loss_fails(metric: str) -> None:
    from tests.contracts import borrowed_state, same_state

    def fails(output: torch.Tensor, batch: Batch) -> torch.Tensor:
        raise ValueError("no labels\nhere")

    of = replace(make("images"), loss=fails)
    of.model.train()
    before = borrowed_state(of.model)
    with pytest.raises(InvalidInputError, match=r"^the loss cannot take .*: no labels$"):
        table(metric, of)
    assert same_state(before, borrowed_state(of.model))
