"""Uniform tokens, for language models: the cheapest data, and the furthest from text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch, arguments, call, describe
from mpq.nn.patch import evaluating
from mpq.nn.resized import resized
from mpq.nn.shapes import token_sample
from mpq.nn.synthetic.made import Made, batch_sizes

_TOKENS = 128
_IDS = "input_ids"


def random_tokens(
    model: nn.Module,
    sample: Batch | None,
    *,
    samples: int,
    batch: int,
    tokens: int | None,
    seed: int,
) -> Made:
    """Draw tokens uniformly from the vocabulary of a network that takes `input_ids`.

    Other inputs (masks, types) are those of `sample`, repeated, or what `token_sample` makes;
    `tokens` is the length, by default that of the sample, else 128 or the most positions that the
    config knows. The vocabulary is that of the config, else the smallest embedding that reads
    the tokens; special tokens that the config names are left out. Batches are int64 in the form of
    the sample. Costs nothing, or one forward pass where there is no config.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    longest = getattr(config, "max_position_embeddings", None)
    if sample is None:
        length = tokens or min(_TOKENS, longest or _TOKENS)
        sample = token_sample(model, 1, length)
        sample.pop("logits_to_keep", None)  # every position tells something
    if isinstance(sample, tuple | list):  # without its targets
        inputs = arguments(model, sample)[0]
        sample = inputs[0] if len(inputs) == 1 else inputs
    first = sample[_IDS] if isinstance(sample, Mapping) and _IDS in sample else sample
    if not isinstance(first, torch.Tensor) or first.is_floating_point() or first.ndim != 2:
        raise InvalidInputError(
            "sample",
            f"random_tokens fills input_ids (samples, tokens), and the sample "
            f"({describe(sample)}) has none: give calibration batches",
        )
    tokens = tokens or first.shape[1]
    if longest and tokens > longest:
        raise InvalidInputError(
            "data_option",
            f"random_tokens: tokens={tokens} is beyond the {longest} positions of the config",
        )
    words = getattr(config, "vocab_size", None) or _embedded(model, sample, first)
    usual = torch.ones(words, dtype=torch.bool)
    usual[[word for word in _special(config) if 0 <= word < words]] = False
    if not usual.any():
        usual[:] = True
    known = usual.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in batch_sizes(samples, batch):
        places = torch.randint(len(known), (size, tokens), generator=generator)
        ids = known[places].to(first.device, first.dtype)
        shaped = resized(sample, samples=size, tokens=tokens)
        made.append({**shaped, _IDS: ids} if isinstance(sample, Mapping) else ids)
    return Made(tuple(made), f"uniform over {len(known)} of {words} words, {tokens} tokens each")


def _special(config: Any) -> Iterable[int]:
    """Return the tokens that a config names: `pad_token_id`, `eos_token_id`, ..."""
    for name in dir(config):
        value = getattr(config, name, None) if name.endswith("_token_id") else None
        yield from (
            value if isinstance(value, list | tuple) else [value] if value is not None else []
        )


def _embedded(model: nn.Module, sample: Batch, tokens: torch.Tensor) -> int:
    """Return the words of the smallest embedding that reads the tokens."""
    found: list[int] = []

    def reads(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Embedding)
        if args and args[0].shape == tokens.shape and torch.equal(args[0], tokens):
            found.append(module.num_embeddings)

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_pre_hook(reads) for module in embeddings]
    try:
        with evaluating(model), torch.no_grad():
            call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InvalidInputError(
            "sample",
            f"random_tokens: no config.vocab_size and no embedding of {type(model).__name__} reads "
            f"the tokens: give calibration batches",
        )
    return min(found)
