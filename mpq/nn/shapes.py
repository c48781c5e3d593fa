"""Language models by their config: a batch of tokens, and the geometry of their attention."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from mpq.core.attention import Attention
from mpq.core.errors import InvalidInputError


def generates(network: nn.Module) -> bool:
    """Tell whether a network says of itself that it generates tokens one after the other."""
    can = getattr(network, "can_generate", None)
    return bool(can is not None and can())


def token_sample(network: nn.Module, batch: int, tokens: int) -> dict[str, Any]:
    """Return a batch of tokens on the network's device, as a server runs it.

    Logits of the last position alone where the network can, and no cache of its own.
    Raises InvalidInputError for a network that takes no `input_ids`.
    """
    known = inspect.signature(network.forward).parameters
    if "input_ids" not in known:
        raise InvalidInputError(
            "sample",
            f"{type(network).__name__}.forward takes no input_ids: give a sample batch of the "
            f"shape that will be served",
        )
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    shape = (batch, tokens)
    sample: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.long, device=device)}
    # With causal attention transformers look at the numbers of positions where there is no mask,
    # with any other at those of the mask; on the meta device there are none.
    if "attention_mask" in known and generates(network):
        sample["attention_mask"] = torch.ones(shape, dtype=torch.long, device=device)
    options = {"use_cache": False, "logits_to_keep": 1}
    return sample | {name: value for name, value in options.items() if name in known}


def attention_of(network: nn.Module, context: int) -> tuple[Attention | None, list[str]]:
    """Return a network's attention by its config, None where it tells none, and what to know."""
    config = getattr(network, "config", None)
    config = getattr(config, "text_config", None) or config
    layers, heads, width = (
        getattr(config, name, None)
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not layers or not heads or not width:
        return None, ["no config tells the attention: no KV cache, nothing of decoding"]
    if getattr(config, "kv_lora_rank", None):
        return None, ["latent attention is not modelled: no KV cache, nothing of decoding"]
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    notes = []
    longest = getattr(config, "max_position_embeddings", None)
    if longest and context > longest:
        notes.append(f"a context of {context} is beyond the {longest} positions of the config")
    cached = [kind for kind in kinds if kind in ("full_attention", "sliding_attention")]
    if len(cached) < len(kinds):
        others = sorted(set(kinds) - set(cached))
        notes.append(f"layers of {', '.join(others)} keep no KV cache here and take no time")
    return (
        Attention(
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or width // heads,
            windows=tuple(window if kind == "sliding_attention" else None for kind in cached),
        ),
        notes,
    )
