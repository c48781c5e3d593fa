"""Relevance rules against matrices, captum, and the values of the operations they replace."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sensitivity.relevance.ledger import Ledger
from sensitivity.relevance.mode import relevance
from sensitivity.relevance.rules import CNN, Composite, Epsilon, Gamma, Rule, ZBox, ZPlus

Function = Callable[..., torch.Tensor]


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args)


def traced(
    model: nn.Module | Function,
    *inputs: torch.Tensor,
    composite: Composite | None = None,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Ledger]:
    """Return the output, the relevance that started there (output times seed), and the books."""
    module = model if isinstance(model, nn.Module) else Wrapped(model)
    module.eval().requires_grad_(False)
    with relevance(module, composite or Composite()) as ledger:
        output = module(*map(ledger.source, inputs))
    seed = torch.ones_like(output) if seed is None else seed
    output.backward(seed)
    return output.detach(), output.detach() * seed, ledger


# --- rules as matrices -----------------------------------------------------------------------


def split(rule: Rule, x: float, w: float, low: float, high: float) -> float:
    """Return what one input contributes to one output."""
    match rule:
        case Gamma(gamma):
            return x * (w + gamma * max(w, 0))
        case ZPlus():
            return max(x, 0) * max(w, 0) + min(x, 0) * min(w, 0)
        case ZBox():
            return x * w - low * max(w, 0) - high * min(w, 0)
        case _:
            return x * w


def of_bias(rule: Rule, b: float) -> float:
    """Return what the bias contributes to one output."""
    match rule:
        case ZBox() | Epsilon(bias_absorbs=False) | Gamma(bias_absorbs=False):
            return 0.0
        case ZPlus(bias_absorbs=absorbs):
            return max(b, 0) if absorbs else 0.0
        case Gamma(gamma):
            return b + gamma * max(b, 0)
        case _:
            return b


def slow_share(
    rule: Rule, layer: nn.Linear, x: torch.Tensor, arrived: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the relevance of each input of one sample, and what bias and stabiliser absorb."""
    low, high = float(x.min()), float(x.max())
    found, absorbed = torch.zeros_like(x), 0.0
    epsilon = getattr(rule, "epsilon", 0.0)
    for j in range(layer.out_features):
        parts = [
            split(rule, float(x[i]), float(layer.weight[j, i]), low, high) for i in range(len(x))
        ]
        bias = of_bias(rule, float(layer.bias[j]))
        z = sum(parts) + bias
        stable = z + (epsilon if z >= 0 else -epsilon)
        for i, part in enumerate(parts):
            found[i] += part / stable * arrived[j]
        absorbed += float((bias + stable - z) / stable * arrived[j])
    return found, absorbed


