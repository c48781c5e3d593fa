"""Every transform leaves the network's outputs as they are; and what each is for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.formats import parse_scheme
from mpq.nn.batches import call
from mpq.nn.graph import build_graph
from mpq.nn.patch import quantized
from mpq.nn.transforms import TRANSFORMS, reports_of, transformed
from mpq.nn.transforms.folding import channel_ranges
from mpq.nn.transforms.readers import norm_readers
from tests.builders import Decoder, mlp
from tests.transformed_networks import NETWORKS, WIDTH, PostNorm, make, samples

ALL = sorted(TRANSFORMS)
INT8 = parse_scheme("int8:int8")


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("name", ALL)
class TestContract:
    def test_outputs_are_the_same(self, name: str, network: str) -> None:
        for dtype, largest in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            model, batches = make(network, dtype), samples(dtype=dtype)
            other = transformed(model, batches, [name])
            for batch in samples(4, dtype):  # two of them were not seen
                with torch.no_grad():
                    assert relative(other(batch), model(batch)) < largest
            assert not other.training
            assert all(p.dtype == dtype for p in other.parameters())

    def test_the_original_is_untouched(self, name: str, network: str) -> None:
        model, batches = make(network), samples()
        model.train()
        before = copy.deepcopy(model.state_dict())
        owners = {key: id(p) for key, p in model.named_parameters()}
        generator = torch.get_rng_state()
        other = transformed(model, batches, [name])
        assert {key: id(p) for key, p in model.named_parameters()} == owners
        assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
        assert model.training
        assert other.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not {id(p) for p in other.parameters()} & set(owners.values())
        assert torch.equal(torch.get_rng_state(), generator)

    def test_it_tells_every_linear_layer(self, name: str, network: str) -> None:
        model = make(network)
        (report,) = reports_of(transformed(model, samples(), [name]))
        linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert set(report.unchanged) <= linears
        assert linears <= set(report.changed) | set(report.unchanged)
        assert not set(report.changed) & set(report.unchanged)
        assert all(report.unchanged.values())
        assert report.transform.startswith(name)
        assert len(report.lines) == 1 + len(set(report.unchanged.values())) + len(
            set(report.costs.values())
        )

    def test_a_changed_layer_has_another_weight(self, name: str, network: str) -> None:
        model = make(network)
        other = transformed(model, samples(), [name])
        (report,) = reports_of(other)
        before, after = dict(model.named_parameters()), dict(other.named_parameters())
        moved = {
            key.removesuffix(".weight")
            for key in before
            if key.endswith("weight") and not torch.equal(before[key], after[key])
        }
        assert moved == set(report.changed)

    def test_seeds_repeat(self, name: str, network: str) -> None:
        one, two = (transformed(make(network), samples(), [name], seed=4) for _ in range(2))
        assert all(
            torch.equal(a, b)
            for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
        )
        assert one.state_dict().keys() == two.state_dict().keys()

    def test_the_result_is_picklable(self, name: str, network: str) -> None:
        other = transformed(make(network), samples(), [name])
        with torch.no_grad():
            expected = other(samples()[0])
            again = pickle.loads(pickle.dumps(other))
            copied = copy.deepcopy(other)
            assert torch.equal(again(samples()[0]), expected)
            assert torch.equal(copied(samples()[0]), expected)
        assert reports_of(again) == reports_of(other)

    def test_the_result_can_be_searched(self, name: str, network: str) -> None:
        model, (batch, _) = make(network), samples()
        other = transformed(model, [batch], [name])
        graph, own = build_graph(other, batch), build_graph(model, batch)
        assert [layer.name for layer in graph.layers] == [layer.name for layer in own.layers]
        assert graph.units == own.units
        layers = [name for unit in graph.units for name in unit.layers]
        with torch.no_grad():
            expected = other(batch)
            with quantized(other, dict.fromkeys(layers, INT8)):
                rounded = other(batch)
            assert torch.equal(other(batch), expected)
        assert 0 < relative(rounded, expected) < 0.5


def test_the_readers_of_norms() -> None:
    found = {group.norm: group for group in norm_readers(make("vit"), samples()[0])}
    assert found["blocks.0.norm1"].linears == tuple(
        f"blocks.0.attn.{n}_proj" for n in ("q", "k", "v")
    )
    assert found["blocks.0.norm2"].linears == ("blocks.0.fc1",)
    assert found["norm"].linears == ("head",)
    assert not any(group.why_not for group in found.values())
    (gated,) = norm_readers(make("gated"), samples()[0])
    assert gated.linears == ("gate_proj", "up_proj")
    assert not gated.why_not
    (post,) = norm_readers(make("post_norm"), samples()[0])
    assert post.linears == ("fc1",)
    assert "add" in post.why_not


class InPlace(PostNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        y = self.fc1(x)
        x += 1.0
        return self.head(x) + y.sum(-1, keepdim=True)


class Returned(PostNorm):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x = self.norm(self.first(x))
        return self.head(x), x


class Elsewhere(PostNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        return self.head(self.norm(first)) + self.head(first)


class Shared(PostNorm):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(WIDTH, 3)
        self.twin.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)))


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (InPlace, "writes to its output"),
        (Returned, "returns its output"),
        (Elsewhere, "reads something else"),
        (Shared, "its weight is shared"),
    ],
)
def test_a_norm_with_another_reader_is_refused(network: type[nn.Module], why: str) -> None:
    torch.manual_seed(0)
    model = network().eval()
    (group,) = norm_readers(model, samples()[0])
    assert why in group.why_not
    with torch.no_grad():
        other = transformed(model, samples(), ["smooth"])
        assert torch.equal(call(other, samples()[0]), call(model, samples()[0]))


class Functional(PostNorm):
    """Reads a weight beside its layer, which no trace of layers shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.head(self.fc2(self.fc1(x) + self.fc1.weight.sum(1)))


