"""Tiny networks, batches and tables that several tests share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import Convolution, Layer, LayerGraph, Unit, Unsearched
from mpq.core.problem import Budget, Problem
from mpq.core.tables import Cells, CostTable, SensitivityTable
from mpq.nn.divergence import OutputDivergence
from mpq.nn.graph import build_graph
from mpq.nn.workload import Workload


def schemes(*texts: str) -> tuple[Scheme, ...]:
    return tuple(parse_scheme(text) for text in texts)


def cells(units: int = 3, texts: tuple[str, ...] = ("int2", "int4", "int8")) -> Cells:
    names = tuple(f"unit{number}" for number in range(units))
    return Cells(units=names, schemes=(schemes(*texts),) * units)


def sensitivity(of: Cells, values: np.ndarray | None = None) -> SensitivityTable:
    chosen = np.arange(len(of), 0, -1, dtype=np.float64) if values is None else values
    return SensitivityTable(metric="made", cells=of, values=chosen, stderr=np.zeros(len(of)))


def cost(of: Cells, name: str = "memory", unit: str = "bytes", **changes: object) -> CostTable:
    """A cost of 1, 2, 3, ... for the cells, in order."""
    return CostTable.exact(name, unit, of, np.arange(1.0, len(of) + 1), **changes)  # type: ignore[arg-type]


def problem(of: Cells, budgets: Mapping[str, float] | None = None) -> Problem:
    limits = {"memory": 1e9} if budgets is None else budgets
    return Problem(
        sensitivity=sensitivity(of),
        costs={"memory": cost(of, fixed=10.0), "latency": cost(of, "latency", "s")},
        budgets=tuple(Budget(name, limit) for name, limit in limits.items()),
    )


def mlp(inputs: int = 6, hidden: int = 8, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def conv_net() -> nn.Sequential:
    """Every convolution kind, with batch norm (buffers) and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(2),
        nn.Conv1d(4, 5, 3, dilation=2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(5, 3),
    )


class Block(nn.Module):
    """A transformer block with the names of Llama; `cross` reads keys and values elsewhere."""

    def __init__(self, width: int = 8, cross: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.gate_proj = nn.Linear(width, 2 * width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)
        self.cross = cross

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        memory = h.flip(1) if self.cross else h
        q, k, v = self.q_proj(h), self.k_proj(memory), self.v_proj(memory)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Decoder(nn.Module):
    """Tokens to logits: two blocks, a head tied to the embedding, buffers of both kinds."""

    def __init__(self, words: int = 11, width: int = 8, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([Block(width), Block(width, cross=True)])
        self.lm_head = nn.Linear(width, words, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((width,), 2.0))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids) * self.scale
        for block in self.blocks:
            x = block(x)
        return {"logits": self.lm_head(x)}


class Recurrent(nn.Module):
    """One linear layer called `times` times, then a head tied to it."""

    def __init__(self, width: int = 4, times: int = 2) -> None:
        super().__init__()
        self.cell = nn.Linear(width, width)
        self.twin = nn.Linear(width, width, bias=False)
        self.twin.weight = self.cell.weight
        self.head = nn.Linear(width, 2)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.cell(x))
        return self.head(self.twin(x))


class Shuffled(nn.Module):
    """Modules are called in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.never = nn.Linear(6, 2), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(self.first(x)))


class Experts(nn.Module):
    """Expert weights in one 3-D parameter, a module without weights, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 2)
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.pass_through = nn.Identity()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is nothing to initialise
            self.empty, self.narrow = nn.Linear(4, 0), nn.Linear(0, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).softmax(-1)
        return torch.einsum("ne,ni,eio->no", chosen, self.pass_through(x), self.experts)


def tokens(samples: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.arange(samples * length).reshape(samples, length) % 11
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def case(name: str) -> tuple[nn.Module, object]:
    """A network and one batch for it, by name."""
    torch.manual_seed(7)
    made = {
        "mlp": lambda: (mlp(), torch.randn(4, 6)),
        "conv": lambda: (conv_net(), torch.randn(2, 3, 8, 8)),
        "decoder": lambda: (Decoder(), tokens()),
        "untied": lambda: (Decoder(tied=False), tokens()),
        "recurrent": lambda: (Recurrent(), torch.randn(3, 4)),
        "half": lambda: (mlp().to(torch.bfloat16), torch.randn(4, 6).to(torch.bfloat16)),
    }
    return made[name]()


CASES = ("mlp", "conv", "decoder", "untied", "recurrent", "half")


def workload(
    model: nn.Module,
    batches: Sequence[object],
    texts: tuple[str, ...] = ("int4", "int8:int8"),
    **changes: object,
) -> Workload:
    """Put a network and its batches together, every unit free to take any of the schemes."""
    graph = build_graph(model, batches[0])
    names = tuple(unit.name for unit in graph.units)
    given = {
        "model": model,
        "graph": graph,
        "cells": Cells(units=names, schemes=(schemes(*texts),) * len(names)),
        "calibration": tuple(batches),
        "held_out": (),
        "divergence": OutputDivergence("kl"),
    }
    return Workload(**(given | changes))  # type: ignore[arg-type]


def layer(name: str, shape: tuple[int, ...], kind: str = "linear", **changes: object) -> Layer:
    """A float32 layer of which nothing but its weight matters."""
    size = int(np.prod(shape))
    given = {
        "name": name,
        "kind": kind,
        "weight_shape": shape,
        "weight_id": f"{name}.weight",
        "weight_bytes": 4 * size,
        "input_shape": (1, 5, shape[-1]),
        "output_shape": (1, 5, shape[0]),
        "macs": 5 * size,
        "calls": 1,
        "order": 0,
    }
    if kind.startswith("conv"):
        ones, kernel = (1,) * len(shape[2:]), shape[2:]
        given["convolution"] = Convolution(
            kernel=kernel, stride=ones, padding=(0,) * len(ones), dilation=ones, groups=1
        )
    return Layer(**(given | changes))  # type: ignore[arg-type]


def llama_graph(width: int = 256, blocks: int = 2) -> LayerGraph:
    """The layers of a Llama by their names; the embedding and the head are not searched."""
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (2 * width, width),
        "mlp.up_proj": (2 * width, width),
        "mlp.down_proj": (width, 2 * width),
    }
    layers, units = [layer("model.embed_tokens", (11, width), "embedding")], []
    for number in range(blocks):
        prefix = f"model.layers.{number}"
        layers += [layer(f"{prefix}.{name}", shape) for name, shape in shapes.items()]
        names = [f"{prefix}.{name}" for name in shapes]
        units += [
            Unit(name=members[0], layers=tuple(members), reason="fused")
            for members in (names[:3], names[3:4], names[4:6], names[6:])
        ]
    layers.append(layer("lm_head", (11, width)))
    outside = (layers[0], layers[-1])
    return LayerGraph(
        layers=tuple(layers),
        units=tuple(units),
        unsearched=tuple(
            Unsearched(name=la.weight_id, elements=1, bytes=la.weight_bytes, reason="skipped")
            for la in outside
        ),
        sample="made",
    )