RULES: list[Rule] = [
    Epsilon(),
    Epsilon(0.1),
    Epsilon(1e-3, bias_absorbs=False),
    Gamma(0.25),
    Gamma(2.0, epsilon=1e-2, bias_absorbs=False),
    ZPlus(),
    ZPlus(bias_absorbs=False),
    ZBox(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_is_its_matrix(rule: Rule) -> None:
    layer = nn.Linear(5, 4).double()
    x, seed = torch.randn(1, 5).double(), torch.randn(1, 4).double()
    _, started, ledger = traced(layer, x, composite=Composite((("any", rule),)), seed=seed)
    expected, absorbed = slow_share(rule, layer, x[0], started[0])
    arrived = torch.stack(list(ledger.inputs.values())).sum(0)  # ZBox: of the box's corners too
    torch.testing.assert_close(arrived[0], expected)
    assert sum(ledger.absorbed.values()) == pytest.approx(absorbed)


@pytest.mark.parametrize("rule", RULES[:-1], ids=str)
def test_three_layers_are_the_product_of_their_matrices(rule: Rule) -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    net.double()
    x = torch.randn(1, 5).double()
    composite = Composite((("any", rule),))
    _, started, ledger = traced(net, x, composite=composite)
    inputs = [x[0]]
    for module in net:
        inputs.append(module(inputs[-1]))
    arrived, absorbed = started[0], 0.0
    for place in (4, 2, 0):  # activations pass relevance as it is
        arrived, taken = slow_share(rule, net[place], inputs[place], arrived)
        absorbed += taken
    torch.testing.assert_close(ledger.inputs[0][0], arrived)
    assert sum(ledger.absorbed.values()) == pytest.approx(absorbed)


def test_the_first_match_of_a_composite_wins() -> None:
    rules = {kind: Epsilon(number) for number, kind in enumerate(("first", "conv", "any"))}
    composite = Composite(tuple(rules.items()))
    assert composite.rule(("first", "conv")) == rules["first"]
    assert composite.rule(("conv",)) == rules["conv"]
    assert composite.rule(("linear",)) == rules["any"]
    assert Composite().rule(("linear",)) == Epsilon()


def test_only_the_first_layer_that_runs_is_first() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    composite = Composite((("first", ZBox(low=-3.0, high=3.0)),))
    ledger = traced(net, torch.randn(2, 3), composite=composite)[2]
    assert len(ledger.inputs) == 3  # the input and the corners of one box
    assert {float(r.abs().sum()) > 0 for r in ledger.inputs.values()} == {True}


# --- captum ----------------------------------------------------------------------------------


def relu_net(kind: str) -> tuple[nn.Sequential, torch.Tensor]:
    if kind == "linear":
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        return net.double(), torch.rand(4, 6).double()
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return net.double(), torch.rand(4, 2, 8, 8).double()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", ["EpsilonRule", "GammaRule", "Alpha1_Beta0_Rule"])
def test_captum_gives_the_same_relevance(kind: str, name: str) -> None:
    from captum.attr import LRP
    from captum.attr._utils import lrp_rules

    ours: dict[str, Rule] = {
        "EpsilonRule": Epsilon(1e-9),
        "GammaRule": Gamma(0.25, 1e-9, bias_absorbs=False),
        "Alpha1_Beta0_Rule": ZPlus(1e-9, bias_absorbs=False),
    }
    options = {} if name == "EpsilonRule" else {"set_bias_to_zero": True}
    net, x = relu_net(kind)
    theirs = copy.deepcopy(net)
    for module in theirs:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Flatten):  # it knows no Flatten
            module.rule = getattr(lrp_rules, name)(**options)
    expected = LRP(theirs).attribute(x.clone().requires_grad_(), target=1)
    seed = F.one_hot(torch.ones(4, dtype=torch.long), 3).double()
    ledger = traced(net, x, composite=Composite((("any", ours[name]),)), seed=seed)[2]
    torch.testing.assert_close(ledger.inputs[0], expected.detach())


# --- conservation ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Epsilon(), Epsilon(1e-6), Gamma(), ZPlus()], ids=str)
def test_without_biases_every_layer_has_all_relevance(rule: Rule) -> None:
    layers = [nn.Linear(20, 30, bias=False), nn.Linear(30, 30, bias=False), nn.Linear(30, 5)]
    layers[2].bias = None
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    for module in net:
        module.register_forward_hook(keep)
    x = torch.randn(8, 20)
    logits = net(x).detach()
    seen.clear()
    seed = F.one_hot(logits.argmax(1), 5).float()
    _, started, ledger = traced(net, x, composite=Composite((("any", rule),)), seed=seed)
    total = started.sum(1)
    for output in seen[:-1]:
        assert output.grad is not None
        arrived = (output * output.grad).sum(1)
        torch.testing.assert_close(arrived, total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ledger.inputs[0].sum(1), total, rtol=1e-4, atol=1e-4)


def test_a_residual_addition_splits_in_proportion() -> None:
    branch = nn.Linear(4, 4, bias=False).requires_grad_(False)
    x = torch.randn(3, 4)
    seed = torch.randn(3, 4)
    kept: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = branch(x)
        y.retain_grad()
        kept.append(y)
        return x + y

    _, started, ledger = traced(forward, x, seed=seed)
    y, gradient = kept[0].detach(), kept[0].grad
    torch.testing.assert_close(y * gradient, y / (x + y) * started)
    torch.testing.assert_close(ledger.inputs[0].sum(), started.sum())


def test_products_are_shared_equally() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    _, started, ledger = traced(torch.matmul, a, b)
    for n in range(2):
        for i in range(3):
            for k in range(4):
                slow = sum(float(a[n, i, k] * b[n, k, j]) for j in range(5)) / 2
                assert float(ledger.inputs[0][n, i, k]) == pytest.approx(slow, abs=1e-5)
    torch.testing.assert_close(ledger.inputs[1].sum(), started.sum() / 2)
    x = torch.randn(6)
    torch.testing.assert_close(traced(lambda x: x * x, x)[2].inputs[0], x * x)


def test_softmax_follows_its_expansion() -> None:
    x, seed = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    s, started, ledger = traced(lambda x: x.softmax(-1), x, seed=seed)
    expected = x * (started - s * started.sum(-1, keepdim=True))
    torch.testing.assert_close(ledger.inputs[0], expected)
    assert ledger.absorbed["softmax"] == pytest.approx(float((started - expected).sum()))


def test_norms_scale_by_constants() -> None:
    x, seed = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    scale = 1 / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    centred = seed * scale - (seed * scale).mean(-1, keepdim=True)
    for norm in (lambda x: F.layer_norm(x, (5,)), lambda x: (x - x.mean(-1, True)) * scale):
        torch.testing.assert_close(traced(norm, x, seed=seed)[2].inputs[0], x * centred)


def test_an_activation_passes_relevance_as_it_is() -> None:
    x, seed = torch.randn(50), torch.randn(50)
    for f in (F.gelu, F.silu, torch.tanh, F.relu, F.mish, torch.abs):
        _, started, ledger = traced(f, x, seed=seed)
        torch.testing.assert_close(ledger.inputs[0], started, rtol=1e-4, atol=1e-5)
        assert ledger.absorbed["activations"] == 0
    _, started, ledger = traced(torch.sigmoid, x, seed=seed)  # but for f(0)
    torch.testing.assert_close(ledger.inputs[0], started - 0.5 * seed, rtol=1e-4, atol=1e-5)


def test_near_zero_the_slope_is_the_derivative() -> None:
    x = torch.tensor([0.0, 1e-12, -1e-7, 1e-4, -3.0]).double()
    with relevance(nn.Identity()):
        leaf = x.clone().requires_grad_()
        F.gelu(leaf).sum().backward()
    expected = torch.where(x.abs() < 1e-5, 0.5, F.gelu(x) / x)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-6)


