"""Prefix caching gives the outputs of plain passes bit for bit, on networks that make it hard."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sensitivity.prefix
from mpq.core.errors import MpqWarning
from mpq.nn.batches import Batch, call
from mpq.nn.patch import evaluating, quantized
from mpq.nn.workload import Workload
from sensitivity.alone import alone
from sensitivity.prefix import Prefix, used_elsewhere
from tests.builders import CASES, case, workload
from tests.contracts import borrowed_state, same_state

TEXTS = ("int2", "int4:int8", "fp32")


def plain_outputs(of: Workload, number: int = 0) -> list[torch.Tensor]:
    """Return the output with each cell changed, each by a whole pass from the same generator."""
    found = []
    with evaluating(of.model), torch.no_grad():
        start = torch.get_rng_state()
        for unit, choices in zip(of.graph.units, of.cells.schemes, strict=True):
            for scheme in choices:
                layers = dict.fromkeys(unit.layers, scheme)
                torch.set_rng_state(start)
                with quantized(of.model, layers, quantizer=of.quantizer):
                    found.append(call(of.model, of.calibration[number]))
    return found


def cached_outputs(of: Workload, number: int = 0) -> list[torch.Tensor]:
    """Return the same outputs as `alone` hands them to its functions, in the order of cells."""
    seen: list[torch.Tensor] = []
    order: list[float] = []

    def keep(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
        seen.append(changed.clone())
        return torch.full((len(changed),), float(len(seen) - 1))

    order = alone(of, number, {"place": keep})["place"][:, 0].tolist()
    return [seen[int(place)] for place in order]


class Body(nn.Module):
    """Three layers with something odd before the last, by overriding `odd`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act, self.identity = nn.ReLU(), nn.Identity()
        self.in_place = nn.ReLU(inplace=True)

    def odd(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.odd(self.act(self.first(x))))


class Counter(nn.Module):
    """Adds how often it was called in this pass."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


class ListOfStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.states: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.states.append(x * 2)
        return x + 1


class Pair(nn.Module):
    """Returns one tensor twice, in a nesting."""

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = x * 2
        return {"a": (y, [y]), "n": 3, "none": None}


class Expanded(nn.Module):
    """Returns a tensor whose elements share memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True).expand(-1, 6)


class Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.unsqueeze(1) * 2).expand(-1, 4, -1).contiguous().transpose(1, 2)


class Writes(nn.Module):
    """Writes to its input and returns something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Running(nn.Module):
    """Writes to a buffer, which later calls read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.copy_(0.5 * self.total + x.mean(0))
        return x + self.total


def odd(change: Callable[[Body, torch.Tensor], torch.Tensor], **modules: nn.Module) -> nn.Module:
    class Odd(Body):
        def odd(self, x: torch.Tensor) -> torch.Tensor:
            return change(self, x)

    made = Odd()
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def in_place_on_residual(m: Body, x: torch.Tensor) -> torch.Tensor:
    y = x - 0.5
    return m.second(m.in_place(y)) + y  # y was written to by the module before


def in_place_after_identity(m: Body, x: torch.Tensor) -> torch.Tensor:
    y = m.identity(x)
    y += 1
    return m.second(x * y)  # x was written to through y


def in_place_on_remembered(m: Body, x: torch.Tensor) -> torch.Tensor:
    y = m.act(m.second(x))
    y *= 2
    return y + m.second(y)


def own_weight_first(m: Body, x: torch.Tensor) -> torch.Tensor:
    return m.second(m.act(F.linear(x, m.second.weight)))  # act depends on second, called before


def last_weight_first(m: Body, x: torch.Tensor) -> torch.Tensor:
    return m.second(m.act(x * m.last.weight.mean(0)))


def written_by_module(m: Body, x: torch.Tensor) -> torch.Tensor:
    y = x - 0.5
    return m.second(m.get_submodule("writes")(y)) + y


def by_stride(m: Body, x: torch.Tensor) -> torch.Tensor:
    y = m.get_submodule("wide")(x)
    return m.second(y * (1.0 + y.stride(1)))


def by_forward(m: Body, x: torch.Tensor) -> torch.Tensor:
    return m.second.forward(m.act.forward(x))


def with_pair(m: Body, x: torch.Tensor) -> torch.Tensor:
    found = m.get_submodule("pair")(x)
    found["a"][0].add_(1)
    return m.second(found["a"][1][0] * found["n"])