def test_a_fold_that_changes_the_outputs_is_taken_back() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    (group,) = norm_readers(model, samples()[0])
    assert not group.why_not
    other = transformed(model, samples(), ["smooth"])
    (report,) = reports_of(other)
    assert report.changed == ()
    assert "outputs differ by" in report.unchanged["fc1"]
    state = other.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_smooth_balances_channels(strength: float) -> None:
    model, batches = make("gated"), samples()
    other = transformed(model, batches, [f"smooth({strength})"])
    seen = channel_ranges(model, ["norm"], batches)["norm"].largest
    after = channel_ranges(other, ["norm"], batches)["norm"].largest
    columns = torch.cat([model.gate_proj.weight, model.up_proj.weight]).double().abs().amax(0)
    scale = seen**strength / columns ** (1 - strength)
    torch.testing.assert_close(after, seen / scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        other.up_proj.weight.double(), model.up_proj.weight * scale, rtol=1e-5, atol=1e-9
    )


def test_shift_centres_channels() -> None:
    model, batches = make("vit"), samples()
    other = transformed(model, batches, ["shift"])
    seen = channel_ranges(other, ["blocks.0.norm1"], batches)["blocks.0.norm1"]
    torch.testing.assert_close(seen.high, -seen.low, rtol=1e-4, atol=1e-5)
    assert model.blocks[0].attn.k_proj.bias is None
    assert other.blocks[0].attn.k_proj.bias is not None
    assert model.blocks[0].norm2.bias is None
    assert other.blocks[0].norm2.bias is not None


def test_repq_gives_all_channels_one_range() -> None:
    model, batches = make("vit"), samples()
    own = channel_ranges(model, ["blocks.0.norm1"], batches)["blocks.0.norm1"]
    other = transformed(model, batches, ["repq"])
    seen = channel_ranges(other, ["blocks.0.norm1"], batches)["blocks.0.norm1"]
    spans = own.high - own.low
    lowest = -(-own.low / spans).mean() * spans.mean()
    torch.testing.assert_close(seen.low, lowest.expand(WIDTH), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        seen.high, (lowest + spans.mean()).expand(WIDTH), rtol=1e-4, atol=1e-4
    )


def test_repq_bounds_the_ratio() -> None:
    model, batches = make("vit"), samples()
    other = transformed(model, batches, ["repq(2)"])
    before, after = (of.blocks[0].norm1.weight.detach() for of in (model, other))
    assert float((before / after).min()) >= 0.5 - 1e-6
    assert float((before / after).max()) <= 2 + 1e-6
    assert reports_of(other)[0].transform == "repq(2)"


@pytest.mark.parametrize("name", ["shift", "repq"])
def test_a_norm_without_a_bias_takes_no_shift(name: str) -> None:
    (report,) = reports_of(transformed(make("gated"), samples(), [name]))
    assert report.changed == ()
    assert "RMSNorm has no bias" in report.unchanged["up_proj"]