# --- every operation keeps its value and conserves -------------------------------------------

W, V, BIAS = torch.randn(6, 6), torch.randn(4, 6), torch.randn(6)
MASK = torch.tensor([[True, True, False, True]] * 4).tril() | torch.eye(4, dtype=torch.bool)


def heads(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def attend(x: torch.Tensor, **options: object) -> torch.Tensor:
    q, k, v = heads(x, 2), heads(x @ W, 2), heads(x.flip(1), 2)
    return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 1.0
    y += BIAS
    y *= x
    y /= 3
    y.add_(x).mul_(2).clamp_(-5, 5).sub_(1.0)
    z = F.silu(y, inplace=True)
    F.hardtanh(y, -1.0, 1.0, True)
    return F.relu(y + z, inplace=True)


def assigned(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 1] = x[:, 0] * x[:, 1]
    y[:, 2] = V[0]
    y[:, 3] = 1.5
    return y


OPERATIONS: dict[str, Function] = {
    "attention": attend,
    "attention, boolean mask": lambda x: attend(x, attn_mask=MASK),
    "attention, mask": lambda x: attend(x, attn_mask=torch.randn(4, 4)),
    "attention, infinite mask": lambda x: attend(
        x, attn_mask=torch.zeros(4, 4).masked_fill(~MASK, -torch.inf)
    ),
    "attention, causal, scale": lambda x: attend(x, is_causal=True, scale=0.3),
    "attention, no keys": lambda x: attend(x, attn_mask=MASK & (torch.arange(4)[:, None] > 0)),
    "attention, grouped": lambda x: F.scaled_dot_product_attention(
        heads(x, 6), heads(x, 6)[:, :2], heads(x, 6)[:, 2:4], enable_gqa=True
    ),
    "softmax, masked": lambda x: (
        (x @ x.mT).masked_fill(~MASK, -torch.inf).softmax(-1) @ x + V.max()
    ),
    "log_softmax": lambda x: F.log_softmax(x, -1) * torch.randn(4, 6),
    "layer_norm": lambda x: F.layer_norm(x, (6,), BIAS, BIAS),
    "layer_norm, 2 axes": lambda x: F.layer_norm(x, (4, 6), V, V),
    "rms_norm": lambda x: F.rms_norm(x, (6,), BIAS),
    "rms_norm in pieces": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6) * BIAS,
    "layer_norm in pieces": lambda x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-6),
    "root to a power": lambda x: x * (x.pow(2).mean(-1, True) + 1e-6).pow(-0.5),
    "group_norm": lambda x: F.group_norm(x, 2, BIAS[:4], BIAS[:4]),
    "instance_norm": lambda x: F.instance_norm(x, weight=BIAS[:4], bias=BIAS[:4]),
    "batch_norm": lambda x: F.batch_norm(x, BIAS[:4], BIAS[:4].abs(), BIAS[:4], BIAS[:4]),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(1) + 1, dim=-1),
    "glu": lambda x: F.glu(x),
    "gate": lambda x: F.silu(x @ W) * x,
    "einsum": lambda x: torch.einsum("nti,ij,nsj->nts", x, W, x),
    "einsum of three": lambda x: torch.einsum("nti,nti,nti->nt", x, x, x),
    "addmm": lambda x: torch.addmm(BIAS, x[0], W),
    "addmm, scaled": lambda x: torch.addmm(x[1], x[0], W, beta=2, alpha=0.5),
    "baddbmm": lambda x: torch.baddbmm(V[:, :4], x, x.mT, beta=0.5, alpha=2),
    "baddbmm of nothing": lambda x: torch.baddbmm(torch.full((1,), torch.nan), x, x.mT, beta=0),
    "addcmul": lambda x: torch.addcmul(V, x, x, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, V, x.square() + 1),
    "lerp": lambda x: torch.lerp(x, V, 0.3),
    "additions": lambda x: 3 - (x + 1 + V) - 2 * x + (V - x),
    "division": lambda x: 1 / (1 + x.square()) + x / (2 + x.abs()) + V / 3,
    "where": lambda x: torch.where(x > 0, V, x) + torch.where(x > 1, x, 0.5),
    "masked_fill": lambda x: x.masked_fill(x > 0, 2.0),
    "cat": lambda x: torch.cat([V.expand(2, 4, 6), x, x * x], 1),
    "stack": lambda x: torch.stack([x, V.expand(2, 4, 6)]),
    "maximum": lambda x: torch.maximum(x, V) + torch.minimum(x, x.flip(0)),
    "clamp": lambda x: x.clamp(0.1, 0.7) + x.clamp_min(-0.2),
    "powers": lambda x: x**2 + x.pow(3) + x.abs().pow(0.5) + x.square(),
    "variance": lambda x: x.var(-1) + x.std(-1) + x.norm(dim=-1),
    "pooling": lambda x: (
        F.max_pool1d(x, 2) + F.avg_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 3) + x.amax(-1, True)
    ),
    "sorting": lambda x: x.sort(-1).values + x.topk(6, -1).values + x.max(-1, keepdim=True)[0],
    "moving": lambda x: x.mT.reshape(2, -1)[:, ::2].roll(1, 1).chunk(2, 1)[0].repeat(1, 2).flip(1),
    "logarithms": lambda x: torch.log(x.square() + 1) + torch.log1p(x.abs()) + (x.abs() + 1).log2(),
    "fourier": lambda x: torch.fft.irfft(torch.fft.rfft(x) * (1 + 2j)),
    "in place": in_place,
    "assigned": assigned,
    "dynamic weight": lambda x: F.linear(x[0], x[1].mT @ x[1], BIAS),
    "dynamic convolution": lambda x: F.conv1d(x, x[1:, :, :3], BIAS[:1], padding=1),
    "convolution": lambda x: F.conv1d(x, W[:, :4, None].expand(-1, -1, 3), BIAS, padding=1),
    "transposed": lambda x: F.conv_transpose1d(x, W[:4, :3, None], BIAS[:3], stride=2),
    **{
        name: getattr(F, name)
        for name in (
            *("gelu", "silu", "tanh", "sigmoid", "elu", "selu", "celu", "softplus", "mish"),
            *("hardswish", "hardsigmoid", "hardtanh", "relu6", "softsign", "logsigmoid"),
            *("relu", "leaky_relu", "hardshrink", "softshrink", "tanhshrink"),
        )
    },
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    **{
        name: getattr(torch, name)
        for name in ("exp", "expm1", "sin", "cos", "atan", "erf", "sinh", "asinh")
    },
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_its_value_and_all_relevance(name: str) -> None:
    operation = OPERATIONS[name]
    x = torch.randn(2, 4, 6)
    torch.manual_seed(5)
    expected = operation(x.clone())
    torch.manual_seed(5)
    seed = torch.randn_like(expected)
    torch.manual_seed(5)
    output, started, ledger = traced(operation, x, seed=seed)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    scale = float(started.abs().sum())
    assert ledger.total == pytest.approx(float(started.double().sum()), abs=1e-5 * scale)
    assert not ledger.unexplained