def with_states(m: Body, x: torch.Tensor) -> torch.Tensor:
    states = m.get_submodule("states")
    states.states.clear()
    y = states(x)
    return m.second(y + states.states[0])


def with_counter(m: Body, x: torch.Tensor) -> torch.Tensor:
    counter = m.get_submodule("counter")
    counter.count = 0
    return m.second(counter(x)) + counter(x)


def with_running(m: Body, x: torch.Tensor) -> torch.Tensor:
    running = m.get_submodule("running")
    running.total.zero_()
    return m.second(running(x)) + running(x)


def featured() -> nn.Module:
    """A hook inside a block keeps what later code reads, where nothing can see it."""
    kept: dict[str, torch.Tensor] = {}
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    block[0].register_forward_hook(lambda m, a, out: kept.update(feature=out))
    return odd(lambda m, x: m.second(m.block(x) + kept["feature"]), block=block)


def reentrant() -> nn.Module:
    """One block called in several places, with a layer of its own."""
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
    return odd(lambda m, x: m.second(m.block(x)) + m.block(m.block(x)), block=block)


def encoder() -> nn.Module:
    """torch's own transformer layer: in eval mode one fused kernel reads all its weights."""
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer, nn.Linear(6, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).to(memory_format=torch.channels_last)


FLAT = torch.Size([5, 6])
NETS: dict[str, tuple[Callable[[], nn.Module], torch.Size]] = {
    "in place on a residual": (lambda: odd(in_place_on_residual), FLAT),
    "in place after identity": (lambda: odd(in_place_after_identity), FLAT),
    "in place on what is remembered": (lambda: odd(in_place_on_remembered), FLAT),
    "a weight read before its layer": (lambda: odd(own_weight_first), FLAT),
    "a later weight read first": (lambda: odd(last_weight_first), FLAT),
    "hooks inside": (featured, FLAT),
    "forward called directly": (lambda: odd(by_forward), FLAT),
    "one tensor twice": (lambda: odd(with_pair, pair=Pair()), FLAT),
    "shared memory": (lambda: odd(by_stride, wide=Expanded()), FLAT),
    "an input written to": (lambda: odd(written_by_module, writes=Writes()), FLAT),
    "transposed": (
        lambda: odd(
            lambda m, x: m.second(m.turned(x).transpose(1, 2)).mean(1), turned=Transposed()
        ),
        FLAT,
    ),
    "a list of states": (lambda: odd(with_states, states=ListOfStates()), FLAT),
    "a counter": (lambda: odd(with_counter, counter=Counter()), FLAT),
    "a buffer": (lambda: odd(with_running, running=Running()), FLAT),
    "one block in several places": (reentrant, FLAT),
    "random numbers": (
        lambda: odd(lambda m, x: m.second(x + torch.rand_like(x)) * torch.rand(1)),
        FLAT,
    ),
    "random numbers in a module": (
        lambda: odd(
            lambda m, x: m.second(m.noise(x)) * torch.rand(1),
            noise=nn.Sequential(nn.Tanh(), Noise()),
        ),
        FLAT,
    ),
    "a fused transformer layer": (encoder, torch.Size([3, 4, 6])),
    "channels last": (images, torch.Size([3, 3, 8, 8])),
}


