"""Tiny random language models with the modules of Llama, and batches of tokens for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def llama(
    seed: int = 0,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    blocks: int = 2,
    **changes: Any,
) -> nn.Module:
    """A Llama with grouped queries and weights large enough that attention is not uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        initializer_range=0.15,
        **changes,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def words(samples: int = 4, length: int = 12, seed: int = 1) -> dict[str, Any]:
    """Random tokens, nothing masked."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 31, (samples, length), generator=generator)}


def batches() -> list[dict[str, Any]]:
    """Calibration batches as a job's entry point returns them."""
    return [words(), words(seed=2)]