@pytest.mark.parametrize("name", ["gelu", "sigmoid", "in place", "attention, boolean mask"])
def test_double_precision_is_kept(name: str) -> None:
    x = torch.randn(2, 4, 6).double()
    constants = {"W": W, "V": V, "BIAS": BIAS}
    try:
        globals().update({key: value.double() for key, value in constants.items()})
        output, started, ledger = traced(OPERATIONS[name], x)
    finally:
        globals().update(constants)
    assert output.dtype == torch.float64
    scale = float(started.abs().sum())
    assert ledger.total == pytest.approx(float(started.sum()), abs=1e-11 * scale)


@pytest.mark.parametrize(
    ("mask", "padding", "whole"),
    [
        (None, None, True),
        ("bool", "bool", True),
        ("float", None, True),
        ("heads", None, True),
        (None, None, False),
    ],
)
def test_multi_head_attention_keeps_its_value(
    mask: str | None, padding: str | None, whole: bool
) -> None:
    layer = nn.MultiheadAttention(6, 2, batch_first=whole).eval()
    with torch.no_grad():
        layer.in_proj_bias.normal_()
        layer.out_proj.bias.normal_()
    x = torch.randn(3, 4, 6) if whole else torch.randn(4, 6)
    masks = {
        None: None,
        "bool": ~MASK,
        "float": torch.randn(4, 4),
        "heads": torch.randn(6, 4, 4),
    }
    rows = torch.tensor([[False, False, True, True]] * 3) if padding else None

    def forward(x: torch.Tensor) -> torch.Tensor:
        out, _ = layer(x, x, x, key_padding_mask=rows, attn_mask=masks[mask])
        return out

    layer.requires_grad_(False)
    output, started, ledger = traced(forward, x)
    torch.testing.assert_close(output, forward(x), rtol=1e-4, atol=1e-5)
    assert ledger.total == pytest.approx(float(started.sum()), abs=1e-4)
    assert not ledger.unexplained


