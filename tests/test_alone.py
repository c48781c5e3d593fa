"""One cell at a time: scores are those of a plain loop of whole passes, digit for digit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mpq.core.errors import InvalidInputError
from mpq.core.tables import SensitivityTable
from mpq.nn.batches import Batch, call, cut, num_samples, position_mask
from mpq.nn.divergence import Kind, OutputDivergence
from mpq.nn.patch import evaluating, quantized
from mpq.nn.workload import Workload
from sensitivity import get_metric
from sensitivity.alone import alone
from sensitivity.higgs import fit
from tests.builders import CASES, case, conv_net, mlp, workload
from tests.oracles import slow_divergence

TEXTS = ("int2", "int4:int8", "fp32")
WEIGHTS = ("int2", "int4", "fp32")
Number = Callable[[torch.Tensor, torch.Tensor, Batch], list[float]]


def make(name: str, texts: tuple[str, ...] = TEXTS, kind: Kind = "kl") -> Workload:
    model, batch = case(name)
    batches = [cut(batch, 0, 1), batch]
    return workload(
        model,
        batches,
        texts,
        divergence=OutputDivergence(kind),
        loss=cross_entropy,
        key=name,
        batch_keys=("a", "b"),
    )


def cross_entropy(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    rows = output.reshape(-1, output.shape[-1]).float()
    return F.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[1])


def table(metric: str, of: Workload) -> SensitivityTable:
    made = get_metric(metric)
    return made.combine(of.cells, [made.run(of, task) for task in made.tasks(of)]).sensitivity


def plain_loop(of: Workload, number: Number) -> np.ndarray:
    """Return `number(original, changed, batch)` of every cell by one whole pass each."""
    found: list[list[float]] = []
    with evaluating(of.model), torch.no_grad():
        for unit, choices in zip(of.graph.units, of.cells.schemes, strict=True):
            for scheme in choices:
                of_cell: list[float] = []
                for batch in of.calibration:
                    original = call(of.model, batch)
                    layers = dict.fromkeys(unit.layers, scheme)
                    limits = of.graph.input_ranges
                    with quantized(of.model, layers, quantizer=of.quantizer, limits=limits):
                        changed = call(of.model, batch)
                    of_cell += number(original, changed, batch)
                found.append(of_cell)
    return np.array(found)


def check_mean(of: SensitivityTable, samples: np.ndarray) -> None:
    assert np.array_equal(of.values, samples.mean(axis=1))
    error = samples.std(axis=1, ddof=1) / math.sqrt(samples.shape[1])
    np.testing.assert_allclose(of.stderr, error, rtol=1e-12)


@pytest.mark.parametrize("kind", ["kl", "cosine", "mse"])
@pytest.mark.parametrize("name", CASES)
def test_kl_is_the_divergence_of_whole_passes_bit_for_bit(name: str, kind: Kind) -> None:
    of = make(name, WEIGHTS if name == "conv" else TEXTS, kind)

    def divergence(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> list[float]:
        mask = position_mask(batch, original)
        return of.divergence.between(original, changed, mask).tolist()

    check_mean(table("kl", of), plain_loop(of, divergence))


def test_static_ranges_of_inputs_are_those_of_the_graph() -> None:
    made = make("mlp", ("int8:int4static",))

    def within(low: float, high: float) -> Workload:
        layers = tuple(replace(layer, input_range=(low, high)) for layer in made.graph.layers)
        return replace(made, graph=replace(made.graph, layers=layers))

    of, narrow = within(-3.0, 4.0), within(-0.3, 0.4)

    def divergence(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> list[float]:
        return of.divergence.between(original, changed).tolist()

    check_mean(table("kl", narrow), plain_loop(narrow, divergence))
    assert (table("kl", narrow).values > table("kl", of).values).all()


def test_kl_is_the_divergence_computed_position_by_position() -> None:
    of = make("decoder")

    def divergence(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> list[float]:
        assert isinstance(batch, dict)
        arrays = (original.double().numpy(), changed.double().numpy())
        return slow_divergence("kl", *arrays, batch["attention_mask"].numpy())

    expected = plain_loop(of, divergence).mean(axis=1)
    np.testing.assert_allclose(table("kl", of).values, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_increase_of_the_loss_of_whole_passes_bit_for_bit(name: str) -> None:
    of = make(name)

    def increase(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> list[float]:
        return [
            float(cross_entropy(changed[n : n + 1], one))
            - float(cross_entropy(original[n : n + 1], one))
            for n in range(num_samples(batch))
            for one in [cut(batch, n, n + 1)]
        ]

    found = table("loss", of)
    check_mean(found, plain_loop(of, increase))
    assert (found.values < 0).any()  # the sign is kept


def test_loss_of_a_batch_cut_in_halves_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    of = make("mlp")
    whole = table("loss", of)
    monkeypatch.setattr("sensitivity.prefix._HELD_BYTES", 200)
    halves = table("loss", of)
    np.testing.assert_allclose(halves.values, whole.values, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(halves.stderr, whole.stderr, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_sqnr_is_the_ratio_of_powers_of_whole_passes(name: str) -> None:
    of = make(name)

    def real(values: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        mask = batch["attention_mask"] if isinstance(batch, dict) else None
        return [
            values[n] if mask is None else values[n][mask[n].bool()] for n in range(len(values))
        ]

    def noise(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> list[float]:
        return [float(v.square().sum()) for v in real(changed.double() - original.double(), batch)]

    def signal(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> list[float]:
        return [float(v.square().sum()) for v in real(original.double(), batch)]

    noises, signals = plain_loop(of, noise), plain_loop(of, signal)
    found = table("sqnr", of)
    np.testing.assert_allclose(found.values, noises.sum(1) / signals.sum(1), rtol=1e-12)
    # the jackknife, which knows nothing of the formula, agrees with the error bar
    samples = noises.shape[1]
    left_out = np.stack(
        [
            np.delete(noises, n, axis=1).sum(1) / np.delete(signals, n, axis=1).sum(1)
            for n in range(samples)
        ]
    )
    jackknife = np.sqrt((samples - 1) * left_out.var(axis=0))
    np.testing.assert_allclose(found.stderr, jackknife, rtol=0.7, atol=1e-15)


def test_error_bars_of_sqnr_cover_the_ratio_of_many_samples() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    many = workload(model, [torch.randn(4000, 4)], ("int3",), key="", batch_keys=("a",))
    truth = table("sqnr", many)
    inside = []
    for n in range(80):
        few = replace(many, calibration=(many.calibration[0][n * 50 : (n + 1) * 50],))
        found = table("sqnr", few)
        inside += list(np.abs(found.values - truth.values) <= 2 * found.stderr)
    assert abs(np.mean(inside) - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / len(inside)) + 0.01


def test_an_output_of_zeros_has_no_signal() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    of = workload(model, [torch.randn(3, 3)], WEIGHTS, key="", batch_keys=("a",))
    with pytest.raises(InvalidInputError, match="output is zero"):
        table("sqnr", of)


def test_all_functions_see_the_same_passes() -> None:
    of = make("conv")
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = of.model.register_forward_hook(count)
    both = alone(of, 1, {"one": lambda o, c, b: (o - c).sum(1), "two": lambda o, c, b: c[:, 0]})
    handle.remove()
    lossy = sum(str(scheme) != "fp32" for _, scheme in of.cells)
    assert passes == lossy + 3  # record, look where weights are read, prove
    part = replace(of, calibration=of.calibration[1:])
    assert np.array_equal(both["one"], plain_loop(part, lambda o, c, b: (o - c).sum(1).tolist()))
    assert np.array_equal(both["two"], plain_loop(part, lambda o, c, b: c[:, 0].tolist()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda o, c, b: (o - c).square().sum(), r"^ssim of unit '0' in int2 .*batch 0 is \[\]"),
        (lambda o, c, b: (o - c).square(), r"is \[1, 3\]: return one number for each of 1"),
        (lambda o, c, b: 0.5, "is float: return one number for each"),
        (lambda o, c, b: o[:, 0] * float("nan"), "ssim of unit '0' in int2 .* is not finite"),
    ],
)
def test_a_function_that_returns_something_else_is_named(
    function: Callable[..., torch.Tensor], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        alone(make("mlp"), 0, {"ssim": function})


def test_without_a_loss_one_line_says_what_to_do() -> None:
    of = replace(make("mlp"), loss=None)
    with pytest.raises(InvalidInputError, match=r"loss needs the loss: give loss\(output, batch\)"):
        get_metric("loss").tasks(of)


def test_a_loss_that_fails_on_one_sample_is_one_line() -> None:
    def of_pairs(output: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (output[0] - output[1]).square().sum()

    of = replace(make("mlp"), loss=of_pairs)
    with pytest.raises(InvalidInputError, match=r"cannot take one sample of batch 0 .*index 1"):
        table("loss", of)


def test_keys_follow_the_loss() -> None:
    of = make("mlp")
    other = replace(of, loss=lambda output, batch: output.sum())
    for metric in ("loss", "autoquantize", "taylor", "mixllm"):
        keys = [{t.key for t in get_metric(metric).tasks(w)} for w in (of, of, other)]
        assert keys[0] == keys[1]
        assert not keys[0] & keys[2]


# --- higgs -----------------------------------------------------------------------------------


def test_alpha_is_the_least_squares_fit_through_the_origin() -> None:
    generator = np.random.default_rng(0)
    sizes = np.array([0.05, 0.05, 0.1, 0.2])
    divergence = generator.gamma(2.0, size=(3, 4, 5)) * sizes[None, :, None] ** 2
    alpha, _ = fit(divergence, sizes)
    for layer in range(3):
        design = np.repeat(sizes**2, 5)[:, None]
        expected = np.linalg.lstsq(design, divergence[layer].ravel(), rcond=None)[0]
        np.testing.assert_allclose(alpha[layer], expected[0], rtol=1e-12)


def test_error_bars_of_alpha_hold_samples_and_draws() -> None:
    """D = t^2 (2 + a_draw + b_sample + noise): the spread of alpha is that of its error bar."""
    generator = np.random.default_rng(0)
    sizes = np.repeat([0.05, 0.1, 0.2], 30)
    layers, samples = 400, 20
    factors = (
        2
        + 0.5 * generator.standard_normal((layers, len(sizes), 1))
        + 0.3 * generator.standard_normal((layers, 1, samples))
        + 0.1 * generator.standard_normal((layers, len(sizes), samples))
    )
    alpha, error = fit(factors * np.square(sizes)[None, :, None], sizes)
    inside = np.abs(alpha - 2) <= 1.96 * error
    assert abs(inside.mean() - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / layers)


def test_alpha_of_a_linear_network_is_known() -> None:
    """E D = t^2 |W|^2 |x|^2 / (inputs outputs) for one linear layer and the mean square error."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4)).double(), torch.randn(6, 5).double()
    of = workload(
        model,
        [x],
        WEIGHTS,
        divergence=OutputDivergence("mse"),
        num_probes=200,
        key="",
        batch_keys=("a",),
    )
    found = table("higgs", of)
    weight = model[0].weight.detach()
    alpha = float(weight.square().sum() * x.square().sum(1).mean() / 5 / 4)
    squared = table("weight_error", of).values
    # the samples are all there are: only draws are random, and the error bar holds both
    assert (np.abs(found.values - alpha * squared) <= 5 * found.stderr).all()
    partial = get_metric("higgs").run(of, get_metric("higgs").tasks(of)[0])
    ratios = partial["divergence"].mean(axis=2)[0] / partial["sizes"] ** 2
    error = ratios.std(ddof=1) / math.sqrt(len(ratios))
    assert abs(ratios.mean() - alpha) <= 4 * error
    assert error < 0.03 * alpha