def test_a_constant_channel_is_no_division_by_zero() -> None:
    model = make("vit")
    with torch.no_grad():
        model.blocks[0].norm1.weight[:2] = 0.0
        model.blocks[0].norm1.bias[0] = 0.0
    for name in ("smooth", "shift", "repq"):
        other = transformed(model, samples(), [name])
        assert "blocks.0.norm1" in reports_of(other)[0].changed
        with torch.no_grad():
            assert relative(other(samples()[0]), model(samples()[0])) < 1e-5


@pytest.mark.parametrize(
    ("transform", "code", "text"),
    [
        ("smoth", "unknown_transform", "did you mean 'smooth'"),
        ("smooth(2)", "transform", "between 0"),
        ("smooth(a)", "transform", "settings are numbers"),
        ("smooth(0.5", "transform", "got 'smooth\\(0.5'"),
        ("smooth(0.5, 1)", "transform", "has 2 settings, smooth takes 1 at most"),
        ("repq(0.5)", "transform", "from 1 on"),
    ],
)
def test_what_is_no_transform_is_refused(transform: str, code: str, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text) as error:
        mpq.prepared(make("vit"), samples(), [transform])
    assert error.value.code == code


def test_transforms_follow_each_other() -> None:
    model, batches = make("vit"), samples()
    other = mpq.prepared(model, batches, ["shift", "repq(4)"])
    assert [report.transform for report in reports_of(other)] == ["shift(0.5)", "repq(4)"]
    further = mpq.prepared(other, batches, ["smooth"])
    assert len(reports_of(further)) == 3
    assert len(reports_of(other)) == 2
    with torch.no_grad():
        assert relative(further(batches[0]), model(batches[0])) < 1e-5
    with pytest.raises(InvalidInputError, match="transforms is a list"):
        mpq.prepared(model, batches, "smooth")  # type: ignore[arg-type]


def test_a_transform_that_changes_nothing_warns() -> None:
    with pytest.warns(MpqWarning, match="smooth.* changed nothing; .*: .*add reads its output"):
        mpq.prepared(make("post_norm"), samples(), ["smooth"])
    with pytest.warns(MpqWarning, match="not the output of a norm alone"):
        mpq.prepared(mlp(), [torch.randn(3, 6)], ["smooth"])


def test_batches_that_are_mappings_and_tied_weights() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    batch = {"input_ids": torch.randint(0, 11, (3, 5)), "labels": torch.zeros(3)}
    other = mpq.prepared(model, [batch], ["smooth"])
    (report,) = reports_of(other)
    assert set(report.changed) == {"blocks.0.norm", *(f"blocks.0.{n}_proj" for n in "qkv")}
    assert "shared" in report.unchanged["lm_head"]
    assert "flip reads its output" in report.unchanged["blocks.1.q_proj"]
    with torch.no_grad():
        assert relative(call(other, batch), call(model, batch)) < 1e-5


def test_smooth_and_shift_help_static_ranges() -> None:
    """Int6 activations of one range per tensor lose less once channels are alike."""
    model, batches = make("vit"), samples(4)
    layers = ["blocks.0.fc1", "blocks.1.fc1"]
    scheme = parse_scheme("fp32:int6static")

    def loss(network: nn.Module) -> float:
        from mpq.nn.calibrate import with_input_ranges

        graph = with_input_ranges(network, build_graph(network, batches[0]), batches, layers)
        chosen = dict.fromkeys(layers, scheme)
        with torch.no_grad(), quantized(network, chosen, limits=graph.input_ranges):
            rounded = torch.cat([network(batch) for batch in batches])
        return float((rounded - expected).square().mean())

    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in batches])
    plain = loss(model)
    for name in ("smooth", "shift", "repq"):
        assert loss(transformed(model, batches, [name])) < 0.5 * plain


def test_llama_of_transformers() -> None:
    from tests.test_lrp import tiny

    model = tiny("llama", "eager")
    batch = {"input_ids": torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))}
    other = transformed(model, [batch], ["smooth"])
    (report,) = reports_of(other)
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.norm"} <= set(
        report.changed
    )
    with torch.no_grad():
        assert relative(call(other, batch), call(model, batch)) < 1e-5