def test_an_activation_module_written_in_pieces_is_one_function() -> None:
    from transformers.activations import (
        FastGELUActivation,
        NewGELUActivation,
        ReLUSquaredActivation,
    )

    x, seed = torch.randn(40), torch.randn(40)
    for module in (NewGELUActivation(), FastGELUActivation(), ReLUSquaredActivation()):
        output, started, ledger = traced(module, x, seed=seed)
        torch.testing.assert_close(output, module(x))
        torch.testing.assert_close(ledger.inputs[0], started, rtol=1e-4, atol=1e-5)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_embeddings_are_inputs_and_positions_absorb() -> None:
    words, positions = nn.Embedding(7, 4), torch.randn(3, 4)
    ids = torch.randint(0, 7, (2, 3))
    words.requires_grad_(False)
    with relevance(words) as ledger:
        output = words(ids) + positions
    output.sum().backward()
    torch.testing.assert_close(ledger.inputs[0], words(ids))
    assert ledger.absorbed["constants"] == pytest.approx(2 * float(positions.sum()), rel=1e-5)


def test_an_operation_without_a_rule_is_named_with_what_it_makes() -> None:
    x = torch.rand(3, 4) + 0.5
    _, started, ledger = traced(lambda x: x.cumprod(-1), x)
    assert set(ledger.unexplained) == {"cumprod"}
    made = sum(float(x[:, :k].prod(-1).sum()) * (k - 1) for k in (1, 2, 3, 4))  # degree k
    assert ledger.unexplained["cumprod"] == pytest.approx(-made, rel=1e-4)
    assert ledger.total == pytest.approx(float(started.sum()), rel=1e-4)