def test_noise_of_a_tied_weight_is_everywhere_and_counts_once() -> None:
    of = make("recurrent", WEIGHTS)
    partial = get_metric("higgs").run(of, get_metric("higgs").tasks(of)[0])
    assert len(partial["divergence"]) == 2  # the cell with its twin, and the head
    assert of.model.cell.weight is of.model.twin.weight  # type: ignore[union-attr]


# --- weight_error ----------------------------------------------------------------------------


def test_weight_error_adds_up_over_the_stored_weights_of_a_unit() -> None:
    of = make("decoder", WEIGHTS)
    found = table("weight_error", of)
    assert not found.stderr.any()
    for (unit, scheme), value in zip(of.cells, found.values, strict=True):
        (layers,) = (u.layers for u in of.graph.units if u.name == unit)
        expected = 0.0
        for name in layers:
            weight = of.model.get_parameter(f"{name}.weight").detach().double()
            with quantized(of.model, {name: scheme}):
                stored = of.model.get_parameter(f"{name}.weight").detach().double()
            expected += float((stored - weight).square().sum() / weight.square().sum())
        assert value == pytest.approx(expected, rel=1e-9)


def test_a_weight_of_zeros_has_no_error() -> None:
    model = mlp()
    nn.init.zeros_(model[0].weight)
    of = workload(model, [torch.randn(2, 6)], WEIGHTS, key="", batch_keys=("a",))
    assert not table("weight_error", of).values[:3].any()
    assert np.isfinite(table("higgs", of).values).all()


def test_a_network_in_train_mode_scores_as_in_eval_mode() -> None:
    torch.manual_seed(0)
    model, x = conv_net(), torch.randn(2, 3, 8, 8)
    scores = [
        table("kl", workload(m, [x], WEIGHTS, key="", batch_keys=("a",))).values
        for m in (model.train(), model.eval())
    ]
    assert np.array_equal(*scores)
