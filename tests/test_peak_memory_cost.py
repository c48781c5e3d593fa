"""Peak activation memory: by hand, against the allocator of torch, and as a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mpq
from hw_cost_models import get_cost_model
from mpq.core.errors import InvalidInputError
from mpq.nn.peak import peak_activation_bytes
from mpq.residency import bytes_beside
from mpq.store.store import open_store
from tests.builders import Decoder, conv_net, mlp
from tests.test_costs import cells_of, graph_of_three

transformers = pytest.importorskip("transformers")


class Residual(nn.Module):
    """x + second(relu(first(x))): x stays alive beside the wide hidden tensor."""

    def __init__(self, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        return x + self.second(self.first(x).relu())


class InPlace(nn.Module):
    """A view and in-place changes: nothing new is allocated by either."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.view(-1).mul_(2)
        return y.reshape(-1)


def allocated(model: nn.Module, sample: torch.Tensor) -> int:
    """Return the peak of torch's own allocations in a pass, followed by its profiler."""
    with (
        torch.no_grad(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        model.eval()(sample)
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_live_tensors_by_hand() -> None:
    rows = torch.zeros(5, 16)
    # x * 2 (16), first (64) and relu (64) are alive together; then 64 + 16 + 16 + 16
    assert peak_activation_bytes(Residual(), rows) == 4 * 5 * (16 + 64 + 64)
    assert peak_activation_bytes(mlp(), torch.zeros(5, 6)) == 4 * 5 * (8 + 8)
    assert peak_activation_bytes(InPlace(), rows) == 4 * 5 * 16


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_the_meta_device_needs_as_much(rows: int) -> None:
    real = peak_activation_bytes(Residual(), torch.zeros(rows, 16))
    with torch.device("meta"):
        assert peak_activation_bytes(Residual(), torch.zeros(rows, 16)) == real


@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (Residual(), torch.randn(32, 16)),
        (mlp(), torch.randn(32, 6)),
        (Decoder(), torch.randint(0, 11, (4, 9))),
    ],
    ids=["residual", "mlp", "decoder"],
)
def test_it_is_what_torch_allocates(model: nn.Module, sample: torch.Tensor) -> None:
    found, known = peak_activation_bytes(model, sample), allocated(model, sample)
    assert found <= known  # a kernel may take some for itself
    assert known <= 1.3 * found + 1024


def test_more_samples_take_more_and_nothing_is_kept() -> None:
    model = conv_net()
    before = [p.detach().clone() for p in model.parameters()]
    sizes = [peak_activation_bytes(model, torch.randn(n, 3, 12, 12)) for n in (1, 2, 4)]
    assert sizes[1] == 2 * sizes[0]
    assert sizes[2] == 4 * sizes[0]
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_tables_add_what_no_choice_changes() -> None:
    graph, cells = graph_of_three(), cells_of("fp32", "int8")
    memory = get_cost_model("memory").table(graph, cells)
    resident = get_cost_model("resident", cache_bytes=100).table(graph, cells)
    peak = get_cost_model("peak", cache_bytes=100, activation_bytes=50).table(graph, cells)
    assert resident.values.tolist() == peak.values.tolist() == memory.values.tolist()
    assert (resident.fixed, peak.fixed) == (memory.fixed + 100, memory.fixed + 150)
    assert (resident.baseline, peak.baseline) == (memory.baseline + 100, memory.baseline + 150)
    assert (resident.name, peak.name, peak.unit) == ("resident", "peak", "bytes")
    assert peak.provenance.startswith("conservative")


def test_the_cache_is_that_of_the_sample() -> None:
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.zeros(3, 10, dtype=torch.long)
    expected = {"cache_bytes": 2 * 2 * 8 * 2 * 10 * 3 * 4}
    assert bytes_beside("resident", model, {"input_ids": tokens}) == expected
    assert bytes_beside("resident", model, tokens) == expected
    assert bytes_beside("resident", mlp(), torch.zeros(2, 6)) == {"cache_bytes": 0}
    config.kv_lora_rank = 4
    with pytest.raises(InvalidInputError, match="latent attention"):
        bytes_beside("peak", model, tokens)


def test_peak_memory_is_a_budget(tmp_path: Path) -> None:
    batches = [torch.randn(4, 6) for _ in range(2)]
    with open_store(str(tmp_path / "runs.db")) as store:
        result = mpq.search(
            mlp(),
            batches,
            budgets=["peak <= 400 B", "resident <= 90%"],
            schemes=["int8", "int4"],
            executor="serial",
            refine=0,
            storage=store,
        )
        costs, totals = result.problem.costs, result.solution.totals
    assert totals is not None
    assert totals["peak"] <= 400
    assert totals["peak"] == totals["memory"] + 4 * (8 + 8)  # of one sample
    assert totals["resident"] == totals["memory"]
    assert costs["peak"].baseline == costs["memory"].baseline + 64
