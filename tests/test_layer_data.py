"""What calibration data say of layers against loops over samples and patches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.nn.divergence import OutputDivergence
from mpq.nn.layer_data import layer_data
from mpq.nn.quantizers.stored import LayerData
from mpq.nn.workload import Workload
from tests.builders import workload
from tests.oracles_rounding import patches


class Attention(nn.Module):
    """Linear layers that read one tensor, an in-place change, a mask and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)
        self.twice = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.twice.weight
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        score = self.q(x) @ self.k(x).transpose(1, 2)
        score = score.masked_fill(attention_mask[:, None, :] == 0, -1e9).softmax(-1)
        x = self.again(torch.relu(self.twice(score @ x)))
        mask = attention_mask.unsqueeze(-1).to(x)
        return self.out((x * mask).sum(1) / mask.sum(1))


class Convolutions(nn.Module):
    """Strides, paddings, dilation, groups, a depthwise and a one-dimensional one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), dilation=(1, 2))
        self.two = nn.Conv2d(4, 6, (2, 3), groups=2, padding=1)
        self.three = nn.Conv2d(6, 6, 3, groups=6)
        self.line = nn.Conv1d(6, 5, 2, stride=2)
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.out(torch.relu(self.line(self.three(x).flatten(2))).mean(2))


def attention() -> Workload:
    torch.manual_seed(0)
    batches = []
    for count, seed in ((3, 1), (2, 2)):
        x = torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(seed)).double()
        mask = torch.ones(count, 5, dtype=torch.long)
        mask[0, 3:] = 0
        batches.append({"x": x, "attention_mask": mask})
    return workload(Attention().double(), batches, seed=5, num_probes=3)


def convolutions() -> Workload:
    torch.manual_seed(0)
    batches = [torch.randn(n, 2, 9, 11).double() for n in (2, 3)]
    return workload(Convolutions().double(), batches, seed=5, num_probes=2)


def gathered(of: Workload, *want: str) -> dict[str, LayerData]:
    names = dict.fromkeys(layer.weight_id for layer in of.graph.layers)
    return dict(layer_data(of, dict.fromkeys(names, want)))  # type: ignore[misc]


def inputs_of(of: Workload) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {}
    modules = dict(of.model.named_modules())
    hooks = [
        modules[layer.name].register_forward_pre_hook(
            lambda _, args, name=layer.name: seen.setdefault(name, []).append(args[0].detach())
        )
        for layer in of.graph.layers
    ]
    for number, batch in enumerate(of.calibration):
        of.output(number, batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_grams_of_linear_layers_leave_masked_positions_out_and_add_tied_layers_up() -> None:
    of = attention()
    found, seen = gathered(of, "gram"), inputs_of(of)
    masks = [batch["attention_mask"].bool() for batch in of.calibration]
    for name in ("q", "k", "twice", "out"):
        names = ("twice", "again") if name == "twice" else (name,)
        rows = [
            row
            for n in names
            for x, mask in zip(seen[n], masks, strict=True)
            for row in (x[mask] if x.ndim == 3 else x)
        ]
        expected = sum(torch.outer(row, row) for row in rows)
        torch.testing.assert_close(found[f"{name}.weight"].gram, expected.float())
    assert found["q.weight"].outputs is None
    assert found["q.weight"].fisher is None


def test_a_tensor_changed_in_place_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1.0
            first = self.a(y)
            y.mul_(2.0)
            return first + self.b(y)

    found = gathered(workload(InPlace(), [torch.randn(7, 4)]), "gram")
    torch.testing.assert_close(4 * found["a.weight"].gram, found["b.weight"].gram)  # type: ignore[operator]


def test_grams_of_convolutions_are_those_of_their_patches() -> None:
    of = convolutions()
    found, seen = gathered(of, "gram"), inputs_of(of)
    for name in ("one", "two", "three"):
        conv = of.model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        rows = torch.cat([patches(x, conv) for x in seen[name]], dim=1)
        expected = torch.einsum("grn,grm->gnm", rows, rows).float()
        torch.testing.assert_close(
            found[f"{name}.weight"].gram, expected[0] if conv.groups == 1 else expected
        )
    line = torch.cat([x.unfold(2, 2, 2).permute(0, 2, 1, 3).flatten(2) for x in seen["line"]])
    torch.testing.assert_close(
        found["line.weight"].gram, torch.einsum("srn,srm->nm", line, line).float()
    )


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_rows_times_weights_are_the_outputs_of_a_convolution(mode: str) -> None:
    from mpq.nn.layer_data import rows_seen

    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2, bias=False, padding_mode=mode)
    x = torch.randn(3, 4, 7, 8)
    rows = rows_seen(conv, x)  # (groups, samples, places, n)
    out = torch.einsum("gspn,gon->sgop", rows, conv.weight.reshape(2, 3, -1))
    torch.testing.assert_close(out.reshape(3, 6, 7, 8), conv(x))


@pytest.mark.parametrize("make", [attention, convolutions])
@pytest.mark.parametrize("kind", ["kl", "mse", "cosine"])
def test_gradients_are_those_of_each_sample_and_probe(make, kind: str) -> None:  # type: ignore[no-untyped-def]
    of = make()
    of = Workload(
        **{f: getattr(of, f) for f in of.__slots__} | {"divergence": OutputDivergence(kind)}  # type: ignore[arg-type]
    )
    found = gathered(of, "outputs", "fisher", "gram")
    parameters = dict(of.model.named_parameters())
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        of.model.get_submodule(layer.name).register_forward_hook(
            lambda _, __, output, name=layer.name: outputs.__setitem__(name, output)
        )
        for layer in of.graph.layers
    ]
    squares: dict[str, torch.Tensor] = {}
    at_output: dict[str, list[torch.Tensor]] = {}
    place = 0
    for batch in of.calibration:
        count = len(batch["x"] if isinstance(batch, dict) else batch)
        for s in range(count):
            sample = (
                {k: v[s : s + 1] for k, v in batch.items()}
                if isinstance(batch, dict)
                else batch[s : s + 1]
            )
            generator = torch.Generator().manual_seed(5 * 1_000_000_007 + place)
            place += 1
            head = of.divergence.head(of.output(0, sample))
            for _ in range(of.num_probes):
                bits = torch.randint(0, 2, head.shape[1:], generator=generator, dtype=torch.int8)
                seed = of.divergence.seeds(head.detach(), bits[None].double() * 2 - 1)
                for name in found:
                    (g,) = torch.autograd.grad(head, parameters[name], seed, retain_graph=True)
                    squares[name] = squares.get(name, 0) + g.square()
                for layer in of.graph.layers:
                    (g,) = torch.autograd.grad(head, outputs[layer.name], seed, retain_graph=True)
                    axis = g.ndim - 1 if layer.kind == "linear" else 1
                    g = g.movedim(axis, -1).reshape(-1, g.shape[axis])
                    if isinstance(sample, dict) and len(g) == 5:
                        g = g[sample["attention_mask"][0].bool()]
                    at_output.setdefault(layer.weight_id, []).append(g)
    for hook in hooks:
        hook.remove()
    for name, data in found.items():
        fisher = (squares[name] / (place * of.num_probes)).float()
        torch.testing.assert_close(data.fisher, fisher, atol=1e-9, rtol=1e-4)
        mean = torch.cat(at_output[name]).square().mean(0).float()
        torch.testing.assert_close(data.outputs, mean, atol=1e-9, rtol=1e-4)


def test_batches_portions_and_passes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    of = attention()
    whole = gathered(of, "gram", "fisher")
    monkeypatch.setattr("mpq.nn.layer_data._HELD_BYTES", 1)
    again = gathered(
        Workload(**{f: getattr(of, f) for f in of.__slots__} | {"at_once": 1}), "gram", "fisher"
    )
    assert list(again) == list(whole)
    for name, data in whole.items():
        torch.testing.assert_close(again[name].gram, data.gram)
        assert data.fisher is not None
        assert torch.equal(again[name].fisher, data.fisher)


def test_the_model_is_only_borrowed() -> None:
    of = attention()
    of.model.train()
    before = {k: v.clone() for k, v in of.model.state_dict().items()}
    state = torch.get_rng_state()
    gathered(of, "gram", "fisher", "outputs")
    assert of.model.training
    assert all(p.requires_grad for p in of.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in of.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in of.model.modules())


def test_layers_that_have_none_are_named() -> None:
    of = workload(
        nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten()), [torch.randn(2, 2, 3, 3)]
    )
    with pytest.raises(InvalidInputError, match="conv_transpose2d '0' is a transposed convolution"):
        gathered(of, "gram")


def test_gradients_that_are_off_are_told() -> None:
    class Off(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.fc(x)
            return self.out(x)

    with pytest.raises(InvalidInputError, match="'fc' runs with gradients off"):
        gathered(workload(Off(), [torch.randn(3, 4)]), "fisher")
