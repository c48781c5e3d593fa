"""A batch of another shape: more or fewer samples, longer or shorter sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch, describe, num_samples


def resized(batch: Batch, *, samples: int | None = None, tokens: int | None = None) -> Batch:
    """Return a batch cut to a shape, or repeated from its beginning up to it.

    `samples` is the size of the first axis of what has one for the samples, `tokens` that of the
    second axis of integer tensors (token ids, masks) that are as long as the first of them; None
    leaves it. Raises InvalidInputError where no tensor has tokens.
    """
    if samples is not None:
        total, wanted = num_samples(batch), samples
        batch = _mapped(
            batch, lambda t: _taken(t, 0, wanted) if t.ndim and t.shape[0] == total else t
        )
    if tokens is not None:
        lengths = [part.shape[1] for part in _parts(batch) if _has_tokens(part)]
        if not lengths:
            raise InvalidInputError(
                "tokens",
                f"tokens are the second axis of integer tensors and the sample ({describe(batch)}) "
                f"has none: give a sample of that shape instead of tokens = {tokens}",
            )
        length, count = lengths[0], tokens
        batch = _mapped(
            batch,
            lambda t: _taken(t, 1, count) if _has_tokens(t) and t.shape[1] == length else t,
        )
    return batch


def _has_tokens(part: Any) -> bool:
    if not isinstance(part, torch.Tensor) or part.ndim < 2 or part.shape[1] == 0:
        return False
    return not (part.is_floating_point() or part.is_complex())


def _taken(part: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    places = torch.arange(size, device=part.device) % part.shape[axis]
    return part.index_select(axis, places)


def _parts(batch: Batch) -> list[Any]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    return list(batch.values() if isinstance(batch, Mapping) else batch)


def _mapped(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    def part(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, torch.Tensor):
        return part(batch)
    if isinstance(batch, Mapping):
        return {key: part(value) for key, value in batch.items()}
    return tuple(part(value) for value in batch)
