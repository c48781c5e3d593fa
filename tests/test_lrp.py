"""LRP importance: conservation on real networks, the scores against slow ones, awkward models."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mpq.core.errors import MpqWarning
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.protocols import Partial
from mpq.core.tables import Cells, SensitivityTable
from mpq.nn.batches import Batch, cut, position_mask
from mpq.nn.divergence import Kind, OutputDivergence
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating, frozen, quantized
from mpq.nn.workload import Workload
from sensitivity import get_metric
from sensitivity.calls import Part
from sensitivity.lrp import Lrp, composite_of, ratios, start
from sensitivity.relevance.ledger import Ledger
from sensitivity.relevance.mode import relevance
from sensitivity.relevance.rules import CNN, TRANSFORMER, Composite
from tests.builders import CASES, Decoder, case
from tests.test_gauss_newton import make_workload, small_cnn

SCHEMES = tuple(map(parse_scheme, ("int2", "int4a", "int3:int4", "fp32")))


def partials(workload: Workload, metric: Lrp | None = None) -> list[Partial]:
    metric = metric or Lrp()
    return [metric.run(workload, task) for task in metric.tasks(workload)]


def table(workload: Workload, *, error: bool = True) -> SensitivityTable:
    metric = Lrp(error=error)
    return metric.combine(workload.cells, partials(workload, metric)).sensitivity


# --- conservation on real networks -----------------------------------------------------------


def conserved(
    model: nn.Module, batch: Batch, kind: Kind, composite: Composite
) -> tuple[float, Ledger]:
    """Return the relative difference of what was started and what the books hold."""
    divergence = OutputDivergence(kind)
    workload = make_workload(model, [batch], kind, schemes=SCHEMES, embeddings=True)
    with evaluating(model), frozen(model):
        with relevance(model, composite) as ledger:
            seen = ledger.source(batch) if isinstance(batch, torch.Tensor) else batch
            head = divergence.head(workload.output(0, seen))
        seed = start(workload, Part(0, batch, 0, len(head)), head)
        head.backward(seed)
        with torch.no_grad():
            plain = divergence.head(workload.output(0, batch))
    torch.testing.assert_close(head.detach(), plain, rtol=1e-4, atol=1e-4)
    started = float((head.detach() * seed).sum(dtype=torch.float64))
    return abs(ledger.total - started) / abs(started), ledger


def tiny(name: str, attention: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if name == "gpt2":
        of_gpt2 = GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=attention,
        )
        return GPT2LMHeadModel(of_gpt2).eval()
    of_llama = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(of_llama).eval()


def sentences() -> dict[str, torch.Tensor]:
    """Two sequences, one padded on the left and one on the right."""
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["digits_resnet20", "digits_vit", "minilm"])
def test_relevance_is_conserved_on_the_examples(name: str) -> None:
    example = importlib.import_module(f"examples.{name}")
    batch = example.calibration_batches()[0]
    batch = cut(batch[0] if isinstance(batch, tuple) else batch, 0, 4)
    composite = CNN if name == "digits_resnet20" else TRANSFORMER
    difference, ledger = conserved(example.make_model(), batch, example.DIVERGENCE, composite)
    assert difference < 1e-3
    assert not ledger.unexplained
    if composite is CNN:  # biases share there: next to nothing is absorbed
        assert abs(sum(ledger.absorbed.values())) < 0.05 * ledger.total


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_relevance_is_conserved_on_decoders(name: str, attention: str) -> None:
    difference, ledger = conserved(tiny(name, attention), sentences(), "kl", TRANSFORMER)
    assert difference < 1e-3
    assert not ledger.unexplained


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_is_the_same_however_it_is_computed(name: str) -> None:
    tables = [
        table(  # not activations: the ranges of a sample hold what is computed for padding
            make_workload(
                tiny(name, attention), [sentences()], schemes=SCHEMES[:2], embeddings=True
            )
        )
        for attention in ("eager", "sdpa")
    ]
    np.testing.assert_allclose(tables[0].values, tables[1].values, rtol=1e-3, atol=1e-9)


def test_cnns_and_transformers_have_their_own_rules() -> None:
    assert composite_of(make_workload(small_cnn(), [torch.randn(2, 2, 4, 4)]).graph) is CNN
    example = importlib.import_module("examples.digits_vit")
    images = torch.randn(2, 1, 16, 16)  # a patch convolution makes no CNN
    assert composite_of(make_workload(example.build_model(), [images]).graph) is TRANSFORMER


# --- the scores ------------------------------------------------------------------------------


class Branches(nn.Module):
    """Layers without biases, on branches and called twice: LRP-0 is input times gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6, bias=False)
        self.twice = nn.Linear(6, 6, bias=False)
        self.side = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.first(x).relu()
        h = self.twice(self.twice(h).relu()) + self.side(h)
        return {"logits": self.last(h.relu())}