def test_recurrent_layers_run_without_a_rule() -> None:
    lstm = nn.LSTM(4, 5, batch_first=True)
    _, started, ledger = traced(lambda x: lstm.requires_grad_(False)(x)[0], torch.randn(2, 3, 4))
    assert set(ledger.unexplained) == {"lstm"}
    assert ledger.total == pytest.approx(float(started.sum()), abs=1e-4)


def test_outside_everything_is_as_before() -> None:
    x = torch.randn(4, requires_grad=True)
    with relevance(nn.Identity()):
        pass
    F.gelu(x).sum().backward()
    expected = torch.func.grad(lambda x: F.gelu(x).sum())(x.detach())
    torch.testing.assert_close(x.grad, expected)


def test_a_cnn_keeps_relevance_through_negative_scales_and_zeros() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0]))
        net[1].running_mean.normal_()
    x = torch.rand(3, 1, 8, 8)
    x[:, :, 4:] = 0
    _, started, ledger = traced(net.double(), x.double(), composite=CNN)
    assert ledger.total == pytest.approx(float(started.sum()), rel=1e-9)


def test_an_encoder_layer_of_torch_has_rules_throughout() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, activation="gelu").eval()
    x = torch.randn(2, 4, 6)
    output, started, ledger = traced(layer, x)
    torch.testing.assert_close(output, layer(x), rtol=1e-4, atol=1e-5)
    assert ledger.total == pytest.approx(float(started.sum()), abs=1e-4)
    assert not ledger.unexplained


def test_attention_with_added_keys_has_no_rule() -> None:
    layer = nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True)
    _, started, ledger = traced(
        lambda x: layer.requires_grad_(False)(x, x, x)[0], torch.randn(2, 4, 6)
    )
    assert set(ledger.unexplained) == {"multi_head_attention_forward"}
    assert ledger.total == pytest.approx(float(started.sum()), abs=1e-4)


def preactivated(blocks: int = 6) -> nn.Module:
    """A residual network in which batch norms follow additions."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.convs[0](self.norms[0](x).relu())
            return x + self.convs[1](self.norms[1](h).relu())

    net = nn.Sequential(nn.Conv2d(1, 8, 3), *(Block() for _ in range(blocks)), nn.BatchNorm2d(8))
    with torch.no_grad():
        for _ in range(30):
            net.train()(torch.rand(16, 1, 10, 10))
    return net


def test_batch_norms_after_additions_make_no_relevance() -> None:
    net = nn.Sequential(preactivated(), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    _, started, ledger = traced(net, torch.rand(8, 1, 10, 10), composite=CNN)
    assert ledger.total == pytest.approx(
        float(started.sum()), abs=1e-4 * float(started.abs().sum())
    )
    arrived = sum(float(r.abs().sum()) for r in ledger.inputs.values())
    assert arrived < 10 * float(started.abs().sum())