def check_exact(of: Workload) -> None:
    before = borrowed_state(of.model)
    found = cached_outputs(of)
    assert same_state(before, borrowed_state(of.model))
    expected = plain_outputs(of)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_those_of_plain_passes(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model is not deterministic")
        of = workload(make().train(), [torch.randn(shape)], TEXTS)
    check_exact(of)


@pytest.mark.parametrize("name", CASES)
def test_outputs_of_shared_networks_are_those_of_plain_passes(name: str) -> None:
    model, batch = case(name)
    check_exact(workload(model, [batch], ("int3", "int4") if name == "conv" else TEXTS))


class Deep(nn.Module):
    """Blocks of two layers, so that whole blocks can be skipped."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        make = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(blocks)]
        self.blocks, self.head = nn.ModuleList(make), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_half_of_the_layers_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = 0
    plain = F.linear

    def counted(*args: torch.Tensor) -> torch.Tensor:
        nonlocal run
        run += 1
        return plain(*args)

    of = workload(Deep(), [torch.randn(4, 6)], ("int4", "int8"))
    monkeypatch.setattr(F, "linear", counted)
    cached_outputs(of)
    layers, cells = 13, 26
    changed = 2 * sum(range(1, layers + 1))  # of layer l, what comes after it and itself
    assert run == changed + 2 * layers + 1  # record, look where weights are read, prove
    assert run < 0.65 * layers * cells


def test_what_a_block_covers_is_forgotten() -> None:
    model = Deep()
    x = torch.randn(4, 6)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    prefix = Prefix(model, layers)
    with torch.no_grad():
        prefix.record(lambda: model(x))
    assert sum(c.output is not None for c in prefix._calls) == 25  # 6 blocks of 3, and the head
    prefix.release(prefix.start_of([model.blocks[4][2]]))
    held = [c.module for c in prefix._calls if c.output is not None]
    of_last_blocks = [model.blocks[4], *model.blocks[4], model.blocks[5], *model.blocks[5]]
    assert held == [*model.blocks[:4], *of_last_blocks, model.head]
    assert prefix._held == sum(c.output.nbytes for c in prefix._calls if c.output is not None)


def test_weights_read_outside_their_layer_are_noticed() -> None:
    for change, names in ((own_weight_first, ["second"]), (last_weight_first, ["last"])):
        model = odd(change)
        found = used_elsewhere(model, lambda: model(torch.randn(2, 6)))  # noqa: B023
        assert found == {id(model.get_parameter(f"{name}.weight")) for name in names}
    plain = Body()
    assert used_elsewhere(plain, lambda: plain(torch.randn(2, 6))) == set()

    def asks_for_types(m: Body, x: torch.Tensor) -> torch.Tensor:
        return m.second(x.to(m.last.weight.dtype) * m.last.weight.shape[0])

    asking = odd(asks_for_types)
    assert used_elsewhere(asking, lambda: asking(torch.randn(2, 6))) == set()


def hidden_state() -> nn.Module:
    """Keeps what modules say where nothing can see it, and starts each pass anew."""
    log: list[torch.Tensor] = []

    class Logging(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            log.append(x.mean())
            return x * 2

    def change(m: Body, x: torch.Tensor) -> torch.Tensor:
        log.clear()
        y = m.second(m.logging(x))
        return y + torch.stack([torch.zeros(()), *log]).sum()

    return odd(change, logging=Logging())


def test_a_network_that_cannot_be_cached_is_told_once_and_right() -> None:
    of = workload(hidden_state(), [torch.randn(4, 6)], TEXTS)
    with pytest.warns(MpqWarning, match="does not give the same output") as told:
        found = cached_outputs(of)
    assert len(told) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, plain_outputs(of), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached_outputs(of)


def test_another_order_of_calls_is_noticed() -> None:
    """The order changes between the proof and a later pass."""
    passes = 0

    def change(m: Body, x: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        first, second = (m.act, m.tanh) if passes < 6 else (m.tanh, m.act)
        return m.second(second(first(x)))

    of = workload(odd(change, tanh=nn.Tanh()), [torch.randn(4, 6)], ("int4",))
    passes = 1  # then look, record, prove and change the first layer; the fifth is another
    with pytest.warns(MpqWarning, match="does not give the same output"):
        found = cached_outputs(of)
    assert all(torch.equal(a, b) for a, b in zip(found, plain_outputs(of), strict=True))


def test_a_batch_that_is_too_large_is_cut_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def squares(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
        sizes.append(len(batch))
        return (original - changed).square().sum(1)

    of = workload(Deep(), [torch.randn(7, 6)], ("int4", "int8"))
    whole = alone(of, 0, {"f": squares})["f"]
    assert set(sizes) == {7}
    sizes.clear()
    monkeypatch.setattr(sensitivity.prefix, "_HELD_BYTES", 25 * 24 * 2)  # of two samples
    np.testing.assert_allclose(alone(of, 0, {"f": squares})["f"], whole, rtol=1e-4, atol=1e-9)
    assert set(sizes) == {1, 2}
    monkeypatch.setattr(sensitivity.prefix, "_HELD_BYTES", 100)  # not even of one sample
    np.testing.assert_allclose(alone(of, 0, {"f": squares})["f"], whole, rtol=1e-4, atol=1e-9)


def test_the_model_is_given_back_when_a_function_or_a_pass_fails() -> None:
    def fails(*_: object) -> torch.Tensor:
        raise ValueError("no")

    model = odd(in_place_on_residual).train()
    of = workload(model, [torch.randn(4, 6)], TEXTS)
    before = borrowed_state(model)
    with pytest.raises(ValueError, match="no"):
        alone(of, 0, {"f": fails})
    assert same_state(before, borrowed_state(model))