def slow_scores(
    workload: Workload, kind: Kind, schemes: Sequence[Scheme]
) -> tuple[np.ndarray, np.ndarray]:
    """Return A of (layers, samples) and the scores, sample by sample with plain gradients."""
    model = workload.model
    modules = dict(model.named_modules())
    names = [unit.layers[0] for unit in workload.graph.units]
    of_all, lost_of_all = [], []
    for batch in workload.calibration:
        for n in range(len(batch)):
            seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

            def keep(module: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
                name = next(name for name in names if modules[name] is module)
                seen.append((name, args[0], out))  # noqa: B023

            hooks = [modules[name].register_forward_hook(keep) for name in names]
            z = model(batch[n : n + 1])["logits"][0]
            for hook in hooks:
                hook.remove()
            target = z.max() if kind == "kl" else 0.5 * z.square().sum()
            gradients = torch.autograd.grad(target, [out for _, _, out in seen])
            arrived = dict.fromkeys(names, 0.0)
            lost = {(name, s): 0.0 for name in names for s in schemes}
            for (name, x, y), g in zip(seen, gradients, strict=True):
                here = float((y.detach() * g).abs().sum())
                arrived[name] += here
                for s in schemes:
                    with torch.no_grad(), quantized(model, {name: s}):
                        changed = modules[name](x.detach())
                    error = (changed - y.detach()).square().sum() / y.detach().square().sum()
                    lost[name, s] += here * float(error)
            of_all.append([arrived[name] for name in names])
            lost_of_all.append([lost[name, s] for name in names for s in schemes])
    contributions = np.array(of_all).T
    return contributions, np.array(lost_of_all).mean(0) / contributions.sum(0).mean()


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_scores_are_relevance_times_relative_error(kind: Kind) -> None:
    model = Branches().double()
    batches = [torch.randn(3, 5).double(), torch.randn(2, 5).double()]
    workload = make_workload(model, batches, kind, schemes=SCHEMES)
    contributions, expected = slow_scores(workload, kind, SCHEMES)
    found = np.concatenate([p["arrived"] for p in partials(workload)], axis=1)
    np.testing.assert_allclose(found, contributions, rtol=1e-9)
    np.testing.assert_allclose(table(workload).values, expected, rtol=1e-6, atol=1e-12)


def test_cosine_starts_from_the_unit_vector() -> None:
    model = Branches().double()
    x = torch.randn(3, 5).double()
    workload = make_workload(model, [x], "cosine", schemes=SCHEMES)
    found = partials(workload)[0]["arrived"]
    y = model(x)["logits"].detach()  # the last layer's output: R = y * (y / |y|) / |y|
    expected = (y / y.norm(dim=1, keepdim=True)).square().sum(1)
    np.testing.assert_allclose(found[-1], expected.numpy())
    np.testing.assert_allclose(found[-1], np.ones(3))


def test_importance_maximises_contribution_times_bits() -> None:
    offered = tuple(map(parse_scheme, ("int2", "int4", "int8", "int4:int8", "fp32")))
    workload = make_workload(Branches(), [torch.randn(6, 5)], schemes=offered)
    found = table(workload, error=False)
    arrived = np.concatenate([p["arrived"] for p in partials(workload)], axis=1)
    shares = arrived.mean(1) / arrived.mean(1).sum()
    bits = np.array([2 + 32, 4 + 32, 8 + 32, 4 + 8, 32 + 32])
    expected = shares[:, None] * (bits.max() - bits)
    np.testing.assert_allclose(found.values, expected.flatten(), rtol=1e-6)
    assert (found.values >= 0).all()
    rows = found.values.reshape(len(shares), -1)
    fits = [p for p in itertools.product(range(len(bits)), repeat=4) if bits[list(p)].sum() <= 110]
    least = min(fits, key=lambda p: sum(rows[u, c] for u, c in enumerate(p)))
    most = max(fits, key=lambda p: sum(shares[u] * bits[c] for u, c in enumerate(p)))
    assert sum(shares * bits[list(least)]) == pytest.approx(sum(shares * bits[list(most)]))


def test_importance_counts_weights_alone_where_activations_stay() -> None:
    offered = tuple(map(parse_scheme, ("int4", "int8")))
    workload = make_workload(Branches(), [torch.randn(6, 5)], schemes=offered)
    found = table(workload, error=False).values.reshape(-1, 2)
    assert found[:, 0].sum() == pytest.approx(4.0)  # contributions sum to one
    assert not found[:, 1].any()


def test_a_unit_sums_its_layers() -> None:
    model, batch = case("decoder")
    together = make_workload(model, [batch], schemes=SCHEMES)
    assert any(len(unit.layers) > 1 for unit in together.graph.units)
    graph = build_graph(model, batch, groups="none")
    names = tuple(unit.name for unit in graph.units)
    cells = Cells(units=names, schemes=(SCHEMES,) * len(names))
    apart = dict(
        zip(
            names,
            table(replace(together, graph=graph, cells=cells)).values.reshape(-1, 4),
            strict=True,
        )
    )
    for unit, row in zip(together.graph.units, table(together).values.reshape(-1, 4), strict=True):
        np.testing.assert_allclose(row, sum(apart[name] for name in unit.layers), rtol=1e-5)


def test_the_error_bar_is_that_of_a_ratio() -> None:
    """Draw many data sets: the spread of the ratio against the mean of its own error bars."""
    generator = np.random.default_rng(0)
    sets, samples = 4000, 40
    b = generator.gamma(4.0, size=(sets, samples)) + 1
    a = b * generator.uniform(0.5, 1.5, (sets, samples)) + generator.normal(0, 0.3, b.shape)
    found = [ratios(one[None], other) for one, other in zip(a, b, strict=True)]
    spread = np.std([value[0] for value, _ in found], ddof=1)
    claimed = np.sqrt(np.mean([error[0] ** 2 for _, error in found]))
    doubt = 1 / np.sqrt(2 * sets)  # relative standard error of a standard deviation
    assert abs(claimed / spread - 1) < 5 * doubt + 2 / samples  # the delta method's own bias


def test_one_sample_has_no_error_bar_and_no_relevance_no_score() -> None:
    workload = make_workload(Branches(), [torch.randn(1, 5)], schemes=SCHEMES)
    assert not table(workload).stderr.any()
    silent = make_workload(Branches(), [torch.zeros(3, 5)], schemes=SCHEMES)
    assert not table(silent).values.any()
    assert not table(silent, error=False).values.any()


# --- awkward models --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model_is_scored(name: str) -> None:
    model, batch = case(name)
    found = table(make_workload(model, [batch], schemes=SCHEMES))
    assert (found.values >= 0).all()
    assert found.values.any()
    assert (found.values.reshape(-1, len(SCHEMES))[:, -1] == 0).all()  # fp32 changes nothing


def test_searched_embeddings_have_relevance() -> None:
    batch = {"input_ids": torch.arange(10).reshape(2, 5)}
    workload = make_workload(Decoder(tied=False), [batch], embeddings=True, schemes=SCHEMES[:2])
    found = table(workload)
    assert found["embed", SCHEMES[0]] > found["embed", SCHEMES[1]] > 0


@pytest.mark.parametrize("kind", ["kl", "cosine", "mse"])
@pytest.mark.parametrize("error", [True, False])
def test_however_the_samples_are_cut_the_numbers_are_the_same(kind: Kind, error: bool) -> None:
    model, samples = Branches(), torch.randn(6, 5)
    found = [
        table(make_workload(model, torch.split(samples, sizes), kind, schemes=SCHEMES), error=error)
        for sizes in ([6], [2, 4], [1, 2, 3])
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other.values, found[0].values, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(other.stderr, found[0].stderr, rtol=1e-3, atol=1e-7)


def test_a_batch_that_is_too_large_is_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = make_workload(small_cnn(), [torch.randn(7, 2, 4, 4)])
    whole = table(workload)
    monkeypatch.setattr("sensitivity.calls._HELD_BYTES", 5_000)
    np.testing.assert_allclose(table(workload).values, whole.values, rtol=1e-4, atol=1e-7)


def test_padding_says_nothing() -> None:
    model, batch = tiny("llama", "eager"), sentences()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][batch["attention_mask"] == 0] = 7
    found = [table(make_workload(model, [b], schemes=SCHEMES[:2])).values for b in (batch, other)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_the_start_averages_real_positions() -> None:
    batch = sentences()
    workload = make_workload(tiny("llama", "eager"), [batch], schemes=SCHEMES[:1])
    head = torch.randn(3, 9, 50)
    seed = start(workload, Part(0, batch, 0, 3), head)
    mask = position_mask(batch, head)
    assert mask is not None
    for n in range(3):
        for t in range(9):
            expected = torch.zeros(50)
            if mask[n, t]:
                expected[head[n, t].argmax()] = 1 / float(mask[n].sum())
            torch.testing.assert_close(seed[n, t], expected)


def test_a_layer_that_does_not_reach_the_output_scores_zero() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            return self.used(x)

    found = table(make_workload(Unused(), [torch.randn(4, 3)], schemes=SCHEMES[:1]))
    assert found["unused", SCHEMES[0]] == 0
    assert found["used", SCHEMES[0]] > 0


def test_an_operation_without_a_rule_is_told_once_for_all_batches() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x).cumprod(-1))

    workload = make_workload(Products(), [torch.randn(4, 3)] * 2, schemes=SCHEMES[:1])
    found = partials(workload)
    with pytest.warns(MpqWarning, match=r"not conserved by .*cumprod \([\d.]+%\)") as caught:
        Lrp().combine(workload.cells, found)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table(make_workload(Branches(), [torch.randn(4, 5)], schemes=SCHEMES))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_only_borrowed(training: bool) -> None:
    model = small_cnn().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table(make_workload(model, [torch.randn(3, 2, 4, 4)]))
    assert model.training is training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_same_inputs_same_numbers_and_keys_follow_the_inputs() -> None:
    model, batch = small_cnn(), [torch.randn(3, 2, 4, 4)]
    workload = make_workload(model, batch)
    assert np.array_equal(table(workload).values, table(workload).values)
    keys = {
        get_metric(name).tasks(w)[0].key
        for name in ("lrp", "lrp_importance")
        for w in (workload, replace(workload, divergence=OutputDivergence("mse")))
    }
    assert len(keys) == 4
    with torch.no_grad():
        next(iter(model.parameters()))[0] += 1e-3
    assert Lrp().tasks(make_workload(model, batch))[0].key not in keys


def test_other_rules_have_other_keys() -> None:
    workload = make_workload(small_cnn(), [torch.randn(3, 2, 4, 4)])
    metrics = [Lrp(composite=composite) for composite in (None, CNN, TRANSFORMER)]
    keys = [metric.tasks(workload)[0].key for metric in metrics]
    assert keys[0] == keys[1] != keys[2]
    scores = [metric.run(workload, metric.tasks(workload)[0])["arrived"] for metric in metrics]
    assert np.array_equal(scores[0], scores[1])
    assert not np.allclose(scores[0], scores[2])
