"""What a network holds in memory beside its weights when it runs the sample."""

from __future__ import annotations

from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch, arguments
from mpq.nn.peak import peak_activation_bytes
from mpq.nn.shapes import attention_of, generates


def bytes_beside(cost: str, model: nn.Module, sample: Batch) -> dict[str, int]:
    """Return the options of the cost model "resident" or "peak".

    The KV cache is that of a sample of tokens, for a network that generates; others have none.
    Raises InvalidInputError where a network generates but does not tell its attention.
    """
    options = {"cache_bytes": _cache_bytes(cost, model, sample)}
    if cost == "peak":
        options["activation_bytes"] = peak_activation_bytes(model, sample)
    return options


def tokens_of(model: nn.Module, sample: Batch) -> tuple[int, int]:
    """Return the sequences of a sample of tokens, and the tokens of each.

    Raises InvalidInputError for a sample of anything else.
    """
    positional, named = arguments(model, sample)
    ids = positional[0] if positional else named.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise InvalidInputError(
            "kv_cache", "the sample holds no tokens: give kv_cache={'context': 4096, 'batch': 8}"
        )
    batch, context = ids.shape
    return batch, context


def _cache_bytes(cost: str, model: nn.Module, sample: Batch) -> int:
    if not generates(model):
        return 0
    batch, context = tokens_of(model, sample)
    attention, notes = attention_of(model, context)
    if attention is None:
        raise InvalidInputError("cost", f"{cost} cannot be told: {'; '.join(notes)}")
    element_bytes = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    return attention.cache_bytes(context, batch, element_bytes)
