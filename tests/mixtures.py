"""Tiny mixtures of experts, their data, and workloads of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mpq.core.layers import LayerGraph
from mpq.nn.fingerprint import batches_digest, model_digest
from mpq.nn.workload import Workload
from tests.builders import workload

TEXTS = ("fp32", "int2", "int3t", "int4g2a")


class Mixture(nn.Module):
    """Every token through every expert, weighed by a router; parts of a residual block."""

    def __init__(self, width: int = 4, hidden: int = 6, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x).softmax(-1)
        hidden = F.silu(torch.einsum("nd,ehd->neh", x, self.up))
        out = [F.linear(hidden[:, e], self.down[e]) for e in range(len(self.down))]
        return x + torch.einsum("ne,end->nd", weights, torch.stack(out))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.moe, self.head = nn.Linear(6, 4), Mixture(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.moe(self.stem(x)))


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().eval()


def batches(count: int = 2, samples: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(samples, 6, generator=generator) for _ in range(count)]


def moe_workload(model: nn.Module, data: list[torch.Tensor], **changes: object) -> Workload:
    keys = {"key": model_digest(model), "batch_keys": batches_digest(tuple(data))}
    return workload(model, data, TEXTS, **(keys | changes))


def mixtral(implementation: str = "grouped_mm") -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    return model


def words(count: int, samples: int = 3, length: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    shape = (samples, length)
    return [{"input_ids": torch.randint(0, 32, shape, generator=generator)} for _ in range(count)]


def experts_of(graph: LayerGraph) -> dict[str, int]:
    return {la.name: la.macs for la in graph.layers if la.kind == "experts"}
